"""What --plan shows is what the run then does: options, stages, data and the finished draft."""

import dataclasses
import json
import re

import pytest
from test_training import settings, write_data
from tiny_models import save_chat_target, tiny_draft, tiny_target
from typer.testing import CliRunner

from transformers_prism import PrismDraftModel
from transformers_prism.cli.main import app
from transformers_prism.target import config_and_tokenizer
from transformers_prism.training.data.conversations import read_parts
from transformers_prism.training.first_draft import make_draft_config
from transformers_prism.training.plan import describe_plan, stage_costs
from transformers_prism.training.recipes import TrainConfig
from transformers_prism.training.train import AlignedTrainer, train

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

ONE_STAGE = {"single_step_epochs": 0.0, "warm_up_epochs": 0.0, "split_epochs": 1.0}


@pytest.fixture
def folder(tmp_path):
    """A target in a folder."""
    return save_chat_target(tmp_path / "target").parent


@pytest.fixture
def trained(monkeypatch):
    """What the Trainer of each stage was given."""
    trainers = []
    init = AlignedTrainer.__init__

    def spied_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(AlignedTrainer, "__init__", spied_init)
    return trainers


def test_plan_says_what_a_run_does_and_writes_nothing(tmp_path, monkeypatch):
    """Updates, tokens and features are what the run then has."""
    save_chat_target(tmp_path / "target")
    data = write_data(tmp_path / "data.jsonl")
    options = ["--data", str(data), "--target", str(tmp_path / "target"), "--output", str(tmp_path / "run")]
    options += ["--draft_vocab_size", "40", "--batch_size", "4", "--split_epochs", "0", "--use_cpu"]
    result = CliRunner().invoke(app, ["train", *options, "--plan"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()
    result_of_run = CliRunner().invoke(app, ["train", *options])
    assert result_of_run.exit_code == 0, result_of_run.output
    record = json.loads((tmp_path / "run" / "draft" / "training.json").read_text())
    for stage in record["stages"]:
        assert f"{stage['stage']['name']:<11} M=1" in result.output
        assert f"{stage['num_updates']} updates, {stage['tokens_seen']} tokens seen" in result.output
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "run" / "features").glob("*.bf16"))
    assert re.search(rf"features    states \[[\d, ]+\]: {num_bytes / 2**30:.2f} GiB in bfloat16", result.output)
    draft = PrismDraftModel.from_pretrained(tmp_path / "run" / "draft")
    num_parameters = sum(parameter.numel() for parameter in draft.parameters())
    assert f"{2 * num_parameters / 1e6:.1f} million" in result.output or "0.0 million" in result.output


def test_plan_estimates_hours_from_a_speed(tmp_path, monkeypatch):
    """Ten times the speed, a tenth of the hours; online features need no disk, but the target again in each epoch."""
    save_chat_target(tmp_path / "target")
    options = {"target": str(tmp_path / "target"), "recipe": "hass"}
    hours = {
        speed: re.findall(r"([\d.e-]+) hours", describe_plan(settings(tmp_path, teraflops=speed, **options)))
        for speed in (1e-9, 1e-8)
    }
    for slow, fast in zip(hours[1e-9], hours[1e-8], strict=True):
        assert float(slow) == pytest.approx(10 * float(fast), rel=0.1)
    assert len(hours[1e-9]) == 4
    kept, online = (
        float(re.search(r"features .*about ([\d.e-]+) PFLOP", describe_plan(one)).group(1))
        for one in (settings(tmp_path, **options), settings(tmp_path, online_features=True, **options))
    )
    assert online > 2 * kept
    assert "none on disk" in describe_plan(settings(tmp_path, online_features=True, **options))
    assert not re.search(r"\d hours", describe_plan(settings(tmp_path, **options)))
    fresh = str(write_data(tmp_path / "fresh.jsonl", 7, seed=1))
    assert "7 conversations held out" in describe_plan(settings(tmp_path, validation_data=fresh, **options))


def test_plan_counts_the_work_that_a_sample_of_the_vocabulary_saves(tmp_path):
    """The target's product with the head stays, the draft's are a share; the plan prints three digits of it."""
    save_chat_target(tmp_path / "target")
    work = []
    for share in (1.0, 0.6, 0.2):
        config = settings(tmp_path, target=str(tmp_path / "target"), vocab_sample=share)
        target_config, tokenizer = config_and_tokenizer(config.target)
        lengths = [len(one.input_ids) for one in read_parts(config, target_config.vocab_size, tokenizer)[0].chosen]
        work.append(stage_costs(config, make_draft_config(config, target_config, tokenizer), lengths)[-1].petaflops)
        printed = float(re.search(r"split .*about ([\d.e-]+) PFLOP", describe_plan(config)).group(1))
        assert printed == pytest.approx(work[-1], rel=0.01)
    assert work[0] - work[1] == pytest.approx(work[1] - work[2], rel=0.1)
    assert work[0] > work[2] > 0


# Runs in which every option that the plan reads has another value than the default.
RUNS = {
    "modules": {
        "num_modules": 3,
        "num_layers_per_module": 2,
        "draft_step_to_module": "0,1,1,2",
        "target_layer_ids": "1,3",
        "draft_vocab_size": 50,
        "sliding_window": 5,
        "single_step_epochs": 1.5,
        "warm_up_epochs": 0.5,
        "split_epochs": 1.2,
        "warm_up_steps": 2,
        "split_steps": 5,
        "learning_rate": 1e-3,
        "split_learning_rate": 3e-4,
        "batch_size": 3,
        "max_bad_share": 0.25,
        "accumulation": 2,
        "num_conversations": 13,
        "num_validation": 2,
        "validation_share": 0.3,
        "max_length": 12,
        "checkpoint_activations": True,
        "step_weights": "1,0.5",
        "token_weight": 0.2,
        "vocab_sample": 0.5,
    },
    "eagle3": {
        "plain_fusion": True,
        "recipe": "eagle3",
        "warm_up_epochs": 1.0,
        "split_epochs": 0.0,
        "single_step_epochs": 0.0,
        "validation_data": "fresh.jsonl",
        "online_features": True,
        "compute_dtype": "bfloat16",
        "context_kv": "own_module",
    },
    "form": {"recipe": "hass", "module_form": "eagle3", "acceptance_weight": 0.1, "hidden_weight": 0.5},
    "features": {**ONE_STAGE, "num_modules": 2, "draft_step_to_module": "1,0", "features": "states", "is_detached": True},
    "default": {"split_epochs": 0.0},
    "carried_on": {"num_modules": 3, "split_epochs": 0.0, "init_from": "first/draft"},
    "split_further": {**ONE_STAGE, "num_modules": 4, "init_from": "first/draft"},
}
# Of no run: what the plan alone is for, and where the run stands.
ONLY_PLANNED = {"plan", "teraflops", "output", "data", "target"}


def facts_of_plan(text: str) -> dict:
    """The figures of a plan."""

    def found(pattern: str) -> tuple[str, ...]:
        return re.search(pattern, text).groups()

    return {
        "draft": found(r"in (\d+) modules of (\d+) layers \((\w+)\), steps on modules (\[.*?\])"),
        "target": found(r"states (\[.*?\]), draft vocabulary (\d+);.* GiB in (\w+)\n"),
        "data": found(r"data +(\d+) conversations, (\d+) tokens, (\d+) in answers; (\d+) conversations held out"),
        "on_disk": "none on disk" not in text,
        "stages": re.findall(
            r"^(\w+) +M=(\d+), S=(\d+): (\d+) updates, (\d+) tokens seen, learning rate ([\d.e-]+);", text, flags=re.MULTILINE
        ),
    }


def facts_of_run(output, trainers) -> dict:
    """The same of a run: what was trained, and what was saved."""
    record = json.loads((output / "draft" / "training.json").read_text())
    config = PrismDraftModel.from_pretrained(output / "draft").config
    data = record["data"]["training"]
    shown = (config.num_processing_modules, config.num_layers_per_module, config.module_form, config.draft_step_to_module)
    counts = (data["num_conversations"], data["num_tokens"], data["num_answer_tokens"])
    stages = []
    for trainer, result in zip(trainers, record["stages"], strict=True):
        num_modules = trainer.model.draft.config.num_processing_modules
        figures = (num_modules, trainer.model.stage.num_steps, result["num_updates"], result["tokens_seen"])
        stages.append((result["stage"]["name"], *map(str, figures), f"{trainer.args.learning_rate:g}"))
    dtype = str(trainers[-1].model.target().dtype).removeprefix("torch.")
    store = trainers[-1].train_dataset.store
    return {
        "draft": tuple(map(str, shown)),
        "target": (str(config.target_layer_ids), str(config.draft_vocab_size), dtype),
        "data": (*map(str, counts), str(record["data"]["validation"]["num_conversations"])),
        "on_disk": hasattr(store, "folder"),
        "stages": stages,
    }


def config_of(folder, name: str) -> TrainConfig:
    """The settings of a run in a folder."""
    write_data(folder / "fresh.jsonl", 7, seed=1)
    options = {"target": str(folder / "target"), **RUNS[name]}
    for option in ("features", "validation_data", "init_from"):
        if option in options:
            options[option] = str(folder / options[option])
    return settings(folder, name, **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_what_its_plan_shows(folder, trained, name):
    """`--draft_step_to_module` and, of recipes without a split, `--num_modules` were shown and dropped."""
    if "init_from" in RUNS[name]:
        train(settings(folder, "first", target=str(folder / "target"), num_modules=3, draft_step_to_module="0,0,1,2"))
        trained.clear()
    config = config_of(folder, name)
    plan = facts_of_plan(describe_plan(config))
    train(config)
    assert plan == facts_of_run(folder / name, trained)
    expected = {
        "modules": [0, 1, 1, 2],
        "features": [1, 0],
        "carried_on": [0, 0, 1, 2],
        "split_further": [0, 1, 2, 3],
        "default": [0],
    }
    saved = PrismDraftModel.from_pretrained(folder / name / "draft").config
    assert saved.draft_step_to_module == expected.get(name, [0])
    for trainer in trained:
        assert trainer.model.options["checkpoint_activations"] == config.checkpoint_activations
        assert trainer.args.gradient_accumulation_steps == config.accumulation
        assert trainer.args.bf16 == (config.compute_dtype == "bfloat16")


def test_every_option_that_the_plan_reads_is_tried(folder):
    """A new one belongs into RUNS."""
    read = set()

    class Spied(TrainConfig):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for name in ("modules", "eagle3", "form"):
        config = Spied(**dataclasses.asdict(config_of(folder, name)))
        read.clear()
        describe_plan(config)
        tried = {option for options in RUNS.values() for option in options}
        assert read & fields <= tried | ONLY_PLANNED
        assert "draft_step_to_module" in read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "hass", "num_modules": 2, "split_epochs": 0.0}, "num_modules: expected 1, since only stage split makes more .*, got 2"),
        ({"split_epochs": 0.0, "draft_step_to_module": "0,1"}, "num_modules: expected 1, since only stage split .* got 2"),
        ({"num_modules": 3, "draft_step_to_module": "0,1,1"}, r"expected each of 0\.\.2 .* got \[0, 1, 1\]"),
        ({"context_kv": "shared"}, "context_kv"),
        ({"init_from": "first/draft"}, "num_modules: expected at least the 3 of draft, got 2"),
    ],
)
@pytest.mark.parametrize("is_planned", [True, False], ids=["plan", "run"])
def test_modules_that_no_stage_makes_are_refused(folder, options, message, is_planned):
    if "init_from" in options:
        target = tiny_target("llama", seed=3)
        tiny_draft(target, num_processing_modules=3).save_pretrained(folder / "first" / "draft")
        options = {"init_from": str(folder / "first" / "draft")}
    config = settings(folder, target=str(folder / "target"), **options)
    with pytest.raises(ValueError, match=message):
        (describe_plan if is_planned else train)(config)
    assert not (folder / "run").exists()


def test_a_stage_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="token_weight: expected a loss with a weight above 0 in stage split, got none"):
        TrainConfig(token_weight=0.0)
    TrainConfig(token_weight=0.0, split_epochs=0.0)
