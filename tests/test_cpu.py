"""Weights packed once for the CPU: same results within rounding, and everything can be undone."""

import copy
import itertools
import pickle
import time
import warnings

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    PAD_ID,
    generate_twice,
    prompts,
    scripted_draft,
    tiny_draft,
    tiny_target,
    varied_target,
)
from torch import nn
from transformers import DynamicCache

from transformers_prism import cpu, packed_layers, prepare_for_cpu
from transformers_prism.cpu import PreparedModels
from transformers_prism.packed_layers import CompiledLinear, HalfLinear, MklLinear, PackedLinear, pack
from transformers_prism.transformers_names import CACHE_KEYWORD

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"),
]


needs_mkl = pytest.mark.skipif(not MklLinear.is_available(), reason="this build of torch has no MKL")
needs_compiled = pytest.mark.skipif(not CompiledLinear.is_available(), reason="no C++ compiler or no x86 CPU with AVX2")
# The kinds that are timed against each other.
KINDS = [kind for kind in (PackedLinear, MklLinear, CompiledLinear) if kind.is_available()]
SHORT_DTYPES = (torch.bfloat16, torch.float16)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, *SHORT_DTYPES])
@pytest.mark.parametrize(
    ("architecture", "num_tokens"),
    [("llama", 9), ("llama", 700), *((name, 240) for name in ("mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite", "cohere", "gpt_neox"))],
)
def test_a_prepared_target_computes_the_same_bits_with_a_draft(architecture, num_tokens, dtype):
    """Logits of trees are those of plain steps, over short texts, across the end of a part of attention, and over long ones."""
    window = {"sliding_window": None} if architecture == "mistral" else {}
    target = tiny_target(architecture, 1, hidden_size=64, max_position_embeddings=1024, **window).to(dtype)
    input_ids, _ = prompts(1, num_tokens)
    asked = {"max_new_tokens": 40, "pad_token_id": PAD_ID, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with prepare_for_cpu(target):
        target.generate(input_ids, **asked)  # torch's cosine may round otherwise the first time in a process
        plain = target.generate(input_ids, **asked)
        draft = scripted_draft(target, plain.sequences, num_tokens).to(dtype)
        found = target.generate(input_ids, assistant_model=draft, **asked)
    assert torch.equal(found.sequences, plain.sequences)
    assert draft.last_speculation.acceptance_length > 1.2
    for step, (ours, theirs) in enumerate(zip(found.logits, plain.logits, strict=True)):
        assert torch.equal(ours, theirs), step


@needs_compiled
@torch.no_grad()
def test_a_prepared_target_attends_alone_or_with_others_in_the_same_way():
    """Also outside of our loop; not before it is prepared, nor after."""
    target = tiny_target("llama", 1, head_dim=16, max_position_embeddings=1024).bfloat16()
    input_ids, _ = prompts(1, 300)

    def bits():
        cache = DynamicCache(config=target.config)
        target(input_ids, **{CACHE_KEYWORD: cache})
        steps = [target(torch.tensor([[token]]), **{CACHE_KEYWORD: cache}).logits for token in range(5, 15)]
        cache = DynamicCache(config=target.config)
        target(input_ids, **{CACHE_KEYWORD: cache})
        return torch.cat(steps, dim=1), target(torch.arange(5, 15)[None], **{CACHE_KEYWORD: cache}).logits

    bits()  # torch's cosine may round otherwise the first time in a process
    plain, _ = bits()
    prepared = prepare_for_cpu(target)
    assert torch.equal(*bits())
    torch.testing.assert_close(bits()[0], plain, atol=0.2, rtol=0.2)
    mapped = torch.func.vmap(lambda tokens: target(tokens[None], use_cache=False).logits)(input_ids[:, :1])
    torch.testing.assert_close(mapped[0], target(input_ids[:, :1]).logits, atol=0.2, rtol=0.2)
    prepared.undo()
    assert torch.equal(bits()[0], plain)


def test_autocast_computes_as_without_packed_weights():
    """In bfloat16, as plain decoding does there."""
    linear = torch.nn.Linear(64, 64)
    input = torch.randn(8, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = linear(input)
        with prepare_for_cpu(linear):
            assert torch.equal(linear(input), expected)


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2, 8, 31, 32, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_equal_the_default_within_rounding(num_rows, has_bias):
    """For every number of rows that a round can have, and for a prompt."""
    linear = nn.Linear(48, 97, bias=has_bias)
    inputs = torch.randn(2, num_rows, 48)
    expected = linear(inputs)
    with prepare_for_cpu(linear) as prepared:
        assert isinstance(linear, PackedLinear)
        assert prepared.num_bytes == 48 * 97 * 4
        torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)
    assert type(linear) is nn.Linear
    assert torch.equal(linear(inputs), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (48, 97), (192, 576), (1023, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("threads", [(1, 2), (2, 1)])
def test_one_copy_serves_all_numbers_of_rows(kind, shape, has_bias, threads, one_thread):
    """Packed for one number of rows and by one number of threads, used with others."""
    linear = nn.Linear(*shape, bias=has_bias)
    torch.set_num_threads(threads[0])
    pack(linear, kind)
    torch.set_num_threads(threads[1])  # the fixture sets it back
    for num_rows in (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 700):
        # Also columns that do not follow one another.
        for inputs in (torch.randn(num_rows, shape[0]), torch.randn(shape[0], num_rows).T):
            expected = nn.functional.linear(inputs, linear.weight, linear.bias)
            torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)
    assert linear(torch.randn(shape[0])).shape == (shape[1],)
    assert linear(torch.randn(2, 3, shape[0])).shape == (2, 3, shape[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, HalfLinear])
@pytest.mark.parametrize("dtype", SHORT_DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_in_16_bits(kind, dtype, has_bias):
    """Packed as they are, or with the default product where a library has none; a cast layer is packed again."""
    linear = pack(nn.Linear(193, 97, bias=has_bias), kind)
    inputs = torch.randn(5, 193)
    linear(inputs)
    linear.to(dtype)
    for num_rows in (0, 1, 2, 8, 16, 33, 300):
        inputs = torch.randn(num_rows, 193).to(dtype)
        exact = nn.functional.linear(inputs.float(), linear.weight.float(), linear.bias.float() if has_bias else None)
        output, rounding = linear(inputs), torch.finfo(dtype).eps
        assert output.dtype is dtype
        torch.testing.assert_close(output.float(), exact, atol=rounding, rtol=rounding)
    if kind is CompiledLinear:
        inputs = torch.randn(61, 193).to(dtype)
        assert torch.equal(linear(inputs), torch.cat([linear(row[None]) for row in inputs]))
    inputs = torch.randn(5, 193).to(dtype)
    linear.weight.data[40].mul_(-1)  # which torch does not count
    assert linear.refresh()
    exact = nn.functional.linear(inputs.float(), linear.weight.float(), linear.bias.float() if has_bias else None)
    torch.testing.assert_close(linear(inputs).float(), exact, atol=rounding, rtol=rounding)
    linear.float()
    exact = nn.functional.linear(inputs.float(), linear.weight, linear.bias)
    tolerance = 2e-2 if kind is HalfLinear else 1e-4
    torch.testing.assert_close(linear(inputs.float()), exact, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@needs_compiled
@pytest.mark.parametrize("dtype", SHORT_DTYPES)
def test_products_in_16_bits_are_timed(dtype, one_thread, monkeypatch):
    """Each dtype of a model by itself, up to as many rows as a prompt may have."""
    slow = _Slow(monkeypatch)
    slow.seconds = {nn.Linear: lambda num_rows: 0.003, CompiledLinear: lambda num_rows: 0}
    model = nn.Sequential(nn.Linear(700, 256), nn.Linear(700, 256).to(dtype))
    with prepare_for_cpu(model) as prepared:
        assert [type(linear) for linear in model] == [CompiledLinear, CompiledLinear]
        assert prepared.num_bytes == 700 * 256 * (4 + 2)
        for num_rows in (1, 4, 60, 256):
            slow.calls.clear()
            model[1](torch.randn(num_rows, 700).to(dtype))
            assert slow.calls == [("CompiledLinear", num_rows)]


@pytest.mark.parametrize("dtype", SHORT_DTYPES)
@pytest.mark.parametrize("of_draft", [None, torch.float32])
@pytest.mark.parametrize("draft_vocab_size", [None, 40])
def test_a_prepared_pair_in_16_bits(dtype, of_draft, draft_vocab_size):
    """Logits within rounding, and a packed copy of two bytes for each weight, also of a draft in float32."""
    target = tiny_target("llama").to(dtype)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size).to(of_draft or dtype)
    input_ids, mask = prompts(1)
    with torch.no_grad():
        expected = target(input_ids, attention_mask=mask).logits
        with prepare_for_cpu(target, draft) as prepared:
            assert prepared.num_bytes == sum(2 * linear.weight.numel() for linear in prepared.linears)
            rounding = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(target(input_ids, attention_mask=mask).logits, expected, atol=rounding, rtol=0)
            output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, max_new_tokens=12, do_sample=False)
    assert output.shape[1] == input_ids.shape[1] + 12
    assert draft.last_speculation.declined is None


def test_a_float32_target_with_a_draft_in_16_bits():
    """The text is the target's."""
    target = tiny_target("llama")
    draft = tiny_draft(target, draft_vocab_size=40).to(torch.bfloat16)
    input_ids, mask = prompts(1)
    with prepare_for_cpu(target, draft):
        plain, speculative, _ = generate_twice(target, draft, input_ids, mask, do_sample=False, max_new_tokens=12, pad_token_id=PAD_ID)
    assert torch.equal(plain, speculative)


OTHERS = [kind for kind in KINDS if kind is not CompiledLinear]


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one."""
    monkeypatch.setattr(CompiledLinear, "is_available", classmethod(lambda cls, dtype=None: False))


class _Slow:
    """Products of packed layers, and the default one, which take as long as a test says; they note their calls."""

    def __init__(self, monkeypatch):
        self.seconds, self.calls = {}, []
        for kind in KINDS:
            monkeypatch.setattr(kind, "packed_product", self.slowed(kind, kind.packed_product))
        monkeypatch.setattr(nn.Linear, "forward", self.slowed(nn.Linear, nn.Linear.forward))

    def slowed(self, kind, product):
        def run(layer, input, *others):
            time.sleep(self.seconds.get(kind, lambda num_rows: 0)(len(input)))
            self.calls.append((kind.__name__, len(input)))
            return product(layer, input, *others)

        return run


@torch.no_grad()
@needs_compiled
@pytest.mark.parametrize("slow_rows", [[], [1, 8], [256]])
def test_our_own_product_serves_all_rows_of_trees(slow_rows, one_thread, monkeypatch):
    """And of plain steps, even where it is slower; for a prompt the faster one does, and where it is wrong the default one."""
    slow = _Slow(monkeypatch)
    slow.seconds = {nn.Linear: lambda num_rows: 0.003, CompiledLinear: lambda num_rows: 0.006 if num_rows in slow_rows else 0}
    linear = nn.Linear(256, 256)
    with prepare_for_cpu(linear):
        for num_rows in (1, 2, 8, 64, 128, 129, 256, 300):
            slow.calls.clear()
            linear(torch.randn(num_rows, 256))
            is_default = num_rows > 256 or num_rows > 128 and 256 in slow_rows
            assert slow.calls == [("Linear" if is_default else "CompiledLinear", num_rows)]
    product = CompiledLinear.packed_product
    monkeypatch.setattr(CompiledLinear, "packed_product", lambda layer, *given: product(layer, *given) * 1.01)
    with prepare_for_cpu(linear):
        slow.calls.clear()
        linear(torch.randn(8, 256))
        assert slow.calls == [("Linear", 8)]


@torch.no_grad()
@pytest.mark.parametrize("best", OTHERS)
@pytest.mark.parametrize("slow_rows", [[], [1], [1, 2, 3], [8], [256], [1, 2, 3, 4, 8, 16, 32, 64, 128, 256]])
def test_each_number_of_rows_takes_the_product_that_was_faster(best, slow_rows, one_thread, no_compiler, monkeypatch):
    """Of all kinds the one that saves the most; the default product where that one is slow, and for a prompt.
    Layers of a shape agree."""
    slow = _Slow(monkeypatch)
    slow.seconds = {
        nn.Linear: lambda num_rows: 0.003,
        **dict.fromkeys(OTHERS, lambda num_rows: 0.012),
        best: lambda num_rows: 0.03 if num_rows in slow_rows else 0,
    }
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    with prepare_for_cpu(model) as prepared:
        for linear in prepared.linears[:2]:
            # Where none ever helps, it does not matter which packed.
            assert type(linear) is best or len(slow_rows) == 10
            for num_rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65, 255, 256, 257, 900):
                timed_rows = next((rows for rows in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256) if num_rows <= rows), None)
                slow.calls.clear()
                inputs = torch.randn(num_rows, 256)
                expected = nn.functional.linear(inputs, linear.weight, linear.bias)
                torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)
                assert slow.calls == [("Linear" if timed_rows in (None, *slow_rows) else best.__name__, num_rows)]
        # The last layer has too few weights to be timed.
        assert type(model[2]) is PackedLinear
        assert all(model[2].packed_rows[1:])
        twin = copy.deepcopy(model)[0]
        assert (type(twin), twin.packed_rows) == (type(model[0]), model[0].packed_rows)
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "packed_rows")


@torch.no_grad()
@needs_mkl
@pytest.mark.parametrize("wrong_rows", [[3], [256]])
def test_a_product_that_is_wrong_is_not_used(wrong_rows, one_thread, no_compiler, monkeypatch):
    """Fast as it may be: it is compared with the default product where it is timed."""
    slow, product = _Slow(monkeypatch), MklLinear.packed_product
    slow.seconds = {nn.Linear: lambda num_rows: 0.004, **dict.fromkeys(KINDS, lambda num_rows: 0.002), MklLinear: lambda num_rows: 0}

    def wrong(layer, input, *others):
        return product(layer, input, *others) * (1.01 if len(input) in wrong_rows else 1)

    monkeypatch.setattr(MklLinear, "packed_product", wrong)
    linear = nn.Linear(256, 256)
    with prepare_for_cpu(linear):
        for num_rows in (1, 2, 3, 4, 100, 256, 400):
            inputs = torch.randn(num_rows, 256)
            expected = nn.functional.linear(inputs, linear.weight, linear.bias)
            torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)


def test_layers_of_every_kind_are_timed(monkeypatch):
    """Made in inference mode, with weights that are not contiguous, with more rows than are timed; under autocast, and with
    another default dtype."""
    monkeypatch.setattr(cpu, "_TIMED_WEIGHTS", 2**17)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 1024, bias=False), nn.Linear(1024, 256))
        model[2].weight = nn.Parameter(torch.randn(1024, 256).T)
    inputs = {num_rows: torch.randn(num_rows, 256) for num_rows in (1, 2, 3, 8, 100, 300)}
    with torch.no_grad():
        expected = {num_rows: model(one) for num_rows, one in inputs.items()}
        torch.set_default_dtype(torch.float64)
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                prepared = prepare_for_cpu(model)
        finally:
            torch.set_default_dtype(torch.float32)
        with prepared:
            for num_rows, one in inputs.items():
                torch.testing.assert_close(model(one), expected[num_rows], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_without_mkl_and_a_compiler_layers_are_packed_by_onednn(monkeypatch):
    """As on ARM."""
    for kind in (MklLinear, CompiledLinear):
        monkeypatch.setattr(kind, "is_available", classmethod(lambda cls, dtype=None: False))
    linear = nn.Linear(256, 256)
    with prepare_for_cpu(linear):
        assert type(linear) is PackedLinear


@torch.no_grad()
@needs_compiled
def test_a_pickled_layer_where_there_is_no_compiler(monkeypatch):
    """It takes the default product."""
    linear, inputs = pack(nn.Linear(48, 97), CompiledLinear), torch.randn(3, 48)
    expected = linear(inputs)
    monkeypatch.setattr(packed_layers, "packed_linear_is_available", lambda: False)
    loaded = pickle.loads(pickle.dumps(linear))
    assert type(loaded) is CompiledLinear
    torch.testing.assert_close(loaded(inputs), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@needs_compiled
def test_a_compiled_layers_output_does_not_depend_on_the_other_rows():
    """Bit for bit: a tree's products are those of plain steps."""
    linear = pack(nn.Linear(576, 97), CompiledLinear)
    inputs = torch.randn(61, 576)
    assert torch.equal(linear(inputs), torch.cat([linear(row[None]) for row in inputs]))


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, HalfLinear])
@pytest.mark.parametrize("num_rows", [40, 60])
def test_a_weight_of_another_size_is_packed_again(kind, num_rows):
    """In the place of one with 50 rows, as where a vocabulary was cut or enlarged."""
    linear, inputs = pack(nn.Linear(24, 50, bias=False), kind), torch.randn(5, 24)
    linear(inputs)
    linear.weight = nn.Parameter(torch.randn(num_rows, 24))
    tolerance = 2e-2 if kind is HalfLinear else 1e-5
    torch.testing.assert_close(linear(inputs), inputs @ linear.weight.T, atol=tolerance, rtol=tolerance)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("kind", [*KINDS, HalfLinear])
def test_layers_are_traced_and_mapped(kind):
    """By torch.jit, whose graph must hold the product, by torch.func, and by torch.compile."""
    linear, inputs, others = pack(nn.Linear(24, 50), kind), torch.randn(5, 24), torch.randn(5, 24)
    exact = nn.functional.linear(others, linear.weight, linear.bias)
    with torch.no_grad():
        found = [
            torch.jit.trace(linear, inputs, check_trace=False)(others),
            torch.func.vmap(linear)(torch.stack((inputs, others)))[1],
            torch.compile(linear, backend="eager")(others),
        ]
    tolerance = 2e-2 if kind is HalfLinear else 1e-5
    for output in found:
        torch.testing.assert_close(output, exact, atol=tolerance, rtol=tolerance)


def test_a_parametrized_layer_takes_the_default_product():
    """Its weight is no parameter, but computed in each forward."""
    linear = nn.Linear(8, 8)
    with prepare_for_cpu(linear):
        nn.utils.parametrizations.weight_norm(linear)
        inputs = torch.randn(3, 8)
        with torch.no_grad():
            linear.parametrizations.weight.original0.mul_(2)
            expected = nn.functional.linear(inputs, linear.weight, linear.bias)
            torch.testing.assert_close(linear(inputs), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_logits_of_a_prepared_target(architecture):
    """Within 1e-4 of the untouched one's; parameters and their names stay the same."""
    target = tiny_target(architecture)
    input_ids, mask = prompts(2)
    expected, names = target(input_ids, attention_mask=mask).logits, list(target.state_dict())
    prepared = prepare_for_cpu(target)
    real = mask.bool()
    torch.testing.assert_close(
        target(input_ids, attention_mask=mask).logits[real], expected[real], atol=1e-4, rtol=1e-4
    )
    assert list(target.state_dict()) == names
    prepared.undo()
    prepared.undo()
    assert torch.equal(target(input_ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
def test_a_prepared_pair_is_lossless(draft_vocab_size):
    """Against plain decoding of the prepared target; the draft's borrowed rows are packed too."""
    input_ids, mask = prompts(2)
    arguments = {"max_new_tokens": 30, "pad_token_id": PAD_ID, "do_sample": False}
    target = varied_target("llama", input_ids, mask, **{k: v for k, v in arguments.items() if k != "do_sample"})
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size).bind(target)
    with prepare_for_cpu(target, draft):
        assert isinstance(target.lm_head, PackedLinear)
        assert type(draft.fusion_layer) is HalfLinear
        plain, speculative, _ = generate_twice(target, draft, input_ids, mask, **arguments)
        assert torch.equal(plain, speculative)
        if draft_vocab_size:
            assert type(draft._borrowed.head_rows) is HalfLinear
    draft.bind(target)
    if draft_vocab_size:
        assert type(draft._borrowed.head_rows) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [0, 1, 10, 128])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_compiled), False])
def test_a_drafts_layer_in_float16(num_rows, has_bias, is_compiled, monkeypatch):
    """The product with the rounded weight, summed in float32; exact for a prompt, and when it is undone. Ours or torch's."""
    monkeypatch.setattr(packed_layers, "packed_linear_is_available", lambda: is_compiled)
    linear = nn.Linear(576, 97, bias=has_bias)
    inputs = torch.randn(2, num_rows, 576)
    exact = linear(inputs)
    expected = nn.functional.linear(inputs, linear.weight.half().float(), linear.bias)
    pack(linear, HalfLinear)
    torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)
    prompt = torch.randn(257, 576)
    assert torch.equal(linear(prompt), nn.functional.linear(prompt, linear.weight, linear.bias))
    with torch.enable_grad():
        assert torch.equal(linear(inputs), exact)
    PreparedModels([linear]).undo()
    assert torch.equal(linear(inputs), exact)


def test_weights_beyond_float16_are_packed_in_float32():
    """Nothing is cut off."""
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[0, 0] = 1e6
    assert type(pack(linear, HalfLinear)) is PackedLinear


def test_a_prepared_draft_takes_half_of_its_bytes_more():
    """Of its own layers; the head's rows are counted with the head."""
    draft = tiny_draft(tiny_target("llama"))
    num_weights = sum(module.weight.numel() for module in draft.modules() if type(module) is nn.Linear)
    assert prepare_for_cpu(draft).num_bytes == 2 * num_weights


@torch.no_grad()
def test_a_weight_written_to_is_packed_again():
    """Never a stale product."""
    linear = nn.Linear(8, 8)
    prepare_for_cpu(linear)
    linear.weight.mul_(2)
    inputs = torch.randn(3, 8)
    torch.testing.assert_close(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))
    linear.weight = nn.Parameter(torch.randn(8, 8))
    torch.testing.assert_close(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))


def test_gradients_take_the_default_product():
    """A prepared model can still be trained."""
    linear = nn.Linear(8, 8)
    prepare_for_cpu(linear)
    linear(torch.randn(3, 8)).sum().backward()
    assert linear.weight.grad is not None


@torch.no_grad()
def test_copies_pickles_and_casts_of_a_prepared_layer():
    """They pack for themselves, or not at all."""
    linear = nn.Linear(8, 8)
    prepare_for_cpu(linear)
    inputs = torch.randn(3, 8)
    expected = linear(inputs)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert "_packed" not in twin.__dict__
        assert torch.equal(twin(inputs), expected)
    assert linear.to(torch.float64)(inputs.double()).dtype == torch.float64


def test_only_plain_layers_are_packed():
    """Subclasses and other dtypes are left alone; preparing twice packs once."""

    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4).to(torch.float64), nn.Linear(4, 4))
    assert len(prepare_for_cpu(model).linears) == 1
    assert len(prepare_for_cpu(model).linears) == 0


def test_a_model_with_nothing_to_pack_is_told():
    """Its dtype has no products; packed already is no reason."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.float64)
    with pytest.warns(UserWarning, match=r"expected layers in float32.*, got float64 in Sequential; .*dtype=torch.float32\."):
        assert not prepare_for_cpu(model).linears
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.float()
        assert len(prepare_for_cpu(model).linears) == 2
        assert not prepare_for_cpu(model).linears
        assert not prepare_for_cpu(nn.Sequential(nn.Embedding(4, 4))).linears
        assert not prepare_for_cpu(nn.Linear(4, 4, device="meta")).linears  # as on an accelerator


@pytest.mark.parametrize("dtype", SHORT_DTYPES)
def test_a_dtype_for_which_a_cpu_has_no_product(dtype, monkeypatch):
    """As bfloat16 without a compiler on an old CPU: the layers stay as they are, and the user is told."""
    monkeypatch.setattr(packed_layers, "packed_linear_is_available", lambda: False)
    monkeypatch.setattr(PackedLinear, "is_available", classmethod(lambda cls, dtype=torch.float32: dtype is torch.float32))
    with pytest.warns(UserWarning, match="expected layers in float32, got (bfloat16|float16) in Linear"):
        assert not prepare_for_cpu(nn.Linear(4, 4).to(dtype)).linears
    linear = pack(nn.Linear(4, 4).to(dtype), HalfLinear)  # as a draft beside a target that has one
    inputs = torch.randn(3, 4).to(dtype)
    with torch.no_grad():
        assert torch.equal(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))


def test_a_machine_without_any_product(monkeypatch):
    """The user is told what is missing."""
    for kind in (PackedLinear, MklLinear, CompiledLinear):
        monkeypatch.setattr(kind, "is_available", classmethod(lambda cls, dtype=torch.float32: False))
    with pytest.warns(UserWarning, match=r"expected oneDNN or MKL in torch, or a C\+\+ compiler, got float32 in Linear; nothing of it"):
        assert not prepare_for_cpu(nn.Linear(4, 4)).linears


@torch.no_grad()
@needs_compiled
def test_a_weight_whose_bits_are_read_as_another_dtype():
    """Same place, same bits, other numbers."""
    linear = pack(nn.Linear(48, 97, bias=False).half(), CompiledLinear)
    inputs = torch.randn(3, 48)
    linear(inputs.half())
    linear.weight.data = linear.weight.data.view(torch.bfloat16)
    expected = nn.functional.linear(inputs.bfloat16().float(), linear.weight.float())
    torch.testing.assert_close(linear(inputs.bfloat16()).float(), expected, atol=1e-2, rtol=1e-2)


def test_a_draft_is_packed_in_float32_where_there_are_no_products_in_float16(monkeypatch):
    """Without our own. Which torch has, the engine for quantised products decides; the user may choose another after packing."""
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    before = torch.backends.quantized.engine
    others = [one for one in torch.backends.quantized.supported_engines if one in ("qnnpack", "onednn")]
    if not others:
        pytest.skip("this build of torch has no engine without such products")
    input_ids, mask = prompts(1)
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD_ID}
    monkeypatch.setattr(packed_layers, "packed_linear_is_available", lambda: False)
    try:
        for engines in itertools.product((before, *others), others):
            torch.backends.quantized.engine = engines[0]
            with prepare_for_cpu(target, draft):
                torch.backends.quantized.engine = engines[1]
                draft.processing_modules[0].layers[0].mlp.up_proj.weight.data.mul_(1.5)
                plain, speculative, _ = generate_twice(target, draft, input_ids, mask, **settings)
                assert torch.equal(plain, speculative)
    finally:
        torch.backends.quantized.engine = before


def test_every_architecture_can_be_prepared():
    """gpt2 alone has no nn.Linear but its head."""
    for architecture in ARCHITECTURES:
        assert prepare_for_cpu(tiny_target(architecture)).linears
