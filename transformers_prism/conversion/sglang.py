"""Drafts in the form of the PRISM authors' port to SGLang, in and out.

`config.json` holds the numbers of a Llama layer. Names:

    fc{m}.weight, .bias          module m's Linear(2D -> D) over [embedding ; hidden], m = 0 and 1
    midlayer.{m}.*               its decoder layer
    fusion_layer.weight, .bias   Linear(3D -> D), absent from drafts that read the last state alone
    embed_tokens.weight          a copy of the target's embedding, if at all

Module 0 reads the committed tokens, module 1 serves every later step, and both share keys and values. SGLang's own field
`eagle_config.eagle_aux_hidden_state_layer_ids` names the layers whose outputs are fused, counted from 0, so that layer i
is the state i + 1 here; without it the three of the authors' PyTorch code are assumed. Experimental.
Source: names as the authors give them for their port; SGLang, `python/sglang/srt/models/llama.py`
(`set_eagle3_layers_to_capture`).
"""

import functools
import re

from transformers_prism.conversion.exporting import (
    Expectations,
    expect_last_state,
    expect_layers_before_the_last,
    export_draft,
)
from transformers_prism.conversion.importing import (
    EXPERIMENTAL,
    SourceDraft,
    import_draft,
    last_state,
)
from transformers_prism.conversion.llama_config import read_llama_config, write_llama_config
from transformers_prism.conversion.prism_artifact import FUSED_TARGET_LAYER_IDS
from transformers_prism.modeling_prism import PrismDraftModel

AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
_MODULE = re.compile(r"(?:fc(\d+)|midlayer\.(\d+))\..+")


def aux_layer_ids(config: dict) -> list[int] | None:
    """Our `target_layer_ids` from SGLang's field, which counts layers from 0, or None if it is absent.

    Raises:
        ValueError: if it is not a list of integers.
    """
    nested = config.get("eagle_config")
    ids = read_layer_list(nested) if isinstance(nested, dict) else None
    return None if ids is None else [layer + 1 for layer in ids]


def read_layer_list(config: dict) -> list[int] | None:
    """The field in which SGLang and vLLM list layers of the target, as it stands, or None if it is absent.

    Raises:
        ValueError: if it is not a list of integers.
    """
    ids = config.get(AUX_LAYERS)
    if ids is not None and (not isinstance(ids, list) or any(type(layer) is not int for layer in ids)):
        raise ValueError(f"config.json: expected {AUX_LAYERS} to list layers, got {ids!r}")
    return ids or None  # ModelOpt writes an empty list for the usual ones


def aux_layer_field(target_layer_ids: list[int]) -> dict:
    """SGLang's field for our `target_layer_ids`."""
    ids = [state - 1 for state in target_layer_ids]
    return {"eagle_config": {"use_aux_hidden_state": True, AUX_LAYERS: ids}}


def read(config: dict, weights: dict) -> SourceDraft:
    """A draft of the PRISM authors' port, from its `config.json` and weights; errors as [`import_draft`]."""
    fields = read_llama_config(config)
    notes = [EXPERIMENTAL]
    modules = {int(match[1] or match[2]) for match in map(_MODULE.fullmatch, weights) if match is not None}
    if fields["num_layers_per_module"] != 1:
        raise ValueError(f"config.json: expected num_hidden_layers to be 1, got {fields['num_layers_per_module']}")
    if modules - {0, 1}:
        raise ValueError(f"expected the modules 0 and 1, which are all that the port calls, got {sorted(modules)}")
    fields["num_processing_modules"] = 2
    fields["projection_bias"] = "fc0.bias" in weights
    has_fusion_layer = "fusion_layer.weight" in weights
    layer_ids = aux_layer_ids(config) if has_fusion_layer else None
    if has_fusion_layer and layer_ids is None:
        layer_ids = FUSED_TARGET_LAYER_IDS
        notes.append(f"target_layer_ids {layer_ids} are assumed, as the authors' PyTorch code has them")
    return SourceDraft(
        fields,
        weights,
        _their_name,
        last_state if layer_ids is None else (lambda num_layers: list(layer_ids)),
        ignored=dict.fromkeys({"lm_head.weight"} & set(weights), "the target's"),
        notes=notes,
    )


def _their_name(name: str) -> str:
    """The checkpoint's name for one of our weights."""
    name = re.sub(r"^processing_modules\.(\d+)\.input_projection\.", r"fc\1.", name)
    return re.sub(r"^processing_modules\.(\d+)\.layers\.0\.", r"midlayer.\1.", name)


def _write(draft: PrismDraftModel, notes: list[str]):
    config = draft.config
    expectations = Expectations("sglang", config)
    expectations.expect("module_form", "prism", "its layers are PRISM's")
    steps = [0, *[1] * max(1, len(config.draft_step_to_module) - 1)]
    why = "the port calls module 0 for committed tokens and module 1 for later steps; expand_modules(draft, 2) makes two of one"
    expectations.expect("draft_step_to_module", steps, why)
    expectations.expect("num_layers_per_module", 1, "a module is one layer there")
    expectations.expect("context_kv", "prefill_module", "its modules share keys and values")
    expectations.expect("draft_vocab_size", None, "there is no field for it")
    expectations.expect("share_target_head", True, "the head is the target's")
    settings = {"architectures": ["LlamaForCausalLMEagle"], **write_llama_config(config)}
    if config.has_fusion_layer:
        expect_layers_before_the_last(expectations)
        settings.update(architectures=["LlamaForCausalLMEagle3"], **aux_layer_field(config.target_layer_ids))
    else:
        expect_last_state(expectations)
    expectations.check()
    notes.append(EXPERIMENTAL)
    notes.append(
        f"architectures is set to {settings['architectures']}, SGLang's class for drafts with such inputs; put there the "
        "name under which your server knows the authors' class"
    )
    return settings, {name: _their_name(name) for name in draft.state_dict()}, {}


convert = functools.partial(import_draft, read)
export = functools.partial(export_draft, _write)
