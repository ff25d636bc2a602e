"""Calls of `fused_input_projection`: the frontier of a draft step, every dtype and width of tile."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.fused_input_projection import _fused_input_projection_fwd, fused_input_projection


def _make(inputs: Inputs, num_rows=10, hidden_size=4096, num_tokens=32000, has_bias=True, dtype=torch.bfloat16):
    token_ids = inputs.integers(0, num_tokens, num_rows)
    hidden = inputs.normal(num_rows, hidden_size, dtype=dtype)
    embedding = inputs.normal(num_tokens, hidden_size, dtype=dtype)
    weight = inputs.normal(hidden_size, 2 * hidden_size, dtype=dtype, scale=hidden_size**-0.5)
    bias = inputs.normal(hidden_size, dtype=dtype) if has_bias else None
    return token_ids, hidden, embedding, weight, bias, 1.0


def cases() -> list[KernelCase]:
    """Both widths of tile, and a width that is no multiple of any."""
    sizes: dict[str, dict] = {
        "bf16 D4096 N10": {},
        "bf16 D576 N1": {"hidden_size": 576, "num_rows": 1},
        "fp16 D16384 N16": {"hidden_size": 16384, "num_rows": 16, "num_tokens": 1000, "dtype": torch.float16},
        "fp16 D90 N16": {"hidden_size": 90, "num_rows": 16, "has_bias": False, "dtype": torch.float16},
        "fp32 D2048 N10": {"hidden_size": 2048, "dtype": torch.float32},
    }
    # Sums in float32 of exact products, in another order; the output is rounded to its dtype.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    return cases_of(sizes, _make, fused_input_projection, _fused_input_projection_fwd, tolerance)
