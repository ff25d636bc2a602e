"""The command behind a figure or a draft, as their records tell it."""

import re
from pathlib import Path

_TREE = re.compile(r"\d+(/\d+)+")


def command_line(argv: list[str]) -> str:
    """A command without the folders of this machine; trees such as 59/6/10 stay whole."""
    return " ".join(Path(word).name if "/" in word and not _TREE.fullmatch(word) else word for word in argv)


__all__ = ["command_line"]
