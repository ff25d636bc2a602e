"""Weights that are written to after `prepare_for_cpu`, in whatever way: products follow, in every kind of tensor and copy."""

import copy
import io
import pickle
import threading

import pytest
import torch
from tiny_models import PAD_ID, prompts, tiny_draft, tiny_target
from torch import nn
from transformers import DynamicCache, StaticCache

from transformers_prism import cpu, prepare_for_cpu
from transformers_prism.cpu import WeightCheck, trusting_packed_weights
from transformers_prism.packed_layers import (
    CompiledLinear,
    HalfLinear,
    MklLinear,
    PackedLinear,
    pack,
    refresh_packed_weights,
)
from transformers_prism.policy import costs as round_costs
from transformers_prism.transformers_names import cache_argument

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"),
]
GREEDY = {"max_new_tokens": 12, "pad_token_id": PAD_ID, "do_sample": False}


def merged(linear):
    """As adapters are merged."""
    generator = torch.Generator().manual_seed(1)
    ones, others = torch.randn(linear.out_features, 2, generator=generator), torch.randn(2, linear.in_features, generator=generator)
    linear.weight.data += 0.3 * (ones @ others)


def copied(linear):
    """The storage stays, its content goes."""
    linear.weight.data.copy_(torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(2)))


def loaded(linear):
    """The parameter is replaced."""
    weight = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(4))
    linear.load_state_dict({"weight": weight}, strict=False, assign=True)


def one_row(linear):
    """By torch."""
    linear.weight.data[3] += 1.0


def one_row_by_numpy(linear):
    """By numpy."""
    linear.weight.detach().view(torch.int32 if linear.weight.dtype is torch.float32 else torch.int16).numpy()[5] = 0x3F00


def one_value(linear):
    """The smallest of changes."""
    linear.weight.data[2, 1] += 1e-3 if linear.weight.dtype is torch.float32 else 1e-1


def two_rows_change_places(linear):
    """No sum over everything tells."""
    linear.weight.data[[2, 6]] = linear.weight.data[[6, 2]]


def two_columns_change_places(linear):
    """No sum of a row tells."""
    linear.weight.data[:, [2, 6]] = linear.weight.data[:, [6, 2]]


KINDS = [kind for kind in (PackedLinear, MklLinear, CompiledLinear, HalfLinear) if kind.is_available()]
DENSE = [merged, copied, loaded]
PARTIAL = [one_row, one_row_by_numpy, one_value, two_rows_change_places, two_columns_change_places]


@pytest.fixture
def busy(monkeypatch):
    """No model is ever idle."""
    monkeypatch.setattr(cpu, "_IDLE_SECONDS", float("inf"))


@torch.no_grad()
@pytest.mark.parametrize("write", [*DENSE, *PARTIAL])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(48, 97), (47, 97), (47, 12), (50, 97), (200, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_refresh_finds_every_write(write, kind, shape, dtype):
    """In layers of even and odd sizes; dense ones show without it."""
    linear, inputs = pack(nn.Linear(*shape).to(dtype), kind), torch.randn(5, shape[0]).to(dtype)
    write(linear)
    if write in PARTIAL:
        assert linear.refresh()
    linear.to(dtype)  # if the parameter was replaced
    bias = linear.bias.float()
    expected = nn.functional.linear(inputs.float(), linear.weight.float(), bias).to(dtype)
    tolerance = max(2e-2 if kind is HalfLinear else 1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(linear(inputs), expected, atol=tolerance, rtol=tolerance)
    assert not linear.refresh()


@torch.no_grad()
def test_a_bias_written_to_and_weights_that_outgrow_float16():
    """A packed copy knows neither."""
    linear, inputs = pack(nn.Linear(24, 12), HalfLinear), torch.randn(5, 24)
    linear.bias.data += 3
    expected = nn.functional.linear(inputs, linear.weight.half().float(), linear.bias)
    torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5)
    linear.weight.data *= 1e7
    assert torch.equal(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_within_a_longer_vector(dtype):
    """As averaged parameters may be: they begin at an odd place, where several values are not one integer of 64 bits."""
    vector, linear = torch.randn(1 + 24 * 18).to(dtype), nn.Linear(24, 18, bias=False)
    linear.weight.data = vector[1:].view(18, 24)
    inputs, tolerance = torch.randn(5, 24).to(dtype), max(1e-5, torch.finfo(dtype).eps)
    with prepare_for_cpu(linear) as prepared:
        expected = (inputs.float() @ linear.weight.float().T).to(dtype)
        torch.testing.assert_close(linear(inputs), expected, atol=tolerance, rtol=tolerance)
        vector[30] += 1
        assert prepared.refresh() == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not HalfLinear])
def test_weights_that_are_not_contiguous_and_nan(kind):
    """Noted where they lie; NaN is not packed in every product anew."""
    linear = nn.Linear(24, 18)
    linear.weight = nn.Parameter(torch.randn(24, 18).T)
    linear.weight[0, 0] = torch.nan
    pack(linear, kind)
    packed, inputs = linear.__dict__["_packed"], torch.randn(5, 24)
    assert not linear.refresh()
    linear(inputs)
    assert linear.__dict__["_packed"] is packed
    linear.weight.data += 1
    expected = nn.functional.linear(inputs, linear.weight, linear.bias)
    torch.testing.assert_close(linear(inputs), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    linear.weight.data[7, 5] += 1
    assert linear.refresh()


@torch.no_grad()
@pytest.mark.parametrize("write", [*DENSE, *PARTIAL])
def test_plain_decoding_follows_at_once(write, busy):
    """The next generate() of a prepared target is that of the new weights, which another target has without packing."""
    target, input_ids = tiny_target("llama"), prompts(1)[0]
    with prepare_for_cpu(target):
        before = target.generate(input_ids, **GREEDY)
        for linear in (target.lm_head, target.model.layers[1].mlp.down_proj):
            write(linear)
        other = tiny_target("llama")
        other.load_state_dict(target.state_dict())
        after = target(input_ids).logits
        torch.testing.assert_close(after, other(input_ids).logits, atol=1e-4, rtol=1e-4)
        plain = target.generate(input_ids, **GREEDY)
        assert torch.equal(plain, other.generate(input_ids, **GREEDY))
        assert torch.equal(target.generate(input_ids, assistant_model=tiny_draft(target), **GREEDY), plain)
        if write in DENSE:
            assert not torch.equal(plain, before)


@torch.no_grad()
def test_when_whole_weights_are_compared(busy, monkeypatch):
    """Where a sequence begins: by no cache or an empty one, under any name or none; not in the steps behind."""
    target, input_ids = tiny_target("llama"), prompts(1)[0]
    checks = []
    monkeypatch.setattr(WeightCheck, "refresh", lambda check: checks.append(1))

    def num_checks(*args, **kwargs):
        checks.clear()
        target(*args, **kwargs)
        return len(checks)

    with prepare_for_cpu(target):
        cache = DynamicCache(config=target.config)
        assert num_checks(input_ids, **cache_argument(target, cache)) == 1
        assert num_checks(input_ids[:, :1], **cache_argument(target, cache)) == 0
        assert num_checks(input_ids[:, :1], None, None, cache) == 0
        assert num_checks(input_ids[:, :1], None, None, DynamicCache(config=target.config)) == 1
        assert num_checks(input_ids) == 1
        cache = StaticCache(config=target.config, max_cache_len=32)
        assert num_checks(input_ids, **cache_argument(target, cache)) == 1
        assert num_checks(input_ids[:, :1], **cache_argument(target, cache)) == 0
        checks.clear()
        target.generate(input_ids, **GREEDY)
        assert len(checks) == 1
        checks.clear()
        target.generate(input_ids, assistant_model=tiny_draft(target), **GREEDY)
        assert len(checks) == 1
        with trusting_packed_weights():
            assert num_checks(input_ids) == 0
        with torch.enable_grad():
            assert num_checks(input_ids) == 0
        checks.clear()
        round_costs.measure(target, tiny_draft(target).bind(target), 1)
        assert not checks
        monkeypatch.setattr(cpu, "_IDLE_SECONDS", 0.0)
        assert num_checks(input_ids[:, :1], **cache_argument(target, cache)) == 1
    assert num_checks(input_ids) == 0


@torch.no_grad()
def test_recurrent_states_have_a_beginning_too(busy, monkeypatch):
    """Whose cache has no length."""
    from transformers import MambaConfig, MambaForCausalLM

    target = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    checks = []
    monkeypatch.setattr(WeightCheck, "refresh", lambda check: checks.append(1))
    with prepare_for_cpu(target):
        target.generate(prompts(1)[0], **GREEDY)
    assert len(checks) == 1


@torch.no_grad()
def test_copies_and_pickles_have_a_check_of_their_own(busy):
    """And none is left by an undo."""
    target, input_ids = tiny_target("llama"), prompts(1)[0]
    prepared = prepare_for_cpu(target)
    file = io.BytesIO()
    torch.save(target, file)
    file.seek(0)
    twins = [copy.deepcopy(target), pickle.loads(pickle.dumps(target)), torch.load(file, weights_only=False)]
    for model in (target, *twins):
        # Others' hooks get numbers of their own.
        model.register_forward_pre_hook(lambda module, args: None)
        model(input_ids)
        model.lm_head.weight.data[3] += 1
        other = tiny_target("llama")
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(input_ids).logits, other(input_ids).logits, atol=1e-4, rtol=1e-4)
    prepared.undo()
    kinds = [[type(hook) for hook in model._forward_pre_hooks.values()] for model in (target, *twins)]
    assert [WeightCheck in found for found in kinds] == [False, True, True, True]
    assert not any(isinstance(hook, WeightCheck) for hook in target._forward_pre_hooks_with_kwargs)
    assert len(target._forward_pre_hooks_with_kwargs) == 0


@torch.no_grad()
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_draft_follows_too(is_prepared, busy):
    """Its own layers, and the rows that it has of the target's head."""
    target = tiny_target("llama")
    draft = tiny_draft(target, draft_vocab_size=40).bind(target)
    if is_prepared:
        prepare_for_cpu(target, draft)
    draft.bind(target)
    hidden = torch.randn(1, 3, 32)
    layer = draft.processing_modules[0].layers[0].mlp.down_proj
    inputs = torch.randn(2, layer.in_features)
    for write in PARTIAL:
        write(layer)
        write(target.lm_head)
        draft.bind(target)
        expected = nn.functional.linear(inputs, layer.weight, layer.bias)
        torch.testing.assert_close(layer(inputs), expected, atol=2e-2, rtol=2e-2)
        expected = tiny_draft(target, draft_vocab_size=40).bind(target)
        expected.load_state_dict(draft.state_dict())
        tolerance = 2e-2 if is_prepared else 0
        found = draft.compute_logits(hidden)
        torch.testing.assert_close(found, expected.compute_logits(hidden), atol=tolerance, rtol=tolerance)
    assert refresh_packed_weights(target, draft) == 0 or is_prepared


def test_a_refresh_says_how_many_layers_it_packed():
    """Of all models that were prepared."""
    target = tiny_target("llama")
    draft = tiny_draft(target)
    with prepare_for_cpu(target, draft) as prepared:
        assert prepared.refresh() == 0
        for module in (target.lm_head, target.model.layers[0].mlp.up_proj, draft.fusion_layer):
            module.weight.data[1, 1] += 1
        assert refresh_packed_weights(target) == 2
        assert prepared.refresh() == 1


@pytest.mark.parametrize("packed_in", [True, False])
@pytest.mark.parametrize("draft_vocab_size", [None, 40])
def test_inference_mode_inside_and_outside(packed_in, draft_vocab_size):
    """Prepared, bound and decoded in it or not, in turn; then trained."""
    input_ids = prompts(1)[0]
    expected = tiny_target("llama").generate(input_ids, **GREEDY)
    target = tiny_target("llama")
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    with torch.inference_mode(packed_in):
        prepare_for_cpu(target, draft)
        draft.bind(target)
    for is_in in (packed_in, not packed_in, packed_in):
        with torch.inference_mode(is_in):
            assert torch.equal(target.generate(input_ids, **GREEDY), expected)
            output = target.generate(input_ids, assistant_model=draft, **GREEDY)
            assert torch.equal(output, expected)
            assert draft.last_speculation.declined is None
            target.lm_head.weight.data[:, 3] += 0.0
    hidden = torch.randn(1, 3, 32, requires_grad=True)
    draft.compute_logits(hidden).sum().backward()
    assert hidden.grad is not None


def test_weights_that_were_made_in_inference_mode():
    """They count no versions, so that all writes are found as those behind torch's back are."""
    with torch.inference_mode():
        target = tiny_target("llama")
        draft = tiny_draft(target, draft_vocab_size=40)
        prepare_for_cpu(target, draft)
        input_ids = prompts(1)[0]
        plain = target.generate(input_ids, **GREEDY)
        assert torch.equal(target.generate(input_ids, assistant_model=draft, **GREEDY), plain)
        target.lm_head.weight.mul_(-1)
        negated = target.generate(input_ids, **GREEDY)
        assert not torch.equal(negated, plain)
    assert torch.equal(target.generate(input_ids, **GREEDY), negated)
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **GREEDY), negated)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not HalfLinear])
def test_threads_forward_while_one_packs_again(kind):
    """Every product is that of one of the two weights."""
    linear, inputs = nn.Linear(64, 64, bias=False), torch.randn(4, 64)
    first, second = linear.weight.detach().clone(), torch.randn(64, 64)
    expected = [inputs @ first.T, inputs @ second.T]
    pack(linear, kind)
    wrong, is_over = [], threading.Event()

    @torch.no_grad()
    def forward():
        while not is_over.is_set():
            output = linear(inputs)
            if min((output - one).abs().max() for one in expected) > 1e-3:
                wrong.append(output)

    threads = [threading.Thread(target=forward) for _ in range(2)]
    for thread in threads:
        thread.start()
    for index in range(200):
        # Another tensor each time, so that no thread sees one that is half written.
        linear.weight = nn.Parameter((first, second)[index % 2].clone())
        linear.refresh()
    is_over.set()
    for thread in threads:
        thread.join()
    assert not wrong
