"""The command `doctor`: findings on tiny models, what stands in the way, and the exit code."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from compatibility_models import build
from tiny_models import chat_tokenizer, save_chat_target, tiny_draft, tiny_target, word_tokenizer
from transformers import T5Config
from typer.testing import CliRunner

from transformers_prism.cli import doctor
from transformers_prism.cli.main import app
from transformers_prism.target import load_target

pytestmark = pytest.mark.quick


def examine(tmp_path, *arguments, exit_code: int = 0) -> dict[str, dict]:
    """Findings of `doctor` by their names."""
    words = ["doctor", *map(str, arguments), "--max-new-tokens", "8", "--json", str(tmp_path / "found.json")]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert result.exit_code == exit_code, result.output + result.stderr + repr(result.exception)
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["works"] == (exit_code == 0)
    assert all(one["text"].split(";")[0] in result.output for one in content["findings"])
    return {one["name"]: one for one in content["findings"]}


@pytest.fixture
def target_folder(tmp_path) -> Path:
    """A tiny target with a chat template."""
    return save_chat_target(tmp_path / "target")


def test_doctor_examines_a_pair(tmp_path, target_folder):
    """Machine, target, draft, way of verifying, calibration and expected gain; offline is no obstacle."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto")
    draft.save_pretrained(tmp_path / "draft")
    found = examine(tmp_path, "--target", target_folder, "--draft", tmp_path / "draft")
    assert found.keys() == {
        *("versions", "extras", "threads", "CPU kernel", "disk", "Hub", "target", "memory", "tokenizer", "chat template", "draft"),
        *("verifies", "calibration", "same output", "expected gain"),
    }
    assert f"torch {torch.__version__.split('+')[0]}" in found["versions"]["text"]
    assert found["Hub"]["state"] == "note"
    assert found["draft"]["text"] == "was made for this target"
    assert found["verifies"]["text"] == "trees"
    assert "times plain decoding" in found["expected gain"]["text"]
    assert "plain steps, a draft step" in found["calibration"]["text"]


def test_doctor_without_a_draft_tries_an_untrained_one(tmp_path, target_folder):
    """Its gain says nothing, so none is told, and nobody is warned that it hardly helped."""
    found = examine(tmp_path, "--target", target_folder)
    assert found["draft"]["state"] == "note"
    assert "expected gain" not in found
    assert found["verifies"]["state"] == "ok"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        list(doctor.trial_findings(str(target_folder), None, 64, False, torch.device("cpu"), torch.float32))
    assert not [one for one in told if "hardly helped" in str(one.message)]


def test_doctor_examines_a_target_of_images_and_text(tmp_path):
    """Which is loaded by another class."""
    build("qwen2_5_vl").save_pretrained(tmp_path / "target")
    chat_tokenizer().save_pretrained(tmp_path / "target")
    found = examine(tmp_path, "--target", tmp_path / "target")
    assert found["target"]["text"].endswith("qwen2_5_vl")
    assert found["verifies"]["text"] == "trees"


def test_doctor_counts_a_target_of_another_kind_among_its_findings(tmp_path):
    """With what was expected and got."""
    T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2).save_pretrained(tmp_path / "target")
    chat_tokenizer().save_pretrained(tmp_path / "target")
    found = examine(tmp_path, "--target", tmp_path / "target", exit_code=1)
    assert found["target"] == {
        "name": "target", "state": "fails", "text": "target: expected a decoder-only model, got the type 't5'"
    }


def test_a_special_token_without_a_row_is_no_obstacle():
    """Text models that were cut out of an image model keep its tokens; only words without a row are a failure."""
    tokenizer = chat_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    found, _ = doctor.tokenizer_findings(tokenizer, size)
    assert found.state == "ok"
    assert found.text.endswith("none for 1 special tokens")
    found, _ = doctor.tokenizer_findings(tokenizer, size - 5)
    assert found.state == "fails"


def test_doctor_refuses_a_file_in_no_folder_at_once(tmp_path, target_folder, monkeypatch):
    """Before anything is examined."""
    monkeypatch.setattr("transformers_prism.cli.doctor.target_findings", lambda *_: 1 / 0)
    result = CliRunner().invoke(app, ["doctor", "--target", str(target_folder), "--json", str(tmp_path / "none" / "found.json")])
    assert result.exit_code == 2
    assert "expected a file in a folder that is there" in " ".join(result.stderr.replace("│", " ").split())


def test_doctor_without_names_tries_the_shipped_pair(tmp_path, target_folder, monkeypatch):
    tiny_draft(tiny_target("llama", seed=3)).save_pretrained(tmp_path / "draft")
    monkeypatch.setattr(doctor, "SHIPPED_DRAFT", tmp_path / "draft")
    monkeypatch.setattr(doctor, "load_target", lambda name, dtype: load_target(target_folder, dtype))
    found = examine(tmp_path)
    assert found["draft"]["state"] == "ok"
    assert "times plain decoding" in found["expected gain"]["text"]


def test_doctor_tells_of_chains_and_of_base_models(tmp_path):
    """What generation says about the target, and what a missing template means."""
    tiny_target("lfm2", seed=3).save_pretrained(tmp_path / "target")
    word_tokenizer().save_pretrained(tmp_path / "target")
    found = examine(tmp_path, "--target", tmp_path / "target")
    assert found["verifies"]["text"].startswith("chains, no trees: the cache keeps states that cannot be moved")
    assert "--format text" in found["chat template"]["text"]


def test_doctor_refuses_a_draft_of_another_target(tmp_path, target_folder):
    """In the table, with exit code 1."""
    tiny_draft(tiny_target("llama", vocab_size=96)).save_pretrained(tmp_path / "draft")
    found = examine(tmp_path, "--target", target_folder, "--draft", tmp_path / "draft", exit_code=1)
    assert found["draft"]["state"] == "fails"
    assert "96" in found["draft"]["text"]


@pytest.mark.parametrize("missing", ["target", "tokenizer"])
def test_doctor_loads_no_weights_of_a_target_that_cannot_work(tmp_path, target_folder, monkeypatch, missing):
    """What is not there is said first."""
    monkeypatch.setattr(doctor, "load_target", lambda *names: pytest.fail("loaded"))
    for path in target_folder.glob("token*" if missing == "tokenizer" else "*"):
        path.unlink()
    assert examine(tmp_path, "--target", target_folder, exit_code=1)[missing]["state"] == "fails"


def test_doctor_names_the_gguf_file_of_a_folder(tmp_path, target_folder):
    """A folder with such files alone is no target."""
    shutil.rmtree(target_folder)
    target_folder.mkdir()
    (target_folder / "small.Q4_1.gguf").write_bytes(b"")
    found = examine(tmp_path, "--target", target_folder, exit_code=1)
    assert f"name a file: {target_folder / 'small.Q4_1.gguf'}" in found["target"]["text"]


def test_doctor_counts_threads(monkeypatch):
    """More than cores are a note with the remedy."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    finding = doctor._threads()
    assert finding.state == "note"
    assert "OMP_NUM_THREADS=2" in finding.text


def test_doctor_tells_each_finding_at_once(tmp_path, target_folder, monkeypatch):
    """What is known stands there before the next check begins, which may take a while."""
    shown = []
    monkeypatch.setattr(doctor, "findings_table", lambda found: shown.append(found[0].name) or "")
    monkeypatch.setattr(doctor, "load_target", lambda name, dtype: shown.append("loads the target") or load_target(name, dtype))
    CliRunner().invoke(app, ["doctor", "--target", str(target_folder), "--max-new-tokens", "8"])
    assert shown[:2] == ["versions", "extras"]
    assert shown[shown.index("chat template") + 1] == "loads the target"


def test_doctor_counts_a_missing_package_among_its_findings(tmp_path, monkeypatch):
    """The demo target's file needs one; this was an error without the table."""
    monkeypatch.setattr(doctor, "load_target", fails)
    found = examine(tmp_path, exit_code=1)
    assert "pip install gguf" in found["target"]["text"]


def fails(name, dtype):
    """A target that needs a package."""
    raise ImportError("expected the package gguf to read x.gguf, got none; pip install gguf")
