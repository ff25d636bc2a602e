"""Calls of `verify_tree`: greedy, sampled, every warper and every dtype."""

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase, cases_of
from transformers_prism.kernels.verify_tree import _verify_tree_fwd, verify_tree, verify_tree_reference

_ALL_WARPERS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9}


def _make(
    inputs: Inputs, num_nodes=64, vocab_size=128256, num_rows=1, dtype=torch.bfloat16, is_sampled=True,
    num_steps=7, **warpers
):
    logits = inputs.normal(num_rows, num_nodes, vocab_size, dtype=dtype, scale=3.0)
    nodes = torch.arange(num_nodes, device=inputs.device).repeat(num_rows, 1)
    # Node n below node (n - 1) // 2: as deep and as wide as a drafted tree.
    parents = (nodes - 1).clamp(min=0) // 2
    depths = torch.stack([(nodes + 1) >> shift > 1 for shift in range(10)]).sum(0)
    token_ids = inputs.integers(0, vocab_size, num_rows, num_nodes)
    noise = noise_steps = noise_rows = None
    if is_sampled:
        noise = inputs.normal(num_steps, num_rows, vocab_size).abs()
        noise_steps = torch.zeros(num_rows, dtype=torch.int64, device=inputs.device)
        noise_rows = torch.arange(num_rows, device=inputs.device)
    settings = [warpers.get(name) for name in _ALL_WARPERS]
    if inputs.device.type != "meta":
        token_ids = _choices(logits, depths, noise, noise_steps, noise_rows, settings).gather(1, parents)
    return logits, token_ids, parents, depths, num_steps, noise, noise_steps, noise_rows, *settings


def _choices(logits, depths, noise, noise_steps, noise_rows, settings) -> torch.Tensor:
    """The token chosen at each node `(B, N)` by the PyTorch path, with every node as its own tree."""
    num_rows, num_nodes, vocab_size = logits.shape
    zeros = depths.new_zeros((depths.numel(), 1))
    if noise is not None:
        noise_steps = (noise_steps[:, None] + depths).flatten()
        noise_rows = noise_rows.repeat_interleave(num_nodes)
    single = logits.reshape(-1, 1, vocab_size)
    walks = verify_tree_reference(single, zeros, zeros, zeros, 1, noise, noise_steps, noise_rows, *settings)
    return walks[:, 2].view(num_rows, num_nodes)


def cases() -> list[KernelCase]:
    """Each warper alone and all together; children hold what their parents choose, so that walks reach a leaf."""
    greedy = {"is_sampled": False}
    sizes: dict[str, dict] = {
        "bf16 greedy": greedy,
        "fp16 greedy": {**greedy, "dtype": torch.float16, "vocab_size": 50257, "num_nodes": 10},
        "fp32 greedy B4": {**greedy, "dtype": torch.float32, "num_rows": 4},
        "bf16 temperature": {"temperature": 0.8},
        "fp32 temperature": {"temperature": 0.8, "dtype": torch.float32},
        "bf16 top-k": {"top_k": 50},
        "bf16 top-p": {"top_p": 0.9},
        "bf16 min-p": {"min_p": 0.05},
        "bf16 typical": {"typical_p": 0.9},
        "bf16 top-k top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
        "bf16 all": _ALL_WARPERS,
        "fp16 all V151936": {**_ALL_WARPERS, "dtype": torch.float16, "vocab_size": 151936},
        "fp32 all V262144 N128": {
            **{**_ALL_WARPERS, "dtype": torch.float32},
            **{"vocab_size": 262144, "num_nodes": 128},
        },
    }
    # Results are integers and must be equal; random logits make no near-ties here.
    return cases_of(sizes, _make, verify_tree, _verify_tree_fwd, 0.0)
