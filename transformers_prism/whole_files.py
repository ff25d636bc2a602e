"""Files that are whole or not there, whatever interrupts their writing."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what is written there takes its place at the end, and is gone after an error.

    Processes that write the same file do not get into each other's way.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, with the line ends of Unix on every system."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as a whole, so that an interruption leaves the one that was there."""
    write_text(path, json.dumps(content, indent=2) + "\n")


__all__ = ["whole_file", "write_json", "write_text"]
