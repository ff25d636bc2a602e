"""What the parts of a round hand to each other: values that nobody changes once they are made.

    prompt = target_side.prefill(input_ids)                 Prompt, once
    proposal = policy.propose(draft_side, sequences, limits)   Proposal
    verified = target_side.verify(proposal.tree)            Verified
    kept = walk(sequences, sampler, proposal, verified)     nodes of each sequence at which a token was emitted
    draft_side.commit(sequences, kept, verified)            NewPositions, which the draft reads when it is next needed

Shape letters: B sequences that still decode, T prompt positions, A new positions, N tree nodes, L target layers that the
draft reads, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .transfer import on_device
from .tree import Tree, root_tree


class Prompt(NamedTuple):
    """The outputs of the prompt's forward; for a chunked prefill, those of its last chunk.

    Args:
        logits: `(B, V)`, at the last position.
        hidden: `(B, T, L * target_hidden_size)`, what the draft reads.
        position_ids: `(B, T)`.
        mask: `(B, T)`, False at padding; None where nothing is padded.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor | None


class Limits(NamedTuple):
    """Limits of the next tree, each 0 or more: its depth, and drafted nodes of each sequence. For a target with recurrent
    layers also how many committed tokens its forward runs in addition."""

    depth: int
    nodes: int
    num_carried: int = 0


@dataclass(frozen=True)
class Proposal:
    """The tree of a round, and what the policy expects of it.

    Args:
        tree: what the target verifies; the root alone makes the round a plain step.
        depth: of its deepest node, or more.
        num_steps: draft steps that were run for it.
        num_copied: nodes of each sequence that were copied from its text, on average.
        expected_tokens: weighted tokens that the round should commit in all sequences together; None: no estimate.
        lesson: what the policy that proposed it needs to learn from its outcome.
    """

    tree: Tree
    depth: int = 0
    num_steps: int = 0
    num_copied: int = 0
    expected_tokens: float | None = None
    lesson: Any = None


def plain_step(last_tokens: list[int], **fields) -> Proposal:
    """A round without a draft: the last token of each active sequence and no tree below it."""
    return Proposal(root_tree(torch.tensor(last_tokens, device="cpu")), **fields)


class Verified(NamedTuple):
    """The target's outputs for a tree.

    Args:
        logits: `(B, N, V)`, at each node, or at the first nodes of a chain that the target verifies no further.
        states: the states that the draft reads, `(B, N, target_hidden_size)` of each of L layers.
        root_positions: position of each sequence's root.
        seconds: of the forward, on the host.
    """

    logits: torch.Tensor
    states: list[torch.Tensor]
    root_positions: list[int]
    seconds: float


class NewPositions(NamedTuple):
    """Committed positions that the draft has to read: see `Drafter.prefill`, whose arguments these are but for the last.

    Args:
        token_ids: `(B, A)`, the token after each position, on the host.
        target_hidden: `(B, A, L * target_hidden_size)`.
        position_ids: `(B, A)`, on the host.
        num_new: how many of the A positions of each sequence are real.
        padding_mask: `(B, A)`, False at padding; None without any.
        is_prompt: whether they are a prompt, which is read by itself.
    """

    token_ids: torch.Tensor
    target_hidden: torch.Tensor
    position_ids: torch.Tensor
    num_new: list[int]
    padding_mask: torch.Tensor | None = None
    is_prompt: bool = False

    def select(self, places: list[int]) -> "NewPositions":
        """The same for the sequences at these places of the batch only."""
        padding_mask, target_hidden = self.padding_mask, self.target_hidden[on_device(places, self.target_hidden.device)]
        if padding_mask is not None:
            padding_mask = padding_mask[on_device(places, padding_mask.device)]
        num_new = [self.num_new[place] for place in places]
        states = (self.token_ids[places], target_hidden, self.position_ids[places])
        return NewPositions(*states, num_new, padding_mask, self.is_prompt)


def joined(parts: list[NewPositions]) -> NewPositions:
    """Positions of several rounds as one, in order."""
    if len(parts) == 1:
        return parts[0]
    token_ids = torch.cat([part.token_ids for part in parts], dim=1)
    target_hidden = torch.cat([part.target_hidden for part in parts], dim=1)
    position_ids = torch.cat([part.position_ids for part in parts], dim=1)
    widths = [part.token_ids.shape[1] for part in parts]
    starts = [sum(widths[:index]) for index in range(len(widths))]
    # Sequences may have committed different numbers of positions in each round: gather the real ones to the left.
    real = [
        [start + offset for start, part in zip(starts, parts, strict=True) for offset in range(part.num_new[place])]
        for place in range(token_ids.shape[0])
    ]
    num_new = [len(indices) for indices in real]
    longest = max(num_new)
    index = torch.tensor([indices + [0] * (longest - len(indices)) for indices in real], device="cpu")  # [B, longest]
    of_states = on_device(index, target_hidden.device)[..., None].expand(-1, -1, target_hidden.shape[-1])
    return NewPositions(
        token_ids.gather(1, index), target_hidden.gather(1, of_states), position_ids.gather(1, index), num_new
    )


def joined_states(states: list[torch.Tensor]) -> torch.Tensor:
    """A copy of the states of several layers, one after the other, `(B, T, L * target_hidden_size)`."""
    return torch.cat([state.to(states[0].device) for state in states], dim=-1)
