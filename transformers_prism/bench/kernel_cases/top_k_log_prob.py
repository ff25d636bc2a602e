"""Calls of `top_k_log_prob`: the frontier of a draft step over whole and draft vocabularies."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.top_k_log_prob import _top_k_log_prob_fwd, top_k_log_prob


def _make(
    inputs: Inputs, num_rows=10, hidden_size=4096, num_tokens=32000, k=10, has_bias=False, has_ids=False,
    softcap=None, dtype=torch.bfloat16
):
    hidden = inputs.normal(num_rows, hidden_size, dtype=dtype)
    weight = inputs.normal(num_tokens, hidden_size, dtype=dtype, scale=hidden_size**-0.5)
    bias = inputs.normal(num_tokens, dtype=dtype) if has_bias else None
    token_ids = 4 * torch.arange(num_tokens, device=inputs.device) if has_ids else None
    return hidden, weight, bias, token_ids, k, 1.0, softcap


def _call(hidden, weight, bias, token_ids, k, scale, softcap, implementation="auto"):
    return top_k_log_prob(hidden, weight, k, bias, token_ids, scale, softcap, implementation)


def cases() -> list[KernelCase]:
    """Every size of tile and of list; sizes that are no multiple of any."""
    sizes: dict[str, dict] = {
        "bf16 D4096 V128256 N10 k10": {"num_tokens": 128256},
        "bf16 D4096 V32000 N64 k10 ids": {"num_rows": 64, "has_ids": True},
        "bf16 D576 V49152 N1 k1": {"num_rows": 1, "hidden_size": 576, "num_tokens": 49152, "k": 1},
        "fp16 D2304 V262144 N32 k64 softcap": {
            **{"num_rows": 32, "hidden_size": 2304, "num_tokens": 262144, "k": 64},
            **{"softcap": 30.0, "dtype": torch.float16},
        },
        "fp16 D90 V50257 N128 k64 bias": {
            **{"num_rows": 128, "hidden_size": 90, "num_tokens": 50257, "k": 64},
            **{"has_bias": True, "dtype": torch.float16},
        },
        "fp32 D2048 V32000 N10 k10": {"hidden_size": 2048, "dtype": torch.float32},
        "fp32 D2048 V32000 N64 k64": {"hidden_size": 2048, "num_rows": 64, "k": 64, "dtype": torch.float32},
        "fp32 D2048 V32000 N128 k64": {"hidden_size": 2048, "num_rows": 128, "k": 64, "dtype": torch.float32},
    }
    # Log-probabilities only: tokens whose logits are nearly equal may change places. Products of 16-bit numbers are
    # exact in float32, so that all differ by the order of sums alone.
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-5, torch.bfloat16: 1e-5}
    return cases_of(sizes, _make, _call, _top_k_log_prob_fwd, tolerance, results=lambda arguments, returned: returned[1])
