"""`tree="auto"` on accelerators: a round's draft steps and nodes are fixed before it, so that drafting reads nothing back.

What a round should bring is known from the rounds before, on average over their rows:

    first value    value of the nodes that step 0 proposed
    step gain      value that a further step brings, over that of the step before
    rank values    value of the best node, of the second best, ...

Value of a node, rate and rule are those of `automatic.py`:

    draft steps    as many as maximise  sum of the steps' values - rate * their seconds
    nodes          as many as maximise  sum of rank values - rate * seconds of the verification

What a plan did not let us see drifts back to where it began, so that it is tried again. Copies of the text join rounds in
which the draft rests, and no others: comparing them with what was drafted would read it back. What became of a round is
learnt from depths and log-probabilities that are copied to the host while the target verifies; the time that its parts
took is not, since calls return before they are done.
Shape letters: B rows that still decode, n nodes of the tree without the root.
"""

import operator

import torch

from ..decoding.speculation import RoundTree
from ..decoding.target_side import read_all
from ..decoding.tree import Tree
from .automatic import STEP_GAIN, AutoTrees, Proposal, cells_of_drafted
from .settings import TreeSettings

# Nodes of trees, so that few different ones are made; with the root they fill tiles.
_SIZES = (1, 3, 7, 15, 31, 63, 127)
# How fast values follow the latest round, and what was not seen drifts back.
_RATE, _DRIFT = 0.1, 0.02
_FIRST_VALUE = 0.6


def _rank_values() -> torch.Tensor:
    """Values that each rank starts from: in sum some two tokens for 63 nodes."""
    return _FIRST_VALUE * torch.arange(1, _SIZES[-1] + 1, dtype=torch.float64) ** -1.2


class PlannedTrees(AutoTrees):
    """Plans a tree per round, and learns from what becomes of it; the arguments are those of [`AutoTrees`]."""

    def __init__(self, settings: TreeSettings, target, draft, rows, text=None):
        super().__init__(settings, target, draft, rows, text)
        self.plan: TreeSettings | None = None  # None: the draft rests
        if self.experience.rank_values is None:
            self.experience.first_value, self.experience.rank_values = _FIRST_VALUE, _rank_values()

    def _propose(self, drafter, unread: list, max_depth: int, max_nodes: int) -> Tree:
        limit = min(self.settings.depth, max_depth, max_nodes)
        if limit == 0 or self.num_rounds <= self.next_try:
            self.plan = None
            return super()._propose(drafter, unread, max_depth, max_nodes)
        self.plan = self._plan(len(self.active), limit, max_nodes)
        self.depth = self.plan.depth
        read_all(drafter, unread)
        tree = drafter.grow(self.plan, self.rows.coupling(self.active, self.plan.depth))
        # It is there once the walk, which the same queue runs later, has been read.
        drawn = torch.stack((tree.depths.float(), tree.log_probs))[..., 1:]
        self.drawn = drawn.to("cpu", non_blocking=True)  # [2, B, n]
        return tree

    def observe(self, tree: Tree, kept: list[list[int]], verify_seconds: float) -> RoundTree:
        """Learn from a round, and say what it was; the arguments are those of [`AutoTrees.observe`]."""
        if self.plan is not None:
            depths, log_probs = self.drawn[0].long(), self.drawn[1]
            rows, chances = zip(depths.tolist(), log_probs.tolist(), strict=True), self.experience.drafted.chances
            cells = [cells_of_drafted(*row) for row in rows]
            values = torch.tensor([[chances[cell] for cell in row] for row in cells], dtype=torch.float64)  # [B, n]
            self._note_values(values, depths)
            expected = sum(self.weights) + sum(map(operator.mul, self.weights, values.sum(dim=1).tolist()))
            self.proposal = Proposal(cells, [[-1] * len(row) for row in cells], self.plan.depth, expected)
        return self._learn(tree, kept)

    def _plan(self, num_rows: int, limit: int, max_nodes: int) -> TreeSettings:
        """Draft steps and nodes, at least one of each, that should bring the most."""
        experience, costs, rate = self.experience, self.costs, self._rate(num_rows)
        value, reward, best, depth = experience.first_value, 0.0, -torch.inf, 1
        for step in range(1, limit + 1):
            reward += num_rows * value - rate * costs.step_seconds
            value *= experience.step_gain
            if reward > best:
                best, depth = reward, step
        plan = TreeSettings("static", self.settings.top_k, depth, 0)
        most = min(self.settings.num_nodes, plan.pool_size(depth), max_nodes, _SIZES[-1])
        sizes = sorted({min(size, most) for size in _SIZES})
        expected = experience.rank_values.cummin(dim=0).values.cumsum(dim=0).tolist()
        rewards = [num_rows * expected[size - 1] - rate * costs.verify(num_rows * (size + 1)) for size in sizes]
        num_nodes = sizes[rewards.index(max(rewards))]
        return TreeSettings("static", self.settings.top_k, min(depth, num_nodes), num_nodes)

    def _note_values(self, values: torch.Tensor, depths: torch.Tensor) -> None:
        """How the values `(B, n)` of a tree's nodes spread over draft steps and ranks."""
        experience, num_rows = self.experience, len(values)
        first = float(values[depths == 1].sum()) / num_rows
        experience.first_value += _RATE * (min(first, 1.0) - experience.first_value)
        if self.plan.depth > 1:
            nodes = list(zip(depths.flatten().tolist(), values.flatten().tolist(), strict=True))
            self._note_step_gain(nodes, self.plan.depth)
        else:
            experience.step_gain += _DRIFT * (STEP_GAIN - experience.step_gain)
        ranks, num_seen = experience.rank_values, values.shape[1]
        ranks += _DRIFT * (_rank_values() - ranks)
        seen = values.sort(dim=1, descending=True).values.mean(dim=0)
        ranks[:num_seen] += _RATE * (seen - ranks[:num_seen])
