"""The releases of transformers that this code was tried with, and the warning on any other.

A draft's repository has a copy of this code, which no update of the package reaches. So the code itself has to notice that a
release is newer than it is.
"""

import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The oldest and the newest: the tests passed on both.
TRIED_TRANSFORMERS = ("5.23.0", "5.24.0")
# Releases that this process has warned about, so that it warns once for each.
_told: set[str] = set()


def this_release() -> str:
    """The release of transformers that runs."""
    # Looked up each time, since transformers replaces its own module while it is imported.
    return importlib.import_module("transformers").__version__


def untried_release() -> str | None:
    """The warning on a release of transformers that this code was not tried with; None on one that it was tried with."""
    version = this_release()
    oldest, newest = TRIED_TRANSFORMERS
    if _numbers(oldest) <= _numbers(version) <= _numbers(newest):
        return None
    # The package in which transformers puts code from repositories.
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
    """Warn if the release was not tried, once in a process for each release."""
    message = untried_release()
    if message is not None and this_release() not in _told:
        _told.add(this_release())
        warnings.warn(message, stacklevel=stacklevel + 1)


@contextmanager
def errors_tell_of_untried_release() -> Iterator[None]:
    """Warn, before an error leaves the block, if the release was not tried; not for an OSError, such as a missing file."""
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
