"""Positions and other inputs of a target that belong to single tokens, along a tree.

Plain decoding extends them token by token: positions by one on each axis that a model counts on (time, height and width
of images, beside the text), types of tokens and what they see of an image by a constant. Along a tree a node at depth d gets
what plain decoding would give its d-th next token.
Shape letters: A axes, B rows that still decode, T prompt positions, N tree nodes.
"""

from collections.abc import Collection

import torch

from .target_support import Declined


def text_positions(position_ids: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Positions `(B, T)` of a text: those given if they have one axis, else the tokens before each in a mask `(B, T)`."""
    if position_ids is None or position_ids.dim() != 2:
        position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return position_ids.expand(mask.shape[0], -1)


class AxisPositions:
    """Positions on several axes, which differ from those of the text by a constant for each row and axis.

    Args:
        position_ids (`torch.Tensor` of shape `(A, B, T)`): as generate() prepares them.
        text (`torch.Tensor` of shape `(B, T')`): positions of the text, of which the last belongs to the same token.
    """

    def __init__(self, position_ids: torch.Tensor, text: torch.Tensor):
        self.offsets = position_ids[..., -1:] - text[:, -1:]  # [A, B, 1]

    def along(self, text: torch.Tensor) -> torch.Tensor:
        """Positions `(A, B, N)` of tokens at these positions `(B, N)` of the text."""
        return text + self.offsets.to(text.device)

    def keep_sequences(self, places: list[int]) -> None:
        """Go on with the sequences at these places of the batch."""
        self.offsets = self.offsets[:, places]


def inputs_by_kind(first: dict, second: dict, replaced: Collection[str]) -> tuple[dict, dict]:
    """What a target's forward reads beside its text in every step: inputs that belong to the call, and those that belong to
    single tokens, `(B, 1, ...)` and the same for each.

    Args:
        first, second (`dict`): inputs of the two steps behind the prompt, as plain decoding makes them.
        replaced (`Collection[str]`): names that are left out.
    Raises:
        Declined: naming an input that is another in each step.
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
            # Plain decoding hands on what belongs to the call, and makes anew what belongs to a token.
            kind = of_tokens if value.dim() > 1 and value.shape[1] == 1 else of_call
            kind[name] = value
    return of_call, of_tokens
