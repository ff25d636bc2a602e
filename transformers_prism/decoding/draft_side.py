"""The draft's half of a round: what it has read, what it has yet to read, and the trees that it grows below that.

A round hands over what it committed, but the draft only reads it when it has to draft the next tree. So rounds without a
draft cost no draft step at all.
Shape letters: B sequences, A new positions.
"""

import torch

from .drafter import Drafter
from .round_values import NewPositions, Prompt, Verified, joined, joined_states
from .sequences import Sequences
from .transfer import on_device


class DraftSide:
    """What a draft does in generate() calls that continue one text.

    Args:
        drafter (`Drafter`): runs the draft's steps.
    """

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.unread: list[NewPositions] = []

    def commit_prompt(self, sequences: Sequences, prompt: Prompt) -> None:
        """Take over the prompt as far as its states are known: without what the cache already held, and of a chunked prefill
        only the last chunk. The first new token must have been emitted."""
        length = prompt.hidden.shape[1]
        last = sequences.prompt_length + 1  # a position is read with the token after it
        token_ids = sequences.ids[:, last - length : last].cpu()
        position_ids, num_new = prompt.position_ids.cpu(), [length] * len(sequences)
        self.unread.append(NewPositions(token_ids, prompt.hidden, position_ids, num_new, prompt.mask, is_prompt=True))

    def commit(self, sequences: Sequences, kept: list[list[int]], verified: Verified) -> None:
        """Take over what a round committed: the emitted tokens, each with the states of the node before it.

        Args:
            kept (`list[list[int]]`): nodes of each active sequence.
            verified (`Verified`): the round's.
        """
        states = verified.states
        num_new = [len(nodes) for nodes in kept]
        longest = max(num_new)
        tokens, positions, index = [], [], []
        for sequence, nodes, start in zip(sequences.active, kept, verified.root_positions, strict=True):
            emitted, padding = sequences.new_tokens[sequence], [0] * (longest - len(nodes))
            tokens.append(emitted[len(emitted) - len(nodes) :] + padding)
            positions.append(list(range(start, start + longest)))
            index.append(nodes + padding)
        if all(nodes == list(range(longest)) for nodes in kept):
            states = [state[:, :longest] for state in states]
        else:
            of_nodes = torch.tensor(index, device="cpu")[..., None]  # [B, A, 1]
            states = [
                state.gather(1, on_device(of_nodes, state.device).expand(-1, -1, state.shape[-1])) for state in states
            ]
        token_ids = torch.tensor(tokens, dtype=sequences.ids.dtype, device="cpu")
        position_ids = torch.tensor(positions, device="cpu")
        self.unread.append(NewPositions(token_ids, joined_states(states), position_ids, num_new))

    def read(self) -> Drafter:
        """Let the draft read everything that was committed since its last read; returns the drafter, to draft a tree."""
        while self.unread:
            if self.unread[0].is_prompt:
                self.drafter.prefill(*self.unread.pop(0)[:-1])
                continue
            self.drafter.prefill(*joined(self.unread)[:-1])
            self.unread.clear()
        return self.drafter

    @property
    def is_behind(self) -> bool:
        """Whether the draft has more than one round to read, since rounds ran without it."""
        return len(self.unread) > 1

    def keep_sequences(self, places: list[int]) -> None:
        """Keep only the sequences at these places of the batch."""
        self.drafter.keep_sequences(places)
        self.unread = [part.select(places) for part in self.unread]
