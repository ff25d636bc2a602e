"""The commands that make a draft: `synthesize`, `data`, `train` and `make-draft`."""

import dataclasses
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
    *(
        "data",
        "output",
        "recipe",
        "target",
        "init_from",
        "validation_data",
        "num_modules",
        "draft_vocab_size",
        "text_tokens",
    ),
    *("single_step_epochs", "warm_up_epochs", "split_epochs", "plan", "resume", "push_to_hub"),
)
_COST = (
    *("teraflops", "features", "online_features", "num_conversations", "max_length", "batch_size", "accumulation"),
    *("compute_dtype", "checkpoint_activations", "use_cpu", "fsdp", "save_updates", "validation_updates"),
    *("num_validation", "num_acceptance_prompts", "patience"),
)
# What the other half of a flag does.
_NEGATIVE = {
    "text_tokens": "propose tokens of the draft vocabulary only",
    "is_detached": "let gradients pass through all forwards",
}


def add_to(app: Commands) -> None:
    """Add the commands to the command line."""
    data_app = Commands(help="Look at what training would learn from.")
    data_app.command("preview")(data_preview)
    app.command("synthesize")(synthesize)
    app.add_typer(data_app, name="data")
    app.command("train")(_with_options_of_config(train))


def synthesize(
    output: Annotated[
        Path, typer.Option(help="Folder of Parquet shards; a run that was interrupted there is resumed.")
    ],
    num_tokens: Annotated[int, typer.Option(min=1, help="Tokens to keep.")] = 1_000_000,
    target: TargetOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="JSON lines of chats, or a data set on the Hub; the target writes user turns if absent."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set on the Hub.", rich_help_panel=ADVANCED)] = "train",
    exclude: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of benchmark prompts; conversations that share 13 tokens in a row with them are left out."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of answers, 0 is greedy; each conversation draws one of those given.")
    ] = None,
    topic: Annotated[
        list[str] | None,
        typer.Option(help="code, math, writing, translation, reading: some user turns begin like one."),
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="System prompts; each conversation draws one.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations decoded at once.", rich_help_panel=COST)] = 64,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the target's weights.", rich_help_panel=COST)
    ] = "float32",
    packed: PackedOption = True,
    max_user_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="A longer user turn that the target writes drops the conversation.", rich_help_panel=COST
        ),
    ] = 160,
    max_answer_tokens: Annotated[
        int, typer.Option(min=1, help="A longer answer is cut there.", rich_help_panel=COST)
    ] = 300,
    max_turns: Annotated[
        int, typer.Option(min=1, help="User turns of a conversation at most.", rich_help_panel=COST)
    ] = 2,
    max_length: Annotated[
        int, typer.Option(min=8, help="Tokens of a conversation at most.", rich_help_panel=COST)
    ] = 1024,
    topic_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of conversations with a --topic.", rich_help_panel=ADVANCED)
    ] = 0.3,
    top_k: Annotated[
        int, typer.Option(min=1, help="Tokens that sampling chooses from.", rich_help_panel=ADVANCED)
    ] = 100,
    seed: SeedOption = 0,
):
    """Let the target write conversations: training data for its draft. Processes that `torchrun` starts share the work."""
    from transformers_prism.training.synthesis import SynthesisConfig

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
    typer.echo(json.dumps(_synthesize(config, output, target, dtype, packed, prompts, split, exclude)))


def _synthesize(config, output: Path, target, dtype: str, packed: bool, prompts, split: str, exclude) -> dict:
    """Run a synthesis and return its counts."""
    import torch
    from accelerate import PartialState

    from transformers_prism.cpu import prepare_for_cpu
    from transformers_prism.target import load_target
    from transformers_prism.training.chats import read_chats, read_data_set
    from transformers_prism.training.conversations import Contamination
    from transformers_prism.training.synthesis import SynthesisProgress
    from transformers_prism.training.synthesis import synthesize as run

    chats = None
    if prompts is not None:
        chats = list(read_chats(prompts) if Path(prompts).is_file() else read_data_set(prompts, split))
    # Told so, it also finds other processes where there is no accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available())
    model, tokenizer = load_target(target, getattr(torch, dtype))
    model.to(state.device)
    if packed and state.device.type == "cpu" and dtype == "float32":
        prepare_for_cpu(model)
    contamination = None
    if exclude is not None:
        contamination = Contamination(tokenizer, (turn["content"] for chat in read_chats(exclude) for turn in chat))
    with SynthesisProgress() as progress:
        part = (state.process_index, state.num_processes)
        return run(model, tokenizer, config, output, chats, contamination, part, progress)


def data_preview(
    data: Annotated[str, typer.Option(help="Folder of `synthesize`, or JSON lines of token ids or of chats.")],
    target: TargetOption = None,
    count: Annotated[int, typer.Option(min=1, help="Conversations shown.")] = 3,
):
    """Show conversations with the tokens that training learns from in colour, and how many there are."""
    from rich.console import Console

    from transformers_prism.target import load_target
    from transformers_prism.training.conversations import describe, preview, read_conversations

    model, tokenizer = load_target(target)
    vocab_size = model.config.get_text_config().vocab_size
    conversations = read_conversations(data.split(","), vocab_size, tokenizer=tokenizer)
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
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )
