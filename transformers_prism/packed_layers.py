"""Linear layers whose weight is packed once, for products with a few rows on a CPU.

torch's default matrix product re-packs a weight for every product with 2 to 32 rows. Packed once, in the layout that a
product reads, it reads the weight and nothing else; torch.compile does the same with frozen weights. Results differ from the
default product by rounding only. `cpu.py` chooses among the kinds of layers here.

A packed copy must not be used after its weight has changed, and torch does not count every write to a weight
(`weight.data += delta`, as adapters are merged; numpy; shared memory). So each copy comes with a few of the weight's values,
which every product compares, and with sums over the whole weight, which are compared before a sequence begins. The values
show a write to the whole weight, the sums one to a part of it; the sums take about half the time of a plain step.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from .kernels.packed_linear import pack_weight, packed_linear, packed_linear_is_available

# Products with more rows are those of a prompt, and take the default one: packing a weight is then a small part of it.
MOST_ROWS = 256
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# MKL asks for the number of rows, and packs in the same way for any: copies are of equal size, and serve all numbers of rows.
_MKL_ROWS = 64
# Values of a weight that every product compares; and weights that are summed at a time, few enough for a core's cache.
_NUM_SAMPLES, _SUMMED_WEIGHTS = 16, 2**18

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
    is_known = input.dtype is weight.dtype and input.dtype in PACKED_DTYPES
    return is_known and input.is_cpu and is_plain_tensor(input) and not torch.jit.is_tracing()


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

    packed_rows = (False,) + (True,) * MOST_ROWS

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T + bias`, as `nn.Linear`."""
        # A call per layer and forward: a look at a parameter by its attribute would take a tenth of a small product.
        num_rows = input.numel() // self.in_features
        weight = self._parameters.get("weight")
        if weight is None or num_rows > MOST_ROWS or not self.packed_rows[num_rows] or not _takes(input, weight):
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
        if packed is None or not is_packable(weight) or (packed.is_of(weight) and packed.has_sums_of(weight)):
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
        return dtype in PACKED_DTYPES and packed_linear_is_available()

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


# For a target, whose outputs stay the same within rounding; and all kinds, the one that a draft prefers first.
TARGET_KINDS = (PackedLinear, MklLinear, CompiledLinear)
PACKED_KINDS = (HalfLinear, CompiledLinear, MklLinear, PackedLinear)


def pack(linear: nn.Linear, kind: type[PackedLinear]) -> PackedLinear:
    """Turn a layer into a packed one of this kind, in place; into one that oneDNN packs, as far as it can, where that fails."""
    linear.__class__ = kind
    if linear._pack_again().copy is None and kind is not PackedLinear:  # type: ignore[operator]
        return pack(linear, PackedLinear)
    return linear  # type: ignore[return-value]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether there is a product here for a target's packed weights of a dtype."""
    return any(kind.is_available(dtype) for kind in TARGET_KINDS)


def refresh_packed_weights(*models: nn.Module) -> int:
    """Check all packed weights of these models now, as [`PreparedModels.refresh`] does; returns how many were packed again.

    A model that was not prepared has none. It takes about as long as half a plain step of a target.
    """
    linears = {id(module): module for model in models for module in model.modules() if isinstance(module, PackedLinear)}
    return sum(linear.refresh() for linear in linears.values())


def is_packable(weight: torch.Tensor) -> bool:
    """Whether a copy of a weight can be packed here."""
    return is_plain_tensor(weight) and weight.device.type == "cpu" and weight.numel() > 0 and can_pack(weight.dtype)


def is_plain_tensor(weight: torch.Tensor) -> bool:
    """Whether it is of no class of its own: quantised weights may call themselves float32."""
    return type(weight) in (torch.Tensor, nn.Parameter)


def _has_half_engine() -> bool:
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def _fits_half(weight: torch.Tensor) -> bool:
    return bool(weight.abs().max() < torch.finfo(torch.float16).max)
