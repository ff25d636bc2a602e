"""Recipes trained on equal terms, then measured: what a draft of each accepts, and how that grows with the data.

    python -m benchmarks.study --data conversations.jsonl.gz --prompts spec_bench.jsonl --output study-run --plan
    python -m benchmarks.study ... --records docs/study/rates --volumes 64000 --learning_rates 1e-3 2e-3 4e-3
    python -m benchmarks.study ... --records docs/study --rates_from docs/study/rates

Every run sees the same number of tokens, on features that are computed once. All other settings of `train` are equal, except
the learning rate, which is each recipe's best of a sweep. Each draft decodes the same prompts, and each way of decoding writes
one JSON file to the folder of records. Existing records are kept, and an interrupted run resumes from its last checkpoint.
The same command started twice shares the runs between two processes.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import typer
from filelock import FileLock, Timeout
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from benchmarks.known_texts import follow_texts, keep_texts, write_texts
from benchmarks.study_figures import GROWING, best_rates, is_sweep
from benchmarks.study_page import write_study_page
from benchmarks.study_plots import plot_recipes, plot_steps, plot_volumes
from transformers_prism.bench.acceptance import (
    TEMPERATURES,
    TREES,
    acceptance_figures,
    decode_prompts,
    packed_for_cpu,
    tree_settings,
)
from transformers_prism.bench.prompts import choose_prompts, read_prompts, task_of
from transformers_prism.bench.record import hardware
from transformers_prism.cli.demo import chat_inputs
from transformers_prism.cli.options import user_errors
from transformers_prism.command_line import command_line
from transformers_prism.configuration_prism import PrismConfig, default_target_layer_ids, num_target_layers
from transformers_prism.hub.files import TRAINING, weights_sha256
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import load_target
from transformers_prism.training.data.conversations import read_parts
from transformers_prism.training.recipes import BY_RECIPE, TrainConfig
from transformers_prism.training.train import train
from transformers_prism.whole_files import name_of_parts, write_json

_COMMAND = "python -m benchmarks.study"
_SECONDS_BETWEEN_LOOKS = 10.0  # at the runs of other processes
_LAST = {"target_layer_ids": "last"}
_PRISM = {"recipe": "prism", "num_modules": 2, "split_steps": 3}
# What is compared: settings of `train` beyond those that all runs share, as in the papers and their code. EAGLE-2 and HASS read
# only the target's last state, and so do the drafts with stacked layers, PRISM's own baseline. EAGLE-3 and PRISM fuse three.
# HASS and PRISM train 3 training-time-test steps, EAGLE-3 trains 7, with weights that fall by a fifth from step to step.
RECIPES: Mapping[str, dict] = MappingProxyType(
    {
        "eagle2": {"recipe": "eagle2", **_LAST},
        "hass": {"recipe": "hass", **_LAST},
        "eagle3": {"recipe": "eagle3", "warm_up_steps": 7, "step_weights": "1,0.8,0.64,0.512,0.4096,0.32768,0.262144"},
        "stacked2": {"recipe": "stacked", "num_layers_per_module": 2, **_LAST},
        "stacked3": {"recipe": "stacked", "num_layers_per_module": 3, **_LAST},
        "prism-m2": _PRISM,
        "prism-m3": {**_PRISM, "num_modules": 3},
        # Where a lead comes from: the fused states, or the modules. prism-m1 is trained like prism-m2, but with one module.
        "hass-fused": {"recipe": "hass"},
        "prism-m1": {**_PRISM, "num_modules": 1},
        "prism-m2-last": {**_PRISM, **_LAST},
        # Several modules from the first update on, without earlier stages that train a single module.
        "prism-m2-scratch": {**_PRISM, "single_step_epochs": 0.0, "warm_up_epochs": 0.0, "split_epochs": 4.0},
        # More steps in training, for the acceptance of late draft steps.
        "prism-m3-s5": {**_PRISM, "num_modules": 3, "split_steps": 5},
        "prism-m4-s5": {**_PRISM, "num_modules": 4, "split_steps": 5},
        # Ways to learn more from a token, or in less time.
        "prism-m2-vocab-sample": {**_PRISM, "vocab_sample": 0.25},
        "prism-m2-vocab-sample-0.1": {**_PRISM, "vocab_sample": 0.1},
    }
)
# Variants that a sweep may lack take the rate of the recipe that they vary.
_VARIANT_OF = {
    **dict.fromkeys(("prism-m3-s5", "prism-m4-s5"), "prism-m3"),
    **{f"prism-m2-{way}": "prism-m2" for way in ("vocab-sample", "vocab-sample-0.1")},
}
# The split stage's rate is this share of the other stages' rate, as in `train`; without other stages it is the full rate.
_SPLIT_SHARE = TrainConfig().split_learning_rate / TrainConfig().learning_rate
_STAGE_EPOCHS = ("single_step_epochs", "warm_up_epochs", "split_epochs")
# The study sets these for every run, so a user must not.
_OWN = (
    *("recipe", "seed", "num_conversations", "init_from", "target_layer_ids", "warm_up_steps", "split_steps", "step_weights"),
    *("learning_rate", "split_learning_rate", "vocab_sample"),
    *BY_RECIPE,
)


# Settings that change no weights, or hold folders.
_NOT_OF_TRAINING = (
    *("data", "validation_data", "output", "features", "target", "resume", "plan", "teraflops", "push_to_hub", "report_to"),
    *("use_cpu", "logging_updates", "save_updates", "online_features", "checkpoint_activations"),
)


@dataclass(frozen=True)
class StudyConfig:
    """What is compared and how drafts are measured; everything else is a setting of `train`, the same for all runs."""

    prompts: str = HfArg(default="", help="JSON lines in Spec-Bench's form: question_id, category, turns.")
    records: str = HfArg(
        default="docs/study", help="Folder for one JSON file per run, tree and temperature, and plots."
    )
    recipes: list[str] = HfArg(default_factory=lambda: list(RECIPES), help=f"Some of {', '.join(RECIPES)}.")
    seeds: list[int] = HfArg(
        default_factory=lambda: [0], help="Of weights and order; each recipe is trained with each."
    )
    volumes: list[int] = HfArg(
        default_factory=lambda: [0],
        help=f"Tokens of training data, the first of the file; 0 is all of them. Of several, {', '.join(GROWING)} are "
        "trained with each, the other recipes with the largest.",
    )
    learning_rates: list[float] = HfArg(
        default_factory=list,
        help="A sweep: each recipe is trained with each. The split stage's are a quarter of them. If left out, that of --rates_from "
        "or of `train`.",
    )
    rates_from: str = HfArg(
        default="",
        help="Folder of a sweep's records: each recipe is trained with its best rate. A variant that the sweep lacks takes that of "
        "the recipe that it varies.",
    )
    step_times: str = HfArg(
        default="", help="File of `python -m benchmarks.training --json`: losses are compared at equal seconds, too."
    )
    epochs: float = HfArg(default=4.0, help="Over each volume, all stages of a recipe together.")
    tokens_seen: int = HfArg(default=0, help="Tokens that every run sees, whatever its volume; 0: so many epochs.")
    num_prompts: int = HfArg(default=48, help="Prompts decoded, spread over the tasks.")
    max_new_tokens: int = HfArg(default=128, help="Tokens per answer.")
    trees: list[str] = HfArg(
        default_factory=lambda: list(TREES),
        help="Nodes/depth/top-k of the trees that drafts are measured with; top-k 1 is a chain.",
    )
    temperatures: list[float] = HfArg(
        default_factory=lambda: list(TEMPERATURES), help="Drafts are measured at; 0 is greedy."
    )
    sampling_seed: int = HfArg(default=0, help="Set before every answer, so that all drafts speed up the same text.")
    coupled: bool = HfArg(
        default=False,
        help="Let drafts see the random numbers of sampling; without, their first guesses alone are judged. With it the target "
        "decodes with each draft, else its texts are written once and drafts are led along them (known_texts.py).",
    )
    packed: bool = HfArg(default=True, help="Pack weights for the CPU first (prepare_for_cpu) to measure.")

    def __post_init__(self):
        for name in self.recipes:
            if name not in RECIPES:
                raise ValueError(f"recipes: expected some of {', '.join(RECIPES)}, got {name!r}")
        for tree in self.trees:
            tree_settings(tree)
        if self.learning_rates and self.rates_from:
            raise ValueError("learning_rates: expected none beside rates_from, got both")
        if any(rate <= 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: expected numbers above 0, got {self.learning_rates}")
        if self.epochs <= 0 or self.tokens_seen < 0:
            raise ValueError(f"epochs: expected more than 0, got {self.epochs} ({self.tokens_seen} tokens seen)")
        if any(temperature < 0 for temperature in self.temperatures):
            raise ValueError(f"temperatures: expected 0 or more, got {self.temperatures}")


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        recipe (`str`): of [`RECIPES`].
        seed (`int`): of its weights and order.
        num_conversations (`int`): of the training data, the first.
        num_data_tokens (`int`): in them.
        config (`TrainConfig`): how it is trained.
    """

    recipe: str
    seed: int
    num_conversations: int
    num_data_tokens: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """The name of its folder, with which the names of its records begin."""
        return f"{self.recipe}_{self.num_data_tokens}_rate{self.config.learning_rate:g}_seed{self.seed}"


def plan_runs(study: StudyConfig, base: TrainConfig, lengths: list[int], num_layers: int) -> list[Run]:
    """All runs, one seed after the other: [`GROWING`] with each volume of data, the others with the largest.

    Args:
        study (`StudyConfig`): what is compared.
        base (`TrainConfig`): settings that all runs share.
        lengths (`list[int]`): tokens of the training conversations, in order.
        num_layers (`int`): of the target.
    Raises:
        ValueError: if a volume is larger than the data, a shared setting is one that recipes differ in, or a sweep lacks a
            recipe.
    """
    default = TrainConfig()
    for name in _OWN:
        if getattr(base, name) != getattr(default, name):
            raise ValueError(f"{name}: expected no value, since the study sets it, got {getattr(base, name)!r}")
    if not base.output:
        raise ValueError("output: expected a folder, got none")
    runs = []
    counts = [_count_conversations(volume, lengths) for volume in study.volumes]
    rates = _rates(study)
    for seed, count, recipe in itertools.product(study.seeds, counts, study.recipes):
        if count < max(counts) and recipe not in GROWING:
            continue
        num_tokens = sum(lengths[:count])
        epochs = study.tokens_seen / num_tokens if study.tokens_seen else study.epochs
        for rate in rates[recipe]:
            shared = dataclasses.replace(base, learning_rate=rate, split_learning_rate=rate * _SPLIT_SHARE)
            run = Run(recipe, seed, count, num_tokens, shared)
            runs.append(dataclasses.replace(run, config=_train_config(run, epochs, num_layers)))
    return runs


def _rates(study: StudyConfig) -> dict[str, list[float]]:
    """Learning rates that each recipe is trained with."""
    if not study.rates_from:
        return {recipe: study.learning_rates or [TrainConfig().learning_rate] for recipe in study.recipes}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(study.rates_from).glob("*.json"))]
    best = best_rates(records)
    swept = {recipe: recipe if recipe in best else _VARIANT_OF.get(recipe, recipe) for recipe in study.recipes}
    missing = sorted({recipe for recipe in swept.values() if recipe not in best})
    if missing:
        raise ValueError(
            f"rates_from: expected records of a sweep of {', '.join(missing)} in {study.rates_from}, got none"
        )
    return {recipe: [best[swept[recipe]]] for recipe in study.recipes}


def _count_conversations(volume: int, lengths: list[int]) -> int:
    sums = list(itertools.accumulate(lengths))
    if not 0 <= volume <= sums[-1]:
        raise ValueError(f"volumes: expected 0 to the {sums[-1]} tokens of the training data, got {volume}")
    return next(count for count, tokens in enumerate(sums, start=1) if tokens >= (volume or sums[-1]))


def _train_config(run: Run, epochs: float, num_layers: int) -> TrainConfig:
    """The run's settings, with the epochs of the recipe's stages scaled to `epochs` in all."""
    settings = {**dataclasses.asdict(run.config), **dict.fromkeys(BY_RECIPE), **RECIPES[run.recipe]}
    reads_last_alone = settings["target_layer_ids"] == "last"
    if reads_last_alone:
        settings["target_layer_ids"] = str(num_layers)
    config = TrainConfig(**settings)
    if not (config.single_step_epochs or config.warm_up_epochs):
        config = dataclasses.replace(config, split_learning_rate=config.learning_rate)
    features = config.features or str(Path(config.output) / "features")
    total = sum(getattr(config, name) for name in _STAGE_EPOCHS)
    return dataclasses.replace(
        config,
        **{name: getattr(config, name) * epochs / total for name in _STAGE_EPOCHS},
        output=str(Path(config.output) / run.name),
        features=f"{features}-last" if reads_last_alone else features,
        num_conversations=run.num_conversations,
        seed=run.seed,
        resume=True,
    )


def run_study(
    study: StudyConfig,
    base: TrainConfig,
    report: Callable[[str], None],
    command: str = _COMMAND,
) -> list[dict]:
    """Train and measure whatever has no record yet. Then draw the plots and write the page from all records of the folder; if
    a recipe was trained with several learning rates, the page is a table of rates.

    Args:
        study (`StudyConfig`): what is compared.
        base (`TrainConfig`): settings that all runs share.
        report: called with a line per run and way of decoding.
        command (`str`): that the page names.
    Returns:
        `list[dict]`: the records in the folder, those of other commands that trained and measured alike, too.
    Raises:
        ValueError: for settings that cannot be used, or a record that was made with others.
    """
    prompts = choose_prompts(read_prompts(study.prompts), study.num_prompts)
    target, tokenizer = load_target(base.target, torch.float32)
    vocab_size = target.config.get_text_config().vocab_size
    training, _ = read_parts(base, vocab_size, tokenizer)
    num_layers = num_target_layers(target.config.get_text_config())
    runs = plan_runs(study, base, [len(one.input_ids) for one in training.chosen], num_layers)
    if base.plan:
        for run in runs:
            report(_describe(run))
        return []
    folder = Path(study.records)
    folder.mkdir(parents=True, exist_ok=True)
    questions = [(task_of(one), chat_inputs(tokenizer, one["turns"][0], target.device)) for one in prompts]
    ways = list(itertools.product(study.trees, study.temperatures))
    texts = functools.cache(lambda temperature: _texts(study, base, target, questions, temperature))

    def missing(run: Run) -> list[tuple[str, float]]:
        return [way for way in ways if _recorded(run, study, *way) is None]

    def measure(run: Run) -> None:
        report(_describe(run))
        trained = _trained(run)
        draft = _draft_to_measure(run, target, tokenizer)
        with packed_for_cpu(target, draft, study.packed):
            for way in missing(run):
                if study.coupled:
                    answers = decode_prompts(target, draft, questions, *way, study.max_new_tokens, study.sampling_seed)
                else:
                    answers = follow_texts(target, draft, texts(way[1]), way[0])
                record = {**trained, **_figures(run, study, *way, answers), "hardware": hardware(target.device)}
                write_json(_path(run, study, *way), record)
                report(
                    f"  tree {way[0]}, temperature {way[1]:g}: tau {record['tau']:.3f} in {record['num_rounds']} rounds"
                )

    _share_runs([run for run in runs if missing(run)], missing, measure, report)
    records = _records_alike(study, base)
    if not is_sweep(records):
        plot_recipes(records, folder / "tau_by_recipe.png")
        plot_volumes(records, folder / "tau_over_volume.png")
        plot_steps(records, folder / "acceptance_by_step.png")
    step_times = json.loads(Path(study.step_times).read_text(encoding="utf-8")) if study.step_times else {}
    write_study_page(records, folder, command, step_times.get("over_plain_loss"))
    return records


def _texts(study: StudyConfig, base: TrainConfig, target, questions: list[tuple[str, dict]], temperature: float) -> list:
    """What the target writes at a temperature, with the states that the drafts of all recipes read."""
    num_layers = num_target_layers(target.config.get_text_config())
    layer_ids = sorted({*default_target_layer_ids(num_layers), num_layers})
    how = (temperature, study.max_new_tokens, study.sampling_seed, layer_ids)
    prompts = name_of_parts([inputs["input_ids"].tolist() for _, inputs in questions])
    made_of = {"target": base.target, "prompts": prompts, "how": list(how)}
    path = Path(base.output) / f"texts_t{temperature:g}.pt"
    return keep_texts(path, made_of, lambda: write_texts(target, questions, *how))


def _share_runs(runs: list[Run], missing: Callable, measure: Callable[[Run], None], report: Callable[[str], None]) -> None:
    """Do all runs that no other process does, always the first free one next; report how long the rest may take."""
    begin, num_done, waiting = time.monotonic(), 0, list(runs)
    while waiting:
        num_before = num_done
        for run in waiting:
            try:
                with FileLock(_lock_path(run), timeout=0):
                    if missing(run):
                        measure(run)
                        num_done += 1
                break
            except Timeout:  # another process works on it
                continue
        else:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        waiting = [run for run in waiting if missing(run)]
        if waiting and num_done > num_before:
            minutes = (time.monotonic() - begin) / num_done * len(waiting) / 60
            report(f"{len(runs) - len(waiting)} of {len(runs)} runs, about {minutes:.0f} minutes of one process left")


def _lock_path(run: Run) -> str:
    Path(run.config.output).parent.mkdir(parents=True, exist_ok=True)
    return f"{run.config.output}.lock"


def _records_alike(study: StudyConfig, base: TrainConfig) -> list[dict]:
    """All records of the folder that were trained and measured alike, also those of other commands, in the page's order."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in Path(study.records).glob("*.json")]
    names = ("num_prompts", "max_new_tokens", "sampling_seed", "coupled", *(() if study.tokens_seen else ("epochs",)))
    alike = [record for record in records if all(record[name] == getattr(study, name) for name in names)]
    if not is_sweep(alike):  # which compares the rates of one recipe
        alike = [record for record in alike if record["compute_dtype"] == base.compute_dtype]
    order = ("recipe", "tree", "temperature", "num_data_tokens", "seed")
    return sorted(alike, key=lambda record: [record[name] for name in order])


def _describe(run: Run) -> str:
    stages = ", ".join(f"{name.removesuffix('_epochs')} {getattr(run.config, name):.3g}" for name in _STAGE_EPOCHS)
    epochs = sum(getattr(run.config, name) for name in _STAGE_EPOCHS)
    return (
        f"{run.name}: {run.num_conversations} conversations, {run.num_data_tokens} tokens, "
        f"{round(run.num_data_tokens * epochs)} seen; epochs: {stages}"
    )


def _trained(run: Run) -> dict:
    """Train a run, or resume it; returns the entries about training for its records."""
    draft = Path(run.config.output) / "draft"
    if not (draft / TRAINING).is_file() or not (draft / "config.json").is_file():
        train(run.config)
    record = json.loads((draft / TRAINING).read_text(encoding="utf-8"))
    # A setting that did not exist when the draft was trained had its default.
    settings = {**dataclasses.asdict(TrainConfig()), **record["config"]}
    for name, expected in dataclasses.asdict(run.config).items():
        if name not in _NOT_OF_TRAINING and (found := settings.get(name)) != expected:
            raise ValueError(f"{run.name}: expected a draft that was trained with {name}={expected!r}, got {found!r}; use another output")
    stages = record["stages"]
    return {
        "recipe": run.recipe,
        "seed": run.seed,
        "tokens_seen": sum(stage["tokens_seen"] for stage in stages),
        "train_seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "num_data_tokens": run.num_data_tokens,
        "learning_rate": run.config.learning_rate,
        "batch_size": run.config.batch_size,
        "draft_vocab_size": PrismConfig.from_pretrained(draft).draft_vocab_size,
        "aligned_steps": stages[-1]["stage"]["num_steps"],
        "checkpoint_sha256": weights_sha256(draft),
    }


def _draft_to_measure(run: Run, target, tokenizer) -> PrismDraftModel:
    draft = PrismDraftModel.from_pretrained(Path(run.config.output) / "draft", dtype=torch.float32)
    draft.to(target.device).eval().bind(target, tokenizer)
    return draft


def _figures(run: Run, study: StudyConfig, tree: str, temperature: float, answers: list[dict]) -> dict:
    return {**_measured_with(run, study, tree, temperature), **acceptance_figures(answers), "answers": answers}


def _measured_with(run: Run, study: StudyConfig, tree: str, temperature: float) -> dict:
    """What two records must share to be of the same measurement."""
    return {
        "tree": tree,
        "temperature": temperature,
        "num_prompts": study.num_prompts,
        "max_new_tokens": study.max_new_tokens,
        "sampling_seed": study.sampling_seed,
        "coupled": study.coupled,
        "epochs": round(sum(getattr(run.config, name) for name in _STAGE_EPOCHS), 4),
        "compute_dtype": run.config.compute_dtype,
    }


def _path(run: Run, study: StudyConfig, tree: str, temperature: float) -> Path:
    return Path(study.records) / f"{run.name}_tree{tree.replace('/', '-')}_t{temperature:g}.json"


def _recorded(run: Run, study: StudyConfig, tree: str, temperature: float) -> dict | None:
    """The record of a run and way of decoding, if it is there."""
    path = _path(run, study, tree, temperature)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in _measured_with(run, study, tree, temperature).items():
        if record.get(name) != expected:
            raise ValueError(f"{path.name}: expected a record with {name}={expected!r}, got {record.get(name)!r}")
    return record


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def main(context: typer.Context):
    """Train recipes on equal terms and measure their drafts; `--help` lists every setting with its unit."""
    parser = HfArgumentParser((StudyConfig, TrainConfig), prog=_COMMAND)
    with user_errors():
        study, base = parser.parse_args_into_dataclasses(context.args, look_for_args_file=False)
        run_study(study, base, typer.echo, command_line([_COMMAND, *context.args]))


__all__ = ["RECIPES", "Run", "StudyConfig", "app", "plan_runs", "run_study"]

if __name__ == "__main__":
    app()
