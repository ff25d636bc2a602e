"""The command behind a figure or a draft, and versions, as their records tell them."""

import re
import shlex
import sys
from pathlib import Path

_TREE = re.compile(r"\d+(/\d+)+")
# What may be a path of its own in a word such as `--data=first,second`.
_PART = re.compile(r"[^,=]*/[^,=]*")


def command_line(argv: list[str]) -> str:
    """A command without the folders of this machine, to be copied into a shell; trees such as 59/6/10 stay whole."""
    words = (_PART.sub(lambda part: part[0] if _TREE.fullmatch(part[0]) else Path(part[0]).name, word) for word in argv)
    return " ".join(shlex.quote(word) if " " in word and place else word for place, word in enumerate(words))


def this_command() -> str:
    """The command of this process: [`command_line`], with `python -m` in front of a module that was started so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return command_line([f"python -m {spec.name}" if spec else sys.argv[0], *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of what computed something."""
    # torch's is of a class of its own, which files of tensors do not take.
    return {name: str(sys.modules[name].__version__) for name in ("transformers_prism", "torch", "transformers")}
