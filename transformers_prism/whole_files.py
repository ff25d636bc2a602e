"""Write files so that they are never incomplete, whatever interrupts the writing."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path next to `path` to write to. What is written there replaces `path` at the end, and is removed after an error.

    Processes and threads can write the same file at the same time. A `path` that is there but is not a regular file, such as
    a pipe or `/dev/stdout`, is written to directly.
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
        with contextlib.suppress(OSError):  # if removing it fails, too, the first error is the one to report
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, with the line ends of Unix on every system."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file as a whole, so that an interruption leaves the one that was there."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path, expected: str = "a JSON object", parse_constant: Callable[[str], Any] | None = None) -> dict:
    """The object in a JSON file.

    Args:
        path (`Path`): the file.
        expected (`str`): what it should hold, for errors.
        parse_constant (`Callable`, *optional*): called with NaN and infinities, as `json.loads` does.
    Returns:
        `dict`: what it holds.
    Raises:
        ValueError: if it is not there, or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=parse_constant)
    except FileNotFoundError:
        raise ValueError(f"expected a file {path.name}, got none in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected {expected}, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected {expected}, got {type(content).__name__}")
    return content


def write_json_if_possible(path: Path, content: dict) -> None:
    """Write a JSON file as [`write_json`] does, and make its folder; an OSError is ignored."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def are_same_paths(first: str, second: str) -> bool:
    """Whether two lists of paths, separated by commas, name the same, however they are written."""
    return [os.path.abspath(path) for path in first.split(",")] == [os.path.abspath(path) for path in second.split(",")]


def name_of_parts(parts: list) -> str:
    """A file name derived from these parts, which JSON must be able to hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


__all__ = ["name_of_parts", "whole_file", "write_json", "write_json_if_possible", "write_text"]
