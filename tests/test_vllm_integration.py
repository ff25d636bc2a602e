"""The vLLM plugin in integrations/vllm, as far as it needs no vLLM: configuration, refusals, the target's final norm.

Its own tests, which run vLLM, are `make test-vllm`."""

import ast
import dataclasses
import importlib
import json
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_draft, tiny_target, word_tokenizer
from transformers import LlamaConfig

from transformers_prism import PrismConfig
from transformers_prism.configuration_prism import tokenizer_hash

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "integrations" / "vllm"
PACKAGE = PLUGIN / "transformers_prism_vllm"
SHIPPED = ROOT / "hub_cards" / "SmolLM2-135M-Instruct-PRISM"

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def _plugin_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGIN))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_prism_vllm")]:
        del sys.modules[name]


def plugin(name: str):
    """A module of the plugin."""
    return importlib.import_module(f"transformers_prism_vllm.{name}")


def fields_of(config) -> dict:
    """What a draft's config.json holds."""
    return json.loads(config.to_json_string(use_diff=False))


def tiny_fields(**overrides) -> dict:
    """The fields of a tiny draft's config.json."""
    return fields_of(PrismConfig.from_target(tiny_target().config, **overrides))


def test_vllm_plugin_is_separate():
    """vLLM pins transformers below what this package needs, so nothing of it is imported there; the entry point exists."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "transformers_prism" for name in names), path
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["prism"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert not any("vllm" in requirement for requirement in project["dependencies"])


def test_vllm_fields_of_shipped_draft():
    """Every field of config.json stays; what vLLM reads is added."""
    found = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    config = plugin("configuration").PrismConfig(**found)
    assert config.model_type == "prism"
    for name in set(found) - {"auto_map", "transformers_version", "dtype"}:
        assert getattr(config, name) == found[name], name
    assert config.eagle_aux_hidden_state_layer_ids == [3, 16, 28, 30]
    assert config.num_hidden_layers == 1
    # vLLM makes another configuration of this dictionary.
    assert {"eagle_aux_hidden_state_layer_ids", "draft_step_to_module", "target_fingerprint"} <= config.to_dict().keys()


def test_vllm_defaults_are_the_packages():
    """A draft that lacks a field means the same in both places, and the plugin knows every field of the architecture."""
    module = plugin("configuration")
    known = {field.name: field for field in dataclasses.fields(PrismConfig)}
    own = {name for name in PrismConfig.__annotations__ if name in known}
    # Of no weight or product, or read by the target's side alone.
    unread = {"attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "norm_before_residual", "norm_output"}
    unread |= {"pad_token_id", "target_embedding_size", "tie_word_embeddings", "model_type"}
    unread |= {"keys_to_ignore_at_inference"}
    assert own - unread == set(module._DEFAULTS) | set(module._REQUIRED)
    minimal = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "target_layer_ids": [2]}
    ours, theirs = PrismConfig(**minimal), module.PrismConfig(**minimal)
    for name in own - unread - {"draft_vocab_size"}:
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.draft_vocab_size == ours.num_draft_tokens


def test_vllm_draft_vocabulary_of_all_tokens():
    """Its order is among the weights if a vocabulary was asked for, also after the configuration was written and read again."""
    config = plugin("configuration").PrismConfig
    for size, is_there in ((None, False), (50, True), (97, True)):
        found = config(**tiny_fields(draft_vocab_size=size))
        for again in (found, config(**found.to_dict())):
            assert (again.has_draft_to_target, again.draft_vocab_size) == (is_there, size or 97)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"module_form": "eagle3", "projection_bias": False}, "module_form: expected 'prism', got 'eagle3' .*convert --to eagle3"),
        ({"context_kv": "own_module"}, "context_kv: expected 'prefill_module', got 'own_module'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type: expected one of .*'dynamic'"),
    ],
)
def test_vllm_refuses_drafts(overrides, message):
    """What vLLM would compute otherwise is refused when config.json is read."""
    with pytest.raises(ValueError, match=message):
        plugin("configuration").PrismConfig(**tiny_fields(**overrides))


def test_vllm_refuses_other_files():
    """A config.json of something else."""
    with pytest.raises(ValueError, match="got none of intermediate_size, num_attention_heads, target_layer_ids"):
        plugin("configuration").vllm_fields({"vocab_size": 5, "hidden_size": 4})


def engine(**changes) -> SimpleNamespace:
    """As much of a `VllmConfig` as the checks read."""
    settings = {
        "method": "eagle3",
        "parallel_drafting": False,
        "disable_padded_drafter_batch": False,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "lora_config": None,
        "cudagraph_mode": "NONE",
        "device_type": "cuda",
        "use_v2_model_runner": False,
        **changes,
    }

    def part(*names):
        return SimpleNamespace(**{name: settings[name] for name in names})

    return SimpleNamespace(
        speculative_config=part("method", "parallel_drafting", "disable_padded_drafter_batch"),
        parallel_config=part("tensor_parallel_size", "pipeline_parallel_size"),
        compilation_config=part("cudagraph_mode"),
        device_config=part("device_type"),
        **vars(part("lora_config", "use_v2_model_runner")),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "draft_model"}, "method: expected 'eagle3', got 'draft_model'; set it in speculative_config"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: expected 1, .*, got 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1, .*, got 2"),
        ({"parallel_drafting": True}, "parallel_drafting: expected False"),
        ({"disable_padded_drafter_batch": True, "device_type": "cpu"}, "disable_padded_drafter_batch: expected False on a CPU"),
        ({"lora_config": object()}, "enable_lora: expected False, .*; merge the adapter"),
        (
            {"use_v2_model_runner": True, "cudagraph_mode": "FULL_AND_PIECEWISE"},
            "CUDA graphs of the draft: expected none, .* V2 model runner .*; set enforce_eager=True, .*VLLM_USE_V2_MODEL_RUNNER=0",
        ),
    ],
)
def test_vllm_refuses_engines(changes, message):
    """Settings with which a draft fails, or is of no use without a sign of it."""
    checks = plugin("target_checks")
    with pytest.raises(ValueError, match=message):
        checks.check_engine(engine(**changes))


def test_vllm_takes_other_engines(monkeypatch):
    """The V1 runner's target may have graphs, the draft is not in them; a CPU has none."""
    checks = plugin("target_checks")
    checks.check_engine(engine(cudagraph_mode="FULL_AND_PIECEWISE"))
    checks.check_engine(engine(use_v2_model_runner=True))
    checks.check_engine(engine(use_v2_model_runner=True, cudagraph_mode="PIECEWISE", device_type="cpu"))
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="got 'VLLM_USE_BREAKABLE_CUDAGRAPH=1'"):
        checks.check_engine(engine(cudagraph_mode="PIECEWISE"))
    with pytest.raises(ValueError, match="got it as the model to serve"):
        checks.check_engine(SimpleNamespace(speculative_config=None))


def test_vllm_compares_targets():
    """Sizes are compared part by part, both sides named; another name or tokenizer is a warning."""
    checks, target, tokenizer = plugin("target_checks"), tiny_target().config, word_tokenizer()
    fingerprint = {
        "name": "org/target",
        "revision": None,
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
    draft = plugin("configuration").PrismConfig(**tiny_fields(target_fingerprint=fingerprint))
    assert checks.check_target(draft, target, "org/target", tokenizer) is None
    assert checks.check_target(draft, target, str(ROOT), tokenizer) is None
    warning = checks.check_target(draft, target, "org/other", tokenizer)
    assert "name: expected 'org/target' (draft), got 'org/other' (target)" in warning
    for name, value in (("vocab_size", 98), ("hidden_size", 48), ("num_hidden_layers", 3)):
        other = LlamaConfig(**{**target.to_dict(), name: value, "num_attention_heads": 4, "head_dim": 8})
        with pytest.raises(ValueError, match=rf"made for another target.*{name}: expected \d+ \(draft\), got {value} \(target\)"):
            checks.check_target(draft, other, "org/target")
    tokenizer.add_tokens(["another"])
    assert "tokenizer_hash: expected" in checks.check_target(draft, target, "org/target", tokenizer)


@pytest.mark.parametrize(("architecture", "added"), [("llama", 0.0), ("gemma2", 1.0)])
def test_vllm_final_norm_from_target(architecture, added, tmp_path):
    """What the final norm multiplies by is read from the target's folder, whole or in shards."""
    target = tiny_target(architecture)
    with torch.no_grad():
        target.model.norm.weight.copy_(torch.arange(32.0))
    read = plugin("final_norm").read_final_norm
    for folder, size in ((tmp_path / "whole", "1GB"), (tmp_path / "shards", "20KB")):
        target.save_pretrained(folder, max_shard_size=size)
        assert torch.equal(read(str(folder), None, target.config), torch.arange(32.0) + added)
    state = torch.randn(3, 32)
    expected = state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6) * (torch.arange(32.0) + added)
    torch.testing.assert_close(target.model.norm(state), expected, rtol=1e-4, atol=1e-4)


def test_vllm_final_norm_refusals(tmp_path):
    """A norm of unknown kind, or none in the files: what to do about it is said."""
    read = plugin("final_norm").read_final_norm
    with pytest.raises(ValueError, match="got one of type 'gpt2'; save the draft again"):
        read(str(tmp_path), None, SimpleNamespace(model_type="gpt2", hidden_size=32))
    save_file({"other": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected safetensors files with one of model.norm.weight"):
        read(str(tmp_path), None, SimpleNamespace(model_type="llama", hidden_size=32))
    save_file({"model.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a final norm of 32 numbers"):
        read(str(tmp_path), None, SimpleNamespace(model_type="llama", hidden_size=32))


def test_vllm_embedding_scale_of_gemma():
    """vLLM scales Gemma's embeddings outside of the layer that it lends, transformers inside."""
    checks, module = plugin("target_checks"), plugin("configuration")
    gemma = tiny_target("gemma2")
    draft = module.PrismConfig(**fields_of(tiny_draft(gemma).config))
    ids = torch.arange(5)
    expected = gemma.get_input_embeddings()(ids)
    found = torch.nn.functional.embedding(ids, gemma.get_input_embeddings().weight) * checks.embedding_scale(draft, gemma.config)
    torch.testing.assert_close(found, expected)
    assert checks.embedding_scale(module.PrismConfig(**tiny_fields(embedding_scale=3.0)), tiny_target().config) == 3.0


@pytest.mark.parametrize(("version", "is_tried"), [("0.31.2", False), ("0.32.0", True), ("0.33.1.post1", True), ("0.34.0", False)])
def test_vllm_release_range(version, is_tried, monkeypatch):
    """A release outside of the tried range is told of, with the range."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.0")
    warning = importlib.import_module("transformers_prism_vllm").warning_of_release(version)
    assert (warning is None) == is_tried
    assert is_tried or f"expected vLLM >=0.32,<0.34, which it was made for, got {version}" in warning
