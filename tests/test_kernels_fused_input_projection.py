"""fused_input_projection: gathered embeddings, both halves of the product, few rows and many."""

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
from tiny_models import PAD_ID, prompts, tiny_draft, tiny_target

from transformers_prism.kernels import dispatch
from transformers_prism.kernels import fused_input_projection as kernel
from transformers_prism.kernels.fused_input_projection import fused_input_projection

pytestmark = pytest.mark.quick


def make(num_rows=5, hidden_size=24, num_tokens=11, has_bias=True, dtype=torch.float32):
    """Random arguments; the weight of the size that an initialised layer has."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    token_ids = torch.randint(0, num_tokens, (num_rows,), generator=generator)
    weight = normal(hidden_size, 2 * hidden_size, scale=hidden_size**-0.5)
    bias = normal(hidden_size) if has_bias else None
    return token_ids, normal(num_rows, hidden_size), normal(num_tokens, hidden_size), weight, bias


def by_hand(token_ids, hidden, embedding, weight, bias, scale=1.0):
    """Row by row and half by half, in float64."""
    width = hidden.shape[1]
    rows = []
    for token, states in zip(token_ids.tolist(), hidden, strict=True):
        scaled = (embedding[token] * scale).double()
        row = weight[:, :width].double() @ scaled + weight[:, width:].double() @ states.double()
        rows.append(row if bias is None else row + bias.double())
    return torch.stack(rows)


@pytest.mark.parametrize("num_rows", [1, 16, 17])
@pytest.mark.parametrize(("has_bias", "scale"), [(True, 1.0), (False, 3.5)])
def test_rows_are_projected(num_rows, has_bias, scale):
    """The PyTorch path equals the loop, with leading dimensions of any number."""
    arguments = make(num_rows, has_bias=has_bias)
    found = fused_input_projection(*arguments, scale)
    torch.testing.assert_close(found.double(), by_hand(*arguments, scale), atol=1e-5, rtol=0)
    token_ids, hidden, *rest = arguments
    wide = fused_input_projection(token_ids[None, :, None], hidden[None, :, None], *rest, scale)
    assert torch.equal(wide[0, :, 0], found)


def test_gradients_flow_on_the_open_choice():
    """What trains takes the PyTorch path by itself."""
    arguments = [one.requires_grad_() if one.is_floating_point() else one for one in make()]
    fused_input_projection(*arguments).sum().backward()
    assert all(one.grad is not None for one in arguments[1:])


def test_it_compiles_without_a_break():
    """The PyTorch path, in one graph."""
    compiled = torch.compile(fused_input_projection, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*make()), fused_input_projection(*make()))


def test_it_says_what_is_wrong():
    """Before anything is computed."""
    token_ids, hidden, embedding, weight, bias = make()
    for arguments, message in (
        (
            (token_ids[:0], hidden[:0], embedding, weight, bias),
            r"hidden: expected rows that are not empty, got \(0, 24\)",
        ),
        ((token_ids, hidden.double(), embedding, weight, bias), r"hidden: expected dtype float32.* got torch.float64"),
        ((token_ids[:4], hidden, embedding, weight, bias), r"token_ids: expected shape \(5,\), got \(4,\)"),
        (
            (token_ids.int(), hidden, embedding, weight, bias),
            r"token_ids: expected dtype torch.int64, got torch.int32",
        ),
        ((token_ids, hidden, embedding[:, :9], weight, bias), r"embedding: expected shape \('V', 24\), got \(11, 9\)"),
        ((token_ids, hidden, embedding, weight.T, bias), r"weight: expected shape \(24, 48\), got \(48, 24\)"),
        ((token_ids, hidden, embedding, weight, bias[:3]), r"bias: expected shape \(24,\), got \(3,\)"),
        (
            (token_ids, hidden, embedding.half(), weight, bias),
            r"embedding: expected dtype torch.float32, got torch.fl",
        ),
        ((token_ids, hidden, embedding, weight.T.contiguous().T, bias), r"weight: expected the last dimension contig"),
        ((token_ids, hidden, embedding, weight, bias.to("meta")), r"bias: expected device cpu, got meta"),
        ((token_ids.to("meta"), hidden, embedding, weight, bias), r"token_ids: expected device cpu, got meta"),
        ((token_ids, hidden, embedding.to("meta"), weight, bias), r"embedding: expected device cpu, got meta"),
        ((token_ids, hidden, embedding, weight.to("meta"), bias), r"weight: expected device cpu, got meta"),
        ((token_ids, hidden.to("meta"), embedding, weight, bias), r"token_ids: expected device meta, got cpu"),
        ((token_ids, hidden, embedding, weight.half(), bias), r"weight: expected dtype torch.float32, got torch.fl"),
        ((token_ids, hidden, embedding, weight, bias.half()), r"bias: expected dtype torch.float32, got torch.fl"),
        ((token_ids, hidden, embedding.T.contiguous().T, weight, bias), r"embedding: expected the last dimension c"),
        ((token_ids, hidden, embedding, weight, bias.repeat(2)[::2]), r"bias: expected the last dimension contig"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            fused_input_projection(*arguments)
    with pytest.raises(ValueError, match="hidden: expected at most 16 rows, got 17"), nothing_computed(kernel):
        fused_input_projection(*make(17), implementation="triton")


# float32 sums round in another order; 16-bit products are exact in float32, and scaled embeddings and the output are
# rounded to 11 bits (float16) or 8 (bfloat16), the output at values up to 8. Triton's interpreter cuts bfloat16 off
# instead of rounding, which doubles the error and adds the embeddings' errors up.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 6e-2}


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [(1, 1), (16, 63), (7, 111), (10, 257)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernel_equals_the_loop(sizes, dtype, has_bias):
    """On the values that the dtype holds, between guard regions."""
    arguments = make(*sizes, has_bias=has_bias, dtype=dtype)
    guards = Guards()
    guarded = [None if one is None else guards.around(one.to(DEVICE)) for one in arguments]
    with guarded_allocations():
        found = fused_input_projection(*guarded, 1.5, implementation="triton").clone()
    guards.check()
    assert found.dtype == dtype
    torch.testing.assert_close(found.cpu().double(), by_hand(*arguments, 1.5), atol=TOLERANCES[dtype], rtol=0)


@pytest.mark.kernel
def test_kernel_takes_rows_of_wider_tensors():
    """Strides of a table, a weight and states that are parts of larger ones; an id outside the table reads nothing."""
    token_ids, hidden, embedding, weight, bias = (one.to(DEVICE) for one in make())
    wide = [
        torch.nn.functional.pad(one, (0, 8), value=torch.nan)[:, : one.shape[1]] for one in (hidden, embedding, weight)
    ]
    expected = fused_input_projection(token_ids, hidden, embedding, weight, bias, implementation="torch")
    found = fused_input_projection(token_ids, *wide, bias, implementation="triton")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    guards = Guards()
    token_ids[2] = len(embedding)
    embedding = guards.around(embedding)
    found = fused_input_projection(token_ids, hidden, embedding, weight, bias, implementation="triton")
    torch.testing.assert_close(found[2], weight[:, 24:] @ hidden[2] + bias, atol=1e-5, rtol=0)


@pytest.mark.kernel
def test_operator_is_registered_properly():
    """opcheck with and without a bias, and one graph with the operator in it."""
    arguments = tuple(one.to(DEVICE) for one in make())
    check_operator(kernel._fused_input_projection, (*arguments, 1.5))
    check_operator(kernel._fused_input_projection, (*arguments[:4], None, 1.5))

    def run(*arguments):
        return fused_input_projection(*arguments, implementation="triton")

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(found, fused_input_projection(*arguments, implementation="torch"), atol=1e-5, rtol=0)


@pytest.mark.kernel
@torch.no_grad()
def test_a_draft_uses_the_kernel_by_itself(monkeypatch):
    """Where Triton runs on the tensors' device: the kernel for the steps, torch for long prompts, the same text."""
    input_ids, mask = prompts(2)
    target = tiny_target()
    settings = {"max_new_tokens": 6, "pad_token_id": PAD_ID, "do_sample": False, "attention_mask": mask.to(DEVICE)}
    target, input_ids = target.to(DEVICE), input_ids.to(DEVICE)
    draft = tiny_draft(target).to(DEVICE)
    draft.generation_config.update(tree_top_k=2, tree_num_nodes=14)
    expected = target.generate(input_ids, assistant_model=draft, **settings)
    accepted = draft.last_speculation.accepted_per_round
    num_rows = []
    launch = kernel._fused_input_projection

    def count(*arguments):
        num_rows.append(len(arguments[1]))
        return launch(*arguments)

    monkeypatch.setattr(kernel, "_fused_input_projection", count)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", (DEVICE.type,))
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **settings), expected)
    assert draft.last_speculation.accepted_per_round == accepted
    assert num_rows
    assert max(num_rows) <= kernel.MAX_ROWS


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
