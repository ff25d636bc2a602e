"""Whether rounds with the draft pay, and what finding that out may cost, in simulated time."""

import itertools

import pytest
from simulated_rounds import SimulatedRounds

from transformers_prism.policy.payoff import Payoff

pytestmark = pytest.mark.quick

# Of plain decoding's speed, what tree="auto" keeps whatever drafting brings.
LEAST = 0.97


def losing(payoff: Payoff, loss: float) -> int:
    """Rounds that lose, one after the other, until no more are due; returns how many."""
    count = 0
    while payoff.is_draft_due:
        payoff.observe(1.0, 1.0, 1.0 + loss)
        count += 1
    return count


def waiting(payoff: Payoff) -> int:
    """Plain steps until the draft is due."""
    count = 0
    while not payoff.is_draft_due:
        payoff.observe_plain(1.0)
        count += 1
    return count


def test_what_a_try_loses_is_saved_up_before_the_next():
    """At two hundredths of a plain step for each token; what is not yet known may lose a bit more at first."""
    payoff = Payoff()
    payoff.begin_round(1)
    assert losing(payoff, 0.3) == 4
    waiting(payoff)
    for loss in (0.3, 0.3):
        assert losing(payoff, loss) == 1
        assert waiting(payoff) == pytest.approx(loss / 0.02, abs=1)


def test_gains_are_not_saved_up():
    """A draft that paid a thousand times may lose as much as a new one."""
    payoff = Payoff()
    payoff.begin_round(1)
    for _ in range(1000):
        payoff.observe(3.0, 3.0, 1.5)
    assert payoff.balance == Payoff().balance
    assert payoff.speedup == pytest.approx(2.0)
    assert losing(payoff, 0.5) <= 4


def test_rounds_that_gain_are_never_held_back():
    """Even after some that lost."""
    payoff = Payoff()
    payoff.begin_round(1)
    losing(payoff, 1.0)
    waiting(payoff)
    for _ in range(20):
        assert payoff.is_draft_due
        payoff.observe(2.0, 2.0, 1.5)


def test_another_number_of_sequences_is_judged_by_its_own_rounds():
    """Within one balance, so that a batch that shrinks does not lose an allowance for each size."""
    payoff = Payoff()
    for num_active in (16, 8, 4, 2, 1):
        payoff.begin_round(num_active)
        losing(payoff, 0.5)
    assert set(payoff.by_size) == {0, 1, 2, 3, 4}
    assert payoff.balance > -1.5


def test_catching_up_counts_for_a_draft_that_does_not_pay():
    """One that pays gains by it in every later round."""
    balances = []
    for expected in (0.5, 2.0):
        payoff = Payoff(balance=0.0)
        payoff.begin_round(1)
        payoff.observe(expected, expected, 1.0)
        before = payoff.balance
        payoff.observe(1.0, 1.0, 1.0, reading=5.0)
        balances.append(payoff.balance - before)
    assert balances == pytest.approx([0.02 - 5.0, 0.02])


def test_plain_steps_are_looked_at_where_drafting_hardly_pays():
    """Once in a number of rounds; where it clearly pays, never."""
    payoff = Payoff()
    payoff.begin_round(1)
    payoff.recent.tokens, payoff.num_unchecked = 1.1, 15
    assert not payoff.is_check_due
    payoff.num_unchecked = 16
    assert payoff.is_check_due
    payoff.recent.tokens = 1.5
    assert not payoff.is_check_due


def fixed_size_speed(several: float, step: float, acceptance: float) -> float:
    """Speed over plain decoding with chains of the best fixed length, known beforehand."""
    best = 1.0
    for length in range(1, 9):
        tokens = sum(acceptance**depth for depth in range(length + 1))
        best = max(best, tokens / (several + step * (length + 0.02 * tokens)))
    return best


def rounds_of(several: float, step: float, acceptance: float, num_sequences: int = 1, **settings) -> SimulatedRounds:
    """Rounds where a forward over several tokens takes `several` plain steps, and a draft step `step`."""

    def seconds(num_tokens: int) -> float:
        return 1.0 if num_tokens <= num_sequences else several

    return SimulatedRounds(seconds, step, acceptance, num_sequences=num_sequences, **settings)


def in_all(speeds: list[float]) -> float:
    """Speed over several calls of one length."""
    return len(speeds) / sum(1 / speed for speed in speeds)


COSTS = tuple(itertools.product((1.0, 1.3, 2.0, 2.4, 4.0), (0.02, 0.1, 0.3)))


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(("several", "step"), COSTS)
def test_speed_is_that_of_plain_decoding_or_near_the_best(monkeypatch, several, step, acceptance):
    """Answers of 24, 128 and 512 tokens, of one draft in turn and of a new one."""
    best = fixed_size_speed(several, step, acceptance)
    for num_tokens, num_calls in ((24, 10), (128, 2), (512, 1)):
        rounds = rounds_of(several, step, acceptance)
        speeds = [rounds.call(monkeypatch, num_tokens) for _ in range(num_calls)]
        assert in_all(speeds) > LEAST
        assert min(speeds) > (0.9 if num_tokens == 24 else LEAST)
        assert speeds[-1] > 0.8 * best
