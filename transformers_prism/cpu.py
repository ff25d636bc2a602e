"""Make forwards over a few tokens cost little more than one over a single token, on a CPU.

torch's default matrix product re-packs a weight for every product with 2 to 32 rows. Packed once, in the layout that
oneDNN chooses, the product reads the weight and nothing else. The road is the one that torch.compile takes for frozen
weights. Results differ from the default product by rounding only.
"""

import warnings

import torch
from torch import nn


class PackedLinear(nn.Linear):
    """An `nn.Linear` with a packed copy of its weight; it becomes one, and an `nn.Linear` again, by its class alone.

    The packed copy is used in forwards without gradients on float32 inputs, and made anew when the weight was written
    to; everything else takes the default product.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight.T + bias`, as `nn.Linear`."""
        if torch.is_grad_enabled() or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed_weight(), self.bias, "none", [], "")

    def packed_weight(self) -> torch.Tensor:
        """The weight in oneDNN's layout, an opaque tensor."""
        version = (self.weight.data_ptr(), self.weight._version)
        if self.__dict__.get("_packed_version") != version:
            # No fixed number of rows: 1 to 32 and a whole prompt all go through one copy.
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)
            self.__dict__.update(_packed=packed, _packed_version=version)
        return self.__dict__["_packed"]

    def __getstate__(self):
        """Copies and pickles leave the packed weight behind and make their own."""
        return {name: value for name, value in super().__getstate__().items() if not name.startswith("_packed")}


class PreparedModels:
    """What [`prepare_for_cpu`] changed, and its undo; as a context manager it undoes at the end.

    Args:
        linears (`list` of `nn.Linear`): that were prepared.
    """

    def __init__(self, linears: list[nn.Linear]):
        self.linears = linears

    @property
    def num_bytes(self) -> int:
        """Memory of the packed copies in bytes: that of the weights once more."""
        return sum(linear.weight.numel() * linear.weight.element_size() for linear in self.linears)

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
    """Pack the weights of every float32 `nn.Linear` on the CPU once, so that verifying a tree costs little.

    A draft that is bound to a prepared target packs the rows of the head that it borrows, too.

    Args:
        models (`nn.Module`): targets and drafts.
    Returns:
        `PreparedModels`: with `undo()` and `num_bytes`, the memory that the copies take.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        warnings.warn("expected a build of torch with oneDNN, got one without; nothing was prepared", stacklevel=2)
        return PreparedModels([])
    # Exactly nn.Linear: a subclass may compute something else.
    linears = [module for model in models for module in model.modules() if type(module) is nn.Linear]
    linears = [linear for linear in linears if _can_be_packed(linear.weight)]
    for linear in linears:
        linear.__class__ = PackedLinear
        linear.packed_weight()  # type: ignore[operator]
    return PreparedModels(linears)


def _can_be_packed(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
