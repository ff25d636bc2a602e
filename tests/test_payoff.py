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
    while payoff.is_draft_due():
        payoff.observe(1.0, 1.0, 1.0 + loss)
        count += 1
    return count


def waiting(payoff: Payoff) -> int:
    """Plain steps until the draft is due."""
    count = 0
    while not payoff.is_draft_due():
        payoff.observe_tokens(1.0)
        count += 1
    return count


def test_what_a_try_risks_has_to_be_there():
    """An allowance at first; then nothing until a share of all tokens is more, and that share from then on."""
    payoff = Payoff()
    payoff.begin_round(1)
    assert losing(payoff, 0.5) == 7
    assert waiting(payoff) == pytest.approx(3.6 / 0.02 + 20, abs=15)
    for _ in range(3):
        assert losing(payoff, 0.5) == 1
        assert waiting(payoff) == pytest.approx(0.5 / 0.02, abs=2)


def test_a_try_that_risks_more_than_the_allowance_is_made_in_the_end():
    """Where forwards over several tokens cost many plain steps."""
    payoff = Payoff()
    payoff.begin_round(1)
    assert losing(payoff, 6.0) == 1
    assert waiting(payoff) < 500


def test_what_earlier_rounds_will_yet_cost_is_set_aside():
    """Before the next one risks as much again."""
    payoff = Payoff()
    payoff.begin_round(1)
    payoff.observe(1.0, 1.0, 2.5)
    assert payoff.is_draft_due()
    assert not payoff.is_draft_due(owed=1.0)


def test_few_gains_are_saved_up():
    """A draft that paid a thousand times does not lose all that for an answer that it knows nothing of."""
    payoff = Payoff()
    payoff.begin_round(1)
    for _ in range(1000):
        payoff.observe(3.0, 3.0, 1.5)
    assert payoff.speedup == pytest.approx(2.0)
    assert losing(payoff, 0.5) <= 17


def test_tries_are_short_until_drafting_pays():
    """Draft steps cost something, too."""
    payoff = Payoff()
    payoff.begin_round(1)
    assert payoff.most_steps(8) == 4
    payoff.observe(3.0, 3.0, 1.5)
    assert payoff.most_steps(8) == 8


def test_another_number_of_sequences_is_judged_by_its_own_rounds():
    """Within one balance, so that a batch that shrinks does not lose an allowance for each size."""
    payoff = Payoff()
    for num_active in (16, 8, 4, 2, 1):
        payoff.begin_round(num_active)
        assert payoff.is_draft_due()
        losing(payoff, 0.5)
        payoff.balance = max(payoff.balance, 0.0)
    assert set(payoff.by_size) == {0, 1, 2, 3, 4}


def test_catching_up_counts_for_a_draft_that_does_not_pay():
    """One that pays gains by it in every later round."""
    balances = []
    for expected in (0.5, 2.0):
        payoff = Payoff()
        payoff.begin_round(1)
        payoff.observe(expected, expected, 1.0)
        before = payoff.balance
        payoff.observe(1.0, 1.0, 1.0, reading=2.0)
        balances.append(payoff.balance - before)
    assert balances == pytest.approx([-2.0, 0.0])


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
USELESS = tuple(itertools.product((1.3, 2.4), (0.1, 0.3), (0.0, 0.5)))


def speeds_of(monkeypatch, rounds: SimulatedRounds, num_tokens: int, num_calls: int) -> list[float]:
    """Speeds of calls over plain decoding, none of them far below it, together above `LEAST`."""
    speeds = [rounds.call(monkeypatch, num_tokens) for _ in range(num_calls)]
    assert in_all(speeds) > LEAST
    # A short answer may lose what one try costs, at most the allowance and what a round risks.
    assert min(speeds) > (0.82 if num_tokens < 128 else 0.95)
    assert num_tokens < 128 or speeds[0] > LEAST - 0.005
    return speeds


@pytest.mark.parametrize("acceptance", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize(("several", "step"), COSTS)
def test_speed_is_that_of_plain_decoding_or_near_the_best(monkeypatch, several, step, acceptance):
    """Ten answers of 24 tokens, and some of 128 and 512; the best is that of chains of one length, chosen beforehand."""
    best = fixed_size_speed(several, step, acceptance)
    for num_tokens, num_calls in ((24, 10), (128, 2), (512, 1)):
        speeds = speeds_of(monkeypatch, rounds_of(several, step, acceptance), num_tokens, num_calls)
        if several < 2.0 and num_tokens >= 128:
            assert speeds[-1] > 0.8 * best


@pytest.mark.parametrize("kind", [{}, {"top_k": 4}, {"num_sequences": 4}, {"is_recurrent": True}], ids=str)
def test_an_overconfident_draft_costs_little(monkeypatch, kind):
    """It says 0.9, and is right in half of the cases or never: chains, trees, batches, and carried tokens."""
    for several, step, acceptance in USELESS:
        for num_tokens, num_calls in ((24, 10), (128, 2)):
            speeds_of(monkeypatch, rounds_of(several, step, acceptance, said=0.9, **kind), num_tokens, num_calls)


def test_a_machine_on_which_trees_become_dear_is_soon_noticed(monkeypatch):
    """The call in which it happens loses; later ones do not."""
    several = 1.05
    rounds = SimulatedRounds(lambda num_tokens: 1.0 if num_tokens == 1 else several, 0.02, 0.7)
    assert all(rounds.call(monkeypatch, 128) > 1.5 for _ in range(3))
    several = 4.0
    speeds = [rounds.call(monkeypatch, 128) for _ in range(4)]
    assert speeds[0] > 0.6
    assert min(speeds[2:]) > LEAST
