"""context_alignment_attention: prefix and path, packed sequences and padding, groups of heads, every gradient."""

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
from tiny_models import tiny_draft, tiny_target

from transformers_prism.kernels import context_alignment_attention as kernel
from transformers_prism.kernels.context_alignment_attention import context_alignment_attention
from transformers_prism.training.alignment import aligned_forward

pytestmark = pytest.mark.quick


def make(
    step=2, num_rows=9, num_heads=4, num_groups=2, head_dim=16, is_packed=False, window=None, dtype=torch.float32
):
    """Random arguments for two batch rows; packed, the sequences' lengths differ and the last rows are padding. With a
    window each row starts where that begins."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads):
        return torch.randn((2, heads, num_rows, head_dim), generator=generator).to(dtype)

    keys, values = ([normal(num_groups) for _ in range(step + 1)] for _ in range(2))
    starts = None
    if is_packed:
        starts = torch.zeros((2, num_rows), dtype=torch.long)
        for row, cuts in enumerate(([num_rows // 3, num_rows // 3 + 1], [num_rows // 2])):
            for cut in cuts:
                starts[row, cut:] = cut
        starts[1, num_rows - num_rows // 5 :] = num_rows
    if window is not None:
        oldest = (torch.arange(num_rows) - window + 1).clamp(min=0).expand(2, -1).contiguous()
        starts = oldest if starts is None else starts.maximum(oldest)
    return normal(num_heads), keys, values, starts


def by_hand(query, keys, values, starts, scale=None):
    """Row by row in float64: the keys that it sees are gathered into a list."""
    num_batch, num_heads, num_rows, head_dim = query.shape
    step, group_size = len(keys) - 1, num_heads // keys[0].shape[1]
    # What no row sees gets gradients of zero.
    zero = sum(one.sum() for one in (query, *keys, *values)).double() * 0
    output = []
    for batch in range(num_batch):
        for row in range(num_rows):
            first = 0 if starts is None else int(starts[batch, row])
            seen = [(0, place) for place in range(first, row - step + 1)]
            seen += [(s, row - step + s) for s in range(1, step + 1) if row - step + s >= first]
            for head in range(num_heads):
                if not seen:
                    output.append(zero.expand(head_dim))
                    continue
                group = head // group_size
                own_keys = torch.stack([keys[s][batch, group, place] for s, place in seen]).double()
                own_values = torch.stack([values[s][batch, group, place] for s, place in seen]).double()
                scores = own_keys @ query[batch, head, row].double() * (scale or head_dim**-0.5)
                output.append(torch.softmax(scores, dim=0) @ own_values)
    return (torch.stack(output) + zero).view(num_batch, num_rows, num_heads, head_dim)


def with_gradients(run, arguments, dtype=None):
    """Output and the gradients of query, keys and values; the output's gradient is random."""
    query, keys, values, starts = arguments
    leaves = [one.detach().to(dtype or one.dtype).requires_grad_() for one in (query, *keys, *values)]
    output = run(leaves[0], leaves[1 : len(keys) + 1], leaves[len(keys) + 1 :], starts)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.device, query.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weight.to(output.dtype))]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [{"step": 0}, {"step": 1, "num_rows": 1}, {"step": 3, "num_heads": 6}, {"step": 3, "window": 2}, {"window": 4}],
    ids=str,
)
def test_reference_equals_the_loop(sizes, is_packed):
    """Output and every gradient, in float64."""
    arguments = make(**sizes, is_packed=is_packed, dtype=torch.float64)
    found = with_gradients(context_alignment_attention, arguments)
    for one, other in zip(found, with_gradients(by_hand, arguments), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_a_row_that_starts_after_itself_sees_nothing():
    """Zeros, not NaN, and nothing reaches its query."""
    query, keys, values, starts = make(is_packed=True)
    output, grad_query, *_ = with_gradients(context_alignment_attention, (query, keys, values, starts))
    is_padding = starts > torch.arange(9)
    assert is_padding.any()
    assert (output[is_padding] == 0).all()
    assert (grad_query.transpose(1, 2)[is_padding] == 0).all()
    assert output.isfinite().all()


def test_attention_compiles_without_a_break():
    """The PyTorch path, in one graph."""
    arguments = make(is_packed=True)
    compiled = torch.compile(context_alignment_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), context_alignment_attention(*arguments))


def test_attention_says_what_is_wrong():
    """Before anything is computed."""
    query, keys, values, starts = make(is_packed=True)
    for arguments, message in (
        ((query[0], keys, values), r"query: expected 4 dimensions, none empty, got \(4, 9, 16\)"),
        ((query[:0], keys, values), r"query: expected 4 dimensions, none empty, got \(0, 4, 9, 16\)"),
        ((query.int(), keys, values), r"query: expected dtype float32, float16 or bfloat16, got torch.int32"),
        ((query, [], values), r"keys: expected those of step 0 at least, got none"),
        ((query, keys, values[:2]), r"values: expected those of 3 steps, got 2"),
        ((query[:, :3], keys, values), r"query: expected a multiple of 2 heads, got 3"),
        ((query, [*keys[:2], keys[2][:, :1]], values), r"keys: expected shape \(2, 2, 9, 16\), got \(2, 1, 9, 16\)"),
        (
            (query, keys, [values[0][:, :, 1:], *values[1:]]),
            r"values: expected shape \(2, 2, 9, 16\), got \(2, 2, 8, 16",
        ),
        (
            (query, [keys[0], keys[1].half(), keys[2]], values),
            r"keys: expected dtype torch.float32, got torch.float16",
        ),
        ((query, keys, [*values[:2], values[2].to("meta")]), r"values: expected device cpu, got meta"),
        (
            (query, [keys[0].mT.contiguous().mT, *keys[1:]], values),
            r"keys: expected the last dimension contiguous, got strides",
        ),
        (
            (query, keys, [values[0].mT.contiguous().mT, *values[1:]]),
            r"values: expected the last dimension contiguous, got strides",
        ),
        ((query, keys, [values[0].half(), *values[1:]]), r"values: expected dtype torch.float32, got torch.float16"),
        ((query, [keys[0].to("meta"), *keys[1:]], values), r"keys: expected device cpu, got meta"),
        ((query.to("meta"), keys, values), r"keys: expected device meta, got cpu"),
        ((query, keys, values, starts[:, :3]), r"starts: expected shape \(2, 9\), got \(2, 3\)"),
        ((query, keys, values, starts.int()), r"starts: expected dtype torch.int64, got torch.int32"),
        ((query, keys, values, starts.to("meta")), r"starts: expected device cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            context_alignment_attention(*arguments)
    with pytest.raises(ValueError, match=r"query: expected a head dimension up to 256, got 288"), nothing_computed(kernel):
        context_alignment_attention(*make(head_dim=288))
    with pytest.raises(ValueError, match=r"query: expected dtype float32, float16 or bfloat16, got torch.float64"), nothing_computed(kernel):
        context_alignment_attention(*make(dtype=torch.float64), implementation="triton")


# Relative to the largest value of each result. float32 rounds each product once and adds in another order; 16-bit inputs
# multiply exactly, but weights and their gradients are rounded to 11 (float16) or 8 (bfloat16) bits before the second
# products, as is the output that the gradients are taken from; Triton's interpreter cuts bfloat16 off instead of rounding.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 5e-2}
SIZES = [
    {"step": 0, "num_rows": 1, "num_heads": 2, "num_groups": 2},
    {"step": 3, "num_rows": 1},
    {"step": 2, "num_rows": 63, "head_dim": 80},
    {"step": 0, "num_rows": 111, "num_heads": 3, "num_groups": 1, "head_dim": 32, "is_packed": True},
    {"step": 4, "num_rows": 257, "num_heads": 1, "num_groups": 1, "head_dim": 32, "is_packed": True},
    {"step": 1, "num_rows": 63, "num_heads": 2, "num_groups": 1, "head_dim": 256, "is_packed": True},
    # A path so long that tiles of wide heads hold half as many rows.
    {"step": 4, "num_rows": 111, "num_heads": 1, "num_groups": 1, "head_dim": 128, "is_packed": True},
    # Windows narrower than a path, than a tile, and wider.
    {"step": 3, "num_rows": 63, "num_heads": 2, "num_groups": 1, "window": 2},
    {"step": 1, "num_rows": 257, "num_heads": 2, "num_groups": 1, "window": 20, "is_packed": True},
    {"step": 0, "num_rows": 257, "num_heads": 1, "num_groups": 1, "window": 150},
]


def run_kernel(arguments):
    """The Triton path between guard regions, its outputs poisoned, gradients included."""
    query, keys, values, starts = arguments
    guards = Guards()
    query, starts = (None if one is None else guards.around(one.to(DEVICE)) for one in (query, starts))
    keys, values = ([guards.around(one.to(DEVICE)) for one in states] for states in (keys, values))

    def run(*inputs):
        return context_alignment_attention(*inputs, implementation="triton")

    with guarded_allocations():
        found = [one.clone() for one in with_gradients(run, (query, keys, values, starts))]
    guards.check()
    return [one.cpu() for one in found]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_equals_the_reference(sizes, dtype):
    """Output and every gradient against autograd of the float32 reference, on the values that the dtype holds."""
    arguments = make(**sizes, dtype=dtype)
    expected = with_gradients(context_alignment_attention, arguments, torch.float32)
    for ours, theirs in zip(run_kernel(arguments), expected, strict=True):
        assert ours.dtype == dtype
        limit = TOLERANCES[dtype] * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.float(), theirs, atol=limit, rtol=0)


@pytest.mark.kernel
def test_kernel_takes_strided_heads():
    """Heads as a linear layer's output holds them, and a scale of one's own."""
    arguments = make(step=2, num_rows=40, is_packed=True)
    query, keys, values, starts = arguments

    def strided(states):
        return states.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)

    moved = (strided(query), [strided(one) for one in keys], [strided(one) for one in values], starts.to(DEVICE))
    found = context_alignment_attention(*moved, scale=0.3, implementation="triton")
    expected = context_alignment_attention(*arguments, scale=0.3)
    torch.testing.assert_close(found.cpu(), expected, atol=5e-6, rtol=0)


@pytest.mark.kernel
def test_operator_is_registered_properly():
    """opcheck of both operators, and one graph with forward and backward in it."""
    query, keys, values, starts = make(step=1, num_rows=5, is_packed=True)
    query, starts = query.to(DEVICE).requires_grad_(), starts.to(DEVICE)
    keys, values = ([one.to(DEVICE).requires_grad_() for one in states] for states in (keys, values))
    check_operator(kernel._context_alignment_attention, (query, keys, values, starts, 0.25))
    with torch.no_grad():
        output, log_sums = kernel._context_alignment_attention(query, keys, values, starts, 0.25)
    plain = (query.detach(), [one.detach() for one in keys], [one.detach() for one in values])
    check_operator(kernel._context_alignment_attention_backward, (output, output, log_sums, *plain, starts, 0.25))

    def run(*arguments):
        return context_alignment_attention(*arguments, implementation="triton")

    arguments = (query, keys, values, None)
    found = with_gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), arguments)
    for one, other in zip(found, with_gradients(run, arguments), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.kernel
@pytest.mark.parametrize(("context_kv", "window"), [("prefill_module", None), ("prefill_module", 5), ("own_module", 5)])
def test_training_runs_on_the_kernel(context_kv, window):
    """Aligned forwards and the gradients of every weight, in both forms of the context's keys and values, through a window, too."""
    target = tiny_target().to(DEVICE)
    sizes = {"num_processing_modules": 2, "context_kv": context_kv, "sliding_window": window, "initializer_range": 0.1}
    draft = tiny_draft(target, **sizes).to(DEVICE).bind(target)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 97, (2, 12), generator=generator).to(DEVICE)
    hidden = torch.randn(2, 12, draft.config.fused_hidden_size, generator=generator).to(DEVICE)
    found = {}
    for implementation in ("torch", "triton"):
        draft.zero_grad()
        predictions = aligned_forward(draft, input_ids, hidden, 3, implementation=implementation)
        sum(prediction.square().mean() for prediction in predictions).backward()
        found[implementation] = [*predictions, *(one.grad for one in draft.parameters() if one.grad is not None)]
    for ours, theirs in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * max(1.0, float(theirs.detach().abs().max())), rtol=0)


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
