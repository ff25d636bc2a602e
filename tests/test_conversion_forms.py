"""Conversion from and to the forms of SGLang, EAGLE and EAGLE-3: round trips, bit for bit, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from eagle3_vectors import LLAMA3
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import PAD_ID, VOCAB_SIZE, prompts, tiny_draft, tiny_target
from transformers import AutoModel
from typer.testing import CliRunner

from transformers_prism import load_draft
from transformers_prism.cli.main import app
from transformers_prism.conversion import eagle, eagle3, prism_artifact, sglang

pytestmark = pytest.mark.quick

FORMS = {"sglang": sglang, "eagle": eagle, "eagle3": eagle3}
# A draft of ours that each form can hold.
HELD = {
    "sglang": {"normalize_target_hidden": False},
    "sglang, one state": {"target_layer_ids": [8], "normalize_target_hidden": False, "projection_bias": False},
    "eagle": {"num_processing_modules": 1, "target_layer_ids": [8], "normalize_target_hidden": False},
    "eagle, stacked": {
        "num_processing_modules": 1,
        "num_layers_per_module": 2,
        "target_layer_ids": [8],
        "normalize_target_hidden": False,
    },
    "eagle3": {
        "module_form": "eagle3",
        "num_processing_modules": 1,
        "target_layer_ids": [1, 3, 6],
        "normalize_target_hidden": False,
        "projection_bias": False,
        "share_target_head": False,
        "draft_vocab_size": 40,
        "rope_parameters": LLAMA3,
    },
    "eagle3, whole vocabulary": {
        "module_form": "eagle3",
        "num_processing_modules": 1,
        "normalize_target_hidden": False,
        "projection_bias": False,
        "share_target_head": False,
    },
}
VECTORS = Path(__file__).parent / "data" / "reference"


def form_of(case: str) -> str:
    """The form that a case of `HELD` is for."""
    return case.split(",")[0]


@pytest.fixture(scope="module")
def target():
    """A target of eight layers."""
    return tiny_target(num_hidden_layers=8)


@pytest.fixture(scope="module")
def target_folder(target, tmp_path_factory):
    """Its folder."""
    folder = tmp_path_factory.mktemp("target")
    target.save_pretrained(folder)
    return folder


def save_draft(target, folder, case, **overrides):
    """A random draft of ours in a folder."""
    draft = tiny_draft(target, **{**HELD[case], **overrides})
    if draft.draft_to_target is not None:
        draft.draft_to_target.copy_(torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))[:40])
    draft.save_pretrained(folder)
    return draft


@pytest.mark.parametrize("case", HELD)
def test_a_draft_of_ours_comes_back_the_same(tmp_path, target, target_folder, case):
    """Every bit of its weights, the architecture, and the text and tau that it decodes."""
    form = FORMS[form_of(case)]
    draft = save_draft(target, tmp_path / "ours", case)
    report = form.export(tmp_path / "ours", tmp_path / "theirs", target_folder)
    assert {ours for ours, _, _ in report.matched} == set(draft.state_dict()) - {"draft_to_target"}
    assert any("experimental" in note for note in report.notes)
    imported = form.convert(tmp_path / "theirs", tmp_path / "back", target_folder)
    assert any("experimental" in note for note in imported.notes)
    back = AutoModel.from_pretrained(tmp_path / "back").eval()
    expected = draft.state_dict()
    assert back.state_dict().keys() == expected.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    saved, loaded = ({**one.config.to_dict(), "dtype": str(one.dtype)} for one in (draft, back))
    assert loaded.pop("target_fingerprint")["num_hidden_layers"] == 8
    assert {
        **loaded,
        **{name: saved[name] for name in ("_name_or_path", "initializer_range", "target_fingerprint")},
    } == saved
    back.generation_config = draft.generation_config
    input_ids, mask = prompts(2)
    texts = []
    for assistant in (draft, back):
        arguments = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD_ID, "do_sample": False}
        texts.append(target.generate(input_ids, assistant_model=assistant, **arguments))
    assert torch.equal(*texts)
    assert draft.last_speculation.accepted_per_round == back.last_speculation.accepted_per_round


@pytest.mark.parametrize("case", HELD)
def test_a_draft_of_theirs_comes_back_the_same(tmp_path, target, target_folder, case):
    """From another form into ours and out again: every tensor, every field."""
    form = FORMS[form_of(case)]
    save_draft(target, tmp_path / "ours", case)
    form.export(tmp_path / "ours", tmp_path / "theirs", target_folder)
    form.convert(tmp_path / "theirs", tmp_path / "converted", target_folder)
    form.export(tmp_path / "converted", tmp_path / "again", target_folder)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "theirs" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()


LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "post_attention_layernorm.weight",
]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "sglang",
            {
                *("fc0.weight", "fc0.bias", "fc1.weight", "fc1.bias", "fusion_layer.weight", "fusion_layer.bias"),
                *(f"midlayer.{module}.{name}" for module in (0, 1) for name in LAYER),
            },
        ),
        ("eagle", {"fc.weight", "fc.bias", *(f"layers.0.{name}" for name in LAYER)}),
        (
            "eagle, stacked",
            {
                *("fc.weight", "fc.bias", "layers.1.input_layernorm.weight"),
                *(f"layers.{layer}.{name}" for layer in (0, 1) for name in LAYER),
            },
        ),
        (
            "eagle3",
            {
                *("fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"),
                *("midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight"),
                *(f"midlayer.{name}" for name in LAYER),
            },
        ),
    ],
)
def test_names_are_those_of_the_form(tmp_path, target, target_folder, case, expected):
    """With a target the embedding is there too; without one it is left out and said so."""
    form = FORMS[form_of(case)]
    save_draft(target, tmp_path / "ours", case)
    report = form.export(tmp_path / "ours", tmp_path / "theirs")
    assert set(load_file(tmp_path / "theirs" / "model.safetensors")) == expected
    assert any("embed_tokens.weight is left out" in note for note in report.notes)
    form.export(tmp_path / "ours", tmp_path / "with embedding", target_folder)
    weights = load_file(tmp_path / "with embedding" / "model.safetensors")
    assert torch.equal(weights.pop("embed_tokens.weight"), target.get_input_embeddings().weight)
    assert set(weights) == expected


def test_tables_of_eagle3_name_the_draft_vocabulary(tmp_path, target):
    """d2t holds differences, t2d marks; the shape of the attention's input is twice the width."""
    draft = save_draft(target, tmp_path / "ours", "eagle3")
    eagle3.export(tmp_path / "ours", tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(weights["d2t"] + torch.arange(40), draft.draft_to_target)
    assert sorted(draft.draft_to_target.tolist()) == weights["t2d"].nonzero().flatten().tolist()
    assert weights["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (settings["vocab_size"], settings["draft_vocab_size"], settings["rope_theta"]) == (VOCAB_SIZE, 40, 5e5)
    assert settings["rope_scaling"]["rope_type"] == "llama3"
    # SGLang counts layers and means their outputs, vLLM counts states.
    assert settings["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 5]
    assert settings["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]


def test_eagle_without_a_bias_gets_one_of_zeros(tmp_path, target):
    """SGLang's class has one and would leave it at random; the draft computes the same with it."""
    draft = save_draft(target, tmp_path / "ours", "eagle", projection_bias=False)
    eagle.export(tmp_path / "ours", tmp_path / "theirs")
    assert torch.equal(load_file(tmp_path / "theirs" / "model.safetensors")["fc.bias"], torch.zeros(32))
    eagle.convert(tmp_path / "theirs", tmp_path / "back", num_target_layers=8)
    back = AutoModel.from_pretrained(tmp_path / "back").eval().bind(target)
    input_ids, states = prompts(1)[0], torch.randn(1, 9, 32)
    expected = draft.bind(target)(input_ids, states).last_hidden_state
    assert torch.equal(back(input_ids, states).last_hidden_state, expected)


def test_eagle_in_a_nested_configuration_is_read(tmp_path, target, target_folder):
    """As vLLM writes one: the layer's numbers are those of `model`."""
    draft = save_draft(target, tmp_path / "ours", "eagle")
    eagle.export(tmp_path / "ours", tmp_path / "theirs")
    layer = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": "eagle", "model": layer}))
    eagle.convert(tmp_path / "theirs", tmp_path / "back", target_folder)
    back = AutoModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(tensor, draft.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(tmp_path, target, target_folder, dtype):
    """Also of the embedding that is written beside the weights."""
    tiny_draft(target, **HELD["eagle"]).to(dtype).save_pretrained(tmp_path / "ours")
    eagle.export(tmp_path / "ours", tmp_path / "theirs", target_folder)
    assert {tensor.dtype for tensor in load_file(tmp_path / "theirs" / "model.safetensors").values()} == {dtype}
    assert eagle.convert(tmp_path / "theirs", tmp_path / "back", num_target_layers=8).dtype == dtype


@pytest.mark.parametrize(
    ("vectors", "form", "renamed"),
    [
        ("c4_legacy_hass1", eagle, {"stepFCs.0.": "fc.", "stepModels.0.": "layers."}),
        (
            "c1_v2_prism2",
            sglang,
            {
                **{f"stepFCs.{module}.": f"fc{module}." for module in (0, 1)},
                **{f"stepModels.{module}.0.": f"midlayer.{module}." for module in (0, 1)},
            },
        ),
    ],
)
def test_recorded_drafts_are_the_same_in_either_form(tmp_path, vectors, form, renamed):
    """tests/test_reference.py shows that those of the first form compute what the authors' code computes."""
    recorded = json.loads((VECTORS / "configs.json").read_text())[vectors]["drafter_config"]
    with np.load(VECTORS / f"{vectors}.npz") as arrays:
        weights = {key[2:]: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("w.")}
    head = weights.pop("lm_head.weight")
    ways = {"artifact": (prism_artifact, recorded, weights)}
    layer = recorded.get("eagle_config", recorded)
    names = {name: name for name in weights}
    for old, new in renamed.items():
        names = {name: re.sub(f"^{re.escape(old)}", new, there) for name, there in names.items()}
    their_weights = {there: weights[name] for name, there in names.items()}
    ways["other"] = (form, layer, {**their_weights, "lm_head.weight": head})
    drafts = []
    for way, (module, settings, tensors) in ways.items():
        (tmp_path / way).mkdir()
        (tmp_path / way / "config.json").write_text(json.dumps(settings))
        save_file(tensors, tmp_path / way / "model.safetensors")
        module.convert(tmp_path / way, tmp_path / f"{way} draft", num_target_layers=32)
        drafts.append(AutoModel.from_pretrained(tmp_path / f"{way} draft"))
    first, second = drafts
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert first.config.target_layer_ids == second.config.target_layer_ids
    assert [first.config.module_of_step(step) for step in range(5)] == [
        second.config.module_of_step(step) for step in range(5)
    ]


@pytest.mark.parametrize(
    ("case", "overrides", "match"),
    [
        ("sglang", {"num_processing_modules": 3}, r"draft_step_to_module: expected \[0, 1, 1\] .*got \[0, 1, 2\]"),
        ("sglang", {"num_processing_modules": 1}, r"expand_modules\(draft, 2\).*got \[0\]"),
        ("sglang", {"context_kv": "own_module"}, "context_kv: expected 'prefill_module' .*share keys and values"),
        ("sglang", {"num_layers_per_module": 2}, "num_layers_per_module: expected 1 .*got 2"),
        ("sglang", {"draft_vocab_size": 40}, "draft_vocab_size: expected None .*got 40"),
        ("sglang", {"normalize_target_hidden": True}, "normalize_target_hidden: expected False .*as they are"),
        (
            "sglang",
            {"target_layer_ids": [2, 4, 8]},
            r"target_layer_ids: expected indices from 1 to below 8 .*got \[2, 4, 8\]",
        ),
        ("sglang", {"target_layer_ids": [4]}, r"target_layer_ids: expected \[8\] .*the last state alone.*got \[4\]"),
        ("sglang", {"module_form": "eagle3"}, "module_form: expected 'prism' .*got 'eagle3'"),
        ("sglang", {"sliding_window": 64}, "sliding_window: expected None .*only the form speculators has it.*got 64"),
        ("eagle", {"num_processing_modules": 2}, "num_processing_modules: expected 1 .*got 2"),
        ("eagle", {"target_layer_ids": [3, 5]}, r"target_layer_ids: expected \[8\] .*no fusion layer.*got \[3, 5\]"),
        ("eagle", {"target_layer_ids": [5]}, r"target_layer_ids: expected \[8\] .*got \[5\]"),
        ("eagle", {"share_target_embedding": False}, "share_target_embedding: expected True .*lend"),
        ("eagle", {"share_target_head": False}, "share_target_head: expected True"),
        (
            "eagle",
            {"logit_scale": 0.5, "logit_softcap": 30.0},
            "logit_scale: expected 1.0 .*logit_softcap: expected None",
        ),
        ("eagle", {"hidden_act": "gelu"}, "hidden_act: expected 'silu' .*got 'gelu'"),
        (
            "eagle",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type: expected default, linear, llama3, yarn .*got 'dynamic'",
        ),
        ("eagle3", {"module_form": "prism"}, "module_form: expected 'eagle3' .*got 'prism'"),
        ("eagle3", {"target_layer_ids": [2, 4]}, r"len\(target_layer_ids\): expected 3 .*got 2"),
        ("eagle3", {"projection_bias": True}, "projection_bias: expected False"),
        ("eagle3", {"share_target_head": True}, "share_target_head: expected False"),
        ("eagle3", {"num_processing_modules": 2}, "num_processing_modules: expected 1 .*got 2"),
    ],
)
def test_a_form_says_why_it_cannot_hold_a_draft(tmp_path, target, case, overrides, match):
    """And writes nothing."""
    tiny_draft(target, **{**HELD[case], **overrides}).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"the form {form_of(case)} cannot hold this draft: .*{match}"):
        FORMS[form_of(case)].export(tmp_path / "ours", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def broken_source(tmp_path, target, target_folder, case, change):
    """A checkpoint of the form in which `change(settings, weights)` has altered something."""
    save_draft(target, tmp_path / "ours", case)
    FORMS[form_of(case)].export(tmp_path / "ours", tmp_path / "theirs", target_folder)
    path = tmp_path / "theirs"
    settings, weights = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
    change(settings, weights)
    (path / "config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    return path


def drop(*names):
    """A change that removes weights."""
    return lambda settings, weights: [weights.pop(name) for name in names]


def put(**fields):
    """A change of fields in config.json."""
    return lambda settings, weights: settings.update(fields)


def replace(name, value):
    """A change of one weight."""
    return lambda settings, weights: weights.update({name: value(weights.get(name))})


@pytest.mark.parametrize(
    ("case", "change", "match"),
    [
        ("sglang", drop("fc1.bias"), r"missing weights: \['fc1.bias'\]"),
        ("sglang", drop("fusion_layer.bias"), r"missing weights: \['fusion_layer.bias'\]"),
        ("sglang", replace("fc2.weight", lambda _: torch.ones(32, 64)), r"modules 0 and 1, .*got \[0, 1, 2\]"),
        (
            "sglang",
            replace("midlayer.1.norm.weight", lambda _: torch.ones(32)),
            r"unknown weights: \['midlayer.1.norm",
        ),
        ("sglang", put(num_hidden_layers=2), "num_hidden_layers to be 1, got 2"),
        ("sglang", put(eagle_config={"eagle_aux_hidden_state_layer_ids": "all"}), "to list layers, got 'all'"),
        ("sglang", put(eagle_config=None), r"at least 30 layers.*\[3, 17, 30\], got 8"),
        ("eagle", drop("layers.0.mlp.up_proj.weight"), r"missing weights: \['layers.0.mlp.up_proj.weight'\]"),
        ("eagle", put(num_hidden_layers=2), "missing weights: .*layers.1.input_layernorm.weight"),
        ("eagle", replace("fc.weight", lambda fc: fc[:, 1:]), r"fc.weight: expected \[32, 64\], got \[32, 63\]"),
        ("eagle", replace("embed_tokens.weight", lambda rows: rows[1:]), r"embed_tokens.weight: expected \[97, 32\]"),
        ("eagle", put(vocab_size=50), "vocab_size: expected the target's, 97 .*got 50"),
        ("eagle", put(attention_bias=True), "expected attention_bias to be absent or false, got True"),
        ("eagle", put(qkv_bias=True), "missing weights: .*layers.0.self_attn.k_proj.bias.*q_proj.bias.*v_proj.bias"),
        ("eagle3", put(qkv_bias=True), "expected qkv_bias to be absent or false, got True"),
        ("eagle", put(hidden_size=None), r"got none named \['hidden_size'\]"),
        ("eagle", put(rope_scaling={"type": "dynamic", "factor": 2.0}), "type default, linear, llama3, yarn, got 'dynamic'"),
        ("eagle", put(rope_scaling="linear"), "rope_scaling to be null or an object, got 'linear'"),
        ("eagle", put(rope_theta="large"), "rope_theta to be a finite number above 0, got 'large'"),
        ("eagle", put(num_attention_heads=3), "num_attention_heads: expected a multiple"),
        ("eagle3", drop("norm.weight"), r"missing weights: \['norm.weight'\]"),
        ("eagle3", drop("d2t"), r"missing weights: \['d2t'\]"),
        ("eagle3", drop("lm_head.weight"), r"missing weights: \['lm_head.weight'\]"),
        (
            "eagle3",
            put(draft_vocab_size=41),
            r"d2t: expected 41 integers \(draft_vocab_size\), got torch.int64 of shape \[40\]",
        ),
        ("eagle3", replace("d2t", lambda d2t: d2t.float()), "d2t: expected 40 integers .*got torch.float32"),
        ("eagle3", replace("d2t", lambda d2t: d2t + 97), r"d2t: expected distinct tokens in 0..96, got"),
        ("eagle3", replace("d2t", lambda d2t: -torch.arange(40)), r"d2t: expected distinct tokens in 0..96, got 0..0"),
        ("eagle3", replace("t2d", lambda t2d: ~t2d), "t2d: expected the tokens that d2t names"),
        ("eagle", put(norm_before_residual=True), "expected norm_before_residual to be absent or false"),
        ("eagle3", put(norm_before_fc=True), r"missing weights: \['input_norm.weight'\]"),
        ("eagle3", put(fc_norm=True), r"missing weights: \['fc_norm.0.weight', 'fc_norm.1.weight', 'fc_norm.2.weight'\]"),
        ("eagle3", put(eagle_config=None, eagle_aux_hidden_state_layer_ids=[1, "2"]), "to list layers, got"),
        ("eagle3", put(eagle_config=None, eagle_aux_hidden_state_layer_ids=[1, 2]), r"fc.weight: expected \[32, 64\]"),
        ("eagle3", put(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state to be true, got false"),
        ("eagle3", put(partial_rotary_factor=0.5), "partial_rotary_factor to be absent or 1, got 0.5"),
        ("eagle", put(rope_scaling={"type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        ("eagle", put(hidden_act="swiglu2"), "a hidden_act that transformers knows, got 'swiglu2'"),
        ("eagle3", put(logit_scale="1"), "logit_scale to be a number, got '1'"),
        ("eagle3", replace("norm.weight", lambda norm: norm.half()), "one floating point dtype.*float16.*float32"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path, target, target_folder, case, change, match):
    """With the names, and nothing is written."""
    source = broken_source(tmp_path, target, target_folder, case, change)
    with pytest.raises(ValueError, match=match):
        FORMS[form_of(case)].convert(source, tmp_path / "draft", target_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_fields_that_say_nothing_are_as_if_absent(tmp_path, target, target_folder):
    """An empty list of layers, as ModelOpt writes, and null."""
    layers = {"eagle_aux_hidden_state_layer_ids": []}
    empty = put(logit_scale=None, hidden_act=None, eagle_config={"use_aux_hidden_state": True, **layers}, **layers)
    source = broken_source(tmp_path, target, target_folder, "eagle3", empty)
    draft = FORMS["eagle3"].convert(source, tmp_path / "draft", target_folder).config
    assert (draft.logit_scale, draft.hidden_act, draft.target_layer_ids) == (1.0, "silu", [2, 4, 5])


def test_a_table_that_orders_the_whole_vocabulary_anew_is_read(tmp_path, target, target_folder):
    """Without it the draft's rows would stand for other tokens."""
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))

    def permute(settings, weights):
        settings["draft_vocab_size"] = 97
        weights.update(d2t=order - torch.arange(97), t2d=torch.ones(97, dtype=torch.bool))

    source = broken_source(tmp_path, target, target_folder, "eagle3, whole vocabulary", permute)
    FORMS["eagle3"].convert(source, tmp_path / "draft", target_folder)
    assert torch.equal(load_file(tmp_path / "draft" / "model.safetensors")["draft_to_target"], order)


def test_a_draft_of_ours_is_compared_with_a_target_by_name(tmp_path, target, target_folder):
    """As with a loaded one."""
    save_draft(target, tmp_path / "ours", "eagle")
    load_draft(tmp_path / "ours", target=target_folder)
    tiny_target("llama", vocab_size=61).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"vocab_size: expected 97 \(draft\), got 61 \(target\)"):
        load_draft(tmp_path / "ours", target=tmp_path / "other")


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_with_code_is_refused(tmp_path, target, target_folder, form):
    """Every form reads weights by the same two ways."""
    source = broken_source(tmp_path, target, target_folder, form, lambda settings, weights: None)
    (source / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "payload"),)

    torch.save({"fc.weight": Payload()}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a file of nothing but tensors, got one that was refused"):
        FORMS[form].convert(source, tmp_path / "draft", target_folder)
    assert not (tmp_path / "payload").exists()


@pytest.mark.parametrize(
    ("asked", "given"), [("eagle", "eagle3"), ("eagle3", "eagle"), ("eagle", "sglang"), ("sglang", "eagle3")]
)
def test_the_form_that_a_source_has_is_named(tmp_path, target, target_folder, asked, given):
    """Where another one was asked for."""
    source = broken_source(tmp_path, target, target_folder, given, lambda settings, weights: None)
    with pytest.raises(ValueError, match=f"missing weights.*--from {given} have names like those"):
        FORMS[asked].convert(source, tmp_path / "draft", target_folder)


def test_states_of_eagle3_follow_from_the_number_of_layers(tmp_path, target, target_folder):
    """2, n // 2 and n - 3 where config.json names none; the number has to come from somewhere."""

    def change(settings, weights):
        del settings["eagle_config"], settings["eagle_aux_hidden_state_layer_ids"]

    source = broken_source(tmp_path, target, target_folder, "eagle3", change)
    with pytest.raises(ValueError, match=r"--num-target-layers.*which states an EAGLE-3 draft reads; got neither"):
        eagle3.convert(source, tmp_path / "draft")
    with pytest.raises(ValueError, match="at least 7 layers, for three states apart, got 6"):
        eagle3.convert(source, tmp_path / "draft", num_target_layers=6)
    assert eagle3.convert(source, tmp_path / "draft", num_target_layers=32).config.target_layer_ids == [2, 16, 29]


def test_layers_in_vllms_field_count_as_states(tmp_path, target, target_folder):
    """Outside `eagle_config`, unlike SGLang's."""
    source = broken_source(
        tmp_path, target, target_folder, "eagle3", put(eagle_config=None, eagle_aux_hidden_state_layer_ids=[1, 2, 5])
    )
    assert eagle3.convert(source, tmp_path / "draft", target_folder).config.target_layer_ids == [1, 2, 5]


def test_two_lists_of_layers_that_differ_are_told(tmp_path, target, target_folder):
    """SGLang's is read, which counts layers from 0; lists that mean the same states need no word."""
    for own, is_told in (([1, 2, 5], False), ([0, 1, 4], True)):
        nested = {"eagle_aux_hidden_state_layer_ids": [0, 1, 4]}
        change = put(eagle_config=nested, eagle_aux_hidden_state_layer_ids=own)
        source = broken_source(tmp_path / str(is_told), target, target_folder, "eagle3", change)
        report = eagle3.convert(source, tmp_path / str(is_told) / "draft", target_folder)
        assert report.config.target_layer_ids == [1, 2, 5]
        assert [note for note in report.notes if "two lists" in note] == (
            [f"config.json names two lists of states: [1, 2, 5] by eagle_config, which are read, and {own}"] if is_told else []
        )


def test_eagle3_for_a_wider_target(tmp_path, target_folder):
    """A draft narrower than its target keeps its own embedding, and decodes."""
    wide = tiny_target(num_hidden_layers=8, hidden_size=48, head_dim=12)
    draft = save_draft(
        wide,
        tmp_path / "ours",
        "eagle3",
        hidden_size=32,
        head_dim=8,
        share_target_embedding=False,
        rope_parameters=None,
    )
    weights = {eagle3._their_name(name): tensor for name, tensor in draft.state_dict().items()}
    weights["d2t"] = weights["d2t"] - torch.arange(40)
    source = tmp_path / "theirs"
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    fields = eagle3.write_llama_config(draft.config)
    (source / "config.json").write_text(json.dumps({**fields, "draft_vocab_size": 40, "target_hidden_size": 48}))
    eagle3.convert(source, tmp_path / "draft", num_target_layers=8)
    back = AutoModel.from_pretrained(tmp_path / "draft").eval()
    assert torch.equal(back.embed_tokens.weight, draft.embed_tokens.weight)
    input_ids, _ = prompts(1)
    arguments = {"max_new_tokens": 8, "pad_token_id": PAD_ID, "do_sample": False}
    plain = wide.generate(input_ids, **arguments)
    assert torch.equal(plain, wide.generate(input_ids, assistant_model=back, **arguments))


def test_biases_of_queries_keys_and_values_are_read(tmp_path, target, target_folder):
    """As drafts for Qwen2 have them; the output projection's bias, which they lack, is zero."""
    sizes = {"q": 32, "k": 16, "v": 16}
    biases = {f"layers.0.self_attn.{name}_proj.bias": torch.randn(size) for name, size in sizes.items()}

    def change(settings, weights):
        settings["qkv_bias"] = True
        weights.update(biases)

    source = broken_source(tmp_path, target, target_folder, "eagle", change)
    report = eagle.convert(source, tmp_path / "draft", target_folder)
    weights = AutoModel.from_pretrained(tmp_path / "draft").state_dict()
    for name, bias in biases.items():
        assert torch.equal(weights[f"processing_modules.0.{name}"], bias)
    assert not weights["processing_modules.0.layers.0.self_attn.o_proj.bias"].any()
    assert any("qkv_bias" in note for note in report.notes)


def test_a_source_on_the_hub_is_found_in_its_cache(tmp_path, target, target_folder, monkeypatch):
    """By its name; a name that is not there is an error that names it."""
    source = broken_source(tmp_path, target, target_folder, "eagle", lambda settings, weights: None)
    repository = tmp_path / "hub" / "models--org--eagle-draft"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    source.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert eagle.convert("org/eagle-draft", tmp_path / "draft", target_folder).config.num_processing_modules == 1
    for name in ("org/nothing", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match=f"source: expected a folder or a name on the Hub, got {re.escape(name)}"):
            eagle.convert(name, tmp_path / "other", target_folder)


@pytest.mark.parametrize("license_name", [None, "mit"])
def test_the_card_of_a_converted_draft_claims_no_licence_of_its_own(tmp_path, target, target_folder, license_name):
    """That of the source's card, or none that is known; where it came from, and that the form is experimental."""
    source = broken_source(tmp_path, target, target_folder, "eagle", lambda settings, weights: None)
    if license_name:
        (source / "README.md").write_text(f"---\nlicense: {license_name}\n---\n")
    eagle.convert(source, tmp_path / "draft", target_folder)
    card = ModelCard.load(tmp_path / "draft" / "README.md")
    assert card.data.license == (license_name or "unknown")
    assert f"converted from `{source.name}`" in card.text
    assert "The conversion is experimental: no published file" in card.text


def test_export_leaves_nothing_when_writing_fails(tmp_path, target, monkeypatch):
    """A full disk: the destination is not there, and no folder beside it."""
    save_draft(target, tmp_path / "ours", "eagle")

    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers_prism.conversion.exporting.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        eagle.export(tmp_path / "ours", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_export_refuses_a_target_with_another_embedding(tmp_path, target):
    """Its shape is compared before anything is written."""
    save_draft(target, tmp_path / "ours", "eagle")
    tiny_target(vocab_size=50).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"embed_tokens.weight of shape \[97, 32\] .*got \[50, 32\]"):
        eagle.export(tmp_path / "ours", tmp_path / "theirs", tmp_path / "other")


def test_command_goes_both_ways(tmp_path, target, target_folder):
    """`--to`, then `--from`; one of the two, exactly."""
    save_draft(target, tmp_path / "ours", "eagle3")
    places = [str(tmp_path / "ours"), str(tmp_path / "theirs")]
    result = CliRunner().invoke(app, ["convert", "--to", "eagle3", *places])
    assert result.exit_code == 0, result.output
    assert "note: experimental" in result.output
    assert "-> midlayer.hidden_norm.weight" in result.output
    arguments = ["convert", "--from", "eagle3", str(tmp_path / "theirs"), str(tmp_path / "back")]
    result = CliRunner().invoke(app, [*arguments, "--target", str(target_folder)])
    assert result.exit_code == 0, result.output
    assert "midlayer.hidden_norm.weight" in result.output
    for options, found in ((["--from", "eagle", "--to", "eagle"], "both"), ([], "none")):
        result = CliRunner().invoke(app, ["convert", *options, *places])
        assert result.exit_code == 1
        assert f"expected either --from or --to, got {found}" in result.output
    for option, name in ((["--context-kv", "own_module"], "context_kv"), (["--num-target-layers", "9"], "num_target_layers")):
        result = CliRunner().invoke(app, ["convert", "--to", "eagle3", *places, *option])
        assert result.exit_code == 1
        assert f"{name}: expected none with --to" in result.output


def test_the_page_on_forms_lists_those_that_the_command_takes():
    """docs/convert.md says of each whether it is read and written."""
    page = (Path(__file__).parent.parent / "docs" / "convert.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \|.*\| (yes|no) \| (yes|no) \|", page, flags=re.MULTILINE)
    help_text = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).output
    for option, column in (("--from", 1), ("--to", 2)):
        choices = re.search(rf"{option} .*<(\S+)>", help_text)[1].split("|")
        assert [row[0] for row in rows if row[column] == "yes"] == choices
