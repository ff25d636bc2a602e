"""What a target, its cache and its inputs allow: trees, a chain, or plain decoding with a true reason; never another text."""

import functools
import math
import warnings

import pytest
import torch
from compatibility_models import build
from compatibility_runs import scripted
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_draft, tiny_target
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    FalconConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    StaticCache,
    XGLMConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_prism.decoding.chain_target import ChainTarget
from transformers_prism.decoding.target_support import (
    RotarySwitch,
    image_layers,
    layer_windows,
    place_of_state,
    reason_against_inputs,
    reason_against_layers,
    rotary_switches,
    states_to_ask_for,
    why_no_tree_mask,
)
from transformers_prism.transformers_names import CACHE_KEYWORD

SMALL = {"vocab_size": 97, "pad_token_id": PAD_ID, "bos_token_id": 2, "eos_token_id": None, "initializer_range": 0.3}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


def small_model(kind, **settings):
    """A random model of a configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(kind(**SMALL, tie_word_embeddings=False, **settings)).float().eval()


def decoded(target, num_rows: int = 1, length: int = 9, num_new_tokens: int = 40, **arguments):
    """Plain output, drafted output and what drafting was."""
    input_ids, mask = prompts(num_rows, length)
    arguments = {"attention_mask": mask, "do_sample": False, "pad_token_id": PAD_ID, **arguments}
    arguments["max_new_tokens"] = num_new_tokens
    plain = target.generate(input_ids, **arguments)
    draft = scripted_draft(target, plain, length)
    target(input_ids[:, :3])  # dynamic frequencies of a long text stay for the next one, unless it is short
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drafted = target.generate(input_ids, assistant_model=draft, **arguments)
    assert torch.equal(plain, drafted)
    messages = [str(one.message) for one in caught if "draft" in str(one.message)]
    return draft.last_speculation, messages


ROTARY = {
    "dynamic": {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "longrope": {
        "max_position_embeddings": 96,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [9.0, 5.0, 3.0, 2.0],
            "original_max_position_embeddings": 24,
        },
    },
}


@pytest.mark.parametrize(
    ("config", "kind"), [(LlamaConfig, "dynamic"), (LlamaConfig, "longrope"), (Phi3Config, "longrope")]
)
@pytest.mark.parametrize("length", [9, 22, 23, 24, 25, 30])
def test_frequencies_of_the_longest_position(config, kind, length):
    """Across their switch at 24 tokens and on either side of it, with trees where all nodes see plain decoding's; phi3 reads
    its whole text anew there."""
    settings = dict(ROTARY[kind])
    if config is Phi3Config:
        settings["original_max_position_embeddings"] = 24
    target = small_model(config, **WIDTHS, num_key_value_heads=2, intermediate_size=64, **settings)
    speculation, _ = decoded(target, length=length)
    assert speculation.declined is None
    depths = [tree.num_steps for tree in speculation.trees]
    assert 0 in depths or kind == "longrope" and length > 23
    assert max(depths) > 0 or kind == "dynamic" and length > 20
    # A second, short call finds the frequencies as plain decoding leaves them.
    decoded(target, length=9, num_new_tokens=8)


@pytest.mark.parametrize("kind", list(ROTARY))
def test_a_batch_that_passes_a_rotary_switch_is_decoded_plainly(kind):
    """Rows reach it at different times; one that stays below is drafted for."""
    target = small_model(LlamaConfig, **WIDTHS, num_key_value_heads=2, intermediate_size=64, **ROTARY[kind])
    speculation, messages = decoded(target, num_rows=3)
    assert "rotary frequencies change at 24" in speculation.declined
    assert len(messages) == 1
    assert speculation.declined in messages[0]
    speculation, _ = decoded(target, num_rows=3, num_new_tokens=10)
    assert speculation.declined is None


def test_rotary_switches_say_how_deep_trees_may_be():
    """The deepest node's text may be as long as the switch, and no longer."""
    longrope = rotary_switches(LlamaConfig(**WIDTHS, **ROTARY["longrope"]))
    assert longrope == [RotarySwitch(24, True)]
    assert [longrope[0].max_depth(position) for position in (0, 22, 23, 24, 25)] == [23, 1, 0, 0, math.inf]
    assert rotary_switches(LlamaConfig(**WIDTHS, **ROTARY["dynamic"])) == [RotarySwitch(24, False)]
    assert RotarySwitch(24, False).max_depth(24) == 0
    assert rotary_switches(LlamaConfig(**WIDTHS)) == []


def test_local_attention_over_places_is_a_chain():
    """gpt_neo's windows count places in the cache; beyond one, trees would see other keys."""
    settings = {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 12}
    target = small_model(GPTNeoConfig, hidden_size=32, intermediate_size=64, max_position_embeddings=128, **settings)
    speculation, messages = decoded(target, length=20)
    assert speculation.target == "chain"
    assert "local attention" in speculation.why_no_tree
    assert len(messages) == 1
    assert speculation.acceptance_length > 1.3
    # Said once for a target.
    assert not decoded(target, length=20)[1]
    assert decoded(target, num_rows=3)[0].target == "chain"


def test_alibi_is_a_chain():
    """Falcon makes its biases of a mask of two dimensions, whatever positions it is given."""
    target = small_model(FalconConfig, **WIDTHS, alibi=True, new_decoder_architecture=False)
    speculation, _ = decoded(target)
    assert speculation.target == "chain"
    assert "alibi" in speculation.why_no_tree
    assert decoded(small_model(FalconConfig, **WIDTHS, alibi=False))[0].target == "tree"


def test_a_model_without_a_cache_is_decoded_plainly():
    """openai-gpt reads the whole text in every step, whatever use_cache says."""
    target = small_model(OpenAIGPTConfig, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    speculation, messages = decoded(target, num_new_tokens=12)
    assert "whole text" in speculation.declined or "cache" in speculation.declined
    assert "use_cache=False" not in speculation.declined
    assert len(messages) == 1


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_activations_scaled_over_a_forward_are_decoded_plainly():
    """torch's dynamic quantization: what a token gets depends on the others beside it."""
    target = torch.ao.quantization.quantize_dynamic(tiny_target("llama", 3), {torch.nn.Linear})
    input_ids, mask = prompts(1)
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD_ID}
    plain = target.generate(input_ids, **arguments)
    draft = tiny_draft(target)
    with pytest.warns(UserWarning, match="gives a token another output when other tokens"):
        assert torch.equal(target.generate(input_ids, assistant_model=draft, **arguments), plain)


def test_embeddings_narrower_than_states_draft():
    """As opt-350m's."""
    target = small_model(OPTConfig, **WIDTHS, ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=128)
    speculation, _ = decoded(target)
    assert speculation.declined is None
    assert speculation.acceptance_length > 1.3


@pytest.mark.parametrize("num_rows", [1, 3])
def test_ids_of_other_integers(num_rows):
    """int32, as some tokenizers and data loaders give."""
    target = tiny_target("llama", 3)
    input_ids, mask = prompts(num_rows)
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD_ID}
    plain = target.generate(input_ids.int(), **arguments)
    drafted = target.generate(input_ids.int(), assistant_model=tiny_draft(target), **arguments)
    assert plain.dtype == drafted.dtype
    assert torch.equal(plain, drafted)


def test_train_mode():
    """With gradient checkpointing or dropout decoded plainly, saying what to do; else drafted for."""
    target = tiny_target("llama", 3).train()
    assert decoded(target)[0].declined is None
    name = "activation_checkpointing_enable"  # of 5.24; of 5.23 its older name
    getattr(target, name if hasattr(target, name) else "gradient_checkpointing_enable")()
    input_ids, mask = prompts(1)
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD_ID}
    draft = tiny_draft(target)
    with pytest.warns(UserWarning, match=r"gradient checkpointing .* call target.eval\(\)"):
        target.generate(input_ids, assistant_model=draft, **arguments)
    target = tiny_target("llama", 3, attention_dropout=0.5).train()
    with pytest.warns(UserWarning, match=r"dropout or jitter .* call target.eval\(\)"):
        target.generate(input_ids, assistant_model=tiny_draft(target), **arguments)


def test_parts_in_train_mode():
    """A submodule's dropout draws although the target itself is in eval mode; so does a router's jitter."""
    target = tiny_target("llama", 3, attention_dropout=0.5).eval()
    target.model.layers[0].self_attn.train()
    input_ids, _ = prompts(1)
    arguments = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD_ID}
    draft = tiny_draft(target)
    with pytest.warns(UserWarning, match=r"dropout or jitter .* call target.eval\(\)"):
        target.generate(input_ids, assistant_model=draft, **arguments)
    assert "dropout" in draft.last_speculation.declined


def test_an_own_function_called_sdpa_computes_rounds_too():
    """Who registered one wants its results."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own = sdpa_attention_forward
    AttentionInterface.register("sdpa", lambda module, query, *args, **kwargs: own(module, 1.5 * query, *args, **kwargs))
    try:
        speculation, _ = decoded(tiny_target("llama", 3))
    finally:
        AttentionInterface.register("sdpa", before)
    assert speculation.declined is None
    assert speculation.acceptance_length > 1.3


def test_positions_without_a_table():
    """Sinusoids grow with the text, beyond max_position_embeddings."""
    settings = {"num_layers": 2, "attention_heads": 4, "max_position_embeddings": 20, "init_std": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings |= {"vocab_size": 97, "d_model": 32, "ffn_dim": 64, "pad_token_id": PAD_ID, "eos_token_id": None}
        config = XGLMConfig(**settings, tie_word_embeddings=False)
        target = AutoModelForCausalLM.from_config(config).float().eval()
    assert decoded(target)[0].declined is None
    decoded(target, length=30)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_positions_that_a_model_shifts(num_rows, monkeypatch):
    """As paligemma does, which counts them from 1; told apart on a table of positions."""
    target = tiny_target("gpt2", 3)
    prepare = target.prepare_inputs_for_generation

    def shifted(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return {**inputs, "position_ids": inputs["position_ids"] + 1}

    monkeypatch.setattr(target, "prepare_inputs_for_generation", shifted)
    assert decoded(target, num_rows=num_rows)[0].acceptance_length > 1.3


def test_padding_is_no_position():
    """A prompt may have more columns than a table has positions, as long as its tokens fit."""
    target = tiny_target("gpt2", 3, n_positions=20)
    input_ids, mask = prompts(1)
    pads = torch.zeros(1, 15, dtype=torch.long)
    arguments = {"attention_mask": torch.cat((pads, mask), dim=1), "do_sample": False, "pad_token_id": PAD_ID}
    padded = torch.cat((pads, input_ids), dim=1)
    plain = target.generate(padded, max_new_tokens=6, **arguments)
    draft = tiny_draft(target)
    assert torch.equal(target.generate(padded, max_new_tokens=6, assistant_model=draft, **arguments), plain)


def test_a_window_of_one_is_decoded_plainly():
    """Caches of transformers keep all positions for it."""
    assert "sliding window of 1" in decoded(tiny_target("mistral", 3, sliding_window=1))[0].declined


def test_images_belong_to_the_prompt():
    """They reach the prefill and no round."""
    text = {**SMALL, **WIDTHS, "num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": False}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=LlamaConfig(**text),
        image_token_index=96,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        target = LlavaForConditionalGeneration(config).float().eval()
    input_ids, _ = prompts(1)
    input_ids = torch.cat((input_ids[:, :3], torch.full((1, 4), 96), input_ids[:, 3:]), dim=1)
    arguments = {"pixel_values": torch.randn(1, 3, 28, 28), "do_sample": False, "pad_token_id": PAD_ID}
    arguments |= {"max_new_tokens": 16, "suppress_tokens": [96], "attention_mask": torch.ones_like(input_ids)}
    plain = target.generate(input_ids, **arguments)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **arguments), plain)
    assert draft.last_speculation.declined is None


def test_a_caller_s_static_cache_that_is_too_short_is_refused():
    """As plain decoding does, beside a batch, too."""
    target = tiny_target("llama", 3)
    input_ids, mask = prompts(3)
    cache = StaticCache(config=target.config, max_cache_len=input_ids.shape[1] + 5)
    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "pad_token_id": PAD_ID}
    draft = tiny_draft(target)
    with pytest.raises(ValueError, match="room for the next token"):
        target.generate(input_ids, assistant_model=draft, **{CACHE_KEYWORD: cache}, **arguments)
    assert int(cache.get_seq_length()) == 0


def test_attention_without_tree_masks_is_told_once():
    """A chain is drafted, and the warning says which attention would take trees."""
    AttentionInterface.register("other_attention", sdpa_attention_forward)
    AttentionMaskInterface.register("other_attention", sdpa_mask)
    target = tiny_target("llama", 3)
    target.set_attn_implementation("other_attention")
    assert "other_attention" in why_no_tree_mask(target)
    speculation, messages = decoded(target)
    assert speculation.target == "chain"
    assert "other_attention" in speculation.why_no_tree
    assert [message for message in messages if 'attn_implementation="sdpa"' in message]
    assert not decoded(target)[1]


def test_inference_mode():
    """Calls in it, a chat begun in it and continued outside, and static caches of either kind."""
    target = tiny_target("mistral", 3)
    input_ids, _ = prompts(1)
    arguments = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD_ID, "return_dict_in_generate": True}
    for static in (False, True):
        outputs = []
        for assistant in ({}, {"assistant_model": tiny_draft(target)}):
            cache = StaticCache(config=target.config, max_cache_len=128) if static else DynamicCache(config=target.config)
            with torch.inference_mode():
                first = target.generate(input_ids, **{CACHE_KEYWORD: cache}, **assistant, **arguments)
            text = torch.cat((first.sequences.clone(), input_ids[:, :3]), dim=1)
            with torch.inference_mode(static):
                outputs.append(target.generate(text, **{CACHE_KEYWORD: cache}, **assistant, **arguments).sequences)
        assert torch.equal(*outputs)


def test_a_chain_that_fails_leaves_the_caller_s_cache(monkeypatch):
    """Before the prompt is read, while it is read, and in a round; states of convolutions included."""
    settings = {"layer_types": ["conv", "full_attention"] * 2, "num_key_value_heads": 2, "intermediate_size": 64}
    target = small_model(Lfm2Config, **WIDTHS, **settings)
    input_ids, _ = prompts(1)
    arguments = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD_ID}
    cache = DynamicCache(config=target.config)
    begun = target.generate(input_ids, **{CACHE_KEYWORD: cache}, **arguments)
    text = torch.cat((begun, input_ids[:, :4]), dim=1)
    draft = tiny_draft(target)
    before = [{name: value for name, value in vars(layer).items() if name != "device"} for layer in cache.layers]
    copies = [repr(one) for one in before]
    forward = target.forward
    for failing in (0, 1, 3):
        calls = []

        @functools.wraps(forward)
        def fail(*args, calls=calls, failing=failing, **kwargs):
            calls.append(1)
            output = forward(*args, **kwargs)
            if len(calls) > failing:
                raise KeyboardInterrupt
            return output

        monkeypatch.setattr(target, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            target.generate(text, assistant_model=draft, **{CACHE_KEYWORD: cache}, **arguments)
        monkeypatch.undo()
        after = [{name: value for name, value in vars(layer).items() if name != "device"} for layer in cache.layers]
        assert [repr(one) for one in after] == copies
    expected = target.generate(text, **arguments)
    found = target.generate(text, assistant_model=draft, **{CACHE_KEYWORD: cache}, **arguments)
    assert torch.equal(expected, found)
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)


def test_layer_windows_are_keyed_as_masks_are():
    """One tensor, or one for each kind of layer; none where a kind has no tree mask."""
    assert layer_windows(Phi3Config(**WIDTHS, sliding_window=None)) in ({None: None}, {"full_attention": None})
    assert layer_windows(Lfm2Config(**WIDTHS, layer_types=["conv"] * 4)) is None


@pytest.mark.quick
def test_layers_that_hold_something_else_than_the_text_are_named():
    """Cross-attention keeps an image's keys, however many; layers without keys hold nothing."""
    cache, states = DynamicCache(), torch.zeros(1, 1, 5, 2)
    for layer in range(3):
        cache.update(states, states, layer)
    assert reason_against_layers(cache, 5, ()) is None
    assert "layer 0 of its cache holds 5 positions" in reason_against_layers(cache, 6, ())
    of_images = image_layers(LlamaConfig(**WIDTHS, cross_attention_layers=[1]))
    assert "layer 1" in reason_against_layers(cache, 5, of_images)
    assert reason_against_layers(cache, 5, of_images, are_left_alone=True) is None


@pytest.mark.quick
def test_hidden_states_of_skipped_layers_are_those_before_them():
    """Layers 1 and 3 of 4 attend across to an image: without one, a forward returns five states less two."""
    config = LlamaConfig(**{**WIDTHS, "num_hidden_layers": 4}, cross_attention_layers=[1, 3])
    assert [place_of_state(layer, config, 5) for layer in range(5)] == [0, 1, 2, 3, 4]
    assert [place_of_state(layer, config, 3) for layer in range(5)] == [0, 1, 1, 2, 2]
    assert states_to_ask_for([2, 4], config) == [1, 2, 4]
    assert states_to_ask_for([2, 4], LlamaConfig(**WIDTHS)) == [2, 4]


@pytest.mark.quick
def test_inputs_that_are_read_bit_by_bit_are_named():
    """Asking plain decoding for the inputs of a step would take them away from it."""
    inputs = {"input_ids": torch.zeros(1, 1), "sounds": iter([1])}
    assert "reads sounds bit by bit" in reason_against_inputs(inputs, [])
    assert reason_against_inputs({**inputs, "sounds": [1]}, []) is None


@pytest.mark.parametrize("num_rows", [1, 2])
def test_padding_tokens_in_a_text_whose_positions_the_model_counts(num_rows, monkeypatch):
    """Kosmos-2.5 gives them no position of their own: what follows one in the same forward would be at another place."""
    target = build("kosmos-2.5", seed=1)
    input_ids, mask = prompts(num_rows)
    skipped = target.config.get_text_config().pad_token_id

    def say_padding(ids, scores):
        if (ids.shape[1] - input_ids.shape[1]) % 5 == 2:
            scores = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([skipped]), 0.0)
        return scores

    arguments = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24, "logits_processor": [say_padding]}
    plain = target.generate(input_ids=input_ids, **arguments)
    draft = scripted(target, plain, input_ids.shape[1])
    verify, trees = ChainTarget._verify, []

    def noting(self, tree):
        trees.append((tree.token_ids, tree.token_ids.clone()))
        return verify(self, tree)

    monkeypatch.setattr(ChainTarget, "_verify", noting)
    assert torch.equal(target.generate(input_ids=input_ids, assistant_model=draft, **arguments), plain)
    assert num_rows > 1 or draft.last_speculation.acceptance_length > 1.5
    # What was proposed stays what it was.
    assert all(torch.equal(token_ids, before) for token_ids, before in trees)
    assert num_rows > 1 or any(skipped in before[:, :-1] for _, before in trees)
