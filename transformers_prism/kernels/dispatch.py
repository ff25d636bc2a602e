"""Which implementation of a kernel runs, and the name that its operator is registered under."""

import hashlib
import os
from pathlib import Path

import torch

try:
    import triton
except ImportError:
    triton = None

# ROCm calls its devices "cuda" as well.
TRITON_DEVICES = ("cuda", "xpu")


def operator_namespace(module_name: str, source_file: str) -> str:
    """A namespace of `torch.library` that belongs to one copy of a kernel file.

    A second registration of a name replaces the first without a word, and a process may hold this package beside older
    and newer copies of its files that came with drafts.

    Args:
        module_name (`str`): `__name__` of the kernel file.
        source_file (`str`): `__file__` of the kernel file.
    Returns:
        `str`: "prism_" and a hash of both the file's bytes and the module's name.
    """
    digest = hashlib.sha256(module_name.encode() + b"\n" + Path(source_file).read_bytes())
    return f"prism_{digest.hexdigest()[:16]}"


def use_triton(implementation: str, device: torch.device) -> bool:
    """Whether Triton computes an operation, chosen at each call.

    Args:
        implementation (`str`): "auto" takes Triton on devices that it compiles for; "triton" and "torch" insist.
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


def expect(is_met: bool, name: str, expected: str, got) -> None:
    """Raise a `ValueError` that says what was expected of `name` and what came, unless it was met."""
    if not is_met:
        raise ValueError(f"{name}: expected {expected}, got {got}")
