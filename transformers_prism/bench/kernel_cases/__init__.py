"""The calls of each kernel that are compiled, checked and timed: a file for each kernel, whose `cases()` lists them."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch


class Inputs:
    """Makes arguments: random on a real device, without memory on the meta device; the same at every call."""

    def __init__(self, device):
        self.device = torch.device(device)
        # Billions of numbers in all, which a CPU draws for a minute.
        self.generator = torch.Generator("cpu" if self.device.type == "meta" else self.device).manual_seed(0)

    def normal(self, *shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed numbers."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers from `low` to `high - 1`."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        return torch.randint(low, high, shape, generator=self.generator, device=self.generator.device).to(self.device)


@dataclass
class KernelCase:
    """One call of a kernel.

    Args:
        config: sizes and dtype, for display.
        make: the arguments, from [`Inputs`]; called anew for each run, since an operation may write to them.
        call, launch: the public function, which takes the arguments and `implementation`; the launcher of its kernels.
        tolerance: largest difference from the PyTorch path, relative to its largest value.
        results: the tensors to compare, from the arguments and what `call` returned.
    """

    config: str
    make: Callable[[Inputs], tuple]
    call: Callable
    launch: Callable
    tolerance: float
    results: Callable = field(default=lambda arguments, returned: returned)


def cases_of(
    sizes: dict[str, dict], make: Callable, call: Callable, launch: Callable, tolerance, **options
) -> list[KernelCase]:
    """One case for each set of `make`'s arguments in `sizes`. `tolerance`: one value, or one per `dtype` (default bfloat16)."""
    tolerances = tolerance if isinstance(tolerance, dict) else defaultdict(lambda: tolerance)
    return [
        KernelCase(config, partial(make, **size), call, launch, tolerances[size.get("dtype", torch.bfloat16)], **options)
        for config, size in sizes.items()
    ]
