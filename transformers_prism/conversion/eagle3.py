"""EAGLE-3 drafts in the layout of SafeAILab's repository, which SpecForge, SGLang and vLLM share, in and out.

`config.json` holds the numbers of a Llama layer and `draft_vocab_size`. Names:

    fc.weight, .bias         Linear(L * target width -> D), which joins L states of the target, mostly three
    midlayer.*               one decoder layer with `hidden_norm`; its attention reads [embedding ; hidden], both normed
    layers.{layer}.*         the same in vLLM's and speculators' names; later layers are of the target's own kind
    norm.weight              before the head
    lm_head.weight           the draft's own head over its vocabulary
    d2t                      for each draft token, its id in the target's vocabulary minus its own id
    t2d                      for each of the target's tokens, whether the draft can propose it
    embed_tokens.weight      a copy of the target's embedding, if at all
    input_norm.weight        with `norm_before_fc`, over all L states, concatenated
    fc_norm.{state}.weight   with `fc_norm`, one per state

The states are those before layers 2, n // 2 and n - 3 of n, unless `config.json` names others. SGLang's
`eagle_config.eagle_aux_hidden_state_layer_ids` counts layers from 0 and means their outputs. vLLM's field of that name,
outside `eagle_config`, holds indices into `hidden_states`.
Source: SafeAILab/EAGLE, `eagle/model/cnets.py` and `modeling_llama_kv.py`; SGLang, `llama_eagle3.py` and `llama.py`;
vLLM 0.32, `llama_eagle3.py`, `qwen3_eagle3.py` and `gpu_model_runner.py`; SpecForge 0.2, `modeling/draft/llama3_eagle.py`.
"""

import functools
import re

import torch

from transformers_prism.conversion.exporting import Expectations, expect_layers_before_the_last, export_draft
from transformers_prism.conversion.importing import SourceDraft, import_draft, require_layers
from transformers_prism.conversion.llama_config import read_llama_config, write_llama_config
from transformers_prism.conversion.sglang import AUX_LAYERS, aux_layer_field, aux_layer_ids, read_layer_list
from transformers_prism.modeling_prism import PrismDraftModel

# Settings of these drafts that a plain Llama layer does not have.
SETTINGS = ("attention_bias", "mlp_bias", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
TRIED = (
    "experimental: tried with random drafts of the classes of speculators, SpecForge and vLLM; no published file could be "
    "tried"
)
_ROTARY = re.compile(r"(?:midlayer|layers\.\d+)\.self_attn\.rotary_emb\.inv_freq")


def read_eagle3(config: dict, weights: dict) -> SourceDraft:
    """An EAGLE-3 draft from `config.json`, with the numbers of its layer at the top, and its weights.

    Raises:
        ValueError: if the configuration asks for what no draft here can compute.
    """
    nested = config.get("eagle_config")
    if not isinstance(nested, dict):
        nested = {}
    config = {**{name: nested[name] for name in SETTINGS if name in nested}, **config}
    _read_older_names(config, weights)
    if nested.get("use_aux_hidden_state") is False:
        raise ValueError("config.json: expected eagle_config.use_aux_hidden_state to be true, got false")
    fields = read_llama_config(config, allowed=SETTINGS)
    num_layers = fields["num_layers_per_module"]
    has_midlayer = any(name.startswith("midlayer.") for name in weights)
    if has_midlayer and num_layers != 1:
        raise ValueError(
            f"config.json: expected num_hidden_layers to be 1 with weights named midlayer, got {num_layers}"
        )
    switches = ("norm_before_residual", "norm_output", "attention_bias", "mlp_bias")
    fields.update({name: bool(config.get(name)) for name in switches})
    if config.get("norm_before_fc") or config.get("fc_norm"):
        fields["target_norm"] = "joint" if config.get("norm_before_fc") else "each"
    fields["query_key_norm"] = any(name.endswith("q_norm.weight") for name in weights)
    fields["target_hidden_size"] = config.get("target_hidden_size") or fields["hidden_size"]
    fields["logit_scale"] = 1.0 if config.get("logit_scale") is None else config["logit_scale"]
    if type(fields["logit_scale"]) not in (int, float):
        raise ValueError(f"config.json: expected logit_scale to be a number, got {fields['logit_scale']!r}")
    fields["logit_scale"] = float(fields["logit_scale"])
    fields.update(module_form="eagle3", projection_bias="fc.bias" in weights, share_target_head=False)
    draft_vocab_size = config.get("draft_vocab_size")
    if draft_vocab_size is None and "d2t" in weights:
        draft_vocab_size = weights["d2t"].numel()
    if draft_vocab_size is None and "lm_head.weight" not in weights:
        fields["share_target_head"] = True
    ignored = {name: "derived from config.json" for name in weights if _ROTARY.fullmatch(name)}
    is_permuted = "d2t" in weights and bool(weights["d2t"].any())
    if draft_vocab_size is None or (draft_vocab_size == fields["vocab_size"] and not is_permuted):
        whole = "the draft vocabulary is the whole one"
        ignored.update((name, whole) for name in ("d2t", "t2d") if name in weights)
    else:
        fields["draft_vocab_size"] = draft_vocab_size
        if "d2t" in weights:
            weights["d2t"] = _target_ids(weights["d2t"], weights.get("t2d"), fields)
            ignored.update((name, "follows from d2t") for name in ("t2d",) if name in weights)
    first_layer = "midlayer." if has_midlayer else "layers.0."
    their_name = functools.partial(_their_name, first_layer=first_layer, target_norm=fields.get("target_norm"))
    layer_ids, notes = _layer_ids(config)
    return SourceDraft(fields, weights, their_name, layer_ids, ignored=ignored, notes=[TRIED, *notes])


def _read_older_names(config: dict, weights: dict) -> None:
    """Older conventions that SGLang still reads: other names for the norms before fc, and a head tied to the embedding."""
    if config.get("use_aux_norm") and not config.get("fc_norm"):
        config["fc_norm"] = True
    for state, name in enumerate(("low", "mid", "high")):
        if (older := f"aux_norm_{name}.weight") in weights:
            weights[f"fc_norm.{state}.weight"] = weights.pop(older)
    if config.get("tie_word_embeddings") and "lm_head.weight" not in weights and "embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"].clone()


def read(config: dict, weights: dict) -> SourceDraft:
    """An EAGLE-3 draft in the layout of SafeAILab, SpecForge, SGLang and vLLM, from its `config.json` and weights; errors as [`import_draft`]."""
    theirs = read_eagle3(config, weights)
    if theirs.fields["norm_output"]:
        theirs.notes.append(
            "norm_output is read as speculators and vLLM have it: the state after the norm is passed on to the next step"
        )
    return theirs


def _target_ids(d2t: torch.Tensor, t2d: torch.Tensor | None, fields: dict) -> torch.Tensor:
    """Ids of the draft's tokens in the target's vocabulary; both tables must agree."""
    draft_vocab_size, vocab_size = fields["draft_vocab_size"], fields["vocab_size"]
    if d2t.is_floating_point() or tuple(d2t.shape) != (draft_vocab_size,):
        raise ValueError(
            f"d2t: expected {draft_vocab_size} integers (draft_vocab_size), got {d2t.dtype} of shape {list(d2t.shape)}"
        )
    ids = d2t.long() + torch.arange(draft_vocab_size)
    if not bool(((ids >= 0) & (ids < vocab_size)).all()) or len(ids.unique()) != draft_vocab_size:
        raise ValueError(f"d2t: expected distinct tokens in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    if t2d is not None:
        expected = torch.zeros(vocab_size, dtype=torch.bool)
        expected[ids] = True
        if not torch.equal(t2d.bool(), expected):
            raise ValueError("t2d: expected the tokens that d2t names, got others")
    return ids


def _layer_ids(config: dict):
    """A function from the target's number of layers to the states that a draft reads, and notes about these."""
    nested, own = aux_layer_ids(config), read_layer_list(config)
    given = nested or own
    if given is not None:
        notes = []
        if nested and own and nested != own:
            notes.append(f"config.json names two lists of states: {nested} by eagle_config, which are read, and {own}")
        return (lambda num_target_layers: list(given)), notes

    def default(num_target_layers: int | None) -> list[int]:
        num_layers = require_layers(num_target_layers, "it says which states an EAGLE-3 draft reads")
        if num_layers < 7:
            raise ValueError(f"target: expected at least 7 layers, for three states apart, got {num_layers}")
        return [2, num_layers // 2, num_layers - 3]

    return default, ["config.json names no layers of the target: the states 2, n // 2 and n - 3 of n are assumed"]


def _their_name(name: str, first_layer: str = "midlayer.", target_norm: str | None = None) -> str:
    """The checkpoint's name for one of our weights."""
    name = name.replace("processing_modules.0.layers.0.", first_layer).replace("processing_modules.0.", "")
    name = name.replace("fusion_layer.", "fc.").replace("_proj.norm.", "_norm.")
    if name.startswith("target_norm."):
        return "input_norm.weight" if target_norm == "joint" else name.replace("target_norm.", "fc_norm.")
    return "d2t" if name == "draft_to_target" else name


def expect_eagle3(expectations: Expectations) -> None:
    """What every form of EAGLE-3 demands of a draft of ours."""
    expectations.expect("module_form", "eagle3", "its layer is EAGLE-3's")
    expectations.expect("num_processing_modules", 1, "it has one set of parameters for all steps")
    expectations.expect("projection_bias", False, "its fc has no bias")
    expectations.expect("share_target_head", False, "it has a head of its own")
    expect_layers_before_the_last(expectations)


def vocabulary_tables(draft: PrismDraftModel) -> dict[str, torch.Tensor]:
    """`d2t` and `t2d` of a draft of ours."""
    own = torch.arange(draft.config.num_draft_tokens)
    ids = own if draft.draft_to_target is None else draft.draft_to_target.cpu()
    t2d = torch.zeros(draft.config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return {"d2t": ids - own, "t2d": t2d}


def names_in(draft: PrismDraftModel, first_layer: str) -> dict[str, str]:
    """From our names of weights to those in a form of EAGLE-3, without the draft vocabulary."""
    names = [name for name in draft.state_dict() if name != "draft_to_target"]
    return {name: _their_name(name, first_layer, draft.config.target_norm) for name in names}


def _write(draft: PrismDraftModel, notes: list[str]):
    config = draft.config
    expectations = Expectations("eagle3", config)
    expect_eagle3(expectations)
    expectations.expect("num_layers_per_module", 1, "it has one layer")
    expectations.expect("len(target_layer_ids)", 3, "its fc joins three states", len(config.target_layer_ids))
    expectations.check()
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **write_llama_config(config),
        "draft_vocab_size": config.num_draft_tokens,
        **aux_layer_field(config.target_layer_ids),
        AUX_LAYERS: config.target_layer_ids,
    }
    notes.append(TRIED)
    notes.append("the EAGLE authors' own code reads the states 2, n // 2 and n - 3 of n, whatever config.json says")
    return settings, names_in(draft, "midlayer."), vocabulary_tables(draft)


convert = functools.partial(import_draft, read)
export = functools.partial(export_draft, _write)
