"""Rounds of targets that nobody has tried, checked against single steps from the same state.

The package was tried on the types of `tried_targets.py`. Any other model (an architecture that is newer than this package,
code from a repository) may mask, count positions or keep states in a way that several tokens at once do not see. So its
first tree is compared with plain steps over the same tokens, and so is the first one at twice the length, and behind each
length that its configuration names. What was seen holds for the target object: a later call does not look again.
Shape letters: B rows that still decode, N tree nodes, V vocabulary.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..tried_targets import TRIED_TYPES
from .memory import kept_with
from .tree import Tree

# Fields of configurations whose numbers are lengths at which attention or positions may change.
_LENGTH_WORDS = ("window", "topk", "top_k", "chunk", "original_max", "max_position", "block_size", "max_seq")
# Differences of logits, as a share of the largest, that rounding explains: so many units in the last place, at most this.
_ROUNDING, _MOST_ROUNDING = 4096, 0.25


def is_tried(target) -> bool:
    """Whether the package was tried on this model's type, and on that of its text part, in transformers' own code."""
    is_stock = type(target).__module__.startswith("transformers.models.")
    return is_stock and {target.config.model_type, target.config.get_text_config().model_type} <= TRIED_TYPES


def lengths_named(text_config) -> list[int]:
    """Lengths in tokens that a configuration names, rising: windows, numbers of keys, original lengths."""
    found: set[int] = set()

    def collect(values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value)
            elif any(word in str(name) for word in _LENGTH_WORDS) and type(value) is int and value > 1:
                found.add(value)

    collect(text_config.to_dict())
    return sorted(found)


class RoundCheck:
    """Compares trees with plain steps where a target was not tried.

    Args:
        target_side (`TreeTarget` or `ChainTarget`): after the prefill.
    """

    def __init__(self, target_side):
        self.side, target = target_side, target_side.target
        self.finding: str | None = None  # what differed
        self.is_needed = not is_tried(target)
        if self.is_needed:
            # What a forward gets differs between these.
            kind = (type(target_side).__name__, len(target_side.next_position) > 1, target_side.is_padded)
            self.seen = kept_with(target, "checked lengths", dict).setdefault(kind, [])
            self.lengths = lengths_named(target.config.get_text_config())

    def _is_due(self, length: int) -> bool:
        """Whether the next tree is the first that lies wholly behind twice the checked length, or a length with a name."""
        if not self.seen or length >= 2 * self.seen[-1]:
            return True
        return any(self.seen[-1] < named <= length for named in self.lengths)

    def max_depth(self) -> float:
        """Draft steps of the next tree, so that it does not span a length with a name, which no check would be like."""
        if not self.is_needed:
            return math.inf
        length, longest = min(self.side.next_position), max(self.side.next_position)
        # Nodes that a row has no room for are given positions that it has, which no check would be like.
        ends = zip(self.side.next_position, self.side.position_limit, strict=True)
        if self._is_due(length) and any(position >= limit for position, limit in ends):
            return 0
        # The deepest node's text is as long as the next such length at most, of every row.
        return min((named - 1 - longest for named in self.lengths if named > length), default=math.inf)

    def plain_steps(self, tree: Tree) -> torch.Tensor | None:
        """The target's logits `(B, 2, V)` at each root and its likeliest child by single steps; None if nothing is due."""
        if not self.is_needed or self.finding or tree.num_nodes == 1 or not self._is_due(min(self.side.next_position)):
            return None
        children = _likeliest_children(tree)
        return self.side.plain_steps(torch.stack((tree.token_ids[:, 0], tree.token_ids.gather(1, children)[:, 0]), dim=1))

    @contextmanager
    def failing_forwards(self, tree: Tree) -> Iterator[None]:
        """Take an error of a forward over several tokens for a finding, told in a warning: single steps may go on."""
        try:
            yield
        except Exception as error:
            if not self.is_needed or self.finding or tree.num_nodes == 1:
                raise
            name = type(self.side.target).__name__
            self.finding = f"{name} refuses several tokens behind its cache ({type(error).__name__}: {error})"
            warnings.warn(f"decoding goes on without the draft: {self.finding}", stacklevel=8)

    def differs(self, tree: Tree, logits: torch.Tensor, steps: torch.Tensor | None) -> bool:
        """Whether a tree's logits `(B, N, V)` are not those of the single steps, which is told in a warning."""
        if steps is None:
            return False
        index = torch.cat((torch.zeros_like(tree.token_ids[:, :1]), _likeliest_children(tree)), dim=1)  # [B, 2]
        of_tree = logits.gather(1, index[..., None].to(logits.device).expand(-1, -1, logits.shape[-1])).float()
        steps = steps.to(of_tree)
        difference, scale = float((of_tree - steps).abs().max()), float(steps.abs().max())
        allowed = scale * min(_ROUNDING * torch.finfo(logits.dtype).eps, _MOST_ROUNDING)
        length = min(self.side.next_position)
        if difference <= allowed:
            self.seen.append(length)
            return False
        target = self.side.target
        self.finding = (
            f"logits of {type(target).__name__} over several tokens differ from single steps by {difference:.3g} at "
            f"{length} tokens (rounding explains {allowed:.1g})"
        )
        warnings.warn(f"decoding goes on without the draft: {self.finding}; please report this model", stacklevel=8)
        return True


def _likeliest_children(tree: Tree) -> torch.Tensor:
    """The node of each row, `(B, 1)`, that the draft thinks likeliest behind the root."""
    is_child = tree.parents == 0
    is_child[:, 0] = False
    return tree.log_probs.masked_fill(~is_child, -torch.inf).argmax(dim=1, keepdim=True)
