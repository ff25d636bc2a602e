"""What a draft uses of its target: the embedding, and the vocabulary head or some rows of it.

Most drafts can only propose a part of the vocabulary, the tokens that are frequent in answers, because the head is much of
the cost of a draft step. Names and rare words of a text to summarise or translate are often missing from that part, but they
return in the answer. So the head's rows for the tokens of the text so far are added to those of the draft vocabulary.
If the head is not a plain matrix (quantised, with adapters, offloaded), the draft uses a dequantised copy of its rows where
one can be made, else the head's own forward. The text adds no rows in that case.
Shape letters: V vocabulary, W draft vocabulary, K tokens of a text that it lacks, D hidden size.
"""

import contextlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_prism import target_numerics
from .decoding.layer_check import has_plain_weight, input_device, is_offloaded, is_plain_linear
from .decoding.transfer import on_device
from .packed_layers import PACKED_KINDS, PackedLinear, pack
from .transformers_names import output_embeddings

# How far logits of dequantised rows may be from the head's own, as a share of the largest.
_SAME_HEAD = 0.02


@dataclass
class BorrowedLayers:
    """The layers of its target that a draft uses. Not an `nn.Module`, so that nothing in it is registered, moved or saved."""

    target: PreTrainedModel
    embedding: nn.Embedding
    head: nn.Linear
    sizes: tuple  # of the vocabulary, the embedding and the head, which can be resized in place
    head_rows: Any = None  # the head's rows for the draft vocabulary
    rows_version: tuple = ()

    @classmethod
    def of(cls, target: PreTrainedModel) -> "BorrowedLayers":
        """The layers that a target has now.

        Raises:
            ValueError: if it lacks one of them.
        """
        try:
            embedding = target.get_input_embeddings()
        except NotImplementedError:
            embedding = None
        if embedding is None:
            raise ValueError(f"expected a target with a token embedding, got {type(target).__name__} without one")
        head = output_embeddings(target)
        if head is None:
            raise ValueError(f"expected a target with a vocabulary head, got {type(target).__name__} without one")
        weights = (getattr(layer, "weight", None) for layer in (embedding, head))
        shapes = (weight.shape if isinstance(weight, torch.Tensor) else None for weight in weights)
        return cls(target, embedding, head, (target.config.get_text_config().vocab_size, *shapes))

    def is_same_as(self, other: "BorrowedLayers") -> bool:
        """Whether the target and both of its layers are the same objects, of the same sizes."""
        return (
            self.target is other.target
            and self.embedding is other.embedding
            and self.head is other.head
            and self.sizes == other.sizes
        )

    def check_widths(self, config) -> None:
        """Refuse layers that a draft of this configuration cannot share.

        Raises:
            ValueError: if a shared layer has another width than the draft; the message names both.
        """
        shared: list[tuple[nn.Module, str, str]] = []
        shared += [(self.embedding, "embedding_dim", "embedding")] if config.share_target_embedding else []
        shared += [(self.head, "in_features", "vocabulary head")] if config.share_target_head else []
        for layer, name, called in shared:
            width = getattr(layer, name, None)
            if isinstance(width, int) and width != config.hidden_size:
                raise ValueError(
                    f"expected a target whose {called} is as wide as the draft, hidden_size={config.hidden_size}, got "
                    f"{width}; make the draft with PrismConfig.from_target(target)"
                )

    @property
    def draft_head(self) -> nn.Linear:
        """The head over what the draft can propose."""
        return self.head if self.head_rows is None else self.head_rows

    @property
    def num_head_rows(self) -> int | None:
        """How many tokens the head has logits for, perhaps fewer than the vocabulary; None if its weight is not plain."""
        weight = float_weight(self.head)
        return None if weight is None else weight.shape[0]

    def gather_rows(self, draft_to_target: torch.Tensor, draft_layer: nn.Linear, looks_closely: bool) -> None:
        """Copy the head's rows for a draft vocabulary `(W,)`, and copy them again when the head's weight was replaced,
        moved, cast or written to.

        Args:
            draft_layer (`nn.Linear`): as for [`~BorrowedLayers.kind_of_rows`].
            looks_closely (`bool`): whether to also find writes that torch does not count, such as those through `.data`,
                by a comparison that synchronises with the device.
        Raises:
            ValueError: if the draft vocabulary has tokens beyond the head's rows.
        """
        kind = self.kind_of_rows(draft_layer)
        if not self.has_plain_head:
            self._take_other_head(draft_to_target, kind)
            return
        weight = self.head.weight
        version = (weight.data_ptr(), weight.device, weight.dtype, _version(weight), _version(draft_to_target), kind)
        is_same = self.rows_version[1:] == version and self.rows_version[0]() is weight
        if is_same and not (looks_closely and not _has_rows_of(self.head_rows, self.head, draft_to_target)):
            return
        if looks_closely:
            _check_rows(draft_to_target, weight.shape[0])
        self.head_rows = rows_of_head(self.head, draft_to_target, kind)
        self.rows_version = (weakref.ref(weight), *version)

    @property
    def has_plain_head(self) -> bool:
        """Whether the head is a plain matrix in memory, so that its rows can be copied."""
        return is_plain_linear(self.head) and not is_offloaded(self.head, self.head.weight.device)

    def _take_other_head(self, draft_to_target: torch.Tensor, kind: type[PackedLinear] | None) -> None:
        """Make the draft's head from one that is not a plain matrix, and make it again when that one's weight was replaced."""
        weight = getattr(self.head, "weight", None)
        source = weight if isinstance(weight, torch.Tensor) else self.head
        version = (_version(draft_to_target), kind)
        if self.rows_version[1:] == version and self.rows_version[0]() is source:
            return
        num_rows = getattr(self.head, "out_features", None)
        if isinstance(num_rows, int):
            _check_rows(draft_to_target, num_rows)
        rows = _dequantised_rows(self.head, draft_to_target)
        self.head_rows = ChosenLogits(self.head, draft_to_target) if rows is None else _frozen(*rows, kind)
        self.rows_version = (weakref.ref(source), *version)

    def kind_of_rows(self, draft_layer: nn.Linear) -> type[PackedLinear] | None:
        """How to pack rows of the head: as `draft_layer`, one layer of the draft, else as the head; None: not at all."""
        # By name: a model may have been prepared by another copy of this code.
        names = {type(draft_layer).__name__, type(self.head).__name__}
        return next((kind for kind in PACKED_KINDS if kind.__name__ in names), None)

    def __deepcopy__(self, memo):
        """A copied draft borrows the same layers."""
        return self

    def __reduce__(self):
        """A pickled draft borrows none."""
        return type(None), ()


class ChosenLogits(nn.Module):
    """Logits of chosen tokens `(W,)`, computed by a head's own forward, so that later changes to the head take effect."""

    bias = None

    def __init__(self, head: nn.Module, token_ids: torch.Tensor):
        super().__init__()
        self.__dict__["head"] = head  # not registered: neither moved nor saved
        self.token_ids = token_ids

    @property
    def weight(self):
        """The head's weight; None if it has none."""
        return getattr(self.__dict__["head"], "weight", None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(..., W)` at states `(..., D)`."""
        logits = self.__dict__["head"](hidden_states)
        return logits.index_select(-1, on_device(self.token_ids, logits.device))


class TextRows:
    """The head's rows for K tokens of a text that are missing from the draft vocabulary; in logits these tokens are last.

    A text grows, so its rows are in several layers, each at least twice as long as the next. This keeps the cost of
    adding a token from growing with the text.
    """

    def __init__(self, draft_to_target: torch.Tensor, draft_head: nn.Linear, text_ids: torch.Tensor, rows: nn.Linear):
        self.draft_to_target, self.draft_head = draft_to_target, draft_head
        self.text_ids = text_ids
        self.parts = [rows]
        self._token_ids: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None  # with spare rows at the end

    def add(self, token_ids: torch.Tensor, rows: nn.Linear) -> None:
        """Append new tokens `(n,)`, none of which is here yet, and their rows."""
        self.text_ids = torch.cat((self.text_ids, on_device(token_ids, self.text_ids.device)))
        self._token_ids = None
        if self._weight is not None:
            self._weight = self._with_more(self._weight, rows.weight.detach())
        self.parts.append(rows)
        while len(self.parts) > 1 and 2 * self.parts[-1].out_features > self.parts[-2].out_features:
            self.parts[-2:] = [_joined(*self.parts[-2:])]

    def logits(self, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Logits of the text's tokens, `(..., n)` of each layer, in the order of `text_ids`."""
        return [part(hidden_states) for part in self.parts]

    @property
    def token_ids(self) -> torch.Tensor:
        """Ids in the target's vocabulary of all W + K tokens."""
        if self._token_ids is None:
            self._token_ids = torch.cat((self.draft_to_target, on_device(self.text_ids, self.draft_to_target.device)))
        return self._token_ids

    @property
    def weight(self) -> torch.Tensor:
        """All rows in one piece, `(W + K, D)`, for kernels."""
        if self._weight is None:
            self._weight = torch.cat([part.weight.detach() for part in (self.draft_head, *self.parts)])
        return self._weight[: len(self.draft_to_target) + len(self.text_ids)]

    @property
    def bias(self) -> torch.Tensor | None:
        """All biases in one piece, `(W + K,)`; None for a head without bias."""
        parts = (self.draft_head, *self.parts)
        return None if self.parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])

    def _with_more(self, weight: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        end = len(self.draft_to_target) + len(self.text_ids)
        if end > len(weight):
            return torch.cat((weight[: end - len(new)], new, weight.new_empty((end // 8, new.shape[1]))))
        weight[end - len(new) : end] = new
        return weight


@torch.no_grad()
def final_norm_of(target: PreTrainedModel) -> torch.Tensor | None:
    """What a target's final RMSNorm multiplies by, whether that is its weight or one plus its weight.

    Args:
        target (`PreTrainedModel`): any.
    Returns:
        `torch.FloatTensor` of shape `(D,)` on the CPU; None if it has no such norm.
    """
    weights = ((child, getattr(child, "weight", None)) for child in target.get_decoder().children())
    norms = [child for child, weight in weights if isinstance(weight, torch.Tensor) and weight.dim() == 1]
    if not norms or (weight := norms[-1].weight).device.type == "meta":
        return None
    # Values so large that epsilon does not matter. With both signs, a norm that subtracts the mean gives another result.
    state = torch.full_like(weight, 1024.0)
    signs = torch.ones_like(weight)
    signs[::2] = -1
    multiplier, other = norms[-1](state), norms[-1](state * signs) * signs
    return multiplier.float().cpu() if torch.allclose(multiplier, other) else None


def _joined(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One layer with the rows of both, packed in the same way."""
    kind = type(first) if isinstance(first, PackedLinear) else None
    with torch.inference_mode(False), torch.no_grad():
        bias = None if first.bias is None else torch.cat((first.bias, second.bias))
        return _frozen(torch.cat((first.weight, second.weight)), bias, kind)


def _frozen(weight: torch.Tensor, bias: torch.Tensor | None, kind: type[PackedLinear] | None) -> nn.Linear:
    """A layer without gradients."""
    rows = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    rows.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        rows.bias = nn.Parameter(bias, requires_grad=False)
    return rows if kind is None else pack(rows, kind)


def rows_of_head(head: nn.Linear, token_ids: torch.Tensor, kind: type[PackedLinear] | None) -> nn.Linear:
    """A layer without gradients that holds some rows `(n,)` of a head with floating-point weights, packed for a CPU as
    `kind` says."""
    bias = getattr(head, "bias", None)
    token_ids = on_device(token_ids, head.weight.device)
    # Never in inference mode, since a later training step may use the same rows.
    with torch.inference_mode(False), torch.no_grad():
        token_ids = token_ids.clone()
        return _frozen(head.weight.detach()[token_ids], None if bias is None else bias.detach()[token_ids], kind)


def float_weight(layer: Any) -> torch.Tensor | None:
    """The weight of a layer if it is a plain matrix (see [`has_plain_weight`]); else None."""
    return layer.weight if has_plain_weight(layer) else None


@torch.no_grad()
def _dequantised_rows(head: nn.Module, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Dequantised rows of a quantised head, and their biases; None if that fails or their logits are not the head's."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    readers: list[Any] = [getattr(head, "dequantize", None)]
    if isinstance(weight, torch.Tensor) and type(weight).dequantize is not torch.Tensor.dequantize:
        readers.insert(0, weight.dequantize)
    with torch.inference_mode(False), contextlib.suppress(RuntimeError, TypeError, NotImplementedError, AttributeError):
        for read in filter(callable, readers):
            numbers: Any = read()
            ids = token_ids.to(numbers.device)
            rows = nn.functional.embedding(ids, numbers).clone(), None if bias is None else bias[ids].clone()
            state = torch.linspace(-1, 1, numbers.shape[1], device=numbers.device, dtype=numbers.dtype)[None]
            logits, expected = nn.functional.linear(state, *rows), head(state)[:, ids]
            # With adapters on top of the weight, or with scaled inputs, the head computes something else than its weight.
            if (logits - expected).abs().max() <= _SAME_HEAD * expected.abs().max():
                return rows
    return None


def _check_rows(draft_to_target: torch.Tensor, num_rows: int) -> None:
    """Refuse a draft vocabulary beyond the rows of a head."""
    if draft_to_target.max() >= num_rows:
        raise ValueError(
            f"draft_to_target: expected tokens of the target's vocabulary head, which has {num_rows}, got "
            f"{int(draft_to_target.max())}"
        )


def place_of(layer: nn.Module, target: PreTrainedModel, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """The device and dtype in which a target's embedding or head takes its inputs. For a quantised weight the dtype is
    `dtype`, the one that the inputs have."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):  # quantised by torch: a method returns the weight
        return target.device, target.dtype
    is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return input_device(target) if is_offloaded(target, weight.device) else weight.device, weight.dtype if is_plain else dtype


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; always 0 for one made in inference mode, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


def _has_rows_of(rows: nn.Linear, head: nn.Linear, token_ids: torch.Tensor) -> bool:
    """Whether a layer that [`rows_of_head`] made for these tokens still has the same rows as the head."""
    token_ids, bias = token_ids.to(head.weight.device), getattr(head, "bias", None)
    is_same = torch.equal(rows.weight, head.weight.detach()[token_ids])
    return is_same and (bias is None or torch.equal(rows.bias, bias.detach()[token_ids]))


def scale_and_cap(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """A head's outputs, scaled and soft-capped as by the target; the shape stays the same."""
    logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def target_logits(target, outputs: torch.Tensor) -> torch.Tensor:
    """A target's logits from its head's outputs, scaled and soft-capped as its configuration says; the shape stays the same."""
    numerics = target_numerics(target.config)
    return scale_and_cap(outputs, numerics["logit_scale"], numerics["logit_softcap"])


def tokens_outside(
    text_ids: torch.Tensor, draft_to_target: torch.Tensor, vocab_size: int, num_head_rows: int | None = None
) -> torch.Tensor:
    """The tokens of a text that are missing from a draft vocabulary, each once, in rising order, `(K,)`; K may be 0. Ids from
    `num_head_rows` on, which have no logits, and from `vocab_size` on, which stand for images, are left out."""
    is_wanted = torch.zeros(vocab_size + 1, dtype=torch.bool, device=text_ids.device)
    is_wanted[text_ids.flatten().clamp(max=vocab_size)] = True
    is_wanted[draft_to_target.to(text_ids.device)] = False
    return is_wanted[: min(num_head_rows or vocab_size, vocab_size)].nonzero()[:, 0]
