"""EAGLE-3 drafts in the format of the library speculators, in and out.

`config.json` holds `speculators_model_type: "eagle3"`, the numbers of the layer in `transformer_layer_config` (a Llama or
Qwen3 layer, fields at their defaults left out), `draft_vocab_size`, `norm_before_residual`, `norm_before_fc`, `fc_norm`,
`norm_output`, `eagle_aux_hidden_state_layer_ids` as indices into `hidden_states`, and the target in
`speculators_config.verifier`. Weights are named as in `eagle3`, the first layer `layers.0`.
Source: speculators 0.9, `models/eagle3` and `config.py`.
"""

import functools

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from transformers_prism.conversion.eagle3 import (
    SETTINGS,
    TRIED,
    expect_eagle3,
    names_in,
    read_eagle3,
    vocabulary_tables,
)
from transformers_prism.conversion.exporting import Expectations, export_draft
from transformers_prism.conversion.importing import SPECULATORS_TYPE, SourceDraft, import_draft
from transformers_prism.conversion.llama_config import write_llama_config
from transformers_prism.conversion.sglang import AUX_LAYERS
from transformers_prism.modeling_prism import PrismDraftModel

_LAYER_CONFIG, _LAYER_TYPES = "transformer_layer_config", ("llama", "qwen3")
VERSION = "0.9.0"


def read(config: dict, weights: dict) -> SourceDraft:
    """A draft of the library speculators, from its `config.json` and weights; errors as [`import_draft`]."""
    if config.get(SPECULATORS_TYPE) != "eagle3":
        raise ValueError(
            f"config.json: expected {SPECULATORS_TYPE} to be 'eagle3', got {config.get(SPECULATORS_TYPE)!r}"
        )
    layer = config.get(_LAYER_CONFIG)
    if not isinstance(layer, dict):
        raise ValueError(f"config.json: expected {_LAYER_CONFIG} to be an object, got {layer!r}")
    layer = {"model_type": "qwen3", **layer}
    if layer["model_type"] not in _LAYER_TYPES:
        raise ValueError(
            f"config.json: expected {_LAYER_CONFIG} of model_type {' or '.join(_LAYER_TYPES)}, got {layer['model_type']!r}"
        )
    try:  # the file omits values that equal the class's defaults
        whole = AutoConfig.for_model(**layer).to_dict()
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {_LAYER_CONFIG}: {error}") from error
    names = (*SETTINGS, "draft_vocab_size", "quantization_config", "target_hidden_size", AUX_LAYERS)
    given = {name: config[name] for name in names if config.get(name) is not None}
    theirs = read_eagle3({**whole, **given}, weights)
    speculation = config.get("speculators_config") or {}
    verifier = (isinstance(speculation, dict) and speculation.get("verifier")) or {}
    if not isinstance(speculation, dict) or not isinstance(verifier, dict):
        raise ValueError(f"config.json: expected speculators_config and its verifier to be objects, got {speculation!r}")
    name = verifier.get("name_or_path") or ""
    theirs.target_name = name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else None
    theirs.target_architectures = verifier.get("architectures") or []
    # Used in training only, or copies of the target's weights.
    for weight in ("verifier_norm.weight", "verifier_lm_head.weight"):
        if weight in weights:
            theirs.ignored[weight] = "the target's"
    return theirs


def _write(draft: PrismDraftModel, notes: list[str]):
    config = draft.config
    expectations = Expectations("speculators", config)
    expect_eagle3(expectations)
    same_width = "its fc reads states as wide as the draft"
    expectations.expect("target_hidden_size", config.hidden_size, same_width)
    expectations.check(allowed=(*SETTINGS, "target_norm", "query_key_norm", "sliding_window", "share_target_embedding"))
    layer = write_llama_config(config)
    rope_scaling = layer.pop("rope_scaling") or {"rope_type": "default"}
    layer["rope_parameters"] = {**rope_scaling, "rope_theta": layer.pop("rope_theta")}
    layer["model_type"] = "qwen3" if config.query_key_norm else "llama"
    layer.update(attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    name = (config.target_fingerprint or {}).get("name")
    notes.append(TRIED)
    notes.append(f"the target is named {name}, as the draft's fingerprint has it")
    greedy = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    settings = {
        "architectures": ["Eagle3DraftModel"],
        SPECULATORS_TYPE: "eagle3",
        "speculators_version": VERSION,
        _LAYER_CONFIG: layer,
        "draft_vocab_size": config.num_draft_tokens,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.target_norm == "joint",
        "fc_norm": config.target_norm == "each",
        "norm_output": config.norm_output,
        "target_hidden_size": None,
        AUX_LAYERS: config.target_layer_ids,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {"name_or_path": name, "architectures": []},
        },
        "tie_word_embeddings": False,
    }
    return settings, names_in(draft, "layers.0."), {} if config.draft_vocab_size is None else vocabulary_tables(draft)


convert = functools.partial(import_draft, read)
export = functools.partial(export_draft, _write)
