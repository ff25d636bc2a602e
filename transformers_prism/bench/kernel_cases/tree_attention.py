"""Calls of `tree_attention`: drafts and verification, every dtype, head dimension and tile."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.tree_attention import _tree_attention_fwd, pack_ancestors, tree_attention


def _make(
    inputs: Inputs, num_nodes=64, num_prefix=4096, num_heads=32, num_groups=8, head_dim=128, dtype=torch.bfloat16,
    sliding_window=None, softcap=None
):
    num_keys = num_prefix + num_nodes
    query = inputs.normal(1, num_heads, num_nodes, head_dim, dtype=dtype)
    key = inputs.normal(1, num_groups, num_keys, head_dim, dtype=dtype)
    value = inputs.normal(1, num_groups, num_keys, head_dim, dtype=dtype)
    nodes = torch.arange(num_nodes, device=inputs.device)
    # Node n descends from nodes n // 2, n // 4, ...: as deep and as wide as a drafted tree.
    ancestors = torch.stack([nodes == nodes[:, None] >> shift for shift in range(7)]).any(0) & (
        nodes <= nodes[:, None]
    )
    depths = torch.stack([nodes >> shift > 0 for shift in range(7)]).sum(0)
    committed = torch.ones((1, num_prefix), dtype=torch.bool, device=inputs.device)
    node_index = None if sliding_window is None else (num_prefix + depths)[None]
    bits = pack_ancestors(ancestors[None])
    return query, key, value, bits, committed, node_index, sliding_window, softcap, head_dim**-0.5


def cases() -> list[KernelCase]:
    """Each size of tile, so that whatever the launcher may choose is compiled."""
    half, window = {"dtype": torch.float16}, {"sliding_window": 1024}
    sizes: dict[str, dict] = {
        "bf16 E128 N64": {},
        "bf16 E128 N10": {"num_nodes": 10},
        "bf16 E64 N4 window": {"num_nodes": 4, "head_dim": 64, "num_heads": 9, "num_groups": 3, **window},
        "fp16 E80 N16 short prefix": {**half, "num_nodes": 16, "head_dim": 80, "num_groups": 32, "num_prefix": 64},
        "fp16 E256 N64 window softcap": {**half, **window, "head_dim": 256, "num_heads": 16, "softcap": 50.0},
        "fp32 E128 N64": {"dtype": torch.float32},
        "fp32 E256 N10": {"dtype": torch.float32, "num_nodes": 10, "head_dim": 256, "num_heads": 8, "num_groups": 4},
    }
    # Products of 16-bit numbers are exact in float32; weights are rounded to 16 bits before the second product.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    return cases_of(sizes, _make, tree_attention, _tree_attention_fwd, tolerance)
