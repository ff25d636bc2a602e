"""`bench acceptance`: tau by hand, the text of plain decoding, a file that is resumed, bad input named."""

import json

import pytest
from tiny_models import write_lines
from typer.testing import CliRunner

from transformers_prism.bench.acceptance import acceptance_figures, decode_prompts, tree_settings
from transformers_prism.cli.main import app

pytestmark = pytest.mark.quick


@pytest.fixture
def command(tiny_folders, tmp_path):
    """Words of the command on tiny models, its file last."""
    records = [{"question_id": i, "category": task, "turns": [f"w{i + 5} w9"]} for i, task in enumerate(("qa", "rag"))]
    write_lines(tmp_path / "prompts.jsonl", records)
    target, draft = tiny_folders
    sizes = "--num-prompts 2 --max-new-tokens 8 --tree 5/2/3 --tree 2/2/1".split()
    words = ["bench", "acceptance", "--target", target, "--draft", draft, "--prompts", tmp_path / "prompts.jsonl", *sizes]
    return [str(word) for word in (*words, "--json", tmp_path / "acceptance.json")]


def test_acceptance_figures_pool_tokens_over_rounds():
    """By hand: 12 tokens in 5 rounds, one answer of two in a loop; no tau where nothing was decoded in rounds."""
    answers = [
        {"task": "qa", "num_rounds": 2, "num_committed": 8, "ends_in_a_loop": True},
        {"task": "rag", "num_rounds": 3, "num_committed": 4, "ends_in_a_loop": False},
    ]
    expected = {"num_rounds": 5, "num_committed": 12, "tau": 2.4, "share_of_answers_in_a_loop": 0.5}
    assert acceptance_figures(answers) == expected
    nothing = [{"task": "qa", "num_rounds": 0, "num_committed": 0, "ends_in_a_loop": False}]
    assert acceptance_figures(nothing)["tau"] is None


def test_acceptance_is_of_every_tree_and_temperature(command, tmp_path):
    result = CliRunner().invoke(app, command, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "acceptance.json").read_text())
    ways = [(row["tree"], row["temperature"]) for row in record["rows"]]
    assert ways == [("5/2/3", 0.0), ("5/2/3", 0.8), ("2/2/1", 0.0), ("2/2/1", 0.8)]
    for row in record["rows"]:
        assert row["num_committed"] == sum(answer["num_committed"] for answer in row["answers"]) == 2 * 7
        assert row["num_rounds"] == sum(figures["num_rounds"] for figures in row["tasks"].values())
        assert f"{row['tau']:.2f}" in result.output
    assert len(record["weights_sha256"]) == 64


def test_acceptance_of_a_short_file_is_of_all_its_prompts(command, tmp_path):
    """As many as usual, if there are so many; who asks for a number gets it or an error."""
    place = command.index("--num-prompts")
    result = CliRunner().invoke(app, [*command[:place], *command[place + 2 :]])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "acceptance.json").read_text())["settings"]["num_prompts"] == 2
    result = CliRunner().invoke(app, [*command[:place], "--num-prompts", "3", *command[place + 2 :]])
    assert result.exit_code == 1
    assert "num_prompts: expected 1 to 2, got 3" in result.stderr


def test_acceptance_goes_on_where_it_was_interrupted(command, tmp_path, monkeypatch):
    path = tmp_path / "acceptance.json"
    assert CliRunner().invoke(app, command).exit_code == 0
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "rows": whole["rows"][:3]}))
    decoded = []

    def counted(*args, **kwargs):
        decoded.append(args[3:5])
        return decode_prompts(*args, **kwargs)

    monkeypatch.setattr("transformers_prism.bench.acceptance.decode_prompts", counted)
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    assert decoded == [("2/2/1", 0.8)]
    assert json.loads(path.read_text())["rows"] == whole["rows"]
    result = CliRunner().invoke(app, [*command, "--resume", "--max-new-tokens", "6"])
    assert result.exit_code == 1
    assert "expected max_new_tokens 6 to resume, got 8" in result.stderr
    # A file of an earlier version says nothing of prompts and weights.
    settings = {name: value for name, value in whole["settings"].items() if name != "prompts_sha256"}
    older = {name: value for name, value in whole.items() if name != "target_sha256"} | {"settings": settings}
    path.write_text(json.dumps(older))
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0


@pytest.mark.parametrize("tree", ["5/2/1", "40/2/3"])
def test_trees_that_cannot_have_so_many_nodes_are_refused(tree):
    with pytest.raises(ValueError, match="trees: expected at most (2|12) nodes with depth 2"):
        tree_settings(tree)


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--no-coupled"], False)])
def test_draft_sees_the_draws_unless_told_otherwise(command, tmp_path, monkeypatch, options, expected):
    seen = []

    def watched(target, draft, *args, **kwargs):
        answers = decode_prompts(target, draft, *args, **kwargs)
        seen.append(draft.generation_config.tree_coupled)
        return answers

    monkeypatch.setattr("transformers_prism.bench.acceptance.decode_prompts", watched)
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    assert seen == [expected] * 4
    assert json.loads((tmp_path / "acceptance.json").read_text())["settings"]["coupled"] is expected


@pytest.mark.parametrize(("options", "expected"), [([], True), (["--no-text-tokens"], False)])
def test_tokens_of_the_prompt_are_proposed_unless_told_otherwise(command, tmp_path, options, expected):
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "acceptance.json").read_text())["settings"]["text_tokens"] is expected


def test_acceptance_names_bad_input(command, tmp_path):
    result = CliRunner().invoke(app, [*command, "--tree", "59/6"])
    assert result.exit_code == 1
    assert "expected nodes/depth/top-k such as 59/6/10, got '59/6'" in result.stderr
    assert not (tmp_path / "acceptance.json").exists()
    result = CliRunner().invoke(app, [*command[:-2], "--resume"])
    assert result.exit_code == 1
    assert "expected --json with --resume, got none" in result.stderr
    assert tree_settings("5/5/1")["tree"] == "chain"
