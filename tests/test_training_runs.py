"""Training in processes of its own: killed at any moment, on two processes, on a disk that fills up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_training import settings, write_data
from tiny_models import save_chat_target, tiny_target
from transformers import Trainer

from transformers_prism import PrismDraftModel
from transformers_prism.training.train import AlignedTrainer, train

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "draft_vocab_size": 40,
    "warm_up_epochs": 2,
    "single_step_epochs": 2,
    "split_epochs": 2,
    "learning_rate": 5e-3,
    "logging_updates": 1,
    "save_updates": 1,
}


@pytest.fixture
def folders(tmp_path):
    """A target in a folder, and data of 24 conversations of which 16 are trained on."""
    save_chat_target(tmp_path / "target")
    write_data(tmp_path / "data.jsonl", num_conversations=24)
    return tmp_path


def command(folder, name, *more, processes=1, program=("-m", "transformers_prism.cli.main"), **options):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = {
        **OPTIONS,
        "data": folder / "data.jsonl",
        "target": folder / "target",
        "output": folder / name,
        "num_conversations": 16,
        **options,
    }
    words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    # Several processes find each other on a CPU by themselves, too.
    device = ["--use_cpu"] if processes == 1 else []
    return [*launcher, *program, "train", *device, *words, *more]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def run(words):
    result = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def kill_at(words, folder):
    """Start a run; SIGKILL to all of its processes once the folder is there. torchrun's are in sessions of their own."""
    process = psutil.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 200
    while not folder.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    processes = [process, *process.children(recursive=True)]
    for one in processes:
        one.kill()
    psutil.wait_procs(processes)


def losses(folder):
    stages = json.loads((folder / "draft" / "training.json").read_text())["stages"]
    return [loss for stage in stages for loss in stage["loss"]]


def step_losses(folder):
    """Per-step losses of every line of the log of every stage."""
    history = [line for stage in ("single_step", "warm_up", "split") for line in read_history(folder / stage)]
    return [value for line in history for name, value in sorted(line.items()) if "_loss_" in name]


def read_history(folder):
    return json.loads((folder / "result.json").read_text())["history"]


def last_validation(folder):
    found = json.loads((folder / "draft" / "training.json").read_text())["stages"][-1]["validation"]
    return {name: value for name, value in found.items() if name != "eval_speedup_estimate"}


def assert_same_weights(first, second):
    states = [PrismDraftModel.from_pretrained(folder / "draft").state_dict() for folder in (first, second)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_killed_run_ends_with_the_same_weights(folders):
    """SIGKILL while a checkpoint is being written, and between stages: the resumed run's draft has the same bits."""
    run(command(folders, "whole", batch_size=4))
    for moment in ("single_step/checkpoint-3", "warm_up/checkpoint-6"):
        more = ["--resume"] if (folders / "cut").exists() else []
        # The folder is there before what belongs into it.
        kill_at(command(folders, "cut", *more, batch_size=4), folders / "cut" / moment)
    assert not (folders / "cut" / "draft").exists()
    run(command(folders, "cut", "--resume", batch_size=4))
    assert_same_weights(folders / "whole", folders / "cut")


def test_two_processes_equal_one_with_accumulation(folders):
    """Two gloo processes with a batch of 2 see what one with two batches of 2 per update sees; so do two that shard weights
    and AdamW's state, killed while they write a checkpoint, and resumed from the one before, in the middle of the second epoch."""
    sharded = {"batch_size": 2, "processes": 2, "program": (str(Path(__file__).with_name("fsdp_on_cpu.py")),)}
    validated = ("--num_acceptance_prompts", "2", "--validation_updates", "2", "--save_updates", "2")
    run(command(folders, "one", *validated, batch_size=2, accumulation=2))
    run(command(folders, "two", *validated, batch_size=2, processes=2))
    kill_at(command(folders, "sharded", *validated, "--fsdp", **sharded), folders / "sharded" / "warm_up" / "checkpoint-8")
    run(command(folders, "sharded", *validated, "--fsdp", "--resume", **sharded))
    expected = losses(folders / "one")
    states = {name: PrismDraftModel.from_pretrained(folders / name / "draft").state_dict() for name in ("one", "two", "sharded")}
    validations = {name: last_validation(folders / name) for name in states}
    for name in ("two", "sharded"):
        found = losses(folders / name)
        assert len(found) == len(expected) == 24
        assert found == pytest.approx(expected, rel=1e-4)
        # Of all processes; those of the first one alone differ by two percent.
        assert step_losses(folders / name) == pytest.approx(step_losses(folders / "one"), rel=1e-3)
        assert validations[name] == pytest.approx(validations["one"], rel=1e-3)
        for key, tensor in states["one"].items():
            torch.testing.assert_close(tensor, states[name][key], rtol=1e-3, atol=1e-4)


def test_two_processes_train_a_map_that_leaves_a_module_out(folders):
    """Of three modules two serve the steps that are trained: DDP stopped at the second update, waiting for the third."""
    options = {"num_modules": 3, "draft_step_to_module": "0,0,1,2", "split_steps": 3, "single_step_epochs": 0, "warm_up_epochs": 0}
    run(command(folders, "one", batch_size=2, accumulation=2, **options))
    run(command(folders, "two", batch_size=2, processes=2, **options))
    assert losses(folders / "two") == pytest.approx(losses(folders / "one"), rel=1e-4)
    draft = PrismDraftModel.from_pretrained(folders / "two" / "draft")
    assert draft.config.draft_step_to_module == [0, 0, 1, 2]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    """A checkpoint that does not fit ends the run with the system's error; the one before is gone on from."""
    target = tiny_target("llama", seed=3)
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target.to(dtype), None))
    whole = train(settings(tmp_path, "whole"))
    save = Trainer._save_optimizer_and_scheduler

    def save_until_full(self, folder):
        if folder.endswith("checkpoint-6"):
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(AlignedTrainer, "_save_optimizer_and_scheduler", save_until_full)
    with pytest.raises(OSError, match="No space left on device"):
        train(settings(tmp_path, "cut"))
    monkeypatch.undo()
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target.to(dtype), None))
    resumed = train(settings(tmp_path, "cut", resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    """The run stops at that batch, and goes on from before it once the cause is gone."""
    target = tiny_target("llama", seed=3)
    monkeypatch.setattr("transformers_prism.training.train.load_target", lambda name, dtype: (target.to(dtype), None))
    whole = train(settings(tmp_path, "whole"))
    compute_loss = AlignedTrainer.compute_loss

    def fail_at_fifth(self, model, inputs, **kwargs):
        if self.state.global_step == 5:
            inputs = {**inputs, "states": inputs["states"] * float("nan")}
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(AlignedTrainer, "compute_loss", fail_at_fifth)
    with pytest.raises(ValueError, match="expected a finite number, got nan at update 5; the last checkpoint is kept"):
        train(settings(tmp_path, "cut"))
    monkeypatch.setattr(AlignedTrainer, "compute_loss", compute_loss)
    resumed = train(settings(tmp_path, "cut", resume=True))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
