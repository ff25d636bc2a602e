"""Files made to do harm: nothing in a checkpoint, configuration or card is executed, or read or written outside its folder."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
from hub_server import Repository
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from transformers_prism import PrismDraftModel
from transformers_prism.cli.main import app
from transformers_prism.hub.card import write_card
from transformers_prism.hub.files import upload, weights_sha256
from transformers_prism.hub.inspection import inspect_draft, verify_files
from transformers_prism.hub.weight_headers import read_weight_headers

pytestmark = pytest.mark.quick


class Payload:
    """Makes a folder when it is unpickled by a loader that runs what it is told to."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A tiny draft's folder, inside one that must not change."""
    return Path(shutil.copytree(tiny_folders[1], tmp_path / "outside" / "draft"))


@pytest.fixture
def made(tmp_path, folder):
    """What a payload would make; must not be there when a test ends, and nothing else beside the draft's folder."""
    path = tmp_path / "made"
    yield path
    assert not path.exists()
    assert [one.name for one in folder.parent.iterdir()] == ["draft"]


def change_json(path: Path, **changes) -> None:
    """Replace values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def read_in_every_way(folder: Path):
    """The ways in which a draft's weights are read."""
    yield lambda: PrismDraftModel.from_pretrained(folder)
    yield lambda: AutoModel.from_pretrained(folder, trust_remote_code=True)
    yield lambda: weights_sha256(folder)
    yield lambda: read_weight_headers(folder)
    yield lambda: inspect_draft(folder)
    yield lambda: verify_files(folder)
    yield lambda: write_card(folder, [])


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "/elsewhere.safetensors", "sub/../../../elsewhere.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(folder, made, name):
    """Although the file that it names is there and holds the right weights."""
    elsewhere = folder.parents[1] / "elsewhere.safetensors"
    (folder / "sub").mkdir()
    weights = folder / "model.safetensors"
    name = str(elsewhere) if name.startswith("/") else name
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(weights), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(elsewhere)
    for read in read_in_every_way(folder):
        with pytest.raises(ValueError, match="expected names of safetensors files in its folder"):
            read()


@pytest.mark.parametrize("is_offline", [False, True])
@pytest.mark.parametrize("name", ["../../../../x.safetensors", "/x.safetensors"])
def test_an_index_on_the_hub_cannot_lead_out_of_its_repository(hub, folder, made, monkeypatch, name, is_offline):
    """Nothing is written beside the cache's own files, and nothing read, although the right weights lie there."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    elsewhere = made.parent / "x.safetensors"
    elsewhere.write_bytes(files.pop("model.safetensors"))
    name = str(elsewhere) if name.startswith("/") else name
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(elsewhere), name)}
    hub.repositories["me/hostile"] = repository = Repository()
    repository.commit("main", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    if is_offline:
        snapshot_download("me/hostile")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (made.parent / "cache").is_dir() == is_offline
    for read in (PrismDraftModel.from_pretrained, weights_sha256, inspect_draft):
        with pytest.raises((OSError, ValueError)):
            read("me/hostile")
    # Where the name leads, seen from a snapshot in the cache.
    assert (made.parent / "cache/models--me--hostile/snapshots/x" / name).resolve() == elsewhere
    assert list(made.parent.rglob("x.safetensors")) == [elsewhere]


def test_a_pickle_among_the_shards_of_a_repository_is_not_run(hub, folder, made):
    """An index on the Hub may name files of another kind; whatever reads them runs nothing."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    names = load_file(folder / "model.safetensors")
    del files["model.safetensors"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "x.bin")}
    hub.repositories["me/hostile"] = repository = Repository()
    content = pickle.dumps(dict.fromkeys(names, Payload(made)))
    repository.commit("main", {**files, "x.bin": content, "model.safetensors.index.json": json.dumps(index).encode()})
    for read in (PrismDraftModel.from_pretrained, weights_sha256, inspect_draft):
        with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
            read("me/hostile")


@pytest.mark.parametrize("weight_map", [{}, [], {"a": 1}, {"a": "pytorch_model.bin"}, None])
def test_an_index_of_something_else_is_refused(folder, weight_map):
    """Before a file that it names is opened."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for read in (weights_sha256, read_weight_headers, inspect_draft):
        with pytest.raises(ValueError, match="weight_map|safetensors files"):
            read(folder)


def test_a_pickle_in_place_of_the_weights_is_not_run(folder, made):
    """Nor under the name of safetensors."""
    content = pickle.dumps({"fusion_layer.weight": Payload(made)})
    (folder / "model.safetensors").write_bytes(content)
    for read in read_in_every_way(folder):
        with pytest.raises(Exception, match="safetensors|header|Error while deserializing"):
            read()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    for read in read_in_every_way(folder):
        with pytest.raises((pickle.UnpicklingError, OSError, ValueError)):
            read()


def header(**tensor) -> bytes:
    """A safetensors file of one tensor, with whatever its header claims."""
    content = json.dumps({"fusion_layer.weight": {"dtype": "F32", **tensor}}).encode()
    return struct.pack("<Q", len(content)) + content + b"\0" * 4


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**31) + b"{}",
        header(shape=[2**40, 2**40], data_offsets=[0, 4]),
        header(shape=[10**12], data_offsets=[0, 4 * 10**12]),
        header(shape=[1], data_offsets=[2**63, 2**63 + 4]),
        header(shape=[-1], data_offsets=[0, 4]),
        b"",
    ],
    ids=["header of 4 EiB", "header of 2 GiB", "overflow", "4 TB", "offsets", "negative", "empty"],
)
def test_absurd_sizes_are_refused(folder, content):
    """At once, without the memory that they ask for, as a message of one line in the commands."""
    (folder / "model.safetensors").write_bytes(content)
    for read in (weights_sha256, read_weight_headers, inspect_draft, verify_files, write_card):
        with pytest.raises(ValueError, match="expected a whole safetensors file"):
            read(folder)
    with pytest.raises(Exception, match="header|deserializ"):
        PrismDraftModel.from_pretrained(folder)
    for command in (["inspect", folder], ["card", folder], ["push", folder, "me/x"]):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert (result.exit_code, result.stderr.count("\n"), result.stderr[:7]) == (1, 1, "error: ")


@pytest.mark.parametrize("reference", ["modeling_evil.Evil", "someone/else--modeling_evil.Evil"])
def test_an_auto_map_that_points_elsewhere_is_not_followed(folder, made, tiny_folders, tmp_path, reference):
    """With the package its own classes win, trusted or not; what is saved points at the draft's own code again."""
    (folder / "modeling_evil.py").write_text(f"import pathlib\npathlib.Path({str(made)!r}).mkdir()\nclass Evil: pass\n")
    (folder / "custom_generate" / "generate.py").write_text(f"import pathlib\npathlib.Path({str(made)!r}).mkdir()\n")
    change_json(folder / "config.json", auto_map=dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), reference))
    for trust in (None, False):
        for auto in (AutoModel, AutoModelForCausalLM):
            assert type(auto.from_pretrained(folder, trust_remote_code=trust)) is PrismDraftModel
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "prism"
    command = ["generate", "--target", tiny_folders[0], "--draft", str(folder), "--prompt", "w5", "--max-new-tokens", "4"]
    assert CliRunner().invoke(app, command).exit_code == 0
    PrismDraftModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert reference not in (tmp_path / "again" / "config.json").read_text()
    assert not (tmp_path / "again" / "modeling_evil.py").exists()
    assert "pathlib.Path(" not in (tmp_path / "again" / "custom_generate" / "generate.py").read_text()


@pytest.mark.parametrize("text", ["{{ ''.__class__.__mro__ }}", "{% include 'config.json' %}", "</x> --- \nlicense: evil"])
def test_what_a_person_says_is_not_a_template(folder, text):
    """It stands in the card as it is, not as code of the template or as metadata."""
    (folder / "about.json").write_text(json.dumps({"limits": [text]}))
    write_card(folder)
    assert text in (folder / "README.md").read_text()
    assert "\nlicense:" not in (folder / "README.md").read_text().split("---")[1]


def test_yaml_in_a_card_is_read_as_data(hub, folder, made):
    """The card of a draft that is pushed; the Hub refuses it, and nothing was run here."""
    card = f"---\nlicense: !!python/object/apply:os.mkdir [{json.dumps(str(made))}]\n---\n"
    (folder / "README.md").write_text(card)
    for tags in (None, ["mine"]):
        with pytest.raises(ValueError, match="metadata"):
            upload(folder, "me/hostile", tags, None, None, commit_message="x")
    assert set(hub.repositories["me/hostile"].commits.popitem()[1]) == {".gitattributes"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "[]"), ("config.json", '{"model_type": "prism", "num_processing_modules": 10000000}'), ("config.json", "{")],
)
def test_a_hostile_configuration_is_a_message(folder, name, content):
    """Not a traceback, not modules without end."""
    (folder / name).write_text(content)
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert (result.exit_code, result.stderr[:7]) == (1, "error: ")


def test_weights_that_share_a_name_with_nothing_are_refused(folder):
    """A file with the wrong weights is not half loaded."""
    weights = load_file(folder / "model.safetensors")
    weights["../../x"] = weights.pop("fusion_layer.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"\.\./\.\./x is unknown"):
        PrismDraftModel.from_pretrained(folder)
