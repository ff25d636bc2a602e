"""PrismConfig: its rules, and what it takes over from a target."""

import json
import re

import pytest
import torch
from compatibility_models import build
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import ARCHITECTURES, generate_twice, prompts, tiny_draft, tiny_target
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, T5Config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.configuration_prism import (
    default_target_layer_ids,
    num_target_layers,
    target_fingerprint,
    target_numerics,
    tokenizer_hash,
)

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected at least 1, got 0"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 4},
            "num_attention_heads: expected a multiple of num_key_value_heads=4, got 6",
        ),
        ({"head_dim": 7}, "head_dim: expected an even number .* got 7"),
        (
            {"num_processing_modules": 2, "draft_step_to_module": [0, 0]},
            r"draft_step_to_module: expected each of 0..1 .* got \[0, 0\]",
        ),
        (
            {"num_processing_modules": 2, "draft_step_to_module": [0, 1, 2]},
            r"draft_step_to_module: expected each of 0..1 .* got \[0, 1, 2\]",
        ),
        ({"target_layer_ids": []}, r"target_layer_ids: expected one or more increasing indices, got \[\]"),
        ({"target_layer_ids": [4, 2]}, r"target_layer_ids: .* got \[4, 2\]"),
        ({"target_layer_ids": [-1, 2]}, r"target_layer_ids: expected indices of at least 0, got \[-1, 2\]"),
        ({"target_hidden_size": 64}, "hidden_size: expected 64, the width of the target.s embedding and head, .* got 512"),
        ({"normalize_target_hidden": True}, "normalize_target_hidden: expected False .* got True"),
        ({"draft_vocab_size": 40000}, r"draft_vocab_size: expected None or 1..32000 \(vocab_size\), got 40000"),
        ({"logit_softcap": 0.0}, "logit_softcap: expected None or a positive number, got 0.0"),
        ({"sliding_window": 0}, r"sliding_window: expected None \(no window\) or at least 1 position, got 0"),
        ({"target_fingerprint": {"colour": 1}}, r"target_fingerprint: expected the parts .* got \['colour'\]"),
        (
            {
                "target_layer_ids": [1, 2],
                "target_hidden_size": 256,
                "share_target_embedding": False,
                "share_target_head": False,
            },
            "hidden_size: expected a value other than .* got 512",
        ),
    ],
)
def test_contradictions_say_what_was_expected_and_found(settings, message):
    """Every rule that joins fields."""
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        PrismConfig(**settings)


@pytest.mark.parametrize("settings", [{"vocab_size": "many"}, {"context_kv": "both"}, {"module_form": "eagle4"}])
def test_fields_have_types(settings):
    """And a closed set of words where there is one."""
    with pytest.raises(StrictDataclassFieldValidationError, match="expected"):
        PrismConfig(**settings)


def test_steps_beyond_the_map_use_its_last_module():
    """Step 0 is the prefill."""
    config = PrismConfig(num_processing_modules=2, draft_step_to_module=[0, 1, 1])
    assert [config.module_of_step(step) for step in range(6)] == [0, 1, 1, 1, 1, 1]
    assert PrismConfig(num_processing_modules=3).draft_step_to_module == [0, 1, 2]


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (1, [1]),
        (2, [1]),
        (3, [1, 2]),
        (4, [1, 2, 3]),
        (6, [1, 3, 5]),
        (8, [3, 5, 6]),
        (30, [3, 16, 28]),
        (32, [3, 17, 30]),
    ],
)
def test_default_target_layers(num_layers, expected):
    """Low, middle, high; 32 layers give those of the paper's artifact."""
    assert default_target_layer_ids(num_layers) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_target_serves_any_decoder_only_target(architecture):
    """The draft that it describes can be built and bound; overrides win."""
    target = tiny_target(architecture)
    config = PrismConfig.from_target(target, num_processing_modules=3, draft_vocab_size=50)
    assert config.hidden_size == config.target_hidden_size == target.config.hidden_size
    assert config.target_layer_ids == [1, 2, 3]
    assert config.normalize_target_hidden
    assert config.eos_token_id == target.config.eos_token_id
    assert (config.num_processing_modules, config.draft_vocab_size) == (3, 50)
    PrismDraftModel(config).bind(target)
    assert PrismConfig.from_target(target.config).hidden_size == config.hidden_size


def test_from_target_refuses_an_encoder_decoder():
    """Before anything is built."""
    with pytest.raises(ValueError, match="expected a decoder-only target, got the encoder-decoder model type 't5'"):
        PrismConfig.from_target(T5Config())


def test_numerics_of_targets_that_scale():
    """gemma caps, granite divides and multiplies, cohere multiplies."""
    assert target_numerics(tiny_target("gemma2").config)["logit_softcap"] == 30.0
    granite = target_numerics(tiny_target("granite").config)
    assert (granite["embedding_scale"], granite["logit_scale"]) == (3.0, 0.5)
    assert target_numerics(tiny_target("cohere").config)["logit_scale"] == 0.5


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("falcon_h1", {"lm_head_multiplier": 0.02}),
        ("hyperclovax", {"logits_scaling": 0.25}),
        ("muse_glimmer", {}),
        ("muse_spark", {}),
        ("inkling_text", {}),
        ("xlstm", {}),
        ("recurrent_gemma", {}),
        ("aya_vision", {}),
        ("cohere2_vision", {}),
        ("hyperclovax_vision_v2", {}),
        ("nanochat", {}),
    ],
    ids=str,
)
def test_numerics_give_the_logits_of_the_target(case, settings):
    """Which training aims at: another scale or soft-cap is another distribution."""
    if case not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {case}")
    target = build(case, settings)
    output = target(input_ids=torch.tensor([[5, 60, 7, 31]]), output_hidden_states=True)
    draft = PrismDraftModel(PrismConfig.from_target(target)).eval().bind(target)
    torch.testing.assert_close(draft.compute_target_logits(output.hidden_states[-1]), output.logits, atol=1e-5, rtol=1e-5)


def test_a_model_around_a_scaled_text_model_has_a_head_that_does_not_scale():
    """As LLaVA-NeXT around Granite, whose configuration says that Granite's own head would."""
    sizes = {name: value for name, value in tiny_target("granite").config.to_dict().items() if name != "logits_scaling"}
    config = CONFIG_MAPPING["llava_next"](text_config={**sizes, "logits_scaling": 8.0}, vision_config={"model_type": "clip_vision_model"})
    assert target_numerics(config.get_text_config())["logit_scale"] == 1 / 8
    assert target_numerics(config)["logit_scale"] == 1.0
    assert target_numerics(config)["embedding_scale"] == 3.0


def test_a_saved_config_has_only_known_keys(tmp_path):
    """Unknown keys pass silently through transformers, so the file is compared with the fields."""
    config = PrismConfig.from_target(tiny_target())
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved) - {"model_type", "transformers_version"} <= set(PrismConfig.__dataclass_fields__)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, PrismConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_a_fingerprint_names_no_folder(tmp_path, monkeypatch):
    """A path says nothing on another machine."""
    config = tiny_target().config
    for name, expected in (("org/model", "org/model"), ("./here", None), ("/somewhere/model", None), ("", None)):
        config._name_or_path = name
        assert target_fingerprint(config)["name"] == expected
    # A folder without a slash in its path looks like a name on the Hub.
    (tmp_path / "target").mkdir()
    monkeypatch.chdir(tmp_path)
    config.name_or_path = "target"
    assert target_fingerprint(config)["name"] is None
    config.name_or_path = "other"
    assert target_fingerprint(config)["name"] == "other"


def test_a_tokenizer_hash_depends_on_words_and_ids_alone():
    """Not on the order in which a vocabulary lists them."""

    class Words:
        def __init__(self, **words):
            self.words = words

        def get_vocab(self):
            return self.words

    assert tokenizer_hash(Words(a=0, b=1)) == tokenizer_hash(Words(b=1, a=0))
    assert tokenizer_hash(Words(a=0, b=1)) != tokenizer_hash(Words(a=1, b=0))


def decoder_only_configs():
    """A configuration with default values of every type that a causal or an image-text model of transformers has."""
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            yield model_type, CONFIG_MAPPING[model_type]()
        except (ValueError, StrictDataclassClassValidationError):  # none by default
            continue


def test_from_target_knows_every_type_of_transformers():
    """Or says what was expected and found; the drafts can be built, and have as many weights as was counted."""
    refused = {}
    num_types = 0
    for model_type, target_config in decoder_only_configs():
        num_types += 1
        try:
            config = PrismConfig.from_target(target_config)
        except ValueError as error:
            refused[model_type] = str(error)
            continue
        with torch.device("meta"):
            draft = PrismDraftModel(config)
        assert config.num_matrix_weights == sum(weight.numel() for weight in draft.parameters() if weight.dim() == 2)
    assert num_types > 250
    assert all(re.fullmatch("(?s).*expected .* got .*", message) for message in refused.values())
    # None of these has one decoder for text.
    others = {name for name, message in refused.items() if "the encoder-decoder model type" not in message}
    assert others == {"blt", "pi0"}


def test_from_target_counts_the_weights_of_either_form():
    """With modules of several layers, a head and an embedding of its own, and a draft vocabulary."""
    for form in ("prism", "eagle3"):
        own = {"share_target_embedding": False, "share_target_head": False, "draft_vocab_size": 50}
        config = PrismConfig.from_target(tiny_target().config, module_form=form, num_layers_per_module=3, **own)
        draft = PrismDraftModel(config)
        numbers = sum(weight.numel() for weight in draft.parameters() if weight.dim() == 2) + 50
        assert config.num_matrix_weights == numbers


def test_from_target_of_layers_that_differ():
    """What the first one has: gemma 4's head dimension is another one where attention is global."""
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    target_config = CONFIG_MAPPING["gemma4_text"](head_dim=16, global_head_dim=32, **layers)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = target_config.head_dim
    assert PrismConfig.from_target(target_config).head_dim == 16


_SHORT, _LONG = [1.0 + 0.1 * pair for pair in range(4)], [4.0 + pair for pair in range(4)]
SCALED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 24,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 24, "short_factor": _SHORT, "long_factor": _LONG},
}


@pytest.mark.parametrize("rope_type", SCALED)
def test_a_draft_turns_by_the_angles_of_its_target(rope_type, tmp_path):
    """Scaled rotary embeddings reach the draft, within the original length and beyond it, also when it was saved."""
    rope = {"rope_type": rope_type, "rope_theta": 5e4, **SCALED[rope_type]}
    # Phi-3 has the original length in a field of its own.
    own = ("phi3", {"original_max_position_embeddings": 24}) if rope_type == "longrope" else ("llama", {})
    target = tiny_target(own[0], rope_parameters=rope, max_position_embeddings=96, **own[1])
    config = PrismConfig.from_target(target)
    assert config.rope_parameters["rope_type"] == rope_type
    config.save_pretrained(tmp_path)
    draft = PrismDraftModel(PrismConfig.from_pretrained(tmp_path))
    for length in (20, 120):  # dynamic and longrope change beyond a length
        positions = torch.arange(length)[None]
        states = torch.zeros(1, length, config.hidden_size)
        found, expected = draft.rotary_emb(states, positions), target.model.rotary_emb(states, positions)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    plain = PrismDraftModel(PrismConfig.from_target(target, rope_parameters=None))
    assert not torch.equal(plain.rotary_emb(states, positions)[0], found[0])


def test_factors_of_longrope_that_do_not_fit_a_draft_leave_the_base():
    """There is one for each pair of numbers that turns: fewer where a target turns a part of its heads."""
    rope = {"rope_type": "longrope", "rope_theta": 5e4, **SCALED["longrope"], "partial_rotary_factor": 0.5}
    rope.update(short_factor=_SHORT[:2], long_factor=_LONG[:2])
    target = tiny_target("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    assert PrismConfig.from_target(target).rope_parameters == {"rope_type": "default", "rope_theta": 5e4}


def test_from_target_without_special_tokens():
    """They are the target's, and may be none."""
    config = PrismConfig.from_target(CONFIG_MAPPING["molmo2"]())
    assert (config.bos_token_id, config.pad_token_id) == (None, None)


def small_config(model_type: str, **sizes):
    """A configuration that a model can be built of at once."""
    common = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 2}
    return CONFIG_MAPPING[model_type](**{**common, "eos_token_id": None, **sizes})


LAYERS = {
    "longcat_flash": {
        **{"num_layers": 3, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "moe_topk": 2},
        **{"zero_expert_num": 0, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
        **{"v_head_dim": 8, "head_dim": 8, "qk_head_dim": 16},
    },
    "bart": {"encoder_layers": 1, "decoder_layers": 3, "decoder_ffn_dim": 64, "is_encoder_decoder": False},
    "prophetnet": {
        **{"num_encoder_layers": 1, "num_decoder_layers": 3, "num_decoder_attention_heads": 4, "decoder_ffn_dim": 64},
        **{"num_encoder_attention_heads": 4, "encoder_ffn_dim": 64, "is_encoder_decoder": False, "is_decoder": True},
    },
    "opt": {"num_hidden_layers": 3, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "llama": {"num_hidden_layers": 3, "intermediate_size": 64},
}


@pytest.mark.parametrize("model_type", LAYERS)
def test_layers_are_counted_as_the_target_returns_them(model_type):
    """Not as attentions, two in each layer of longcat, nor as layers of an encoder that is not there."""
    target = AutoModelForCausalLM.from_config(small_config(model_type, **LAYERS[model_type])).eval()
    with torch.no_grad():
        states = target(torch.tensor([[5, 6, 7]]), output_hidden_states=True, use_cache=False).hidden_states
    assert num_target_layers(target.config.get_text_config()) == len(states) - 1 == 3
    config = PrismConfig.from_target(target)
    assert config.target_fingerprint["num_hidden_layers"] == 3
    assert config.target_layer_ids == default_target_layer_ids(3)


def test_looped_layers_are_counted_at_every_pass():
    """A target that runs some of its layers several times returns a state of each."""
    target_config = PreTrainedConfig()
    target_config.num_hidden_layers, target_config.total_num_hidden_layers = 6, 10
    assert num_target_layers(target_config) == 10


@pytest.mark.parametrize("num_layers", [2, 4])
@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_targets_with_narrow_embeddings_are_drafted_for(num_layers, draft_vocab_size):
    """The draft is as narrow as the embedding and the head that it shares."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": num_layers, "word_embed_proj_dim": 16, "ffn_dim": 64, "init_std": 0.3}
    target = AutoModelForCausalLM.from_config(small_config("opt", **sizes)).eval()
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    config = draft.config
    assert (config.hidden_size, config.target_hidden_size, config.target_embedding_size) == (16, 32, 16)
    assert draft.lm_head is draft.embed_tokens is None
    assert PrismConfig.from_target(target.config).to_dict() == PrismConfig.from_target(target).to_dict()
    ids, _ = prompts(1)
    plain, drafted, _ = generate_twice(target, draft, ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(plain, drafted)
    assert draft.last_speculation.declined is None


def test_targets_with_embeddings_of_two_widths_share_the_head_alone():
    """The draft is as wide as the head."""
    sizes = {"num_hidden_layers": 3, "intermediate_size": 64, "is_decoder": True}
    sizes |= {"input_embedding_size": 16, "output_embedding_size": 48}
    target = AutoModelForCausalLM.from_config(small_config("rembert", **sizes)).eval()
    draft = tiny_draft(target)
    assert (draft.config.hidden_size, draft.config.share_target_embedding) == (48, False)
    ids, _ = prompts(1)
    plain, drafted, _ = generate_twice(target, draft, ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_processing_modules": 10**9},
        {"num_processing_modules": 10**9, "draft_step_to_module": [0]},
        {"num_layers_per_module": 10**9},
        {"hidden_size": 10**9},
        {"intermediate_size": 10**12},
        {"num_attention_heads": 10**9, "head_dim": 8},
        {"head_dim": 10**12},
        {"vocab_size": 10**15, "share_target_head": False},
        {"vocab_size": 10**15, "draft_vocab_size": 10**15},
    ],
)
def test_sizes_of_no_draft_are_refused(sizes):
    """Without a list or a tensor of that size."""
    with pytest.raises(StrictDataclassClassValidationError, match="expected .*at most .*got "):
        PrismConfig(**sizes)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("[]", "got a list"),
        ('"x"', "got a str"),
        ("null", "got content that is not a configuration"),
        ("7", "got content that is not a configuration"),
        ("{", "got no JSON"),
        ("", "got no JSON"),
        ("[" * 100_000, "got content that is not a configuration"),
        ("{}", "got None"),
        ('{"model_type": "llama"}', "got 'llama'"),
        ('{"model_type": ["prism"]}', r"got \['prism'\]"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path, content, found):
    """By what it is."""
    (tmp_path / "config.json").write_text(content)
    for kind in (PrismConfig, PrismDraftModel):
        with pytest.raises(ValueError, match=f"expected a config.json of model type 'prism', {found}"):
            kind.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        PrismConfig.from_pretrained(tmp_path / "nowhere")
