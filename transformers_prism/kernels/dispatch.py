"""Which implementation of a kernel runs, and the name that its operator is registered under."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.library import CustomOpDef

try:
    import triton
except ImportError:
    triton = None

# ROCm calls its devices "cuda" as well.
TRITON_DEVICES = ("cuda", "xpu")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Programs that a launch should have: as many as the MI300X has multiprocessors, more than any other of the GPUs in mind
# (A100 108, H100 and H200 132, B200 148).
NUM_PROGRAMS = 304
# An option of launches. Left to itself, NVIDIA's assembler may take fewer registers than a kernel needs, and spill.
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


def operator_namespace(module_name: str, source_file: str) -> str:
    """A namespace of `torch.library`, "prism_" and a hash, that belongs to one copy of a kernel file, by its
    `__name__` and `__file__`.

    A second registration of a name silently replaces the first, and a process may hold this package together with older
    and newer copies of its files that came with drafts.
    """
    digest = hashlib.sha256(module_name.encode() + b"\n" + Path(source_file).read_bytes())
    return f"prism_{digest.hexdigest()[:16]}"


def use_triton(implementation: str, device: torch.device) -> bool:
    """Whether Triton computes an operation, chosen at each call.

    Args:
        implementation (`str`): "auto" takes Triton on devices that it compiles for; "triton" and "torch" force one.
        device (`torch.device`): where the tensors are.
    Raises:
        ValueError: if Triton is asked for where it cannot run.
    """
    expect(implementation in ("auto", "triton", "torch"), "implementation", "auto, triton or torch", implementation)
    if implementation == "auto":
        return triton is not None and device.type in TRITON_DEVICES
    if implementation == "triton":
        expect(triton is not None, "implementation", "auto or torch, since triton is not installed", implementation)
        # Triton's interpreter, which tests use, runs on the CPU.
        can_run = device.type in TRITON_DEVICES or os.environ.get("TRITON_INTERPRET") == "1"
        expect(can_run, "implementation", f"auto or torch for tensors on {device.type}", implementation)
    return implementation == "triton"


def on_its_device(launcher: Callable) -> Callable:
    """The launcher of kernels, with the device of its first tensor as the current one: Triton launches on that."""

    @functools.wraps(launcher)
    def run(*args, **kwargs):
        flat = (one for arg in (*args, *kwargs.values()) for one in (arg if isinstance(arg, (list, tuple)) else (arg,)))
        device = next(one.device for one in flat if isinstance(one, torch.Tensor))
        # Tensors on a CPU have no index.
        with nullcontext() if device.index is None else torch.get_device_module(device).device(device):
            return launcher(*args, **kwargs)

    return run


def operator(namespace: str, launcher: Callable, mutates_args: Iterable[str] = ()) -> CustomOpDef:
    """Register a launcher of kernels as an operator of `torch.library`.

    Args:
        namespace (`str`): of [`operator_namespace`].
        launcher (`Callable`): `_NAME_fwd` becomes the operator NAME, `_NAME_bwd` the operator NAME_backward.
        mutates_args (iterable of `str`): arguments that it writes to.
    """
    name = launcher.__name__.removeprefix("_").removesuffix("_fwd").replace("_bwd", "_backward")
    return torch.library.custom_op(f"{namespace}::{name}", on_its_device(launcher), mutates_args=mutates_args)


def expect(is_met: bool, name: str, expected: str, got) -> None:
    """Raise a `ValueError` that says what was expected of `name` and what was given, unless the expectation is met."""
    if not is_met:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_float(name: str, tensor: torch.Tensor, has_double: bool = False) -> None:
    """Check a tensor against the dtypes that kernels take; float64 is for PyTorch's path."""
    is_float = tensor.dtype in FLOATS or has_double and tensor.dtype == torch.float64
    expect(is_float, name, "dtype float32, float16 or bfloat16", tensor.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in torch, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def expect_tensors(device: torch.device, **tensors: tuple[torch.Tensor, tuple, torch.dtype]) -> None:
    """Check the shape and dtype of each tensor, and that all are on one device."""
    for name, (tensor, shape, dtype) in tensors.items():
        found = (("shape", shape, tuple(tensor.shape)), ("dtype", dtype, tensor.dtype), ("device", device, tensor.device))
        for what, expected, got in found:
            if got != expected:
                raise ValueError(f"{name}: expected {what} {expected}, got {got}")


def expect_rows(name: str, tensor: torch.Tensor) -> None:
    """Check that the last dimension of a tensor is contiguous."""
    expect(tensor.stride(-1) == 1, name, "the last dimension contiguous", f"strides {tensor.stride()}")
