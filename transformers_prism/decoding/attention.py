"""Attention over trees: `prism_tree` on a kernel, and grouped attention, which is SDPA without repeated keys.

`prism_tree`: trees go to the tree attention kernel, everything else to SDPA.

`model.set_attn_implementation("prism_tree")` gives a model whose prefill and ordinary calls are those of "sdpa", and
whose forwards over a tree run on the kernel. The mask of such a forward is the dense one that SDPA would take, with the
tree's compact form attached to it; a model that passes on anything but this very tensor gets the dense mask's result,
which is the same. The attached object computes the attention itself, so that it does not matter which copy of
this code was registered last.

Grouped attention differs from SDPA as transformers calls it in three ways. Keys and values that several query heads share
are not repeated; transformers repeats them whenever there is a mask, which copies the whole context in every layer and on a
CPU takes longer than the attention itself. Sequences with much left padding are computed separately, each over its own keys.
And the few queries of a round go to a kernel of ours where there is one (`kernels/few_queries.py`), else, over a long context, to
one matrix product over all keys, since SDPA's blocks are too small to use a CPU well.

While the loop runs, models on "sdpa" get what suits their device: grouped attention on a CPU, and `prism_tree` for a draft
where Triton computes. A target that `prepare_for_cpu` gave our own products has grouped attention in all its forwards: both
compute a token's outputs in the same way with others as alone, so that verifying a tree gives the bits of plain steps.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.dispatch import use_triton
from ..kernels.few_queries import PART, Tail, attend_served, serves_few_queries
from ..kernels.tree_attention import MAX_HEAD_DIM, tree_attention
from ..packed_layers import CompiledLinear
from ..transformers_names import attention_name, registered_attention
from .cache import CommittedCache

PRISM_TREE = "prism_tree"
# Inputs of some models' attention that neither the kernel nor SDPA takes into account.
_UNKNOWN_INPUTS = ("s_aux", "position_bias")
# Where products over all keys were seen to beat SDPA on CPUs (9 heads of 64 in groups of 3, float32): from this number of
# keys on, for up to this number of queries. `benchmarks.scaling --context` shows what it is worth.
_LONG_CONTEXT = 4096
_FEW_QUERIES = 64
# Where the kernel was seen to beat SDPA, in float32: from this number of keys on, if there are so many for each query; and without
# a mask.
_KERNEL_KEYS, _KERNEL_KEYS_OF_QUERY = 256, 16
_MANY_KEYS = 1024
# Attending to this many keys of one sequence takes as long as one more call of SDPA.
_WORTH_A_CALL = 128


@dataclass
class TreeMask:
    """What tree nodes see, in the form that the kernel takes; see [`tree_attention`].

    Args:
        ancestors (`torch.LongTensor` of shape `(B, N, W)`): bits over the uncommitted keys.
        committed (`torch.BoolTensor` of shape `(B, P)`).
        node_index (`torch.LongTensor` of shape `(B, R)`, *optional*), sliding_window (`int`, *optional*): of a window.
    """

    ancestors: torch.Tensor
    committed: torch.Tensor
    node_index: torch.Tensor | None = None
    sliding_window: int | None = None

    def attend(self, query, key, value, scale: float, softcap: float | None) -> torch.Tensor:
        """Attention output `(B, N, H, E)`; arguments as an attention implementation of transformers gets them."""
        return tree_attention(
            query,
            key,
            value,
            self.ancestors.to(query.device),
            self.committed.to(query.device),
            None if self.node_index is None else self.node_index.to(query.device),
            self.sliding_window,
            softcap,
            scale,
        )


def attach_tree(
    mask: torch.Tensor, ancestors: torch.Tensor, committed: torch.Tensor, node_index=None, sliding_window=None
):
    """Attach the tree's compact form to a dense mask `(B, 1, N, P + R)`; returns the same tensor.

    Args:
        mask (`torch.BoolTensor`): what each node sees.
        ancestors, committed, node_index, sliding_window: see [`TreeMask`].
    """
    # An attribute of the tensor, since nothing else reaches the attention function of every model: many forwards hand on no
    # keyword arguments to their layers, and a subclass of Tensor would be unwrapped by the first operation on the mask.
    mask.prism_tree = TreeMask(ancestors, committed, node_index, sliding_window)  # type: ignore[attr-defined]
    return mask


def attach_starts(mask: torch.Tensor, starts: list[int]) -> None:
    """Attach to a mask `(B, 1, N, K)` the first key of each group of rows, for attention that computes groups separately.

    Args:
        starts (`list[int]`): the first key of each sequence after its left padding; empty if that is not needed.
    """
    runs = _runs_of_rows(starts)
    if len(runs) > 1 or any(start > 0 for *_, start in runs):
        mask.prism_runs = runs  # type: ignore[attr-defined]


def attach_tail(mask: torch.Tensor, committed: CommittedCache, depths: torch.Tensor) -> None:
    """Attach to a mask `(1, 1, N, K)` its last keys by part of the text, for attention whose sums keep to these parts.

    Args:
        committed (`CommittedCache`): of one sequence, with the P keys before the nodes.
        depths (`torch.LongTensor` of shape `(1, N)`): of the nodes.
    """
    start, end = committed.num_dense // PART * PART, committed.width + depths.shape[1]
    visible = mask[..., start:end].contiguous()
    if end > start + PART:  # it may reach beyond one part
        places = torch.cat((committed.places()[0, start:], committed.lengths[0] + depths[0]))
        parts = torch.arange(start // PART, int(places.max()) // PART + 1, device=places.device)
        visible = visible & (places // PART == parts[:, None])[None, :, None]
    mask.prism_tail = Tail(start, visible)  # type: ignore[attr-defined]


def _runs_of_rows(starts: list[int]) -> list[tuple[int, int, int]]:
    """Groups of neighbouring rows that attend together, each as its first row, the row after its last, and its first key."""
    runs: list[tuple[int, int, int]] = []
    for row, start in enumerate(starts):
        if runs:
            first_row, _, first_key = runs[-1]
            together = min(first_key, start)
            if (row - first_row) * (first_key - together) + start - together <= _WORTH_A_CALL:
                runs[-1] = (first_row, row + 1, together)
                continue
        runs.append((row, row + 1, start))
    return runs


def prism_tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, **kwargs):
    """The attention function that transformers calls for "prism_tree".

    Returns:
        `tuple`: the output of shape `(B, N, H, E)`, and None for the weights.
    Raises:
        ValueError: for a model whose attention has inputs that this implementation would have to ignore.
    """
    unknown = [name for name in _UNKNOWN_INPUTS if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(f"{PRISM_TREE}: expected attention without {unknown[0]}, got {type(module).__name__} with it")
    tree = getattr(attention_mask, "prism_tree", None)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if tree is not None and value.shape == key.shape and query.shape[3] <= MAX_HEAD_DIM:
        return tree.attend(query, key, value, scale, softcap), None
    if softcap is not None:
        return _capped_attention(query, key, value, attention_mask, scale, softcap), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def grouped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """SDPA for few queries over many keys: an attention function of transformers.

    Returns:
        `tuple`: the output of shape `(B, N, H, E)`, and None for the weights.
    """
    is_plain = kwargs.get("position_bias") is None and kwargs.get("softcap") is None and not dropout
    is_usual = is_plain and _is_usual(attention_mask, query, key)
    is_wanted = is_usual and (computes_rows_alone(module) or _is_worth_a_kernel(attention_mask, query, key))
    has_kernel = is_wanted and serves_few_queries(query, key, value)
    runs = getattr(attention_mask, "prism_runs", None)
    gains_nothing = runs is None and query.shape[1] == key.shape[1] and not has_kernel
    if gains_nothing or not is_plain or (attention_mask is None and not has_kernel):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    tail = getattr(attention_mask, "prism_tail", None)
    if attention_mask is None or has_kernel and tail is not None:
        return _attend_by_kernel(query, key, value, attention_mask, scale, tail), None
    if has_kernel:
        attend = _attend_by_kernel
    else:
        attend = _long_attention if is_usual and _is_long(query, key, value) else _grouped_sdpa
    outputs = [
        attend(query[row:end], key[row:end, :, start:], value[row:end, :, start:], attention_mask[row:end, ..., start:], scale)
        for row, end, start in runs or [(0, len(query), 0)]
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), None


def _is_usual(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a mask says what each query sees, the same for all heads, or one query sees all keys."""
    if mask is None:
        return query.shape[2] == 1
    return mask.dtype == torch.bool and mask.shape == (len(query), 1, query.shape[2], key.shape[2])


def _is_worth_a_kernel(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the kernel is faster than SDPA."""
    fewest = _MANY_KEYS if mask is None else max(_KERNEL_KEYS, _KERNEL_KEYS_OF_QUERY * query.shape[2])
    return query.dtype is torch.float32 and key.shape[2] >= fewest


def computes_rows_alone(module) -> bool:
    """Whether an attention layer has products of ours, whose output for a token does not depend on the other tokens."""
    # By name: a model may have been prepared by another copy of this code.
    return any(type(child).__name__ == CompiledLinear.__name__ for child in vars(module).get("_modules", {}).values())


def _attend_by_kernel(query, key, value, mask, scale: float, tail: Tail | None = None) -> torch.Tensor:
    """Attention of few queries, `(B, N, H, E)`."""
    try:
        return attend_served(query, key, value, None if mask is None else mask[:, 0], scale, tail)
    except RuntimeError:  # raised for a tensor without memory of its own, as under torch.func.vmap
        return _grouped_sdpa(query, key, value, mask, scale)


def _grouped_sdpa(query, key, value, mask, scale: float) -> torch.Tensor:
    """Attention of few queries under a mask, `(B, N, H, E)`."""
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2).contiguous()


def _is_long(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether few queries attend to many keys on a CPU, in a dtype whose scores need no wider one."""
    return (
        key.shape[2] >= _LONG_CONTEXT
        and query.shape[2] <= _FEW_QUERIES
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.dtype == key.dtype == value.dtype  # under autocast they differ
        and not query.requires_grad
        and not torch.compiler.is_compiling()
    )


def _long_attention(query, key, value, mask, scale: float) -> torch.Tensor:
    """Attention of N nodes over K keys, `(B, N, H, E)`; only one group's scores, `(R * N, K)`, exist at a time."""
    num_rows, num_heads, num_nodes, head_dim = query.shape
    num_groups, num_keys = key.shape[1:3]
    grouped = (query * scale).reshape(num_rows, num_groups, -1, head_dim)  # [B, G, R * N, E]
    output = query.new_empty((*grouped.shape[:3], value.shape[3]))
    for row in range(num_rows):
        # Skip the first keys if no node sees them: padding, and keys before a sliding window.
        visible = mask[row, 0].numpy()
        start = int(visible.any(axis=0).argmax())
        # Nearly all keys are seen by all nodes, so only those from the first exception on are masked.
        first = int(visible[:, start:].all(axis=0).argmin())
        hidden = ~mask[row, 0, :, start + first :]
        scores = query.new_empty((grouped.shape[2], num_keys - start))
        for group in range(num_groups):
            torch.mm(grouped[row, group], key[row, group, start:].T, out=scores)
            masked = scores.view(-1, num_nodes, num_keys - start)[..., first:]
            masked.masked_fill_(hidden, torch.finfo(scores.dtype).min)
            torch.softmax(scores, -1, out=scores)
            torch.mm(scores, value[row, group, start:], out=output[row, group])
    return output.view(num_rows, num_heads, num_nodes, -1).transpose(1, 2).contiguous()


def install_lending() -> None:
    """Let a thread replace the function behind "sdpa" for a while (see [`lent_sdpa`]). Doing it twice changes nothing.

    The implementation's name stays "sdpa", since a model may choose its masks by the name.
    """
    original = registered_attention("sdpa")
    if hasattr(original, "prism_lent"):
        return
    lent = threading.local()

    @functools.wraps(original)
    def sdpa(*args, **kwargs):
        # A compiled graph would keep the replacement for good.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return original(*args, **kwargs)
        function = getattr(lent, "function", None)
        takes_ours = function is None and original is sdpa_attention_forward and not torch.is_grad_enabled()
        if takes_ours and args and computes_rows_alone(args[0]):
            function = grouped_attention
        return (function or original)(*args, **kwargs)

    sdpa.prism_lent, sdpa.prism_original = lent, original  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", sdpa)


def uninstall_lending() -> None:
    """Undo [`install_lending`]."""
    AttentionInterface.register("sdpa", getattr(registered_attention("sdpa"), "prism_original", sdpa_attention_forward))


@contextmanager
def lent_sdpa(function) -> Iterator[None]:
    """Compute the "sdpa" attention of every model in this thread by another function."""
    install_lending()
    shared = ALL_ATTENTION_FUNCTIONS["sdpa"]
    # Somebody else has registered a function under this name, and wants its results.
    if getattr(shared, "prism_original", None) is not sdpa_attention_forward:
        yield
        return
    lent = shared.prism_lent  # of whichever copy of this code came first
    before = getattr(lent, "function", None)
    try:
        lent.function = function
        yield
    finally:
        lent.function = before


@contextmanager
def lent_attention(target, draft, is_draft_compiled: bool = False) -> Iterator[None]:
    """Lend a target and a draft on "sdpa" the attention that suits their device.

    On a CPU that is grouped attention, since SDPA would repeat keys and values. Where Triton computes, the draft gets
    `prism_tree`; a target uses that only if its owner has set it, since its forwards serve others, too.

    Args:
        target, draft (`PreTrainedModel`): the draft's own implementation is restored at the end.
        is_draft_compiled (`bool`): whether the draft is compiled; it then has dense masks, which the kernel does not take.
    """
    takes_kernel = not is_draft_compiled and use_triton("auto", draft.device) and attention_name(draft.config) == "sdpa"
    try:
        if takes_kernel:
            draft.set_attn_implementation(PRISM_TREE)
        with lent_sdpa(grouped_attention) if target.device.type == "cpu" else nullcontext():
            yield
    finally:
        if takes_kernel:
            draft.set_attn_implementation("sdpa")


def _capped_attention(query, key, value, mask, scale: float, softcap: float) -> torch.Tensor:
    """Attention with bounded scores, which SDPA lacks, `(B, N, H, E)`; without a mask it is causal."""
    num_nodes, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        index = torch.arange(num_keys, device=query.device)
        mask = index <= index[num_keys - num_nodes :, None]
    num_repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(num_repeats, dim=1) for states in (key, value))
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap  # [B, H, N, K]
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


# Without a mask function of the same name an implementation would get no mask, not even for padding.
AttentionInterface.register(PRISM_TREE, prism_tree_attention)
AttentionMaskInterface.register(PRISM_TREE, sdpa_mask)
