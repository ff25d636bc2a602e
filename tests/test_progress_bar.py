"""The one progress bar: a bar in a terminal, a line now and then elsewhere, with the speed and the time left."""

import io
import re

import pytest
from rich.console import Console

from transformers_prism.training import progress_bar
from transformers_prism.training.progress_bar import ProgressBar

pytestmark = pytest.mark.quick


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    seconds = [100.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: seconds[0])
    return seconds


def console_of(is_terminal):
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=100)


def test_lines_tell_speed_and_time_left(clock):
    """The first after five seconds, then every half minute; what was done before counts for no speed."""
    console = console_of(False)
    with ProgressBar("features", 10_000, "tokens", completed=1000, console=console) as bar:
        for seconds in (1, 5, 20, 34, 36):
            clock[0] = 100.0 + seconds
            bar.update(1000 + 100 * seconds)
    assert console.file.getvalue().splitlines() == [
        "features: 1500 of 10000 tokens, 100/s, 0:01:25 left",
        "features: 4600 of 10000 tokens, 100/s, 0:00:54 left",
    ]


def test_a_terminal_shows_a_bar(clock):
    console = console_of(True)
    with ProgressBar("features", 10, console=console) as bar:
        clock[0] += 2.0
        bar.advance()
        bar.advance(3)
        bar.print("a row of a table, as wide as it is " * 5)
        assert bar.text() == "4 of 10, 2/s, 0:00:03 left"
    text = console.file.getvalue()
    assert re.search(r"features .*4 of 10, 2/s, 0:00:03 left", text)
    assert "a row of a table, as wide as it is " * 5 in text


def test_a_goal_may_grow(clock):
    with ProgressBar("synthesis", 10, console=console_of(False)) as bar:
        clock[0] += 1.0
        bar.update(10, 20)
        assert bar.text() == "10 of 20, 10/s, 0:00:01 left"


@pytest.mark.parametrize(("rank", "options"), [("0", {"is_shown": False}), ("1", {})])
def test_only_the_first_process_shows_a_bar(clock, monkeypatch, rank, options):
    monkeypatch.setenv("RANK", rank)
    console = console_of(False)
    with ProgressBar("features", 10, console=console, **options) as bar:
        clock[0] += 60.0
        bar.advance()
        bar.print("a row")
    assert console.file.getvalue() == ""


def test_a_total_that_is_not_known(clock):
    """As of rows that are read one by one."""
    console = console_of(True)
    with ProgressBar("reading a.jsonl", None, "rows", console=console) as bar:
        clock[0] += 2.0
        bar.advance(300)
        assert bar.text() == "300 rows, 150/s"
    assert "300 rows, 150/s" in console.file.getvalue()


def test_bars_within_bars(clock):
    """A validation in the middle of a stage."""
    console = console_of(True)
    with ProgressBar("split", 10, "updates", console=console) as outer:
        outer.advance()
        with ProgressBar("validation", 4, "batches", console=console) as inner:
            inner.advance(2)
            inner.print("figures")
            outer.bar.refresh()  # as a thread does ten times a second
        outer.advance()
    text = console.file.getvalue()
    for shown in ("validation", "2 of 4 batches", "figures", "2 of 10 updates"):
        assert shown in text
