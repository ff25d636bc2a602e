"""What outlives a generate() call: kept with the object that it is about, for as long as that object lives.

    of a cache    what a draft has read of the chat in it (`chat.py`)
    of a draft    how often its nodes were accepted
    of a target   costs of rounds, sizes that its compiled forwards know, warnings given, how far it was checked
"""

import re
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

# Not attributes of the objects themselves: those would be saved, copied and compared with them, and a model's owner should
# find it as it was.
_memories: WeakKeyDictionary = WeakKeyDictionary()


def kept_with(owner, name: str, make: Callable[[], Any]) -> Any:
    """What is kept with an object under a name; made when it is first asked for."""
    memory = _memories.setdefault(owner, {})
    if name not in memory:
        memory[name] = make()
    return memory[name]


def keep_with(owner, name: str, value) -> None:
    """Keep a value with an object, in place of an earlier one of this name."""
    _memories.setdefault(owner, {})[name] = value


def take_from(owner, name: str) -> Any:
    """Remove and return the value kept with an object under a name; None if there is none."""
    return _memories.get(owner, {}).pop(name, None)


def warn_once(owner, message: str, stacklevel: int) -> None:
    """Warn, unless a message about this object was given that differs in numbers alone."""
    told = kept_with(owner, "warnings", dict)
    if told.setdefault(re.sub(r"\d[\d.e+-]*", "0", message), message) == message:
        warnings.warn(message, stacklevel=stacklevel + 1)
