"""Make forwards over a few tokens cost little more than one over a single token, on a CPU.

torch's default matrix product re-packs a weight for every product with 2 to 32 rows. Packed once, in the layout that
oneDNN chooses, the product reads the weight and nothing else. The road is the one that torch.compile takes for frozen
weights. Results differ from the default product by rounding only.

A call of oneDNN costs some CPUs more than it saves where there are few rows, and some multiply the many rows of a prompt
faster by the default product. So up to three rows, and 128 and more, take whichever product was faster when the weights
were packed.

A draft step waits for memory as a plain step does, and what a draft proposes never changes the output: a draft's weights
are packed in float16, half of the bytes.
"""

import sys
import time
import warnings
from collections import defaultdict

import torch
from torch import nn
from transformers import PreTrainedModel

# The default product re-packs the weight from four rows on, or from two.
_MOST_UNPACKED_ROWS = 3
# No tree has so many nodes; whatever has is a prompt.
_MANY_ROWS = 128
# Layers of fewer weights take no time worth measuring; of each shape, layers with so many weights are timed, which no
# cache of a core holds.
_FEWEST_TIMED_WEIGHTS, _TIMED_WEIGHTS = 2**16, 2**23
_NUM_REPEATS = 5


class PackedLinear(nn.Linear):
    """An `nn.Linear` with a packed copy of its weight; it becomes one, and an `nn.Linear` again, by its class alone.

    The packed copy is used in forwards without gradients on float32 inputs of `packed_from` to `packed_to` rows, and made
    anew when the weight was written to; everything else takes the default product.
    """

    BYTES_PER_WEIGHT = 4
    packed_from, packed_to = 1, sys.maxsize

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T + bias`, as `nn.Linear`."""
        if self.takes(input) and self.packed_from <= input.shape[:-1].numel() <= self.packed_to:
            return self.packed_product(input)
        return super().forward(input)

    def takes(self, input: torch.Tensor) -> bool:
        """Whether the packed copy can serve this input."""
        return not torch.is_grad_enabled() and input.dtype == torch.float32 and input.device.type == "cpu"

    def packed_product(self, input: torch.Tensor) -> torch.Tensor:
        """The product with the packed copy."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed_weight(), self.bias, "none", [], "")

    def packed_weight(self):
        """The packed copy, an opaque object."""
        version = (self.weight.data_ptr(), self.weight._version)
        if self.__dict__.get("_packed_version") != version:
            self.__dict__.update(_packed=self._pack(), _packed_version=version)
        return self.__dict__["_packed"]

    def _pack(self):
        # No fixed number of rows: 1 to 32 and a whole prompt all go through one copy.
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)

    def __getstate__(self):
        """Copies and pickles leave the packed weight behind and make their own."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("_packed", "_packed_version")}


class HalfLinear(PackedLinear):
    """A draft's layer, its packed copy in float16; sums are made in float32."""

    BYTES_PER_WEIGHT = 2

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T + bias`, with a weight of 11 significant bits."""
        if not self.takes(input) or input.numel() == 0:
            return nn.Linear.forward(self, input)
        return torch.ops.quantized.linear_dynamic_fp16(input, self.packed_weight())

    def _pack(self):
        bias = None if self.bias is None else self.bias.detach()
        return torch.ops.quantized.linear_prepack_fp16(self.weight.detach(), bias)


class PreparedModels:
    """What [`prepare_for_cpu`] changed, and its undo; as a context manager it undoes at the end.

    Args:
        linears (`list[PackedLinear]`): that were prepared.
    """

    def __init__(self, linears: list[PackedLinear]):
        self.linears = linears

    @property
    def num_bytes(self) -> int:
        """Memory of the packed copies in bytes: a target's weights once more, and half of a draft's."""
        return sum(linear.weight.numel() * linear.BYTES_PER_WEIGHT for linear in self.linears)

    def undo(self) -> None:
        """Make the layers what they were and free the packed copies. Doing it twice changes nothing."""
        for linear in self.linears:
            linear.__class__ = nn.Linear
            for name in ("_packed", "_packed_version", "packed_from", "packed_to"):
                linear.__dict__.pop(name, None)
        self.linears = []

    def __enter__(self) -> "PreparedModels":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def prepare_for_cpu(*models: nn.Module) -> PreparedModels:
    """Pack the weights of every float32 `nn.Linear` on the CPU once, so that verifying a tree and drafting one cost little.

    Both products are timed on one to three rows and on 128, in about a second; the faster one serves so few rows, or so
    many, from then on. A target's results stay the same within float error. A draft is packed in float16, the rows of the
    head that it borrows too: it may propose other tokens now and then, which changes no output.

    Args:
        models (`nn.Module`): targets and drafts.
    Returns:
        `PreparedModels`: with `undo()` and `num_bytes`, the memory that the copies take.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        warnings.warn("expected a build of torch with oneDNN, got one without; nothing was prepared", stacklevel=2)
        return PreparedModels([])
    prepared = []
    for model in models:
        is_draft = isinstance(model, PreTrainedModel) and model.config.model_type == "prism"
        # Exactly nn.Linear: a subclass may compute something else.
        linears = [module for module in model.modules() if type(module) is nn.Linear and _can_be_packed(module.weight)]
        prepared += [pack(linear, HalfLinear if is_draft else PackedLinear) for linear in linears]
    _choose_products([linear for linear in prepared if type(linear) is PackedLinear])
    return PreparedModels(prepared)


def pack(linear: nn.Linear, kind: type[PackedLinear]) -> PackedLinear:
    """Turn a layer into a packed one of this kind, in place; where float16 cannot be had, into one in float32."""
    if kind is HalfLinear:
        has_half = "fbgemm" in torch.backends.quantized.supported_engines and bool(linear.weight.abs().max() < 65504)
        kind = HalfLinear if has_half else PackedLinear
    linear.__class__ = kind
    linear.packed_weight()  # type: ignore[operator]
    return linear  # type: ignore[return-value]


def _choose_products(linears: list[PackedLinear]) -> None:
    """Find from how many rows on, and up to how many, the packed product is the faster one, for each shape of weights."""
    by_shape = defaultdict(list)
    for linear in linears:
        if linear.weight.numel() >= _FEWEST_TIMED_WEIGHTS:
            by_shape[tuple(linear.weight.shape)].append(linear)
    for same in by_shape.values():
        timed = same[: -(-_TIMED_WEIGHTS // same[0].weight.numel())]
        rows = (rows for rows in range(1, _MOST_UNPACKED_ROWS + 1) if _is_packed_faster(timed, rows))
        packed_from = next(rows, _MOST_UNPACKED_ROWS + 1)
        packed_to = sys.maxsize if _is_packed_faster(timed[:1], _MANY_ROWS) else _MANY_ROWS - 1
        for linear in same:
            linear.packed_from, linear.packed_to = packed_from, packed_to


@torch.no_grad()
def _is_packed_faster(linears: list[PackedLinear], num_rows: int) -> bool:
    """Whether one pass over these layers takes less time by the packed product, the best of several in turn."""
    input = torch.ones(num_rows, linears[0].in_features)
    seconds: dict = {nn.Linear.forward: [], PackedLinear.packed_product: []}
    for _ in range(_NUM_REPEATS):
        for product, taken in seconds.items():
            start = time.perf_counter()
            for linear in linears:
                product(linear, input)
            taken.append(time.perf_counter() - start)
    return min(seconds[PackedLinear.packed_product]) < min(seconds[nn.Linear.forward])


def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
