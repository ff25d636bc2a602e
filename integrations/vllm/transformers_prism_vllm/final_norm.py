"""The weights of a target's final norm, for drafts that read its last state: vLLM hands that state over before the norm."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open

# Saved with a draft by transformers-prism: what the norm multiplies by.
SAVED_NAME = "target_final_norm"
# Targets with an RMSNorm at the end, by what it multiplies by: its weight, or one plus its weight.
_PLAIN = (
    "apertus arcee gemma4 gemma4_text gpt_oss granite granitemoe llama ministral mistral mixtral olmo2 olmo3 phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3"
).split()
_ONE_PLUS = "gemma gemma2 gemma3 gemma3_text qwen3_5 qwen3_5_text qwen3_next".split()
_WEIGHTS = ("model.norm.weight", "norm.weight", "language_model.model.norm.weight", "model.language_model.norm.weight")
_REMEDY = "save the draft again with transformers-prism after draft.bind(target), which stores the norm with it"


def read_final_norm(target: str, revision: str | None, config: Any) -> torch.Tensor:
    """What the final norm of a target multiplies by, from its files.

    Args:
        target (`str`): a folder, or a name on the Hub.
        revision (`str`, *optional*): on the Hub.
        config (`PreTrainedConfig`): text configuration of the target.
    Returns:
        `torch.FloatTensor` of shape `(D,)`.
    Raises:
        ValueError: if it cannot be had there, saying what to do.
    """
    if config.model_type not in _PLAIN + _ONE_PLUS:
        raise ValueError(
            f"expected a target whose final norm is known to be an RMSNorm, got one of type {config.model_type!r}; {_REMEDY}"
        )
    weight = _read_weight(target, revision).float()
    if weight.shape != (config.hidden_size,):
        raise ValueError(f"expected a final norm of {config.hidden_size} numbers, got shape {tuple(weight.shape)} in {target}")
    return 1 + weight if config.model_type in _ONE_PLUS else weight


def _read_weight(target: str, revision: str | None) -> torch.Tensor:
    """The first of `_WEIGHTS` that the safetensors files of a model hold."""
    index = _file(target, revision, "model.safetensors.index.json")
    if index is not None:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        name = next((name for name in _WEIGHTS if name in files), None)
        path = None if name is None else _file(target, revision, files[name])
    else:
        path = _file(target, revision, "model.safetensors")
    if path is not None:
        with safe_open(path, "pt") as tensors:
            names = set(tensors.keys())
            if (found := next((name for name in _WEIGHTS if name in names), None)) is not None:
                return tensors.get_tensor(found)
    raise ValueError(f"expected safetensors files with one of {', '.join(_WEIGHTS)} in {target}, got none; {_REMEDY}")


def _file(target: str, revision: str | None, name: str) -> Path | None:
    """A file of a model, on this machine after the call; None if the model has none of this name."""
    if Path(target).is_dir():
        path = Path(target, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(target, name, revision=revision))
    except EntryNotFoundError:
        return None
