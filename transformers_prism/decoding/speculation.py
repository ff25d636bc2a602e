"""What a generate() call with a draft did: rounds, accepted tokens, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from .round_values import Proposal


def acceptance_length(num_committed: float, num_rounds: float) -> float | None:
    """tau: committed tokens per round, the bonus included; None without a round."""
    return num_committed / num_rounds if num_rounds else None


class RoundTree(NamedTuple):
    """The tree of one round: draft steps run (0: the draft was not used), drafted nodes that were verified in each
    sequence, how many of them were copied from the text, and tokens that the round was expected to commit per sequence,
    in a batch weighted by what they count (None: no estimate was made)."""

    num_steps: int
    num_nodes: int
    num_copied: int = 0
    expected_tokens: float | None = None


@dataclass
class Speculation:
    """Statistics of one generate() call; lists have one entry per sequence of the batch.

    Args:
        num_rounds: rounds (target forwards) that the sequence took part in; the prefill is not counted.
        num_committed: tokens emitted by those rounds, after cutting at the end; the prefill's token is not counted.
        accepted_per_round: accepted draft tokens of each round, the bonus token not counted. A token at which the
            sequence ended counts as the bonus.
        seconds: wall-clock seconds on the host, split into "draft", "check", "verify", "commit" and "other". On an
            accelerator a phase is charged for work that an earlier one queued.
        trees: the tree of each round, for the whole batch.
        estimates: with `tree="auto"`, what its choices are based on at the end: seconds of a round's parts, probability of
            acceptance by class of draft probability and depth; None otherwise.
        target: how the target verified: "tree", on layers lent to its cache, or "chain", on its own cache, rolled back;
            None if the draft was not used.
        coupled: whether the draft saw the random numbers that the target sampled with (see `sampling_noise.py`).
        walk: where next tokens were chosen: "device", with one read per round, or "host", node by node; None if the
            draft was not used.
        declined: why the draft was not used and plain decoding ran instead; None if it was used.
        why_no_tree: why a chain stood in for trees; None where trees were verified.
        stopped_drafting: what a check of a target that nobody has tried found, after which only plain steps were made; None if
            nothing was found.
    """

    num_rounds: list[int]
    num_committed: list[int]
    accepted_per_round: list[list[int]]
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("draft", "check", "verify", "commit", "other"), 0.0)
    )
    trees: list[RoundTree] = field(default_factory=list)
    estimates: dict | None = None
    target: str | None = None
    coupled: bool = False
    walk: str | None = None
    declined: str | None = None
    why_no_tree: str | None = None
    stopped_drafting: str | None = None

    @classmethod
    def empty(cls, num_sequences: int) -> "Speculation":
        """Nothing done yet for `num_sequences` sequences."""
        return cls([0] * num_sequences, [0] * num_sequences, [[] for _ in range(num_sequences)])

    @property
    def acceptance_length(self) -> float:
        """tau, pooled: committed tokens per round over all sequences, the bonus included; NaN without a round."""
        tau = acceptance_length(sum(self.num_committed), sum(self.num_rounds))
        return float("nan") if tau is None else tau

    @property
    def conditional_acceptance(self) -> list[float]:
        """For draft step i = 0, 1, ...: share of rounds that accepted more than i tokens among those that accepted i.

        Source: PRISM artifact, `draw_pos_6.py`.
        """
        accepted = [count for rounds in self.accepted_per_round for count in rounds]
        deepest = max(accepted, default=0)
        reached = [sum(count >= step for count in accepted) for step in range(deepest + 2)]
        return [reached[step + 1] / reached[step] for step in range(deepest + 1)] if accepted else []

    def add_round(self, index: int, num_emitted: int) -> None:
        """Count a round in which a sequence emitted `num_emitted` tokens, at least 1."""
        self.num_rounds[index] += 1
        self.num_committed[index] += num_emitted
        self.accepted_per_round[index].append(num_emitted - 1)

    def add_rounds(self, active: list[int], kept: list[list[int]], proposal: Proposal) -> None:
        """Count a round in which each of these sequences emitted as many tokens as nodes are kept; 0 where it was done."""
        for index, nodes in zip(active, kept, strict=True):
            if nodes:
                self.add_round(index, num_emitted=len(nodes))
        expected = proposal.expected_tokens
        expected = None if expected is None else expected / len(kept)
        self.trees.append(
            RoundTree(proposal.num_steps, proposal.tree.num_nodes - 1, proposal.num_copied, expected)
        )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
