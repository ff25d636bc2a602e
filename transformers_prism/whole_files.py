"""Files that are whole or not there, whatever interrupts their writing."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what is written there takes its place at the end, and is gone after an error.

    Processes and threads that write the same file do not get into each other's way. What is there and no file, such as a pipe
    or `/dev/stdout`, is written to directly.
    """
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    if is_special or path.absolute().parent in (Path("/dev"), Path("/dev/fd")):  # `/dev/stdout` may be a link to a file
        yield path
        return
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a disk that lets nothing be removed; the first error is the one to see
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, with the line ends of Unix on every system."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as a whole, so that an interruption leaves the one that was there."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_json_if_possible(path: Path, content: dict) -> None:
    """Write a JSON file as [`write_json`] does, its folder with it; a disk that takes nothing is no error."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def name_of_parts(parts: list) -> str:
    """A file name for what depends on these parts, which JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


__all__ = ["name_of_parts", "whole_file", "write_json", "write_json_if_possible", "write_text"]
