"""Whether a draft and an engine of vLLM fit together. Nothing of vLLM is imported here: its configuration is an argument."""

import hashlib
import json
import os
from typing import Any

# Parts of a draft's fingerprint that cannot differ; other weights of the same shape only accept fewer tokens.
_FATAL_PARTS = ("vocab_size", "hidden_size", "num_hidden_layers")
_ALL_PARTS = (*_FATAL_PARTS, "tokenizer_hash", "name", "revision")
# Types of targets whose embedding is scaled by vLLM outside of the layer that drafts share, by sqrt(hidden_size).
_SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text")


def check_engine(vllm_config: Any) -> None:
    """Refuse settings of an engine with which a draft would fail, or be of no use without a sign of it.

    Args:
        vllm_config (`VllmConfig`): of the engine.
    Raises:
        ValueError: listing all of them.
    """
    speculative, reasons = vllm_config.speculative_config, []

    def expect(name: str, is_right: bool, expected: str, got: Any, remedy: str) -> None:
        if not is_right:
            reasons.append(f"{name}: expected {expected}, got {got!r}; {remedy}")

    if speculative is None:
        raise ValueError(
            "expected a PRISM draft as the model of a speculative_config, got it as the model to serve; serve its target "
            'with speculative_config={"method": "eagle3", "model": DRAFT, "num_speculative_tokens": 3}'
        )
    expect("method", speculative.method == "eagle3", "'eagle3'", speculative.method, "set it in speculative_config")
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = getattr(parallel, name)
        expect(name, size == 1, "1, since a draft's modules are not split", size, "start one engine per device")
    is_parallel = speculative.parallel_drafting
    expect("parallel_drafting", not is_parallel, "False, since each draft step reads the one before", is_parallel, "leave it out")
    is_unpadded = speculative.disable_padded_drafter_batch and vllm_config.device_config.device_type == "cpu"
    expect(
        "disable_padded_drafter_batch",
        not is_unpadded,
        "False on a CPU, where vLLM then counts the keys of each draft step twice",
        is_unpadded,
        "leave it out",
    )
    has_lora = vllm_config.lora_config is not None
    expect("enable_lora", not has_lora, "False, since a draft knows the target without adapters", has_lora, "merge the adapter")
    if (graphs := _graphs_of_draft(vllm_config)) is not None:
        expect(
            "CUDA graphs of the draft",
            False,
            "none, since a replayed graph would run the same module in every draft step",
            graphs,
            "set enforce_eager=True, or the environment variable VLLM_USE_V2_MODEL_RUNNER=0",
        )
    if reasons:
        raise ValueError("a PRISM draft cannot be used here: " + "; ".join(reasons))


def _graphs_of_draft(vllm_config: Any) -> str | None:
    """How the engine would capture draft steps into graphs; None if it would not.

    The first model runner captures drafts that are compiled, which ours are not, unless breakable graphs are switched on.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if getattr(mode, "name", mode) in (None, "NONE") or vllm_config.device_config.device_type == "cpu":
        return None
    if vllm_config.use_v2_model_runner:
        return f"the V2 model runner with cudagraph_mode={getattr(mode, 'name', mode)}"
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0").lower() not in ("", "0", "false"):
        return "VLLM_USE_BREAKABLE_CUDAGRAPH=1"
    return None


def check_target(draft: Any, target: Any, name: str, tokenizer: Any = None) -> str | None:
    """Compare a target with the one that a draft was made for, part by part; unknown parts are equal.

    Args:
        draft (`PrismConfig`): with its `target_fingerprint`.
        target (`PreTrainedConfig`): text configuration of the target.
        name (`str`): the target's, on the Hub, or a folder.
        tokenizer (*optional*): the target's.
    Returns:
        `str`: why fewer tokens may be accepted, None if nothing speaks for it.
    Raises:
        ValueError: naming both sides, if the two cannot work together.
    """
    found = {part: getattr(target, part, None) for part in _FATAL_PARTS}
    found["tokenizer_hash"] = None if tokenizer is None else tokenizer_hash(tokenizer)
    found["name"] = None if os.path.exists(name) or name.count("/") != 1 else name
    found["revision"] = getattr(target, "_commit_hash", None) if found["name"] else None
    expected = {**(draft.target_fingerprint or {}), "vocab_size": draft.vocab_size, "hidden_size": draft.target_hidden_size}
    fatal: list[str] = []
    mild: list[str] = []
    for part in _ALL_PARTS:
        if expected.get(part) is None or found[part] is None or expected[part] == found[part]:
            continue
        line = f"{part}: expected {expected[part]!r} (draft), got {found[part]!r} (target)"
        (fatal if part in _FATAL_PARTS else mild).append(line)
    if (num_layers := found["num_hidden_layers"]) is not None and max(draft.target_layer_ids) > num_layers:
        fatal.append(f"target_layer_ids: expected up to {num_layers} (target), got {draft.target_layer_ids} (draft)")
    if fatal:
        raise ValueError("this draft was made for another target. " + "; ".join(fatal))
    if mild:
        return (
            "this draft was trained for other weights; the output stays that of the target, but fewer tokens may be "
            "accepted. " + "; ".join(mild)
        )
    return None


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of a tokenizer's vocabulary, as transformers-prism writes it into a draft's fingerprint."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def embedding_scale(draft: Any, target: Any) -> float:
    """What a draft multiplies the target's shared embeddings by.

    Args:
        draft (`PrismConfig`), target (`PreTrainedConfig`): text configuration of the target.
    """
    if draft.share_target_embedding and target.model_type in _SCALED_EMBEDDINGS:
        return draft.embedding_scale * target.hidden_size**0.5
    return draft.embedding_scale
