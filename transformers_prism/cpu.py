"""Make forwards over a few tokens cost little more than one over a single token, on a CPU.

torch's default matrix product re-packs a weight for every product with 2 to 32 rows. Packed once, in the layout that
oneDNN chooses, the product reads the weight and nothing else. The road is the one that torch.compile takes for frozen
weights. Results differ from the default product by rounding only.

A draft step waits for memory as a plain step does, and what a draft proposes never changes the output: a draft's weights
are packed in float16, half of the bytes.
"""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel


class PackedLinear(nn.Linear):
    """An `nn.Linear` with a packed copy of its weight; it becomes one, and an `nn.Linear` again, by its class alone.

    The packed copy is used in forwards without gradients on float32 inputs, and made anew when the weight was written
    to; everything else takes the default product.
    """

    BYTES_PER_WEIGHT = 4

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T + bias`, as `nn.Linear`."""
        if not self.takes(input):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed_weight(), self.bias, "none", [], "")

    def takes(self, input: torch.Tensor) -> bool:
        """Whether the packed copy serves this input."""
        return not torch.is_grad_enabled() and input.dtype == torch.float32 and input.device.type == "cpu"

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
        return {name: value for name, value in super().__getstate__().items() if not name.startswith("_packed")}


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
            linear.__dict__.pop("_packed", None)
            linear.__dict__.pop("_packed_version", None)
        self.linears = []

    def __enter__(self) -> "PreparedModels":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def prepare_for_cpu(*models: nn.Module) -> PreparedModels:
    """Pack the weights of every float32 `nn.Linear` on the CPU once, so that verifying a tree and drafting one cost little.

    A target's results stay the same within float error. A draft is packed in float16, the rows of the head that it borrows
    too: it may propose other tokens now and then, which changes no output.

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
    return PreparedModels(prepared)


def pack(linear: nn.Linear, kind: type[PackedLinear]) -> PackedLinear:
    """Turn a layer into a packed one of this kind, in place; where float16 cannot be had, into one in float32."""
    if kind is HalfLinear:
        has_half = "fbgemm" in torch.backends.quantized.supported_engines and bool(linear.weight.abs().max() < 65504)
        kind = HalfLinear if has_half else PackedLinear
    linear.__class__ = kind
    linear.packed_weight()  # type: ignore[operator]
    return linear  # type: ignore[return-value]


def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
