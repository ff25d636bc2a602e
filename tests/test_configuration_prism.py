"""PrismConfig: its rules, and what it takes over from a target."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from tiny_models import ARCHITECTURES, tiny_target
from transformers import AutoConfig, T5Config

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.configuration_prism import (
    default_target_layer_ids,
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
        ({"target_fingerprint": {"colour": 1}}, r"target_fingerprint: expected the parts .* got \['colour'\]"),
        (
            {
                "target_layer_ids": [1, 2],
                "target_hidden_size": 256,
                "share_target_embedding": False,
                "share_target_head": False,
            },
            "hidden_size: expected another number than .* got 512",
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


def test_a_saved_config_has_only_known_keys(tmp_path):
    """Unknown keys pass silently through transformers, so the file is compared with the fields."""
    config = PrismConfig.from_target(tiny_target())
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert set(saved) - {"model_type", "transformers_version"} <= set(PrismConfig.__dataclass_fields__)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, PrismConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_a_fingerprint_names_no_folder():
    """A path says nothing on another machine."""
    config = tiny_target().config
    for name, expected in (("org/model", "org/model"), ("./here", None), ("/somewhere/model", None), ("", None)):
        config._name_or_path = name
        assert target_fingerprint(config)["name"] == expected


def test_a_tokenizer_hash_depends_on_words_and_ids_alone():
    """Not on the order in which a vocabulary lists them."""

    class Words:
        def __init__(self, **words):
            self.words = words

        def get_vocab(self):
            return self.words

    assert tokenizer_hash(Words(a=0, b=1)) == tokenizer_hash(Words(b=1, a=0))
    assert tokenizer_hash(Words(a=0, b=1)) != tokenizer_hash(Words(a=1, b=0))
