"""What belongs to a draft's weights (card, figures, licence, training record, rotary frequencies) stays with them, whichever way
the draft is loaded, cast, saved and pushed."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_draft, tiny_target
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_prism import PrismConfig, PrismDraftModel, load_draft
from transformers_prism.cli.main import app
from transformers_prism.conversion import eagle
from transformers_prism.hub.files import weights_sha256
from transformers_prism.training.warm_start import expand_modules

ABOUT = {"license": "cc-by-nc-4.0", "data": "of its own"}


def save(draft, folder, **files):
    """Save a draft, with further files beside it."""
    draft.save_pretrained(folder)
    for name, content in files.items():
        (folder / name.replace("_json", ".json")).write_text(json.dumps(content))
    return folder


def saved_silently(draft, folder) -> list[str]:
    """Save a draft; returns what was told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        draft.save_pretrained(folder)
    return [str(one.message) for one in told]


def license_in(folder) -> str:
    return json.loads((folder / "about.json").read_text())["license"]


@pytest.mark.parametrize("cast", [lambda draft: draft.to(torch.bfloat16), lambda draft: draft.half(), lambda draft: expand_modules(draft.bfloat16(), 3)])
def test_rotary_frequencies_stay_in_float32(saved_pair, cast):
    """Rounded to 16 bits they turn by another angle at the thousandth position."""
    draft = tiny_draft(saved_pair[0])
    expected = draft.rotary_emb.inv_freq.clone()
    found = cast(draft)
    assert found.dtype.itemsize == 2
    assert torch.equal(found.rotary_emb.inv_freq, expected)


def test_load_draft_in_the_targets_dtype_is_from_pretrained_in_it(saved_pair, tmp_path):
    target = AutoModelForCausalLM.from_pretrained(saved_pair[1], dtype=torch.bfloat16)
    saved_pair[2].save_pretrained(tmp_path)
    one, other = load_draft(tmp_path, target), PrismDraftModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert one.dtype == other.dtype == torch.bfloat16
    assert all(torch.equal(left, right) for left, right in zip(one.buffers(), other.buffers(), strict=True))
    assert load_draft(tmp_path, dtype="float16").dtype == torch.float16
    with pytest.raises(ValueError, match="dtype: expected the name of a dtype of torch, got 'half-ish'"):
        load_draft(tmp_path, dtype="half-ish")


def test_saving_again_keeps_figures_and_what_was_written(saved_pair, tmp_path):
    """Trees changed, weights did not."""
    draft = tiny_draft(saved_pair[0])
    save(draft, tmp_path, about_json=ABOUT)
    metrics = {**json.loads((tmp_path / "metrics.json").read_text()), "acceptance": [{"figures": 1}]}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "README.md").write_text("Mine.")
    draft.generation_config.tree_depth = 3
    draft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "README.md").read_text() == "Mine."
    assert license_in(tmp_path) == ABOUT["license"]
    tiny_draft(saved_pair[0], seed=1).save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "metrics.json").read_text())["acceptance"]


def test_files_are_found_where_the_draft_was_loaded_from(saved_pair, tmp_path, monkeypatch):
    """In a subfolder, whose parent has others; and from a path that the working directory has left."""
    save(saved_pair[2], tmp_path / "many" / "one", about_json=ABOUT)
    (tmp_path / "many" / "tokenizer.json").write_text("{}")
    PrismDraftModel.from_pretrained(tmp_path / "many", subfolder="one").save_pretrained(tmp_path / "saved")
    assert license_in(tmp_path / "saved") == ABOUT["license"]
    assert not (tmp_path / "saved" / "tokenizer.json").exists()
    monkeypatch.chdir(tmp_path / "many")
    draft = PrismDraftModel.from_pretrained("one")
    monkeypatch.chdir(tmp_path)
    draft.save_pretrained(tmp_path / "from elsewhere")
    assert license_in(tmp_path / "from elsewhere") == ABOUT["license"]
    shutil.rmtree(tmp_path / "many")
    assert any("many/one is gone" in one for one in saved_silently(draft, tmp_path / "after"))


def test_files_are_of_the_commit_that_was_loaded(hub, saved_pair, tmp_path):
    save(saved_pair[2], tmp_path / "first", about_json=ABOUT)
    PrismDraftModel.from_pretrained(tmp_path / "first").push_to_hub("me/tiny")
    commit = hub.repositories["me/tiny"].branches["main"]
    (tmp_path / "first" / "about.json").write_text(json.dumps({"license": "mit"}))
    PrismDraftModel.from_pretrained(tmp_path / "first").push_to_hub("me/tiny")
    for revision, expected in ((commit, ABOUT["license"]), ("main", "mit")):
        draft = PrismDraftModel.from_pretrained("me/tiny", revision=revision)
        assert draft.config._commit_hash == hub.repositories["me/tiny"].branches.get(revision, revision)
        draft.save_pretrained(tmp_path / expected)
        assert license_in(tmp_path / expected) == expected


def test_pushing_leaves_the_users_own_files(hub, saved_pair):
    """Weights of other drafts and programs in other folders; old weights and code go."""
    draft = saved_pair[2]
    draft.push_to_hub("me/tiny")
    repository = hub.repositories["me/tiny"]
    files = dict(repository.commits[repository.branches["main"]])
    own = {"other/model.safetensors": b"x", "examples/run.py": b"x", "adapter_model.safetensors": b"x"}
    old = {"kernels_old.py": b"x", "model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    repository.commit("main", {**files, **own, **old})
    draft.push_to_hub("me/tiny")
    found = repository.commits[repository.branches["main"]]
    assert own.keys() <= found.keys()
    assert not old.keys() & found.keys()


def test_what_is_pushed_is_what_was_saved(hub, saved_pair, tmp_path):
    """Given weights, as a sharded run hands them over."""
    weights = {name: value + 1 if value.is_floating_point() else value for name, value in saved_pair[2].state_dict().items()}
    saved_pair[2].save_pretrained(tmp_path / "draft", state_dict=dict(weights), push_to_hub=True, repo_id="me/tiny")
    assert weights_sha256("me/tiny") == weights_sha256(tmp_path / "draft")
    assert all(torch.equal(value, weights[name]) for name, value in PrismDraftModel.from_pretrained("me/tiny").state_dict().items())


def test_a_hash_is_of_the_weights_that_are_loaded(saved_pair, tmp_path):
    """Of one file and shards side by side, transformers reads the file."""
    saved_pair[2].save_pretrained(tmp_path)
    expected = weights_sha256(tmp_path)
    tiny_draft(saved_pair[0], seed=5).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, tmp_path)
    assert weights_sha256(tmp_path) == expected


def test_a_cast_says_what_it_leaves_behind(saved_pair, tmp_path):
    """The record of training, curves and figures are of other numbers."""
    draft = tiny_draft(saved_pair[0])
    weights = weights_sha256(save(draft, tmp_path / "draft"))
    figures = {"weights_sha256": weights, "generate": [], "acceptance": [{"figures": 1}], "verify": []}
    save(draft, tmp_path / "draft", metrics_json=figures, training_json={"config": {}})
    cast = PrismDraftModel.from_pretrained(tmp_path / "draft", dtype=torch.bfloat16)
    told = saved_silently(cast, tmp_path / "cast")
    assert any("lacks the measurements of metrics.json, training.json" in one for one in told), told


@pytest.mark.parametrize("content", ['{"weights_sha256": "ab', "[]", '{"generate": [1]}', '{"generate": [{"settings": null}]}'])
def test_damaged_figures_do_not_stop_saving(saved_pair, tmp_path, content):
    saved_pair[2].save_pretrained(tmp_path / "draft")
    (tmp_path / "draft" / "metrics.json").write_text(content)
    draft = PrismDraftModel.from_pretrained(tmp_path / "draft")
    told = saved_silently(draft, tmp_path / "saved")
    assert any("lacks the measurements of metrics.json" in one for one in told), told
    assert "# saved" in (tmp_path / "saved" / "README.md").read_text()
    result = CliRunner().invoke(app, ["card", str(tmp_path / "draft")])
    assert result.exit_code == 1
    assert "metrics.json: expected" in result.output


def test_a_card_without_figures_goes_with_its_weights(saved_pair, tmp_path):
    """Whoever wrote it, it is of the weights beside it."""
    saved_pair[2].save_pretrained(tmp_path / "draft")
    (tmp_path / "draft" / "metrics.json").unlink()
    (tmp_path / "draft" / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    PrismDraftModel.from_pretrained(tmp_path / "draft").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text().endswith("Mine.")


@pytest.fixture
def eagle_folder(tmp_path):
    """A draft of Gemma's in EAGLE's form, with the makers' card."""
    target = tiny_target("gemma3_text", 3)
    target.save_pretrained(tmp_path / "target")
    settings = {"num_processing_modules": 1, "target_layer_ids": [4], "draft_vocab_size": None, "normalize_target_hidden": False}
    draft = tiny_draft(target, projection_bias=True, **settings)
    draft.save_pretrained(tmp_path / "ours")
    eagle.export(tmp_path / "ours", tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    weights["embed_tokens.weight"] = target.get_input_embeddings().weight.detach().clone()
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return target, tmp_path


def test_a_draft_of_others_keeps_their_licence(eagle_folder):
    target, folder = eagle_folder
    load_draft(folder / "theirs", target).save_pretrained(folder / "saved")
    assert license_in(folder / "saved") == "cc-by-nc-4.0"
    assert "license: cc-by-nc-4.0" in (folder / "saved" / "README.md").read_text()
    assert "Trained by others" in (folder / "saved" / "README.md").read_text()


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_draft_of_others_reads_embeddings_as_they_are(eagle_folder, is_loaded):
    """Gemma multiplies its own by the root of its width."""
    target, folder = eagle_folder
    draft = load_draft(folder / "theirs", target if is_loaded else folder / "target").bind(target)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(draft.embed(ids), target.get_input_embeddings().weight[ids])
    with pytest.raises(ValueError, match="target: expected one whose embedding is read as it is in its file"):
        eagle.export(folder / "ours", folder / "again", folder / "target")


def test_a_conversion_into_a_link(eagle_folder):
    """It is called by the folder that it is."""
    target, folder = eagle_folder
    (folder / "empty").mkdir()
    (folder / "link").symlink_to(folder / "empty")
    eagle.convert(folder / "theirs", folder / "link", folder / "target")
    assert "# empty" in (folder / "empty" / "README.md").read_text()


def test_configuration_of_other_releases_and_of_nothing():
    target = tiny_target()
    assert PrismConfig(rope_theta=500000.0).rope_parameters["rope_theta"] == 500000.0
    assert PrismConfig.from_target(target, rope_theta=77.0).rope_parameters["rope_theta"] == 77.0
    with pytest.raises(ValueError, match="expected fields of PrismConfig, got num_procesing_modules"):
        PrismConfig.from_target(target, num_procesing_modules=7)
    for wrong in ({"rms_norm_eps": -1.0}, {"logit_scale": float("nan")}, {"logit_scale": 0.0}, {"hidden_act": "foo"}):
        with pytest.raises(Exception, match=f"{next(iter(wrong))}: expected"):
            PrismConfig(**wrong)


def test_a_dry_run_writes_nothing(saved_pair, tmp_path):
    saved_pair[2].save_pretrained(tmp_path / "draft")
    before = {path.name: path.read_bytes() for path in (tmp_path / "draft").iterdir() if path.is_file()}
    result = CliRunner().invoke(app, ["push", str(tmp_path / "draft"), "me/tiny", "--dry-run", "--base-model", "me/target"])
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "draft").iterdir() if path.is_file()} == before
