"""Whether rounds with the draft pay, and when one that did not is tried again."""

from .experience import FIRST_PAUSE, Payoff

# The longest pause in rounds; a pause is doubled whenever a try did not pay. The next call waits for a quarter of the
# last one, since its text may be another.
_LONGEST_PAUSE = 64
_SHARE_OF_PAUSE = 4
# Rounds with a tree until the next plain step, where drafting gains less than this.
_CHECK_EVERY, _CLEAR_ADVANTAGE = 16, 1.25
# How fast the rate of rounds with the draft follows the latest round.
_RATE_FADE = 0.85
# Of several sequences, what drafting has to gain; and the share of the time that tries may cost, of one sequence from the
# second try on, so that a draft that was unlucky once is soon tried again.
_LEAST_ADVANTAGE = 1.03
_SHARE_OF_TRIES, _SHARE_OF_TRIES_OF_ONE = 0.01, 0.03


class Trials:
    """Watches the payoff of a call's rounds with the draft, and corrects what [`Experience`] knows of it."""

    def __init__(self, payoffs: dict[int, Payoff], num_sequences: int):
        self.payoffs = payoffs
        self.num_rounds = 0
        self.num_active = 0  # sequences in the latest round
        self.num_unchecked = 0  # rounds with a tree since the last plain step
        self.next_try = 0  # the last round in which the draft is left alone
        # Recent rounds with the draft, in which older ones fade: tokens by sequence and weight, and their time in plain steps.
        self.tokens = self.plain_steps = 1.0
        self.lost = 0.0  # plain steps' time that rounds with the draft have cost since they were tried again
        self.payoff = Payoff()
        self._judge(num_sequences)

    def _judge(self, num_active: int) -> None:
        """Go by what is known of this many active sequences."""
        self.payoff = self.payoffs.setdefault((num_active - 1).bit_length(), Payoff())
        self.tokens, self.plain_steps = max(self.payoff.advantage, 1.0), 1.0
        self.lost = 0.0
        wait = 0 if self.payoff.pause == FIRST_PAUSE else self.payoff.pause // _SHARE_OF_PAUSE
        self.next_try = self.num_rounds + wait

    def begin_round(self, num_active: int) -> None:
        """Count a round; where many sequences have ended, the rest is judged anew."""
        if self.num_active and (num_active - 1).bit_length() != (self.num_active - 1).bit_length():
            self._judge(num_active)
        self.num_rounds += 1
        self.num_active = num_active

    @property
    def is_draft_due(self) -> bool:
        """Whether the draft is worth running, or worth another try."""
        return self.num_rounds > self.next_try

    @property
    def is_check_due(self) -> bool:
        """Whether this round should be a plain step, to see what one costs."""
        return self.num_unchecked >= _CHECK_EVERY and self.payoff.advantage < _CLEAR_ADVANTAGE

    @property
    def speedup(self) -> float:
        """Tokens of rounds with the draft in the time of a plain step, at least 1: there is always plain decoding."""
        return max(1.0, self.tokens / self.plain_steps)

    def observe(self, tokens: float, plain_steps: float, plain_steps_with_reading: float) -> None:
        """Learn from a round with the draft; if such rounds do not pay, leave the draft alone for a while.

        Args:
            tokens (`float`): that it committed, per active sequence and by weight.
            plain_steps, plain_steps_with_reading (`float`): its time, in plain steps; the latter with the time in
                which the draft caught up on earlier rounds.
        """
        self.tokens = _RATE_FADE * self.tokens + tokens
        self.plain_steps = _RATE_FADE * self.plain_steps + plain_steps
        self.payoff.advantage = self.tokens / self.plain_steps
        self.lost += plain_steps_with_reading - tokens
        is_batch = self.num_active > 1
        if self.payoff.advantage >= (_LEAST_ADVANTAGE if is_batch else 1.0):
            self.payoff.pause = FIRST_PAUSE
            return
        # In a batch estimates are noisier.
        pause, share = self.payoff.pause, _SHARE_OF_TRIES if is_batch else _SHARE_OF_TRIES_OF_ONE
        if is_batch or pause > FIRST_PAUSE:
            pause = max(pause, round(self.lost / share))
        self.next_try, self.lost = self.num_rounds + pause, 0.0
        self.payoff.pause = min(2 * self.payoff.pause, _LONGEST_PAUSE)
