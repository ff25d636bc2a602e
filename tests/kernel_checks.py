"""What tests of Triton kernels share: the interpreter's process, guard regions around buffers, poisoned outputs.

Tests marked `kernel` run Triton code on `DEVICE`. Without a GPU they run under Triton's interpreter, which is chosen
when a kernel is defined and therefore needs a process of its own: one test of each file starts it for all of them.
"""

import dataclasses
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_GUARD = 512  # elements before and behind a buffer


def _complete_dot_of_the_interpreter() -> None:
    """Triton's interpreter keeps bfloat16 as its bits in uint16, and its `dot` multiplies those: hand it the values.

    It also refuses some precisions that GPUs have; its own products are float32's whatever their name.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

    options = interpreter_builder.options
    precisions = (*options.allowed_dot_input_precisions, "bf16x6")
    interpreter_builder.options = dataclasses.replace(options, allowed_dot_input_precisions=precisions)
    original = InterpreterBuilder.create_dot

    def as_float32(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *args):
        return original(self, as_float32(a), as_float32(b), *args)

    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl

    _complete_dot_of_the_interpreter()


def run_interpreted(test_file: str) -> int:
    """Run the tests marked `kernel` of a file under Triton's interpreter; returns how many passed, all of them.

    Skipped where a GPU runs them compiled.
    """
    if DEVICE.type == "cuda":
        pytest.skip("the tests of this file ran on the GPU")
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "kernel", "-p", "no:cacheprovider", "-p", "no:xdist", test_file],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return int(re.search(r"(\d+) passed", result.stdout)[1])


def _poison(dtype: torch.dtype):
    """A value that no right result is made of: NaN, or an index far outside of everything."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max // 3


class Guards:
    """Tensors that lie between guard regions: what is read there spoils a result, what is written there is seen."""

    def __init__(self):
        self.regions: list[tuple[torch.Tensor, torch.Tensor]] = []

    def empty(self, shape, dtype, device=DEVICE) -> torch.Tensor:
        """A tensor full of poison."""
        numel = torch.Size(shape).numel()
        flat = torch.full((numel + 2 * _GUARD,), _poison(dtype), dtype=dtype, device=device)
        self.regions += [(part, part.clone()) for part in (flat[:_GUARD], flat[_GUARD + numel :])]
        return flat[_GUARD : _GUARD + numel].view(shape)

    def around(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor."""
        return self.empty(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        """Assert that no guard region was written to."""
        for region, before in self.regions:
            assert torch.equal(region.view(torch.uint8), before.view(torch.uint8)), "written outside of a tensor"


@contextmanager
def guarded_allocations():
    """Let `torch.empty` and its relatives return poisoned tensors between guard regions, checked at the end.

    Launchers allocate in no other way, so that an output which a kernel does not write stays poison.
    """
    guards = Guards()
    originals = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def empty(*shape, dtype=torch.float32, device=None, **kwargs):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return guards.empty(shape, dtype, device or "cpu")

    def empty_like(tensor, dtype=None, **kwargs):
        return guards.empty(tensor.shape, dtype or tensor.dtype, tensor.device)

    def new_empty(self, *shape, dtype=None, device=None):
        return empty(*shape, dtype=dtype or self.dtype, device=device or self.device)

    torch.empty, torch.empty_like, torch.Tensor.new_empty = empty, empty_like, new_empty
    try:
        yield guards
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = originals
    guards.check()


@contextmanager
def nothing_computed(module):
    """Let no implementation of a kernel file run, neither an operator nor a PyTorch twin: bad input has to end before."""
    names = [name for name, value in vars(module).items() if _computes(name, value)]
    assert names
    originals = {name: getattr(module, name) for name in names}

    def refuse(*args, **kwargs):
        raise AssertionError("computed in spite of bad input")

    vars(module).update(dict.fromkeys(names, refuse))
    try:
        yield
    finally:
        vars(module).update(originals)


def _computes(name: str, value) -> bool:
    return name.endswith("_reference") or isinstance(value, torch.library.CustomOpDef)


def check_operator(operator, arguments: tuple) -> None:
    """`torch.library.opcheck`: schema, fake implementation, autograd registration, tracing."""
    torch.library.opcheck(operator, arguments)
