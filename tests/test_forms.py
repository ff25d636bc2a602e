"""load_draft: drafts of every form, against what the classes of speculators, SpecForge and vLLM compute, and played in our
loop."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Repository
from safetensors.torch import load_file, save_file
from tiny_models import EOS_ID, PAD_ID, prompts, tiny_draft, tiny_target
from transformers import DynamicCache

from transformers_prism import PrismConfig, load_draft
from transformers_prism.conversion.forms import WRITTEN

pytestmark = pytest.mark.quick

VECTORS = sorted((Path(__file__).parent / "data" / "eagle3").glob("*.npz"))
CASES = [path.stem for path in VECTORS]


def write_source(folder, case, change=None):
    """The draft of one file of vectors in a folder, as its library saved it; returns the arrays."""
    with np.load(Path(__file__).parent / "data" / "eagle3" / f"{case}.npz") as arrays:
        vectors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "config"}
        config = json.loads(bytes(arrays["config"]))
    weights = {name[2:]: tensor for name, tensor in vectors.items() if name.startswith("w.")}
    if change is not None:
        change(config, weights)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return vectors


def vector_target(case, **overrides):
    """A random target that the draft of this case fits."""
    width = 24 if case.endswith("_wide_target") else 16
    target = tiny_target(num_hidden_layers=8, hidden_size=width, head_dim=width // 4, **overrides)
    target.config._name_or_path = "org/target"
    return target


def play(draft, vectors, num_steps):
    """Outputs and logits of our draft along the chain of the vectors."""
    tokens, states = vectors["tokens"][None], vectors["states"][None]
    num_positions = states.shape[1]
    cache = DynamicCache()
    hidden, logits = [], []
    with torch.no_grad():
        stream = draft(tokens[:, :num_positions], states, 0, cache=cache).last_hidden_state[:, -1:]
        for step in range(num_steps):
            if step > 0:
                token = tokens[:, num_positions - 1 + step][:, None]
                stream = draft(token, stream, step, cache=cache).last_hidden_state
            hidden.append(stream[0, 0])
            logits.append(draft.compute_logits(stream)[0, 0])
    return torch.stack(hidden), torch.stack(logits)


@pytest.mark.parametrize("case", CASES)
def test_forms_compute_what_the_other_library_computes(tmp_path, case):
    """Hidden states and logits of every step of a chain, and the ids that its tokens stand for."""
    vectors = write_source(tmp_path / "theirs", case)
    draft = load_draft(tmp_path / "theirs", vector_target(case))
    hidden, logits = play(draft.bind(vector_target(case)), vectors, len(vectors["hidden"]))
    differences = [
        float((ours - vectors[name]).abs().max()) for name, ours in (("hidden", hidden), ("logits", logits))
    ]
    assert max(differences) < 1e-4, differences
    assert vectors["logits"].std() > 0.1
    if "w.d2t" in vectors and draft.draft_to_target is not None:
        assert torch.equal(draft.draft_to_target - torch.arange(len(vectors["w.d2t"])), vectors["w.d2t"])


def test_forms_read_a_bias_of_fc(tmp_path):
    """SGLang's class may have one: the state of step 0 moves by what it adds."""
    bias = torch.linspace(-1, 1, 16)
    write_source(tmp_path / "plain", "specforge_plain")
    write_source(tmp_path / "biased", "specforge_plain", lambda config, weights: weights.update({"fc.bias": bias}))
    plain, biased = (load_draft(tmp_path / name, vector_target("specforge_plain")) for name in ("plain", "biased"))
    states = torch.randn(1, 3, 48)
    assert torch.allclose(biased.fuse(states), plain.fuse(states) + bias, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("speculators")])
def test_forms_export_to_speculators_and_back(tmp_path, case):
    """Every weight under its own name, and the settings, as speculators wrote them."""
    vectors = write_source(tmp_path / "theirs", case)
    draft = load_draft(tmp_path / "theirs", vector_target(case))
    draft.save_pretrained(tmp_path / "ours")
    WRITTEN["speculators"].export(tmp_path / "ours", tmp_path / "again")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    expected = {name[2:]: tensor for name, tensor in vectors.items() if name.startswith("w.")}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again"))
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "draft_vocab_size"):
        assert first[name] == second[name]
    assert second["speculators_config"]["verifier"]["name_or_path"] == "org/target"


@pytest.mark.skipif(importlib.util.find_spec("speculators") is None, reason="speculators is not installed")
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("speculators")])
def test_forms_speculators_loads_what_we_export(tmp_path, case):
    """By its own class, every weight in its place."""
    from eagle3_vectors import stub_what_training_imports

    stub_what_training_imports()
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    write_source(tmp_path / "theirs", case)
    load_draft(tmp_path / "theirs", vector_target(case)).save_pretrained(tmp_path / "ours")
    WRITTEN["speculators"].export(tmp_path / "ours", tmp_path / "again")
    config = Eagle3SpeculatorConfig.from_dict(json.loads((tmp_path / "again" / "config.json").read_text()))
    model = Eagle3DraftModel(config)
    found = model.load_state_dict(load_file(tmp_path / "again" / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_forms_play_with_trees_and_batches(tmp_path, case, do_sample):
    """Three prompts of different lengths, trees: the output is plain generate's."""
    write_source(tmp_path / "theirs", case)
    target = vector_target(case)
    draft = load_draft(tmp_path / "theirs", target)
    draft.generation_config.update(tree="static", tree_top_k=3, tree_depth=4, tree_num_nodes=15)
    input_ids, mask = prompts(3)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD_ID, "eos_token_id": EOS_ID}
    texts = []
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(3)
        texts.append(target.generate(input_ids, do_sample=do_sample, **arguments, **assistant))
    assert torch.equal(*texts)
    assert draft.last_speculation.declined is None


def test_forms_say_what_was_read_and_assumed(tmp_path, caplog):
    """One line of the log, and all of it on the draft."""
    write_source(tmp_path / "theirs", "specforge_plain")
    with caplog.at_level(logging.WARNING, logger="transformers_prism"):
        logging.getLogger("transformers_prism").addHandler(caplog.handler)
        draft = load_draft(tmp_path / "theirs", vector_target("specforge_plain"))
    lines = [record.message for record in caplog.records if "read as" in record.message]
    assert lines[0].startswith(f"{tmp_path / 'theirs'}: read as a draft of the form eagle3")
    assert "the states [2, 4, 5]" in lines[0]
    assert "2, n // 2 and n - 3 of n are assumed" in lines[0]
    assert "midlayer.hidden_norm.weight" in str(draft.conversion_report)
    assert str(draft.conversion_report).startswith(f"{tmp_path / 'theirs'} (model.safetensors) -> memory")


def test_forms_say_that_the_last_state_is_another_one(tmp_path):
    """After the final norm here, before it in servers."""
    last = {"eagle_aux_hidden_state_layer_ids": [2, 4, 8]}
    write_source(tmp_path / "theirs", "speculators_plain", lambda config, weights: config.update(last))
    draft = load_draft(tmp_path / "theirs", vector_target("speculators_plain"))
    assert any("the state 8 is read after the target's final norm" in note for note in draft.conversion_report.notes)


def test_forms_take_a_draft_of_ours(tmp_path):
    """With the target's dtype, and its own configuration of trees."""
    target = tiny_target()
    draft = tiny_draft(target)
    draft.save_pretrained(tmp_path / "draft")
    loaded = load_draft(tmp_path / "draft", target.to(torch.bfloat16))
    assert loaded.dtype == torch.bfloat16
    assert loaded.conversion_report is None
    assert loaded.generation_config.tree_depth == draft.generation_config.tree_depth
    assert load_draft(tmp_path / "draft", dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="made for another target.*hidden_size"):
        load_draft(tmp_path / "draft", tiny_target(hidden_size=48, head_dim=12))


@pytest.mark.parametrize("form", ["sglang", "eagle", "eagle3"])
def test_forms_are_told_apart(tmp_path, form):
    """By their weights alone, with the prefix of servers' classes too; the embedding is compared with the loaded target's."""
    one = {"num_processing_modules": 1, "normalize_target_hidden": False}
    settings = {
        "sglang": {"normalize_target_hidden": False},
        "eagle": {"target_layer_ids": [8], **one},
        "eagle3": {"module_form": "eagle3", "projection_bias": False, "share_target_head": False, **one},
    }
    target = tiny_target(num_hidden_layers=8)
    target.save_pretrained(tmp_path / "target")
    draft = tiny_draft(target, **settings[form])
    draft.save_pretrained(tmp_path / "ours")
    WRITTEN[form].export(tmp_path / "ours", tmp_path / "theirs", tmp_path / "target")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    head = {"lm_head.weight", "d2t", "t2d"}
    renamed = {name if name in head else f"model.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "theirs" / "model.safetensors")
    loaded = load_draft(tmp_path / "theirs", target)
    assert loaded.conversion_report.notes[0] == f"read as a draft of the form {form}"
    assert any("embed_tokens.weight equals the embedding of" in note for note in loaded.conversion_report.notes)
    expected = draft.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def put(**fields):
    """A change of fields in config.json."""
    return lambda config, weights: config.update(fields)


def in_layer(**fields):
    """A change in the part of speculators' config.json that describes the layer."""
    return lambda config, weights: config["transformer_layer_config"].update(fields)


def tie_head(config, weights):
    """The head is the embedding, as SGLang reads it."""
    config["tie_word_embeddings"] = True
    weights["embed_tokens.weight"] = weights.pop("lm_head.weight")


def older_norms(config, weights):
    """Names of norms before fc that SGLang still reads."""
    del config["fc_norm"]
    config["use_aux_norm"] = True
    for state, name in enumerate(("low", "mid", "high")):
        weights[f"aux_norm_{name}.weight"] = weights.pop(f"fc_norm.{state}.weight")


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("speculators_plain", lambda config, weights: config.pop("draft_vocab_size")),
        ("speculators_plain", put(speculators_config={"verifier": None})),
        ("specforge_plain", lambda config, weights: weights.pop("t2d")),
        ("specforge_plain", lambda config, weights: weights.update({"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(2)})),
        ("vllm_fc_norm", older_norms),
    ],
)
def test_forms_read_files_that_say_less_or_say_it_otherwise(tmp_path, case, change):
    """Without optional fields, under older names: the same states and logits."""
    vectors = write_source(tmp_path / "theirs", case, change)
    draft = load_draft(tmp_path / "theirs", vector_target(case))
    hidden, logits = play(draft, vectors, len(vectors["hidden"]))
    assert (hidden - vectors["hidden"]).abs().max() < 1e-4
    assert (logits - vectors["logits"]).abs().max() < 1e-4


def test_forms_read_a_head_that_is_the_embedding(tmp_path):
    """Where the file has no other."""
    vectors = write_source(tmp_path / "theirs", "vllm_whole_vocabulary", tie_head)
    draft = load_draft(tmp_path / "theirs", vector_target("vllm_whole_vocabulary"))
    assert torch.equal(draft.lm_head.weight, vectors["w.lm_head.weight"])
    assert torch.equal(draft.embed_tokens.weight, vectors["w.lm_head.weight"])


@pytest.mark.parametrize("kind", ["shards", "pickle", "pickled shards", "bfloat16"])
def test_forms_read_every_kind_of_weight_file(tmp_path, kind):
    """Whole, in shards, and PyTorch's."""
    write_source(tmp_path / "whole", "specforge_plain")
    write_source(tmp_path / "theirs", "specforge_plain")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    if kind == "bfloat16":
        weights = {name: weight.bfloat16() if weight.is_floating_point() else weight for name, weight in weights.items()}
        save_file(weights, tmp_path / "theirs" / "model.safetensors")
    else:
        (tmp_path / "theirs" / "model.safetensors").unlink()
        stem, save = ("model", save_file) if kind == "shards" else ("pytorch_model", torch.save)
        ending = "safetensors" if kind == "shards" else "bin"
        names, files = sorted(weights), {f"{stem}.{ending}": set(weights)}
        if "shards" in kind:
            files = {f"{stem}-0000{part + 1}-of-00002.{ending}": set(names[part::2]) for part in range(2)}
            index = {"weight_map": {name: file for file, kept in files.items() for name in kept}}
            (tmp_path / "theirs" / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
        for file, kept in files.items():
            save({name: weights[name] for name in kept}, tmp_path / "theirs" / file)
    loaded, expected = (load_draft(tmp_path / name, num_target_layers=8) for name in ("theirs", "whole"))
    assert loaded.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name].to(weight.dtype)), name


def test_forms_refuse_a_scale_that_is_no_number(tmp_path):
    """vLLM's field."""
    write_source(tmp_path / "theirs", "vllm_logit_scale", put(logit_scale="x"))
    with pytest.raises(ValueError, match="logit_scale to be a number, got 'x'"):
        load_draft(tmp_path / "theirs", num_target_layers=8)


def test_forms_read_the_configuration_of_a_repository_first(hub, tmp_path, monkeypatch):
    """A draft of this package is loaded by its own from_pretrained(), and nothing that it does not need is downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    target = tiny_target()
    tiny_draft(target).save_pretrained(tmp_path / "draft")
    files = {path.name: path.read_bytes() for path in (tmp_path / "draft").iterdir() if path.is_file()}
    hub.repositories["me/draft"] = repository = Repository()
    repository.commit("main", {**files, "other.safetensors": b"x" * 100})
    draft = load_draft("me/draft", target)
    assert draft._borrowed.target is target
    assert not any("other.safetensors" in request for request in hub.requests)
    with pytest.raises(ValueError, match="expected a folder or a name on the Hub, got me/nothing"):
        load_draft("me/nothing")


def test_forms_refuse_an_unknown_one(tmp_path):
    """Naming what was looked for and what is there."""

    def change(config, weights):
        config.clear()
        config.update(model_type="llama", architectures=["Medusa"])
        weights.clear()
        weights["medusa_head.0.weight"] = torch.ones(2, 2)

    write_source(tmp_path / "theirs", "specforge_plain", change)
    with pytest.raises(
        ValueError, match=r"speculators_model_type.*midlayer.hidden_norm.weight \(eagle3\).*Medusa.*medusa_head"
    ):
        load_draft(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put(speculators_model_type="dflash"), "speculators_model_type to be 'eagle3', got 'dflash'"),
        (put(transformer_layer_config=None), "transformer_layer_config to be an object, got None"),
        (put(transformer_layer_config={"model_type": "gpt2"}), "model_type llama or qwen3, got 'gpt2'"),
        (lambda config, weights: weights.pop("layers.0.hidden_norm.weight"), "missing weights: .*hidden_norm"),
        (lambda config, weights: weights["norm.weight"].fill_(torch.nan), "norm.weight"),
        (put(speculators_config="x"), "speculators_config and its verifier to be objects, got 'x'"),
        (put(speculators_config={"verifier": "x"}), "its verifier to be objects"),
        (put(quantization_config={"quant_method": "fp8"}), "quantization_config to be absent or false, got .*fp8"),
        (in_layer(num_attention_heads="x"), "(?s)transformer_layer_config: .*num_attention_heads.* expected int"),
        (in_layer(layer_types=["sliding_attention"]), "sliding_window to be a whole number above 0, got None"),
        (in_layer(sliding_window="x"), "sliding_window to be a whole number above 0, got 'x'"),
        (
            in_layer(num_hidden_layers=2, sliding_window=4, layer_types=["full_attention", "sliding_attention"]),
            "layer_types of full_attention or of sliding_attention alone, got .*'full_attention', 'sliding_attention'",
        ),
        (put(draft_vocab_size="40"), "draft_vocab_size to be a whole number above 0, got '40'"),
        (
            lambda config, weights: weights.update({name: w.to(torch.float8_e4m3fn) for name, w in weights.items() if w.is_floating_point()}),
            "at least 16 bits, got .*float8",
        ),
    ],
)
def test_forms_refuse_what_no_draft_here_computes(tmp_path, change, match):
    """With the field or the weight."""
    write_source(tmp_path / "theirs", "speculators_plain", change)
    with pytest.raises(ValueError, match=match):
        load_draft(tmp_path / "theirs")


_OF_QWEN = {"sliding_window": 4, "use_sliding_window": True}


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        ("speculators_plain", in_layer(sliding_window=4), 4),
        ("speculators_plain", in_layer(sliding_window=4, layer_types=["sliding_attention"]), 4),
        ("speculators_plain", in_layer(sliding_window=4, layer_types=["full_attention"]), None),
        ("speculators_two_layers", in_layer(sliding_window=4, max_window_layers=0), 4),
        ("speculators_two_layers", in_layer(sliding_window=4, max_window_layers=2), None),
        ("speculators_qwen3", in_layer(sliding_window=4), None),
        ("speculators_qwen3", in_layer(**_OF_QWEN), None),
        ("speculators_qwen3", in_layer(**_OF_QWEN, max_window_layers=0, layer_types=None), 4),
        ("specforge_plain", put(sliding_window=4), 4),
        ("specforge_plain", put(sliding_window=4, use_sliding_window=False), None),
        ("specforge_plain", put(sliding_window=None), None),
    ],
)
def test_forms_take_over_a_sliding_window(tmp_path, case, change, expected):
    """Of all layers, or none; it is written where the form has a place for it, and hides what is before it."""
    vectors = write_source(tmp_path / "theirs", case, change)
    draft = load_draft(tmp_path / "theirs", vector_target(case))
    assert draft.config.sliding_window == expected
    hidden, _ = play(draft.bind(vector_target(case)), vectors, 2)
    assert torch.allclose(hidden, vectors["hidden"][:2], atol=1e-4) is (expected is None)
    if case.startswith("speculators"):
        draft.save_pretrained(tmp_path / "ours")
        WRITTEN["speculators"].export(tmp_path / "ours", tmp_path / "again")
        assert load_draft(tmp_path / "again", vector_target(case)).config.sliding_window == expected


@pytest.mark.parametrize(
    ("overrides", "name", "match"),
    [
        ({"vocab_size": 50}, "org/target", "vocab_size: expected the target's, 50 .*got 97"),
        ({"hidden_size": 32, "head_dim": 8}, "org/target", "hidden_size: expected the target's, 32 .*got 16"),
        ({}, "org/other", "expected the name that the draft's config.json gives, org/target, got org/other"),
        (
            {"architecture": "qwen2"},
            "org/target",
            "expected the architectures .*LlamaForCausalLM.*got .*Qwen2ForCausalLM",
        ),
    ],
)
def test_forms_refuse_a_draft_for_another_target(tmp_path, overrides, name, match):
    """By sizes, name or architecture; without a target the name is kept for the fingerprint."""
    write_source(tmp_path / "theirs", "speculators_plain")
    sizes = {"num_hidden_layers": 8, "hidden_size": 16, "head_dim": 4}
    target = (
        tiny_target(**{**sizes, **overrides})
        if "architecture" not in overrides
        else tiny_target("qwen2", num_hidden_layers=8, hidden_size=16)
    )
    target.config._name_or_path = name
    target.config.architectures = [type(target).__name__]
    with pytest.raises(ValueError, match=match):
        load_draft(tmp_path / "theirs", target)
    assert load_draft(tmp_path / "theirs").config.target_fingerprint["name"] == "org/target"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"norm_output": True}, "norm_output: expected False with module_form='prism'"),
        ({"norm_before_residual": True}, "norm_before_residual: expected False"),
        ({"target_norm": "joint", "target_layer_ids": [3]}, "target_norm: expected 'none' with a single target layer"),
    ],
)
def test_forms_settings_that_contradict_each_other(fields, match):
    """The configuration says which."""
    with pytest.raises(Exception, match=match):
        PrismConfig(**fields)
