"""The configuration of a Llama layer, as checkpoints of others carry it in `config.json`, read and written."""

import math

from transformers.activations import ACT2FN

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.conversion.importing import TOKEN_IDS

# Rotary types whose frequencies do not change as a text grows; the other packages' code and ours agree on them.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Settings that change what is computed, and that must be absent unless a form reads them itself.
_ABSENT = (
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "add_para_norm",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "moe_config",
    "use_adapter",
    "quantization_config",
)
_NUMBERS = "vocab_size hidden_size intermediate_size num_attention_heads num_hidden_layers".split()
_FULL_ATTENTION, _SLIDING_ATTENTION = "full_attention", "sliding_attention"


def read_llama_config(config: dict, allowed: tuple[str, ...] = ()) -> dict:
    """Fields of [`PrismConfig`] from the configuration of a Llama layer.

    Args:
        config (`dict`): `config.json`, or the part of it that describes the layer; fields that may be absent have the
            defaults of the EAGLE authors' code.
        allowed (`tuple[str, ...]`): settings that the form reads itself.
    Returns:
        `dict`: the numbers of the layer, the token ids, and `num_hidden_layers` as `num_layers_per_module`.
    Raises:
        ValueError: if fields are missing, or ask for what a draft here cannot compute.
    """
    absent = [name for name in _NUMBERS if config.get(name) is None]
    if absent:
        raise ValueError(f"config.json: expected the fields of a Llama layer, got none named {absent}")
    for name in (*_NUMBERS, "num_key_value_heads", "head_dim", "draft_vocab_size", "target_hidden_size"):
        if type(config.get(name, 1)) not in (int, type(None)) or (config.get(name) or 1) < 1:
            raise ValueError(f"config.json: expected {name} to be a whole number above 0, got {config[name]!r}")
    for name in _ABSENT:
        if config.get(name) and name not in allowed:
            raise ValueError(f"config.json: expected {name} to be absent or false, got {config[name]!r}")
    fields = {
        "num_key_value_heads": config["num_attention_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "target_hidden_size": config["hidden_size"],
    }
    if not isinstance(config.get("hidden_act") or "silu", str) or (config.get("hidden_act") or "silu") not in ACT2FN:
        raise ValueError(f"config.json: expected a hidden_act that transformers knows, got {config['hidden_act']!r}")
    given = {
        name: config[name] for name in (*_NUMBERS, *fields, "head_dim", *TOKEN_IDS) if config.get(name) is not None
    }
    fields.update(given)
    fields["num_layers_per_module"] = fields.pop("num_hidden_layers")
    fields["rope_parameters"] = _read_rope(config)
    fields["sliding_window"] = _read_window(config)
    return fields


def _read_window(config: dict) -> int | None:
    """The sliding window that all layers have, None where none of them has one."""
    num_layers, window = config["num_hidden_layers"], config.get("sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is None:
        # Qwen's configurations may hold a window that is not used; if it is used, the first layers may have none.
        is_used = window and config.get("use_sliding_window", True)
        num_first = config.get("max_window_layers") or 0
        if type(num_first) is not int:
            raise ValueError(f"config.json: expected max_window_layers to be a whole number, got {num_first!r}")
        num_full = min(num_first, num_layers) if is_used else num_layers
        layer_types = [_FULL_ATTENTION] * num_full + [_SLIDING_ATTENTION] * (num_layers - num_full)
    if set(layer_types) <= {_FULL_ATTENTION}:
        return None
    if set(layer_types) != {_SLIDING_ATTENTION}:
        raise ValueError(
            f"config.json: expected layer_types of {_FULL_ATTENTION} or of {_SLIDING_ATTENTION} alone, got {layer_types}"
        )
    if type(window) is not int or window < 1:
        raise ValueError(f"config.json: expected sliding_window to be a whole number above 0, got {window!r}")
    return window


def _read_rope(config: dict) -> dict:
    """Rotary parameters, from the field that transformers 5 writes or from the two older ones."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: expected rope_scaling to be null or an object, got {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"config.json: expected a rotary embedding of type {', '.join(ROPE_TYPES)}, got {rope_type!r}"
        )
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise ValueError(f"config.json: expected partial_rotary_factor to be absent or 1, got {share!r}")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if not _is_above_0(theta):
        raise ValueError(f"config.json: expected rope_theta to be a finite number above 0, got {theta!r}")
    kept = {name: value for name, value in rope.items() if name not in ("type", "rope_type", "rope_theta")}
    factor = kept.get("factor", 1.0)
    if (rope_type != "default" and "factor" not in kept) or not _is_above_0(factor):
        raise ValueError(f"config.json: expected rope_scaling of type {rope_type} with a finite factor above 0, got {rope!r}")
    return {**kept, "rope_type": rope_type, "rope_theta": float(theta)}


def _is_above_0(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def write_llama_config(config: PrismConfig) -> dict:
    """What [`read_llama_config`] reads, for the layers of one processing module.

    Args:
        config (`PrismConfig`): of a draft that passed the checks of the form that is written.
    Returns:
        `dict`: fields of `config.json`.
    """
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta", 10000.0)
    names = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim hidden_act"
    fields = {name: getattr(config, name) for name in names.split()}
    return {
        "model_type": "llama",
        **fields,
        "num_hidden_layers": config.num_layers_per_module,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "max_position_embeddings": config.max_position_embeddings,
        **_window_fields(config),
        "tie_word_embeddings": False,
        **{name: getattr(config, name) for name in TOKEN_IDS},
    }


def _window_fields(config: PrismConfig) -> dict:
    """The fields of a sliding window, none without one."""
    if config.sliding_window is None:
        return {}
    layer_types = [_SLIDING_ATTENTION] * config.num_layers_per_module
    return {"sliding_window": config.sliding_window, "use_sliding_window": True, "layer_types": layer_types}
