"""What a draft reads of its target: the embedding, and the vocabulary head or rows of it.

Most drafts can propose a part of the vocabulary only, the tokens that answers were seen to hold, since the head is much of
what a draft step costs. The names and words of a text that is summarised or translated are often not among them, and often
come back in the answer. So the head's rows for the tokens of the text itself join those of the draft vocabulary.
Shape letters: V vocabulary, W draft vocabulary, K tokens of a text that it lacks, D hidden size.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from .cpu import PackedLinear, pack


@dataclass
class BorrowedLayers:
    """What a draft reads of its target. A plain object, so that nothing in it is registered, moved or saved."""

    target: PreTrainedModel
    embedding: nn.Embedding
    head: nn.Linear
    head_rows: nn.Linear | None = None  # the head's rows for the draft vocabulary
    rows_version: tuple = ()

    @property
    def draft_head(self) -> nn.Linear:
        """The head over what the draft can propose."""
        return self.head if self.head_rows is None else self.head_rows

    def __deepcopy__(self, memo):
        """A copied draft borrows the same layers."""
        return self

    def __reduce__(self):
        """A pickled draft borrows none."""
        return type(None), ()


@dataclass
class TextRows:
    """The head's rows for tokens of a text that the draft vocabulary lacks; logits over both have the text's last.

    Args:
        draft_to_target (`torch.LongTensor` of shape `(W,)`): the draft vocabulary.
        text_ids (`torch.LongTensor` of shape `(K,)`): the tokens that it lacks.
        draft_head, head (`nn.Linear`): the rows of either.
    """

    draft_to_target: torch.Tensor
    text_ids: torch.Tensor
    draft_head: nn.Linear
    head: nn.Linear

    @cached_property
    def token_ids(self) -> torch.Tensor:
        """Ids in the target's vocabulary of all W + K tokens."""
        return torch.cat((self.draft_to_target, self.text_ids.to(self.draft_to_target.device)))

    @cached_property
    def weight(self) -> torch.Tensor:
        """All rows in one piece, `(W + K, D)`, for kernels."""
        return torch.cat((self.draft_head.weight.detach(), self.head.weight.detach()))

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """All biases in one piece, `(W + K,)`; None for a head without."""
        return None if self.head.bias is None else torch.cat((self.draft_head.bias.detach(), self.head.bias.detach()))


def rows_of_head(head: nn.Linear, token_ids: torch.Tensor, kind: type[PackedLinear] | None) -> nn.Linear:
    """A layer of some rows of a head, without gradients.

    Args:
        head (`nn.Linear`): the target's, with weights in floating point.
        token_ids (`torch.LongTensor` of shape `(n,)`): the rows.
        kind (`type`, *optional*): how it is to be packed for a CPU.
    """
    weight, bias = head.weight, getattr(head, "bias", None)
    token_ids = token_ids.to(weight.device)
    # Rows that are gathered in inference mode serve training later on.
    with torch.inference_mode(False):
        rows = nn.Linear(weight.shape[1], len(token_ids), bias=bias is not None, device="meta")
        rows.weight = nn.Parameter(weight.detach()[token_ids], requires_grad=False)
        if bias is not None:
            rows.bias = nn.Parameter(bias.detach()[token_ids], requires_grad=False)
        return rows if kind is None else pack(rows, kind)


def has_rows_of(rows: nn.Linear, head: nn.Linear, token_ids: torch.Tensor) -> bool:
    """Whether a layer that [`rows_of_head`] made of these tokens still holds what the head does; waits for the device."""
    token_ids, bias = token_ids.to(head.weight.device), getattr(head, "bias", None)
    is_same = torch.equal(rows.weight, head.weight.detach()[token_ids])
    return is_same and (bias is None or torch.equal(rows.bias, bias.detach()[token_ids]))


def tokens_outside(text_ids: torch.Tensor, draft_to_target: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The tokens of a text that a draft vocabulary lacks, each once, in rising order, `(K,)`; K may be 0."""
    is_wanted = torch.zeros(vocab_size, dtype=torch.bool, device=text_ids.device)
    is_wanted[text_ids.flatten()] = True
    is_wanted[draft_to_target.to(text_ids.device)] = False
    return is_wanted.nonzero()[:, 0]
