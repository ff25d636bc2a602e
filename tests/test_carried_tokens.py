"""When the state of a target with recurrent layers should move on."""

import pytest

from transformers_prism.policy.carried_tokens import CarriedTokens
from transformers_prism.policy.costs import RoundCosts

pytestmark = pytest.mark.quick


# A forward that is bound by reading its weights, and one whose every token costs as much as they do.
FLAT = RoundCosts([1, 64], [1.0, 1.064], 0.05)
STEEP = RoundCosts([1, 64], [1.0, 64.0], 0.05)


def after(num_rounds: int, num_nodes: int, num_kept: int) -> CarriedTokens:
    """What rounds of one kind teach."""
    carried = CarriedTokens()
    for _ in range(num_rounds):
        carried.observe(num_nodes, num_kept)
    return carried


def test_nothing_carried_needs_no_round():
    """There is no state to move."""
    assert not CarriedTokens().should_move_on(0, 1.0, STEEP)


def test_carried_tokens_that_cost_nothing_stay():
    """A forward that reads weights all the time is not made cheaper by dropping tokens from it."""
    assert not after(50, 5, 3).should_move_on(16, 2.0, FLAT)


def test_carried_tokens_that_cost_much_move_the_state_on():
    """Where each token costs a forward's time and a whole chain is seldom accepted, one plain round pays."""
    assert after(50, 5, 3).should_move_on(8, 1.0, STEEP)


def test_a_state_that_soon_moves_by_itself_is_left_alone():
    """Where chains are accepted whole most of the time, the next round does it."""
    costs = RoundCosts([1, 64], [1.05, 4.2], 0.05)
    rarely, often = after(200, 5, 4), after(200, 5, 5)
    rarely.num_tokens = often.num_tokens = 3.5
    assert rarely.should_move_on(8, 1.5, costs)
    assert not often.should_move_on(8, 1.5, costs)


def test_plain_rounds_teach_nothing():
    """Rounds without drafted tokens say nothing about chains."""
    assert vars(after(10, 1, 1)) == vars(CarriedTokens())
