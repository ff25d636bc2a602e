"""Make forwards over a few tokens cost little more than one over a single token, on a CPU.

torch's default matrix product re-packs a weight for every product with 2 to 32 rows. Packed once, in the layout that a
product reads, it reads the weight and nothing else; torch.compile does the same with frozen weights. Results differ from the
default product by rounding only.

Which product is fastest depends on the CPU, the shape of the weight and the number of rows: our own, which needs a C++
compiler (`kernels/packed_linear.py`), oneDNN's, MKL's or the default one. All are timed when the weights are packed. Each
shape gets the packing that saves the most, and the default product where that one is faster.

A draft step is bound by memory bandwidth, and what a draft proposes never changes the output: the weights of a draft in float32
are packed in float16, half of the bytes.

A packed copy must not be used after its weight has changed, and torch does not count every write to a weight
(`weight.data += delta`, as adapters are merged; numpy; shared memory). So each copy comes with a few of the weight's values,
which every product compares, and with sums over the whole weight, which are compared before a sequence begins. The values
show a write to the whole weight, the sums one to a part of it; the sums take about half the time of a plain step.

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
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .kernels.dispatch import dtype_name
from .kernels.packed_linear import pack_weight, packed_linear, packed_linear_is_available
from .transformers_names import cache_of

# Products are timed with these numbers of rows, and the fastest serves those between the one before and this one, too.
_TIMED_ROWS = (1, 2, 3, 4, 8, 16, 32, 64, 256)
# More are those of a prompt, and take the default product: packing a weight is then a small part of it.
_MOST_ROWS = _TIMED_ROWS[-1]
# Layers with fewer weights are not timed. Of each shape this many weights are: more than a core's cache holds.
_FEWEST_TIMED_WEIGHTS, _TIMED_WEIGHTS = 2**16, 2**23
_NUM_REPEATS, _MOST_SECONDS = 5, 0.05
# Two products differ by rounding, which is at most this share of the largest value, or one unit of a shorter dtype.
_ROUNDING = 1e-4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# MKL asks for the number of rows, and packs in the same way for any: copies are of equal size, and serve all numbers of rows.
_MKL_ROWS = 64
# Values of a weight that every product compares; and weights that are summed at a time, few enough for a core's cache.
_NUM_SAMPLES, _SUMMED_WEIGHTS = 16, 2**18
# A prepared model is checked again after this many seconds without a forward, but at least this many times a check's time.
_IDLE_SECONDS, _IDLE_CHECKS = 1.0, 10
# The name of a recurrent model's past in a forward, in addition to those of transformers' caches.
_OTHER_PAST = "state"


class _Trust(threading.local):
    """How many blocks of [`trusting_packed_weights`] this thread is in."""

    depth = 0


_trust = _Trust()
_outside_of_graphs = torch.compiler.disable(packed_linear)


def weight_version(weight: torch.Tensor) -> int | None:
    """How often a tensor was written to, as far as torch counts; None for tensors made in inference mode, without a count."""
    return None if weight.is_inference() else weight._version


def _takes(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a packed copy of a weight can serve this input."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    # Subclasses, such as those that only stand for a tensor while a graph is traced, may have no memory; and torch.jit would not
    # note what a packed product writes.
    is_known = input.dtype is weight.dtype and input.dtype in _DTYPES
    return is_known and input.is_cpu and _is_plain(input) and not torch.jit.is_tracing()


class _Packed(NamedTuple):
    """A packed copy, and what shows whether its weight has changed since."""

    copy: Any
    dtype: torch.dtype
    pointer: int
    version: int | None
    sampled: memoryview  # some of the weight's values, as they are now
    samples: memoryview  # and as they were when it was packed
    sums: tuple[torch.Tensor, torch.Tensor]

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether it was made from this weight, and neither torch's count nor the samples show a write since."""
        is_known = weight.data_ptr() == self.pointer and weight_version(weight) == self.version
        return is_known and weight.dtype is self.dtype and self.sampled == self.samples

    def has_sums_of(self, weight: torch.Tensor) -> bool:
        """Whether the whole weight still is what was packed."""
        return all(map(torch.equal, self.sums, _sums(weight)))


def _sampled(weight: torch.Tensor) -> memoryview:
    """A view of values along a diagonal of a weight, as their bits."""
    num_rows, num_columns = weight.shape
    count = min(_NUM_SAMPLES, max(num_rows, num_columns))
    step = num_rows // count * weight.stride(0) + num_columns // count * weight.stride(1)
    bits = weight.detach().view(torch.int32 if weight.dtype is torch.float32 else torch.int16)
    return bits.as_strided((count,), (step,)).numpy().data


@torch.no_grad()
def _sums(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of a weight's bits, as integers that wrap around, along each row and each column.

    They change if one value, one row or all values change, after most other changes, and if values change places.
    """
    bits = weight.detach().reshape(-1)
    # Eight bytes at a time, since torch adds short integers 30 times more slowly; if need be, several rows as one.
    num_rows, size = weight.shape[0], bits.element_size()
    num_joined = 8 // math.gcd(weight.shape[1] * size, 8)
    bits = bits.view(num_rows // num_joined if num_rows % num_joined == 0 else num_rows, -1)
    # Views of a longer tensor may be misaligned.
    num_bytes, start = bits.shape[1] * size, bits.storage_offset() * size
    integers = (torch.int64, torch.int32, torch.int16)
    bits = bits.view(next(one for one in integers if not (num_bytes % one.itemsize or start % one.itemsize)))
    of_rows, of_columns = [], torch.zeros(bits.shape[1], dtype=torch.int64, device="cpu")
    for part in bits.split(max(_SUMMED_WEIGHTS // max(weight.shape[1], 1), 1)):
        of_rows.append(part.sum(dim=1))
        of_columns = of_columns + part.sum(dim=0)
    return torch.cat(of_rows), of_columns


class PackedLinear(nn.Linear):
    """An `nn.Linear` with a copy of its weight that oneDNN packed. It is converted, and converted back, by changing its class.

    The packed copy is used in forwards without gradients on inputs of the weight's dtype for which `packed_rows`, by the number
    of rows, is True. It is made again when a write to the weight is noticed (see [`prepare_for_cpu`]). All other inputs, and
    those with more rows, take the default product.
    """

    packed_rows = (False,) + (True,) * _MOST_ROWS

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T + bias`, as `nn.Linear`."""
        # A call per layer and forward: a look at a parameter by its attribute would take a tenth of a small product.
        num_rows = input.numel() // self.in_features
        weight = self._parameters.get("weight")
        if weight is None or num_rows > _MOST_ROWS or not self.packed_rows[num_rows] or not _takes(input, weight):
            return super().forward(input)
        packed = self.__dict__.get("_packed")
        if packed is None or not packed.is_of(weight):
            packed = self._pack_again()
        return super().forward(input) if packed.copy is None else self.packed_product(input, packed.copy, num_rows)

    @classmethod
    def is_available(cls, dtype: torch.dtype = torch.float32) -> bool:
        """Whether this build of torch has the product, for weights of a dtype."""
        has_product = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        if not has_product or dtype is torch.float32:
            return has_product
        short = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        return short is not None and getattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported")()

    def packed_product(self, input: torch.Tensor, copy: Any, num_rows: int) -> torch.Tensor:
        """The product with a packed copy, which is an opaque object."""
        return torch.ops.mkldnn._linear_pointwise.default(input, copy, self._parameters["bias"], "none", [], "")

    def _own_product(self, input: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        # torch.compile cannot trace it.
        product = _outside_of_graphs if torch.compiler.is_compiling() else packed_linear
        try:
            return product(input, copy, self._parameters["bias"], self._parameters["weight"].shape[0])  # type: ignore[union-attr]
        except RuntimeError:  # raised for a tensor without memory of its own, as under torch.func.vmap
            return super().forward(input)

    def refresh(self) -> bool:
        """Pack the weight again if any part of it has changed since it was packed; returns whether it was packed again."""
        packed, weight = self.__dict__.get("_packed"), self.weight
        if packed is None or not _is_packable(weight) or (packed.is_of(weight) and packed.has_sums_of(weight)):
            return False
        self._pack_again()
        return True

    def _pack_again(self) -> _Packed:
        # A copy made in inference mode could not be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.detach()
            sampled = _sampled(weight)
            # Noted before the copy is made: a write in between is then found later.
            samples = memoryview(bytes(sampled)).cast("i" if weight.dtype is torch.float32 else "h")
            known = (weight.dtype, weight.data_ptr(), weight_version(self.weight), sampled, samples, _sums(weight))
            # None also for a layer that was cast since, or loaded on another machine.
            copy = self._pack(weight) if self.is_available(weight.dtype) else None
            # Other threads use the old copy until it is replaced, in one assignment.
            packed = self.__dict__["_packed"] = _Packed(copy, *known)
        return packed

    @property
    def num_bytes(self) -> int:
        """Memory of the packed copy."""
        packed = self.__dict__.get("_packed")
        return 0 if packed is None or packed.copy is None else self._bytes_of_copy()

    def _bytes_of_copy(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def _pack(self, weight: torch.Tensor):
        # No fixed number of rows, so that one copy serves 1 to 32 rows and a whole prompt.
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __getstate__(self):
        """Copies and pickles leave the packed weight behind and make their own."""
        return {name: value for name, value in super().__getstate__().items() if name != "_packed"}


class MklLinear(PackedLinear):
    """A layer whose weight MKL packed. Its resident memory is that of the weight, the addresses that it reserves are more."""

    @classmethod
    def is_available(cls, dtype: torch.dtype = torch.float32) -> bool:
        """Whether this build of torch has MKL, for weights in float32."""
        return dtype is torch.float32 and torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")

    def packed_product(self, input: torch.Tensor, copy: Any, num_rows: int) -> torch.Tensor:
        """As [`PackedLinear.packed_product`]."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return torch.ops.mkl._mkl_linear.default(input, copy, weight, bias, num_rows)

    def _pack(self, weight: torch.Tensor):
        return torch.ops.mkl._mkl_reorder_linear_weight.default(weight, _MKL_ROWS)


class CompiledLinear(PackedLinear):
    """A layer whose product is our own."""

    @classmethod
    def is_available(cls, dtype: torch.dtype = torch.float32) -> bool:
        """Whether it could be compiled here."""
        return dtype in _DTYPES and packed_linear_is_available()

    def packed_product(self, input: torch.Tensor, copy: Any, num_rows: int) -> torch.Tensor:
        """As [`PackedLinear.packed_product`]; a row's output does not depend on the number of rows."""
        return self._own_product(input, copy)

    def _pack(self, weight: torch.Tensor):
        return pack_weight(weight)


class HalfLinear(PackedLinear):
    """A draft's layer. Its packed copy has 16 bits for a weight: float16 for one in float32. Products are summed in float32."""

    @classmethod
    def is_available(cls, dtype: torch.dtype = torch.float32) -> bool:
        """Whether our own product is there, or torch's engine for quantised products, which users may choose, has one."""
        return CompiledLinear.is_available(dtype) or (dtype is torch.float32 and _has_half_engine())

    def packed_product(self, input: torch.Tensor, copy: Any, num_rows: int) -> torch.Tensor:
        """As [`PackedLinear.packed_product`], with a weight rounded to 16 bits."""
        if isinstance(copy, torch.Tensor):
            return self._own_product(input, copy)
        output, bias = torch.ops.quantized.linear_dynamic_fp16.default(input, copy), self._parameters["bias"]
        return output if bias is None else output.add_(bias)

    def _pack(self, weight: torch.Tensor):
        if weight.dtype is not torch.float32:
            return pack_weight(weight)
        # None where a weight exceeds float16.
        if not _fits_half(weight):
            return None
        # Without the bias, which may be written to.
        return pack_weight(weight.half()) if packed_linear_is_available() else torch.ops.quantized.linear_prepack_fp16(weight, None)

    def _bytes_of_copy(self) -> int:
        return 2 * self.weight.numel()


_TIMED_KINDS = (PackedLinear, MklLinear, CompiledLinear)
# All kinds of layers that compute what an `nn.Linear` does, the one that a draft prefers first.
PACKED_KINDS = (HalfLinear, CompiledLinear, MklLinear, PackedLinear)


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


def refresh_packed_weights(*models: nn.Module) -> int:
    """Check all packed weights of these models now, as [`PreparedModels.refresh`] does; returns how many were packed again.

    A model that was not prepared has none. It takes about as long as half a plain step of a target.
    """
    linears = {id(module): module for model in models for module in model.modules() if isinstance(module, PackedLinear)}
    return sum(linear.refresh() for linear in linears.values())


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

    Products of several libraries, and our own where a C++ compiler is found, are timed on 1 to 256 rows, in some three seconds,
    and the fastest are used from then on.
    A target's results stay the same within the rounding of its dtype: float32, bfloat16 or float16. A draft in float32 is packed
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
    return PreparedModels(prepared, checks)


def pack(linear: nn.Linear, kind: type[PackedLinear]) -> PackedLinear:
    """Turn a layer into a packed one of this kind, in place; into one that oneDNN packs, as far as it can, where that fails."""
    linear.__class__ = kind
    if linear._pack_again().copy is None and kind is not PackedLinear:  # type: ignore[operator]
        return pack(linear, PackedLinear)
    return linear  # type: ignore[return-value]


def _pack_fastest(linears: list[nn.Linear]) -> list[PackedLinear]:
    """Pack layers for the product, and the numbers of rows, that timing shows to be the fastest for their shape."""
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
    """The packing that saves the most on these layers of one shape, and whether it is faster, by number of rows."""
    dtype = linears[0].weight.dtype
    kinds, rounding = _timed_kinds(dtype), max(_ROUNDING, torch.finfo(dtype).eps)
    plain = [_first_rows(linear) for linear in linears]
    exact = [None if one is None else one.float() for one in (plain[0].weight, plain[0].bias)]
    twins: list[list] = [[pack(_first_rows(linear), kind) for linear in linears] for kind in kinds]
    shares: dict[type[PackedLinear], list[float]] = {kind: [] for kind in kinds}
    for num_rows in _TIMED_ROWS:
        # The many rows of a prompt are bound by arithmetic, whatever the caches hold.
        timed = slice(None if num_rows < _MOST_ROWS else 1)
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
        packed_rows += [share < 1] * (num_rows + 1 - len(packed_rows))
    return kind, tuple(packed_rows)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether there is a product here for a target's packed weights of a dtype."""
    return any(kind.is_available(dtype) for kind in _TIMED_KINDS)


def _timed_kinds(dtype: torch.dtype) -> list[type[PackedLinear]]:
    """The kinds of products that there are for a target's weights of a dtype."""
    return [kind for kind in _TIMED_KINDS if kind.is_available(dtype)]


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
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear and _is_plain(module.weight)]
    found = {weight.dtype for weight in weights if weight.device.type == "cpu"}
    if not found or any(map(can_pack, found)):
        return
    packable = [dtype_name(dtype) for dtype in _DTYPES if can_pack(dtype)]
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
    return _is_packable(linear.weight)


def _is_packable(weight: torch.Tensor) -> bool:
    return _is_plain(weight) and weight.device.type == "cpu" and weight.numel() > 0 and can_pack(weight.dtype)


def _is_plain(weight: torch.Tensor) -> bool:
    # Quantised weights may call themselves float32, but are of a class of their own.
    return type(weight) in (torch.Tensor, nn.Parameter)


def _has_half_engine() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def _fits_half(weight: torch.Tensor) -> bool:
    return bool(weight.abs().max() < torch.finfo(torch.float16).max)
