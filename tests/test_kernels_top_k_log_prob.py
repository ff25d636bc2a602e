"""top_k_log_prob: vocabularies in tiles and parts, ties, draft vocabularies, logits that are no numbers."""

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

from transformers_prism.kernels import dispatch
from transformers_prism.kernels import top_k_log_prob as kernel
from transformers_prism.kernels.top_k_log_prob import top_k_by_columns, top_k_log_prob, top_k_of_logits

pytestmark = pytest.mark.quick


def make(num_rows=5, hidden_size=24, num_tokens=97, has_bias=True, has_ids=False, dtype=torch.float32):
    """Random arguments; logits of usual size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    hidden, weight = normal(num_rows, hidden_size), normal(num_tokens, hidden_size, scale=3 * hidden_size**-0.5)
    token_ids = 7 + 3 * torch.randperm(num_tokens, generator=generator) if has_ids else None
    return hidden, weight, normal(num_tokens) if has_bias else None, token_ids


def by_hand(hidden, weight, k, bias=None, token_ids=None, scale=1.0, softcap=None):
    """In float64, sorted as a whole and stably: of equal logits the smaller row of the head comes first."""
    logits = hidden.double() @ weight.double().T
    logits = (logits if bias is None else logits + bias.double()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    values, rows = torch.log_softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
    return (rows if token_ids is None else token_ids[rows])[:, :k], values[:, :k]


def check_choice(found, arguments, k, tolerance, **settings):
    """Values equal the loop's rank by rank, and each token has the log-probability that was told: tokens whose logits
    differ by rounding alone may change places."""
    hidden, weight, bias, token_ids = arguments
    tokens, log_probs = (one.cpu() for one in found)
    assert tokens.dtype == torch.int64
    assert log_probs.dtype == torch.float32
    all_tokens, all_values = by_hand(hidden, weight, weight.shape[0], bias, token_ids, **settings)
    torch.testing.assert_close(log_probs.double(), all_values[:, :k], atol=tolerance, rtol=0)
    order = all_tokens.argsort(dim=1)
    place = order.gather(1, torch.searchsorted(all_tokens.gather(1, order), tokens))
    assert torch.equal(all_tokens.gather(1, place), tokens)
    torch.testing.assert_close(all_values.gather(1, place), log_probs.double(), atol=tolerance, rtol=0)
    assert all(len(set(row)) == k for row in tokens.tolist())


@pytest.mark.parametrize(("has_ids", "scale", "softcap"), [(False, 1.0, None), (True, 0.5, None), (False, 1.5, 2.0)])
def test_the_best_tokens_are_found(has_ids, scale, softcap):
    """The PyTorch path equals the loop, with leading dimensions of any number."""
    arguments = make(has_ids=has_ids)
    hidden, weight, bias, ids = arguments
    found = top_k_log_prob(hidden, weight, 6, bias, ids, scale, softcap)
    check_choice(found, arguments, 6, 1e-5, scale=scale, softcap=softcap)
    wide = top_k_log_prob(hidden[None, :, None], weight, 6, bias, ids, scale, softcap)
    assert torch.equal(wide[0][0, :, 0], found[0])
    assert torch.equal(wide[1][0, :, 0], found[1])


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 10, 10300), 10), ((70000,), 1), ((2, 3, 8192), 64), ((3, 32, 1024), 8), ((1, 4, 9001), 10)]
)
def test_columns_hold_the_largest(shape, k):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    largest, index = top_k_by_columns(values, k)
    assert torch.equal(largest, values.topk(k).values)
    assert torch.equal(index, values.topk(k).indices)
    # In the rest behind the last whole row, and in one column.
    size = shape[-1]
    width = size // 32
    values[..., size - 1], values[..., 3 :: width] = 9.0, 8.0
    largest, index = top_k_by_columns(values, k)
    assert torch.equal(largest, values.topk(k).values)
    assert torch.equal(values.gather(-1, index), largest)
    assert all(len(set(row)) == k for row in index.view(-1, k).tolist())


@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf])
def test_columns_of_no_numbers_name_different_tokens(wrong):
    logits = torch.full((2, 40000), wrong)
    logits[1, 17] = 1.0
    token_ids, log_probs = top_k_of_logits(logits, 10)
    assert all(len(set(row)) == 10 for row in token_ids.tolist())
    assert (log_probs[0] == -torch.inf).all()
    if wrong == -torch.inf:
        assert token_ids[1, 0] == 17
        assert log_probs[1, 0] == 0.0
        assert (log_probs[1, 1:] == -torch.inf).all()


def test_it_compiles_without_a_break():
    """The PyTorch path, in one graph."""
    hidden, weight, bias, _ = make()
    compiled = torch.compile(top_k_log_prob, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(hidden, weight, 4, bias), top_k_log_prob(hidden, weight, 4, bias), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_says_what_is_wrong():
    """Before anything is computed."""
    hidden, weight, bias, ids = make(has_ids=True)
    for arguments, message in (
        ((hidden[:0], weight, 3), r"hidden: expected rows that are not empty, got \(0, 24\)"),
        ((hidden.double(), weight, 3), r"hidden: expected dtype float32.* got torch.float64"),
        ((hidden, weight[:, :9], 3), r"weight: expected shape \('V', 24\), got \(97, 9\)"),
        ((hidden, weight.half(), 3), r"weight: expected dtype torch.float32, got torch.float16"),
        ((hidden, weight.T.contiguous().T, 3), r"weight: expected the last dimension contiguous, got strides"),
        ((hidden, weight.to("meta"), 3), r"weight: expected device cpu, got meta"),
        ((hidden, weight, 0), r"k: expected 1 to 97, got 0"),
        ((hidden, weight, 98), r"k: expected 1 to 97, got 98"),
        ((hidden, weight, 3, bias[:4]), r"bias: expected shape \(97,\), got \(4,\)"),
        ((hidden, weight, 3, bias.half()), r"bias: expected dtype torch.float32, got torch.float16"),
        ((hidden, weight, 3, bias, ids.int()), r"token_ids: expected dtype torch.int64, got torch.int32"),
        ((hidden, weight, 3, bias, ids.repeat(2)[::2]), r"token_ids: expected the last dimension contiguous, got strides \(2,\)"),
        ((hidden, weight, 3, bias, ids.to("meta")), r"token_ids: expected device cpu, got meta"),
        ((hidden, weight, 3, bias, ids, 1.0, 0.0), r"softcap: expected more than 0, got 0.0"),
        ((hidden, weight, 3, bias.to("meta")), r"bias: expected device cpu, got meta"),
        ((hidden, weight, 3, bias.repeat(2)[::2]), r"bias: expected the last dimension contiguous, got strides \(2,\)"),
        ((hidden, weight, 3, bias, ids[:4]), r"token_ids: expected shape \(97,\), got \(4,\)"),
        ((hidden.to("meta"), weight, 3), r"weight: expected device meta, got cpu"),
        ((hidden, weight[:0], 3), r"weight: expected shape \('V', 24\), got \(0, 24\)"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            top_k_log_prob(*arguments)
    with pytest.raises(ValueError, match="k: expected 1 to 64, got 65"), nothing_computed(kernel):
        top_k_log_prob(hidden, weight, 65, implementation="triton")
    long = torch.empty((262145, 24))
    message = "weight: expected at most 262144 rows, got 262145"
    with pytest.raises(ValueError, match=message), nothing_computed(kernel):
        top_k_log_prob(hidden, long, 3, implementation="triton")


# Sums in float32 of exact products, in another order, for every dtype: the logits are never rounded to 16 bits. Logits
# are up to 10 and log-probabilities up to 20 in size.
TOLERANCE = 2e-5


def run_kernel(arguments, k, scale=1.0, softcap=None):
    """The Triton path between guard regions, its outputs and partial results poisoned."""
    guards = Guards()
    hidden, weight, bias, ids = (None if one is None else guards.around(one.to(DEVICE)) for one in arguments)
    with guarded_allocations():
        found = top_k_log_prob(hidden, weight, k, bias, ids, scale, softcap, implementation="triton")
        found = tuple(one.clone() for one in found)
    guards.check()
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "k"),
    [((1, 24, 97), 1), ((63, 80, 97), 3), ((111, 33, 257), 2), ((2, 16, 111), 64)],
    ids=str,
)
def test_kernel_equals_the_loop(sizes, k, dtype):
    """On the values that the dtype holds: fewer rows than a tile and more."""
    arguments = make(*sizes, has_ids=k == 3, dtype=dtype)
    check_choice(run_kernel(arguments, k), arguments, k, TOLERANCE)


@pytest.fixture
def wide_tiles(monkeypatch):
    """Fewer, wider tiles of the vocabulary: the interpreter takes its time for each."""
    tiles = kernel._tiles
    monkeypatch.setattr(kernel, "_tiles", lambda *sizes: {**tiles(*sizes), "BLOCK_V": 2048})


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "k"), [(50257, 10), (151936, 2)])
def test_kernel_takes_large_vocabularies(wide_tiles, num_tokens, k, dtype):
    """Many parts, the last of them short; a draft vocabulary of so many tokens."""
    arguments = make(2, 16, num_tokens, has_ids=True, dtype=dtype)
    check_choice(run_kernel(arguments, k), arguments, k, TOLERANCE)


@pytest.mark.kernel
def test_kernel_takes_more_rows_than_a_tile_holds():
    """130 rows need a second tile of rows; every token of the vocabulary is asked for."""
    arguments = make(130, 8, 2, has_bias=False)
    check_choice(run_kernel(arguments, 2), arguments, 2, TOLERANCE)


@pytest.mark.kernel
@pytest.mark.parametrize(("scale", "softcap"), [(0.3, None), (2.0, 3.0)])
def test_kernel_scales_and_caps(scale, softcap):
    """As the target's head does."""
    arguments = make(3, 20, 300)
    found = run_kernel(arguments, 7, scale, softcap)
    check_choice(found, arguments, 7, TOLERANCE, scale=scale, softcap=softcap)


@pytest.mark.kernel
def test_kernel_resolves_ties_to_the_smaller_row(monkeypatch):
    """Within a tile, between tiles and between parts, with zeros of both signs among the logits."""
    monkeypatch.setattr(kernel, "NUM_PROGRAMS", 3)
    hidden = torch.zeros((3, 16))
    hidden[:, 0] = torch.tensor([1.0, -1.0, 0.0])
    weight = torch.zeros((500, 16))
    weight[:, 0] = (torch.arange(500) * 7919 % 5 - 2).float()
    arguments = (hidden, weight, None, None)
    tokens, _ = run_kernel(arguments, 13)
    assert torch.equal(tokens.cpu(), by_hand(hidden, weight, 13)[0])
    assert tokens[2].tolist() == list(range(13))


@pytest.mark.kernel
def test_kernel_survives_logits_that_are_no_numbers():
    """A NaN or plus infinity leaves no log-probabilities; minus infinity is an impossible token; tokens stay tokens."""
    weight = torch.randn((200, 4), generator=torch.Generator().manual_seed(0))
    weight[3, 0] = torch.nan
    weight[4, 1] = torch.inf
    weight[:, 2] = -torch.inf
    weight[5:9, 2] = 1.0
    for row in range(4):
        # One column of the head at a time: zero times infinity is not a number either.
        arguments = (torch.ones(1, 1), weight[:, [row]].contiguous(), None, None)
        tokens, log_probs = (one[0].cpu() for one in run_kernel(arguments, 6))
        assert len(set(tokens.tolist())) == 6
        assert ((tokens >= 0) & (tokens < 200)).all()
        if row in (0, 1):
            assert (log_probs == -torch.inf).all()
        elif row == 2:
            assert tokens.tolist() == [5, 6, 7, 8, 0, 1]
            torch.testing.assert_close(log_probs[:4].exp(), torch.full((4,), 0.25), atol=1e-6, rtol=0)
            assert (log_probs[4:] == -torch.inf).all()
        else:
            expected = by_hand(*arguments[:2], 6)
            assert torch.equal(tokens, expected[0][0])
            torch.testing.assert_close(log_probs.double(), expected[1][0], atol=TOLERANCE, rtol=0)


@pytest.mark.kernel
def test_kernel_takes_rows_of_wider_tensors():
    """A head that is a part of a larger table."""
    hidden, weight, bias, _ = (None if one is None else one.to(DEVICE) for one in make())
    wide = torch.nn.functional.pad(weight, (0, 8), value=torch.nan)[:, :24]
    expected = top_k_log_prob(hidden, weight, 5, bias, implementation="torch")
    found = top_k_log_prob(hidden, wide, 5, bias, implementation="triton")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=TOLERANCE, rtol=0)


@pytest.mark.kernel
def test_operator_is_registered_properly():
    """opcheck with and without what is optional, and one graph with the operator in it."""
    hidden, weight, bias, ids = (one.to(DEVICE) for one in make(has_ids=True))
    check_operator(kernel._top_k_log_prob, (hidden, weight, bias, ids, 3, 1.5, 4.0))
    check_operator(kernel._top_k_log_prob, (hidden, weight, None, None, 3, 1.0, None))

    def run(hidden, weight, bias):
        return top_k_log_prob(hidden, weight, 4, bias, implementation="triton")

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(hidden, weight, bias)
    expected = top_k_log_prob(hidden, weight, 4, bias, implementation="torch")
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=TOLERANCE, rtol=0)


@pytest.mark.kernel
@torch.no_grad()
@pytest.mark.parametrize(
    "form", [{}, {"draft_vocab_size": 30}, {"module_form": "eagle3", "share_target_head": False}], ids=str
)
def test_a_draft_proposes_with_the_kernel_by_itself(monkeypatch, form):
    """Where Triton runs on the tensors' device: the proposals of the PyTorch path, with the borrowed rows of the head, those
    of a text's tokens beside them, or with a norm and a head of the draft's own."""
    target = tiny_target().to(DEVICE)
    draft = tiny_draft(target, **form).to(DEVICE).bind(target)
    hidden = torch.randn((2, 3, 32), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    text = draft.text_rows(torch.tensor([[40, 3, 77, 90]], device=DEVICE)) if "draft_vocab_size" in form else None
    expected = draft.propose(hidden, 5, text)
    num_launches = []
    launch = kernel._top_k_log_prob
    monkeypatch.setattr(kernel, "_top_k_log_prob", lambda *arguments: num_launches.append(1) or launch(*arguments))
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", (DEVICE.type,))
    found = draft.propose(hidden, 5, text)
    assert num_launches
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=TOLERANCE, rtol=0)


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
