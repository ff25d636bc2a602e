"""From conversations and their features to batches of training-time-test steps."""

import math

import torch
from torch.utils.data import Dataset, Sampler

from transformers_prism.training.data.conversations import Conversation
from transformers_prism.training.features import FeatureStore, OnlineFeatures

# Sorted by length within pools of this many updates, batches have little padding and still differ between epochs.
UPDATES_PER_POOL = 25


class ConversationDataset(Dataset):
    """The conversations at some indices of a list, with their features; with `learn_prompts`, prompts count like
    answers."""

    def __init__(
        self, conversations: list[Conversation], store: FeatureStore | OnlineFeatures, indices: list[int],
        learn_prompts: bool = False
    ):
        self.conversations, self.store, self.indices = conversations, store, list(indices)
        self.learn_prompts = learn_prompts
        self.lengths = [store.lengths[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def chosen(self, count: int) -> list[Conversation]:
        """The first `count` conversations of the set."""
        return [self.conversations[index] for index in self.indices[:count]]

    def __getitem__(self, item: int) -> dict:
        index = self.indices[item]
        conversation = self.conversations[index]
        return {
            "input_ids": torch.tensor(conversation.input_ids),
            "features": self.store.states(index),
            "trained_spans": ((1, len(conversation.input_ids)),) if self.learn_prompts else conversation.assistant_spans,
        }


def collate(items: list[dict]) -> dict:
    """Join conversations of T + 1 tokens into sequences of T positions; each reads a token's state and the next token.

    Returns:
        `dict`: `input_ids` `(B, T)`, the token after each state; `states` `(B, T + 1, C * hidden_size)`, of which the first
            T are read and the last T are predicted; `mask` `(B, T)`, True where the predicted state belongs to a span that
            is trained or comes right before one.
    """
    num_rows = max(len(item["input_ids"]) for item in items) - 1
    width = items[0]["features"].shape[-1]
    input_ids = torch.zeros(len(items), num_rows, dtype=torch.long)
    states = items[0]["features"].new_zeros(len(items), num_rows + 1, width)
    mask = torch.zeros(len(items), num_rows, dtype=torch.bool)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        input_ids[row, : length - 1] = item["input_ids"][1:]
        states[row, :length] = item["features"]
        # Position t predicts the state of token t + 1, whose logits give token t + 2. In an answer that starts at token P,
        # the target itself chooses token P, so the first prediction that counts is at position P - 1.
        for start, end in item["trained_spans"]:
            mask[row, start - 1 : end - 1] = True
    return {"input_ids": input_ids, "states": states, "mask": mask}


class LengthSampler(Sampler):
    """A random order of indices in which neighbours have similar lengths in tokens, drawn from (seed, epoch).

    The order depends on nothing else, so that a resumed run sees the same batches. It continues after the `updates_before`
    updates of earlier stages: stages that together make one epoch see every item once, except those of a short last update.
    All batches of one update, over all processes, are neighbours, so that no process waits for another with longer
    sequences.
    """

    def __init__(
        self, lengths: list[int], batch_size: int, seed: int, batches_per_update: int = 1, updates_before: int = 0
    ):
        self.lengths, self.seed, self.epoch = lengths, seed, 0
        self.update_size = batch_size * batches_per_update
        self.epochs_before, self.num_skipped = divmod(updates_before, math.ceil(len(lengths) / self.update_size))

    def set_epoch(self, epoch: int):
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        epoch, skipped = self.epochs_before + self.epoch, self.num_skipped
        whole, short = self._updates(epoch)
        if skipped:
            following, _ = self._updates(epoch + 1)
            whole = whole[skipped:] + following[:skipped]
        # A short last update stays last, since batches are cut from the order by counting.
        for update in [*whole, *short]:
            yield from update

    def _updates(self, epoch: int) -> tuple[list[list[int]], list[list[int]]]:
        """The items of an epoch's updates, and of a short last one if there is one."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.update_size * UPDATES_PER_POOL
        updates = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=lambda item: self.lengths[item], reverse=True)
            updates += [
                by_length[first : first + self.update_size] for first in range(0, len(by_length), self.update_size)
            ]
        whole = [update for update in updates if len(update) == self.update_size]
        shuffled = [whole[update] for update in torch.randperm(len(whole), generator=generator).tolist()]
        return shuffled, [update for update in updates if len(update) < self.update_size]
