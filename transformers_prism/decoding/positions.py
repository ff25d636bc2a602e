"""Positions and other inputs of a target that belong to single tokens, along a tree.

Plain decoding extends them token by token: positions by one on each axis that a model counts on (time, height and width
of images, beside the text), types of tokens by a constant. Along a tree a node at depth d gets what plain decoding would
give its d-th next token.
Shape letters: A axes, B rows that still decode, T prompt positions, N tree nodes.
"""

import torch

from .target_support import Declined

# Types of tokens, one for each token, and what plain decoding extends them by: None is the last type of the row.
_TOKEN_TYPES = {"token_type_ids": None, "mm_token_type_ids": 0}


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


def token_types(inputs: dict | None, model_kwargs: dict) -> dict[str, int]:
    """Inputs of a later step that say what type a token is, by name: the one type of all tokens that will be emitted.

    Args:
        inputs (`dict`, *optional*): of a step behind the prompt, as plain decoding makes them.
        model_kwargs (`dict`): as generate() prepared them.
    Raises:
        Declined: naming the input whose rows end with different types.
    """
    found = {}
    for name, constant in _TOKEN_TYPES.items():
        if isinstance((inputs or {}).get(name), torch.Tensor):
            last = {constant} if constant is not None else set(model_kwargs[name][:, -1].tolist())
            if len(last) > 1:
                raise Declined(f"the rows of {name} end with different types, {sorted(last)}")
            found[name] = last.pop()
    return found
