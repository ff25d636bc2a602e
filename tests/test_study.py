"""The study on a tiny target: equal tokens for all recipes, records as asked for, nothing done twice, bad input named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from test_training import write_data
from tiny_models import save_chat_target, write_lines
from typer.testing import CliRunner

from benchmarks.study import RECIPES, Run, StudyConfig, _lock_path, _share_runs, app, plan_runs
from benchmarks.study_figures import (
    GROWING,
    best_rates,
    conditional_acceptance,
    growth_interval,
    ratio_interval,
    tau_after,
    tau_interval,
)
from benchmarks.study_page import CLAIMS, PAPER_CLAIMS, verdict, write_study_page
from transformers_prism import PrismDraftModel
from transformers_prism.bench.acceptance import tree_settings
from transformers_prism.hub.files import weights_sha256
from transformers_prism.training.data.conversations import read_conversations
from transformers_prism.training.recipes import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    *("recipe", "seed", "tokens_seen", "train_seconds", "tree", "temperature"),
    *("num_rounds", "num_committed", "tau", "checkpoint_sha256"),
}


@pytest.fixture
def folder(tmp_path):
    """A target, conversations and prompts."""
    save_chat_target(tmp_path / "target")
    write_data(tmp_path / "data.jsonl", num_conversations=40)
    tasks = enumerate(("writing", "qa", "rag"))
    prompts = [{"question_id": number, "category": task, "turns": [f"w{10 + number} w20"]} for number, task in tasks]
    write_lines(tmp_path / "prompts.jsonl", prompts)
    return tmp_path


def arguments(folder, *more) -> list[str]:
    return [
        *("--data", str(folder / "data.jsonl"), "--target", str(folder / "target")),
        *("--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "runs")),
        *("--records", str(folder / "records"), "--draft_vocab_size", "40", "--batch_size", "4", "--use_cpu"),
        *("--num_prompts", "3", "--max_new_tokens", "8", "--trees", "7/3/3", "--temperatures", "0"),
        *("--logging_updates", "1", "--save_updates", "2", *more),
    ]


def invoke(folder, *more):
    result = CliRunner().invoke(app, arguments(folder, *more))
    assert result.exit_code == 0, result.output
    return result.output


def records_of(folder) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))}


@pytest.mark.slow
def test_study_trains_and_measures_all_recipes(folder):
    """Equal tokens within one update a stage; each record's figures agree with each other and with the draft."""
    output = invoke(folder, "--tokens_seen", "1600", "--trees", "7/3/3", "2/2/1", "--temperatures", "0", "0.8")
    records = records_of(folder).values()
    assert len(records) == len(RECIPES) * 4
    for record in records:
        assert set(record) >= KEYS
        assert record["tau"] == pytest.approx(record["num_committed"] / record["num_rounds"], abs=1e-4)
        assert record["num_committed"] == sum(answer["num_committed"] for answer in record["answers"]) == 3 * 7
        # A conversation has 16 tokens at most, an update 4 of them, and a recipe 3 stages that are rounded up.
        assert 1600 <= record["tokens_seen"] + 1
        assert record["tokens_seen"] <= 1600 + 3 * 64
        assert record["train_seconds"] > 0
    assert {record["recipe"] for record in records} == set(RECIPES)
    by_recipe = {record["recipe"]: record for record in records}
    folders = {name: next((folder / "runs").glob(f"{name}_*_seed0")) / "draft" for name in RECIPES}
    modules = {name: PrismDraftModel.from_pretrained(path).config for name, path in folders.items()}
    assert modules["prism-m3"].num_processing_modules == 3
    assert modules["stacked2"].num_layers_per_module == 2
    assert modules["eagle3"].module_form == "eagle3"
    assert {name for name, config in modules.items() if len(config.target_layer_ids) == 1} == {
        *("eagle2", "hass", "stacked2", "stacked3", "prism-m2-last")
    }
    assert modules["eagle2"].target_layer_ids == [4]  # behind the last of four layers
    assert len({record["checkpoint_sha256"] for record in records}) == len(RECIPES)
    assert by_recipe["hass"]["checkpoint_sha256"] == weights_sha256(folders["hass"])
    assert (folder / "records" / "tau_by_recipe.png").read_bytes().startswith(b"\x89PNG")
    assert output.count("tau ") == len(records)
    page = (folder / "records" / "README.md").read_text()
    for record in records:
        assert f"| {record['recipe']} | {record['tree']} | {record['temperature']:g} | {record['tau']:.3f} |" in page
        assert sum(record["answers"][0]["num_rounds_by_accepted"]) == record["answers"][0]["num_rounds"]
    # Of each way of decoding, of all together, and of a claim of the paper its steps.
    claims = [one for one in CLAIMS if RECIPES.keys() >= set(one)]  # the others are of records that are kept
    assert len(claims) > 15
    assert all(page.count(f"| {one[0]} over {one[1]} |") == 5 + (one in PAPER_CLAIMS) for one in claims)
    assert all(page.count(f"- prism-m2 commits more tokens a round than {worse}: **") == 1 for _, worse in PAPER_CLAIMS)
    assert "--trees 7/3/3 2/2/1" in page
    assert str(folder) not in page


def test_study_goes_on_where_it_stopped(folder, monkeypatch):
    """Neither training nor measuring is done again where a record is there; a lost record costs no training."""
    options = ("--recipes", "eagle2", "--tokens_seen", "800", "--volumes", "100", "300", "--seeds", "0", "1")
    invoke(folder, *options)
    before = records_of(folder)
    assert len(before) == 4
    assert (folder / "records" / "tau_over_volume.png").read_bytes().startswith(b"\x89PNG")
    volumes = sorted({record["num_data_tokens"] for record in before.values()})
    assert 100 <= volumes[0] < 116 < 300 <= volumes[1] < 316
    lost = sorted((folder / "records").glob("*.json"))[0]
    lost.unlink()

    def refuse(config):
        raise AssertionError("expected no training")

    monkeypatch.setattr("benchmarks.study.train", refuse)
    output = invoke(folder, *options)
    assert output.count("tau ") == 1
    assert records_of(folder) == before
    # The page of a command for one volume has what lies there of the other.
    invoke(folder, *options, "--volumes", "100")
    page = (folder / "records" / "README.md").read_text()
    assert all(f" {volume} tokens |" in page for volume in volumes)
    result = CliRunner().invoke(app, arguments(folder, *options, "--max_new_tokens", "6"))
    assert result.exit_code == 1
    assert "expected a record with max_new_tokens=6, got 8" in result.stderr


@pytest.mark.slow
def test_study_killed_in_training_ends_with_the_same_draft(folder):
    """SIGKILL behind a checkpoint; what goes on from there has the bits of a study that was never killed."""
    options = ("--recipes", "eagle2", "--tokens_seen", "4000")
    command = [sys.executable, "-m", "benchmarks.study", *arguments(folder, *options)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
    )
    deadline = time.monotonic() + 120
    while not list((folder / "runs").glob("eagle2_*/single_step/checkpoint-6")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not records_of(folder)
    invoke(folder, *options)
    (cut,) = records_of(folder).values()
    for record in (folder / "records").glob("*"):
        record.unlink()
    invoke(folder, *options, "--output", str(folder / "whole"))
    (whole,) = records_of(folder).values()
    assert cut["checkpoint_sha256"] == whole["checkpoint_sha256"]
    assert cut["num_rounds"] == whole["num_rounds"]


@pytest.mark.quick
def test_study_plan_scales_stages_and_writes_nothing(folder):
    output = invoke(folder, "--recipes", "prism-m2", "hass", "--epochs", "2", "--plan")
    assert "epochs: single_step 0.5, warm_up 1, split 0.5" in output
    assert "epochs: single_step 0.5, warm_up 1.5, split 0" in output
    assert not (folder / "runs").exists()
    assert not (folder / "records").exists()


@pytest.mark.quick
def test_study_learns_all_data_beside_validation_data_of_its_own(folder):
    """Volumes are counted over what the runs learn."""
    write_data(folder / "fresh.jsonl", num_conversations=8, seed=1)
    fresh = read_conversations(folder / "fresh.jsonl", 97)
    data = read_conversations(folder / "data.jsonl", 97)
    num_learnt = sum(one.input_ids not in {each.input_ids for each in fresh} for one in data)
    output = invoke(folder, "--recipes", "hass", "--validation_data", str(folder / "fresh.jsonl"), "--plan")
    assert f": {num_learnt} conversations, " in output
    assert f": {num_learnt} conversations, " not in invoke(folder, "--recipes", "hass", "--plan")


@pytest.mark.quick
def test_study_checks_its_settings():
    with pytest.raises(ValueError, match="recipes: expected some of eagle2, hass, .*, got 'eagle'"):
        StudyConfig(recipes=["eagle"])
    with pytest.raises(ValueError, match=r"trees: expected nodes/depth/top-k such as 59/6/10, got '59/6'"):
        tree_settings("59/6")
    with pytest.raises(ValueError, match="volumes: expected 0 to the 30 tokens of the training data, got 31"):
        plan_runs(StudyConfig(volumes=[31]), TrainConfig(output="runs"), [10, 20], 4)
    with pytest.raises(ValueError, match="num_modules: expected no value, since the study sets it, got 3"):
        plan_runs(StudyConfig(), TrainConfig(output="runs", num_modules=3), [10, 20], 4)
    assert tree_settings("5/5/1")["tree"] == "chain"


@pytest.mark.quick
def test_study_recipes_are_those_of_their_papers():
    """Aligned steps, weights of steps, and rates: a split that nothing precedes has the whole rate."""
    runs = {run.recipe: run.config for run in plan_runs(StudyConfig(), TrainConfig(output="runs"), [10, 20], 4)}
    assert {name: config.warm_up_steps for name, config in runs.items() if config.warm_up_epochs} == {
        name: 7 if name == "eagle3" else 3 for name in runs if name not in ("eagle2", "prism-m2-scratch")
    }
    assert runs["eagle3"].numbers("step_weights", float) == pytest.approx([0.8**step for step in range(7)])
    for name, config in runs.items():
        share = 1.0 if name == "prism-m2-scratch" else 0.25
        assert config.split_learning_rate == pytest.approx(share * config.learning_rate)
    assert (runs["prism-m1"].num_modules, runs["prism-m1"].split_epochs) == (1, runs["prism-m2"].split_epochs)


def test_study_uses_no_draft_that_was_trained_otherwise(folder):
    """A folder of runs with another number of epochs."""
    invoke(folder, "--recipes", "eagle2", "--epochs", "1")
    result = CliRunner().invoke(app, arguments(folder, "--recipes", "eagle2", "--epochs", "2", "--records", str(folder / "others")))
    assert result.exit_code == 1
    assert "expected a draft that was trained with single_step_epochs=2.0, got 1.0; use another output" in result.stderr


@pytest.mark.quick
def test_study_follows_few_recipes_over_the_data():
    """Those whose growth is told are trained with every volume, the others with the largest, whatever the order."""
    runs = plan_runs(StudyConfig(volumes=[0, 10, 30], seeds=[0, 1]), TrainConfig(output="runs"), [10, 20, 30], 4)
    for recipe in RECIPES:
        volumes = [(run.seed, run.num_data_tokens) for run in runs if run.recipe == recipe]
        growing = recipe in GROWING
        assert volumes == [(seed, volume) for seed in (0, 1) for volume in ((60, 10, 30) if growing else (60,))]


@pytest.mark.quick
def test_study_two_processes_share_the_runs(tmp_path):
    """What another process works on is left to it, and done here if it gives up; nothing is done twice."""
    runs = [Run(name, 0, 1, 10, TrainConfig(output=str(tmp_path / name))) for name in ("eagle2", "hass", "eagle3")]
    done, lines = [], []
    others = FileLock(_lock_path(runs[0]))
    others.acquire()

    def measure(run):
        done.append(run.recipe)
        if run.recipe == "hass":
            others.release()

    _share_runs(runs, lambda run: run.recipe not in done, measure, lines.append)
    assert done == ["hass", "eagle2", "eagle3"]
    assert [line.split(",")[0] for line in lines] == ["1 of 3 runs", "2 of 3 runs"]


@pytest.mark.quick
def test_study_takes_each_recipe_s_best_rate(tmp_path):
    """Of all ways of decoding together; a sweep that lacks a recipe is refused."""

    def record(recipe, rate, tau):
        return {"recipe": recipe, "learning_rate": rate, "tau": tau}

    records = [record("hass", 1e-3, 1.5), record("hass", 2e-3, 1.7), record("hass", 1e-3, 1.6), record("hass", 2e-3, 1.3)]
    records += [record("prism-m2", 1e-3, 1.2), record("prism-m2", 4e-3, 1.4)]
    assert best_rates(records) == {"hass": 1e-3, "prism-m2": 4e-3}
    for number, one in enumerate(records):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    study = StudyConfig(recipes=["hass", "prism-m2"], rates_from=str(tmp_path))
    runs = plan_runs(study, TrainConfig(output="runs"), [10], 4)
    assert [(run.config.learning_rate, run.config.split_learning_rate) for run in runs] == [(1e-3, 2.5e-4), (4e-3, 1e-3)]
    assert [run.config.target_layer_ids for run in runs] == ["4", ""]
    assert [run.config.features for run in runs] == ["runs/features-last", "runs/features"]
    # A variant takes the rate of the recipe that it varies.
    variants = StudyConfig(recipes=["prism-m2", "prism-m2-vocab-sample"], rates_from=str(tmp_path))
    assert [run.config.learning_rate for run in plan_runs(variants, TrainConfig(output="runs"), [10], 4)] == [4e-3, 4e-3]
    with pytest.raises(ValueError, match="rates_from: expected records of a sweep of prism-m3 in"):
        plan_runs(StudyConfig(recipes=["prism-m4-s5"], rates_from=str(tmp_path)), TrainConfig(output="runs"), [10], 4)
    with pytest.raises(ValueError, match="rates_from: expected records of a sweep of eagle3 in"):
        plan_runs(StudyConfig(recipes=["hass", "eagle3"], rates_from=str(tmp_path)), TrainConfig(output="runs"), [10], 4)


@pytest.mark.quick
def test_study_acceptance_by_draft_step():
    """Of 200 rounds 100 accept one token and more, of these 60 two and more; where few came, nothing is told. The end of a
    shallow tree rejects nothing."""

    def record(tree, *rounds):
        return {"tree": tree, "answers": [{"num_rounds_by_accepted": list(one)} for one in rounds]}

    deep = record("59/6/10", (50, 20, 15), (50, 20, 25, 20))
    assert conditional_acceptance([deep]) == [0.5, 0.6, pytest.approx(20 / 60)]
    shallow = record("15/2/4", (0, 0, 300))
    assert conditional_acceptance([deep, shallow]) == [400 / 500, 360 / 400, pytest.approx(20 / 60)]
    # Nobody gets further: a share of 0, and no more.
    assert conditional_acceptance([record("59/6/10", (50, 60))]) == [pytest.approx(60 / 110), 0.0]


@pytest.mark.quick
def test_study_error_bars_hold_tau_and_narrow_with_prompts():
    def record(num_answers):
        answers = [{"num_rounds": 10, "num_committed": 10 + 2 * (number % 8)} for number in range(num_answers)]
        return {"tau": 1.7, "answers": answers}

    (low, high), (narrow_low, narrow_high) = (tau_interval([record(count)]) for count in (8, 128))
    assert low < 1.7 < high
    assert narrow_low < 1.7 < narrow_high
    assert narrow_high - narrow_low < 0.5 * (high - low)
    assert tau_interval([{"tau": 2.0, "answers": [{"num_rounds": 3, "num_committed": 6}]}]) == (2.0, 2.0)


@pytest.mark.quick
def test_study_prompts_that_end_at_once_are_left_out():
    """Such an answer took no round, and draws of nothing else have no tau."""

    def record(*answers):
        told = [{"num_committed": committed, "num_rounds": rounds} for committed, rounds in answers]
        return {"seed": 0, "tau": sum(one for one, _ in answers) / sum(one for _, one in answers), "answers": told}

    sides = [record((0, 0), (6, 3), (8, 2))], [record((0, 0), (3, 3), (4, 2))]
    ratio, low, high = ratio_interval(sides)
    assert ratio == pytest.approx(2.0)
    assert (low, high) == pytest.approx((2.0, 2.0))
    assert tau_interval(sides[0]) == (2.0, 4.0)


@pytest.mark.quick
def test_study_claims_are_judged_by_pairs_of_prompts():
    """A draft that accepts a quarter more on every prompt is better for sure, however different the prompts are."""

    def record(seed, factor):
        answers = [{"num_rounds": 20, "num_committed": factor * (20 + 4 * (number % 8))} for number in range(24)]
        tau = sum(one["num_committed"] for one in answers) / sum(one["num_rounds"] for one in answers)
        return {"seed": seed, "tau": tau, "answers": answers}

    better, worse = ([record(seed, factor) for seed in (0, 1)] for factor in (1.25, 1.0))
    ratio, low, high = ratio_interval((better, worse))
    assert ratio == pytest.approx(1.25)
    assert low == pytest.approx(1.25)
    assert high == pytest.approx(1.25)
    assert tau_interval(better)[0] < 1.25 * tau_interval(worse)[1]
    with pytest.raises(ValueError, match=r"expected records of the same seeds on all sides, got \[\[0, 1\], \[0\]\]"):
        ratio_interval((better, worse[:1]))
    assert [verdict(1.1, 1.3), verdict(0.8, 0.9), verdict(0.9, 1.1)] == ["holds", "does not hold", "undecided"]


@pytest.mark.quick
def test_study_seeds_that_agree_tell_no_more_of_prompts_than_one():
    """All seeds answer the same prompts. Where seeds differ, two tell less than many."""

    def record(seed, factor=1.0):
        rounds = [10 + (7 * number) % 11 for number in range(24)]
        answers = [{"num_rounds": 20, "num_committed": factor * (20 + one)} for one in rounds]
        return {"seed": seed, "tau": sum(one["num_committed"] for one in answers) / 480, "answers": answers}

    one, four = [record(0)], [record(seed) for seed in range(4)]
    (low, high), (low_of_four, high_of_four) = tau_interval(one), tau_interval(four)
    assert high_of_four - low_of_four == pytest.approx(high - low, rel=0.15)
    others = [dict(each, answers=each["answers"][::-1]) for each in four]
    (_, low, high), (_, low_of_four, high_of_four) = ratio_interval((one, others[:1])), ratio_interval((four, others))
    assert high_of_four - low_of_four == pytest.approx(high - low, rel=0.15)
    two = [record(0, 0.9), record(1, 1.1)]
    # One of the two is drawn, so that the interval reaches from one to the other.
    assert tau_interval(two)[0] < two[0]["tau"] < two[1]["tau"] < tau_interval(two)[1]


@pytest.mark.quick
def test_study_sweep_is_a_table_of_rates(tmp_path):
    """The best in bold, those at an edge named, and no verdicts."""

    def record(recipe, rate, tau):
        of_run = {"recipe": recipe, "learning_rate": rate, "tau": tau, "seed": 0, "num_data_tokens": 10, "compute_dtype": "float32", "epochs": 1.0}
        measured = {"tree": "15/4/4", "temperature": 0.0, "num_prompts": 1, "max_new_tokens": 8, "coupled": False, "hardware": "it"}
        return {**of_run, **measured, "answers": []}

    records = [record("hass", rate, tau) for rate, tau in ((1e-3, 1.5), (2e-3, 1.7), (4e-3, 1.6))]
    records += [record("prism-m2", rate, tau) for rate, tau in ((1e-3, 1.9), (2e-3, 1.8))]
    page = write_study_page(records, tmp_path, "command").read_text()
    assert "| hass | 1.500 | **1.700** | 1.600 |" in page
    assert "| prism-m2 | **1.900** | 1.800 |  |" in page
    assert "lowest or highest that was tried for prism-m2." in page
    assert "holds**" not in page
    with pytest.raises(ValueError, match="rates_from: expected hass trained and measured alike with each rate"):
        best_rates([*records, {**record("hass", 8e-3, 1.9), "temperature": 0.8}])


@pytest.mark.quick
def test_study_growth_is_judged_by_pairs():
    """A recipe whose tau doubles where the other's rises by a half gains more by a third, for sure."""

    def records(factor):
        answers = [{"num_rounds": 20, "num_committed": factor * (20 + number % 8)} for number in range(24)]
        tau = sum(one["num_committed"] for one in answers) / sum(one["num_rounds"] for one in answers)
        return [{"seed": 0, "tau": tau, "answers": answers}]

    way = (records(4), records(2), records(3), records(2))
    assert growth_interval(way) == pytest.approx((4 / 3, 4 / 3, 4 / 3))
    # With a way in which both gain alike, the geometric mean.
    assert growth_interval(way, (records(2), records(1)) * 2) == pytest.approx([(4 / 3) ** 0.5] * 3)


@pytest.mark.quick
def test_study_compares_at_equal_seconds():
    """Half of the way between two volumes, over the logarithm of seconds, is half of the gain; beyond them is unknown."""
    records = [
        {"num_data_tokens": 100 * volume, "train_seconds": seconds, "tau": tau, "seed": seed}
        for volume, seconds, tau in ((1, 10.0, 1.0), (4, 40.0, 1.4), (16, 160.0, 2.0))
        for seed in (0, 1)
    ]
    assert tau_after(20.0, records) == pytest.approx(1.2)
    assert tau_after(80.0, records) == pytest.approx(1.7)
    assert tau_after(160.0, records) == pytest.approx(2.0)
    assert tau_after(200.0, records) is None
    assert tau_after(20.0, records[:2]) is None


@pytest.mark.quick
def test_study_page_tells_of_larger_volumes_and_of_losses(tmp_path):
    """Claims are judged with as much data as there is, ablations where most recipes are; a loss at equal seconds, too."""

    def record(recipe, volume, factor, seconds):
        answers = [
            {"num_rounds": 20, "num_committed": factor * 20, "num_rounds_by_accepted": [10, 10]} for _ in range(8)
        ]
        of_run = {"recipe": recipe, "learning_rate": 1e-3, "seed": 0, "num_data_tokens": volume, "compute_dtype": "float32", "epochs": 1.0}
        measured = {"tree": "2/2/1", "temperature": 0.0, "num_prompts": 8, "max_new_tokens": 8, "coupled": False, "hardware": "it"}
        figures = {"tau": factor, "tokens_seen": volume, "train_seconds": seconds, "share_of_answers_in_a_loop": 0.0, "answers": answers}
        return {**of_run, **measured, **figures}

    records = [
        *(record("prism-m2", 1000, 2.0, 10.0), record("prism-m2", 4000, 2.4, 40.0), record("eagle2", 1000, 2.0, 5.0)),
        *(record("eagle2", 4000, 3.0, 20.0), record("prism-m2-vocab-sample", 1000, 2.2, 99.0), record("prism-m1", 1000, 1.6, 9.0)),
    ]
    page = write_study_page(records, tmp_path, "command", {"vocab-sample": 2.0}).read_text()
    lines = page.splitlines()
    with_more, with_less = (lines.index(f"With {volume} tokens of training each:") for volume in ("4 000", "1 000"))
    assert lines[with_more + 2] == "- prism-m2 commits more tokens a round than eagle2: **does not hold**, 0.800 times (0.800 to 0.800; one seed)"
    assert lines[with_less + 2] == "- prism-m2 commits more tokens a round than eagle2: **undecided**, 1.000 times (1.000 to 1.000; one seed)"
    assert "- prism-m2 gains more from 4 000 instead of 1 000 tokens than eagle2: **does not hold**, 0.800 times" in page
    assert "Where a lead comes from, with 1 000 tokens:\n\n- prism-m2 over prism-m1: **holds**, 1.250 times" in page
    # Half of the way from 2.0 to 2.4 is what prism-m2 has after 20 seconds, which the other's steps would take.
    assert "| prism-m2-vocab-sample | 1 | 1.100 | 1.100 to 1.100 | holds | 2.00 | 1.000 |" in page
    assert "no longer has" not in page
    records.append(record("prism-m2-first-miss", 1000, 2.0, 11.0))
    assert "`train` no longer has first-miss;" in write_study_page(records, tmp_path, "command").read_text()
    headings = [line for line in lines if line.startswith("## With ")]
    assert headings == ["## With 1000 tokens of data", "## With 4000 tokens of data"]
