"""The releases of transformers that this code was tried with, and what it says on another one.

A draft's repository carries this code, and no release of the package reaches it there: only the code itself can tell that
a release is newer than it is.
"""

import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The oldest and the newest: the tests passed on both.
TRIED_TRANSFORMERS = ("5.23.0", "5.24.0")
# Releases that were told of in this process, so that each is told of once.
_told: set[str] = set()


def this_release() -> str:
    """The release of transformers that runs."""
    # Looked up anew: transformers puts another module in its own place while it is imported.
    return importlib.import_module("transformers").__version__


def untried_release() -> str | None:
    """What to know, and to do, on a release of transformers that this code was not tried with; None on one that it was."""
    version = this_release()
    oldest, newest = TRIED_TRANSFORMERS
    if _numbers(oldest) <= _numbers(version) <= _numbers(newest):
        return None
    # Where transformers puts the code of repositories.
    is_published = __name__.startswith("transformers_modules.")
    remedy = "update it, or try its tests on this release"
    if is_published:
        remedy = (
            "whoever published the draft can renew its code with `transformers-prism push --code-only USER/DRAFT`, or "
            "install and import the newest transformers_prism, whose own code then runs"
        )
    code = "this draft's code" if is_published else "transformers_prism"
    return f"{code} was tried with transformers {oldest} to {newest}, this is {version}; {remedy}"


def warn_of_untried_release(stacklevel: int = 2) -> None:
    """Say so in a warning, once in a process for each release."""
    message = untried_release()
    if message is not None and this_release() not in _told:
        _told.add(this_release())
        warnings.warn(message, stacklevel=stacklevel + 1)


@contextmanager
def errors_tell_of_untried_release() -> Iterator[None]:
    """Errors that come out of a block are raised as they are, behind that warning; files that are not there are no reason."""
    try:
        yield
    except OSError:
        raise
    except Exception:
        warn_of_untried_release(stacklevel=4)
        raise


def _numbers(version: str) -> tuple[int, ...]:
    """ "5.24.0.dev0" as (5, 24, 0); what follows the numbers does not matter here."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
