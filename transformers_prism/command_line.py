"""The command behind a figure or a draft, as their records tell it."""

import re
from pathlib import Path

_TREE = re.compile(r"\d+(/\d+)+")
# What may be a path of its own in a word such as `--data=first,second`.
_PART = re.compile(r"[^,=]*/[^,=]*")


def command_line(argv: list[str]) -> str:
    """A command without the folders of this machine; trees such as 59/6/10 stay whole."""
    return " ".join(_PART.sub(lambda part: part[0] if _TREE.fullmatch(part[0]) else Path(part[0]).name, word) for word in argv)


__all__ = ["command_line"]
