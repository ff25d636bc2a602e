"""The commands that make a draft: `make-draft`, and step by step `synthesize`, `data` and `train`."""

import dataclasses
import functools
import inspect
import json
import logging
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import typer

from transformers_prism.cli.options import ADVANCED, BASIC, COST, Commands, PackedOption, SeedOption, TargetOption
from transformers_prism.training.recipes import TrainConfig

# Options of `train` outside the advanced group.
_BASIC = (
    "data output recipe target init_from validation_data num_modules draft_vocab_size text_tokens single_step_epochs "
    "warm_up_epochs split_epochs plan resume push_to_hub"
).split()
_COST = (
    "teraflops features online_features num_conversations max_length batch_size accumulation compute_dtype "
    "checkpoint_activations use_cpu fsdp save_updates validation_updates num_validation num_acceptance_prompts patience"
).split()
_SplitOption = Annotated[
    str, typer.Option(help="Of a data set on the Hub, or of a folder with files for each split.", rich_help_panel=ADVANCED)
]
_BadShareOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Share of the rows that may be unusable; they are left out with a warning.", rich_help_panel=ADVANCED
    ),
]
_MaxLengthOption = Annotated[
    int, typer.Option(min=3, help="Tokens that `train` keeps of a conversation, as with its --max-length.", rich_help_panel=ADVANCED)
]
# Help for the negative form of a flag.
_NEGATIVE = {
    "text_tokens": "propose tokens of the draft vocabulary only",
    "is_detached": "let gradients pass through all forwards",
}


def add_to(app: Commands) -> None:
    """Add the commands to the command line."""
    data_app = Commands(help="Look at what training would learn from.")
    data_app.command("check")(data_check)
    data_app.command("preview")(data_preview)
    app.command("make-draft")(make_draft)
    app.command("synthesize")(synthesize)
    app.add_typer(data_app, name="data")
    app.command("train")(_with_options_of_config(train))


def make_draft(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The target: Hub id, folder or .gguf file.")],
    output: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder for the finished draft; OUTPUT.work next to it holds intermediate files."),
    ],
    minutes: Annotated[float, typer.Option(min=0.01, help="Time to take, as closely as steps allow.", rich_help_panel=COST)] = 30,
    form: Annotated[
        Literal["chat", "text"],
        typer.Option("--format", help="What the draft learns: chats, or for base models continuations of the target's own text."),
    ] = "chat",
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File with a chat template, for a tokenizer without one.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to answer, as for `synthesize`; the target writes its own if absent.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=8, help="Tokens per answer of the measurement.", rich_help_panel=ADVANCED)
    ] = 64,
):
    """Make a draft for a model: check, synthesize, train and measure. The same command resumes an interrupted run."""
    from rich.console import Console

    from transformers_prism.cli.make_draft import run_make_draft

    if form == "text" and chat_template is not None:
        raise ValueError("chat_template: expected none with --format text, which has no turns, got one")

    settings = {
        "model": model,
        "minutes": minutes,
        "format": form,
        "chat_template": None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        "max_new_tokens": max_new_tokens,
        "prompts": prompts and str(prompts),
    }
    run_make_draft(output, settings, ["transformers-prism", "make-draft", *context.meta["words"]], Console())


def synthesize(
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of Parquet shards; a run that was interrupted there is resumed.")
    ],
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to keep.")] = 1_000_000,
    target: TargetOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Chats or prompts: a file, a folder, or a data set on the Hub (docs/data-formats.md); the target writes user "
            "turns if absent."
        ),
    ] = None,
    split: _SplitOption = "train",
    max_bad_share: _BadShareOption = 0.5,
    exclude: Annotated[
        Path | None,
        typer.Option(help="Benchmark prompts, in any shape that --prompts takes; conversations that share 13 tokens in a row with them are left out."),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of answers, 0 is greedy; each conversation draws one of those given, or of 0, 0, 0, 0.6, 0.7 and 0.8.")
    ] = None,
    topic: Annotated[
        list[str] | None, typer.Option(help="code, math, writing, translation, reading: some user turns begin like one.")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="System prompts; each conversation draws one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations decoded at once.", rich_help_panel=COST)] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the target's weights.", rich_help_panel=COST)
    ] = "float32",
    packed: PackedOption = True,
    max_user_tokens: Annotated[
        int, typer.Option(min=1, help="A longer user turn that the target writes drops the conversation.", rich_help_panel=COST)
    ] = 160,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="A longer answer is cut there.", rich_help_panel=COST)] = 300,
    max_turns: Annotated[int, typer.Option(min=1, help="User turns of a conversation at most.", rich_help_panel=COST)] = 2,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a conversation at most.", rich_help_panel=COST)] = 1024,
    topic_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of conversations with a --topic.", rich_help_panel=ADVANCED)
    ] = 0.3,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens that sampling chooses from.", rich_help_panel=ADVANCED)] = 100,
    seed: SeedOption = 0,
):
    """Let the target write conversations: training data for its draft. Processes that `torchrun` starts share the work."""
    from transformers_prism.training.data.synthesis import SynthesisConfig

    lists: dict[str, list | None] = {"temperatures": temperature, "topics": topic, "system_prompts": system}
    config = SynthesisConfig(
        num_tokens,
        batch_size=batch_size,
        top_k=top_k,
        max_user_tokens=max_user_tokens,
        max_answer_tokens=max_answer_tokens,
        max_turns=max_turns,
        topic_share=topic_share,
        max_length=max_length,
        seed=seed,
        **{name: tuple(value) for name, value in lists.items() if value},  # type: ignore[arg-type]
    )
    read_settings = {"max_bad_share": max_bad_share, "split": split}
    typer.echo(json.dumps(_synthesize(config, output, target, dtype, packed, prompts, exclude, read_settings)))


def _synthesize(config, output: Path, target, dtype: str, packed: bool, prompts, exclude, read_settings) -> dict:
    """Run a synthesis and return its counts; if there are prompts, they are read with `read_settings`."""
    import torch
    from accelerate import PartialState

    from transformers_prism.cpu import prepare_for_cpu
    from transformers_prism.target import load_target
    from transformers_prism.training.data.conversations import Contamination
    from transformers_prism.training.data.formats import read_chats
    from transformers_prism.training.data.synthesis import synthesize as run
    from transformers_prism.training.progress_bar import ProgressBar

    chats = None if prompts is None else read_chats(prompts, **read_settings)
    # Without an accelerator, accelerate finds other processes only if it is told to use the CPU.
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, tokenizer = load_target(target, getattr(torch, dtype))
    model.to(state.device)
    if packed:
        prepare_for_cpu(model)
    contamination = None
    if exclude is not None:
        turns = (turn for chat in read_chats(exclude, **read_settings) for turn in chat)
        contamination = Contamination(tokenizer, (turn["content"] for turn in turns if turn["role"] == "user"))
    part = (state.process_index, state.num_processes)
    with ProgressBar("synthesis", config.num_tokens, "tokens") as bar:
        told = functools.partial(_tell, bar)
        return run(model, tokenizer, config, output, chats, contamination, part, told)


def _tell(bar, counts: dict) -> None:
    if not bar.completed:
        bar.first = counts["before"]  # an earlier run's work does not count for this run's speed
    bar.update(min(counts["written"], counts["goal"]), counts["goal"])


def data_check(
    data: Annotated[str, typer.Argument(help="A file, a folder, or a data set on the Hub.")],
    target: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file whose template renders the chats, too.", show_default=False)
    ] = None,
    split: _SplitOption = "train",
    max_bad_share: _BadShareOption = 0.5,
    max_length: _MaxLengthOption = 2048,
):
    """Count what a file holds, in which shapes, and which rows cannot be used and why.

    Exits with 1 if more rows than --max-bad-share cannot be used.
    """
    from transformers_prism.target import config_and_tokenizer
    from transformers_prism.training.data.conversations import check_data

    found = None
    if target is not None:
        config, tokenizer = config_and_tokenizer(target)
        found = config.get_text_config().vocab_size, tokenizer
    counts, lines = check_data(data, found, split, max_length)
    typer.echo("\n".join(lines))
    raise typer.Exit(counts.num_bad > max_bad_share * counts.num_rows)


def data_preview(
    data: Annotated[str, typer.Option(help="As for `train`: files, folders, or data sets on the Hub, separated by commas.")],
    target: TargetOption = None,
    count: Annotated[int, typer.Option(min=1, help="Conversations shown.")] = 3,
    max_bad_share: _BadShareOption = 0.5,
    max_length: _MaxLengthOption = 2048,
):
    """Show conversations with the tokens that training learns from in colour, and how many there are."""
    from rich.console import Console

    from transformers_prism.target import config_and_tokenizer
    from transformers_prism.training.data.conversations import describe, preview, read_conversations

    config, tokenizer = config_and_tokenizer(target)
    vocab_size = config.get_text_config().vocab_size
    conversations = read_conversations(data.split(","), vocab_size, max_length, tokenizer, max_bad_share)
    console = Console()
    for conversation in conversations[:count]:
        console.print(preview(conversation, tokenizer), soft_wrap=True)
        console.rule()
    typer.echo(json.dumps(describe(conversations)))


def train(context: typer.Context, **settings):
    """Train a draft on conversations of its target; --plan says beforehand what it would cost."""
    from transformers_prism.training.plan import describe_plan
    from transformers_prism.training.train import train as run

    config = TrainConfig(**settings)
    if config.plan:
        typer.echo(describe_plan(config))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    run(config, ["transformers-prism", "train", *context.meta["words"]])


def _with_options_of_config(command):
    """Give a command one option for each field of [`TrainConfig`]."""
    hints = get_type_hints(TrainConfig)
    options = [_option(field, hints[field.name]) for field in dataclasses.fields(TrainConfig)]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__signature__ = inspect.Signature([context, *options])
    command.__annotations__ = {one.name: one.annotation for one in (context, *options)}
    return command


def _option(field: dataclasses.Field, kind) -> inspect.Parameter:
    """The option for a field: its help and default are the field's."""
    name, text = field.name.replace("_", "-"), field.metadata["help"]
    panel = BASIC if field.name in _BASIC else COST if field.name in _COST else ADVANCED
    words = [f"--{name}"]
    if field.name in _NEGATIVE:
        words, text = [f"--{name}/--no-{name}"], f"{text} --no-{name}: {_NEGATIVE[field.name]}."
    is_shown = field.default not in (None, "", False)
    default = ... if field.name in ("data", "output") else field.default
    option = typer.Option(*words, help=text, rich_help_panel=panel, show_default=is_shown)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
