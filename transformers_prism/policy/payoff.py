"""Whether rounds with the draft pay, and how much may be lost until that is known.

Only drafting shows whether drafting pays, so a draft that does not pay costs something. A balance bounds this cost, in plain
steps, over all calls in which a process uses a draft:

    it starts at    an allowance
    it grows by     what rounds with the draft gain, and by a share of each token, once that share of all is more than the
                    allowance
    it shrinks by   what they lose
    it has a limit, so that gains of one text do not pay for a long loss in the next

A round drafts if the balance covers what it would lose if the target accepted nothing. All losses together are then at most
the allowance or that share of all tokens, whichever is more, plus what a round risks in excess of the one before it.
"""

from dataclasses import dataclass, field

# Plain steps that drafting may lose, or this share of all tokens once that is more.
_ALLOWANCE, _SHARE = 3.6, 0.02
# The most that the balance can be.
_LIMIT = 8.0
# Draft steps of a round while it is not known that drafting pays.
_STEPS_OF_TRIES = 4
# How fast averages follow the latest round with the draft.
_FADE = 0.85
# Rounds with a tree until the next plain step, where drafting gains less than this.
_CHECK_EVERY, _CLEAR_ADVANTAGE = 16, 1.25


@dataclass
class Recent:
    """Rounds with the draft for a number of active sequences, in which older ones fade.

    Args:
        tokens, plain_steps: sums of their weighted tokens per sequence, and of their time in plain steps; 1 each at first.
        risk: what a round loses, in plain steps, if the target accepts nothing.
    """

    tokens: float = 1.0
    plain_steps: float = 1.0
    risk: float = 0.0

    @property
    def advantage(self) -> float:
        """Tokens of rounds with the draft in the time of a plain step."""
        return self.tokens / self.plain_steps


@dataclass
class Payoff:
    """What a draft's rounds have brought, and what they may lose; kept from call to call.

    Args:
        by_size: recent rounds by class of the number of active sequences: 1, 2, up to 4, up to 8 and so on.
        recent: those for the active sequences of the current round.
        balance: plain steps that rounds with the draft may lose.
        num_tokens: per sequence, in all rounds.
        num_unchecked: rounds with a tree since the last plain step.
    """

    by_size: dict[int, Recent] = field(default_factory=dict)
    recent: Recent = field(default_factory=Recent)
    balance: float = _ALLOWANCE
    num_tokens: float = 0.0
    num_unchecked: int = 0

    def begin_round(self, num_active: int) -> None:
        """Judge by rounds of about this many sequences."""
        self.recent = self.by_size.setdefault((num_active - 1).bit_length(), Recent())

    def is_draft_due(self, owed: float = 0.0) -> bool:
        """Whether a round may run the draft, where earlier ones will still cost `owed` plain steps. A round that risks more
        than the allowance may run once the balance is as large as the allowance."""
        return self.balance - owed >= min(self.recent.risk, _ALLOWANCE)

    def most_steps(self, depth: int) -> int:
        """Draft steps that a round may have, at most `depth`; few while it is not known that drafting pays."""
        return depth if self.recent.advantage > 1.0 else min(depth, _STEPS_OF_TRIES)

    @property
    def is_check_due(self) -> bool:
        """Whether the round should be a plain step, to see what one costs."""
        return self.num_unchecked >= _CHECK_EVERY and self.recent.advantage < _CLEAR_ADVANTAGE

    @property
    def speedup(self) -> float:
        """Tokens of rounds with the draft in the time of a plain step, at least 1: there is always plain decoding."""
        return max(1.0, self.recent.advantage)

    def observe_tokens(self, tokens: float, gain: float = 0.0) -> None:
        """Note the tokens per sequence of a round, and what it gained over plain steps."""
        self.num_tokens += tokens
        share = _SHARE * tokens if _SHARE * self.num_tokens > _ALLOWANCE else 0.0
        self.balance = min(self.balance + share + gain, _LIMIT)

    def observe(self, tokens: float, expected: float, plain_steps: float, reading: float = 0.0) -> None:
        """Learn from a round with the draft.

        Args:
            tokens (`float`): weighted tokens that it committed per active sequence.
            expected (`float`): the same as an estimate with less noise, for the advantage.
            plain_steps (`float`): its time, in plain steps.
            reading (`float`): time in which the draft read the prompt or caught up on earlier rounds, in plain steps;
                it is not counted for a draft that pays, since every later round gains by it.
        """
        recent = self.recent
        pays = recent.advantage >= 1.0
        self.observe_tokens(tokens, tokens - plain_steps - (0.0 if pays else reading))
        recent.tokens = _FADE * recent.tokens + expected
        recent.plain_steps = _FADE * recent.plain_steps + plain_steps
        recent.risk = max(_FADE * recent.risk, plain_steps - 1.0 + (0.0 if pays else reading))
