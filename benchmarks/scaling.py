"""How long a round takes as modules M, nodes of the tree, context and batch grow, each compared with a plain step.

    python -m benchmarks.scaling --json scaling.json
    python -m benchmarks.scaling --modules 1 --modules 8 --num-rounds 200

Random drafts, random prompts: what is proposed does not matter, since every round drafts and verifies trees of one size.
The second command is the check of PRISM's claim that a round with many modules takes no longer than one with a single one.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers.generation import BaseStreamer
from transformers.utils import logging

from transformers_prism.bench.figures import table_of
from transformers_prism.bench.generate import TokenClock
from transformers_prism.bench.methods import random_draft
from transformers_prism.bench.record import write_record
from transformers_prism.cli.options import JsonOption, PackedOption, TargetOption, report_file, user_errors
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.target import load_target
from transformers_prism.training.progress_bar import ProgressBar

# Rounds of one generate() call; the first, which reads the prompt, is not timed.
_ROUNDS_PER_CALL = 6
# PRISM claims that more modules cost nothing; more than 3 % over one module would contradict that.
MAX_RATIO = 1.03
DEFAULT_AXES = {
    "modules": [1, 2, 4, 8],
    "nodes": [3, 7, 15, 31, 63],
    "context": [128, 512, 1024, 2048],
    "batch": [1, 2, 4, 8],
}


@dataclass(frozen=True)
class Point:
    """Sizes of a round: modules M, drafted nodes, tokens of the prompt, sequences."""

    modules: int
    nodes: int
    context: int
    batch: int


@dataclass
class Timing:
    """Milliseconds of single rounds, and of plain steps on the same prompt."""

    round_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def as_json(self) -> dict:
        """Both with their medians and quartiles."""
        return {**asdict(self), **_spread("round", self.round_ms), **_spread("step", self.step_ms)}


def _spread(name: str, values: list[float]) -> dict:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {f"{name}_median": middle, f"{name}_quartiles": [low, high]}


class RoundTimes(BaseStreamer):
    """Notes when rounds end."""

    def __init__(self):
        self.ends: list[float] = []

    def put_round(self, num_accepted: int) -> None:
        """Called at the end of each round."""
        self.ends.append(time.perf_counter())

    def put(self, value) -> None:
        """Tokens are not looked at."""

    def end(self) -> None:
        """Nothing to close."""


def bench_scaling(
    target,
    axes: dict[str, list[int]],
    base: Point,
    tree_top_k: int,
    tree_depth: int,
    num_rounds: int = 60,
    use_packed_weights: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> dict:
    """Time rounds along each axis, all points in turn.

    Args:
        target: the model whose sizes count.
        axes: by a name of [`Point`]'s fields, the values to go through; the others stay at `base`.
        base: sizes that do not vary.
        tree_top_k, tree_depth: of every tree.
        num_rounds: timed rounds of each point at least.
        use_packed_weights: prepare the models with [`prepare_for_cpu`], for plain steps too.
        advance: called after every generate() call with a draft, as often as [`num_calls`] says.
    Returns:
        `dict`: by axis, a list of its values with their timings.
    """
    points = {axis: [replace(base, **{axis: value}) for value in values] for axis, values in axes.items()}
    every = list(dict.fromkeys(point for members in points.values() for point in members))
    tree = {"tree_top_k": tree_top_k, "tree_depth": tree_depth}
    drafts = {
        modules: random_draft(target, modules, {**tree, "tree_num_nodes": base.nodes})
        for modules in sorted({point.modules for point in every})
    }
    prepared = prepare_for_cpu(target, *drafts.values()) if use_packed_weights else None
    timings = {point: Timing() for point in every}
    try:
        for point in every:
            _time_rounds(target, drafts[point.modules], point, tree_depth)
        for repetition in range(-(-num_rounds // (_ROUNDS_PER_CALL - 1))):
            # Later points find warmer caches, so the order is reversed every second time.
            for point in every[:: -1 if repetition % 2 else 1]:
                timings[point].round_ms += _time_rounds(target, drafts[point.modules], point, tree_depth)
                timings[point].step_ms += _time_steps(target, point)
                advance()
    finally:
        if prepared is not None:
            prepared.undo()
    return {
        axis: [{"value": getattr(point, axis), **timings[point].as_json()} for point in members]
        for axis, members in points.items()
    }


def num_calls(axes: dict[str, list[int]], base: Point, num_rounds: int) -> int:
    """Timed generate() calls with a draft, for a bar."""
    every = {replace(base, **{axis: value}) for axis, values in axes.items() for value in values}
    return len(every) * -(-num_rounds // (_ROUNDS_PER_CALL - 1))


def _prompt(target, point: Point) -> dict:
    generator = torch.Generator().manual_seed(0)
    shape = (point.batch, point.context)
    input_ids = torch.randint(0, target.config.get_text_config().vocab_size, shape, generator=generator)
    input_ids = input_ids.to(target.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "do_sample": False}


def _time_rounds(target, draft, point: Point, tree_depth: int) -> list[float]:
    """Milliseconds of rounds after the first, as long as trees were of full size."""
    draft.generation_config.update(tree_num_nodes=point.nodes)
    times = RoundTimes()
    # A round may commit more than one token by chance, and near its end the tree is cut short.
    length = _ROUNDS_PER_CALL + tree_depth + 1
    target.generate(
        **_prompt(target, point), assistant_model=draft, streamer=times, max_new_tokens=length, min_new_tokens=length
    )
    trees = draft.last_speculation.trees
    pairs = zip(times.ends, times.ends[1:], trees[1:], strict=False)
    full = [
        1000.0 * (end - start)
        for start, end, tree in pairs
        if tree.num_nodes == point.nodes and tree.num_steps == tree_depth
    ]
    return full[: _ROUNDS_PER_CALL - 1]


def _time_steps(target, point: Point) -> list[float]:
    """Milliseconds of plain steps after the first token."""
    clock = TokenClock()
    length = _ROUNDS_PER_CALL
    target.generate(**_prompt(target, point), streamer=clock, max_new_tokens=length, min_new_tokens=length)
    times = clock.times[1:]
    return [1000.0 * (end - start) for start, end in zip(times, times[1:], strict=False)]


def axis_rows(axes: dict) -> tuple[list[str], list[list[str]]]:
    """A heading and a row per value of every axis, as text."""
    heading = ["axis", "value", "rounds", "round ms\n(median)", "quartiles", "step ms\n(median)", "round over\nstep"]
    rows = []
    for axis, members in axes.items():
        for one in members:
            low, high = one["round_quartiles"]
            rows.append(
                [
                    axis,
                    str(one["value"]),
                    str(len(one["round_ms"])),
                    f"{one['round_median']:.1f}",
                    f"{low:.1f} to {high:.1f}",
                    f"{one['step_median']:.1f}",
                    f"{one['round_median'] / one['step_median']:.2f}",
                ]
            )
    return heading, rows


def modules_ratio(members: list[dict]) -> tuple[float, float, float]:
    """What the last number of modules costs over the first: median ratio of pairs of rounds, and its 95 % interval.

    Args:
        members (`list[dict]`): of [`bench_scaling`]'s axis "modules". Rounds at the same place in two lists were timed
            soon after each other, so a machine that slows down for a while slows both.
    """
    pairs = zip(members[0]["round_ms"], members[-1]["round_ms"], strict=False)
    ratios = [many / few for few, many in pairs]
    return statistics.median(ratios), *bootstrap_median(ratios)


def modules_text(axes: dict) -> str | None:
    """[`modules_ratio`] in words, and whether its interval is within `MAX_RATIO`; None without two numbers of modules."""
    members = axes.get("modules", [])
    if len(members) < 2:
        return None
    ratio, low, high = modules_ratio(members)
    found = "met" if high <= MAX_RATIO else "not met" if low > MAX_RATIO else "undecided"
    return (
        f"M = {members[-1]['value']} over M = {members[0]['value']}: median ratio of pairs {ratio:.4f}, 95 % interval "
        f"{low:.4f} to {high:.4f}; bar {MAX_RATIO}: {found}"
    )


def bootstrap_median(values: list[float], num_resamples: int = 5000, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a median.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    sample = torch.tensor(values, dtype=torch.float64)  # [n]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(values), (num_resamples, len(values)), generator=generator)
    medians = sample[drawn].quantile(0.5, dim=-1)  # [num_resamples]
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = medians.quantile(tails).tolist()
    return low, high


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: TargetOption = None,
    modules: Annotated[list[int] | None, typer.Option(min=1, help="M; several. 1, 2, 4, 8 if no axis is named.")] = None,
    nodes: Annotated[list[int] | None, typer.Option(min=1, help="Drafted nodes; several. 3 to 63.")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of the prompt; several. 128 to 2048.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Sequences; several. 1, 2, 4, 8.")] = None,
    tree_top_k: Annotated[int, typer.Option(min=1, help="Nodes kept per depth, and children per node.")] = 10,
    tree_depth: Annotated[int, typer.Option(min=1, help="Draft steps of every tree.")] = 8,
    num_rounds: Annotated[int, typer.Option(min=5, help="Timed rounds of each point.")] = 60,
    packed: PackedOption = True,
    json_file: JsonOption = None,
):
    """Latency of a round against modules M, nodes of the tree, context and batch, each compared with a plain step.

    Where an axis is named, only those that are named are measured. Of several M, the last is compared with the first.
    """
    logging.disable_progress_bar()
    console = Console()
    named = {"modules": modules, "nodes": nodes, "context": context, "batch": batch}
    axes = {name: values for name, values in named.items() if values} or DEFAULT_AXES
    base = Point(modules=4, nodes=31, context=128, batch=1)
    with user_errors():
        model, _ = load_target(target)
        with ProgressBar("calls", num_calls(axes, base, num_rounds), console=console) as bar:
            figures = bench_scaling(model, axes, base, tree_top_k, tree_depth, num_rounds, packed, bar.advance)
    console.print(table_of(*axis_rows(figures), "random drafts"), crop=False)
    if (text := modules_text(figures)) is not None:
        console.print(text, highlight=False)
    tree = {"tree_top_k": tree_top_k, "tree_depth": tree_depth}
    settings = {"base": asdict(base), "num_rounds": num_rounds, "packed": packed, **tree}
    write_record(json_file, "scaling", model, settings, {"axes": figures})
    report_file(json_file)


if __name__ == "__main__":
    app()
