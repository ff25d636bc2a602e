"""Pushing to a Hub and loading from it, through huggingface_hub's own client; a Hub that fails leaves no half of a draft."""

import ast
import hashlib
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from test_published_set import LENGTH, run_without_package
from tiny_models import prompts, tiny_draft, word_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from transformers_prism import PrismDraftModel
from transformers_prism.cli.main import app
from transformers_prism.hub.card import write_card
from transformers_prism.hub.files import OPEN_LICENSES, published_files, published_name, weights_sha256

NAME = "me/tiny-PRISM"


def changed(draft: PrismDraftModel) -> PrismDraftModel:
    """The same draft with other weights."""
    other = PrismDraftModel(draft.config).eval()
    other.load_state_dict({name: value + 0.25 for name, value in draft.state_dict().items()})
    other.generation_config = draft.generation_config
    return other


def is_same(one: PrismDraftModel, other: PrismDraftModel) -> bool:
    """Whether two drafts have the same weights, bit for bit."""
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def environment(hub, tmp_path) -> dict:
    """Of a process that talks to this Hub, as a user sets it."""
    return {
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        **{"HF_HUB_CACHE": str(tmp_path / "other cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
    }


def test_push_is_one_commit_of_a_whole_repository(hub, saved_pair):
    """Code, custom_generate, configurations, card, metrics, licence, and the weights as a large file."""
    commit = saved_pair[2].push_to_hub(NAME)
    repository = hub.repositories[NAME]
    assert repository.branches == {"main": commit.oid}
    assert len(repository.commits) == 2
    files = repository.commits[commit.oid]
    others = {"config.json", "generation_config.json", "model.safetensors", "README.md", "metrics.json", "LICENSE"}
    code = {published_name(path) for path in published_files()}
    custom = {"custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert set(files) == {".gitattributes", *others, *code, *custom}
    assert hashlib.sha256(hub.objects[files["model.safetensors"]]).hexdigest() == files["model.safetensors"]
    assert f'"{NAME}"'.encode() in files["README.md"]
    saved_pair[2].push_to_hub(NAME, tags=["tiny"])
    assert ModelCard.load(NAME).data.tags[-1] == "tiny"


@pytest.mark.parametrize("sizes", [("20KB", "5GB"), ("5GB", "20KB"), ("20KB", "30KB")])
def test_a_folder_that_is_saved_to_again_holds_one_form_of_weights(saved_pair, tmp_path, sizes):
    """One file or shards: what the first saving left would be loaded, or hashed, in place of the new weights."""
    for number, size in enumerate(sizes):
        draft = tiny_draft(saved_pair[0], seed=number)
        draft.save_pretrained(tmp_path, max_shard_size=size)
    names = {path.name for path in tmp_path.glob("model*")}
    assert ("model.safetensors" in names) != ("model.safetensors.index.json" in names)
    loaded = PrismDraftModel.from_pretrained(tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(draft.parameters(), loaded.parameters(), strict=True))
    assert len(weights_sha256(tmp_path)) == 64


def test_the_command_pushes_a_folder(hub, saved_pair, tmp_path):
    """To a branch, if asked; the repository on the Hub can be pushed on by its name."""
    saved_pair[2].save_pretrained(tmp_path / "draft")
    result = CliRunner().invoke(app, ["push", str(tmp_path / "draft"), NAME, "--revision", "trial"])
    assert result.exit_code == 0, result.output
    branches = hub.repositories[NAME].branches
    assert f"pushed {NAME}, revision {branches['trial']}" in result.output
    assert set(hub.repositories[NAME].commits[branches["main"]]) == {".gitattributes"}
    assert HfApi().list_repo_refs(NAME).branches[1].target_commit == branches["trial"]


def test_a_cards_code_loads_from_where_it_is_pushed_to(hub, saved_pair, tmp_path):
    """Whatever the folder was called when the card was written, and from one repository to the next; prose stays."""
    folder = tmp_path / "first name"
    saved_pair[2].save_pretrained(folder)
    (folder / "about.json").write_text(json.dumps({"limits": ["Each user/assistant saved_pair is the target's, see me/other."]}))
    write_card(folder, [])
    folder = folder.rename(tmp_path / "second name")
    for source, repository in ((str(folder), "me/first"), ("me/first", "you/second")):
        result = CliRunner().invoke(app, ["push", source, repository])
        assert result.exit_code == 0, result.output
        branches = hub.repositories[repository].branches
        files = hub.repositories[repository].commits[branches["main"]]
        text = files["README.md"].decode()
        assert text.count(f'"{repository}"') == 3
        assert "Each user/assistant saved_pair is the target's, see me/other." in text
        assert '"user/' not in text
        assert repository == "me/first" or "me/first" not in text
        assert json.loads(files["about.json"])["limits"]


def test_an_update_replaces_what_it_no_longer_needs(hub, saved_pair):
    """Shards and their index go when one file takes their place; old commits still load."""
    first = saved_pair[2].push_to_hub(NAME, max_shard_size="20KB")
    assert is_same(PrismDraftModel.from_pretrained(NAME), saved_pair[2])
    other = changed(saved_pair[2])
    second = other.push_to_hub(NAME, commit_message="Better")
    names = set(hub.repositories[NAME].commits[second.oid])
    assert [name for name in names if "safetensors" in name] == ["model.safetensors"]
    assert is_same(PrismDraftModel.from_pretrained(NAME), other)
    assert is_same(PrismDraftModel.from_pretrained(NAME, revision=first.oid), saved_pair[2])
    assert changed(saved_pair[2]).push_to_hub(NAME).oid == second.oid


LOAD_REVISIONS = """
def weight(**arguments):
    draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True, **arguments)
    assert "transformers_modules" in type(draft).__module__
    return draft, float(draft.fusion_layer.bias[0])
new, new_weight = weight()
old, old_weight = weight(revision=FIRST, code_revision=FIRST)
old_with_new_code, same_weight = weight(revision=FIRST, code_revision=MARKED)
assert same_weight == old_weight
assert sys.modules[type(old_with_new_code).__module__].MARK == 7
assert not hasattr(sys.modules[type(old).__module__], "MARK")
for arguments in ({"device_map": "cpu"}, {"dtype": torch.bfloat16}, {"device_map": "auto", "dtype": torch.bfloat16}):
    draft, _ = weight(**arguments)
    assert draft.dtype == arguments.get("dtype", torch.float32)
    assert target.to(draft.dtype).generate(**inputs, assistant_model=draft, **LENGTH).shape[1] > 0
target.float()
results = [target.generate(**inputs, assistant_model=draft, **LENGTH).tolist() for draft in (new, old)]
by_name = [
    target.generate(**inputs, custom_generate=DRAFT, trust_remote_code=True, revision=revision, **LENGTH).tolist()
    for revision in ("main", FIRST)
]
assert by_name == results
print([new_weight, old_weight, results, [draft.last_speculation.accepted_per_round for draft in (new, old)]])
"""


@pytest.mark.slow
def test_revisions_load_without_the_package(hub, saved_pair, tmp_path):
    """New and old weights, code of another revision, devices, dtypes and shards; by object and by name alone."""
    target, folder, draft = saved_pair
    first = draft.push_to_hub(NAME, max_shard_size="20KB").oid
    other = changed(draft)
    other.push_to_hub(NAME)
    code = bytes(hub.repositories[NAME].commits[first]["modeling_prism.py"]) + b"\n\nMARK = 7\n"
    api = HfApi()
    api.create_branch(NAME, branch="marked")
    marked = api.upload_file(path_or_fileobj=code, path_in_repo="modeling_prism.py", repo_id=NAME, revision="marked").oid
    script = f"FIRST, MARKED = {first!r}, {marked!r}\n{LOAD_REVISIONS}"
    printed = run_without_package(NAME, folder, script, **environment(hub, tmp_path))
    input_ids, mask = prompts(2)
    results, accepted = [], []
    for one in (other, draft):
        results.append(target.generate(input_ids, attention_mask=mask, assistant_model=one, **LENGTH).tolist())
        accepted.append(one.last_speculation.accepted_per_round)
    weights = [float(one.fusion_layer.bias[0]) for one in (other, draft)]
    assert ast.literal_eval(printed.splitlines()[-1]) == [*weights, results, accepted]


SAVE_AGAIN = """
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
assert "transformers_modules" in type(draft).__module__
draft.save_pretrained(AGAIN)
"""
LOAD_OFFLINE = """
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
results = [target.generate(**inputs, assistant_model=draft, **LENGTH).tolist()]
results += [target.generate(**inputs, custom_generate=DRAFT, trust_remote_code=True, **LENGTH).tolist()]
ids = inputs.pop("input_ids")
results += [target.generate(ids, **inputs, custom_generate=DRAFT, trust_remote_code=True, **LENGTH).tolist()]
print(results)
"""


@pytest.mark.slow
def test_what_was_downloaded_is_saved_with_the_same_bytes_and_loads_offline(hub, saved_pair, tmp_path):
    """By a process without the package that loads from the Hub, and by one without a network after it."""
    target, folder, draft = saved_pair
    commit = draft.push_to_hub(NAME)
    again, settings = tmp_path / "again", environment(hub, tmp_path)
    run_without_package(NAME, folder, f"AGAIN = {str(again)!r}\n{SAVE_AGAIN}", **settings)
    files = dict(hub.repositories[NAME].commits[commit.oid])
    del files[".gitattributes"]
    pushed = {name: hub.objects.get(content, content) for name, content in files.items()}
    assert {path.relative_to(again).as_posix(): path.read_bytes() for path in again.rglob("*") if path.is_file()} == pushed
    num_requests = len(hub.requests)
    printed = run_without_package(NAME, folder, LOAD_OFFLINE, **{**settings, "HF_HUB_OFFLINE": "1"})
    input_ids, mask = prompts(2)
    tokens = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH).tolist()
    assert ast.literal_eval(printed.splitlines()[-1]) == [tokens] * 3
    assert len(hub.requests) == num_requests


def test_the_hub_of_the_tests_is_small():
    """Less to believe than what it tests."""
    assert len(Path(__file__).with_name("hub_server.py").read_text().splitlines()) < 200


def test_the_hub_takes_the_cards_metadata(hub, saved_pair, tmp_path):
    """huggingface_hub's own validation, which a push does before it uploads anything."""
    saved_pair[2].save_pretrained(tmp_path / "draft")
    ModelCard.load(tmp_path / "draft" / "README.md").validate()
    with pytest.raises(ValueError, match="invalid metadata"):
        ModelCard("---\nlicense: Apache\n---\n").validate()


def test_a_targets_tokenizer_travels_if_its_licence_lets_it(hub, saved_pair, tmp_path):
    """By the licence in the target's card, which is read as data."""
    target, folder, _ = saved_pair
    word_tokenizer().save_pretrained(folder)
    api = HfApi()
    licences = {"free": "apache-2.0", "closed": "llama3", "hostile": "!!python/object/apply:os.mkdir [made]"}
    for name, licence in licences.items():
        api.create_repo(f"me/{name}")
        commit = api.upload_folder(repo_id=f"me/{name}", folder_path=folder)
        repository = hub.repositories[f"me/{name}"]
        card = f"---\nlicense: {licence}\n---\n".encode()
        repository.commit("main", {**repository.commits[commit.oid], "README.md": card})
    for name in licences:
        draft = tiny_draft(target)
        draft.config.target_fingerprint = {**draft.config.target_fingerprint, "name": f"me/{name}"}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            draft.save_pretrained(tmp_path / name)
        has_tokenizer = (tmp_path / name / "tokenizer.json").is_file()
        assert has_tokenizer == (name == "free"), name
        assert ("The tokenizer files here are the target's" in (tmp_path / name / "README.md").read_text()) == has_tokenizer
        why = {"closed": "its licence is llama3", "hostile": "no licence of it is known"}.get(name)
        messages = [str(one.message) for one in caught if "left out the tokenizer" in str(one.message)]
        assert [message.split(". ")[0] for message in messages] == ([f"left out the tokenizer of me/{name}: {why}"] if why else [])
    assert AutoTokenizer.from_pretrained(tmp_path / "free").get_vocab() == word_tokenizer().get_vocab()


def test_the_page_on_cards_lists_the_licences():
    """hub_cards/README.md names those under which a tokenizer travels, and no other."""
    page = (Path(__file__).parents[1] / "hub_cards" / "README.md").read_text()
    (sentence,) = re.findall(r"target's card is one of (.*?)\. ", page, flags=re.DOTALL)
    assert tuple(re.split(r",\s+|\s+and\s+", sentence)) == OPEN_LICENSES


def test_a_tokenizer_put_beside_the_draft_travels(hub, saved_pair, tmp_path):
    """As the warning says: by whoever may give it away; a GGUF file has no card that could name a licence."""
    draft = tiny_draft(saved_pair[0])
    draft.config.target_fingerprint = {**draft.config.target_fingerprint, "name": "some-wheel/model.Q4_1.gguf"}
    with pytest.warns(UserWarning, match=r"left out the tokenizer of some-wheel/model.Q4_1.gguf: no licence of it is known"):
        draft.save_pretrained(tmp_path / "draft")
    word_tokenizer().save_pretrained(tmp_path / "draft")
    commit = PrismDraftModel.from_pretrained(tmp_path / "draft").push_to_hub(NAME)
    assert "tokenizer.json" in hub.repositories[NAME].commits[commit.oid]
    assert AutoTokenizer.from_pretrained(NAME).get_vocab() == word_tokenizer().get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "draft").get_vocab() == word_tokenizer().get_vocab()


def push_must_fail(draft, repository, error, match: str) -> None:
    """A push ends in an error that says why, and the repository is what it was."""
    before = dict(repository.branches), dict(repository.commits)
    with pytest.raises(error, match=match):
        draft.push_to_hub(NAME)
    assert (repository.branches, repository.commits) == before


def test_no_token_is_a_clear_error(hub, saved_pair, monkeypatch):
    """401 before anything is made; in the command one line and a status."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        saved_pair[2].push_to_hub(NAME)
    assert not hub.repositories


@pytest.mark.parametrize(
    ("kind", "path", "error"),
    [(401, "/commit/", HfHubHTTPError), (404, "/commit/", RepositoryNotFoundError), (401, "/preupload/", HfHubHTTPError)],
)
def test_a_refused_commit_changes_nothing(hub, saved_pair, kind, path, error):
    """Whichever request is refused; pushing again works."""
    saved_pair[2].push_to_hub(NAME)
    hub.fail(kind, "POST", path)
    push_must_fail(changed(saved_pair[2]), hub.repositories[NAME], error, str(kind))
    assert is_same(PrismDraftModel.from_pretrained(NAME), saved_pair[2])
    changed(saved_pair[2]).push_to_hub(NAME)
    assert is_same(PrismDraftModel.from_pretrained(NAME, force_download=True), changed(saved_pair[2]))


@pytest.mark.parametrize("kind", [429, "cut"])
def test_an_upload_is_tried_again(hub, saved_pair, kind):
    """A Hub that is busy, and a connection that is lost in the middle of the weights."""
    hub.fail(kind, "PUT", "/lfs/", times=2)
    saved_pair[2].push_to_hub(NAME)
    assert sum(request.startswith("PUT") for request in hub.requests) == 3
    assert is_same(PrismDraftModel.from_pretrained(NAME), saved_pair[2])


@pytest.mark.parametrize("kind", [401, 404, 429, "cut", "size"])
def test_an_upload_that_fails_for_good_changes_nothing(hub, saved_pair, tmp_path, kind):
    """The error says so; what was there before still loads, and pushing again works."""
    saved_pair[2].push_to_hub(NAME)
    hub.fail(kind, "PUT", "/lfs/", times=20)
    push_must_fail(changed(saved_pair[2]), hub.repositories[NAME], OSError, "holds what it held before.*model.safetensors")
    changed(saved_pair[2]).save_pretrained(tmp_path / "draft")
    result = CliRunner().invoke(app, ["push", str(tmp_path / "draft"), NAME])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {NAME} holds what it held before")
    assert is_same(PrismDraftModel.from_pretrained(NAME), saved_pair[2])
    hub.faults.clear()
    changed(saved_pair[2]).push_to_hub(NAME)
    assert is_same(PrismDraftModel.from_pretrained(NAME), changed(saved_pair[2]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(401, "401"), (404, "404|not a valid model"), (429, "429"), ("cut", "Can't load the model"), ("size", "should be of size")],
)
def test_a_download_that_fails_gives_no_draft(hub, saved_pair, kind, message):
    """Of the weights, the last thing that is loaded; afterwards the draft is whole."""
    saved_pair[2].push_to_hub(NAME)
    hub.fail(kind, "GET", "model.safetensors", times=20)
    with pytest.raises(OSError, match=message):
        PrismDraftModel.from_pretrained(NAME)
    hub.faults.clear()
    assert is_same(PrismDraftModel.from_pretrained(NAME), saved_pair[2])


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-00002-of-"])
@pytest.mark.parametrize("kind", [401, 404, 429, "cut", "size"])
def test_every_file_of_a_draft_is_needed(hub, saved_pair, kind, name):
    """transformers makes up a generation config where the download of one fails, and so would lose the draft's trees."""
    saved_pair[2].push_to_hub(NAME, max_shard_size="20KB")
    hub.fail(kind, "GET", f"/{name}", times=40)
    # A connection that is lost among several shards is told as the HTTP client tells it.
    with pytest.raises(Exception, match=r"me/tiny-PRISM|should be of size|peer closed connection"):
        PrismDraftModel.from_pretrained(NAME)
    hub.faults.clear()
    draft = PrismDraftModel.from_pretrained(NAME)
    assert is_same(draft, saved_pair[2])
    assert draft.generation_config.to_dict() == saved_pair[2].generation_config.to_dict()


def test_a_draft_without_its_trees_is_refused(saved_pair, tmp_path):
    """In a folder too; trees that are given take their place."""
    saved_pair[2].save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(OSError, match="generation_config.json"):
        PrismDraftModel.from_pretrained(tmp_path)
    given = PrismDraftModel.from_pretrained(tmp_path, generation_config=saved_pair[2].generation_config)
    assert given.generation_config.tree == saved_pair[2].generation_config.tree


@pytest.mark.parametrize("kind", [429, "cut"])
def test_a_download_is_tried_again(hub, saved_pair, kind):
    """And goes on where it was cut off."""
    saved_pair[2].push_to_hub(NAME)
    hub.fail(kind, "GET", "model.safetensors", times=2)
    assert is_same(PrismDraftModel.from_pretrained(NAME), saved_pair[2])
    ranges = [request.split()[2] for request in hub.requests if "model.safetensors bytes=" in request]
    assert len(ranges) == (2 if kind == "cut" else 0)
