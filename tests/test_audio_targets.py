"""Targets that hear: prompts with features of a sound, alone, in a batch, and in a chat that goes on behind it."""

import copy

import pytest
import torch
import transformers
from compatibility_models import SETTINGS, small_config
from compatibility_runs import scripted
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

pytestmark = pytest.mark.usefixtures("one_thread")

AUDIO_ID, NUM_FRAMES = 91, 64
ARGUMENTS = {"max_new_tokens": 14, "pad_token_id": 0, "suppress_tokens": [AUDIO_ID], "return_dict_in_generate": True}
_SHORT = {"audio_config.max_source_positions": NUM_FRAMES // 2}
# The class of a type, its settings, tokens of a sound, and the name of the mask of its frames.
SOUNDS = {
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", _SHORT, 16, "feature_attention_mask"),
    "audioflamingo3": ("AudioFlamingo3ForConditionalGeneration", _SHORT, 16, "input_features_mask"),
    "voxtral": ("VoxtralForConditionalGeneration", {**_SHORT, "audio_config.intermediate_size": 256}, 8, None),
    "qwen2_5_omni_thinker": ("Qwen2_5OmniThinkerForConditionalGeneration", {}, 16, "feature_attention_mask"),
}


def hearing_target(name: str):
    """A tiny target and inputs with a sound."""
    class_name, settings, num_tokens, mask_name = SOUNDS[name]
    config = small_config(CONFIG_MAPPING[name], {**SETTINGS.get(name, {}), **settings})
    target = getattr(transformers, class_name)(config).float().eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in target.parameters():
        noise = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise if parameter.dim() > 1 else parameter.data + noise)
    for part in (target.config, target.config.get_text_config()):
        for field in ("audio_token_id", "audio_token_index"):
            if hasattr(part, field):
                setattr(part, field, AUDIO_ID)
    text = torch.randint(8, 80, (1, 9), generator=generator)
    input_ids = torch.cat((text[:, :4], torch.full((1, num_tokens), AUDIO_ID), text[:, 4:]), dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["input_features"] = torch.randn((1, 128, NUM_FRAMES), generator=generator)
    if mask_name is not None:
        inputs[mask_name] = torch.ones(1, NUM_FRAMES).long()
    return target, inputs


def both(target, inputs, **arguments):
    """Outputs without and with a draft, each of a target of its own."""
    outputs, draft = [], None
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(copy.deepcopy(target).generate(**inputs, assistant_model=draft, **{**ARGUMENTS, **arguments}))
        draft = scripted(target, outputs[0].sequences, inputs["input_ids"].shape[1])
    return outputs


@pytest.mark.parametrize("name", list(SOUNDS))
def test_text_behind_a_sound_is_that_of_plain_decoding(name):
    """Greedy, sampled, two rows, and a second turn in the cache of the first."""
    target, inputs = hearing_target(name)
    rows = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    for given, arguments in ((inputs, {"do_sample": False}), (inputs, {"do_sample": True}), (rows, {"do_sample": False})):
        plain, drafted = both(target, given, **arguments)
        assert torch.equal(plain.sequences, drafted.sequences)
        assert drafted.speculation.acceptance_length > 1.5
    plain, drafted = both(target, inputs, do_sample=False)
    longer = torch.cat((plain.sequences, torch.tensor([[20, 21, 22]])), dim=1)
    texts = []
    for first, draft in ((plain, None), (drafted, scripted(target, longer, longer.shape[1]))):
        more = {"input_ids": longer, "attention_mask": torch.ones_like(longer), CACHE_KEYWORD: cache_of(first)}
        texts.append(target.generate(**more, assistant_model=draft, do_sample=False, **ARGUMENTS).sequences)
    assert torch.equal(*texts)
