"""tree_attention: prefixes with padding and holes, ancestor bits, groups of heads, windows, soft-caps, splits."""

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

from transformers_prism.kernels import tree_attention as kernel
from transformers_prism.kernels.tree_attention import pack_ancestors, tree_attention

pytestmark = pytest.mark.quick


def make(
    num_rows=2, num_heads=4, num_groups=2, num_nodes=5, num_keys=None, num_prefix=40, head_dim=32, dtype=torch.float32
):
    """Random arguments: every row has left padding, holes and a random ancestor mask; NaN where nothing may be seen."""
    generator = torch.Generator().manual_seed(0)
    num_keys = num_keys or num_nodes

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(num_rows, num_heads, num_nodes, head_dim)
    key, value = (normal(num_rows, num_groups, num_prefix + num_keys, head_dim) for _ in range(2))
    committed = torch.rand((num_rows, num_prefix), generator=generator) < 0.9
    for row in range(num_rows):
        committed[row, : 3 * row] = False
    hidden = torch.cat((~committed, torch.zeros((num_rows, num_keys), dtype=torch.bool)), dim=1)
    for states in (key, value):
        states.masked_fill_(hidden[:, None, :, None], float("nan"))
    ancestors = torch.rand((num_rows, num_nodes, num_keys), generator=generator) < 0.4
    ancestors |= torch.eye(num_keys, dtype=torch.bool)[-num_nodes:]
    return query, key, value, ancestors, committed


def by_hand(query, key, value, ancestors, committed, node_index=None, sliding_window=None, softcap=None, scale=None):
    """A loop over queries in float64, over the keys that each sees and no others."""
    num_rows, num_heads, num_nodes, head_dim = query.shape
    num_prefix = committed.shape[1]
    output = torch.zeros((num_rows, num_nodes, num_heads, head_dim), dtype=torch.float64)
    for row in range(num_rows):
        for node in range(num_nodes):
            seen = torch.cat((committed[row], ancestors[row, node]))
            if sliding_window is not None:
                index = torch.cat((torch.arange(num_prefix), node_index[row]))
                seen = seen & (index > node_index[row, len(node_index[row]) - num_nodes + node] - sliding_window)
            for head in range(num_heads):
                group = head // (num_heads // key.shape[1])
                if not seen.any():
                    continue
                scores = key[row, group, seen].double() @ query[row, head, node].double() * (scale or head_dim**-0.5)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                output[row, node, head] = torch.softmax(scores, 0) @ value[row, group, seen].double()
    return output


def without_nan(arguments):
    """The reference multiplies hidden values by zero, so they have to be numbers there."""
    query, key, value, ancestors, committed = arguments
    return query, key.nan_to_num(), value.nan_to_num(), pack_ancestors(ancestors), committed


@pytest.mark.parametrize(("num_nodes", "num_keys"), [(1, 1), (5, 9), (63, 64), (7, 130)])
def test_ancestor_bits_hold_the_mask(num_nodes, num_keys):
    """Bit j % 64 of word j // 64, the sign bit included."""
    mask = torch.rand((2, num_nodes, num_keys), generator=torch.Generator().manual_seed(0)) < 0.5
    words = pack_ancestors(mask)
    assert words.shape == (2, num_nodes, -(-num_keys // 64))
    for key in range(num_keys):
        assert torch.equal((words[..., key // 64] >> (key % 64)) & 1 == 1, mask[..., key])


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "sizes", [{}, {"num_prefix": 0}, {"num_heads": 6, "num_groups": 1, "num_keys": 70, "scale": 0.3}]
)
def test_reference_equals_the_loop(sliding_window, softcap, sizes):
    """Grouped heads, trees whose first nodes are no queries, an empty prefix."""
    scale = sizes.get("scale")
    arguments = make(**{name: size for name, size in sizes.items() if name != "scale"})
    index = torch.arange(arguments[1].shape[2] - arguments[4].shape[1]).expand(2, -1) // 2 + arguments[4].shape[1]
    rest = (index if sliding_window else None, sliding_window, softcap, scale)
    found = tree_attention(*without_nan(arguments), *rest)
    torch.testing.assert_close(found.double(), by_hand(*arguments, *rest), atol=2e-6, rtol=0)


def test_a_query_that_sees_nothing_gets_zeros():
    """Not NaN."""
    query, key, value, ancestors, committed = make(num_rows=1)
    committed[:] = False
    ancestors[0, 2] = False
    output = tree_attention(*without_nan((query, key, value, ancestors, committed)))
    assert (output[0, 2] == 0).all()
    assert output.isfinite().all()
    assert (output[0, 1] != 0).any()


def test_tree_attention_compiles_without_a_break():
    """The PyTorch path, in one graph."""
    arguments = without_nan(make())
    compiled = torch.compile(tree_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), tree_attention(*arguments))


def test_tree_attention_says_what_is_wrong():
    """Before anything is computed."""
    query, key, value, ancestors, committed = without_nan(make())
    index = torch.zeros((2, 5), dtype=torch.long)
    for arguments, message in (
        ((query[0], key, value, ancestors, committed), r"query: expected 4 dimensions.* got \(4, 5, 32\)"),
        ((query[:0], key, value, ancestors, committed), r"query: expected 4 dimensions, none empty"),
        ((query.double(), key, value, ancestors, committed), r"query: expected dtype float32.* got torch.float64"),
        (
            (query, key[:1], value, ancestors, committed),
            r"key: expected shape \(2, 'G', 'P \+ R', 32\), got \(1, 2, 45, 32\)",
        ),
        (
            (query, key, value[:, :1], ancestors, committed),
            r"value: expected shape \(2, 2, 45, 32\), got \(2, 1, 45, 32\)",
        ),
        ((query[:, :3], key, value, ancestors, committed), r"query: expected a multiple of 2 heads, got 3"),
        ((query, key, value, ancestors, committed.int()), r"committed: expected dtype torch.bool, got torch.int32"),
        (
            (query, key[:, :, :44], value[:, :, :44], ancestors, committed),
            r"key: expected 40 \+ 5 positions or more, got 44",
        ),
        (
            (query, key, value, ancestors[:, :4], committed),
            r"ancestors: expected shape \(2, 5, 'W'\), got \(2, 4, 1\)",
        ),
        ((query, key, value, ancestors.int(), committed), r"ancestors: expected dtype torch.int64, got torch.int32"),
        ((query, key.half(), value, ancestors, committed), r"key: expected dtype torch.float32, got torch.float16"),
        (
            (query, key, value, ancestors, committed, index),
            r"node_index: expected it with sliding_window and only then",
        ),
        (
            (query, key, value, ancestors, committed, index[:1], 4),
            r"node_index: expected shape \(2, 5\), got \(1, 5\)",
        ),
        ((query, key, value, ancestors, committed, index, 0), r"sliding_window: expected at least 1, got 0"),
        ((query, key, value, ancestors, committed, None, None, 0.0), r"softcap: expected more than 0, got 0.0"),
        ((query, key, value, ancestors, committed.to("meta")), r"committed: expected device cpu, got meta"),
        ((query, key, value, ancestors.to("meta"), committed), r"ancestors: expected device cpu, got meta"),
        ((query, key, value.to("meta"), ancestors, committed), r"value: expected device cpu, got meta"),
        ((query.to("meta"), key, value, ancestors, committed), r"key: expected device meta, got cpu"),
        (
            (query, key, value, ancestors, committed, index.to("meta"), 4),
            r"node_index: expected device cpu, got meta",
        ),
        (
            (query, key, value, ancestors, committed, index.int(), 4),
            r"node_index: expected dtype torch.int64, got torch.int32",
        ),
        ((query, key, value.half(), ancestors, committed), r"value: expected dtype torch.float32, got torch.float16"),
        (
            (query, key.mT.contiguous().mT, value, ancestors, committed),
            r"key: expected the last dimension contiguous, got strides",
        ),
        (
            (query, key, value.mT.contiguous().mT, ancestors, committed),
            r"value: expected the last dimension contiguous, got strides",
        ),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            tree_attention(*arguments)
    with pytest.raises(ValueError, match=r"expected a head dimension up to 256, got 288"), nothing_computed(kernel):
        tree_attention(*without_nan(make(head_dim=288)))
    arguments = without_nan(make(num_nodes=3, num_keys=66))
    message = r"key: expected a tree of at most 64 nodes, the bits of ancestors, got 66"
    with pytest.raises(ValueError, match=message), nothing_computed(kernel):
        tree_attention(*arguments[:3], arguments[3][..., :1], arguments[4])


# float32 rounds each product once; 16-bit inputs multiply exactly, but the weights of the second product are rounded to
# 11 (float16) or 8 (bfloat16) bits, and so is the output.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
SIZES = [
    {"num_nodes": 1, "num_prefix": 1, "num_heads": 2, "num_groups": 2},
    {"num_nodes": 3, "num_prefix": 0},
    {"num_nodes": 63, "num_prefix": 111, "head_dim": 80, "num_keys": 70},
    {"num_nodes": 5, "num_prefix": 257, "head_dim": 256, "num_heads": 3, "num_groups": 1},
    {"num_nodes": 128, "num_prefix": 40, "num_heads": 6, "num_groups": 2},
    {"num_nodes": 4, "num_prefix": 700, "head_dim": 64},
    # Groups of seven and nine heads; in the last, 131 tree nodes make more than 128 rows of every head.
    {"num_nodes": 19, "num_prefix": 63, "num_heads": 7, "num_groups": 1, "head_dim": 96},
    {"num_nodes": 3, "num_prefix": 63, "head_dim": 128},
    {"num_nodes": 3, "num_prefix": 111, "num_heads": 18, "num_groups": 2, "head_dim": 192},
    {"num_nodes": 131, "num_prefix": 17, "num_heads": 2, "num_groups": 2, "head_dim": 48},
]


def run_kernel(arguments, *rest):
    """The Triton path between guard regions, its outputs poisoned."""
    guards = Guards()
    query, key, value, ancestors, committed = (guards.around(one.to(DEVICE)) for one in arguments)
    rest = tuple(one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in rest)
    with guarded_allocations():
        output = tree_attention(query, key, value, ancestors, committed, *rest, implementation="triton").clone()
    guards.check()
    return output.cpu()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_equals_the_loop(sizes, dtype):
    """On the values that the dtype holds; NaN in padding and holes does not come through."""
    arguments = make(**sizes, dtype=dtype)
    packed = (*arguments[:3], pack_ancestors(arguments[3]), arguments[4])
    found = run_kernel(packed)
    assert found.dtype == dtype
    expected = tree_attention(*(one.float() if one.is_floating_point() else one for one in without_nan(arguments)))
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("sliding_window", "softcap", "scale"), [(20, None, None), (None, 5.0, 0.5), (1, 3.0, None), (300, None, 0.2)]
)
@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[5]], ids=str)
def test_kernel_takes_windows_and_softcaps(sizes, sliding_window, softcap, scale):
    """Windows that leave out whole tiles, or nothing."""
    arguments = make(**sizes)
    num_prefix = arguments[4].shape[1]
    num_keys = arguments[1].shape[2] - num_prefix
    index = (num_prefix - 3 + torch.arange(num_keys) // 3).expand(2, -1).contiguous() if sliding_window else None
    packed = (*arguments[:3], pack_ancestors(arguments[3]), arguments[4])
    found = run_kernel(packed, index, sliding_window, softcap, scale)
    expected = tree_attention(*without_nan(arguments), index, sliding_window, softcap, scale)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


@pytest.mark.kernel
def test_kernel_takes_views_of_longer_buffers():
    """Keys of a buffer with room behind them, queries transposed, a prefix that is split."""
    query, key, value, ancestors, committed = without_nan(make(num_prefix=300))
    buffers = [torch.full((2, 2, 512, 32), float("nan"), device=DEVICE) for _ in range(2)]
    for buffer, states in zip(buffers, (key, value), strict=True):
        buffer[:, :, :305] = states.to(DEVICE)
    query = query.transpose(1, 2).contiguous().transpose(1, 2).to(DEVICE)
    views = (query, buffers[0][:, :, :305], buffers[1][:, :, :305], ancestors.to(DEVICE), committed.to(DEVICE))
    found = tree_attention(*views, implementation="triton")
    torch.testing.assert_close(found, tree_attention(*views, implementation="torch"), atol=3e-6, rtol=0)


@pytest.mark.kernel
def test_a_query_that_sees_nothing_gets_zeros_from_the_kernel():
    """In parts of a split, too."""
    query, key, value, ancestors, committed = make(num_rows=1, num_prefix=300)
    committed[:] = False
    ancestors[0, 2] = False
    found = run_kernel((query, key.nan_to_num(), value.nan_to_num(), pack_ancestors(ancestors), committed))
    assert (found[0, 2] == 0).all()
    assert found.isfinite().all()


@pytest.mark.kernel
def test_operator_is_registered_properly():
    """opcheck with and without a window, and one graph with the operator in it."""
    arguments = tuple(one.to(DEVICE) for one in without_nan(make()))
    index = torch.arange(40, 45, device=DEVICE).expand(2, -1).contiguous()
    check_operator(kernel._tree_attention, (*arguments, None, None, None, 0.2))
    check_operator(kernel._tree_attention, (*arguments, index, 9, 5.0, 0.2))

    def run(*arguments):
        return tree_attention(*arguments, implementation="triton")

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(found, tree_attention(*arguments, implementation="torch"), atol=3e-6, rtol=0)


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
