"""Calls of `compact_cache`: keys and values of many layers after a round."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.compact_cache import _compact_cache_fwd, compact_cache


def _make(inputs: Inputs, num_layers=2, num_heads=8, length=4224, head_dim=128, num_moves=6, dtype=torch.bfloat16):
    buffers = [inputs.normal(1, num_heads, length, head_dim, dtype=dtype) for _ in range(2 * num_layers)]
    step = torch.arange(num_moves, device=inputs.device)[None]
    start = length - 2 * num_moves
    return buffers, start + 2 * step, start + step


def cases() -> list[KernelCase]:
    """Every dtype, every size of tile, and a head dimension that is no power of two."""
    sizes: dict[str, dict] = {
        "bf16 E128 A6": {},
        "fp16 E64 A1": {"head_dim": 64, "num_moves": 1, "dtype": torch.float16},
        "fp32 E80 A16": {"head_dim": 80, "num_moves": 16, "dtype": torch.float32},
        "fp32 E256 A64": {"head_dim": 256, "num_moves": 64, "dtype": torch.float32},
        "bf16 E128 A1024": {"num_moves": 1024},
    }
    return cases_of(sizes, _make, compact_cache, _compact_cache_fwd, 0.0, results=lambda arguments, returned: arguments[0])
