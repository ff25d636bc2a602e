"""Calls of `context_alignment_attention`: steps of a training batch, every dtype, head dimension and tile."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.context_alignment_attention import (
    _context_alignment_attention_bwd,
    _context_alignment_attention_fwd,
    context_alignment_attention,
)


def _make(
    inputs: Inputs, step=2, num_rows=2048, num_heads=32, num_groups=8, head_dim=128, num_sequences=None,
    dtype=torch.bfloat16
):
    def heads(count):
        # In the memory layout of a linear layer's output.
        return inputs.normal(1, num_rows, count, head_dim, dtype=dtype).transpose(1, 2)

    keys, values = ([heads(num_groups) for _ in range(step + 1)] for _ in range(2))
    starts = None
    if num_sequences is not None:
        rows = torch.arange(num_rows, device=inputs.device)[None]
        starts = rows - rows % (num_rows // num_sequences)
    return heads(num_heads), keys, values, starts, head_dim**-0.5


def _call(query, keys, values, starts, scale, implementation):
    """Output and every gradient, with the output itself as the incoming gradient."""
    query, *states = (one.detach().requires_grad_() for one in (query, *keys, *values))
    keys, values = states[: len(keys)], states[len(keys) :]
    output = context_alignment_attention(query, keys, values, starts, scale, implementation)
    return output.detach(), *torch.autograd.grad(output, [query, *states], output.detach())


def _launch(query, keys, values, starts, scale):
    output, log_sums = _context_alignment_attention_fwd(query, keys, values, starts, scale)
    _context_alignment_attention_bwd(output, output, log_sums, query, keys, values, starts, scale)


def cases() -> list[KernelCase]:
    """Each size of tile, with and without a path and packed sequences."""
    sizes: dict[str, dict] = {
        "bf16 E128 k2": {},
        "bf16 E64 k4 packed": {"head_dim": 64, "num_heads": 9, "num_groups": 3, "step": 4, "num_sequences": 4},
        "bf16 E128 k0 packed": {"step": 0, "num_sequences": 4},
        "fp16 E80 k1": {"head_dim": 80, "num_groups": 32, "step": 1, "dtype": torch.float16},
        "fp16 E256 k2": {"head_dim": 256, "num_heads": 8, "num_groups": 4, "dtype": torch.float16},
        "fp32 E64 k2": {"head_dim": 64, "dtype": torch.float32},
        "fp32 E128 k2": {"dtype": torch.float32},
        "fp32 E256 k1": {"head_dim": 256, "num_heads": 8, "num_groups": 4, "step": 1, "dtype": torch.float32},
    }
    # Products of 16-bit numbers are exact in float32; weights and their gradients are rounded to 16 bits before the
    # second products.
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    return cases_of(sizes, _make, _call, _launch, tolerance)
