"""Drafts in the form of the PRISM authors' PyTorch code, converted to a [`PrismDraftModel`].

A source folder holds `config.json` (`eagle_config` with the numbers of a Llama layer, `num_steps`, `num_step_models`,
`step_mapping`) and its weights in safetensors or a PyTorch file, whole or in shards:

    stepFCs.{m}.weight, .bias       module m's Linear(2D -> D) over [embedding ; hidden]
    stepModels.{m}.{layer}.*        its decoder layers
    fusion_layer.weight, .bias      Linear(3D -> D), absent from checkpoints of the older form
    embed_tokens.weight             a copy of the target's embedding
    layers.*, fc.*                  second names of the module that was active last; their own loader replaces them

Source: the PRISM artifact, commit 3b00014 (`LD/large_drafter.py`, `model/cnets.py`).
"""

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from transformers_prism.configuration_prism import PrismConfig, target_fingerprint
from transformers_prism.conversion.checkpoint import read_json, read_weight_ending_with, read_weights
from transformers_prism.modeling_prism import PrismDraftModel

# Indices into the target's `hidden_states` that the artifact has in its code, whatever the target.
FUSED_TARGET_LAYER_IDS = [3, 17, 30]
_ALIAS = re.compile(r"(?:layers\.(?P<layer>\d+)|fc)\.(?P<rest>.+)")
_ROTARY = re.compile(r"(?:stepModels\.\d+|layers)\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass
class ConversionReport:
    """What a conversion did; `str()` of it is for people.

    Args:
        source, destination (`Path`): the folders.
        files (`list[str]`): files of the source that weights were read from.
        config (`PrismConfig`): configuration of the converted draft.
        dtype (`torch.dtype`): of its weights, as in the source.
        matched (`list[tuple]`): name in the source, name in the draft, shape.
        ignored (`dict[str, str]`): names in the source that no weight of the draft comes from, and why.
        notes (`list[str]`): what was assumed or found about the target.
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
                f"processing modules: {config.num_processing_modules}, draft_step_to_module "
                f"{config.draft_step_to_module}, target_layer_ids {config.target_layer_ids}, context_kv "
                f"{config.context_kv!r}, {str(self.dtype).removeprefix('torch.')}",
                f"matched {len(self.matched)} weights:",
                *(f"  {theirs:{width}} -> {ours} {list(shape)}" for theirs, ours, shape in self.matched),
                f"ignored {len(self.ignored)} weights" + (":" if self.ignored else ""),
                *(f"  {name}: {why}" for name, why in self.ignored.items()),
                *(f"note: {note}" for note in self.notes),
            ]
        )


def convert(
    source: str | Path,
    destination: str | Path,
    target: str | Path | None = None,
    context_kv: str = "prefill_module",
    num_target_layers: int | None = None,
) -> ConversionReport:
    """Convert a draft of the authors' PyTorch code; what it computes stays the same.

    Args:
        source (`str` or `Path`): folder with `config.json` and weights, read from safetensors or with `weights_only`.
        destination (`str` or `Path`): folder to write; must be empty or not there. It appears whole or not at all.
        target (`str` or `Path`, *optional*): folder or Hub name of the target, for the fingerprint, the token ids and
            a comparison of the embedding. Where the source's embedding is not the target's, the draft keeps it.
        context_kv (`str`): "prefill_module" decodes as the authors' code does, "own_module" as it trains.
        num_target_layers (`int`, *optional*): decoder layers of the target; a draft without a fusion layer reads the
            state after the last of them, so it needs this number or `target`.
    Returns:
        `ConversionReport`: what was matched, what was ignored and why.
    Raises:
        ValueError: if a weight is missing, unknown or of the wrong shape, a file is damaged or holds code, the
            configuration is not of this form, or `destination` holds something. Nothing is written then.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination: expected an empty folder or none, got {destination}, which holds something")
    theirs = _check_config(read_json(source / "config.json"))
    weights, files = read_weights(source)
    target_config = None if target is None else _target_config(target)
    config, notes = _make_config(theirs, weights, target, target_config, context_kv, num_target_layers)
    config.share_target_embedding = _is_target_embedding(weights, target, notes)
    with torch.device("meta"):
        draft = PrismDraftModel(config)
    matched, ignored = _match(weights, draft, theirs)
    dtype = _common_dtype({name: weights[name] for name, _, _ in matched})
    # `assign` replaces the meta tensors, so that no weight is copied or cast on the way.
    draft.load_state_dict({ours: weights[name].contiguous() for name, ours, _ in matched}, strict=True, assign=True)
    _write(draft.eval(), destination)
    return ConversionReport(source, destination, files, config, dtype, matched, ignored, notes)


def _check_config(config: dict) -> dict:
    """Their configuration, flattened, with the defaults of their code for what may be absent."""
    for name, meaning in (("use_adapter", "step adapters"), ("moe_config", "mixture-of-experts modules")):
        if config.get(name):
            raise ValueError(f"config.json: expected a draft without {meaning}, got {name}={config[name]!r}")
    layer = config.get("eagle_config", config)
    if not isinstance(layer, dict):
        raise ValueError(f"config.json: expected eagle_config to be an object, got {layer!r}")
    required = "vocab_size hidden_size intermediate_size num_attention_heads num_hidden_layers".split()
    absent = [name for name in required if layer.get(name) is None]
    absent += [name for name in ("num_steps", "step_mapping") if config.get(name) is None]
    if absent:
        raise ValueError(f"config.json: expected the fields of the authors' form, got none named {absent}")
    if layer.get("rope_scaling") is not None:
        raise ValueError(f"config.json: expected rope_scaling to be null, got {layer['rope_scaling']!r}")
    theirs = {
        "num_key_value_heads": layer["num_attention_heads"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
    }
    theirs.update({name: value for name, value in layer.items() if value is not None})
    # The bias is looked up beside eagle_config, never in it, so a value in there has no effect.
    theirs["bias"] = bool(config.get("bias", True))
    theirs["draft_step_to_module"] = _check_mapping(config)
    theirs["num_modules"] = max(theirs["draft_step_to_module"]) + 1
    if config.get("num_step_models", theirs["num_modules"]) != theirs["num_modules"]:
        raise ValueError(
            f"config.json: expected step_mapping to use each of the num_step_models={config['num_step_models']} "
            f"modules, got {config['step_mapping']}"
        )
    return theirs


def _check_mapping(config: dict) -> list[int]:
    """`draft_step_to_module` from num_steps and step_mapping; later steps keep the last entry in their code and ours."""
    num_steps, mapping = config["num_steps"], config["step_mapping"]
    steps = [str(step) for step in range(num_steps)] if type(num_steps) is int and num_steps > 0 else []
    if not steps or not isinstance(mapping, dict) or sorted(mapping) != sorted(steps):
        raise ValueError(
            "config.json: expected step_mapping to name a module for each step 0..num_steps-1, "
            f"got num_steps={num_steps!r} and step_mapping={mapping!r}"
        )
    modules = [mapping[step] for step in steps]
    if any(type(module) is not int or module < 0 for module in modules) or set(modules) != set(
        range(len(set(modules)))
    ):
        raise ValueError(f"config.json: expected step_mapping to use modules 0, 1, ... without a gap, got {mapping}")
    return modules


def _target_config(target: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(target))
    except OSError as error:
        raise ValueError(f"target: expected a model's folder or a name on the Hub, got {target}: {error}") from error


def _make_config(
    theirs, weights, target, target_config, context_kv, num_target_layers
) -> tuple[PrismConfig, list[str]]:
    """The draft's configuration, and what was assumed about the target."""
    notes: list[str] = []
    fingerprint: dict = dict.fromkeys(("name", "revision", "tokenizer_hash"))
    fingerprint.update(vocab_size=theirs["vocab_size"], hidden_size=theirs["hidden_size"])
    ids = {name: theirs.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if target_config is not None:
        text = target_config.get_text_config()
        for name in ("vocab_size", "hidden_size"):
            if theirs[name] != getattr(text, name):
                raise ValueError(
                    f"{name}: expected the target's, {getattr(text, name)} ({target}), got {theirs[name]} in config.json"
                )
        if num_target_layers not in (None, text.num_hidden_layers):
            raise ValueError(
                f"num_target_layers: expected the target's, {text.num_hidden_layers} ({target}), got {num_target_layers}"
            )
        num_target_layers = text.num_hidden_layers
        ids = {name: getattr(text, name) for name in ids}
        fingerprint = target_fingerprint(target_config, _tokenizer(target, notes))
    fingerprint["num_hidden_layers"] = num_target_layers
    try:
        config = PrismConfig(
            vocab_size=theirs["vocab_size"],
            hidden_size=theirs["hidden_size"],
            target_hidden_size=theirs["hidden_size"],
            intermediate_size=theirs["intermediate_size"],
            num_attention_heads=theirs["num_attention_heads"],
            num_key_value_heads=theirs["num_key_value_heads"],
            hidden_act=theirs["hidden_act"],
            rms_norm_eps=theirs["rms_norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": float(theirs["rope_theta"])},
            max_position_embeddings=theirs["max_position_embeddings"],
            num_processing_modules=theirs["num_modules"],
            draft_step_to_module=theirs["draft_step_to_module"],
            num_layers_per_module=theirs["num_hidden_layers"],
            target_layer_ids=_target_layer_ids(weights, num_target_layers),
            projection_bias=theirs["bias"],
            context_kv=context_kv,
            normalize_target_hidden=False,
            target_fingerprint=fingerprint,
            **ids,
        )
    except StrictDataclassError as error:
        raise ValueError(f"config.json: {error}") from error
    return config, notes


def _target_layer_ids(weights, num_target_layers: int | None) -> list[int]:
    """The states that the draft reads: three with a fusion layer, else the last one, after the final norm."""
    if any(name.startswith("fusion_layer.") for name in weights):
        if num_target_layers is not None and num_target_layers < FUSED_TARGET_LAYER_IDS[-1]:
            raise ValueError(
                f"target: expected at least {FUSED_TARGET_LAYER_IDS[-1]} layers, since the fusion layer joins the states "
                f"{FUSED_TARGET_LAYER_IDS}, got {num_target_layers}"
            )
        return list(FUSED_TARGET_LAYER_IDS)
    if num_target_layers is None:
        raise ValueError(
            "target: expected the target (--target) or its number of decoder layers (--num-target-layers), because a "
            "draft without fusion_layer reads the state after the target's last layer; got neither"
        )
    return [num_target_layers]


def _tokenizer(target, notes: list[str]):
    try:
        return AutoTokenizer.from_pretrained(str(target))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        notes.append(f"the target's tokenizer is not in the fingerprint, since it does not load: {reason}")
        return None


def _is_target_embedding(weights, target, notes: list[str]) -> bool:
    """Whether the draft can borrow the target's embedding, which is so unless a given target has another one."""
    ours = weights.get("embed_tokens.weight")
    theirs = None if target is None else read_weight_ending_with(str(target), "embed_tokens.weight")
    if ours is None or theirs is None:
        notes.append(
            "embed_tokens.weight is taken to be the target's, as in the authors' training; "
            + ("no target was given" if target is None else f"no embedding was found in {target}")
            + " to compare it with"
        )
        return True
    if ours.shape == theirs.shape and (
        torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
    ):
        notes.append(f"embed_tokens.weight equals the embedding of {target}, which the draft borrows")
        return True
    difference = f" by up to {(ours.float() - theirs.float()).abs().max():.3g}" if ours.shape == theirs.shape else ""
    notes.append(f"embed_tokens.weight differs from the embedding of {target}{difference}; the draft keeps its own")
    return False


def _match(weights, draft: PrismDraftModel, theirs: dict) -> tuple[list[tuple], dict[str, str]]:
    """Pair every weight of the draft with one of the source; anything over or short is an error that lists names."""
    expected = {_source_name(name): (name, tuple(tensor.shape)) for name, tensor in draft.state_dict().items()}
    required = {name: shape for name, (_, shape) in expected.items()}
    required["embed_tokens.weight"] = (theirs["vocab_size"], theirs["hidden_size"])
    missing = sorted(set(required) - set(weights))
    ignored, unknown, misshapen = {}, [], []
    for name, tensor in weights.items():
        shape = required.get(name, _alias_shape(name, required))
        if shape is None and _ROTARY.fullmatch(name):
            ignored[name] = "derived from config.json"
        elif shape is None:
            unknown.append(name)
        elif tuple(tensor.shape) != shape:
            misshapen.append(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
        elif name not in expected:
            ignored[name] = (
                "the target's" if name in required else "second name of a module, which their loader replaces"
            )
    problems = []
    if missing:
        problems.append(f"missing weights: {missing}" + _missing_hint(missing, weights))
    if unknown:
        problems.append(f"unknown weights: {sorted(unknown)}")
    if misshapen:
        problems.append("wrong shapes: " + "; ".join(sorted(misshapen)))
    if problems:
        raise ValueError("expected the weights that config.json describes, got " + "; ".join(problems))
    return [(name, ours, shape) for name, (ours, shape) in expected.items()], ignored


def _source_name(name: str) -> str:
    """Their name of one of our weights."""
    match = re.fullmatch(r"processing_modules\.(\d+)\.(input_projection|layers)\.(.+)", name)
    if match is None:
        return name
    module, part, rest = match.groups()
    return f"stepFCs.{module}.{rest}" if part == "input_projection" else f"stepModels.{module}.{rest}"


def _alias_shape(name: str, required: dict) -> tuple | None:
    """Shape of a second name (`layers.*`, `fc.*`), which is that of module 0, or None if it is not one."""
    match = _ALIAS.fullmatch(name)
    if match is None:
        return None
    first = "stepFCs.0." if match["layer"] is None else f"stepModels.0.{match['layer']}."
    return required.get(first + match["rest"])


def _missing_hint(missing: list[str], weights) -> str:
    if any(_ALIAS.fullmatch(name) for name in weights) and any(name.startswith("step") for name in missing):
        return (
            " (the file has layers.* and fc.*: either an EAGLE or HASS checkpoint, which is another form, or one saved "
            "without repeating weights that have two names; save the state dict with torch.save instead)"
        )
    return ""


def _common_dtype(weights) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise ValueError(f"expected weights of one floating point dtype, got {sorted(str(dtype) for dtype in dtypes)}")
    return dtypes.pop()


def _write(draft: PrismDraftModel, destination: Path):
    """Save beside the destination, then rename: a reader sees all of it or nothing."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        folder = Path(temporary) / "draft"
        draft.save_pretrained(folder)
        folder.replace(destination)
