"""Calls of `grow_tree`, `choose_nodes` and `ancestor_bits`: trees of usual size and the largest."""

from functools import partial

import torch

from transformers_prism.bench.kernel_cases import Inputs, KernelCase
from transformers_prism.kernels.grow_tree import (
    _ancestor_bits_fwd,
    _choose_nodes_fwd,
    _grow_tree_fwd,
    ancestor_bits,
    choose_nodes,
    grow_tree,
)


def _make_step(inputs: Inputs, num_rows=1, width=10, top_k=10, num_words=2):
    ids = inputs.integers(0, 32000, num_rows, width, top_k)
    log_probs = -inputs.normal(num_rows, width, top_k).abs()
    words = inputs.integers(0, 2**40, num_rows, width, num_words)
    return ids, log_probs, -inputs.normal(num_rows, width).abs(), words, top_k, 60


def _make_pool(inputs: Inputs, num_rows=1, num_candidates=710, num_nodes=63):
    index = torch.arange(num_candidates, device=inputs.device).expand(num_rows, -1)
    # Candidate c descends from c // 10 - 1; the root's children are the first ten.
    log_probs = -(index.float() + 1).log2() + inputs.normal(num_rows, 1)
    ids = inputs.integers(0, 32000, num_rows, num_candidates)
    return inputs.integers(0, 32000, num_rows), ids, index // 10 - 1, index // 64 + 1, log_probs, num_nodes


def _make_parents(inputs: Inputs, num_rows=1, num_nodes=64):
    return (torch.arange(num_nodes, device=inputs.device).expand(num_rows, -1) // 2,)


def cases() -> list[KernelCase]:
    """A draft's usual step and tree, those of several rows, and the largest that the kernels take. Results are equal to
    the last bit."""
    step = partial(KernelCase, call=grow_tree, launch=_grow_tree_fwd, tolerance=0.0)
    choice = partial(KernelCase, call=choose_nodes, launch=_choose_nodes_fwd, tolerance=0.0)
    bits = partial(KernelCase, call=ancestor_bits, launch=_ancestor_bits_fwd, tolerance=0.0)
    return [
        step("step B1 W10 K10", _make_step),
        step("step B1 W1 K1", partial(_make_step, width=1, top_k=1)),
        step("step B4 W64 K64", partial(_make_step, num_rows=4, width=64, top_k=64)),
        choice("choice B1 C710 n63", _make_pool),
        choice("choice B4 C28736 n127", partial(_make_pool, num_rows=4, num_candidates=28736, num_nodes=127)),
        bits("bits B1 N64", _make_parents),
        bits("bits B4 N128", partial(_make_parents, num_rows=4, num_nodes=128)),
    ]
