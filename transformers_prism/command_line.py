"""The command that produced a figure or a draft, and versions of packages, for their records."""

import re
import shlex
import sys
from pathlib import Path

_TREE = re.compile(r"\d+(/\d+)+")
# A part that may be a path in a word such as `--data=first,second`.
_PART = re.compile(r"[^,=]*/[^,=]*")


def command_line(argv: list[str]) -> str:
    """A command to copy into a shell, without this machine's folders in its paths; trees such as 59/6/10 stay as they are."""
    words = (_PART.sub(lambda part: part[0] if _TREE.fullmatch(part[0]) else Path(part[0]).name, word) for word in argv)
    return " ".join(shlex.quote(word) if " " in word and place else word for place, word in enumerate(words))


def this_command() -> str:
    """The command of this process as [`command_line`] writes it; a module that was started with `python -m` is shown so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return command_line([f"python -m {spec.name}" if spec else sys.argv[0], *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of this package, torch and transformers."""
    # As strings: torch's version is of a class of its own, which files of tensors cannot hold.
    return {name: str(sys.modules[name].__version__) for name in ("transformers_prism", "torch", "transformers")}
