"""compact_cache: positions that overlap, layouts that differ, pairs that move nothing."""

import dataclasses

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

from transformers_prism.kernels import compact_cache as kernel
from transformers_prism.kernels.compact_cache import compact_cache

pytestmark = pytest.mark.quick


def moved_by_hand(buffer, source, destination):
    """What a loop over single positions leaves, read from a copy."""
    result = buffer.clone()
    for row in range(buffer.shape[0]):
        for start, end in zip(source[row].tolist(), destination[row].tolist(), strict=True):
            if 0 <= start < buffer.shape[2] and 0 <= end < buffer.shape[2]:
                result[row, :, end] = buffer[row, :, start]
    return result


def random_moves(num_rows, num_moves, length, seed=0):
    """Sources anywhere, destinations all different: any of them may overlap."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, length, (num_rows, num_moves), generator=generator)
    destination = torch.stack([torch.randperm(length, generator=generator)[:num_moves] for _ in range(num_rows)])
    return source, destination


def random_buffer(*shape, dtype=torch.float32):
    """The same numbers at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("num_moves", [1, 7, 63])
def test_compact_cache_moves_all_positions_at_once(num_moves):
    """Each buffer equals the loop, and what no pair names is left alone."""
    source, destination = random_moves(3, num_moves, 63)
    buffers = [random_buffer(3, 2, 63, 5), random_buffer(3, 4, 63, 8)]
    expected = [moved_by_hand(buffer, source, destination) for buffer in buffers]
    compact_cache(buffers, source, destination)
    for buffer, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(buffer, wanted)


def test_compact_cache_leaves_out_pairs_outside_the_buffer():
    """Rows with some such pairs, with none, and with nothing else."""
    source = torch.tensor([[3, -1, 9], [-1, -1, -1], [4, 5, 40]])
    destination = torch.tensor([[0, 2, 1], [-1, -1, -1], [0, -5, 3]])
    buffer = random_buffer(3, 2, 12, 4)
    expected = moved_by_hand(buffer, source, destination)
    assert torch.equal(expected[1], buffer[1])
    compact_cache([buffer], source, destination)
    assert torch.equal(buffer, expected)


def test_compact_cache_compiles_without_a_break():
    """The PyTorch path, in one graph."""
    source, destination = random_moves(2, 5, 20)
    buffer, other = random_buffer(2, 2, 20, 4), random_buffer(2, 2, 20, 4)
    torch.compile(compact_cache, fullgraph=True, backend="aot_eager")([buffer], source, destination)
    compact_cache([other], source, destination)
    assert torch.equal(buffer, other)


def test_compact_cache_says_what_is_wrong():
    """Before anything is moved."""
    buffer = random_buffer(2, 2, 12, 4)
    before = buffer.clone()
    good = torch.zeros(2, 3, dtype=torch.long)
    for arguments, message in (
        (([], good, good), r"buffers: expected at least one, got 0"),
        (([buffer[0]], good, good), r"buffers: expected 4 dimensions.* got \(2, 12, 4\)"),
        (([buffer, buffer[:1]], good, good), r"buffers: expected shape \(2, 'G', 'C', 'E'\), got \(1, 2, 12, 4\)"),
        (([buffer.transpose(2, 3)], good, good), r"buffers: expected the last dimension contiguous"),
        (([buffer], good[:1], good), r"source: expected shape \(2, 3\), got \(1, 3\)"),
        (([buffer], good, good[:, :2]), r"destination: expected shape \(2, 3\), got \(2, 2\)"),
        (([buffer], good.int(), good), r"source: expected dtype torch.int64, got torch.int32"),
        (([buffer], good[:, :0], good[:, :0]), r"source: expected 1 to 1024 positions per row, got 0"),
        (([buffer], good.to("meta"), good), r"source: expected device cpu, got meta"),
        (([buffer], good, good.to("meta")), r"destination: expected device cpu, got meta"),
        (([buffer], good, good.int()), r"destination: expected dtype torch.int64, got torch.int32"),
        (([buffer, buffer.to("meta")], good, good), r"buffers: expected device cpu, got meta"),
        (([buffer[:0]], good[:0], good[:0]), r"buffers: expected 4 dimensions, none empty, got \(0, 2, 12, 4\)"),
        (([buffer, buffer[:, :, :0]], good, good), r"buffers: expected shape .* got \(2, 2, 0, 4\)"),
        (([buffer], good[0, 0], good), r"source: expected shape \(2, 0\), got \(\)"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            compact_cache(*arguments)
    many = torch.zeros(2, 1025, dtype=torch.long)
    message = r"source: expected 1 to 1024 positions per row, got 1025"
    with pytest.raises(ValueError, match=message), nothing_computed(kernel):
        compact_cache([buffer], many, many, implementation="triton")
    assert torch.equal(buffer, before)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_moves", "length", "head_dim"), [(1, 1, 32), (63, 111, 80), (17, 257, 64)])
def test_kernel_equals_the_reference(num_moves, length, head_dim, dtype):
    """Exactly, since it only copies; two layouts, pairs that move nothing, guard regions untouched."""
    source, destination = random_moves(2, num_moves, length)
    source[1, ::3] = -1
    guards = Guards()
    buffers = [guards.around(random_buffer(2, heads, length, head_dim, dtype=dtype).to(DEVICE)) for heads in (1, 3, 1)]
    expected = [moved_by_hand(buffer, source, destination) for buffer in buffers]
    with guarded_allocations():
        compact_cache(buffers, source.to(DEVICE), destination.to(DEVICE), implementation="triton")
    for buffer, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(buffer, wanted)
    guards.check()


@pytest.mark.kernel
@pytest.mark.parametrize("num_layers", [1, 5])
def test_kernel_is_launched_once_for_each_dtype_and_layout(num_layers, monkeypatch):
    """Keys and values of any number of layers of one kind share a launch; another dtype, head count or stride has one of
    its own."""
    operator, sizes = kernel._compact_cache, []
    monkeypatch.setattr(kernel, "_compact_cache", lambda kind, *rest: sizes.append(len(kind)) or operator(kind, *rest))
    launches = []
    launch = kernel._compact_cache_fwd_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch[grid]

    monkeypatch.setattr(kernel, "_compact_cache_fwd_kernel", Counted())
    buffers = []
    for _ in range(2 * num_layers):
        longer = random_buffer(2, 2, 30, 16)[:, :, :20]
        buffers += [random_buffer(2, 2, 20, 16), random_buffer(2, 2, 20, 16).half(), random_buffer(2, 3, 20, 16), longer]
    source, destination = random_moves(2, 9, 20)
    expected = [moved_by_hand(buffer, source, destination) for buffer in buffers]
    buffers = [buffer.to(DEVICE) for buffer in buffers]
    compact_cache(buffers, source.to(DEVICE), destination.to(DEVICE), implementation="triton")
    assert sizes == [2 * num_layers] * 4
    assert len(launches) == 4
    for buffer, wanted in zip(buffers, expected, strict=True):
        assert torch.equal(buffer.cpu(), wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("shift", [-5, -1, 1, 5])
def test_kernel_moves_rows_that_overlap(shift):
    """A block moved onto a part of itself, to the front and to the back: read as a whole before it is written."""
    buffer = random_buffer(2, 2, 80, 80).to(DEVICE)
    source = torch.arange(8, 71).expand(2, -1).contiguous()
    expected = buffer.clone()
    expected[:, :, 8 + shift : 71 + shift] = buffer[:, :, 8:71]
    compact_cache([buffer], source.to(DEVICE), (source + shift).to(DEVICE), implementation="triton")
    assert torch.equal(buffer, expected)


@pytest.mark.kernel
def test_kernel_takes_views_of_longer_buffers():
    """Strides of the whole buffer; what lies beyond the view stays."""
    whole = random_buffer(2, 2, 40, 16).to(DEVICE)
    source, destination = random_moves(2, 9, 30)
    expected = whole.clone()
    expected[:, :, :30] = moved_by_hand(whole[:, :, :30], source, destination)
    compact_cache([whole[:, :, :30]], source.to(DEVICE), destination.to(DEVICE), implementation="triton")
    assert torch.equal(whole, expected)


@pytest.mark.kernel
def test_operator_is_registered_properly():
    """opcheck, and one graph with the operator in it."""
    source, destination = (moves.to(DEVICE) for moves in random_moves(2, 5, 20))
    buffer, other = (random_buffer(2, 2, 20, 16).to(DEVICE) for _ in range(2))
    check_operator(kernel._compact_cache, ([buffer.clone(), other.clone()], source, destination))

    def run(buffers, source, destination):
        compact_cache(buffers, source, destination, implementation="triton")

    torch.compile(run, fullgraph=True, backend="aot_eager")([buffer], source, destination)
    compact_cache([other], source, destination, implementation="torch")
    assert torch.equal(buffer, other)


@pytest.mark.kernel
def test_bench_refuses_to_time_a_failing_kernel():
    """A right result passes; a wrong one, or one that is not a number, ends without a time."""
    from transformers_prism.bench.kernel_cases.compact_cache import cases
    from transformers_prism.bench.kernels import bench_case, relative_error

    case = cases()[1]
    assert relative_error(case, DEVICE) == 0.0
    for wrong in (torch.rand, lambda count: torch.full((count,), torch.nan)):
        failing = dataclasses.replace(case, results=lambda arguments, returned, wrong=wrong: wrong(3))
        timing = bench_case("compact_cache", failing, DEVICE)
        assert not timing.is_right
        assert timing.triton_ms is None


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
