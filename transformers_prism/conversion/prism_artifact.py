"""Drafts in the form of the PRISM authors' PyTorch code, converted to a [`PrismDraftModel`].

A source folder holds `config.json` (`eagle_config` with the numbers of a Llama layer, `num_steps`, `num_step_models`,
`step_mapping`) and its weights in safetensors or a PyTorch file, whole or in shards:

    stepFCs.{m}.weight, .bias       module m's Linear(2D -> D) over [embedding ; hidden]
    stepModels.{m}.{layer}.*        its decoder layers
    fusion_layer.weight, .bias      Linear(3D -> D), absent from checkpoints of the older form
    embed_tokens.weight             a copy of the target's embedding
    layers.*, fc.*                  second names of the module that was active last; their own loader replaces them

Source: the PRISM artifact, commit 3b00014 (`LD/large_drafter.py`, `model/cnets.py`).
"""

import functools
import re

from transformers_prism.conversion.importing import SourceDraft, import_draft, last_state
from transformers_prism.conversion.llama_config import read_llama_config

# Indices into the target's `hidden_states`, fixed in the artifact's code for every target.
FUSED_TARGET_LAYER_IDS = [3, 17, 30]
_ALIAS = re.compile(r"(?:layers\.(?P<layer>\d+)|fc)\.(?P<rest>.+)")
_ROTARY = re.compile(r"(?:stepModels\.\d+|layers)\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read(config: dict, weights: dict) -> SourceDraft:
    """A draft of the PRISM authors' PyTorch code, from its `config.json` and weights; errors as [`import_draft`]."""
    fields = _check_config(config)
    has_fusion_layer = any(name.startswith("fusion_layer.") for name in weights)
    return SourceDraft(
        fields,
        weights,
        _source_name,
        (lambda num_layers: list(FUSED_TARGET_LAYER_IDS)) if has_fusion_layer else last_state,
        needs_embedding=True,
        ignored={name: "derived from config.json" for name in weights if _ROTARY.fullmatch(name)},
        second_names=_second_names(weights),
        hint=_missing_hint(weights),
    )


def _check_config(config: dict) -> dict:
    """Fields of [`PrismConfig`] from their configuration, with the defaults of their code for what may be absent."""
    for name, meaning in (("use_adapter", "step adapters"), ("moe_config", "mixture-of-experts modules")):
        if config.get(name):
            raise ValueError(f"config.json: expected a draft without {meaning}, got {name}={config[name]!r}")
    layer = config.get("eagle_config", config)
    if not isinstance(layer, dict):
        raise ValueError(f"config.json: expected eagle_config to be an object, got {layer!r}")
    absent = [name for name in ("num_steps", "step_mapping") if config.get(name) is None]
    if absent:
        raise ValueError(f"config.json: expected the fields of the authors' form, got none named {absent}")
    if layer.get("rope_scaling") is not None:
        raise ValueError(f"config.json: expected rope_scaling to be null, got {layer['rope_scaling']!r}")
    fields = read_llama_config(layer)
    # The authors' code reads the bias outside eagle_config, so a value in there has no effect.
    fields["projection_bias"] = bool(config.get("bias", True))
    fields["draft_step_to_module"] = _check_mapping(config)
    fields["num_processing_modules"] = num_modules = max(fields["draft_step_to_module"]) + 1
    if config.get("num_step_models", num_modules) != num_modules:
        raise ValueError(
            f"config.json: expected step_mapping to use each of the num_step_models={config['num_step_models']} "
            f"modules, got {config['step_mapping']}"
        )
    return fields


def _check_mapping(config: dict) -> list[int]:
    """`draft_step_to_module` from num_steps and step_mapping; later steps use the last entry, in their code and in ours."""
    num_steps, mapping = config["num_steps"], config["step_mapping"]
    steps = [str(step) for step in range(num_steps)] if type(num_steps) is int and num_steps > 0 else []
    if not steps or not isinstance(mapping, dict) or sorted(mapping) != sorted(steps):
        raise ValueError(
            "config.json: expected step_mapping to name a module for each step 0..num_steps-1, "
            f"got num_steps={num_steps!r} and step_mapping={mapping!r}"
        )
    modules = [mapping[step] for step in steps]
    if any(type(module) is not int or module < 0 for module in modules) or set(modules) != set(
        range(len(set(modules)))
    ):
        raise ValueError(f"config.json: expected step_mapping to use modules 0, 1, ... without a gap, got {mapping}")
    return modules


def _source_name(name: str) -> str:
    """The checkpoint's name for one of our weights."""
    match = re.fullmatch(r"processing_modules\.(\d+)\.(input_projection|layers)\.(.+)", name)
    if match is None:
        return name
    module, part, rest = match.groups()
    return f"stepFCs.{module}.{rest}" if part == "input_projection" else f"stepModels.{module}.{rest}"


def _second_names(weights) -> dict[str, str]:
    """From the names `layers.*` and `fc.*` to those of module 0, whose shapes all modules share."""
    matches = [match for match in map(_ALIAS.fullmatch, weights) if match is not None]
    return {
        match[0]: ("stepFCs.0." if match["layer"] is None else f"stepModels.0.{match['layer']}.") + match["rest"]
        for match in matches
    }


def _missing_hint(weights) -> str:
    if _second_names(weights):
        return (
            " (the file has layers.* and fc.*: either an EAGLE or HASS checkpoint, which is --from eagle, or one saved "
            "without repeating weights that have two names; save the state dict with torch.save instead)"
        )
    return ""


convert = functools.partial(import_draft, read)
