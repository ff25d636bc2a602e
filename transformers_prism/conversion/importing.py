"""What all conversions into a [`PrismDraftModel`] share: match weights by name, compare with the target, write.

Each form of checkpoint has a file of its own, which says how `config.json` and the names are read. A weight that is missing,
unknown or of the wrong shape is an error that lists the names.
"""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from transformers_prism.borrowed_layers import float_weight
from transformers_prism.configuration_prism import PrismConfig, target_fingerprint
from transformers_prism.conversion.checkpoint import (
    checkpoint_folder,
    read_weight_ending_with,
    read_weights,
)
from transformers_prism.hub.files import CARD, card_license
from transformers_prism.hub.loading import check_values
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.transformers_names import name_of
from transformers_prism.whole_files import read_json

EXPERIMENTAL = (
    "experimental: no published file of this form could be tried; names and code were read, and round trips tested"
)
EMBEDDING = "embed_tokens.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Weights that identify a form, the most specific first.
_TELLING_WEIGHTS = {
    "stepFCs.0.weight": "prism-artifact",
    "fc0.weight": "sglang",
    "midlayer.hidden_norm.weight": "eagle3",
    "layers.0.hidden_norm.weight": "eagle3",
    "fc.weight": "eagle",
}
# Fields of config.json that name a form.
SPECULATORS_TYPE = "speculators_model_type"
# Servers' classes keep all but the head in a module of this name.
_PREFIX = "model."


def form_of(config: dict, names) -> str:
    """Which form a draft is in.

    Args:
        config (`dict`): `config.json`.
        names: of its weights.
    Returns:
        `str`: "prism" for ours, else what `--from` takes.
    Raises:
        ValueError: if it is none that is known, naming what was looked for.
    """
    if config.get("model_type") == "prism":
        return "prism"
    if SPECULATORS_TYPE in config:
        return "speculators"
    short = {name.removeprefix(_PREFIX) for name in names}
    form = next((form for name, form in _TELLING_WEIGHTS.items() if name in short), None)
    if form is None:
        telling = ", ".join(f"{name} ({form})" for name, form in _TELLING_WEIGHTS.items())
        raise ValueError(
            f"expected a draft with model_type 'prism' (ours) or {SPECULATORS_TYPE} (speculators) in config.json, or a weight "
            f"named {telling}, got model_type {config.get('model_type')!r}, architectures {config.get('architectures')} "
            f"and the weights {sorted(short)[:8]}"
        )
    return form


@dataclass
class ConversionReport:
    """What a conversion did; `str()` gives a readable report.

    Args:
        source, destination (`Path`): the folders; destination is None for a draft that was only loaded.
        files (`list[str]`): files of the source that weights were read from.
        config (`PrismConfig`): configuration of our draft.
        dtype (`torch.dtype`): of its weights, the same on both sides.
        matched (`list[tuple]`): name in the source, name in the destination, shape.
        ignored (`dict[str, str]`): names in the source that were not used, and why.
        notes (`list[str]`): what was assumed or found.
    """

    source: Path
    destination: Path | None
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
                f"{self.source} ({', '.join(self.files)}) -> {self.destination or 'memory'}",
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
    """A checkpoint as the module for its form has read it.

    Args:
        fields (`dict`): of [`PrismConfig`], all those that do not come from the target.
        weights (`dict[str, torch.Tensor]`): by their names in the source.
        source_name (`Callable`): from our name of a weight to its name in the source.
        target_layer_ids (`Callable`): from the target's number of layers, None if unknown, to the states that the draft reads.
        needs_embedding (`bool`): whether a checkpoint without an embedding is incomplete.
        ignored (`dict[str, str]`): names that are skipped, and why.
        second_names (`dict[str, str]`): names that repeat another weight of the source, whose shape they must have.
        hint (`str`): what to say when weights are missing.
        notes (`list[str]`): what was assumed.
        target_name (`str`, *optional*), target_architectures (`list[str]`): of the target, as the source names it.
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
    target_name: str | None = None
    target_architectures: list[str] = field(default_factory=list)


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
        read (`Callable`): the form's reader, from `config.json` and the weights to a [`SourceDraft`].
        source (`str` or `Path`): folder or Hub name, with `config.json` and weights, which are read from safetensors or
            with `weights_only`.
        destination (`str` or `Path`): folder to write; must be empty or missing. It appears complete or not at all.
        target (`str` or `Path`, *optional*): folder or Hub name of the target, for the fingerprint, the token ids and
            a comparison of the embedding. Where the source's embedding is not the target's, the draft keeps it.
        context_kv (`str`): "prefill_module" decodes as the authors' code does, "own_module" as it trains.
        num_target_layers (`int`, *optional*): decoder layers of the target; needed if the states that a draft reads depend
            on it and `target` is not given.
    Returns:
        `ConversionReport`: what was matched, what was ignored and why.
    Raises:
        ValueError: if a weight is missing, unknown or of the wrong shape, a file is damaged or holds code, the
            configuration is not of this form, or `destination` is not empty. Nothing is written then.
    """
    destination = Path(destination).resolve()
    check_destination(destination)
    folder = checkpoint_folder(source)
    draft, report = read_draft(read, folder, target, context_kv, num_target_layers)
    draft.about = about_source(source, folder, report.notes)
    write_whole(destination, draft.save_pretrained)
    return replace(report, destination=destination)


def read_draft(
    read: Callable[[dict, dict[str, torch.Tensor]], SourceDraft],
    folder: Path,
    target: str | Path | PreTrainedModel | None = None,
    context_kv: str = "prefill_module",
    num_target_layers: int | None = None,
) -> tuple[PrismDraftModel, ConversionReport]:
    """A draft of another form as ours, in memory; arguments and errors as [`import_draft`].

    Args:
        folder (`Path`): of the source.
        target: as for [`import_draft`], or the loaded target.
    """
    settings = read_json(folder / "config.json")
    if isinstance(settings.get("model"), dict):  # as vLLM writes a draft's configuration
        settings = {**settings, **settings["model"]}
    weights, files = read_weights(folder)
    theirs = read(settings, {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()})
    if any(name.startswith(_PREFIX) for name in weights):
        theirs.notes.append(f"names of weights are given without the prefix {_PREFIX!r}")
    target_config = None if target is None else target_config_of(target)
    config = _make_config(theirs, target, target_config, context_kv, num_target_layers)
    config.share_target_embedding = _is_target_embedding(theirs, target)
    if config.share_target_embedding and (factor := embedding_factor(target)) != 1.0:
        theirs.notes.append(f"the target multiplies its embeddings by {factor:g}, which the draft undoes")
        config.embedding_scale /= factor
    with torch.device("meta"):
        draft = PrismDraftModel(config)
    matched, ignored = _match(theirs, draft)
    dtype = _common_dtype([theirs.weights[name] for name, ours, _ in matched if ours != "draft_to_target"])
    # `assign` replaces the meta tensors, so that no weight is copied or cast on the way.
    draft.load_state_dict(
        {ours: theirs.weights[name].contiguous() for name, ours, _ in matched}, strict=True, assign=True
    )
    draft.rotary_emb = type(draft.rotary_emb)(config)  # its frequencies are in no file
    config.dtype = dtype
    check_values(draft, folder)
    return draft.eval(), ConversionReport(folder, None, files, config, dtype, matched, ignored, theirs.notes)


def about_source(source: str | Path, folder: Path, notes: list[str]) -> dict:
    """Content of about.json for a draft that others trained. Its licence is unknown unless the source's card names one."""
    name = folder.name if Path(source).is_dir() else str(source)
    limits = [f"Trained by others, converted from `{name}` with `transformers-prism convert`."]
    limits += [f"The conversion is {note}." for note in notes if note.startswith("experimental")]
    return {"license": card_license(folder / CARD) or "unknown", "limits": limits}


def check_destination(destination: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        ValueError: naming it.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination: expected an empty folder or none, got {destination}, which holds something")


def write_whole(destination: Path, save: Callable[[Path], object]) -> None:
    """Let `save` fill a temporary folder, then rename it: a reader sees all of it or nothing."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        folder = Path(temporary) / destination.name  # a card names the draft after its folder
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


def target_config_of(target: str | Path | PreTrainedModel) -> PreTrainedConfig:
    """Configuration of a target, or of its folder or name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(target, (str, Path)):
        return target.config
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
                    f"{name}: expected the target's, {getattr(text, name)} ({_called(target)}), got {fingerprint[name]} in "
                    "config.json"
                )
        if num_target_layers not in (None, text.num_hidden_layers):
            raise ValueError(
                f"num_target_layers: expected the target's, {text.num_hidden_layers} ({_called(target)}), got {num_target_layers}"
            )
        num_target_layers = text.num_hidden_layers
        fields.update({name: getattr(text, name, None) for name in TOKEN_IDS})
        tokenizer = _tokenizer(target, theirs.notes) if isinstance(target, (str, Path)) else None
        fingerprint = target_fingerprint(target_config, tokenizer)
        _check_names(theirs, fingerprint["name"], target_config.architectures)
    fingerprint["num_hidden_layers"] = num_target_layers
    fingerprint["name"] = fingerprint["name"] or theirs.target_name
    layer_ids = theirs.target_layer_ids(num_target_layers)
    if num_target_layers is not None and layer_ids[-1] > num_target_layers:
        raise ValueError(
            f"target: expected at least {layer_ids[-1]} layers, since the draft reads the states {layer_ids}, got "
            f"{num_target_layers}"
        )
    if fields.get("module_form") == "eagle3" and layer_ids[-1] == num_target_layers:
        theirs.notes.append(
            f"the state {num_target_layers} is read after the target's final norm, servers hand it over before; fewer tokens "
            "may be accepted"
        )
    try:
        return PrismConfig(target_layer_ids=layer_ids, context_kv=context_kv, target_fingerprint=fingerprint, **fields)
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {error}") from error


def _check_names(theirs: SourceDraft, name: str | None, architectures: list[str] | None) -> None:
    """Refuse a target that is not the one that the source names."""
    pairs = [("name", theirs.target_name, name)]
    if theirs.target_architectures and architectures and not set(theirs.target_architectures) & set(architectures):
        pairs.append(("architectures", str(theirs.target_architectures), str(architectures)))
    for called, expected, found in pairs:
        # The path of a folder differs between machines.
        if expected and found and expected != found and not Path(found).exists():
            raise ValueError(
                f"target: expected the {called} that the draft's config.json gives, {expected}, got {found}; if they are the "
                "same model, or one made from the other, leave the target out when the draft is loaded"
            )


def _tokenizer(target, notes: list[str]):
    try:
        return AutoTokenizer.from_pretrained(str(target))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        notes.append(f"the target's tokenizer is not in the fingerprint, since it does not load: {reason}")
        return None


def _is_target_embedding(theirs: SourceDraft, target) -> bool:
    """Whether the draft can borrow the target's embedding: yes, unless the source's own is known to differ from it."""
    if theirs.fields["hidden_size"] != theirs.fields["target_hidden_size"]:
        theirs.notes.append(f"{EMBEDDING} is as wide as the draft, not as the target; the draft keeps its own")
        return False
    ours = theirs.weights.get(EMBEDDING)
    if ours is None:
        theirs.notes.append("there is no embedding in the source; the draft borrows the target's")
        return True
    found, name = _target_embedding(target)
    if found is None:
        theirs.notes.append(f"{EMBEDDING} is taken to be the target's; {name} to compare it with")
        return True
    if ours.shape == found.shape and (
        torch.equal(ours.to(found.dtype), found) or torch.equal(ours, found.to(ours.dtype))
    ):
        theirs.notes.append(f"{EMBEDDING} equals the embedding of {name}, which the draft borrows")
        return True
    difference = f" by up to {(ours.float() - found.float()).abs().max():.3g}" if ours.shape == found.shape else ""
    theirs.notes.append(f"{EMBEDDING} differs from the embedding of {name}{difference}; the draft keeps its own")
    return False


def embedding_factor(target) -> float:
    """The factor by which a target's embedding scales its rows, as Gemma's does; drafts of other forms read unscaled rows."""
    if target is None:
        return 1.0
    if isinstance(target, (str, Path)):
        # Building a model from its configuration may fail in any way.
        with contextlib.suppress(Exception), torch.device("meta"):
            target = AutoModelForCausalLM.from_config(target_config_of(target))
    embedding = target.get_input_embeddings() if isinstance(target, PreTrainedModel) else None
    factors = (getattr(embedding, name, None) for name in ("scalar_embed_scale", "embed_scale"))
    return next((float(factor) for factor in factors if isinstance(factor, (int, float))), 1.0)


def _target_embedding(target) -> tuple[torch.Tensor | None, str]:
    """A target's embedding on the CPU and the target's name; or None and the reason, if it cannot be read."""
    if target is None:
        return None, "no target was given"
    if isinstance(target, (str, Path)):
        found = read_weight_ending_with(str(target), EMBEDDING)
    else:
        found = float_weight(target.get_input_embeddings())
        found = None if found is None or found.is_meta else found.detach().cpu()
    return found, f"no embedding was found in {_called(target)}" if found is None else _called(target)


def _called(target: str | Path | PreTrainedModel) -> str:
    return str(target) if isinstance(target, (str, Path)) else name_of(target.config) or type(target).__name__


def _match(theirs: SourceDraft, draft: PrismDraftModel) -> tuple[list[tuple], dict[str, str]]:
    """Pair every weight of the draft with one of the source; missing or unknown weights are an error that lists names."""
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
    """A hint which form has names like this source's, in case another form was asked for."""
    try:
        return f" (checkpoints of --from {form_of({}, theirs.weights)} have names like those in the file)"
    except ValueError:
        return ""


def _common_dtype(weights: list[torch.Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in weights}
    if len(dtypes) != 1 or not (dtype := next(iter(dtypes))).is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"expected weights of one floating point dtype of at least 16 bits, got {sorted(str(dtype) for dtype in dtypes)}"
        )
    return dtype
