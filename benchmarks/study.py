"""Recipes trained on equal terms, then measured: what a draft of each accepts, and how that grows with the data.

    python -m benchmarks.study --data conversations.jsonl.gz --prompts spec_bench.jsonl --output study-run
    python -m benchmarks.study --data conversations.jsonl.gz --prompts spec_bench.jsonl --output study-run --plan

Every run sees the same number of tokens, with all other settings of `train` alike, on features that are computed once.
Each of its drafts decodes the same prompts, and each way of decoding leaves one JSON file in the folder of records. What
lies there is not done again; a run that was cut off goes on from its last checkpoint.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import typer
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from benchmarks.study_figures import GROWING
from benchmarks.study_page import write_study_page
from benchmarks.study_plots import plot_recipes, plot_volumes
from benchmarks.unmasked_softmax import unmasked_softmax
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
from transformers_prism.hub.files import TRAINING, weights_sha256
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import load_target
from transformers_prism.training.data.conversations import read_parts
from transformers_prism.training.recipes import BY_RECIPE, TrainConfig
from transformers_prism.training.train import train
from transformers_prism.whole_files import write_json

_COMMAND = "python -m benchmarks.study"
# What is compared: settings of `train` beyond those that all share.
RECIPES: Mapping[str, dict] = MappingProxyType(
    {
        "eagle2": {"recipe": "eagle2"},
        "hass": {"recipe": "hass"},
        "eagle3": {"recipe": "eagle3"},
        "stacked2": {"recipe": "stacked", "num_layers_per_module": 2},
        "prism-m2": {"recipe": "prism", "num_modules": 2},
        "prism-m3": {"recipe": "prism", "num_modules": 3},
        # As the authors train: no mask, and every module over keys and values of its own.
        "prism-m2-compat": {"recipe": "prism", "num_modules": 2, "context_kv": "own_module"},
        "prism-m2-acceptance": {"recipe": "prism", "num_modules": 2, "acceptance_weight": 0.1},
    }
)
_UNMASKED = ("prism-m2-compat",)
_STAGE_EPOCHS = ("single_step_epochs", "warm_up_epochs", "split_epochs")
# The study sets these for every run, so that nobody else may.
_OWN = (
    *("recipe", "seed", "num_conversations", "acceptance_weight", "context_kv", "init_from"),
    *BY_RECIPE,
)


@dataclass(frozen=True)
class StudyConfig:
    """What is compared and how drafts are measured; everything else is a setting of `train`, the same for all runs."""

    prompts: str = HfArg(default="", help="JSON lines in Spec-Bench's form: question_id, category, turns.")
    records: str = HfArg(default="docs/study", help="Folder for one JSON file per run, tree and temperature, and plots.")
    recipes: list[str] = HfArg(default_factory=lambda: list(RECIPES), help=f"Some of {', '.join(RECIPES)}.")
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Of weights and order; each recipe is trained with each.")
    volumes: list[int] = HfArg(
        default_factory=lambda: [0],
        help=f"Tokens of training data, the first of the file; 0 is all of them. Of several, {', '.join(GROWING)} are "
        "trained with each, the other recipes with the largest.",
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
        default=True, help="Let drafts see the random numbers of sampling; without, their first guesses alone are judged."
    )
    packed: bool = HfArg(default=True, help="Pack weights for the CPU first (prepare_for_cpu) to measure.")

    def __post_init__(self):
        for name in self.recipes:
            if name not in RECIPES:
                raise ValueError(f"recipes: expected some of {', '.join(RECIPES)}, got {name!r}")
        for tree in self.trees:
            tree_settings(tree)
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
        """Of its folder, and what its records' names begin with."""
        return f"{self.recipe}_{self.num_data_tokens}_seed{self.seed}"


def plan_runs(study: StudyConfig, base: TrainConfig, lengths: list[int]) -> list[Run]:
    """All runs, one seed after the other: [`GROWING`] with each volume of data, the others with the largest.

    Args:
        study (`StudyConfig`): what is compared.
        base (`TrainConfig`): settings that all runs share.
        lengths (`list[int]`): tokens of the training conversations, in order.
    Raises:
        ValueError: if a volume is larger than the data, or a shared setting is one that recipes differ in.
    """
    default = TrainConfig()
    for name in _OWN:
        if getattr(base, name) != getattr(default, name):
            raise ValueError(f"{name}: expected no value, since the study sets it, got {getattr(base, name)!r}")
    if not base.output:
        raise ValueError("output: expected a folder, got none")
    runs = []
    counts = [_count_conversations(volume, lengths) for volume in study.volumes]
    for seed, count, recipe in itertools.product(study.seeds, counts, study.recipes):
        if count < max(counts) and recipe not in GROWING:
            continue
        num_tokens = sum(lengths[:count])
        epochs = study.tokens_seen / num_tokens if study.tokens_seen else study.epochs
        run = Run(recipe, seed, count, num_tokens, base)
        runs.append(dataclasses.replace(run, config=_train_config(run, epochs)))
    return runs


def _count_conversations(volume: int, lengths: list[int]) -> int:
    sums = list(itertools.accumulate(lengths))
    if not 0 <= volume <= sums[-1]:
        raise ValueError(f"volumes: expected 0 to the {sums[-1]} tokens of the training data, got {volume}")
    return next(count for count, tokens in enumerate(sums, start=1) if tokens >= (volume or sums[-1]))


def _train_config(run: Run, epochs: float) -> TrainConfig:
    """The run's settings, with the epochs of the recipe's stages scaled to `epochs` in all."""
    settings = {**dataclasses.asdict(run.config), **dict.fromkeys(BY_RECIPE), **RECIPES[run.recipe]}
    config = TrainConfig(**settings)
    total = sum(getattr(config, name) for name in _STAGE_EPOCHS)
    return dataclasses.replace(
        config,
        **{name: getattr(config, name) * epochs / total for name in _STAGE_EPOCHS},
        output=str(Path(config.output) / run.name),
        features=config.features or str(Path(config.output) / "features"),
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
    """Train and measure whatever has no record yet; draw the plots and write the page from all records of the folder.

    Args:
        study (`StudyConfig`): what is compared.
        base (`TrainConfig`): settings that all runs share.
        report: called with a line per run and way of decoding.
        command (`str`): that the page names.
    Returns:
        `list[dict]`: the records in the folder, those of other commands that decoded alike, too.
    Raises:
        ValueError: for settings that cannot be used, or a record that was made with others.
    """
    prompts = choose_prompts(read_prompts(study.prompts), study.num_prompts)
    target, tokenizer = load_target(base.target, torch.float32)
    vocab_size = target.config.get_text_config().vocab_size
    training, _ = read_parts(base, vocab_size, tokenizer)
    runs = plan_runs(study, base, [len(one.input_ids) for one in training.chosen])
    if base.plan:
        for run in runs:
            report(_describe(run))
        return []
    folder = Path(study.records)
    folder.mkdir(parents=True, exist_ok=True)
    questions = [(task_of(one), chat_inputs(tokenizer, one["turns"][0], target.device)) for one in prompts]
    for run in runs:
        ways = itertools.product(study.trees, study.temperatures)
        missing = [way for way in ways if _recorded(run, study, *way) is None]
        if not missing:
            continue
        report(_describe(run))
        trained = _trained(run)
        draft = _draft_to_measure(run, target, tokenizer)
        with packed_for_cpu(target, draft, study.packed):
            for way in missing:
                answers = decode_prompts(
                    target, draft, questions, *way, study.max_new_tokens, study.sampling_seed, study.coupled
                )
                record = {**trained, **_figures(run, study, *way, answers), "hardware": hardware(target.device)}
                write_json(_path(run, study, *way), record)
                report(f"  tree {way[0]}, temperature {way[1]:g}: tau {record['tau']:.3f} in {record['num_rounds']} rounds")
    records = _records_alike(study)
    plot_recipes(records, folder / "tau_by_recipe.png")
    plot_volumes(records, folder / "tau_over_volume.png")
    write_study_page(records, folder, command)
    return records


def _records_alike(study: StudyConfig) -> list[dict]:
    """All records of the folder that were decoded alike, those of other commands, too, in the page's order."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in Path(study.records).glob("*.json")]
    names = ("num_prompts", "max_new_tokens", "sampling_seed", "coupled")
    alike = [record for record in records if all(record[name] == getattr(study, name) for name in names)]
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
    """Train a run, or go on with it; what its records say of the training."""
    draft = Path(run.config.output) / "draft"
    if not (draft / TRAINING).is_file() or not (draft / "config.json").is_file():
        with unmasked_softmax() if run.recipe in _UNMASKED else contextlib.nullcontext():
            train(run.config)
    stages = json.loads((draft / TRAINING).read_text(encoding="utf-8"))["stages"]
    return {
        "recipe": run.recipe,
        "seed": run.seed,
        "tokens_seen": sum(stage["tokens_seen"] for stage in stages),
        "train_seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "num_data_tokens": run.num_data_tokens,
        "checkpoint_sha256": weights_sha256(draft),
    }


def _draft_to_measure(run: Run, target, tokenizer) -> PrismDraftModel:
    # The authors decode over the keys and values of step 0's module, whatever they trained with.
    draft = PrismDraftModel.from_pretrained(
        Path(run.config.output) / "draft", dtype=torch.float32, context_kv="prefill_module"
    )
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
