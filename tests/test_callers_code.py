"""Targets and settings with code of the caller's own in them: the text is plain decoding's, or the draft says why it does not draft."""

import gc
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from compatibility_images import image_prompt
from compatibility_models import build
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_draft, tiny_target
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessorList,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from transformers_prism.decoding import round_check
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

LENGTH = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD_ID}


@pytest.fixture(autouse=True)
def _nothing_checked_yet(monkeypatch, tmp_path):
    monkeypatch.setattr(round_check, "_folder", lambda: tmp_path / "checked")


def generate_both(target, draft=None, **inputs):
    """Plain text, that with a draft, and what was told."""
    inputs = {"input_ids": prompts(1)[0], **LENGTH, **inputs}
    plain = target.generate(**inputs)
    draft = scripted_draft(target, plain, inputs["input_ids"].shape[1], is_strict=False) if draft is None else draft
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = target.generate(**inputs, assistant_model=draft)
    return plain, found, [str(one.message) for one in told], draft.last_speculation


def test_hooks_that_look_at_the_last_token_of_a_forward():
    """Steering of activations: the first tree is compared with single steps, and the draft stops; a hook that is gone is forgotten."""
    target = tiny_target("llama", 3)
    direction = 4 * torch.randn(32, generator=torch.Generator().manual_seed(2))

    def steer(module, args, output):
        (output[0] if isinstance(output, tuple) else output)[:, -1] += direction
        return output

    handle = target.model.layers[1].register_forward_hook(steer)
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert any("run code of another package" in one for one in told), told
    assert speculation.stopped_drafting is not None
    handle.remove()
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert not told
    assert speculation.stopped_drafting is None
    assert speculation.acceptance_length > 1.5


class LastTokenSteering(nn.Module):
    """Adds a direction to the last token of what another module returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("direction", 4 * torch.randn(32, generator=torch.Generator().manual_seed(2)))

    def forward(self, hidden, *args, **kwargs):
        output = self.inner(hidden, *args, **kwargs).clone()
        output[:, -1] += self.direction
        return output


@pytest.mark.parametrize("way", ["module", "layer", "class"])
def test_modules_that_look_at_the_last_token_of_a_forward(monkeypatch, way):
    """In the place of the model's own, around a layer, or patched into the class: found as hooks are."""
    target = tiny_target("llama", 3)
    layer = target.model.layers[1]
    if way == "module":
        layer.mlp = LastTokenSteering(layer.mlp)
    elif way == "layer":
        target.model.layers[1] = LastTokenSteering(layer)
    else:
        forward, direction = LlamaMLP.forward, LastTokenSteering(layer.mlp).direction

        def steered(self, hidden):
            output = forward(self, hidden).clone()
            output[:, -1] += direction
            return output

        monkeypatch.setattr(LlamaMLP, "forward", steered)
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert any("some of its modules, run code of another package" in one for one in told), told
    assert speculation.stopped_drafting is not None


class Halved(LlamaForCausalLM):
    """Gives two tokens one position."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["position_ids"] = inputs["position_ids"] // 2
        return inputs


class Capped(LlamaForCausalLM):
    """Stops counting positions in the middle of an answer."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["position_ids"] = inputs["position_ids"].clamp(max=15)
        return inputs


class Forgetful(LlamaForCausalLM):
    """Hides all but the first four and the last eight tokens."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        attention_mask[:, 4:-8] = 0
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)


class Usual(LlamaForCausalLM):
    """A method of its own that changes nothing."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "what"), [(Halved, "position_ids"), (Capped, "position_ids"), (Forgetful, "attention_mask"), (Usual, None)]
)
def test_inputs_that_a_model_makes_in_its_own_way(kind, what):
    target = kind(tiny_target("llama", 3).config).eval()
    target.load_state_dict(tiny_target("llama", 3).state_dict())
    plain, found, told, speculation = generate_both(target, max_new_tokens=24)
    assert torch.equal(found, plain)
    if what is None:
        assert speculation.declined is None
        assert speculation.acceptance_length > 1.3
    else:
        assert speculation.declined is not None
        assert f"{kind.__name__} makes {what} of later steps in its own way" in speculation.declined


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("is_setting", [False, True], ids=["keyword", "config"])
def test_router_logits_that_were_asked_for(name, is_setting):
    """Their loss takes no tree mask; plain decoding returns none of them."""
    target = build(name)
    target.config.output_router_logits = is_setting
    _, found, told, speculation = generate_both(target, **({} if is_setting else {"output_router_logits": True}))
    target.config.output_router_logits = False
    assert torch.equal(found, target.generate(prompts(1)[0], **LENGTH))
    assert not told
    assert speculation.declined is None
    assert speculation.acceptance_length > 1.3


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
def test_a_mask_that_counts_a_token_more_than_the_cache(is_static):
    """The last token of an answer is in the mask, but not passed along: refused where the mask hides anything."""
    target, (input_ids, mask) = tiny_target("llama", 3), prompts(2)
    new = torch.tensor([[5, 6, 7], [8, 9, 10]])
    whole = torch.cat((mask, torch.ones(2, 11, dtype=torch.long)), dim=1)
    texts = []
    for draft in (None, tiny_draft(target)):
        cache = StaticCache(target.config, max_cache_len=64) if is_static else DynamicCache()
        settings = {CACHE_KEYWORD: cache, **LENGTH, "max_new_tokens": 8, "assistant_model": draft}
        target.generate(input_ids, attention_mask=mask, **settings)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            texts.append(target.generate(new, attention_mask=whole, **settings))
    assert torch.equal(*texts)
    assert any(f"attention_mask has {whole.shape[1]} columns, but the cache holds" in str(one.message) for one in told)


def test_hooks_that_do_the_same_to_each_token():
    """They are checked in each call, since what they compute may change, and drafting goes on."""
    target, widths = tiny_target("llama", 3), []
    target.register_forward_pre_hook(lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    nums_checked = []
    for factor in (1.5, None, 1.1):
        if factor is not None:
            target.model.layers[1].register_forward_hook(lambda module, args, output, factor=factor: output * factor)
        plain = target.generate(prompts(1)[0], **LENGTH)
        draft = scripted_draft(target, plain, 9, is_strict=False)
        widths.clear()
        assert torch.equal(target.generate(prompts(1)[0], assistant_model=draft, **LENGTH), plain)
        assert draft.last_speculation.acceptance_length > 1.5
        nums_checked.append(widths.count(1) - sum(not tree.num_nodes for tree in draft.last_speculation.trees))
    assert nums_checked[0] == nums_checked[1] == nums_checked[2] > 0


@pytest.mark.parametrize("way", ["hook", "module"])
def test_code_whose_values_change(way):
    """A check that has passed says nothing of other values; nor is it kept for other processes."""
    target = tiny_target("llama", 3)
    steering = LastTokenSteering(target.model.layers[1].mlp)
    direction, steering.direction = steering.direction, torch.zeros(32)
    if way == "module":
        target.model.layers[1].mlp = steering
    else:
        steering.inner = nn.Identity()
        target.model.layers[1].mlp.register_forward_hook(lambda module, args, output: steering(output))
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert not told
    assert speculation.acceptance_length > 1.5
    steering.direction = direction
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert speculation.stopped_drafting is not None
    assert not round_check._folder().exists()


def test_a_target_with_a_hook_that_refers_to_it_is_freed():
    target = tiny_target("llama", 3)
    target.model.layers[1].register_forward_hook(lambda module, args, output, target=target: output)
    draft = tiny_draft(target)
    target.generate(prompts(1)[0], assistant_model=draft, **LENGTH)
    alive = weakref.ref(target)
    del target, draft
    gc.collect()
    assert alive() is None


def test_chains_of_convolutions_that_are_given_up():
    """Convolutions do not say how much was appended to them."""
    target = tiny_target("lfm2", 3)
    steering = LastTokenSteering(nn.Identity())
    target.model.layers[1].register_forward_hook(lambda module, args, output: steering(output))
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert speculation.stopped_drafting is not None
    assert any("run code of another package" in one for one in told), told


@pytest.mark.parametrize("num_rows", [1, 3])
def test_chains_that_fail_after_some_layers(num_rows):
    """What the others hold of the chain is forgotten."""
    target = tiny_target("lfm2", 3)

    def refuse(module, args):
        if args[0].shape[1] == 5:
            raise NotImplementedError("five tokens at a time")

    target.model.layers[2].register_forward_pre_hook(refuse)
    input_ids, mask = prompts(num_rows)
    plain, found, told, speculation = generate_both(target, input_ids=input_ids, attention_mask=mask)
    assert torch.equal(found, plain)
    assert (speculation.declined or speculation.stopped_drafting) is not None
    assert told


def test_rows_that_ended_where_drafting_was_given_up():
    """The padding behind them, which a cache that is handed back holds, runs in single steps."""
    target = tiny_target("llama", 3)
    input_ids, mask = prompts(3)

    def refuse(module, args, kwargs):
        cache = cache_of(kwargs)
        if cache is not None and cache.get_seq_length() and kwargs["input_ids"].shape[1] > 1:
            raise NotImplementedError("one token at a time")

    target.register_forward_pre_hook(refuse, with_kwargs=True)
    end = int(target.generate(input_ids, attention_mask=mask, **LENGTH)[0, input_ids.shape[1] + 3])
    settings = {"input_ids": input_ids, "attention_mask": mask, "eos_token_id": end, **LENGTH}
    caches = [DynamicCache(config=target.config) for _ in range(2)]
    plain = target.generate(**settings, **{CACHE_KEYWORD: caches[0]})
    draft = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
    with pytest.warns(UserWarning, match="refuses several tokens"):
        found = target.generate(**settings, **{CACHE_KEYWORD: caches[1]}, assistant_model=draft)
    assert torch.equal(found, plain)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_hooks_that_compress_the_cache():
    """Layers keep half of the prompt: plain decoding goes on with them, and so does the call with a draft."""
    target = tiny_target("llama", 3)

    def compress(module, args, kwargs, output):
        layer = cache_of(kwargs).layers[module.layer_idx]
        if kwargs["hidden_states"].shape[1] > 1:
            layer.keys, layer.values = layer.keys[:, :, ::2].contiguous(), layer.values[:, :, ::2].contiguous()

    for layer in target.model.layers:
        layer.self_attn.register_forward_hook(compress, with_kwargs=True)
    caches = [DynamicCache(config=target.config) for _ in range(2)]
    inputs = {"input_ids": prompts(1)[0], **LENGTH}
    plain = target.generate(**inputs, **{CACHE_KEYWORD: caches[0]})
    draft = tiny_draft(target)
    with pytest.warns(UserWarning, match="keeps 5 of the prompt's 9 tokens in its cache"):
        found = target.generate(**inputs, **{CACHE_KEYWORD: caches[1]}, assistant_model=draft)
    assert torch.equal(found, plain)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 5 + 15


class OwnLoop(LlamaForCausalLM):
    """Decodes the second best."""

    def _sample(self, input_ids, logits_processor, *args, **kwargs):
        processors = LogitsProcessorList([*logits_processor, lambda ids, scores: scores.masked_fill(scores == scores.max(), -1e9)])
        return super()._sample(input_ids, processors, *args, **kwargs)


def test_a_decoding_loop_of_its_own():
    target = OwnLoop(tiny_target("llama", 3).config).eval()
    plain, found, told, speculation = generate_both(target)
    assert torch.equal(found, plain)
    assert any("OwnLoop has a decoding loop of its own" in one for one in told), told
    assert speculation.declined is not None


def test_masks_that_were_registered():
    """Sinks and a window of four: a chain reads the model's own masks."""
    original = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def with_sinks(*args, **kwargs):
        kwargs["allow_is_causal_skip"] = False
        kwargs["mask_function"] = and_masks(kwargs["mask_function"], lambda b, h, q, k: (k > q - 4) | (k == 0))
        return original(*args, **kwargs)

    AttentionMaskInterface.register("sdpa", with_sinks)
    try:
        plain, found, told, speculation = generate_both(tiny_target("llama", 3))
    finally:
        AttentionMaskInterface.register("sdpa", original)
    assert torch.equal(found, plain)
    assert speculation.target == "chain"
    assert any("by a function that was registered for it" in one for one in told), told


def test_attention_that_stands_before_the_registered_one():
    """An entry of this mapping hides what is registered for all, as long as it is there; the draft computes by it, too."""
    target = tiny_target("llama", 3)
    before = target.generate(prompts(1)[0], **LENGTH)
    ALL_ATTENTION_FUNCTIONS["sdpa"] = lambda module, query, *args, **kwargs: sdpa_attention_forward(
        module, 1.5 * query, *args, **kwargs
    )
    try:
        plain, found, told, speculation = generate_both(target)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert torch.equal(found, plain)
    assert not told
    assert speculation.acceptance_length > 1.5
    assert torch.equal(target.generate(prompts(1)[0], **LENGTH), before)
    assert not torch.equal(plain, before)


@pytest.mark.parametrize("way", ["without masks", "in place of sdpa"])
def test_attention_that_differs_for_several_tokens(way):
    """Without masks several tokens would not see what stands before them; another one sees less with a single token."""
    target = tiny_target("llama", 3)

    def forgetful(module, query, key, value, *args, **kwargs):
        if query.shape[2] == 1:
            key, value = key[:, :, -8:], value[:, :, -8:]
            args, kwargs = (None, *args[1:]), {**kwargs, "attention_mask": None} if "attention_mask" in kwargs else kwargs
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    if way == "without masks":
        AttentionInterface.register("prism_test", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
        target.set_attn_implementation("prism_test")
    else:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = forgetful
    try:
        plain, found, told, speculation = generate_both(target)
    finally:
        if way != "without masks":
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert torch.equal(found, plain)
    assert speculation.stopped_drafting is not None
    assert any("its attention, or some of its modules, run code of another package" in one for one in told), told


@pytest.mark.parametrize("settings", [{}, {"num_rows": 3}, {"do_sample": True}, {"tree": "auto"}, {"tree": "chain"}, {"vocabulary": 40}])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "zamba2"])
def test_another_default_device(settings, architecture):
    """Numbers of the host are made there, whatever the caller has set."""
    target = build(architecture).eval() if architecture == "zamba2" else tiny_target(architecture, 3)
    input_ids, mask = prompts(settings.get("num_rows", 1))
    draft = tiny_draft(target, draft_vocab_size=settings.get("vocabulary"))
    draft.generation_config.tree = settings.get("tree", "static")
    inputs = {"input_ids": input_ids, "attention_mask": mask, **LENGTH, "do_sample": settings.get("do_sample", False)}
    torch.manual_seed(0)
    plain = target.generate(**inputs)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = target.generate(**inputs, assistant_model=draft)
    assert torch.equal(found, plain)
    assert draft.last_speculation.declined is None


def test_a_class_that_was_typed_in():
    """Its source is in no file, as in a notebook."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_models import *; import torch\n"
        "from transformers import LlamaForCausalLM\n"
        "class Mine(LlamaForCausalLM): pass\n"
        "target = Mine(tiny_target('llama', 3).config).eval(); target.config.ids = torch.tensor([1])\n"
        "inputs = dict(input_ids=prompts(1)[0], max_new_tokens=8, do_sample=False, pad_token_id=PAD_ID)\n"
        "found = target.generate(**inputs, assistant_model=tiny_draft(target))\n"
        "print(torch.equal(found, target.generate(**inputs)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


class Styled(LlamaForCausalLM):
    """Needs an input of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.style = torch.nn.Linear(4, config.vocab_size)

    def forward(self, *args, style=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + linear(style, self.style.weight)[:, None]
        return output


@pytest.mark.parametrize("tree", ["static", "auto"])
def test_a_target_with_an_input_of_its_own(tree):
    target = Styled(tiny_target("llama", 3).config).eval()
    draft = tiny_draft(target)
    draft.generation_config.tree = tree
    plain, found, told, speculation = generate_both(target, draft, style=torch.ones(1, 4))
    assert torch.equal(found, plain)
    assert (speculation.declined is None) == (tree == "static")
    assert tree == "static" or any("Styled refuses (TypeError" in one and 'set tree="static"' in one for one in told), told


class WithoutStates(LlamaForCausalLM):
    """Returns no hidden states, whatever is asked for."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.hidden_states = None
        return output


def test_a_target_that_returns_no_states():
    plain, found, told, speculation = generate_both(WithoutStates(tiny_target("llama", 3).config).eval())
    assert torch.equal(found, plain)
    assert any("of which WithoutStates returns none" in one for one in told), told


@pytest.mark.parametrize("was_full", [False, True])
def test_a_cache_that_records_goes_on_recording(was_full):
    """As behind plain decoding, it can be cropped."""
    target = tiny_target("mistral", 1, sliding_window=6)
    lengths = []
    for draft in (None, tiny_draft(target)):
        cache, text = DynamicCache(config=target.config), prompts(1)[0]
        if was_full:  # what the window has left is gone
            text = target.generate(text, **{CACHE_KEYWORD: cache}, **LENGTH)
        cache.activate_past_recording()
        ids = target.generate(text, assistant_model=draft, **{CACHE_KEYWORD: cache}, **LENGTH)
        lengths.append([cache.layers[0].keys.shape[2]])
        cache.crop(-4)
        lengths[-1] += [cache.layers[0].keys.shape[2], cache.get_seq_length()]
        again = target.generate(ids[:, :-3], **{CACHE_KEYWORD: cache}, **LENGTH)
        lengths[-1].append(again.tolist())
    assert lengths[0] == lengths[1]


class ForgettingLayer(DynamicLayer):
    """Keeps the last keys only."""

    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        self.keys, self.values = keys[:, :, -12:], values[:, :, -12:]
        return keys, values

    def get_seq_length(self):
        return 0 if not self.is_initialized else self.keys.shape[2]


def test_a_cache_with_layers_of_the_callers_own():
    """Nobody knows whether they can be rolled back."""
    target = tiny_target("llama", 3)
    plain = target.generate(prompts(1)[0], **{CACHE_KEYWORD: own_cache(target)}, **LENGTH)
    draft = tiny_draft(target)
    with pytest.warns(UserWarning, match=r"may not roll back \(ForgettingLayer\)"):
        found = target.generate(prompts(1)[0], **{CACHE_KEYWORD: own_cache(target)}, assistant_model=draft, **LENGTH)
    assert torch.equal(found, plain)


def own_cache(target):
    cache = DynamicCache(config=target.config)
    cache.layers = [ForgettingLayer() for _ in range(target.config.num_hidden_layers)]
    return cache


def test_autocast_over_a_long_context():
    """Rotary embeddings are computed in float32 there, values are not."""
    target = tiny_target("llama", 3, max_position_embeddings=8192, num_hidden_layers=2)
    draft = tiny_draft(target)
    draft.generation_config.tree = "static"
    input_ids = torch.randint(3, 97, (1, 4200), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = target.generate(input_ids, assistant_model=draft, **{**LENGTH, "max_new_tokens": 4})
    assert found.shape == (1, 4204)
    assert draft.last_speculation.declined is None




def test_image_tokens_behind_the_vocabulary():
    """Llama 3.2 Vision's image token has an embedding, and no logits."""
    target = build("mllama (image-text)").eval()
    inputs = image_prompt(target)
    vocab_size = target.config.get_text_config().vocab_size
    is_image = inputs["input_ids"] == target.config.image_token_index
    assert is_image.any()
    inputs["input_ids"][is_image] = target.config.image_token_index = vocab_size
    plain = target.generate(**inputs, **LENGTH)
    draft = tiny_draft(target, draft_vocab_size=40)
    assert torch.equal(target.generate(**inputs, assistant_model=draft, **LENGTH), plain)
    assert draft.last_speculation.declined is None
    text_rows = draft.bind(target).text_rows(inputs["input_ids"])
    assert vocab_size not in text_rows.token_ids
