"""Positions and other inputs of a target that belong to single tokens, along a tree.

Plain decoding extends them token by token. Positions grow by one on each axis of the model (time, height and width for images,
in addition to the text); token types, and what a token sees of an image, stay the same. In a tree a node at depth d gets what
plain decoding would give the d-th next token.
Shape letters: A axes, B rows that still decode, T prompt positions, N tree nodes.
"""

from collections.abc import Collection

import torch

from .target_support import Declined


def text_positions(position_ids: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Positions `(B, T)` of a text: those given if they have one axis, else the number of tokens before each in a mask."""
    if position_ids is None or position_ids.dim() != 2:
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return position_ids.expand(mask.shape[0], -1)


class AxisPositions:
    """Positions on several axes, which differ from those of the text by a constant for each row and axis.

    Args:
        position_ids (`torch.Tensor` of shape `(A, B, T)`): as generate() prepares them.
        text (`torch.Tensor` of shape `(B, T')`): positions of the text, whose last one belongs to the same token.
    """

    def __init__(self, position_ids: torch.Tensor, text: torch.Tensor):
        self.offsets = position_ids[..., -1:] - text[:, -1:]  # [A, B, 1]

    def along(self, text: torch.Tensor) -> torch.Tensor:
        """Positions `(A, B, N)` of tokens at these positions `(B, N)` of the text."""
        return text + self.offsets.to(text.device)

    def keep_sequences(self, places: list[int]) -> None:
        """Keep only the sequences at these places of the batch."""
        self.offsets = self.offsets[:, places]


def inputs_by_kind(first: dict, second: dict, replaced: Collection[str]) -> tuple[dict, dict]:
    """Inputs that a target's forward reads in every step in addition to its text: those of the whole call, and those of single
    tokens, which are `(B, 1, ...)` and the same for each token.

    Args:
        first, second (`dict`): inputs of the two steps after the prompt, as plain decoding makes them.
        replaced (`Collection[str]`): names that are left out.
    Raises:
        Declined: if an input differs from step to step; the message names it.
    """
    of_call: dict = {}
    of_tokens: dict = {}
    for name in [name for name in first if name not in replaced]:
        value, following = first[name], second.get(name)
        if not isinstance(value, torch.Tensor) or value is following:
            of_call[name] = value
        elif not isinstance(following, torch.Tensor) or not torch.equal(value, following):
            raise Declined(f"the model input {name} cannot be carried along a tree, since each token gets another")
        else:
            # Plain decoding passes on the same tensor for the whole call, and makes a new one for each token.
            kind = of_tokens if value.dim() > 1 and value.shape[1] == 1 else of_call
            kind[name] = value
    return of_call, of_tokens
