"""The measurement of hybrids, at a size that says nothing about time."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.hybrid import COUNTS, _seconds_of, measure, random_target

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_hybrid_is_measured_in_all_ways():
    """Forwards of each size, and every way with its speed, its tokens a round and the share of carried tokens."""
    target = random_target(width=32, num_layers=4, vocab_size=128, dtype=torch.float32)
    result = measure(target, prompt_length=12, num_new=20, acceptance=0.7, depth=3, repeats=1)
    assert sorted(result["forward_seconds"]) == list(COUNTS)
    assert set(result["ways"]) == {"plain", "chain", "auto"}
    assert result["ways"]["plain"]["share_of_carried"] == 0
    assert result["ways"]["chain"]["tau"] > 1.3
    assert abs(result["ways"]["chain"]["share_of_carried"]) < 1


@pytest.mark.quick
def test_costs_between_and_behind_measured_sizes_lie_on_lines():
    """Between two points, and on the last line beyond them."""
    seconds = {1: 1.0, 4: 4.0, 8: 4.0, 16: 8.0}
    assert _seconds_of(seconds, 2) == pytest.approx(2.0)
    assert _seconds_of(seconds, 8) == pytest.approx(4.0)
    assert _seconds_of(seconds, 20) == pytest.approx(10.0)
