"""Decode with the draft of this repository and nothing else to load:

    model.generate(**inputs, custom_generate="user/draft", trust_remote_code=True)

transformers copies this file alone, so it imports nothing of its repository and loads the draft as any user would.
"""

import inspect
import sys
from types import FrameType

from transformers import AutoModel, GenerationMixin

_HUB_ARGUMENTS = ("cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "token")
# Where a target keeps the drafts that were loaded for it: they go when it goes.
_DRAFTS = "_prism_drafts"


def generate(model, assistant_model=None, **kwargs):
    """`model.generate` with a draft.

    Args:
        model (`PreTrainedModel`): the target.
        assistant_model (`PreTrainedModel`, *optional*): the draft; loaded from this repository if absent, once for
            each target.
        kwargs: the other arguments of generate(), and those that choose a revision on the Hub.
    Returns:
        What `model.generate` returns.
    Raises:
        ValueError: if no draft is given and this repository cannot be told, or the draft is none of PRISM.
    """
    hub_arguments = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
    draft = assistant_model if assistant_model is not None else _own_draft(model, hub_arguments)
    if draft.config.model_type != "prism":
        raise ValueError(f"assistant_model: expected a PRISM draft, got {type(draft).__name__}")
    # generate() hands over its own arguments, absent ones as None. A setting of the caller may be None to say so.
    own = (*_HUB_ARGUMENTS, *inspect.signature(GenerationMixin.generate).parameters)
    arguments = {name: value for name, value in kwargs.items() if value is not None or name not in own}
    return type(model).generate(model, assistant_model=draft, **arguments)


def _own_draft(model, hub_arguments: dict):
    repository = _calling_repository()
    # What is offloaded seems to be on "meta".
    device = "cpu" if model.device.type == "meta" else model.device
    key = (repository, str(hub_arguments), str(model.dtype), str(device))
    drafts = vars(model).setdefault(_DRAFTS, {})
    if key not in drafts:
        loaded = AutoModel.from_pretrained(repository, trust_remote_code=True, dtype=model.dtype, **hub_arguments)
        drafts[key] = loaded.to(device).eval()
    return drafts[key]


def _calling_repository() -> str:
    """The string that the calling generate() was given; transformers does not hand it over."""
    # No argument tells it: the repository stands in a local variable of generate() alone.
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        repository = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(repository, str):
            return repository
        frame = frame.f_back
    raise ValueError(
        "expected to be called by model.generate(custom_generate=...), got another caller; pass the draft as "
        "assistant_model"
    )
