"""The forms of drafts that can be read and written, and [`load_draft`], which takes any of them.

| form | holds |
|---|---|
| `prism` | drafts of this package |
| `prism-artifact` | PRISM and HASS drafts of the PRISM authors' PyTorch code |
| `sglang` | PRISM drafts of the authors' port to SGLang |
| `eagle` | EAGLE-1, EAGLE-2, HASS |
| `eagle3` | EAGLE-3 of SafeAILab, SpecForge, SGLang and vLLM |
| `speculators` | EAGLE-3 of the library speculators |
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from transformers_prism.conversion import eagle, eagle3, prism_artifact, sglang, speculators
from transformers_prism.conversion.checkpoint import checkpoint_folder, read_config
from transformers_prism.conversion.importing import SourceDraft, about_source, form_of, read_draft, target_config_of
from transformers_prism.modeling_prism import PrismDraftModel

READ = {
    "prism-artifact": prism_artifact,
    "sglang": sglang,
    "eagle": eagle,
    "eagle3": eagle3,
    "speculators": speculators,
}
WRITTEN = {name: form for name, form in READ.items() if hasattr(form, "export")}
_logger = logging.get_logger("transformers_prism")


def load_draft(
    source: str | Path,
    target: PreTrainedModel | str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    num_target_layers: int | None = None,
) -> PrismDraftModel:
    """A draft of any form that is known, ready for `target.generate(assistant_model=draft)`.

    What was read and assumed is logged in one line; all of it is in `draft.conversion_report`, which is None for a draft
    of this package.

    Args:
        source (`str` or `Path`): folder, or name on the Hub.
        target (`PreTrainedModel`, or its folder or name, *optional*): the model that the draft is for. The draft is
            compared with it. If the target is loaded, the draft is also moved to its device, cast to its dtype and bound to it.
        dtype (`torch.dtype` or its name, *optional*): of the draft's weights; by default a loaded target's, else the file's.
        num_target_layers (`int`, *optional*): decoder layers of the target; needed if the states that a draft reads depend
            on it and `target` is not given.
    Returns:
        `PrismDraftModel`: in evaluation mode.
    Raises:
        ValueError: if the form is unknown, naming what was looked for; if weights are missing, unknown or of another
            shape; if the draft was made for another target.
    """
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"dtype: expected the name of a dtype of torch, got {dtype!r}")
        dtype = found
    if read_config(source).get("model_type") == "prism":
        draft, report = PrismDraftModel.from_pretrained(str(source)), None
        if isinstance(target, (str, Path)):
            _compare(draft, target_config_of(target))
    else:
        folder = checkpoint_folder(source)
        draft, report = read_draft(_read_any, folder, target, num_target_layers=num_target_layers)
        draft.about = about_source(source, folder, report.notes)
        states = f"it reads the states {draft.config.target_layer_ids} of the target"
        _logger.warning("; ".join([f"{source}: {report.notes[0]}", states, *report.notes[1:]]))
    draft.conversion_report = report
    draft = draft.eval() if dtype is None else draft.to(dtype).eval()
    if target is None or isinstance(target, (str, Path)):
        return draft
    draft = draft.to(draft.device if target.device.type == "meta" else target.device, dtype or target.dtype)
    return draft.bind(target)


def _compare(draft: PrismDraftModel, target_config) -> None:
    """Check a draft of ours against a target's configuration, as binding it to the loaded target would."""
    fatal, mild = draft.config.target_differences(target_config)
    if fatal:
        raise ValueError("; ".join(fatal))
    for line in mild:
        _logger.warning("%s; fewer tokens may be accepted", line)


def _read_any(config: dict, weights: dict) -> SourceDraft:
    form = form_of(config, weights)
    theirs = READ[form].read(config, weights)
    theirs.notes.insert(0, f"read as a draft of the form {form}")
    return theirs
