"""Make forwards over a few tokens cost little more than one over a single token, on a CPU.

The weights of linear layers are packed once (`packed_layers.py`). Where a C++ compiler is found, products are our own
(`kernels/packed_linear.py`), and so is the attention of few tokens. They compute a token's outputs in the same way with others as
alone: a target writes the same text with a draft as without, bit for bit, as far as its other layers keep to that, too.

Without a compiler, which product is fastest depends on the CPU, the shape of the weight and the number of rows: oneDNN's, MKL's or
the default one. These are timed when the weights are packed. Each shape gets the packing that saves the most, and the default
product where that one is faster.

A draft step is bound by memory bandwidth, and what a draft proposes never changes the output: the weights of a draft in float32
are packed in float16, half of the bytes.

Only plain layers are packed, in float32, bfloat16 or float16: quantised weights, subclasses of `nn.Linear` and layers with a
forward of their own stay as they are.
"""

import contextlib
import math
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .decoding.attention import install_lending
from .kernels.dispatch import dtype_name
from .kernels.few_queries import MAX_QUERIES
from .packed_layers import (
    MOST_ROWS,
    PACKED_DTYPES,
    TARGET_KINDS,
    CompiledLinear,
    HalfLinear,
    PackedLinear,
    can_pack,
    is_packable,
    is_plain_tensor,
    pack,
)
from .transformers_names import cache_of

# Products are timed with these numbers of rows, and the fastest serves those between the one before and this one, too.
_TIMED_ROWS = (1, 2, 3, 4, 8, 16, 32, 64, MAX_QUERIES, MOST_ROWS)
# Layers with fewer weights are not timed. Of each shape this many weights are: more than a core's cache holds.
_FEWEST_TIMED_WEIGHTS, _TIMED_WEIGHTS = 2**16, 2**23
_NUM_REPEATS, _MOST_SECONDS = 5, 0.05
# Two products differ by rounding, which is at most this share of the largest value, or one unit of a shorter dtype.
_ROUNDING = 1e-4
# A prepared model is checked again after this many seconds without a forward, but at least this many times a check's time.
_IDLE_SECONDS, _IDLE_CHECKS = 1.0, 10
# The name of a recurrent model's past in a forward, in addition to those of transformers' caches.
_OTHER_PAST = "state"


class _Trust(threading.local):
    """How many blocks of [`trusting_packed_weights`] this thread is in."""

    depth = 0


_trust = _Trust()


class WeightCheck:
    """A forward pre-hook of a prepared model: before a sequence begins, it packs weights again that were written to."""

    def __init__(self, linears: list[PackedLinear]):
        self.linears = linears
        self.last_call = self.seconds = 0.0
        # The handle reserves the hook's id in a copy or a pickle of the model, so that no later hook replaces it there.
        self.handle: Any = None

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Check all weights if no or an empty cache is given, or the model has been idle."""
        # The copies serve forwards without gradients only.
        if torch.is_grad_enabled() or _trust.depth:
            return
        now = time.monotonic()
        idle_seconds, self.last_call = now - self.last_call, now
        if idle_seconds > max(_IDLE_SECONDS, _IDLE_CHECKS * self.seconds) or _begins_sequence(args, kwargs):
            self.refresh()

    def refresh(self) -> int:
        """Check all weights now; returns how many were packed again."""
        start = time.monotonic()
        num_packed = sum(linear.refresh() for linear in self.linears)
        self.seconds = time.monotonic() - start
        return num_packed


def _begins_sequence(args: tuple, kwargs: dict) -> bool:
    """Whether a forward with these arguments has no past."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            return _is_empty(value)
    return cache_of(kwargs) is None and kwargs.get(_OTHER_PAST) is None


def _is_empty(cache: Cache) -> bool:
    try:
        return int(cache.get_seq_length()) == 0
    except ValueError:  # raised for caches of recurrent states alone
        return not cache.has_previous_state()


@contextlib.contextmanager
def trusting_packed_weights() -> Iterator[None]:
    """Skip the checks of whole weights before this thread's forwards, for code that measures their time."""
    _trust.depth += 1
    try:
        yield
    finally:
        _trust.depth -= 1


class PreparedModels:
    """The layers that [`prepare_for_cpu`] changed; as a context manager it calls `undo` at the end."""

    def __init__(self, linears: list[PackedLinear], checks: list[WeightCheck] | None = None):
        self.linears, self.checks = linears, checks or []

    @property
    def num_bytes(self) -> int:
        """Memory of the packed copies in bytes: a target's weights once more, and half of those of a draft in float32."""
        return sum(linear.num_bytes for linear in self.linears)

    def refresh(self) -> int:
        """Check all weights now, and pack those again that were written to in any way; returns for how many layers."""
        return sum(linear.refresh() for linear in self.linears)

    def undo(self) -> None:
        """Make the layers what they were and free the packed copies. Doing it twice changes nothing."""
        for check in self.checks:
            check.handle.remove()
        for linear in self.linears:
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            for name in ("_packed", "packed_rows"):
                linear.__dict__.pop(name, None)
        self.linears, self.checks = [], []

    def __enter__(self) -> "PreparedModels":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def prepare_for_cpu(*models: nn.Module) -> PreparedModels:
    """Pack the weights of every plain `nn.Linear` on the CPU once, so that verifying a tree and drafting one cost little.

    Where a C++ compiler is found, products and the attention of few tokens are then our own, and a target on "sdpa" attention writes
    the same text with a draft as without in any dtype, bit for bit. Otherwise products of several libraries are timed on 1 to 256
    rows, in some three seconds, and the fastest are used from then on.
    A target's results stay those of before within the rounding of its dtype: float32, bfloat16 or float16. A draft in float32 is packed
    in float16, and so are the rows of the head that it borrows: it may propose other tokens now and then, which changes no
    output. Layers that are not a plain `nn.Linear` (quantised, with adapters, offloaded) stay as they are.

    Weights may be written to afterwards; then they are packed again. A write that torch counts (`weight.mul_(2)`,
    `load_state_dict`, an optimiser's step, another parameter or storage) takes effect in the next product. So does one that
    torch does not count (`weight.data += delta`, as adapters are merged, or numpy) if it changes the whole weight, of which
    16 values are compared. One that changes only a part of it takes effect before the next sequence: when the target is
    called without a cache or with an empty one, or after a second without a call, and when a draft begins a generate()
    call. Before that, and for modules of a target that are called on their own, call `refresh()`.

    Args:
        models (`nn.Module`): targets and drafts. One whose linear layers on the CPU all have dtypes without a product brings a
            warning.
    Returns:
        `PreparedModels`: with `undo()`, `refresh()`, and `num_bytes`, the memory that the copies take.
    """
    prepared, checks = [], []
    for model in models:
        is_draft = isinstance(model, PreTrainedModel) and model.config.model_type == "prism"
        linears = _packable(model)
        packed = [pack(linear, HalfLinear) for linear in linears] if is_draft else _pack_fastest(linears)
        prepared += packed
        if not packed:
            _warn_of_unpacked(model)
        # A draft's are checked when it is bound, once in a call.
        if packed and not is_draft:
            checks.append(WeightCheck(packed))
            checks[-1].handle = model.register_forward_pre_hook(checks[-1], with_kwargs=True)
    if any(type(linear) is CompiledLinear for linear in prepared):
        install_lending()  # their attention is looked up there
    return PreparedModels(prepared, checks)


def _pack_fastest(linears: list[nn.Linear]) -> list[PackedLinear]:
    """Pack layers for the product, and the numbers of rows, that timing shows to be the fastest for their shape; for our own where there
    is one, since it computes each row alone."""
    by_shape = defaultdict(list)
    for linear in linears:
        by_shape[(linear.weight.dtype, *linear.weight.shape)].append(linear)
    for same in by_shape.values():
        kind, packed_rows = _timed_kinds(same[0].weight.dtype)[0], PackedLinear.packed_rows
        if same[0].weight.numel() >= _FEWEST_TIMED_WEIGHTS:
            kind, packed_rows = _fastest_products(same[: -(-_TIMED_WEIGHTS // same[0].weight.numel())])
        for linear in same:
            pack(linear, kind).packed_rows = packed_rows
    return linears  # type: ignore[return-value]


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def _fastest_products(linears: list[nn.Linear]) -> tuple[type[PackedLinear], tuple[bool, ...]]:
    """The packing that saves the most on these layers of one shape, and whether it serves, by number of rows."""
    dtype = linears[0].weight.dtype
    kinds, rounding = _timed_kinds(dtype), max(_ROUNDING, torch.finfo(dtype).eps)
    plain = [_first_rows(linear) for linear in linears]
    exact = [None if one is None else one.float() for one in (plain[0].weight, plain[0].bias)]
    twins: list[list] = [[pack(_first_rows(linear), kind) for linear in linears] for kind in kinds]
    shares: dict[type[PackedLinear], list[float]] = {kind: [] for kind in kinds}
    for num_rows in _TIMED_ROWS:
        # The many rows of a prompt are bound by arithmetic, whatever the caches hold.
        timed = slice(None if num_rows < MOST_ROWS else 1)
        values = torch.linspace(-1, 1, num_rows * linears[0].in_features, dtype=torch.float32, device="cpu")
        input = values.view(num_rows, -1).to(dtype)
        default, *seconds = _seconds([plain[timed], *(layers[timed] for layers in twins)], input)
        expected = nn.functional.linear(input.float(), *exact)
        for kind, layers, taken in zip(kinds, twins, seconds, strict=True):
            is_right = (layers[0](input) - expected).abs().max() <= rounding * expected.abs().max()
            shares[kind].append(taken / default if is_right else float("inf"))
    kind = min(kinds, key=lambda kind: sum(min(share, 1.0) for share in shares[kind]))
    packed_rows = [False]
    for num_rows, share in zip(_TIMED_ROWS, shares[kind], strict=True):
        # Of the rows of a prompt the faster product serves; of those of a tree and of plain steps the same one.
        most = math.inf if kind is CompiledLinear and num_rows <= MAX_QUERIES else 1
        packed_rows += [share < most] * (num_rows + 1 - len(packed_rows))
    return kind, tuple(packed_rows)


def _timed_kinds(dtype: torch.dtype) -> list[type[PackedLinear]]:
    """The kinds of products that are timed for a target's weights of a dtype: our own, or all others that there are."""
    kinds = [kind for kind in TARGET_KINDS if kind.is_available(dtype)]
    return [CompiledLinear] if CompiledLinear in kinds else kinds


def _first_rows(linear: nn.Linear) -> nn.Linear:
    """A layer with the same weight and bias; of a large one, such as a head, with its first rows."""
    num_rows = min(linear.out_features, -(-_TIMED_WEIGHTS // linear.in_features))
    rows = nn.Linear(linear.in_features, num_rows, bias=False, device="meta")
    rows.weight = nn.Parameter(linear.weight[:num_rows], requires_grad=False)
    if linear.bias is not None:
        rows.bias = nn.Parameter(linear.bias[:num_rows], requires_grad=False)
    return rows


def _seconds(kinds: list[list], input: torch.Tensor) -> list[float]:
    """For each list of layers, the time of one pass over them: the shortest of several, in turn."""
    fewest, start_of_all = [float("inf")] * len(kinds), time.perf_counter()
    for repeat in range(_NUM_REPEATS):
        # What takes long varies little.
        if repeat > 1 and time.perf_counter() - start_of_all > _MOST_SECONDS:
            break
        for index, layers in enumerate(kinds):
            start = time.perf_counter()
            for layer in layers:
                layer.forward(input)
            fewest[index] = min(fewest[index], time.perf_counter() - start)
    return fewest


def _warn_of_unpacked(model: nn.Module) -> None:
    """Warn that nothing was packed, if that is due to the dtype."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear and is_plain_tensor(module.weight)]
    found = {weight.dtype for weight in weights if weight.device.type == "cpu"}
    if not found or any(map(can_pack, found)):
        return
    packable = [dtype_name(dtype) for dtype in PACKED_DTYPES if can_pack(dtype)]
    expected = f"layers in {' or '.join(packable)}" if packable else "oneDNN or MKL in torch, or a C++ compiler"
    advice = f" Load it with dtype=torch.{packable[0]}." if packable else ""
    got = " and ".join(sorted(map(dtype_name, found)))
    warnings.warn(
        f"prepare_for_cpu: expected {expected}, got {got} in {type(model).__name__}; nothing of it was packed.{advice}", stacklevel=3
    )


def _packable(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear) and _can_be_packed(module)]


def _can_be_packed(linear: nn.Linear) -> bool:
    # A subclass, or a forward set on the layer itself (compressed-tensors, accelerate's hooks), may compute something else.
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    return is_packable(linear.weight)
