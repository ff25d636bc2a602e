"""What every conversion into a [`PrismDraftModel`] has in common: pair weights by name, look at the target, write.

Each form of checkpoint has a file of its own, which says how `config.json` and the names are to be read; strictness is
here: a weight that is missing, unknown or of the wrong shape is an error that lists the names.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from transformers_prism.configuration_prism import PrismConfig, target_fingerprint
from transformers_prism.conversion.checkpoint import (
    checkpoint_folder,
    read_json,
    read_weight_ending_with,
    read_weights,
)
from transformers_prism.hub.files import ABOUT, CARD, card_license
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.whole_files import write_json

EXPERIMENTAL = (
    "experimental: no published file of this form could be tried; names and code were read, and round trips tested"
)
EMBEDDING = "embed_tokens.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A weight that only checkpoints of one form have, most telling first.
_TELLING_WEIGHTS = {
    "stepFCs.0.weight": "prism-artifact",
    "fc0.weight": "sglang",
    "midlayer.hidden_norm.weight": "eagle3",
    "layers.0.self_attn.q_proj.weight": "eagle",
}


@dataclass
class ConversionReport:
    """What a conversion did; `str()` of it is for people.

    Args:
        source, destination (`Path`): the folders.
        files (`list[str]`): files of the source that weights were read from.
        config (`PrismConfig`): configuration of our draft.
        dtype (`torch.dtype`): of its weights, the same on both sides.
        matched (`list[tuple]`): name in the source, name in the destination, shape.
        ignored (`dict[str, str]`): names in the source that no weight of the destination comes from, and why.
        notes (`list[str]`): what was assumed or found.
    """

    source: Path
    destination: Path
    files: list[str]
    config: PrismConfig
    dtype: torch.dtype
    matched: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        config = self.config
        width = max(len(name) for name, _, _ in self.matched)
        return "\n".join(
            [
                f"{self.source} ({', '.join(self.files)}) -> {self.destination}",
                f"processing modules: {config.num_processing_modules} of the form {config.module_form!r}, "
                f"draft_step_to_module {config.draft_step_to_module}, target_layer_ids {config.target_layer_ids}, "
                f"context_kv {config.context_kv!r}, {str(self.dtype).removeprefix('torch.')}",
                f"matched {len(self.matched)} weights:",
                *(f"  {source:{width}} -> {found} {list(shape)}" for source, found, shape in self.matched),
                f"ignored {len(self.ignored)} weights" + (":" if self.ignored else ""),
                *(f"  {name}: {why}" for name, why in self.ignored.items()),
                *(f"note: {note}" for note in self.notes),
            ]
        )


@dataclass
class SourceDraft:
    """A checkpoint as the file of its form has read it.

    Args:
        fields (`dict`): of [`PrismConfig`], all that does not come from the target.
        weights (`dict[str, torch.Tensor]`): by their names in the source.
        source_name (`Callable`): the name in the source of a weight of ours.
        target_layer_ids (`Callable`): from the number of the target's layers, None if unknown, to the states it reads.
        needs_embedding (`bool`): whether a checkpoint without an embedding is incomplete.
        ignored (`dict[str, str]`): names that are not looked at, and why.
        second_names (`dict[str, str]`): names that repeat another weight of the source, whose shape they must have.
        hint (`str`): what to say when weights are missing.
        notes (`list[str]`): what was assumed.
    """

    fields: dict
    weights: dict[str, torch.Tensor]
    source_name: Callable[[str], str]
    target_layer_ids: Callable[[int | None], list[int]]
    needs_embedding: bool = False
    ignored: dict[str, str] = field(default_factory=dict)
    second_names: dict[str, str] = field(default_factory=dict)
    hint: str = ""
    notes: list[str] = field(default_factory=list)


def import_draft(
    read: Callable[[dict, dict[str, torch.Tensor]], SourceDraft],
    source: str | Path,
    destination: str | Path,
    target: str | Path | None = None,
    context_kv: str = "prefill_module",
    num_target_layers: int | None = None,
) -> ConversionReport:
    """Convert a draft of another form into ours; what it computes stays the same.

    Args:
        read (`Callable`): of the form: from `config.json` and the weights to a [`SourceDraft`].
        source (`str` or `Path`): folder or Hub name, with `config.json` and weights, which are read from safetensors or
            with `weights_only`.
        destination (`str` or `Path`): folder to write; must be empty or not there. It appears whole or not at all.
        target (`str` or `Path`, *optional*): folder or Hub name of the target, for the fingerprint, the token ids and
            a comparison of the embedding. Where the source's embedding is not the target's, the draft keeps it.
        context_kv (`str`): "prefill_module" decodes as the authors' code does, "own_module" as it trains.
        num_target_layers (`int`, *optional*): decoder layers of the target, where the states that a draft reads depend
            on it and `target` is not given.
    Returns:
        `ConversionReport`: what was matched, what was ignored and why.
    Raises:
        ValueError: if a weight is missing, unknown or of the wrong shape, a file is damaged or holds code, the
            configuration is not of this form, or `destination` holds something. Nothing is written then.
    """
    destination = Path(destination)
    check_destination(destination)
    given, is_folder = source, Path(source).is_dir()
    source = checkpoint_folder(source)
    settings = read_json(source / "config.json")
    weights, files = read_weights(source)
    theirs = read(settings, weights)
    target_config = None if target is None else _target_config(target)
    config = _make_config(theirs, target, target_config, context_kv, num_target_layers)
    config.share_target_embedding = _is_target_embedding(theirs, target)
    with torch.device("meta"):
        draft = PrismDraftModel(config)
    matched, ignored = _match(theirs, draft)
    dtype = _common_dtype([theirs.weights[name] for name, ours, _ in matched if ours != "draft_to_target"])
    # `assign` replaces the meta tensors, so that no weight is copied or cast on the way.
    draft.load_state_dict(
        {ours: theirs.weights[name].contiguous() for name, ours, _ in matched}, strict=True, assign=True
    )
    name = source.name if is_folder else str(given)

    def save(folder: Path) -> None:
        folder.mkdir()
        write_json(folder / ABOUT, _about(name, source, theirs.notes))
        draft.eval().save_pretrained(folder)

    write_whole(destination, save)
    return ConversionReport(source, destination, files, config, dtype, matched, ignored, theirs.notes)


def _about(name: str, source: Path, notes: list[str]) -> dict:
    """What the card says of a draft that others trained; their licence is theirs, and not known unless their card names it."""
    limits = [f"Trained by others, converted from `{name}` with `transformers-prism convert`."]
    limits += [f"The conversion is {EXPERIMENTAL}."] if EXPERIMENTAL in notes else []
    return {"license": card_license(source / CARD) or "unknown", "limits": limits}


def check_destination(destination: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ValueError: naming it.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination: expected an empty folder or none, got {destination}, which holds something")


def write_whole(destination: Path, save: Callable[[Path], object]) -> None:
    """Let `save` fill a folder beside the destination, then rename it: a reader sees all of it or nothing."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        folder = Path(temporary) / "draft"
        save(folder)
        folder.replace(destination)


def last_state(num_target_layers: int | None) -> list[int]:
    """`target_layer_ids` of a draft that reads the state after the target's last layer and final norm."""
    return [require_layers(num_target_layers, "a draft without a fusion layer reads the state after the last of them")]


def require_layers(num_target_layers: int | None, why: str) -> int:
    """The number of the target's decoder layers.

    Raises:
        ValueError: if it is not known, saying why it is needed.
    """
    if num_target_layers is None:
        raise ValueError(
            "target: expected the target (--target) or its number of decoder layers (--num-target-layers), because "
            f"{why}; got neither"
        )
    return num_target_layers


def _target_config(target: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(target))
    except OSError as error:
        raise ValueError(f"target: expected a model's folder or a name on the Hub, got {target}: {error}") from error


def _make_config(theirs: SourceDraft, target, target_config, context_kv, num_target_layers) -> PrismConfig:
    """The draft's configuration: the source's numbers, and what the target adds to them."""
    fields = dict(theirs.fields)
    fields["share_target_embedding"] = fields["hidden_size"] == fields["target_hidden_size"]
    fingerprint: dict = dict.fromkeys(("name", "revision", "tokenizer_hash"))
    fingerprint.update(vocab_size=fields["vocab_size"], hidden_size=fields["target_hidden_size"])
    if target_config is not None:
        text = target_config.get_text_config()
        for name in ("vocab_size", "hidden_size"):
            if fingerprint[name] != getattr(text, name):
                raise ValueError(
                    f"{name}: expected the target's, {getattr(text, name)} ({target}), got {fingerprint[name]} in "
                    "config.json"
                )
        if num_target_layers not in (None, text.num_hidden_layers):
            raise ValueError(
                f"num_target_layers: expected the target's, {text.num_hidden_layers} ({target}), got {num_target_layers}"
            )
        num_target_layers = text.num_hidden_layers
        fields.update({name: getattr(text, name) for name in TOKEN_IDS})
        fingerprint = target_fingerprint(target_config, _tokenizer(target, theirs.notes))
    fingerprint["num_hidden_layers"] = num_target_layers
    layer_ids = theirs.target_layer_ids(num_target_layers)
    if num_target_layers is not None and layer_ids[-1] > num_target_layers:
        raise ValueError(
            f"target: expected at least {layer_ids[-1]} layers, since the draft reads the states {layer_ids}, got "
            f"{num_target_layers}"
        )
    try:
        return PrismConfig(target_layer_ids=layer_ids, context_kv=context_kv, target_fingerprint=fingerprint, **fields)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {error}") from error


def _tokenizer(target, notes: list[str]):
    try:
        return AutoTokenizer.from_pretrained(str(target))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        notes.append(f"the target's tokenizer is not in the fingerprint, since it does not load: {reason}")
        return None


def _is_target_embedding(theirs: SourceDraft, target) -> bool:
    """Whether the draft can borrow the target's embedding, which is so unless a given target has another one."""
    if theirs.fields["hidden_size"] != theirs.fields["target_hidden_size"]:
        theirs.notes.append(f"{EMBEDDING} is as wide as the draft, not as the target; the draft keeps its own")
        return False
    ours = theirs.weights.get(EMBEDDING)
    if ours is None:
        theirs.notes.append("there is no embedding in the source; the draft borrows the target's")
        return True
    found = None if target is None else read_weight_ending_with(str(target), EMBEDDING)
    if found is None:
        theirs.notes.append(
            f"{EMBEDDING} is taken to be the target's, as in the authors' training; "
            + ("no target was given" if target is None else f"no embedding was found in {target}")
            + " to compare it with"
        )
        return True
    if ours.shape == found.shape and (
        torch.equal(ours.to(found.dtype), found) or torch.equal(ours, found.to(ours.dtype))
    ):
        theirs.notes.append(f"{EMBEDDING} equals the embedding of {target}, which the draft borrows")
        return True
    difference = f" by up to {(ours.float() - found.float()).abs().max():.3g}" if ours.shape == found.shape else ""
    theirs.notes.append(f"{EMBEDDING} differs from the embedding of {target}{difference}; the draft keeps its own")
    return False


def _match(theirs: SourceDraft, draft: PrismDraftModel) -> tuple[list[tuple], dict[str, str]]:
    """Pair every weight of the draft with one of the source; anything over or short is an error that lists names."""
    expected = {theirs.source_name(name): (name, tuple(tensor.shape)) for name, tensor in draft.state_dict().items()}
    shapes = {name: shape for name, (_, shape) in expected.items()}
    if theirs.needs_embedding or EMBEDDING in theirs.weights:
        shapes[EMBEDDING] = (draft.config.vocab_size, draft.config.hidden_size)
    missing = sorted(set(shapes) - set(theirs.weights))
    ignored, unknown, misshapen = {}, [], []
    for name, tensor in theirs.weights.items():
        shape = shapes.get(theirs.second_names.get(name, name))
        if name in theirs.ignored:
            ignored[name] = theirs.ignored[name]
        elif shape is None:
            unknown.append(name)
        elif tuple(tensor.shape) != shape:
            misshapen.append(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
        elif name not in expected:
            ignored[name] = (
                "the target's" if name == EMBEDDING else "second name of a weight, which their loader replaces"
            )
    problems = []
    if missing:
        problems.append(f"missing weights: {missing}" + (theirs.hint or _other_form(theirs)))
    if unknown:
        problems.append(f"unknown weights: {sorted(unknown)}")
    if misshapen:
        problems.append("wrong shapes: " + "; ".join(sorted(misshapen)))
    if problems:
        raise ValueError("expected the weights that config.json describes, got " + "; ".join(problems))
    return [(name, ours, shape) for name, (ours, shape) in expected.items()], ignored


def _other_form(theirs: SourceDraft) -> str:
    """Which form has the names of this source, to be said where another one was asked for."""
    form = next((form for name, form in _TELLING_WEIGHTS.items() if name in theirs.weights), None)
    return "" if form is None else f" (checkpoints of --from {form} have names like those in the file)"


def _common_dtype(weights: list[torch.Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in weights}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"expected weights of one floating point dtype, got {sorted(str(dtype) for dtype in dtypes)}")
    return dtypes.pop()
