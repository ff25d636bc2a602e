"""EAGLE-3 drafts in the layout of SafeAILab's repository, in and out.

`config.json` holds the numbers of a Llama layer and `draft_vocab_size`. Names:

    fc.weight                Linear(3 * target width -> D), which joins three states of the target
    midlayer.*               one decoder layer with `hidden_norm`; its attention reads [embedding ; hidden], both normed
    norm.weight              before the head
    lm_head.weight           the draft's own head over its vocabulary
    d2t                      for each draft token, its id in the target's vocabulary minus its own id
    t2d                      for each of the target's tokens, whether the draft can propose it
    embed_tokens.weight      a copy of the target's embedding, if at all

The states are those before layers 2, n // 2 and n - 3 of n, unless `config.json` names others: SGLang's
`eagle_config.eagle_aux_hidden_state_layer_ids` counts layers from 0 and means their outputs, vLLM's field of that name
outside `eagle_config` counts as `hidden_states` does. Experimental.
Source: SafeAILab/EAGLE, `eagle/model/cnets.py` and `modeling_llama_kv.py`; SGLang, `llama_eagle3.py` and `llama.py`;
vLLM, `llama_eagle3.py` and `gpu_model_runner.py`.
"""

from pathlib import Path

import torch

from transformers_prism.conversion.exporting import Expectations, expect_layers_before_the_last, export_draft
from transformers_prism.conversion.importing import (
    EXPERIMENTAL,
    ConversionReport,
    SourceDraft,
    import_draft,
    require_layers,
)
from transformers_prism.conversion.llama_config import read_llama_config, write_llama_config
from transformers_prism.conversion.sglang import AUX_LAYERS, aux_layer_field, aux_layer_ids, read_layer_list
from transformers_prism.modeling_prism import PrismDraftModel


def convert(
    source: str | Path,
    destination: str | Path,
    target: str | Path | None = None,
    context_kv: str = "prefill_module",
    num_target_layers: int | None = None,
) -> ConversionReport:
    """Convert an EAGLE-3 draft; arguments and errors as [`import_draft`].

    With one module `context_kv` makes no difference.
    """
    return import_draft(_read, source, destination, target, context_kv, num_target_layers)


def export(source: str | Path, destination: str | Path, target: str | Path | None = None) -> ConversionReport:
    """Write a draft of ours with `module_form="eagle3"` as EAGLE-3; arguments and errors as [`export_draft`]."""
    return export_draft(_write, source, destination, target)


def _read(config: dict, weights: dict) -> SourceDraft:
    fields = read_llama_config(config)
    if fields["num_layers_per_module"] != 1:
        raise ValueError(f"config.json: expected num_hidden_layers to be 1, got {fields['num_layers_per_module']}")
    fields["target_hidden_size"] = config.get("target_hidden_size") or fields["hidden_size"]
    fields.update(module_form="eagle3", projection_bias="fc.bias" in weights, share_target_head=False)
    draft_vocab_size = config.get("draft_vocab_size")
    if draft_vocab_size is None and "lm_head.weight" not in weights:
        fields["share_target_head"] = True
    ignored: dict[str, str] = {}
    if draft_vocab_size in (None, fields["vocab_size"]):
        whole = "the draft vocabulary is the whole one"
        ignored.update((name, whole) for name in ("d2t", "t2d") if name in weights)
    else:
        fields["draft_vocab_size"] = draft_vocab_size
        if "d2t" in weights:
            weights["d2t"] = _target_ids(weights["d2t"], weights.get("t2d"), fields)
            ignored.update((name, "follows from d2t") for name in ("t2d",) if name in weights)
    return SourceDraft(fields, weights, _their_name, _layer_ids(config), ignored=ignored, notes=[EXPERIMENTAL])


def _target_ids(d2t: torch.Tensor, t2d: torch.Tensor | None, fields: dict) -> torch.Tensor:
    """Ids of the draft's tokens in the target's vocabulary; what both tables say must agree."""
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
    given = aux_layer_ids(config) or read_layer_list(config)
    if given is not None:
        return lambda num_target_layers: list(given)

    def default(num_target_layers: int | None) -> list[int]:
        num_layers = require_layers(num_target_layers, "it says which states an EAGLE-3 draft reads")
        if num_layers < 7:
            raise ValueError(f"target: expected at least 7 layers, for three states apart, got {num_layers}")
        return [2, num_layers // 2, num_layers - 3]

    return default


def _their_name(name: str) -> str:
    """Their name of one of our weights."""
    name = name.replace("processing_modules.0.layers.0.", "midlayer.").replace("fusion_layer.", "fc.")
    return "d2t" if name == "draft_to_target" else name


def _write(draft: PrismDraftModel, notes: list[str]):
    config = draft.config
    expectations = Expectations("eagle3", config)
    expectations.expect("module_form", "eagle3", "its layer is EAGLE-3's")
    expectations.expect("num_processing_modules", 1, "it has one set of parameters for all steps")
    expectations.expect("num_layers_per_module", 1, "it has one layer")
    expectations.expect("len(target_layer_ids)", 3, "its fc joins three states", len(config.target_layer_ids))
    expectations.expect("projection_bias", False, "its fc has no bias")
    expectations.expect("share_target_head", False, "it has a head of its own")
    expect_layers_before_the_last(expectations)
    expectations.check()
    settings = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **write_llama_config(config),
        "draft_vocab_size": config.num_draft_tokens,
        **aux_layer_field(config.target_layer_ids),
        AUX_LAYERS: config.target_layer_ids,
    }
    own = torch.arange(config.num_draft_tokens)
    ids = own if draft.draft_to_target is None else draft.draft_to_target.cpu()
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    notes.append("the EAGLE authors' own code reads the states 2, n // 2 and n - 3 of n, whatever config.json says")
    names = {name: _their_name(name) for name in draft.state_dict() if name != "draft_to_target"}
    return settings, names, {"d2t": ids - own, "t2d": t2d}
