"""What a draft is handed of a round, and when it reads it."""

import pytest
import torch
from test_sequences import started

from transformers_prism.decoding.draft_side import DraftSide
from transformers_prism.decoding.round_values import Prompt, Verified

pytestmark = pytest.mark.quick


class NotingDrafter:
    """Keeps what it is given to read."""

    def __init__(self):
        self.read, self.kept = [], []

    def prefill(self, token_ids, target_hidden, position_ids, num_new, padding_mask=None):
        parts = zip(token_ids.tolist(), position_ids.tolist(), target_hidden[..., 0].tolist(), num_new, strict=True)
        self.read.append([(tokens[:n], positions[:n], states[:n]) for tokens, positions, states, n in parts])

    def keep_sequences(self, places):
        self.kept.append(places)


def states(*rows) -> list[torch.Tensor]:
    """One layer's states of width 1, `(B, N, 1)`."""
    return [torch.tensor(rows, dtype=torch.float32)[..., None]]


def verified(root_positions, *rows) -> Verified:
    """What a target said at nodes with these states."""
    return Verified(torch.zeros(len(rows), len(rows[0]), 9), states(*rows), root_positions, 0.0)


def test_rounds_are_read_together_when_a_tree_is_wanted():
    """Each token with the state and position of the one before it; the prompt by itself; sequences that left, not at all."""
    sequences, _ = started(num_rows=2)
    side = DraftSide(NotingDrafter())
    for index, token in enumerate((6, 7)):
        sequences.append(index, token)
    positions = torch.tensor([[0, 1, 2], [0, 0, 1]])
    side.commit_prompt(sequences, Prompt(torch.zeros(2, 9), states([0, 1, 2], [3, 4, 5])[0], positions, None))
    assert not side.is_behind
    # The first commits two nodes of a tree, which are not next to each other, the second its root.
    for index, tokens in enumerate(([8, 9], [10])):
        for token in tokens:
            sequences.append(index, token)
    side.commit(sequences, [[0, 2], [0]], verified([3, 2], [10, 11, 12], [13, 14, 15]))
    assert side.is_behind
    sequences.keep_sequences([1])
    side.keep_sequences([1])
    sequences.append(1, 5)
    side.commit(sequences, [[0]], verified([3], [16]))
    drafter = side.read()
    assert drafter.read == [[([4, 5, 7], [0, 0, 1], [3, 4, 5])], [([10, 5], [2, 3], [13, 16])]]
    assert drafter.kept == [[1]]
    assert side.read().read == drafter.read
