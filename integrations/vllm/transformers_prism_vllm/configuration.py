"""The configuration of a PRISM draft as vLLM reads it: config.json of the draft, checked, with the names that vLLM expects."""

from typing import Any

from transformers import PreTrainedConfig

# Fields of config.json that older drafts lack, with their meaning there.
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "context_kv": "prefill_module",
    "draft_step_to_module": None,
    "draft_vocab_size": None,
    "embedding_scale": 1.0,
    "head_dim": None,
    "hidden_act": "silu",
    "logit_scale": 1.0,
    "logit_softcap": None,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "module_form": "prism",
    "normalize_target_hidden": False,
    "num_key_value_heads": None,
    "num_layers_per_module": 1,
    "num_processing_modules": 1,
    "projection_bias": True,
    "query_key_norm": False,
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "share_target_embedding": True,
    "share_target_head": True,
    "sliding_window": None,
    "target_fingerprint": None,
    "target_hidden_size": None,
    "target_norm": "none",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "target_layer_ids")
# Rotary embeddings that vLLM computes as transformers does.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class PrismConfig(PreTrainedConfig):
    """Configuration of a draft for vLLM.

    Args:
        fields: those of the draft's config.json; documented at `PrismConfig` of transformers-prism.
    Raises:
        ValueError: if vLLM could not draft with it as transformers-prism does, listing all reasons.
    """

    model_type = "prism"

    def __init__(self, **fields):
        # transformers also makes one without arguments, to compare with.
        super().__init__(**(vllm_fields(fields) if "hidden_size" in fields else fields))


def vllm_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Complete the fields of a draft's config.json, and add those that vLLM reads.

    Args:
        fields (`dict`): of config.json.
    Returns:
        `dict`: a copy. `num_hidden_layers` counts attentions, which all modules share; each reads and writes one layer of
        keys and values. `eagle_aux_hidden_state_layer_ids` are the states that vLLM collects of the target.
    Raises:
        ValueError: as [`PrismConfig`].
    """
    if missing := [name for name in _REQUIRED if fields.get(name) is None]:
        raise ValueError(f"expected a draft's config.json with {', '.join(_REQUIRED)}, got none of {', '.join(missing)}")
    full = {**_DEFAULTS, **fields}
    if reasons := reasons_against(full):
        raise ValueError("vLLM cannot serve this draft: " + "; ".join(reasons))
    full["num_key_value_heads"] = full["num_key_value_heads"] or full["num_attention_heads"]
    full["head_dim"] = full["head_dim"] or full["hidden_size"] // full["num_attention_heads"]
    full["target_hidden_size"] = full["target_hidden_size"] or full["hidden_size"]
    # A vocabulary of all tokens has weights for their order, too, if it was asked for. The first call knows.
    full.setdefault("has_draft_to_target", full["draft_vocab_size"] is not None)
    full["draft_vocab_size"] = full["draft_vocab_size"] or full["vocab_size"]
    full["draft_step_to_module"] = full["draft_step_to_module"] or list(range(full["num_processing_modules"]))
    full["rope_parameters"] = full["rope_parameters"] or {"rope_type": "default", "rope_theta": 10000.0}
    full["num_hidden_layers"] = full["num_layers_per_module"]
    full["eagle_aux_hidden_state_layer_ids"] = list(full["target_layer_ids"])
    full["tie_word_embeddings"] = False
    return full


def reasons_against(fields: dict[str, Any]) -> list[str]:
    """Why vLLM could not draft with a draft as transformers-prism does; empty if it could.

    Args:
        fields (`dict`): of config.json, complete.
    """
    reasons = []

    def expect(name: str, expected: Any, why: str) -> None:
        if fields[name] != expected:
            reasons.append(f"{name}: expected {expected!r}, got {fields[name]!r} ({why})")

    expect(
        "module_form",
        "prism",
        "for a draft of the form EAGLE-3 `transformers-prism convert --to eagle3` writes what vLLM reads without this plugin",
    )
    expect(
        "context_kv",
        "prefill_module",
        "vLLM keeps one layer of keys and values for all modules; train with context_kv='prefill_module'",
    )
    expect("hidden_act", "silu", "no other activation was tried")
    rope_type = (fields["rope_parameters"] or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        reasons.append(
            f"rope_type: expected one of {', '.join(_ROPE_TYPES)}, got {rope_type!r} (vLLM turns others by other angles)"
        )
    return reasons
