"""What `inspect` says of a draft, and what `inspect --verify` catches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compatibility_models import build
from hub_server import Repository
from test_hub import NAME
from tiny_models import tiny_draft, tiny_target
from typer.testing import CliRunner

from transformers_prism import PrismDraftModel
from transformers_prism.cli.main import app
from transformers_prism.hub.inspection import draft_folder, inspect_draft, verify_files
from transformers_prism.hub.weight_headers import read_weight_headers

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A tiny draft's folder that a test may change."""
    return Path(shutil.copytree(tiny_folders[1], tmp_path / "draft"))


def run(*arguments, exit_code: int = 0) -> str:
    """Output of `inspect`, errors included."""
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    return result.output + result.stderr


def num_parameters(*modules) -> int:
    """Of modules of torch, which know nothing of files."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def flip_a_byte(path: Path) -> None:
    """Change the last byte of a file, and nothing else."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"draft_vocab_size": 40}, {"module_form": "eagle3", "share_target_head": False}])
def test_bytes_are_those_of_the_weights_that_a_step_reads(tmp_path, is_tied, overrides):
    """Module, head rows, norm and in step 0 fusion layer; of the target all but an embedding of which rows are read."""
    target = tiny_target("llama", 3, tie_word_embeddings=is_tied)
    draft = tiny_draft(target, num_processing_modules=2, draft_step_to_module=[0, 1, 1], **overrides)
    target.bfloat16().save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft", max_shard_size="30KB")
    inspection = inspect_draft(tmp_path / "draft", str(tmp_path / "target"))
    head = 32 * overrides.get("draft_vocab_size", 97) + (0 if draft.norm is None else num_parameters(draft.norm))
    modules = [num_parameters(module) for module in draft.processing_modules]
    fusion = num_parameters(draft.fusion_layer)
    assert inspection.dtype == torch.bfloat16
    expected = [2 * (modules[0] + head + fusion), 2 * (modules[1] + head), 2 * (modules[1] + head)]
    assert [inspection.step_bytes(step) for step in range(3)] == expected
    embedding = 0 if is_tied else num_parameters(target.get_input_embeddings())
    assert inspection.target_bytes() == 2 * (num_parameters(target) - embedding)
    assert read_weight_headers(tmp_path / "draft").num_parameters() == num_parameters(draft)


def test_the_command_tells_what_a_draft_is(tiny_folders):
    """Target, modules, sizes, trees, bytes; its target is here if it is named, and matches."""
    target_folder, folder = tiny_folders
    output = run(folder, "--target", target_folder)
    config = PrismDraftModel.from_pretrained(folder).config
    for words in (
        "M = 2 of 1 layer(s), width 32; draft steps use 0, 1",
        f"hidden states {', '.join(map(str, config.target_layer_ids))}",
        "97 of 97 tokens",
        "static, at most 15 nodes, top-k 3, depth 4",
        "% of a target forward",
        "in its folder; loads without this package with trust_remote_code=True",
    ):
        assert words in output
    assert [line.split()[-1] for line in output.splitlines() if line.startswith("target here:")] == ["matches"]
    assert "not on this machine" in run(folder)


def test_settings_that_a_folder_leaves_out_are_the_usual_ones(folder):
    """As when the draft is loaded."""
    (folder / "generation_config.json").write_text("{}")
    assert "auto, at most 63 nodes, top-k 10, depth 8" in run(folder)


def test_a_damaged_configuration_is_named(folder):
    (folder / "config.json").write_text("{")
    output = run(folder, exit_code=1)
    assert f"{folder}/config.json: expected a JSON object, got" in output.replace("\n", "")


def test_a_target_of_images_and_text_has_bytes_too(tmp_path):
    target = build("qwen2_5_vl")
    target.save_pretrained(tmp_path / "target")
    tiny_draft(target).save_pretrained(tmp_path / "draft")
    assert "% of a target forward" in run(tmp_path / "draft", "--target", tmp_path / "target")


def test_a_sliding_window_is_told(folder):
    """And that there is none."""
    assert "of the target; all positions" in run(folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "sliding_window": 5}))
    assert "of the target; the last 5 positions" in run(folder)


def test_the_code_is_told_as_it_is(tiny_folders, tmp_path):
    """In the folder; in none, as of the drafts that the repository ships; in part; or in another repository."""
    folder = tmp_path / "draft"
    shutil.copytree(tiny_folders[1], folder)
    assert "code: in its folder" in " ".join(run(folder).split())
    (folder / "modeling_prism.py").unlink()
    assert "code: none in its folder; load it with this package installed" in " ".join(run(folder).split())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: f"user/other--{value}" for name, value in config["auto_map"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    assert "code: auto_map points elsewhere: user/other" in " ".join(run(folder).split())


def test_another_target_does_not_match(folder, tmp_path):
    """A status of 1, and what differs; one that is not here is an error."""
    tiny_target("llama", vocab_size=96).save_pretrained(tmp_path / "target")
    output = run(folder, "--target", tmp_path / "target", exit_code=1)
    assert "does NOT match: vocab_size: expected 97 (draft), got 96 (target)" in output
    assert "on this machine, got nowhere" in run(folder, "--target", "nowhere", exit_code=1)


def test_other_weights_of_the_same_shape_may_accept_less(folder, tiny_folders):
    """What is only a warning when they are used together is none here."""
    config = json.loads((folder / "config.json").read_text())
    config["target_fingerprint"]["name"] = "some/target"
    (folder / "config.json").write_text(json.dumps(config))
    (folder.parent / "other").mkdir()
    for path in Path(tiny_folders[0]).iterdir():
        shutil.copy(path, folder.parent / "other")
    inspection = inspect_draft(folder, str(folder.parent / "other"))
    # A folder's path says nothing of which weights lie in it.
    assert (inspection.fatal, inspection.mild) == ([], [])
    inspection.target_config._name_or_path = "some/other"
    assert inspection.config.target_differences(inspection.target_config)[1] == [
        "name: expected 'some/target' (draft), got 'some/other' (target)"
    ]


def test_what_is_no_draft_is_refused(hub, tiny_folders, folder):
    """Nothing but the configuration of another model is downloaded; damage of a draft's own is named."""
    hub.repositories["me/other"] = repository = Repository()
    repository.commit("main", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"much"})
    with pytest.raises(ValueError, match="expected a draft of model type 'prism', got 'llama'"):
        draft_folder("me/other")
    assert not [request for request in hub.requests if "model.safetensors" in request]
    assert "got 'llama'" in run(tiny_folders[0], exit_code=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_processing_modules": 1, "draft_step_to_module": [0]}))
    assert "expected weights of 1 processing modules, got 2" in run(folder, exit_code=1)
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 7}))
    assert "got: processing_modules.0.layers.0.mlp." in run(folder, exit_code=1)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 0}))
    assert "hidden_size" in run(folder, exit_code=1)


def test_code_elsewhere_is_pointed_out(folder):
    """An auto_map that names another repository."""
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling_other.Model"
    (folder / "config.json").write_text(json.dumps(config))
    assert "auto_map points elsewhere: someone/else" in run(folder)


def test_verify_compares_a_folder_with_its_metrics(folder):
    """The weights that were measured; a flipped bit is caught, and so is having nothing to compare with."""
    weights = json.loads((folder / "metrics.json").read_text())["weights_sha256"]
    assert f"the weights are those that metrics.json names, {weights}" in run(folder, "--verify")
    flip_a_byte(folder / "model.safetensors")
    assert "expected figures of the weights in its folder" in run(folder, "--verify", exit_code=1)
    (folder / "metrics.json").unlink()
    assert "to compare the weights with, got none" in run(folder, "--verify", exit_code=1)


def test_verify_catches_wrong_bytes_of_the_right_size(hub, folder):
    """Which a download takes for the file; by the repository's sha256, with no need of metrics."""
    PrismDraftModel.from_pretrained(folder).push_to_hub(NAME)
    repository = hub.repositories[NAME]
    files = repository.commits[repository.branches["main"]]
    oid = files["model.safetensors"]
    good, files["metrics.json"] = hub.objects[oid], b"{}"
    hub.objects[oid] = good[:-1] + bytes([good[-1] ^ 1])
    PrismDraftModel.from_pretrained(NAME)
    with pytest.raises(ValueError, match=rf"model.safetensors \(sha256 \w+, not {oid}\)"):
        verify_files(NAME)
    assert "force_download=True" in run(NAME, "--verify", exit_code=1)


def test_verify_compares_every_file_of_a_repository(hub, folder):
    """Code too, by what git calls it; all right as it was pushed, at any revision."""
    first = PrismDraftModel.from_pretrained(folder).push_to_hub(NAME).oid
    num_files = len(hub.repositories[NAME].commits[first])
    assert f"{num_files} files have the bytes that the repository records at {first}" in run(NAME, "--verify")
    assert "files have the bytes" in run(NAME, "--verify", "--revision", first)
    flip_a_byte(draft_folder(NAME) / "modeling_prism.py")
    assert "modeling_prism.py (git-sha1" in run(NAME, "--verify", exit_code=1)
