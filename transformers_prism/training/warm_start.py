"""Start a draft from the weights of another: split a trained module into several, or train an older draft further.

Checkpoints of others (EAGLE-2, HASS, PRISM, EAGLE-3) can be used once `transformers-prism convert` has converted them.
Each module is copied from the source's module for its first draft step, so M modules made from one initially compute
the same as that one.
"""

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.modeling_prism import PrismDraftModel

# Fields that do not change the shapes of weights, but change what they were trained for.
_MEANING = (
    "target_layer_ids normalize_target_hidden context_kv sliding_window rope_parameters rms_norm_eps logit_scale".split()
)


@dataclass
class WarmStartReport:
    """What a warm start did; `str()` gives a readable report.

    `matched` names weights of the new draft and where their values come from, `initial` those that keep their initial
    values and why, `unused` those of the source that nothing was taken from, `notes` settings in which the two drafts
    differ.
    """

    matched: dict[str, str] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"matched {len(self.matched)} weights" + (":" if self.matched else ""),
                *(f"  {name} <- {origin}" for name, origin in self.matched.items()),
                f"initial values in {len(self.initial)} weights" + (":" if self.initial else ""),
                *(f"  {name}: {why}" for name, why in self.initial.items()),
                f"unused {len(self.unused)} weights of the source" + (":" if self.unused else ""),
                *(f"  {name}" for name in self.unused),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def with_modules(config: PrismConfig, num_modules: int) -> PrismConfig:
    """A new configuration of the same architecture with `num_modules` processing modules. If that changes their number,
    each of the first draft steps gets its own module."""
    changes: dict = {}
    if num_modules != config.num_processing_modules:
        changes = {"num_processing_modules": num_modules, "draft_step_to_module": list(range(num_modules))}
    return PrismConfig.from_dict({**config.to_dict(), **changes})


def expand_modules(draft: PrismDraftModel, num_modules_or_config: int | PrismConfig) -> PrismDraftModel:
    """A draft with more processing modules, each a copy of the one that served its first draft step. Give their number M,
    or a configuration of the same architecture with more modules, if steps are to share modules in another way.

    The new draft has the dtype, device and generation settings of the old one. It is bound to no target and shares no
    tensors with the old one. Its first M steps compute the same as the old draft's.

    Raises:
        ValueError: if there would be fewer modules, or the configuration describes other weights, listing them.
    Source: PRISM (arXiv:2602.01762), which splits a trained module before its second training stage.
    """
    if isinstance(num_modules_or_config, int):
        num_modules = num_modules_or_config
    else:
        num_modules = num_modules_or_config.num_processing_modules
    if num_modules < draft.config.num_processing_modules:
        raise ValueError(
            f"num_modules: expected at least the draft's {draft.config.num_processing_modules}, got {num_modules}"
        )
    config = num_modules_or_config
    if isinstance(config, int):
        config = with_modules(draft.config, num_modules)
    if config.draft_vocab_size != draft.config.draft_vocab_size:
        raise ValueError(
            f"draft_vocab_size: expected the draft's, {draft.config.draft_vocab_size}, got {config.draft_vocab_size}"
        )
    expanded = PrismDraftModel(config).to(device=draft.device, dtype=draft.dtype)
    if draft.draft_to_target is not None:
        expanded.draft_to_target.copy_(draft.draft_to_target)
    report = warm_start(expanded, draft)
    if report.unused:
        raise ValueError(f"expected the configuration to have every weight of the draft, missing: {report.unused}")
    expanded.generation_config = copy.deepcopy(draft.generation_config)
    return expanded.train(draft.training)


@torch.no_grad()
def warm_start(draft: PrismDraftModel, source: PrismDraftModel, fresh: Collection[str] = ()) -> WarmStartReport:
    """Fill a new draft with the weights of another draft.

    Modules are paired by draft steps, everything else by name. A bias that the source lacks becomes zero, which computes
    the same. Rows of the draft's own head are paired by target token, since vocabularies may differ; the draft
    vocabulary itself stays the new draft's.

    Args:
        draft (`PrismDraftModel`): new; written to in place, in its own dtype, once everything has been found to fit.
        source (`PrismDraftModel`): trained; not changed.
        fresh (`Collection[str]`): parts of the new draft that keep their initial values, by the first word of the names
            of their weights, such as "fusion_layer" or "lm_head".
    Returns:
        `WarmStartReport`: what came from where, and what did not.
    Raises:
        ValueError: if a weight that is not `fresh` has no counterpart, or one of another shape, listing all of them;
            or if `fresh` names a part that the draft does not have.
    """
    state, theirs = draft.state_dict(), source.state_dict()
    parts = {name.split(".")[0] for name in state}
    if set(fresh) - parts:
        raise ValueError(f"fresh: expected parts of the draft, {sorted(parts)}, got {sorted(set(fresh) - parts)}")
    if draft.config.module_form != source.config.module_form:
        raise ValueError(
            f"module_form: expected the source's, {source.config.module_form!r}, got {draft.config.module_form!r}"
        )
    report = WarmStartReport(notes=_differences(draft.config, source.config))
    origins, problems = {}, []
    for name, tensor in state.items():
        origin = _name_in_source(name, draft.config, source.config)
        if name == "draft_to_target":
            continue
        if name.split(".")[0] in fresh:
            report.initial[name] = "asked for"
        elif origin not in theirs and name.endswith(".bias"):
            report.matched[name] = "zeros, since the source has no bias"
        elif origin not in theirs:
            problems.append(f"{name} (the source has none)")
        elif name == "lm_head.weight" and tensor.shape[1] == theirs[origin].shape[1]:
            counts = f"{len(_shared_tokens(draft, source)[0])} of {draft.config.num_draft_tokens} rows"
            report.matched[name] = f"{name}, {counts}; the others keep their initial values"
            origins[name] = origin
        elif tensor.shape != theirs[origin].shape:
            problems.append(f"{name} (shape {list(tensor.shape)}, the source's {list(theirs[origin].shape)})")
        else:
            report.matched[name] = origin
            origins[name] = origin
    if problems:
        raise ValueError(
            "expected a weight of the source for every weight of the draft, or its part among `fresh`, got none for "
            + ", ".join(problems)
        )
    for name in report.matched:
        if name == "lm_head.weight":
            _copy_head_rows(draft, source)
        elif name in origins:
            state[name].copy_(theirs[origins[name]])
        else:
            state[name].zero_()
    report.unused = sorted(set(theirs) - set(origins.values()) - {"draft_to_target"})
    return report


def _name_in_source(name: str, config: PrismConfig, source: PrismConfig) -> str:
    """The weight that a weight of the new draft starts from: that of the module which served the same draft step."""
    match = re.fullmatch(r"processing_modules\.(\d+)\.(.+)", name)
    if match is None:
        return name
    first_step = config.draft_step_to_module.index(int(match[1]))
    return f"processing_modules.{source.module_of_step(first_step)}.{match[2]}"


def _differences(config: PrismConfig, source: PrismConfig) -> list[str]:
    notes = [
        f"{name}: {getattr(source, name)!r} in the source, {getattr(config, name)!r} here"
        for name in _MEANING
        if getattr(source, name) != getattr(config, name)
    ]
    ours, theirs = config.target_fingerprint or {}, source.target_fingerprint or {}
    for part in ("name", "revision", "tokenizer_hash"):
        if None not in (ours.get(part), theirs.get(part)) and ours[part] != theirs[part]:
            notes.append(f"the source's target has {part} {theirs[part]!r}, this one's {ours[part]!r}")
    return notes


def _shared_tokens(draft: PrismDraftModel, source: PrismDraftModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the two drafts' own heads that stand for the same token of the target, `(R,)` each."""
    row_in_source = torch.full((draft.config.vocab_size,), -1, dtype=torch.long)
    known = _tokens(source)
    row_in_source[known] = torch.arange(len(known))
    rows = row_in_source[_tokens(draft)]
    return (rows >= 0).nonzero().flatten(), rows[rows >= 0]


def _tokens(draft: PrismDraftModel) -> torch.Tensor:
    if draft.draft_to_target is not None:
        return draft.draft_to_target.cpu()
    return torch.arange(draft.config.vocab_size)


def _copy_head_rows(draft: PrismDraftModel, source: PrismDraftModel) -> None:
    rows, source_rows = _shared_tokens(draft, source)
    ours, theirs = (one.get_parameter("lm_head.weight") for one in (draft, source))
    ours[rows.to(ours.device)] = theirs[source_rows.to(theirs.device)].to(ours)
