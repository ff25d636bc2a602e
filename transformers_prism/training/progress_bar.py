"""Progress of work that takes more than a few seconds: a bar in a terminal, lines elsewhere, both with the time left."""

import os
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Where there is no terminal, a line is printed after 5 seconds and then every half minute.
_FIRST_LINE_SECONDS, _LINE_SECONDS = 5.0, 30.0
# One console for all bars, since nested bars must share it.
_STANDARD_ERROR = Console(stderr=True)


class ProgressBar:
    """A bar for the time of a `with` block, on the standard error stream unless a console is given.

    Args:
        total (`int`, *optional*): how much there is to do; None if that is not known.
        completed (`int`): done before, by an earlier run.
        is_shown (`bool`): False shows nothing, as in all processes of a run but the first.
    """

    def __init__(
        self, description: str, total: int | None, unit: str = "", completed: int = 0, console: Console | None = None,
        is_shown: bool = True
    ):
        self.description, self.total, self.unit = description, total, unit
        self.completed = self.first = completed
        self.console, self.is_shown = console or _STANDARD_ERROR, is_shown and os.environ.get("RANK", "0") == "0"
        self.started = time.monotonic()
        self.next_line = self.started + _FIRST_LINE_SECONDS
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self.bar = Progress(*columns, console=self.console, transient=True)
        self.is_bar = self.is_shown and (self.console.is_terminal or self.console.is_jupyter)
        self.task = self.bar.add_task(description, total=total, completed=completed, text=self.text())

    def text(self) -> str:
        """How much is done, how fast, and the time that is left at that speed."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        speed = (self.completed - self.first) / seconds
        total = "" if self.total is None else f" of {self.total}"
        text = f"{self.completed}{total} {self.unit}".rstrip()
        if not speed:
            return text
        if self.total is None:
            return f"{text}, {speed:.3g}/s"
        left = timedelta(seconds=round(max(self.total - self.completed, 0) / speed))
        return f"{text}, {speed:.3g}/s, {left} left"

    def __enter__(self) -> "ProgressBar":
        if self.is_bar:
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.is_bar:
            self.bar.stop()

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.update(self.completed + count)

    def update(self, completed: int, total: int | None = None) -> None:
        """`completed` units are done in all."""
        self.completed, self.total = completed, total or self.total
        if self.is_bar:
            self.bar.update(self.task, completed=completed, total=self.total, text=self.text())
        elif self.is_shown and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + _LINE_SECONDS
            self.print(f"{self.description}: {self.text()}")

    def print(self, *shown) -> None:
        """Print something above the bar; long lines are not broken."""
        if self.is_shown:
            self.console.print(*shown, soft_wrap=True, highlight=False, markup=False)
