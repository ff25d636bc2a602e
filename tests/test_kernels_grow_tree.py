"""grow_tree, choose_nodes, ancestor_bits: ties, NaN, bits beyond the first word, the largest trees."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    Guards,
    check_operator,
    guarded_allocations,
    nothing_computed,
    run_interpreted,
)

from transformers_prism.kernels import grow_tree as kernel
from transformers_prism.kernels.grow_tree import ancestor_bits, choose_nodes, grow_tree

pytestmark = pytest.mark.quick


def scores(generator, *shape):
    """Log-probabilities with many ties, exact zeros, minus infinity and NaN."""
    values = -(torch.rand(shape, generator=generator) * 8).round() / 2
    values[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
    values[torch.rand(shape, generator=generator) < 0.05] = torch.nan
    return values


def make_step(num_rows=2, width=3, top_k=4, num_words=2, first_bit=62):
    """Random arguments of `grow_tree`, but for `num_next`."""
    generator = torch.Generator().manual_seed(0)
    child_ids = torch.randint(0, 97, (num_rows, width, top_k), generator=generator)
    words = torch.randint(0, 2**first_bit, (num_rows, width, num_words), generator=generator)
    words[..., 1:] = 0
    child_log_probs = scores(generator, num_rows, width, top_k)
    return child_ids, child_log_probs, scores(generator, num_rows, width), words


def make_pool(num_rows=2, top_k=4, depth=4):
    """Random arguments of `choose_nodes`, as a draft draws them, but for `num_nodes`."""
    generator = torch.Generator().manual_seed(0)
    parents, log_probs = [torch.full((num_rows, top_k), -1)], [scores(generator, num_rows, top_k)]
    depths = [torch.ones((num_rows, top_k), dtype=torch.long)]
    first = 0
    for step in range(2, depth + 1):
        count = log_probs[-1].shape[1]
        places = torch.stack([torch.randperm(count, generator=generator)[:top_k] for _ in range(num_rows)])
        drawn = scores(generator, num_rows, top_k, top_k) + log_probs[-1].gather(1, places)[..., None]
        parents.append((first + places).repeat_interleave(top_k, 1))
        log_probs.append(drawn.flatten(1))
        depths.append(torch.full_like(parents[-1], step))
        first += count
    ids = torch.randint(0, 97, (num_rows, first + log_probs[-1].shape[1]), generator=generator)
    return ids[:, 0], ids, torch.cat(parents, 1), torch.cat(depths, 1), torch.cat(log_probs, 1)


def best_first(values: list[float]) -> list[int]:
    """Indices of a row's values, the largest first, NaN as minus infinity, ties to the smaller index."""
    return sorted(range(len(values)), key=lambda i: (-values[i] if values[i] == values[i] else float("inf"), i))


def check_step(found, arguments, num_next, first_bit):
    """A step equals the loop over rows and nodes."""
    child_ids, child_log_probs, log_probs, words = arguments
    all_log_probs, chosen, token_ids, next_log_probs, parents, ancestors = (one.cpu() for one in found)
    for row in range(len(child_ids)):
        expected = (log_probs[row][:, None] + child_log_probs[row]).flatten()
        torch.testing.assert_close(all_log_probs[row], expected, atol=0, rtol=0, equal_nan=True)
        order = best_first(expected.tolist())[:num_next]
        assert chosen[row].tolist() == order
        assert token_ids[row].tolist() == child_ids[row].flatten()[order].tolist()
        torch.testing.assert_close(next_log_probs[row], expected[order], atol=0, rtol=0, equal_nan=True)
        assert parents[row].tolist() == [index // child_ids.shape[2] for index in order]
        for node, index in enumerate(order):
            bit = first_bit + node
            wanted = words[row, index // child_ids.shape[2]].clone()
            wanted[bit // 64] |= torch.tensor(1) << (bit % 64)
            assert torch.equal(ancestors[row, node], wanted)


def check_tree(found, arguments, num_nodes):
    """A tree equals the loop over rows and nodes."""
    root_ids, token_ids, parents, depths, log_probs = arguments
    tree_ids, tree_parents, tree_depths, tree_log_probs = (one.cpu() for one in found)
    for row in range(len(token_ids)):
        kept = sorted(best_first(log_probs[row].tolist())[:num_nodes])
        assert tree_ids[row].tolist() == [int(root_ids[row]), *token_ids[row, kept].tolist()]
        assert tree_depths[row].tolist() == [0, *depths[row, kept].tolist()]
        expected = torch.cat((torch.zeros(1), log_probs[row, kept]))
        torch.testing.assert_close(tree_log_probs[row], expected, atol=0, rtol=0, equal_nan=True)
        above = [int(parents[row, candidate]) for candidate in kept]
        assert tree_parents[row].tolist() == [0] + [0 if one < 0 else 1 + kept.index(one) for one in above]


def random_parents(num_nodes: int) -> torch.Tensor:
    """A chain, a star and a random tree."""
    generator = torch.Generator().manual_seed(num_nodes)
    drawn = [int(torch.randint(0, max(node, 1), (), generator=generator)) for node in range(num_nodes)]
    return torch.tensor([[max(node - 1, 0) for node in range(num_nodes)], [0] * num_nodes, drawn])


def check_bits(found, parents):
    """Bits equal following the parents one by one."""
    num_nodes = parents.shape[1]
    assert found.shape == (*parents.shape, -(-num_nodes // 64))
    for row, line in enumerate(parents.tolist()):
        for node in range(num_nodes):
            expected, at = {node, 0}, node
            while at:
                at = line[at]
                expected.add(at)
            words = found[row, node].tolist()
            assert {bit for bit in range(64 * len(words)) if words[bit // 64] >> (bit % 64) & 1} == expected


@pytest.mark.parametrize(("width", "top_k", "num_next"), [(1, 1, 1), (3, 4, 4), (1, 7, 3), (5, 2, 10)])
def test_a_step_equals_the_loop(width, top_k, num_next):
    """With bits on both sides of a word's end."""
    arguments = make_step(2, width, top_k)
    check_step(grow_tree(*arguments, num_next, 62), arguments, num_next, 62)


@pytest.mark.parametrize("num_nodes", [1, 7, 52])
def test_a_tree_equals_the_loop(num_nodes):
    """Some of the candidates and all."""
    arguments = make_pool()
    check_tree(choose_nodes(*arguments, num_nodes), arguments, num_nodes)


@pytest.mark.parametrize("num_nodes", [1, 2, 63, 64, 65, 130])
def test_bits_equal_the_loop(num_nodes):
    """The sign bit and further words included."""
    parents = random_parents(num_nodes)
    check_bits(ancestor_bits(parents), parents)


def test_they_compile_without_a_break():
    """The PyTorch paths, in one graph each."""
    for function, arguments in (
        (grow_tree, (*make_step(), 4, 62)),
        (choose_nodes, (*make_pool(), 9)),
        (ancestor_bits, (random_parents(9),)),
    ):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(found, function(*arguments), equal_nan=True)


def test_a_step_says_what_is_wrong():
    """Before anything is computed."""
    ids, child_log_probs, log_probs, words = make_step()
    for arguments, message in (
        (
            (ids[:0], child_log_probs, log_probs, words, 4, 0),
            r"child_ids: expected 3 dimensions, none empty, got \(0, 3",
        ),
        (
            (ids.int(), child_log_probs, log_probs, words, 4, 0),
            r"child_ids: expected dtype torch.int64, got torch.int32",
        ),
        (
            (ids, child_log_probs[:, :2], log_probs, words, 4, 0),
            r"child_log_probs: expected shape \(2, 3, 4\), got \(2, 2",
        ),
        ((ids, child_log_probs.half(), log_probs, words, 4, 0), r"child_log_probs: expected dtype torch.float32, got"),
        ((ids, child_log_probs, log_probs[:1], words, 4, 0), r"log_probs: expected shape \(2, 3\), got \(1, 3\)"),
        (
            (ids, child_log_probs, log_probs, words.bool(), 4, 0),
            r"ancestors: expected dtype torch.int64, got torch.bool",
        ),
        ((ids, child_log_probs, log_probs, words.to("meta"), 4, 0), r"ancestors: expected device cpu, got meta"),
        ((ids, child_log_probs, log_probs, words[0, 0, 0], 4, 0), r"ancestors: expected shape .* got \(\)"),
        ((ids, child_log_probs, log_probs, words[:, :2], 4, 0), r"ancestors: expected shape .* got \(2, 2, 2\)"),
        ((ids, child_log_probs.to("meta"), log_probs, words, 4, 0), r"child_log_probs: expected device cpu, got meta"),
        ((ids, child_log_probs, log_probs.to("meta"), words, 4, 0), r"log_probs: expected device cpu, got meta"),
        ((ids, child_log_probs, log_probs, words, 13, 0), r"num_next: expected 1 to 12, got 13"),
        ((ids, child_log_probs, log_probs, words, 0, 0), r"num_next: expected 1 to 12, got 0"),
        (
            (ids, child_log_probs, log_probs, words, 4, 125),
            r"ancestors: expected bits for 129 nodes of a tree, got 128",
        ),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            grow_tree(*arguments)
    with pytest.raises(ValueError, match=r"num_next: expected 1 to 64, got 65"), nothing_computed(kernel):
        grow_tree(*make_step(1, 9, 9), 65, 0, implementation="triton")
    with pytest.raises(ValueError, match=r"child_ids: expected at most 4096 children of a row, got 4100"), nothing_computed(kernel):
        grow_tree(*make_step(1, 1, 4100), 4, 0, implementation="triton")


def test_a_choice_says_what_is_wrong():
    """Before anything is computed."""
    root, ids, parents, depths, log_probs = make_pool()
    for arguments, message in (
        (
            (root, ids[:, :0], parents, depths, log_probs, 3),
            r"token_ids: expected 2 dimensions, none empty, got \(2, 0\)",
        ),
        ((root[:1], ids, parents, depths, log_probs, 3), r"root_ids: expected shape \(2,\), got \(1,\)"),
        ((root, ids.int(), parents, depths, log_probs, 3), r"token_ids: expected dtype torch.int64, got torch.int32"),
        ((root, ids, parents[:, 1:], depths, log_probs, 3), r"parents: expected shape \(2, 52\), got \(2, 51\)"),
        ((root.to("meta"), ids, parents, depths, log_probs, 3), r"root_ids: expected device cpu, got meta"),
        ((root, ids, parents.int(), depths, log_probs, 3), r"parents: expected dtype torch.int64, got torch.int32"),
        ((root, ids, parents, depths, log_probs.to("meta"), 3), r"log_probs: expected device cpu, got meta"),
        ((root, ids, parents, depths, log_probs, 0), r"num_nodes: expected 1 to 52, got 0"),
        ((root, ids, parents, depths.to("meta"), log_probs, 3), r"depths: expected device cpu, got meta"),
        ((root, ids, parents, depths, log_probs.double(), 3), r"log_probs: expected dtype torch.float32, got torch.f"),
        ((root, ids, parents, depths, log_probs, 53), r"num_nodes: expected 1 to 52, got 53"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            choose_nodes(*arguments)
    with pytest.raises(ValueError, match=r"num_nodes: expected 1 to 127, got 128"), nothing_computed(kernel):
        choose_nodes(*make_pool(1, 8, 4), 128, implementation="triton")
    for parents, message in (
        (torch.zeros(3, dtype=torch.long), r"parents: expected 2 dimensions, none empty, got \(3,\)"),
        (torch.zeros(1, 3), r"parents: expected dtype torch.int64, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            ancestor_bits(parents)
    with pytest.raises(ValueError, match=r"parents: expected at most 128 nodes, got 129"), nothing_computed(kernel):
        ancestor_bits(torch.zeros((1, 129), dtype=torch.long), implementation="triton")


def run_kernel(function, arguments, *rest):
    """The Triton path between guard regions, its outputs poisoned."""
    guards = Guards()
    guarded = [guards.around(one.to(DEVICE)) for one in arguments]
    with guarded_allocations():
        found = function(*guarded, *rest, implementation="triton")
        found = found.clone() if isinstance(found, torch.Tensor) else [one.clone() for one in found]
    guards.check()
    return found


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("sizes", "num_next"),
    [((1, 1, 1), 1), ((2, 3, 4), 4), ((3, 1, 63), 10), ((1, 10, 10), 10), ((2, 37, 3), 64), ((1, 64, 64), 64)],
    ids=str,
)
def test_step_kernel_equals_the_loop(sizes, num_next):
    """To the last bit, whatever ties, zeros, infinities and NaN there are."""
    arguments = make_step(*sizes)
    check_step(run_kernel(grow_tree, arguments, num_next, 62), arguments, num_next, 62)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("sizes", "num_nodes"),
    [((1, 1, 1), 1), ((2, 4, 4), 7), ((1, 4, 4), 52), ((2, 10, 5), 63), ((1, 30, 3), 127)],
    ids=str,
)
def test_choice_kernel_equals_the_loop(sizes, num_nodes):
    """To the last bit; pools of one tile and of two."""
    arguments = make_pool(*sizes)
    check_tree(run_kernel(choose_nodes, arguments, num_nodes), arguments, num_nodes)


@pytest.mark.kernel
def test_choice_kernel_keeps_parents_where_all_are_equal():
    """Exact zeros everywhere: parents come first in the pool, and ties go to them."""
    *arguments, log_probs = make_pool(1, 3, 5)
    arguments = (*arguments, torch.zeros_like(log_probs))
    found = run_kernel(choose_nodes, arguments, 17)
    check_tree(found, arguments, 17)
    assert (found[2][0, 1:] == found[2][0].gather(0, found[1][0])[1:] + 1).all()


@pytest.mark.kernel
@pytest.mark.parametrize("num_nodes", [1, 2, 63, 65, 128])
def test_bits_kernel_equals_the_loop(num_nodes):
    """As long a chain as there can be."""
    parents = random_parents(num_nodes)
    check_bits(run_kernel(ancestor_bits, (parents,)), parents)


@pytest.mark.kernel
def test_bits_kernel_reads_nothing_outside():
    """Parents that are no tree's: indices outside of it, and a circle."""
    parents = torch.tensor([[0, 2, 1, -5, 9]])
    bits = run_kernel(ancestor_bits, (parents,))
    assert bits[0, :3, 0].tolist() == [1, 0b110, 0b110]


@pytest.mark.kernel
def test_operators_are_registered_properly():
    """opcheck, which takes no NaN for equal, and graphs with the operators in them."""
    step = (*(one.to(DEVICE).nan_to_num() for one in make_step()), 4, 62)
    pool = (*(one.to(DEVICE).nan_to_num().contiguous() for one in make_pool()), 9)
    parents = (random_parents(9).to(DEVICE),)
    for operator, function, arguments in (
        (kernel._grow_tree, grow_tree, step),
        (kernel._choose_nodes, choose_nodes, pool),
        (kernel._ancestor_bits, ancestor_bits, parents),
    ):
        check_operator(operator, arguments)

        def run(*arguments, function=function):
            return function(*arguments, implementation="triton")

        found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
        expected = function(*arguments, implementation="torch")
        torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
