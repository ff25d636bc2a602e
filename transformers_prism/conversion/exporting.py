"""What all conversions of a [`PrismDraftModel`] into another form share: refuse drafts that the form cannot hold, write.

Each form has a file of its own, which says what it expects of a draft and how weights and `config.json` are written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.conversion.checkpoint import read_weight_ending_with
from transformers_prism.conversion.importing import (
    EMBEDDING,
    ConversionReport,
    check_destination,
    embedding_factor,
    write_whole,
)
from transformers_prism.conversion.llama_config import ROPE_TYPES
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.whole_files import write_json

# Settings that no form of a server can store: field, value that it must have, why.
_EXPECTED_BY_ALL = (
    ("attention_bias", False, "their layers have no such bias"),
    ("mlp_bias", False, "their layers have no such bias"),
    ("hidden_act", "silu", "their layers know no other"),
    ("share_target_embedding", True, "servers lend the draft the target's embedding"),
    ("embedding_scale", 1.0, "there is no field for it"),
    ("logit_scale", 1.0, "there is no field for it"),
    ("logit_softcap", None, "there is no field for it"),
    ("normalize_target_hidden", False, "their fusion layer reads the target's states as they are"),
    ("target_norm", "none", "only the form speculators has it"),
    ("query_key_norm", False, "only the form speculators has it"),
    ("sliding_window", None, "only the form speculators has it, as sliding_window and layer_types"),
    ("norm_before_residual", False, "only the form speculators has it"),
    ("norm_output", False, "only the form speculators has it"),
)


@dataclass
class Expectations:
    """What a form demands of a draft, checked all at once.

    Args:
        form (`str`): its name, for the error.
        config (`PrismConfig`): of the draft.
    """

    form: str
    config: PrismConfig
    broken: list[str] = field(default_factory=list)

    def expect(self, name: str, expected, why: str, found=None) -> None:
        """Note a contradiction if the configuration's `name`, or `found` if given, is not `expected`."""
        found = getattr(self.config, name) if found is None else found
        if found != expected:
            self.broken.append(f"{name}: expected {expected!r} ({why}), got {found!r}")

    def check(self, allowed: tuple[str, ...] = ()) -> None:
        """Raise an error if any contradiction was noted.

        Args:
            allowed (`tuple[str, ...]`): fields that most forms cannot store, but this one can.
        Raises:
            ValueError: listing all contradictions.
        """
        for name, expected, why in _EXPECTED_BY_ALL:
            if name not in allowed:
                self.expect(name, expected, why)
        rope_type = (self.config.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            self.broken.append(
                f"rope_type: expected {', '.join(ROPE_TYPES)} (what both sides know), got {rope_type!r}"
            )
        if self.broken:
            raise ValueError(f"the form {self.form} cannot hold this draft: " + "; ".join(self.broken))


def export_draft(
    write: Callable[[PrismDraftModel, list[str]], tuple[dict, dict[str, str], dict[str, torch.Tensor]]],
    source: str | Path,
    destination: str | Path,
    target: str | Path | None = None,
) -> ConversionReport:
    """Convert a draft of ours into another form; what it computes stays the same.

    Args:
        write (`Callable`): the form's writer. It takes a draft and the list of notes, which it may extend, and returns
            `config.json`, the form's names of weights by ours, and weights that the form needs in addition, by name.
        source (`str` or `Path`): the draft: folder or name on the Hub.
        destination (`str` or `Path`): folder to write; must be empty or missing. It appears complete or not at all.
        target (`str` or `Path`, *optional*): folder or Hub name of the target, whose embedding is written with the
            draft's weights; servers take the target's own, but the EAGLE authors' code wants it in the file.
    Returns:
        `ConversionReport`: which weight was written under which name.
    Raises:
        ValueError: if the form cannot hold the draft, saying why, or `destination` is not empty. Nothing is written
            then.
    """
    destination = Path(destination).resolve()
    check_destination(destination)
    draft = PrismDraftModel.from_pretrained(str(source))
    notes: list[str] = []
    settings, names, extra = write(draft, notes)
    weights = {theirs: draft.state_dict()[ours].contiguous() for ours, theirs in names.items()}
    weights.update(extra)
    weights.update(_embedding(draft, target, notes))
    settings["torch_dtype"] = str(draft.dtype).removeprefix("torch.")

    def save(folder: Path) -> None:
        folder.mkdir()
        write_json(folder / "config.json", settings)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    write_whole(destination, save)
    matched = [(ours, theirs, tuple(weights[theirs].shape)) for ours, theirs in names.items()]
    return ConversionReport(Path(source), destination, ["draft"], draft.config, draft.dtype, matched, {}, notes)


def _embedding(draft: PrismDraftModel, target, notes: list[str]) -> dict[str, torch.Tensor]:
    if draft.embed_tokens is not None:
        return {}
    if target is None:
        notes.append(
            f"{EMBEDDING} is left out, since no target was given: SGLang and vLLM take the target's, the EAGLE authors' "
            "own code wants it in the file; name the target to have checked that it scales no embeddings, as Gemma does"
        )
        return {}
    if (factor := embedding_factor(target) * draft.config.embedding_scale) != 1.0:
        raise ValueError(
            f"target: expected one whose embedding is read as it is in its file, got {target}, which the draft reads times {factor:g}; "
            "there is no field for it"
        )
    embedding = read_weight_ending_with(str(target), EMBEDDING)
    expected = (draft.config.vocab_size, draft.config.target_hidden_size)
    if embedding is None or tuple(embedding.shape) != expected:
        found = "none" if embedding is None else list(embedding.shape)
        raise ValueError(f"target: expected an {EMBEDDING} of shape {list(expected)} in {target}, got {found}")
    return {EMBEDDING: embedding.to(draft.dtype).contiguous()}


def expect_last_state(expectations: Expectations) -> None:
    """Servers give a draft without a fusion layer the target's last state."""
    config = expectations.config
    last = (config.target_fingerprint or {}).get("num_hidden_layers") or config.target_layer_ids[-1]
    expectations.expect("target_layer_ids", [last], "servers hand over the last state alone, and there is no fusion layer")


def expect_layers_before_the_last(expectations: Expectations) -> None:
    """Servers give a draft the outputs of layers, but not the state after the final norm, nor the embedding."""
    config = expectations.config
    num_layers = (config.target_fingerprint or {}).get("num_hidden_layers")
    ids = config.target_layer_ids
    if ids[0] < 1 or (num_layers is not None and ids[-1] >= num_layers):
        last = "the number of layers" if num_layers is None else num_layers
        expectations.broken.append(
            f"target_layer_ids: expected indices from 1 to below {last} (servers hand over the outputs of layers, before "
            f"the final norm), got {ids}"
        )
