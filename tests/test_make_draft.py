"""The command `make-draft` on tiny models: from a folder to a draft with a card, interrupted and resumed."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from rich.console import Console
from tiny_models import chat_tokenizer, save_chat_target, tiny_target, word_tokenizer, write_lines
from typer.testing import CliRunner

from transformers_prism import PrismDraftModel
from transformers_prism.bench import measurement
from transformers_prism.cli import make_draft
from transformers_prism.cli.main import app
from transformers_prism.training import train
from transformers_prism.training.data import synthesis

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Chunks and answers of a few tokens."""
    for name, value in {"FEWEST_TOKENS": 400, "_ANSWER_TOKENS": 24, "_FEWEST_EPOCHS": 0.5}.items():
        monkeypatch.setattr(make_draft, name, value)


@pytest.fixture
def model(tmp_path):
    """A target with a chat template."""
    return save_chat_target(tmp_path / "model")


def words(model, *more) -> list[str]:
    """The command for a model."""
    options = ["--output", model.parent / "made", "--minutes", "0.02", "--max-new-tokens", "8", *more]
    return ["make-draft", *map(str, [model, *options])]


def run(model, *more) -> str:
    """Output of a run that must succeed."""
    result = CliRunner().invoke(app, words(model, *more), env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output + result.stderr + repr(result.exception)
    return result.output


def test_a_draft_is_made_from_a_name(model):
    """With a table of before and after, and a card that holds what was measured; a second call does nothing again."""
    output = run(model)
    assert re.search(r"without a draft +1\.00 +[\d.]+ +1\.00", output)
    assert re.search(r"with made +\d\.\d\d +[\d.]+ +[\d.]+", output)
    made = model.parent / "made"
    assert f"transformers-prism push {made} USER/made" in output
    draft = PrismDraftModel.from_pretrained(made)
    assert draft.config.target_fingerprint["vocab_size"] == 97
    metrics = json.loads((made / "metrics.json").read_text())
    assert f"greedy, 8 new tokens, {metrics['generate'][0]['summary']['num_prompts']} prompt(s)" in output
    record = json.loads((made / "training.json").read_text())
    assert record["command"].startswith("transformers-prism make-draft model --output made")
    again = run(model)
    assert re.search(r"with made +\d", again)
    assert "synthesis" not in again


def stop_at(monkeypatch, place, name: str, call: int) -> None:
    """Interrupt the call of a function, the first one being 1."""
    calls, function = [], getattr(place, name)

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, stopped)


PLACES = [
    (synthesis.Synthesizer, "_append", 150),
    (train.AlignedTrainer, "compute_loss", 1),
    (train.AlignedTrainer, "compute_loss", 3),
    (train, "_save_run", 1),
    (measurement, "bench_generate", 1),
    (make_draft.shutil, "copytree", 1),
    (make_draft.Path, "rename", 1),
]


def test_an_interrupted_run_is_resumed(model, monkeypatch):
    """Wherever it was interrupted; finished steps are not done again."""
    steps_before: dict = {}
    for place, name, call in PLACES:
        with monkeypatch.context() as patch:
            stop_at(patch, place, name, call)
            result = CliRunner().invoke(app, words(model))
        assert result.exit_code not in (0, 1) or "Aborted" in result.stderr, (name, result.output, result.stderr)
        assert not (model.parent / "made").exists()
        steps = json.loads((model.parent / "made.work" / "steps.json").read_text())["steps"]
        assert {step: steps[step] for step in steps_before} == steps_before, name
        steps_before = steps
    assert "measuring" in steps_before
    run(model)
    assert PrismDraftModel.from_pretrained(model.parent / "made").config.vocab_size == 97


def test_a_base_model_learns_its_own_text(tmp_path):
    """`--format text` needs no chat template; without it the run ends before weights are loaded, saying so."""
    model = tmp_path / "model"
    tiny_target("llama", seed=3).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    result = CliRunner().invoke(app, words(model), env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "expected one with a chat template, got none" in result.stderr
    assert "--format text" in result.stderr
    assert not (tmp_path / "made.work").exists()
    assert "with made" in run(model, "--format", "text")


def test_a_chat_template_can_be_given(tmp_path):
    """For a tokenizer without one, and prompts with it."""
    model = tmp_path / "model"
    tiny_target("llama", seed=3).save_pretrained(model)
    tokenizer = chat_tokenizer()
    (tmp_path / "template.jinja").write_text(tokenizer.chat_template)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(model)
    prompts = [{"prompt": f"w{number} w{number + 1} w{number + 2}"} for number in range(10, 40)]
    write_lines(tmp_path / "prompts.jsonl", prompts)
    options = ("--chat-template", tmp_path / "template.jinja", "--prompts", tmp_path / "prompts.jsonl")
    assert "with made" in run(model, *options)
    settings = json.loads((tmp_path / "made.work" / "data" / "provenance.json").read_text())
    assert settings["source"] == "30 given prompts"


@pytest.mark.parametrize("name", ["run", "data", "made[b]"])
def test_any_name_of_the_draft(model, name):
    """Also that of a folder of the run, whose content stays."""
    output = run(model, "--output", model.parent / name)
    assert f"transformers-prism push {model.parent / name} USER/{name}" in output.replace("\n", "")
    assert PrismDraftModel.from_pretrained(model.parent / name).config.vocab_size == 97
    kept = {path.name for path in (model.parent / f"{name}.work").iterdir()}
    assert {"data", "run", "steps.json", "bench.json"} <= kept
    assert name in run(model, "--output", model.parent / name)


def test_a_path_may_be_written_in_another_way(model):
    """As the shell completes it."""
    run(model)
    options = ["--output", f"{model.parent / 'made'}/", "--minutes", "0.02", "--max-new-tokens", "8"]
    result = CliRunner().invoke(app, ["make-draft", f"{model}/", *options])
    assert result.exit_code == 0, result.stderr


def test_missing_prompts_are_said_before_the_folder_is_claimed(model, tmp_path):
    """So that the corrected command works."""
    result = CliRunner().invoke(app, words(model, "--prompts", tmp_path / "nothere.jsonl"))
    assert "which is not there" in result.stderr
    assert not (model.parent / "made.work").exists()


def test_a_template_for_text_is_refused(model, tmp_path):
    """It would be ignored."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    result = CliRunner().invoke(app, words(model, "--format", "text", "--chat-template", template))
    assert "chat_template: expected none with --format text" in result.stderr


def test_other_settings_do_not_resume(model, monkeypatch):
    """Nor is a folder overwritten that is not of this run."""
    with monkeypatch.context() as patch:
        stop_at(patch, synthesis.Synthesizer, "_append", 10)
        CliRunner().invoke(app, words(model))
    result = CliRunner().invoke(app, [*words(model), "--minutes", "0.03"])
    assert "minutes: expected 0.02 as the run in" in result.stderr
    other = model.parent / "other"
    other.mkdir()
    result = CliRunner().invoke(app, [*words(model), "--output", str(other)])
    assert "output: expected a new folder" in result.stderr


def test_epochs_fit_into_the_time(tmp_path):
    """By the seconds of the trial's updates and what else it took; not more than teach anything, and not none."""
    run = make_draft.Run(tmp_path / "made", {"minutes": 10, "model": "x"}, None)
    run.steps["synthesis"] = {"num_conversations": 400, "num_tokens": 1, "seconds": 200.0}
    trial = {"updates": {"single_step": [4, 4.0], "warm_up": [4, 12.0]}, "rest_seconds": 14.0, "seconds": 60.0}
    run.steps["hidden states and trial"] = trial
    # 236 seconds are left of 510 with what loading and validation took, and an epoch has 100 updates of 1 and 3 seconds.
    assert run._epochs(trial) == {"single_step_epochs": 1.42, "warm_up_epochs": pytest.approx(0.5)}
    run.steps["synthesis"]["seconds"] = 509.0
    assert run._epochs(trial)["warm_up_epochs"] == 0.5
    fast = {**trial, "updates": {"single_step": [4, 0.004], "warm_up": [4, 0.004]}}
    run.steps["synthesis"]["seconds"] = 200.0
    assert run._epochs(fast) == {"single_step_epochs": pytest.approx(6.0), "warm_up_epochs": pytest.approx(4.0)}


def test_conversations_are_written_at_once_as_far_as_their_keys_and_values_fit(monkeypatch):
    """Of 4 layers with 2 heads of 8 in float32: 512 KiB for 1024 positions."""
    target = tiny_target("llama")
    one = 2 * 4 * 2 * 8 * 1024 * 4
    assert make_draft._num_rows(target) == 64
    for room, expected in ((one, 16), (20 * one, 20), (1000 * one, 64)):
        monkeypatch.setattr(make_draft, "_CACHE_BYTES", room)
        assert make_draft._num_rows(target) == expected


@pytest.mark.parametrize("name", ["MambaConfig", "GPT2Config", "FalconConfig"])
def test_targets_that_name_no_heads_are_written_with_too(name):
    """Recurrent layers have none, and others call them something else; it ended in an AttributeError."""
    config = getattr(transformers, name)()
    assert 16 <= make_draft._num_rows(SimpleNamespace(config=config, device=torch.device("cpu"), dtype=torch.float32)) <= 64


def test_the_time_of_an_interrupted_step_counts(tmp_path):
    """Also in the process that resumes it, and the step's own seconds are of both."""
    run = make_draft.Run(tmp_path / "made", {"minutes": 10, "model": "x"}, Console(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        run.step("synthesis", interrupted)
    assert run.spent() >= 0.05
    again = make_draft.Run(tmp_path / "made", {"minutes": 10, "model": "x"}, Console(quiet=True))
    assert again.spent() == run.spent()
    assert again.step("synthesis", dict)["seconds"] >= 0.05
    assert again.spent() == again.steps["synthesis"]["seconds"]
    assert not again.interrupted


def interrupted() -> dict:
    """A step that takes some time until somebody stops it."""
    time.sleep(0.06)
    raise KeyboardInterrupt


def test_prompts_that_are_too_few_are_said_before_training(model, tmp_path):
    """The step is not counted as finished, so that more prompts can be given."""
    prompts = write_lines(tmp_path / "one.jsonl", [{"messages": [{"role": "user", "content": "w10 w11 w12"}]}])
    result = CliRunner().invoke(app, words(model, "--prompts", prompts))
    assert result.exit_code == 1
    assert "expected at least 2 usable conversations (training and validation), got 1" in result.output + result.stderr
    assert json.loads((model.parent / "made.work" / "steps.json").read_text())["steps"] == {}


def test_a_folder_that_appears_is_not_taken_for_the_draft(model, tmp_path):
    made = make_draft.Run(model.parent / "made", {"minutes": 1, "model": str(model)}, Console(quiet=True))
    made.output.mkdir()
    with pytest.raises(ValueError, match="output: expected no such folder until the draft is finished, got .*made"):
        made.measure()


def test_openings_are_the_same_whenever_they_are_asked_for():
    """By number alone, so that a resumed run continues with those that the first one began with."""
    target, tokenizer = tiny_target("llama", seed=3), word_tokenizer()
    openings = make_draft.Openings(target, tokenizer)
    first = openings[:20]
    assert openings[3] == first[3]
    assert make_draft.Openings(target, tokenizer)[18] == first[18]
    assert len({chat[0]["content"] for chat in first}) > 10
    assert all(chat[0]["role"] == "user" and chat[0]["content"] for chat in first)


def test_a_missing_extra_is_said_before_anything_runs(model, monkeypatch):
    """The one that is needed, with what to install; others do not matter here."""
    monkeypatch.setattr("transformers_prism.cli.doctor._version", lambda name: None if name in ("pyarrow", "gradio") else "1")
    result = CliRunner().invoke(app, words(model))
    assert result.exit_code == 1
    assert "expected the extra 'train', got an incomplete one or none; pip install accelerate datasets matplotlib pyarrow" in result.stderr
    assert "gradio" not in result.stderr
