"""The cost of training steps: both ways compute the same, and the command tells all of it."""

import json

import pytest
import torch
from tiny_models import tiny_target
from typer.testing import CliRunner

from benchmarks.study import RECIPES
from benchmarks.training import LOSSES, TrainingStep, app, authors_forward, peak_memory
from transformers_prism.training.alignment import aligned_forward
from transformers_prism.training.losses import LossWeights
from transformers_prism.training.recipes import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.quick
def test_the_authors_way_computes_the_same():
    """In float64, over the modules' own views, which is what theirs trains; so the comparison is of equal work."""
    step = TrainingStep(tiny_target().double(), draft_vocab_size=40, batch_size=2, length=11)
    step.draft.config.context_kv = "own_module"
    for count in (1, 2, 4):
        ours = aligned_forward(step.draft, step.input_ids, step.states, count)
        theirs = authors_forward(step.draft, step.input_ids, step.states, count)
        for left, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    step(3)
    assert all(weight.grad is not None for weight in step.draft.parameters())


def test_memory_grows_with_the_text_as_it_does_not_with_its_square():
    """No score matrix is made: 12 times the text needs 12 times the memory, and less with checkpointing."""
    target = tiny_target()
    short, long = (peak_memory(target, length=length, num_steps=3) for length in (64, 768))
    again = peak_memory(target, length=768, num_steps=3, checkpoint_activations=True)
    assert 4 * short < long < 14 * short
    assert again < 0.9 * long


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.training.load_target", lambda *_, **__: (tiny_target(), None))
    options = ["--repeat", "2", "--length", "16", "--batch-size", "1", "--most-steps", "3", "--no-memory"]
    result = CliRunner().invoke(app, [*options, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["ratio"] > 0
    assert len(figures["seconds_by_steps"]) == 3
    assert len(figures["growth"]) == 2
    assert set(figures["over_plain_loss"]) == set(LOSSES)
    assert all(ratio > 0 for ratio in figures["over_plain_loss"].values())


def test_losses_are_those_of_the_study():
    """A loss is timed with the settings that its recipe is trained with."""
    settings = {name: TrainConfig(**RECIPES[f"prism-m2-{name}"]) for name in LOSSES}
    assert LOSSES == {name: LossWeights(vocab_sample=one.vocab_sample) for name, one in settings.items()}
