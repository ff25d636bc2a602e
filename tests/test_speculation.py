"""Statistics."""

import math

import pytest

from transformers_prism.decoding.speculation import Speculation

pytestmark = pytest.mark.quick


def test_acceptance_is_pooled_over_rows():
    """tau counts the bonus; the conditional rates are those of rounds that got so far."""
    speculation = Speculation.empty(2)
    for row, emitted in ((0, 4), (0, 1), (1, 2), (1, 1)):
        speculation.add_round(row, emitted)
    assert speculation.num_rounds == [2, 2]
    assert speculation.num_committed == [5, 3]
    assert speculation.accepted_per_round == [[3, 0], [1, 0]]
    assert speculation.acceptance_length == 2.0
    assert speculation.conditional_acceptance == [0.5, 0.5, 1.0, 0.0]


def test_nothing_done_is_not_a_number():
    """No round, no acceptance length."""
    speculation = Speculation.empty(1)
    assert math.isnan(speculation.acceptance_length)
    assert speculation.conditional_acceptance == []


def test_time_is_counted_also_where_a_phase_fails():
    """And lands in its phase."""
    speculation = Speculation.empty(1)
    with pytest.raises(KeyError), speculation.timed("draft"):
        raise KeyError
    assert speculation.seconds["draft"] > 0
    assert speculation.seconds["verify"] == 0
