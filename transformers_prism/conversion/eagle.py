"""Drafts of EAGLE-1, EAGLE-2 and HASS, which are one processing module, in and out.

`config.json` holds the numbers of a Llama layer. Names:

    fc.weight, .bias         Linear(2D -> D) over [embedding ; hidden]; some checkpoints have no bias
    layers.{layer}.*         decoder layers, the first without a norm before its attention; with `qkv_bias` in
                             `config.json` (for Qwen2) queries, keys and values have a bias
    embed_tokens.weight      a copy of the target's embedding, if at all

The draft reads the target's last state, after the final norm. SGLang and vLLM read this layout. Experimental.
Source: SafeAILab/EAGLE, `eagle/model/cnets1.py`; SGLang, `python/sglang/srt/models/llama_eagle.py`; vLLM,
`vllm/model_executor/models/llama_eagle.py`.
"""

import functools
import re

import torch

from transformers_prism.conversion.exporting import Expectations, expect_last_state, export_draft
from transformers_prism.conversion.importing import (
    EXPERIMENTAL,
    SourceDraft,
    import_draft,
    last_state,
)
from transformers_prism.conversion.llama_config import read_llama_config, write_llama_config
from transformers_prism.modeling_prism import PrismDraftModel

_ROTARY = re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# SGLang's name of its class, then vLLM's; each takes the one that it knows.
ARCHITECTURES = ["LlamaForCausalLMEagle", "EagleLlamaForCausalLM"]


def read(config: dict, weights: dict) -> SourceDraft:
    """An EAGLE-1, EAGLE-2 or HASS draft, from its `config.json` and weights; errors as [`import_draft`]."""
    fields = read_llama_config({**config, "qkv_bias": None})
    fields["projection_bias"] = "fc.bias" in weights
    notes = [EXPERIMENTAL]
    if config.get("qkv_bias"):
        fields["attention_bias"] = True
        notes.append("qkv_bias: the output projection, which has no bias there, gets one of zeros")
        for layer in range(fields["num_layers_per_module"]):
            query_bias = weights.get(f"layers.{layer}.self_attn.q_proj.bias", torch.empty(0))
            zeros = torch.zeros(fields["hidden_size"], dtype=query_bias.dtype)
            weights.setdefault(f"layers.{layer}.self_attn.o_proj.bias", zeros)
    ignored = {name: "derived from config.json" for name in weights if _ROTARY.fullmatch(name)}
    ignored.update(dict.fromkeys({"lm_head.weight"} & set(weights), "the target's"))
    return SourceDraft(fields, weights, _their_name, last_state, ignored=ignored, notes=notes)


def _their_name(name: str) -> str:
    """The checkpoint's name for one of our weights."""
    return name.removeprefix("processing_modules.0.").replace("input_projection.", "fc.")


def _write(draft: PrismDraftModel, notes: list[str]):
    config = draft.config
    expectations = Expectations("eagle", config)
    expectations.expect("module_form", "prism", "its layers are EAGLE's; EAGLE-3 drafts go to the form eagle3")
    expectations.expect("num_processing_modules", 1, "it has one set of parameters for all steps")
    expect_last_state(expectations)
    expectations.expect("draft_vocab_size", None, "there is no field for it")
    expectations.expect("share_target_head", True, "the head is the target's")
    expectations.check()
    notes.append(EXPERIMENTAL)
    extra = {}
    if config.projection_bias:
        notes.append(
            "fc.bias: vLLM's class has none and leaves it out, so that it may accept fewer tokens than SGLang"
        )
    else:
        # SGLang's class has a bias, which would keep random values.
        extra["fc.bias"] = torch.zeros(config.hidden_size, dtype=draft.dtype)
        notes.append("fc.bias is written as zeros, since SGLang's class has one")
    settings = {"architectures": ARCHITECTURES, **write_llama_config(config)}
    return settings, {name: _their_name(name) for name in draft.state_dict()}, extra


convert = functools.partial(import_draft, read)
export = functools.partial(export_draft, _write)
