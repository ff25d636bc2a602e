"""What rounds have taught about a draft: how often its nodes were accepted, and whether it paid.

Nodes are put in cells, those of the draft by depth and by class of cumulative probability, those that were copied from the
text by depth and by length of the match. The value of a node is the share of its cell's earlier nodes that were accepted.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import torch

from .carried_tokens import CarriedTokens
from .ngrams import MAX_MATCH
from .payoff import Payoff

# Edges of the classes of cumulative draft probability, finer where most accepted nodes are.
EDGES = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.11, 0.16, 0.23, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_LOG_EDGES = [math.log(edge) for edge in EDGES]
_MAX_DEPTH = 8  # deeper nodes share its statistics
MAX_COPIED = 10  # tokens of a copied continuation
# A cell's observations count half after 140 more of its own rounds, so that estimates follow the text.
_FADE = 0.995
# A new draft is trusted as if this many nodes of each cell had been seen, accepted a bit less often than it says.
_PRIOR_WEIGHT = 8.0
_PRIOR_TRUST = 0.8
# Value of one more draft step, relative to the step before it, at first; and how fast it follows the latest round.
STEP_GAIN = 0.7
_GAIN_RATE = 0.1
# Values of planned trees: that of step 0's nodes at first; how fast values follow rounds, and how fast unseen ones drift back.
FIRST_VALUE = 0.6
_RATE, _DRIFT = 0.1, 0.02
MAX_PLANNED = 127  # nodes


class AcceptanceTable:
    """How often nodes were accepted, by cell; each starts from its probability in `prior` `(rows, columns)`."""

    def __init__(self, prior: torch.Tensor):
        self.num_columns = prior.shape[1]
        self.chances: list[float] = prior.flatten().tolist()  # of acceptance
        self.num_seen = [_PRIOR_WEIGHT] * len(self.chances)
        self.num_accepted = [chance * _PRIOR_WEIGHT for chance in self.chances]

    def observe(self, cells: list[int], is_accepted: list[bool]) -> None:
        """Add observations: flat indices of cells, negative ones to be ignored, and what became of each."""
        counts: dict[int, tuple[int, int]] = {}
        for cell, accepted in zip(cells, is_accepted, strict=True):
            if cell >= 0:
                num_new, num_good = counts.get(cell, (0, 0))
                counts[cell] = (num_new + 1, num_good + accepted)
        for cell, (num_new, num_good) in counts.items():
            self.num_seen[cell] = self.num_seen[cell] * _FADE + num_new
            self.num_accepted[cell] = self.num_accepted[cell] * _FADE + num_good
            self.chances[cell] = self.num_accepted[cell] / self.num_seen[cell]

    def rows(self) -> list[list[float]]:
        """Chances of acceptance in the shape of the prior."""
        width = self.num_columns
        return [self.chances[start : start + width] for start in range(0, len(self.chances), width)]


def _drafted_prior() -> torch.Tensor:
    """By depth and class of probability: a bit less than the middle of the class."""
    edges = torch.tensor([0.0, *EDGES, 1.0], dtype=torch.float64, device="cpu")
    return _PRIOR_TRUST * ((edges[1:] + edges[:-1]) / 2).expand(_MAX_DEPTH, -1)


def _copied_prior() -> torch.Tensor:
    """By length of the match and depth: longer matches are right more often; each token multiplies by the same chance."""
    chance = torch.linspace(0.2, 0.6, MAX_MATCH + 1, dtype=torch.float64, device="cpu")[:, None]
    return chance ** torch.arange(1, MAX_COPIED + 1, device="cpu")


def class_of(log_prob: float) -> int:
    """Class of a cumulative log-probability, 0 for the smallest."""
    return bisect_left(_LOG_EDGES, log_prob)


def first_cell(depth: int) -> int:
    """Cell of drafted nodes of the smallest class at a depth, 1 or more; the other classes follow it."""
    return (min(depth, _MAX_DEPTH) - 1) * (len(EDGES) + 1)


def cells_of_drafted(depths: list[int], log_probs: list[float]) -> list[int]:
    """The cell of each drafted node of a sequence."""
    return [first_cell(depth) + class_of(log_prob) for depth, log_prob in zip(depths, log_probs, strict=True)]


def _rank_values() -> torch.Tensor:
    """Values that each rank starts from, together about two tokens for 63 nodes."""
    return FIRST_VALUE * torch.arange(1, MAX_PLANNED + 1, dtype=torch.float64, device="cpu") ** -1.2


@dataclass
class PlanValues:
    """Expected values of a tree that is planned before its round, on average over sequences: `first`, that of all nodes that
    step 0 proposes, and `ranks` `(MAX_PLANNED,)`, those of the best node, of the second best and so on."""

    first: float = FIRST_VALUE
    ranks: torch.Tensor = field(default_factory=_rank_values)

    def observe(self, values: torch.Tensor, depths: torch.Tensor) -> None:
        """Learn from the values `(B, n)` of a tree's nodes, at these depths."""
        first = float(values[depths == 1].sum()) / len(values)
        self.first += _RATE * (min(first, 1.0) - self.first)
        # Ranks that small trees do not reach return to where they began, so that larger trees are tried again.
        self.ranks += _DRIFT * (_rank_values() - self.ranks)
        seen = values.sort(dim=1, descending=True).values.mean(dim=0)
        self.ranks[: values.shape[1]] += _RATE * (seen - self.ranks[: values.shape[1]])


@dataclass
class Experience:
    """What rounds have taught about a draft, kept from one generate() call to the next.

    Args:
        drafted, copied: acceptance of the draft's nodes and of copied ones.
        step_gain: value that one more draft step brings, over the value of the nodes that it expands.
        plan: expected values of planned trees.
        payoff: whether its rounds pay, and what they may lose.
        carried: for targets with recurrent layers, when they should advance their state.
    """

    drafted: AcceptanceTable = field(default_factory=lambda: AcceptanceTable(_drafted_prior()))
    copied: AcceptanceTable = field(default_factory=lambda: AcceptanceTable(_copied_prior()))
    step_gain: float = STEP_GAIN
    plan: PlanValues = field(default_factory=PlanValues)
    payoff: Payoff = field(default_factory=Payoff)
    carried: CarriedTokens = field(default_factory=CarriedTokens)

    def observe_step_gain(self, nodes: list[tuple[int, float]], num_steps: int) -> None:
        """Learn the value of a step's nodes relative to that of the nodes that it expanded; `nodes` are depths and values."""
        before = sum(value for depth, value in nodes if depth < num_steps)
        after = sum(value for depth, value in nodes if 1 < depth <= num_steps)
        if before > 0:
            self.step_gain += _GAIN_RATE * (min(after / before, 1.0) - self.step_gain)

    def forget_step_gain(self) -> None:
        """Move the step gain towards where it began, after a round of one step, which does not show it."""
        self.step_gain += _DRIFT * (STEP_GAIN - self.step_gain)
