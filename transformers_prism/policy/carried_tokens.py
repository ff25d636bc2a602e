"""When a target with recurrent layers should advance its state (`recurrent_target.py`).

Tokens that were committed since the kept state run again in every forward, until a round accepts its whole chain. A round
without drafted tokens also advances the state. With k carried tokens that pays if it saves more than it loses:

    what it loses    expected tokens - 1, less rate * (seconds saved in this round)
    what it saves    rate * (seconds of k tokens in a forward) in each round until one accepts its whole chain

Both are estimated from the rounds so far.
"""

# How fast the averages follow the latest round, and the most rounds that savings are counted for.
_RATE, _MOST_ROUNDS = 0.1, 16


class CarriedTokens:
    """Averages over rounds with a chain: tokens they commit, nodes they verify, and how often all are accepted."""

    def __init__(self):
        self.num_tokens, self.num_nodes, self.share_accepted = 2.0, 4.0, 0.3

    def observe(self, num_nodes: int, num_kept: int) -> None:
        """Learn from a round whose chain had `num_nodes` nodes, root included, of which `num_kept` were kept."""
        if num_nodes > 1 and num_kept:
            self.num_tokens += _RATE * (num_kept - self.num_tokens)
            self.num_nodes += _RATE * (num_nodes - self.num_nodes)
            self.share_accepted += _RATE * ((num_kept == num_nodes) - self.share_accepted)

    def should_move_on(self, num_carried: int, rate: float, costs) -> bool:
        """Whether a round without drafted tokens pays, where the next forward runs `num_carried` tokens in addition
        to its tree and a second is worth `rate` tokens."""
        if not num_carried:
            return False
        verify = costs.verify
        drafted = verify(self.num_nodes + num_carried)
        saved_now = drafted + (self.num_nodes - 1) * costs.step_seconds - verify(1 + num_carried)
        lost = self.num_tokens - 1 - rate * saved_now
        saved_later = rate * (drafted - verify(self.num_nodes))
        return saved_later * min(1 / max(self.share_accepted, 1e-6), _MOST_ROUNDS) > lost
