"""Candidate nodes for the tree of a round, and the best of them as a tree; on the host, in plain lists."""

import math
from dataclasses import dataclass, field

import torch

from ..decoding.tree import Tree
from .experience import MAX_COPIED


@dataclass
class Candidates:
    """Candidate nodes for the tree of a sequence, parents before children; each list has an entry per candidate.

    Args:
        token_ids, parents, depths, log_probs: as in [`CandidatePool`].
        drafted_cells, copied_cells: cells in the acceptance tables of drafted and of copied nodes, -1 where none applies.
        values: probability of acceptance, never above the parent's.
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    drafted_cells: list[int] = field(default_factory=list)
    copied_cells: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @classmethod
    def drafted(cls, token_ids, parents, depths, log_probs, cells, chances: list[float]) -> "Candidates":
        """What was drafted for a sequence; `chances` of acceptance are by cell."""
        values: list[float] = []
        for cell, parent in zip(cells, parents, strict=True):
            values.append(min(chances[cell], values[parent]) if parent >= 0 else chances[cell])
        return cls(token_ids, parents, depths, log_probs, cells, [-1] * len(cells), values)

    def add_copy(self, match: int, tokens: list[int], chances: list[float]) -> None:
        """Add a copied continuation: as further candidates, or to candidates that hold the same tokens."""
        if not tokens:
            return
        node_of = {pair: node for node, pair in enumerate(zip(self.parents, self.token_ids, strict=True))}
        node, chance = -1, 1.0
        for depth, token in enumerate(tokens):
            cell, parent = match * MAX_COPIED + depth, node
            chance = min(chance, chances[cell])
            node = node_of.get((parent, token), len(self.values))
            if node == len(self.values):
                new = (token, parent, depth + 1, math.log(max(chance, 1e-9)), -1, cell, chance)
                for column, entry in zip(vars(self).values(), new, strict=True):
                    column.append(entry)
            else:
                self.copied_cells[node] = cell
                self.values[node] = max(self.values[node], chance)

    def best(self, num_nodes: int) -> "Candidates":
        """The best of them as nodes of a tree, ties to the first; parents are then nodes of the tree, 0 its root.

        Each node is followed by all its descendants, better children first: if the likeliest path is accepted, its keys and
        values need not be moved.
        """
        ranked = sorted(range(len(self.values)), key=self.values.__getitem__, reverse=True)[:num_nodes]
        children: dict[int, list[int]] = {one: [] for one in (-1, *ranked)}
        for one in reversed(ranked):
            children[self.parents[one]].append(one)
        chosen, stack = [], children[-1]
        while stack:
            chosen.append(stack.pop())
            stack += children[chosen[-1]]
        best = Candidates(*([column[one] for one in chosen] for column in vars(self).values()))
        node_of = {one: node for node, one in enumerate([-1, *chosen])}
        best.parents = [node_of[parent] for parent in best.parents]
        return best


def tree_of(root_ids: list[int], chosen: list[Candidates]) -> Tree:
    """The tree of each sequence's nodes below its last token."""
    token_ids = [[root, *one.token_ids] for root, one in zip(root_ids, chosen, strict=True)]
    parents, depths = [[0, *one.parents] for one in chosen], [[0, *one.depths] for one in chosen]
    log_probs = torch.tensor([[0.0, *one.log_probs] for one in chosen], dtype=torch.float32, device="cpu")
    ids, parents_of_ids, depths_of_ids = torch.tensor([token_ids, parents, depths], device="cpu")
    return Tree(ids, parents_of_ids, depths_of_ids, log_probs)
