"""Trees: choice of nodes, ancestors, masks."""

import pytest
import torch

from transformers_prism.decoding.tree import (
    CandidatePool,
    Tree,
    ancestor_mask,
    attention_mask,
    root_tree,
    select_nodes,
    visible_keys,
    within_window,
)
from transformers_prism.kernels.grow_tree import ancestor_bits, stable_top_k
from transformers_prism.kernels.tree_attention import unpack_ancestors

pytestmark = pytest.mark.quick


def random_pool(num_rows: int, top_k: int, depth: int, seed: int, zeros: bool = False) -> CandidatePool:
    """A pool as a draft draws it: children of the root, then top_k children of top_k nodes a step."""
    generator = torch.Generator().manual_seed(seed)
    steps, start = [], 0
    parents = torch.full((num_rows, top_k), -1)
    scores = torch.zeros(num_rows, top_k)
    for step in range(depth):
        count = top_k if step == 0 else top_k**2
        drop = torch.rand(num_rows, count, generator=generator).round(decimals=1)
        log_probs = (scores if step == 0 else scores.repeat_interleave(top_k, 1)) - drop * (not zeros)
        steps.append((torch.arange(start, start + count).expand(num_rows, -1), parents, log_probs))
        chosen = stable_top_k(log_probs, top_k)
        scores = log_probs.gather(1, chosen)
        parents = (start + chosen).repeat_interleave(top_k, dim=1)
        start += count
    return CandidatePool(steps)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("top_k", "depth", "num_nodes"), [(1, 4, 4), (3, 3, 7), (4, 4, 15), (10, 6, 59), (2, 2, 6)])
def test_selection_keeps_parents_and_pool_order(top_k, depth, num_nodes, zeros):
    """The best nodes, closed under parents even where all log-probabilities are exactly equal."""
    pool = random_pool(3, top_k, depth, seed=top_k, zeros=zeros)
    tree = select_nodes(torch.tensor([7, 8, 9]), pool, num_nodes)
    assert tree.num_nodes == num_nodes + 1
    for row in range(3):
        order = sorted(range(pool.token_ids.shape[1]), key=lambda i: (-float(pool.log_probs[row, i]), i))
        kept = sorted(order[:num_nodes])
        assert tree.token_ids[row].tolist() == [7 + row, *kept]  # the pool's token ids are its indices
        for node, candidate in enumerate(kept, start=1):
            parent = int(pool.parents[row, candidate])
            assert int(tree.parents[row, node]) == (0 if parent < 0 else 1 + kept.index(parent))
            assert int(tree.parents[row, node]) < node
            assert int(tree.depths[row, node]) == int(tree.depths[row, tree.parents[row, node]]) + 1


def test_a_pool_as_lists_and_as_tensors():
    """Two steps of two rows; each parent stands for all of its children."""
    ids, log_probs = torch.arange(12).view(2, 6), -torch.arange(12.0).view(2, 6)
    first, second = (ids[:, :2], torch.tensor([[-1], [-1]])), (ids[:, 2:], torch.tensor([[1, 0], [0, 1]]))
    pool = CandidatePool([(*first, log_probs[:, :2]), (*second, log_probs[:, 2:])])
    parents, depths = [[-1, -1, 1, 1, 0, 0], [-1, -1, 0, 0, 1, 1]], [1, 1, 2, 2, 2, 2]
    rows = zip(ids.tolist(), parents, [depths] * 2, log_probs.tolist(), strict=True)
    assert pool.rows() == list(rows)
    assert (pool.token_ids.tolist(), pool.parents.tolist(), pool.depths.tolist()) == (ids.tolist(), parents, [depths] * 2)
    assert torch.equal(pool.log_probs, log_probs)


def test_nan_candidates_come_last():
    """A broken draft cannot push its nodes before sound ones."""
    values = torch.tensor([[torch.nan, -1.0, -torch.inf, -0.5]])
    assert stable_top_k(values, 4).tolist() == [[3, 1, 0, 2]]


def test_ancestors_of_the_drawn_tree():
    """The drawing at the top of tree.py."""
    tree = Tree(
        *(torch.tensor([row]) for row in ([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0.0] * 6))
    )
    expected = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 4}, {0, 1, 3, 5}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in tree.ancestors()[0]] == expected
    assert torch.equal(ancestor_mask(tree.parents), tree.ancestors())


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 9, 33, 65])
def test_ancestors_of_chains_and_random_trees(num_nodes):
    """Of any depth up to the longest, against following the parents one by one."""
    generator = torch.Generator().manual_seed(num_nodes)
    chain = [max(node - 1, 0) for node in range(num_nodes)]
    drawn = [int(torch.randint(0, max(node, 1), (), generator=generator)) for node in range(num_nodes)]
    both = torch.tensor([chain, drawn])
    mask = ancestor_mask(both)
    assert torch.equal(unpack_ancestors(ancestor_bits(both), num_nodes), mask)
    for row, parents in enumerate((chain, drawn)):
        for node in range(num_nodes):
            expected, at = {node, 0}, node
            while at:
                at = parents[at]
                expected.add(at)
            assert set(mask[row, node].nonzero()[:, 0].tolist()) == expected


def test_a_root_alone_is_a_plain_step():
    """One node, which sees itself."""
    tree = root_tree(torch.tensor([5, 6]))
    assert tree.token_ids.tolist() == [[5], [6]]
    assert tree.ancestors().all()


def test_masks_in_both_forms():
    """Booleans for SDPA, finite additive numbers for eager attention; holes and strangers stay hidden."""
    committed = torch.tensor([[False, True, True]])
    visible = visible_keys(committed, ancestor_mask(torch.tensor([[0, 0, 0]])))
    assert visible[0].int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]]
    assert torch.equal(attention_mask(visible, "sdpa", torch.float32), visible[:, None])
    additive = attention_mask(visible, "eager", torch.bfloat16)
    assert additive.dtype == torch.bfloat16
    assert torch.isfinite(additive).all()
    assert torch.equal(additive == 0, visible[:, None])


def test_a_window_counts_positions_and_not_nodes():
    """Two siblings at index 5 see the same keys of a window of 3."""
    query_index, key_index = torch.tensor([[4, 5, 5]]), torch.tensor([[0, 1, 2, 3, 4, 5, 5]])
    seen = within_window(query_index, key_index, sliding_window=3)
    assert seen[0].int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
