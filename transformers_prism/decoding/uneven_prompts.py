"""Prompts of a batch that differ in length, read in groups, so that hardly any padding is read.

Reading padding takes as long as reading text, and the longest prompt of a batch decides how much of it there is. On a CPU
two forwards over half of the tokens take hardly longer than one over all of them, so prompts of about the same length are
read together. What the groups leave in their caches is then put side by side, as if all had been read at once.
Shape letters: B sequences, T positions of the longest prompt.
"""

import torch

from .cache import TreeLayer

# Padding tokens that take as long to read as the fixed cost of one more forward.
_WORTH_A_FORWARD = 32
# Prompts from this length on are read faster one by one, without a mask, whatever their lengths.
_LONG_PROMPT = 256


def groups_of_like_length(mask: torch.Tensor | None) -> list[tuple[list[int], int]]:
    """Rows to read together, the longest prompts first, and the position at which the longest of each group begins.

    Args:
        mask (`torch.Tensor` of shape `(B, T)`, *optional*): 0 or False at left padding.
    Returns:
        `list`: empty where all rows should be read together, over all positions.
    """
    if mask is None or mask.device.type != "cpu" or len(mask) == 1:
        return []
    mask, length = mask.bool(), mask.shape[1]
    starts = (length - mask.sum(dim=1)).tolist()
    if max(starts) == length or not all(mask[row, start:].all() for row, start in enumerate(starts)):
        return []  # an empty row, or padding that is not on the left
    groups: list[tuple[list[int], int]] = []
    num_padding = 0
    for row in sorted(range(len(starts)), key=starts.__getitem__):
        num_padding += starts[row] - groups[-1][1] if groups else 0
        if not groups or num_padding > _WORTH_A_FORWARD or length - groups[-1][1] >= _LONG_PROMPT:
            groups.append(([], starts[row]))
            num_padding = 0
        groups[-1][0].append(row)
    is_one = len(groups) == 1 and len(starts) * min(starts) <= _WORTH_A_FORWARD
    return [] if is_one else groups


def side_by_side(rows: list[list[int]], caches: list[list], width: int) -> list[TreeLayer]:
    """The layers of several caches as those of one batch.

    Args:
        rows: the rows of the batch that each cache holds; together they are all rows.
        caches: the layers of each; each is at most `width` positions long, and all end together.
        width (`int`): T. Positions in front of a shorter cache are zeros, which masks leave out.
    """
    num_rows = sum(map(len, rows))
    together = []
    for layers in zip(*caches, strict=True):
        together.append(TreeLayer())
        if layers[0].is_initialized:
            states = [(layer.keys, layer.values) for layer in layers]
            together[-1].update(*(right_aligned(rows, part, num_rows, width, dim=2) for part in zip(*states, strict=True)))
    return together


def right_aligned(rows: list[list[int]], parts, num_rows: int, width: int, dim: int) -> torch.Tensor:
    """Join the states of several groups of rows to those of all rows, `width` long in `dim`, with zeros before shorter ones."""
    shape = list(parts[0].shape)
    shape[0], shape[dim] = num_rows, width
    whole = parts[0].new_zeros(shape)
    for of_part, part in zip(rows, parts, strict=True):
        whole.narrow(dim, width - part.shape[dim], part.shape[dim])[of_part] = part
    return whole
