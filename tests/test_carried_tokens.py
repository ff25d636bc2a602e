"""When the state of a target with recurrent layers should move on, and what `tree="auto"` makes of such a target's costs."""

import pytest
from simulated_rounds import SimulatedRounds

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


def memory_bound(num_tokens: int) -> float:
    """Seconds of a forward that mostly reads weights."""
    return 1 + 0.05 * (num_tokens - 1)


def compute_bound(num_tokens: int) -> float:
    """Seconds of a forward whose every token costs the same."""
    return float(num_tokens)


def chunked(num_tokens: int) -> float:
    """Seconds of a forward that handles several tokens in chunks, however few they are."""
    return 1.0 if num_tokens == 1 else 4 + 0.02 * num_tokens


@pytest.mark.parametrize("acceptance", [0.02, 0.7])
@pytest.mark.parametrize("forward_seconds", [compute_bound, chunked])
def test_automatic_chains_cost_nothing_where_they_do_not_pay(monkeypatch, forward_seconds, acceptance):
    """Tries, the draft's reading and carried tokens included, in the first call and in later ones."""
    rounds = SimulatedRounds(forward_seconds, 0.1, acceptance, is_recurrent=True)
    assert all(rounds.call(monkeypatch, 128) > 0.97 for _ in range(3))


@pytest.mark.parametrize("step_seconds", [0.001, 0.1])
def test_automatic_chains_bring_what_costs_allow(monkeypatch, step_seconds):
    """Seven of ten drafted tokens are right."""
    rounds = SimulatedRounds(memory_bound, step_seconds, 0.7, is_recurrent=True)
    assert all(rounds.call(monkeypatch, 128) > (1.5 if step_seconds < 0.1 else 1.2) for _ in range(3))


def test_costs_that_were_measured_far_too_low_are_soon_found_out(monkeypatch):
    """Where several tokens were believed to cost no more than one, what rounds take decides whether they pay."""
    rounds = SimulatedRounds(compute_bound, 0.1, 0.7, is_recurrent=True, believed_seconds=lambda num_tokens: 1.0)
    assert rounds.call(monkeypatch, 128) > 0.7  # 0.35 by beliefs alone
