"""`bench rounds`, `benchmarks.scaling` and `benchmarks.page`: sizes that were asked for, parts that add up, a page without other figures."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import prompts, scripted_draft, tiny_draft, tiny_target, write_lines
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from benchmarks import scaling, training
from benchmarks.page import levers, write_page
from benchmarks.plots import colour_of
from benchmarks.scaling import Point, bench_scaling, bootstrap_median, modules_ratio, modules_text, num_calls
from transformers_prism.bench.rounds import FORWARDS, PARTS, profile_rounds, watched, weight_bytes
from transformers_prism.cli.main import app

pytestmark = pytest.mark.quick


def run(*words, app=app) -> None:
    """Run a command, which must succeed and keep to 100 columns."""
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "\u2026" not in result.output
    assert max(map(len, result.output.splitlines())) <= 100


@pytest.fixture(scope="module")
def measured(tiny_folders, tmp_path_factory):
    """Files of each kind of measurement, of tiny models."""
    root = tmp_path_factory.mktemp("measured")
    target, draft = tiny_folders
    texts = [" ".join(f"w{(7 * index + 3 * place) % 40 + 50}" for place in range(12)) for index in range(8)]
    tasks = ("qa", "writing") * 4
    records = [{"question_id": i, "category": tasks[i], "turns": [text]} for i, text in enumerate(texts)]
    write_lines(root / "prompts.jsonl", records)
    source = ("--target", target, "--draft", draft, "--prompts", root / "prompts.jsonl")
    sizes = "--num-prompts 2 --max-new-tokens 8 --repeat 1 --method static".split()
    run("bench", "generate", *source, *sizes, "--json", root / "greedy.json")
    run("bench", "generate", *source, *sizes, "--batch-size", 2, "--json", root / "batch.json")
    sizes = "--num-prompts 4 --max-new-tokens 8 --tree 5/2/3 --tree 2/2/1".split()
    run("bench", "acceptance", *source, *sizes, "--json", root / "acceptance.json")
    sizes = "--method static --context 30 --num-rounds 3".split()
    run("bench", "rounds", *source, *sizes, "--json", root / "rounds.json")
    sizes = "--modules 1 --modules 2 --nodes 5 --num-rounds 5 --tree-top-k 4 --tree-depth 4".split()
    run("--target", target, *sizes, "--json", root / "scaling.json", app=scaling.app)
    sizes = "--repeat 2 --length 16 --most-steps 3 --no-memory".split()
    run("--target", target, *sizes, "--json", root / "training.json", app=training.app)
    names = ("greedy", "batch", "acceptance", "rounds", "scaling", "training")
    # Of `bench modules`, which is gone.
    kept = Path(__file__).parent.parent / "docs" / "performance" / "modules.json"
    return [*(root / f"{name}.json" for name in names), kept]


def test_scaling_times_rounds_of_the_sizes_that_were_asked_for():
    """Each value of an axis has its rounds and plain steps; what was drafted has that many nodes and rows."""
    target = tiny_target("llama", seed=3)
    verified = []
    target.register_forward_pre_hook(
        lambda module, args, kwargs: verified.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    base = Point(modules=1, nodes=5, context=9, batch=1)
    axes = {"nodes": [3, 7], "batch": [2]}
    calls = []
    figures = bench_scaling(
        target, axes, base, 3, 3, num_rounds=4, use_packed_weights=False, advance=lambda: calls.append(0)
    )
    assert len(calls) == num_calls(axes, base, 4) == 3
    assert [one["value"] for one in figures["nodes"]] == [3, 7]
    assert {(1, 4), (1, 8), (2, 6)} <= set(verified)
    for one in [*figures["nodes"], *figures["batch"]]:
        assert one["round_ms"]
        assert one["step_ms"]
        low, high = one["round_quartiles"]
        assert low <= one["round_median"] <= high


def test_scaling_uses_every_module_of_a_deep_tree():
    """With eight draft steps a round runs all eight modules of the larger draft, and drafts full trees."""
    target = tiny_target("llama", seed=3)
    used = set()
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: used.add(module) if type(module).__name__ == "PrismProcessingModule" else None
    ):
        axes, base = {"modules": [1, 8]}, Point(modules=1, nodes=9, context=5, batch=1)
        figures = bench_scaling(target, axes, base, 2, 8, num_rounds=5, use_packed_weights=False)
    assert len(used) == 1 + 8
    assert all(len(one["round_ms"]) == 5 for one in figures["modules"])


def test_scaling_says_what_many_modules_cost():
    """Pairs of rounds: a machine that doubles every time for a while changes no ratio; the bar decides on the interval."""
    few = [100.0 * (1 + index % 2) for index in range(40)]
    axes = {"modules": [{"value": 1, "round_ms": few}, {"value": 8, "round_ms": [1.01 * one for one in few]}]}
    assert modules_ratio(axes["modules"]) == pytest.approx((1.01, 1.01, 1.01))
    text = "M = 8 over M = 1: median ratio of pairs 1.0100, 95 % interval 1.0100 to 1.0100; bar 1.03: met"
    assert modules_text(axes) == text
    axes["modules"][1]["round_ms"] = [1.04 * one for one in few]
    assert modules_text(axes).endswith("not met")
    axes["modules"][1]["round_ms"] = [(0.82 + 0.01 * index) * one for index, one in enumerate(few)]
    assert modules_text(axes).endswith("undecided")
    assert modules_text({"modules": axes["modules"][:1]}) is None
    assert modules_text({"nodes": axes["modules"]}) is None


def test_scaling_bootstrap_interval_covers_the_median():
    """Equal values leave no interval; noise opens one around the median, narrower with more values."""
    assert bootstrap_median([2.0] * 70) == (2.0, 2.0)
    noise = [1.0 + 0.01 * (index % 7 - 3) for index in range(70)]
    low, high = bootstrap_median(noise)
    assert low < 1.0 < high
    narrow = bootstrap_median(noise * 10)
    assert narrow[1] - narrow[0] < high - low


@pytest.mark.parametrize("tree", ["static", "auto"])
def test_rounds_every_part_takes_its_time_and_they_add_up(tree, cheap_rounds):
    """No part is forgotten, none is counted twice: what no part claims is a small positive rest."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target)
    draft.generation_config.update(tree=tree)
    input_ids, _ = prompts(1)
    items = [{"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}] * 2
    profile = profile_rounds(target, draft, items, num_rounds=30, max_new_tokens=20)
    assert profile["num_rounds"] >= 10
    assert set(profile["parts_ms"]) == set(PARTS)
    always = set(PARTS) - ({"walk"} if tree == "auto" else set())
    assert all(profile["parts_ms"][part] > 0 for part in always), profile["parts_ms"]
    assert sum(profile["parts_ms"].values()) == pytest.approx(profile["round_ms"])
    assert 0 < profile["rest_share"] < 1
    assert profile["acceptance_length"] >= 1


def test_rounds_are_watched_without_changing_the_text():
    """Output as without a stopwatch, which leaves nothing behind; tau is that of the call."""
    target = tiny_target("llama", seed=3)
    input_ids, _ = prompts(1)
    settings = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(input_ids, **settings)
    draft = scripted_draft(target, plain, prompt_length=input_ids.shape[1])
    with watched(target, draft) as watch:
        watched_output = target.generate(input_ids, **settings, assistant_model=draft, streamer=watch)
    assert torch.equal(plain, watched_output)
    assert len(watch.rounds) == draft.last_speculation.num_rounds[0] - 1
    num_rounds = len(watch.rounds)
    target.generate(input_ids, **settings, assistant_model=draft)
    assert len(watch.rounds) == num_rounds
    assert not target._forward_hooks
    assert "compute_logits" not in vars(draft)


class OperationsBesideForwards(TorchDispatchMode):
    """Counts the operations of torch that are part of no forward, at the end of each round."""

    def __init__(self, watch):
        super().__init__()
        self.watch, self.count, self.at_ends = watch, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not set(self.watch.running) & set(FORWARDS)
        return function(*args, **(kwargs or {}))

    def put_round(self, num_accepted):
        """As of a streamer."""
        self.at_ends.append(self.count)

    def put(self, value):
        """Nothing."""

    def end(self):
        """Nothing."""


@pytest.mark.parametrize(("tree", "most"), [("chain", 205), ("static", 205)])
def test_rounds_take_few_operations_beside_their_forwards(tree, most):
    """Each takes microseconds, of a few milliseconds that a round has."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target, draft_vocab_size=60)
    draft.generation_config.update(tree=tree, tree_top_k=3, tree_depth=4, tree_num_nodes=12)
    input_ids, _ = prompts(1)
    with watched(target, draft) as watch, OperationsBesideForwards(watch) as counting:
        target.generate(input_ids, max_new_tokens=30, do_sample=False, assistant_model=draft, streamer=counting)
    assert (counting.at_ends[-1] - counting.at_ends[0]) / (len(counting.at_ends) - 1) <= most


def test_rounds_count_the_weights_that_are_read():
    """The target without an input embedding of its own; of the draft one module and its rows of the head."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target, num_processing_modules=2)
    found = weight_bytes(target, draft)
    every = sum(weight.numel() for weight in target.parameters())
    assert found["target"] == 4 * (every - 97 * 32)
    module = sum(weight.numel() for weight in draft.processing_modules[0].parameters())
    assert found["draft_step"] == 4 * (module + 97 * 32)


def test_levers_follow_from_the_round():
    """What each part would bring, by hand."""
    summary = {
        "round_ms": {"draft": 20.0, "verify": 60.0, "rest": 20.0},
        "step_ms": 50.0,
        "acceptance_length_pooled": 3.0,
    }
    assert [ratio for _, ratio in levers(summary)] == pytest.approx([1.5, 150 / 90, 150 / 80, 150 / 80, 2.0])


def test_page_holds_the_files_figures_and_pictures(measured, tmp_path):
    """Tables of every kind, the commands, the machine, pictures that exist; the same files give the same bytes."""
    page = tmp_path / "performance.md"
    written = write_page(measured, page)
    text = page.read_text()
    for file in measured:
        record = json.loads(file.read_text())
        # A record of `bench modules` shows the command that took its place.
        moved = "python -m benchmarks.scaling --modules 1 --modules 8 --num-rounds 200"
        assert record["command"].replace("transformers-prism bench modules --packed", moved) in text
        assert record["hardware"] in text
    greedy = json.loads(measured[0].read_text())
    assert f"| {greedy['summary']['acceptance_length_pooled']:.2f} |" in text
    assert f"| {greedy['summary']['over']['plain']['ratio']:.2f} |" in text
    glance = text[text.index("## At a glance") : text.index("## Batches")]
    for line, file in zip(re.findall(r"^\| Greedy.*$", glance, re.M), measured[:2], strict=True):
        record = json.loads(file.read_text())
        one = record["summary"]
        assert f"| {one['num_prompts']} | {one['num_identical']} |" in line
        assert f"| `{record['weights_sha256'][:8]}` | {record['hardware']} | {record['date']} |" in line
        assert f"| {one['lowest_ratio']:.2f} to {one['highest_ratio']:.2f} |" in line
    rows = json.loads(measured[2].read_text())["rows"]
    assert "| tau | 5/2/3 T = 0 | 5/2/3 T = 0.8 | 2/2/1 T = 0 | 2/2/1 T = 0.8 |" in text
    assert f"| all | {' | '.join(format(row['tau'], '.2f') for row in rows)} |" in text
    members = json.loads(measured[4].read_text())["axes"]["modules"]
    assert f"M = 2 over M = 1: median ratio of pairs {modules_ratio(members)[0]:.4f}" in text
    assert "bench modules" not in text
    assert "```\n" + "transformers-prism" not in text  # blocks are labelled, so that their options are checked
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == [path.relative_to(tmp_path).as_posix() for path in written[1:]]
    assert "performance/batch_size_0.png" in pictures
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert all((tmp_path / name).stat().st_size < 120_000 for name in pictures)
    before = {path: path.read_bytes() for path in written}
    write_page(measured, page)
    assert {path: path.read_bytes() for path in written} == before


def test_page_begins_with_three_figures(measured, tmp_path):
    """Speed, acceptance and the price of modules, each with draft, machine and date; the surest of several for the last."""
    page = tmp_path / "performance.md"
    write_page(measured, page)
    lines = page.read_text().splitlines()[2:5]
    greedy, acceptance, modules = (json.loads(measured[place].read_text()) for place in (0, 2, 6))
    assert f"**{greedy['summary']['over']['plain']['ratio']:.2f}** times plain" in lines[0]
    assert f"**{acceptance['rows'][0]['tau']:.2f}** with 5/2/3" in lines[1]
    assert f"**{modules['median_ratio']:.3f}**" in lines[2]
    for line, record in zip(lines, (greedy, acceptance, modules), strict=True):
        assert line.endswith(f"{record['hardware']}, {record['date']}.")


def test_page_pictures_keep_drafts_and_machines_apart(measured, tmp_path):
    """Runs of another machine, or of another draft, or over other prompts, are no part of a comparison or a profile."""
    changes = ({"hardware": "another"}, {"weights_sha256": "0" * 64})
    batch, rounds = (json.loads(measured[place].read_text()) for place in (1, 3))
    fewer = {"settings": {**batch["settings"], "num_prompts": 1}}
    for number, change in enumerate((*changes, fewer)):
        other = tmp_path / f"batch{number}.json"
        other.write_text(json.dumps({**batch, **change}))
        write_page([measured[0], other], tmp_path / "page.md")
        assert "## Batches" not in (tmp_path / "page.md").read_text()
    (tmp_path / "rounds_elsewhere.json").write_text(json.dumps({**rounds, "hardware": "another"}))
    written = write_page([measured[3], tmp_path / "rounds_elsewhere.json"], tmp_path / "page.md")
    assert [path.name for path in written[1:]] == ["rounds_0.png", "rounds_1.png"]


def test_page_has_other_machines_in_a_section_of_their_own(measured, tmp_path):
    """Below all that was measured with the draft and on the machine of the first run."""
    page, other = tmp_path / "page.md", tmp_path / "other.json"
    other.write_text(json.dumps({**json.loads(measured[1].read_text()), "hardware": "another machine"}))
    write_page([other, *measured[:2]], page)
    here, elsewhere = page.read_text().split("## Other machines and earlier drafts")
    assert "another machine" in here[here.index("## At a glance") :]
    assert "another machine" not in elsewhere
    assert "\n### At a glance" in elsewhere
    write_page(measured[:2], page)
    assert "## Other machines" not in page.read_text()


def test_page_colours_belong_to_methods():
    """Whatever else is in a picture; unknown methods have one, too."""
    names = ["auto", "auto-no-ngrams", "chain", "static:10,6,59", "static:4,4,15", "lookup", "assisted", "compiled"]
    assert len({colour_of(name) for name in names}) == len(names)
    assert colour_of("static:2,2,2") == colour_of("static:2,2,2") != ""


def test_page_figures_are_in_the_files(measured, tmp_path):
    """Every number of a table is one of the files', at the precision in which it is printed."""
    page = tmp_path / "performance.md"
    write_page(measured, page)
    known: set[float] = set()

    def gather(content):
        if isinstance(content, dict):
            content = list(content.values())
        if isinstance(content, list):
            for value in content:
                gather(value)
        elif isinstance(content, (int, float)):
            known.add(float(content))

    for file in measured:
        record = json.loads(file.read_text())
        gather(record)
        # Figures that the page makes of two others.
        for members in record.get("axes", {}).values():
            gather([one["round_median"] / one["step_median"] for one in members])
            gather([len(one["round_ms"]) for one in members])
        gather([100 * one["rest_share"] for one in record.get("profiles", [])])
        seconds = record.get("seconds_by_steps", [])
        gather([one / seconds[0] for one in seconds] + list(range(1, len(seconds) + 1)))
        for method in record.get("methods", {}).values():
            if method["summary"]["round_ms"]:
                gather([ratio for _, ratio in levers(method["summary"])])
    cells = [
        cell.strip() for line in page.read_text().splitlines() if line.startswith("|") for cell in line.strip("|").split("|")
    ]
    numbers = [cell for cell in cells if re.fullmatch(r"\d+(\.\d+)?", cell)]
    assert len(numbers) > 60
    for number in numbers:
        digits = len(number.partition(".")[2])
        assert any(f"{value:.{digits}f}" == number for value in known), number


def test_page_refuses_other_files(tmp_path):
    """The kind that was found is named; so is a file that is no measurement."""
    (tmp_path / "verify.json").write_text('{"kind": "verify", "settings": {}}')
    with pytest.raises(ValueError, match="expected a measurement of kind generate.* got 'verify'"):
        write_page([tmp_path / "verify.json"], tmp_path / "page.md")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="expected the JSON file of a measurement"):
        write_page([tmp_path / "list.json"], tmp_path / "page.md")


def test_each_step_of_measuring_writes_its_own_file(tmp_path):
    """measure.sh with commands that only say what they were asked for."""
    source = Path(__file__).resolve().parent.parent / "docs" / "performance" / "measure.sh"
    script = tmp_path / "docs" / "performance" / "measure.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(source, script)
    (tmp_path / "hub_cards" / "SmolLM2-135M-Instruct-PRISM").mkdir(parents=True)
    (tmp_path / "prompts.jsonl").touch()
    asked, commands = tmp_path / "asked.txt", tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name in ("python", "transformers-prism", "git"):
        command = commands / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {asked}\n')
        command.chmod(0o755)
    steps = re.search(r"^steps=\(([^)]*)\)", script.read_text(), re.MULTILINE).group(1).split()
    for step in steps:
        asked.unlink(missing_ok=True)
        done = subprocess.run([script, tmp_path / "prompts.jsonl", step], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        *measured, page = [line for line in asked.read_text().splitlines() if not line.startswith("git")]
        assert page.startswith("python -m benchmarks.page")
        assert f"{step}.json" in measured[-1].split(), (step, measured)
        module = {"rivals": "rivals.run", "modules": "scaling"}.get(step, step)
        has_module = (source.parents[2] / "benchmarks" / Path(*module.split("."))).with_suffix(".py").is_file()
        expected = f"python -m benchmarks.{module} " if has_module else "transformers-prism bench "
        assert measured[-1].startswith(expected), (step, measured)
