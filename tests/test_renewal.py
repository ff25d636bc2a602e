"""`push --code-only`: the code of a draft on the Hub is renewed in one commit, and nothing else of it changes."""

import ast
import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from test_published_set import LENGTH, run_without_package
from tiny_models import prompts
from typer.testing import CliRunner

from transformers_prism.cli.main import app
from transformers_prism.hub.files import AUTO_MAP, code_files
from transformers_prism.hub.renewal import renew_code

NAME = "me/tiny-PRISM"
# What an earlier release left: code that no longer runs, code that nothing imports any more, and a user's own file.
OLD = {
    "modeling_prism.py": b"raise ImportError('of a release that is gone')\n",
    "gone_drafting.py": b"NAME = 'past_key_values'\n",
    "custom_generate/gone.py": b"",
    "custom_generate/requirements.txt": b"transformers==5.23.0\n",
    "examples/users_own.py": b"print('mine')\n",
}


@pytest.fixture
def repository(hub, saved_pair):
    """A draft's repository with the code of an earlier release."""
    saved_pair[2].push_to_hub(NAME)
    repository = hub.repositories[NAME]
    repository.commit("main", {**files_of(repository), **OLD})
    hub.requests.clear()
    return repository


def files_of(repository, branch: str = "main") -> dict:
    """What a branch holds; weights by their sha256."""
    return repository.commits[repository.branches[branch]]


def push(*arguments: str):
    """The result of the command."""
    return CliRunner().invoke(app, ["push", *arguments], env={"COLUMNS": "200"})


def test_code_is_renewed_in_one_commit_and_nothing_else_changes(hub, repository):
    """Code as the package has it, what only the old code had is gone; weights, card and the like are the same bytes."""
    before, num_commits = files_of(repository), len(repository.commits)
    result = push("--code-only", NAME)
    assert result.exit_code == 0, result.output
    assert f"renewed the code of {NAME}, revision {repository.branches['main']}" in result.output
    assert len(repository.commits) == num_commits + 1
    after, code = files_of(repository), code_files()
    assert {name: after[name] for name in code} == code
    assert not {"gone_drafting.py", "custom_generate/gone.py"} & after.keys()
    others = {name for name in before if name.endswith((".json", ".md", ".safetensors"))}
    others |= {"LICENSE", ".gitattributes", "examples/users_own.py"}
    assert {"model.safetensors", "config.json", "generation_config.json", "metrics.json", "README.md"} <= others
    assert after.keys() == others | code.keys()
    assert all(after[name] == before[name] for name in others)


def test_nothing_but_the_configuration_is_downloaded(hub, repository):
    """And nothing is uploaded beside the commit."""
    renew_code(NAME)
    fetched = {request.split("/")[-1] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json"}
    assert not [request for request in hub.requests if request.startswith("PUT")]


LOAD = """
draft = AutoModel.from_pretrained(DRAFT, trust_remote_code=True)
assert "transformers_modules" in type(draft).__module__
results = [target.generate(**inputs, assistant_model=draft, **LENGTH).tolist()]
results += [target.generate(**inputs, custom_generate=DRAFT, trust_remote_code=True, **LENGTH).tolist()]
print([results, draft.last_speculation.declined, draft.last_speculation.accepted_per_round])
"""


def test_a_renewed_draft_loads_and_drafts(hub, repository, saved_pair, tmp_path):
    """Where the package is not installed; with the old code it did not load."""
    target, folder, draft = saved_pair
    settings = {
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        **{"HF_HUB_CACHE": str(tmp_path / "other cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
    }
    with pytest.raises(AssertionError, match="of a release that is gone"):
        run_without_package(NAME, folder, LOAD, **settings)
    renew_code(NAME)
    printed = run_without_package(NAME, folder, LOAD, **settings)
    results, declined, accepted = ast.literal_eval(printed.splitlines()[-1])
    input_ids, mask = prompts(2)
    expected = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH).tolist()
    assert results == [expected] * 2
    assert declined is None
    assert accepted == draft.last_speculation.accepted_per_round


def test_renewing_again_makes_no_commit(repository):
    """The command says that there was nothing to do."""
    renew_code(NAME)
    num_commits = len(repository.commits)
    assert renew_code(NAME)[1] is False
    assert f"the code of {NAME} is this package's already" in push("--code-only", NAME).output
    assert len(repository.commits) == num_commits


@pytest.mark.parametrize(
    "auto_map", [None, {"AutoModel": "other/repo--modeling_prism.PrismDraftModel"}, {**AUTO_MAP, "AutoModel": "old.Draft"}]
)
def test_auto_map_is_put_right_and_no_value_else(repository, auto_map):
    """A map that is absent, points elsewhere, or names a class that was renamed."""
    before = json.loads(files_of(repository)["config.json"])
    wrong = {**before, "auto_map": auto_map, "of_a_user": 7}
    wrong = {name: value for name, value in wrong.items() if value is not None or name != "auto_map"}
    text = (json.dumps(wrong, indent=2, sort_keys=True) + "\n").encode()
    repository.commit("main", {**files_of(repository), "config.json": text})
    renew_code(NAME)
    after = files_of(repository)["config.json"]
    assert json.loads(after) == {**before, "of_a_user": 7}
    lines = set(text.splitlines()) - set(after.splitlines())
    assert all(b"prism" in line or b"Auto" in line or b"auto_map" in line for line in lines)


def test_a_branch_is_renewed_alone(repository):
    """It has to be there: a new branch would be a draft that nobody pushed."""
    main = repository.branches["main"]
    HfApi().create_branch(NAME, branch="trial")
    assert push("--code-only", NAME, "--revision", "trial", "--message", "For 5.24").exit_code == 0
    assert repository.branches["main"] == main
    assert files_of(repository, "trial")["modeling_prism.py"] == code_files()["modeling_prism.py"]
    with pytest.raises(RevisionNotFoundError):
        renew_code(NAME, revision="absent")
    assert set(repository.branches) == {"main", "trial"}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (None, "expected a PRISM draft, got a repository without config.json"),
        (b'{"model_type": "llama"}', "expected a draft of model type 'prism', got 'llama'"),
        (b"{}", "expected a draft of model type 'prism', got None"),
        (b"[]", "expected a draft of model type 'prism', got 'list'"),
        (b"{", "expected JSON in config.json, got"),
        (b"\xff", "expected JSON in config.json, got"),
        (b'{"model_type": "prism", "hidden_size": "wide"}', "this package cannot read its config.json: .*hidden_size"),
    ],
)
def test_what_is_no_draft_is_left_alone(repository, config, match):
    """The error says what was found; nothing is written."""
    files = {name: content for name, content in files_of(repository).items() if name != "config.json"}
    repository.commit("main", files if config is None else {**files, "config.json": config})
    before = dict(repository.branches), dict(repository.commits)
    with pytest.raises(ValueError, match=f"{NAME}: {match}"):
        renew_code(NAME)
    result = push("--code-only", NAME)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {NAME}: ")
    assert (repository.branches, repository.commits) == before


def test_a_refused_commit_changes_nothing(hub, repository):
    """Nor does a name that is not there make a repository."""
    before = dict(repository.branches), dict(repository.commits)
    hub.fail(401, "POST", "/commit/")
    with pytest.raises(HfHubHTTPError, match="401"):
        renew_code(NAME)
    assert (repository.branches, repository.commits) == before
    with pytest.raises(RepositoryNotFoundError):
        renew_code("me/absent")
    assert list(hub.repositories) == [NAME]
    assert renew_code(NAME)[1]


def test_a_push_in_between_is_not_undone(repository, monkeypatch):
    """The commit names the one that was looked at, so that the Hub refuses it on top of another."""
    asked, original = [], HfApi.create_commit
    monkeypatch.setattr(
        HfApi, "create_commit", lambda self, *args, **kwargs: asked.append(kwargs) or original(self, *args, **kwargs)
    )
    looked_at = repository.branches["main"]
    renew_code(NAME)
    assert asked[0]["parent_commit"] == looked_at


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--code-only", "some/folder", NAME), "--code-only: expected the name of one draft on the Hub"),
        (("--code-only", NAME, "--private"), "--code-only: expected the name of one draft on the Hub"),
        (("--code-only", "not/a/repository"), "not/a/repository"),
        ((NAME,), "expected a draft and the repository to push it to"),
    ],
)
def test_wrong_arguments_are_one_line(hub, arguments, message):
    """And reach no Hub."""
    result = push(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not hub.requests
