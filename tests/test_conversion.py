"""Conversion of checkpoints: what is matched, what is refused, and what is left behind."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from transformers_prism.cli.main import app
from transformers_prism.conversion.prism_artifact import convert

pytestmark = pytest.mark.quick

VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_KEY_VALUE_FEATURES = 29, 16, 24, 8


def artifact_config(**changes):
    """The authors' config.json for two modules; `changes` to eagle_config are given as a dictionary."""
    layer = {
        "architectures": ["LlamaForCausalLM"],
        "bias": False,  # has no effect in there
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "vocab_size": VOCAB_SIZE,
    }
    layer.update(changes.pop("eagle_config", {}))
    mapping = {"0": 0, "1": 1, "2": 1}
    return {"eagle_config": layer, "num_steps": 3, "num_step_models": 2, "step_mapping": mapping, **changes}


def artifact_weights(num_modules=2, num_layers=1, has_fusion_layer=True, dtype=torch.float32):
    """Random weights under the authors' names."""
    generator = torch.Generator().manual_seed(0)
    weights = {"embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    if has_fusion_layer:
        weights.update({"fusion_layer.weight": (HIDDEN_SIZE, 3 * HIDDEN_SIZE), "fusion_layer.bias": (HIDDEN_SIZE,)})
    for module in range(num_modules):
        weights[f"stepFCs.{module}.weight"] = (HIDDEN_SIZE, 2 * HIDDEN_SIZE)
        weights[f"stepFCs.{module}.bias"] = (HIDDEN_SIZE,)
        for layer in range(num_layers):
            prefix = f"stepModels.{module}.{layer}."
            for name, rows in (("q", HIDDEN_SIZE), ("k", NUM_KEY_VALUE_FEATURES), ("v", NUM_KEY_VALUE_FEATURES)):
                weights[f"{prefix}self_attn.{name}_proj.weight"] = (rows, HIDDEN_SIZE)
            weights[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN_SIZE, HIDDEN_SIZE)
            weights[f"{prefix}mlp.gate_proj.weight"] = (INTERMEDIATE_SIZE, HIDDEN_SIZE)
            weights[f"{prefix}mlp.up_proj.weight"] = (INTERMEDIATE_SIZE, HIDDEN_SIZE)
            weights[f"{prefix}mlp.down_proj.weight"] = (HIDDEN_SIZE, INTERMEDIATE_SIZE)
            weights[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN_SIZE,)
            if layer > 0:
                weights[f"{prefix}input_layernorm.weight"] = (HIDDEN_SIZE,)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in weights.items()}


def write_artifact(folder, weights, config=None, form="safetensors"):
    """A source folder; `form` is "safetensors", "bin", "safetensors shards" or "bin shards"."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or artifact_config()))
    name, save = ("model.safetensors", save_file) if "safetensors" in form else ("pytorch_model.bin", torch.save)
    if "shards" not in form:
        save(weights, folder / name)
        return folder
    stem, suffix = name.split(".")
    weight_map = {weight: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, weight in enumerate(weights)}
    for shard in set(weight_map.values()):
        save({weight: weights[weight] for weight in weights if weight_map[weight] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_target(folder, weights=None, **changes):
    """A tiny target of 32 layers with the embedding of `weights`."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=8,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=3,
        eos_token_id=[4, 5],
        pad_token_id=6,
        **changes,
    )
    target = LlamaForCausalLM(config).eval()
    if weights is not None:
        target.get_input_embeddings().weight.data.copy_(weights["embed_tokens.weight"])
    target.save_pretrained(folder)
    return target


def our_names(weights):
    """`weights` under the draft's names, without the embedding."""
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"^stepFCs\.(\d+)\.", r"processing_modules.\1.input_projection.", name)
        renamed[re.sub(r"^stepModels\.(\d+)\.", r"processing_modules.\1.layers.", name)] = tensor
    del renamed["embed_tokens.weight"]
    return renamed


def assert_refused(tmp_path, source, match, **arguments):
    """Conversion fails with `match` and leaves nothing beside the source."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=match):
        convert(source, tmp_path / "draft", **arguments)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_convert_keeps_every_bit(tmp_path, form, dtype):
    weights = artifact_weights(dtype=dtype)
    report = convert(write_artifact(tmp_path / "source", weights, form=form), tmp_path / "draft")
    saved = load_file(tmp_path / "draft" / "model.safetensors")
    expected = our_names(weights)
    assert saved.keys() == expected.keys()
    draft = AutoModel.from_pretrained(tmp_path / "draft")
    assert draft.dtype == report.dtype == dtype
    loaded = draft.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor)
        assert torch.equal(loaded[name], tensor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "source"]


def test_convert_reads_the_configuration(tmp_path):
    config = convert(write_artifact(tmp_path / "source", artifact_weights()), tmp_path / "draft").config
    assert (config.num_processing_modules, config.draft_step_to_module) == (2, [0, 1, 1])
    assert config.target_layer_ids == [3, 17, 30]
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.projection_bias
    assert config.share_target_embedding
    assert config.share_target_head
    assert not config.normalize_target_hidden
    assert config.context_kv == "prefill_module"
    assert (config.num_key_value_heads, config.head_dim, config.rms_norm_eps) == (2, 4, 1e-5)
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB_SIZE, 64)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)


def test_convert_keeps_rope_theta(tmp_path):
    source = write_artifact(
        tmp_path / "source", artifact_weights(), artifact_config(eagle_config={"rope_theta": 500000.0})
    )
    assert convert(source, tmp_path / "draft").config.rope_parameters["rope_theta"] == 500000.0


def test_convert_without_bias(tmp_path):
    weights = {name: weight for name, weight in artifact_weights().items() if not name.endswith("bias")}
    source = write_artifact(tmp_path / "source", weights, artifact_config(bias=False))
    assert not convert(source, tmp_path / "draft").config.projection_bias


def test_convert_stacked_layers(tmp_path):
    weights = artifact_weights(num_modules=1, num_layers=2, has_fusion_layer=False)
    theirs = artifact_config(
        eagle_config={"num_hidden_layers": 2}, num_step_models=1, step_mapping=dict.fromkeys("012", 0)
    )
    source = write_artifact(tmp_path / "source", weights, theirs)
    report = convert(source, tmp_path / "draft", num_target_layers=12)
    assert report.config.num_layers_per_module == 2
    assert report.config.target_layer_ids == [12]
    assert load_file(tmp_path / "draft" / "model.safetensors").keys() == our_names(weights).keys()


@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
def test_convert_context_kv(tmp_path, context_kv):
    source = write_artifact(tmp_path / "source", artifact_weights())
    convert(source, tmp_path / "draft", context_kv=context_kv)
    assert AutoModel.from_pretrained(tmp_path / "draft").config.context_kv == context_kv


def test_convert_unknown_context_kv(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights())
    assert_refused(tmp_path, source, "context_kv", context_kv="theirs")


def test_convert_ignores_second_names(tmp_path):
    weights = artifact_weights()
    second = {name.replace("stepFCs.1", "fc").replace("stepModels.1", "layers"): weights[name] for name in weights}
    second = {name: tensor.clone() for name, tensor in second.items() if name.startswith(("fc", "layers"))}
    second["stepModels.0.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    report = convert(write_artifact(tmp_path / "source", {**weights, **second}), tmp_path / "draft")
    assert set(report.ignored) == {*second, "embed_tokens.weight"}
    assert {theirs for theirs, _, _ in report.matched} == set(weights) - {"embed_tokens.weight"}


def test_convert_fills_the_fingerprint_from_the_target(tmp_path):
    weights = artifact_weights()
    save_target(tmp_path / "target", weights)
    report = convert(write_artifact(tmp_path / "source", weights), tmp_path / "draft", tmp_path / "target")
    config = report.config
    assert config.share_target_embedding
    assert any("equals the embedding" in note for note in report.notes)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, [4, 5], 6)
    fingerprint = config.target_fingerprint
    assert (fingerprint["num_hidden_layers"], fingerprint["name"], fingerprint["tokenizer_hash"]) == (32, None, None)
    assert any("tokenizer" in note for note in report.notes)


def test_convert_compares_the_embedding_in_the_coarser_dtype(tmp_path):
    weights = artifact_weights()
    target = save_target(tmp_path / "target", weights)
    target.to(torch.bfloat16).save_pretrained(tmp_path / "target")
    report = convert(write_artifact(tmp_path / "source", weights), tmp_path / "draft", tmp_path / "target")
    assert report.config.share_target_embedding


def test_convert_keeps_an_embedding_that_is_not_the_targets(tmp_path):
    weights = artifact_weights()
    save_target(tmp_path / "target")
    report = convert(write_artifact(tmp_path / "source", weights), tmp_path / "draft", tmp_path / "target")
    assert any("differs from the embedding" in note for note in report.notes)
    draft = AutoModel.from_pretrained(tmp_path / "draft")
    assert torch.equal(draft.embed_tokens.weight, weights["embed_tokens.weight"])


@pytest.mark.parametrize("max_shard_size", ["1GB", "2KB"])
def test_convert_older_form_reads_the_last_state_of_the_target(tmp_path, max_shard_size):
    weights = artifact_weights(has_fusion_layer=False)
    target = save_target(tmp_path / "target", weights)
    target.save_pretrained(tmp_path / "target in shards", max_shard_size=max_shard_size)
    source = write_artifact(tmp_path / "source", weights)
    report = convert(source, tmp_path / "draft", tmp_path / "target in shards")
    assert report.config.target_layer_ids == [32]
    assert any("equals the embedding" in note for note in report.notes)


def test_convert_older_form_asks_for_the_number_of_layers(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights(has_fusion_layer=False))
    assert_refused(tmp_path, source, "--target.*--num-target-layers.*got neither")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 31}, "vocab_size: expected the target's, 31 .*got 29"),
        ({"hidden_size": 32}, "hidden_size: expected the target's, 32 .*got 16"),
        ({"num_hidden_layers": 8}, "expected at least 30 layers.*got 8"),
    ],
)
def test_convert_another_target(tmp_path, changes, match):
    source = write_artifact(tmp_path / "source", artifact_weights())
    config = {"vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE, "num_hidden_layers": 32, **changes}
    LlamaConfig(num_attention_heads=4, **config).save_pretrained(tmp_path / "target")
    assert_refused(tmp_path, source, match, target=tmp_path / "target")


def test_convert_contradicting_number_of_layers(tmp_path):
    save_target(tmp_path / "target")
    source = write_artifact(tmp_path / "source", artifact_weights())
    assert_refused(
        tmp_path, source, "num_target_layers: expected.*32.*got 31", target=tmp_path / "target", num_target_layers=31
    )


def test_convert_target_that_is_not_there(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights())
    assert_refused(tmp_path, source, "target: expected a model's folder", target=tmp_path / "nothing")


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards"])
def test_convert_missing_weights(tmp_path, form):
    weights = artifact_weights()
    del weights["stepFCs.1.bias"], weights["fusion_layer.bias"]
    source = write_artifact(tmp_path / "source", weights, form=form)
    assert_refused(tmp_path, source, re.escape("missing weights: ['fusion_layer.bias', 'stepFCs.1.bias']"))


def test_convert_missing_module(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights(num_modules=1))
    assert_refused(
        tmp_path, source, r"missing weights: \['stepFCs.1.bias', .*'stepModels.1.0.self_attn.v_proj.weight'\]"
    )


def test_convert_missing_embedding(tmp_path):
    weights = artifact_weights()
    del weights["embed_tokens.weight"]
    assert_refused(
        tmp_path, write_artifact(tmp_path / "source", weights), r"missing weights: \['embed_tokens.weight'\]"
    )


def test_convert_module_under_its_second_name_only(tmp_path):
    """Savers that drop repeated tensors keep only `layers.*` and `fc.*` of the module that was active last."""
    weights = {
        name.replace("stepFCs.1", "fc").replace("stepModels.1", "layers"): weight
        for name, weight in artifact_weights().items()
    }
    assert_refused(
        tmp_path, write_artifact(tmp_path / "source", weights), "missing weights.*weights that have two names"
    )


@pytest.mark.parametrize("name", ["lm_head.weight", "stepModels.0.0.input_layernorm.weight", "layers.0.odd.weight"])
def test_convert_unknown_weight(tmp_path, name):
    weights = {**artifact_weights(), name: torch.ones(HIDDEN_SIZE)}
    assert_refused(tmp_path, write_artifact(tmp_path / "source", weights), re.escape(f"unknown weights: ['{name}']"))


def test_convert_unused_module(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights(num_modules=3))
    assert_refused(tmp_path, source, r"unknown weights: \['stepFCs.2.bias'")


@pytest.mark.parametrize("name", ["stepFCs.1.weight", "embed_tokens.weight", "fc.weight", "fusion_layer.weight"])
def test_convert_wrong_shape(tmp_path, name):
    weights = {**artifact_weights(), "fc.weight": torch.ones(HIDDEN_SIZE, 2 * HIDDEN_SIZE)}
    weights[name] = weights[name][:, :-1].contiguous()
    shape = list(weights[name].shape)
    assert_refused(
        tmp_path,
        write_artifact(tmp_path / "source", weights),
        re.escape(f"{name}: expected") + ".*" + re.escape(str(shape)),
    )


def test_convert_mixed_dtypes(tmp_path):
    weights = artifact_weights()
    weights["stepFCs.1.weight"] = weights["stepFCs.1.weight"].half()
    assert_refused(
        tmp_path, write_artifact(tmp_path / "source", weights), "one floating point dtype.*float16.*float32"
    )


@pytest.mark.parametrize("form", ["safetensors", "bin", "safetensors shards", "bin shards"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_convert_truncated_file(tmp_path, form, share):
    source = write_artifact(tmp_path / "source", artifact_weights(), form=form)
    path = next(path for path in sorted(source.iterdir()) if path.suffix in (".safetensors", ".bin"))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(tmp_path, source, re.escape(path.name) + ": expected")


def test_convert_refuses_code_in_a_pickle(tmp_path):
    """The file would make a folder when it is unpickled by a loader that runs what it is told to."""
    source = write_artifact(tmp_path / "source", artifact_weights(), form="bin")

    class Payload:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "payload"),)

    torch.save({"stepFCs.0.weight": Payload()}, source / "pytorch_model.bin")
    assert_refused(tmp_path, source, "expected a file of nothing but tensors, got one that was refused")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    assert_refused(tmp_path, source, "expected a file of nothing but tensors, got one that was refused")


@pytest.mark.parametrize(
    "content", [{"state_dict": {"stepFCs.0.weight": torch.ones(1)}}, [torch.ones(1)], {"step": 3}, {0: torch.ones(1)}]
)
def test_convert_file_without_named_tensors(tmp_path, content):
    source = write_artifact(tmp_path / "source", artifact_weights(), form="bin")
    torch.save(content, source / "pytorch_model.bin")
    assert_refused(tmp_path, source, "expected tensors by name, got")


def test_convert_missing_shard(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights(), form="safetensors shards")
    (source / "model-00002-of-00002.safetensors").unlink()
    assert_refused(tmp_path, source, "got none named .*model-00002-of-00002.safetensors")


def test_convert_shard_without_a_listed_weight(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights(), form="bin shards")
    shard = source / "pytorch_model-00001-of-00002.bin"
    weights = torch.load(shard, weights_only=True)
    name = next(iter(weights))
    save = {("extra" if weight == name else weight): tensor for weight, tensor in weights.items()}
    torch.save(save, shard)
    assert_refused(tmp_path, source, re.escape(f"got none named ['{name}'] and, not listed, ['extra']"))


@pytest.mark.parametrize("weight_map", [None, {}, {"fc.weight": "../outside.bin"}, {"fc.weight": 3}])
def test_convert_bad_index(tmp_path, weight_map):
    source = write_artifact(tmp_path / "source", artifact_weights(), form="bin shards")
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(tmp_path, source, "index.json: expected")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"step_mapping": {"0": 0, "1": 1}}, "a module for each step"),
        ({"step_mapping": {"0": 0, "1": 1, "2": 1, "3": 1}}, "a module for each step"),
        ({"step_mapping": {"a": 0, "b": 1, "c": 1}}, "a module for each step"),
        ({"step_mapping": [0, 1, 1]}, "a module for each step"),
        ({"step_mapping": {"0": 0, "1": 2, "2": 2}}, "without a gap"),
        ({"step_mapping": {"0": 0, "1": -1, "2": 1}}, "without a gap"),
        ({"step_mapping": {"0": 0, "1": "1", "2": 1}}, "without a gap"),
        ({"step_mapping": {"0": 0, "1": 0, "2": 0}}, "each of the num_step_models=2"),
        ({"step_mapping": None}, r"got none named \['step_mapping'\]"),
        ({"num_steps": 0}, "a module for each step"),
        ({"num_step_models": 3}, "each of the num_step_models=3"),
        ({"use_adapter": True}, "without step adapters"),
        ({"moe_config": {"num_experts": 4}}, "without mixture-of-experts modules"),
        ({"eagle_config": {"hidden_size": None}}, r"got none named \['hidden_size'\]"),
        ({"eagle_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "rope_scaling to be null"),
        ({"eagle_config": {"num_attention_heads": 3}}, "num_attention_heads: expected a multiple"),
        ({"eagle_config": {"num_hidden_layers": 2}}, "missing weights.*stepModels.1.1.self_attn"),
        ({"eagle_config": {"vocab_size": 30}}, r"embed_tokens.weight: expected \[30, 16\], got \[29, 16\]"),
    ],
)
def test_convert_configuration_of_another_form(tmp_path, changes, match):
    source = write_artifact(tmp_path / "source", artifact_weights(), artifact_config(**changes))
    assert_refused(tmp_path, source, match)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_convert_damaged_configuration(tmp_path, content):
    source = write_artifact(tmp_path / "source", artifact_weights())
    (source / "config.json").write_text(content)
    assert_refused(tmp_path, source, "config.json: expected a JSON object")


def test_convert_incomplete_source(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights())
    (source / "model.safetensors").unlink()
    assert_refused(tmp_path, source, "expected one of model.safetensors, .*pytorch_model.bin")
    (source / "config.json").unlink()
    assert_refused(tmp_path, source, "expected a file config.json")


def test_convert_destination_holds_something(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights())
    for destination in (source, source / "config.json"):
        before = {path: path.read_bytes() for path in source.iterdir()}
        with pytest.raises(ValueError, match="expected an empty folder"):
            convert(source, destination)
        assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_convert_destination_is_an_empty_folder(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights())
    (tmp_path / "draft").mkdir()
    convert(source, tmp_path / "draft")
    assert AutoModel.from_pretrained(tmp_path / "draft").config.num_processing_modules == 2


def test_convert_leaves_nothing_when_saving_fails(tmp_path, monkeypatch):
    source = write_artifact(tmp_path / "source", artifact_weights())

    def save_half(draft, folder, **kwargs):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("transformers_prism.conversion.importing.PrismDraftModel.save_pretrained", save_half)
    with pytest.raises(OSError, match="no space left"):
        convert(source, tmp_path / "draft")
    assert sorted(tmp_path.iterdir()) == [source]


def test_command_reports_what_was_matched(tmp_path):
    source = write_artifact(tmp_path / "source", artifact_weights())
    arguments = ["convert", "--from", "prism-artifact", str(source), str(tmp_path / "draft")]
    result = CliRunner().invoke(app, [*arguments, "--context-kv", "own_module"])
    assert result.exit_code == 0, result.output
    assert "stepFCs.1.weight" in result.output
    assert "processing_modules.1.input_projection.weight" in result.output
    assert "ignored 1 weights:\n  embed_tokens.weight: the target's" in result.output
    assert AutoModel.from_pretrained(tmp_path / "draft").config.context_kv == "own_module"
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "error: destination: expected an empty folder" in again.output
