"""The `transformers-prism` command. Each command imports what it needs when it runs, so that `--help` is quick."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench_app = typer.Typer(no_args_is_help=True, help="Measure: decoding with and without a draft, or a round's cost.")
app.add_typer(bench_app, name="bench")
data_app = typer.Typer(no_args_is_help=True, help="Look at what training would learn from.")
app.add_typer(data_app, name="data")

TargetOption = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or .gguf file; SmolLM2-135M-Instruct if absent.", show_default=False),
]
DraftOption = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id; the draft that the repository ships if absent.", show_default=False),
]
PackedOption = Annotated[
    bool, typer.Option("--packed/--no-packed", help="Pack weights for the CPU first (prepare_for_cpu), for both ways.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="File to write settings and figures to.")]
TopKOption = Annotated[int | None, typer.Option(help="Nodes kept per depth, and children per node.")]
DepthOption = Annotated[int | None, typer.Option(help="Draft steps per round.")]
NumNodesOption = Annotated[int | None, typer.Option(help="Drafted nodes that the target verifies per round.")]


@app.callback()
def main():
    """Lossless speculative decoding for transformers with PRISM drafts."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what a user can put right as one line, and end with status 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def sampling_settings(
    max_new_tokens: int, temperature: float, top_p: float | None, repetition_penalty: float | None
) -> dict:
    """Arguments of generate(): greedy at temperature 0, else sampling."""
    settings: dict = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        if top_p is not None:
            settings["top_p"] = top_p
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    return settings


@app.command()
def demo(
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 96,
    packed: PackedOption = True,
):
    """Answer three prompts with and without a draft, and compare."""
    from rich.console import Console
    from transformers.utils import logging

    from transformers_prism.demo import run_demo

    logging.disable_progress_bar()
    with user_errors():
        run_demo(target, draft, max_new_tokens, packed, Console())


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The user's turn.")],
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; with a temperature.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    seed: Annotated[int, typer.Option(help="Of torch's generator.")] = 0,
    packed: PackedOption = True,
):
    """Answer one prompt with a draft."""
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from transformers_prism.demo import run_generate

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    settings = sampling_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    with user_errors():
        run_generate(target, draft, prompt, settings, packed, Console())


@app.command()
def verify(
    target: TargetOption = None,
    draft: DraftOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines in Spec-Bench's form; three questions if absent.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Set before every run.")] = 0,
    json_file: JsonOption = None,
):
    """Check that a draft is lossless here: greedy, sampled, batched, and a broken verifier that must be caught.

    Exits with 0 only if all of it holds.
    """
    from rich.console import Console

    from transformers_prism.benchmark.prompts import choose_prompts, read_prompts
    from transformers_prism.benchmark.record import write_record
    from transformers_prism.benchmark.verify import TREE, as_json, check_table
    from transformers_prism.benchmark.verify import verify as verify_draft
    from transformers_prism.demo import PROMPTS, SHIPPED_DRAFT, chat_inputs, load_pair
    from transformers_prism.publishing import weights_sha256

    with user_errors():
        questions = list(PROMPTS)
        if prompts is not None:
            questions = [record["turns"][0] for record in choose_prompts(read_prompts(prompts), num_prompts)]
        target_model, tokenizer, draft_model = load_pair(target, draft)
        weights = weights_sha256(draft or SHIPPED_DRAFT)
        inputs = [chat_inputs(tokenizer, question, target_model.device) for question in questions]
        checks = verify_draft(target_model, draft_model, inputs, max_new_tokens, seed)
    Console().print(check_table(checks))
    figures = as_json(checks)
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "num_prompts": len(questions), **TREE}
    write_record(json_file, "verify", target_model, settings, figures, weights)
    report_file(json_file)
    typer.echo("lossless: all of it holds" if figures["holds"] else "NOT lossless, or the control was not caught")
    raise typer.Exit(0 if figures["holds"] else 1)


@app.command()
def synthesize(
    output: Annotated[Path, typer.Option(help="Folder of Parquet shards; one with a part of them is gone on with.")],
    num_tokens: Annotated[int, typer.Option(min=1, help="Stop when so many tokens are kept.")] = 1_000_000,
    target: TargetOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="JSON lines of chats, or a data set on the Hub; the target writes user turns if absent."),
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set on the Hub.")] = "train",
    exclude: Annotated[
        Path | None, typer.Option(help="JSON lines of benchmark prompts; what shares 13 tokens in a row is left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded at once.")] = 64,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Of answers, 0 is greedy; each conversation draws one of those given.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens that sampling chooses from.")] = 100,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="A longer answer is cut there.")] = 300,
    max_turns: Annotated[int, typer.Option(min=1, help="User turns of a conversation at most.")] = 2,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a conversation at most.")] = 1024,
    topic: Annotated[
        list[str] | None, typer.Option(help="code, math, writing, translation: some user turns begin like one.")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="System prompts; each conversation draws one.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the target.")] = "float32",
    packed: PackedOption = True,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
):
    """Let the target write conversations: training data for its draft. Run under `accelerate launch` to share the work."""
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from transformers_prism.cpu import prepare_for_cpu
    from transformers_prism.target import load_target
    from transformers_prism.training.conversations import Contamination, read_chats, read_data_set
    from transformers_prism.training.synthesis import SynthesisConfig, SynthesisProgress
    from transformers_prism.training.synthesis import synthesize as run

    logging.disable_progress_bar()
    options: dict[str, list | None] = {"temperatures": temperature, "topics": topic, "system_prompts": system}
    chosen: dict = {name: tuple(value) for name, value in options.items() if value}
    with user_errors():
        config = SynthesisConfig(
            num_tokens,
            batch_size=batch_size,
            top_k=top_k,
            max_answer_tokens=max_answer_tokens,
            max_turns=max_turns,
            max_length=max_length,
            seed=seed,
            **chosen,
        )
        chats = None
        if prompts is not None:
            chats = list(read_chats(prompts) if Path(prompts).is_file() else read_data_set(prompts, split))
        state = PartialState()
        model, tokenizer = load_target(target, getattr(torch, dtype))
        model.to(state.device)
        if packed and state.device.type == "cpu" and dtype == "float32":
            prepare_for_cpu(model)
        contamination = None
        if exclude is not None:
            texts = (turn["content"] for chat in read_chats(exclude) for turn in chat)
            contamination = Contamination(tokenizer, texts)
        part = (state.process_index, state.num_processes)
        with SynthesisProgress() as progress:
            summary = run(model, tokenizer, config, output, chats, contamination, part, progress)
    typer.echo(json.dumps(summary))


@data_app.command("preview")
def data_preview(
    data: Annotated[str, typer.Option(help="Folder of `synthesize`, or JSON lines of token ids or of chats.")],
    target: TargetOption = None,
    count: Annotated[int, typer.Option(min=1, help="Conversations shown.")] = 3,
):
    """Show conversations with the tokens that training learns from in colour, and how many there are."""
    from rich.console import Console
    from transformers.utils import logging

    from transformers_prism.target import load_target
    from transformers_prism.training.conversations import describe, preview, read_conversations

    logging.disable_progress_bar()
    with user_errors():
        model, tokenizer = load_target(target)
        vocab_size = model.config.get_text_config().vocab_size
        conversations = read_conversations(data.split(","), vocab_size, tokenizer=tokenizer)
        console = Console()
        for conversation in conversations[:count]:
            console.print(preview(conversation, tokenizer), soft_wrap=True)
            console.rule()
        typer.echo(json.dumps(describe(conversations)))


@bench_app.command("synthesize")
def bench_synthesize_command(
    prompts: Annotated[Path, typer.Option(help="JSON lines of chats, or in Spec-Bench's form.")],
    target: TargetOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded at once, for both ways.")] = 64,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer at most.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each way, in turn; medians count.")] = 3,
    json_file: JsonOption = None,
):
    """Tokens per second of `synthesize` over those of generate() in batches, greedy, on the same prompts, in turn."""
    from transformers.utils import logging

    from transformers_prism.benchmark.record import write_record
    from transformers_prism.benchmark.synthesize import bench_synthesize
    from transformers_prism.target import load_target
    from transformers_prism.training.conversations import read_chats

    logging.disable_progress_bar()
    with user_errors():
        model, tokenizer = load_target(target)
        chats = [chat[:1] for chat in read_chats(prompts)][:num_prompts]
        figures = bench_synthesize(model, tokenizer, chats, batch_size, max_new_tokens, repeat)
    typer.echo(
        f"generate {figures['generate_tokens_per_second']:.1f} tokens/s, synthesize "
        f"{figures['synthesize_tokens_per_second']:.1f} tokens/s, ratio {figures['ratio']:.2f}; "
        f"identical answers: {figures['num_identical']} of {figures['num_prompts']}"
    )
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "repeat": repeat}
    write_record(json_file, "synthesize", model, settings, figures)
    report_file(json_file)


@bench_app.command("generate")
def bench_generate_command(
    prompts: Annotated[Path, typer.Option(help="JSON lines in Spec-Bench's form: question_id, category, turns.")],
    target: TargetOption = None,
    draft: DraftOption = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, spread over the tasks.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each way per prompt; medians count.")] = 3,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Nucleus; with a temperature.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is none.")] = None,
    seed: Annotated[int, typer.Option(help="Set before every run.")] = 0,
    tree: Annotated[
        Literal["auto", "static", "chain"] | None,
        typer.Option(help="The draft's setting if absent.", show_default=False),
    ] = None,
    tree_top_k: TopKOption = None,
    tree_depth: DepthOption = None,
    tree_num_nodes: NumNodesOption = None,
    packed: PackedOption = False,
    json_file: JsonOption = None,
):
    """Decode prompts with and without a draft, in turn: identity, acceptance length, milliseconds of a round, rates."""
    from rich.console import Console
    from transformers.utils import logging

    from transformers_prism.benchmark.generate import as_json, bench_generate, result_table, summarize
    from transformers_prism.benchmark.prompts import choose_prompts, read_prompts
    from transformers_prism.benchmark.record import write_record
    from transformers_prism.demo import SHIPPED_DRAFT, chat_inputs, load_pair
    from transformers_prism.publishing import weights_sha256

    logging.disable_progress_bar()
    console = Console()
    settings = sampling_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    tree_settings = {
        "tree": tree,
        "tree_top_k": tree_top_k,
        "tree_depth": tree_depth,
        "tree_num_nodes": tree_num_nodes,
    }
    tree_settings = {name: value for name, value in tree_settings.items() if value is not None}
    with user_errors():
        records = choose_prompts(read_prompts(prompts), num_prompts)
        target_model, tokenizer, draft_model = load_pair(target, draft, packed)
        weights = weights_sha256(draft or SHIPPED_DRAFT)
        draft_model.generation_config.update(**tree_settings)
        results = bench_generate(
            target_model, tokenizer, draft_model, records, chat_inputs, settings, repeat, seed, typer.echo
        )
    summary = summarize(results)
    console.print(result_table(results, f"median of {repeat}, {settings}"))
    round_ms = ", ".join(f"{phase} {ms:.1f}" for phase, ms in summary["round_ms"].items())
    console.print(
        f"identical: {summary['num_identical']} of {summary['num_prompts']}; acceptance length "
        f"{summary['acceptance_length_pooled']:.3f} pooled, {summary['acceptance_length_per_prompt_mean']:.3f} "
        f"per-prompt mean; ms of a round: {round_ms}; ratio of tokens/s: {summary['ratio']:.3f}",
        soft_wrap=True,
    )
    run = {
        "prompts": prompts.name,
        "batch_size": 1,
        "baseline": BASELINE,
        "generate": settings,
        "repeat": repeat,
        "seed": seed,
        "packed": packed,
    }
    tree_used = {name: getattr(draft_model.generation_config, name, None) for name in ("tree", *_TREE_NAMES)}
    write_record(json_file, "generate", target_model, {**run, **tree_used}, as_json(results), weights)
    report_file(json_file)


@bench_app.command("modules")
def bench_modules_command(
    target: TargetOption = None,
    num_rounds: Annotated[int, typer.Option(min=2, help="Rounds of each draft.")] = 200,
    context_length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    tree_top_k: Annotated[int, typer.Option(min=1, help="Nodes kept per depth, and children per node.")] = 10,
    tree_depth: Annotated[int, typer.Option(min=1, help="Draft steps; 8 use all modules of the larger draft.")] = 8,
    tree_num_nodes: Annotated[int, typer.Option(min=1, help="Drafted nodes that the target verifies.")] = 59,
    packed: PackedOption = False,
    json_file: JsonOption = None,
):
    """Latency of a round with 8 processing modules over that with 1, on the target's sizes, with random drafts."""
    from transformers.utils import logging

    from transformers_prism.benchmark.modules import MAX_RATIO, bench_modules
    from transformers_prism.benchmark.record import write_record
    from transformers_prism.target import load_target

    logging.disable_progress_bar()
    tree = {"tree_top_k": tree_top_k, "tree_depth": tree_depth, "tree_num_nodes": tree_num_nodes}
    with user_errors():
        target_model, _ = load_target(target)
        result = bench_modules(
            target_model, tree, num_rounds=num_rounds, context_length=context_length, use_packed_weights=packed
        )
    figures = result.as_json()
    for count, median in zip(result.num_modules, figures["median_ms"], strict=True):
        typer.echo(f"M = {count}: median of {num_rounds} rounds {median:.2f} ms")
    low, high = result.interval
    typer.echo(
        f"median ratio of pairs {result.median_ratio:.4f}, 95 % interval {low:.4f} to {high:.4f}; bar {MAX_RATIO}: "
        + ("met" if result.is_within_bar else "not met")
    )
    write_record(json_file, "modules", target_model, {"num_rounds": num_rounds, "packed": packed, **tree}, figures)
    report_file(json_file)


@bench_app.command("training")
def bench_training_command(
    target: TargetOption = None,
    num_steps: Annotated[int, typer.Option(min=1, help="Aligned forwards S of the comparison.")] = 3,
    most_steps: Annotated[int, typer.Option(min=2, help="S is timed from 1 to this.")] = 6,
    repeat: Annotated[int, typer.Option(min=2, help="Steps of each kind; medians count.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations in a step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a conversation.")] = 512,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of a step with 2048 tokens and S = 5.")] = True,
    json_file: JsonOption = None,
):
    """Training steps, ours and with the authors' way of aligning, in turn; how they grow with S; peak memory."""
    from transformers.utils import logging

    from transformers_prism.benchmark.record import write_record
    from transformers_prism.benchmark.training import bench_training, peak_memory
    from transformers_prism.target import load_target

    logging.disable_progress_bar()
    with user_errors():
        model, _ = load_target(target)
        figures = bench_training(model, num_steps, most_steps, repeat, batch_size, length)
    speeds, (low, high) = figures["tokens_per_second"], figures["interval"]
    typer.echo(
        f"S = {num_steps}: {speeds['ours']:.0f} tokens/s, the authors' way {speeds['authors']:.0f} tokens/s; median ratio "
        f"of pairs {figures['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    )
    seconds = figures["seconds_by_steps"]
    relative = ", ".join(f"{value / seconds[0]:.2f}" for value in seconds)
    typer.echo(f"seconds for S = 1 to {most_steps}, over those of S = 1: {relative}")
    if memory:
        figures["peak_bytes"] = {
            name: peak_memory(model, checkpoint_activations=name == "checkpointed")
            for name in ("kept", "checkpointed")
        }
        gib = {name: f"{value / 2**30:.2f} GiB" for name, value in figures["peak_bytes"].items()}
        typer.echo(f"peak memory of a step, 2048 tokens, S = 5: {gib['kept']}; with checkpointing {gib['checkpointed']}")
    settings = {"num_steps": num_steps, "batch_size": batch_size, "length": length, "repeat": repeat}
    write_record(json_file, "training", model, settings, figures)
    report_file(json_file)


@bench_app.command("kernels")
def bench_kernels_command(
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile for GPUs that need not be here, and count traffic.")
    ] = False,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only this kernel; may be repeated.", show_default=False)
    ] = None,
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; all if absent.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file whose tables are replaced.")] = None,
    json_file: JsonOption = None,
):
    """Triton kernels: registers, spills and shared memory; on a GPU checked against PyTorch and timed.

    Not yet run on a GPU. Exits with 1 if a kernel's check fails; such a kernel is not timed.
    """
    import torch

    from transformers_prism.benchmark import kernels as bench

    with user_errors():
        bench.check_choice(kernel, arch)
        if compile_only:
            rows = bench.compile_all(kernel, arch or tuple(bench.ARCHITECTURES), typer.echo)
            traffic = bench.traffic_rows(kernel)
            typer.echo(bench.compiled_table(rows) + "\n\n" + bench.traffic_table(traffic))
            if readme is not None:
                bench.write_tables(readme, rows, traffic)
            figures: dict = {"rows": rows, "traffic": traffic}
        else:
            accelerator = torch.accelerator.current_accelerator()
            timings = bench.bench_kernels(accelerator or torch.device("cpu"), kernel, typer.echo)
            typer.echo(bench.timing_table(timings))
            figures = bench.timings_as_json(timings, accelerator)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
        typer.echo(f"wrote {json_file}")
    if not compile_only and not all(timing.is_right for timing in timings):
        raise typer.Exit(1)


_TREE_NAMES = ("tree_top_k", "tree_depth", "tree_num_nodes")
BASELINE = "target.generate without a draft, on the same weights, in the same process, in turn"


def report_file(path: Path | None) -> None:
    """Say that a file was written, if it was asked for."""
    if path is not None:
        typer.echo(f"wrote {path}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context):
    """Train a draft on conversations of a target; `train --help` lists every setting with its unit."""
    from transformers_prism.training.train import main as train_main

    with user_errors():
        train_main(context.args)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or name on the Hub: a draft of others, or with --to one of ours.")
    ],
    destination: Annotated[str, typer.Argument(help="Folder to write; must be empty or not there.")],
    from_form: Annotated[
        Literal["prism-artifact", "sglang", "eagle", "eagle3"] | None,
        typer.Option(
            "--from", help="Form of the source: the PRISM authors' PyTorch or SGLang code, EAGLE-1/2 or HASS, EAGLE-3."
        ),
    ] = None,
    to_form: Annotated[
        Literal["sglang", "eagle", "eagle3"] | None, typer.Option("--to", help="Form to write a draft of ours in.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The target: folder or name on the Hub.")] = None,
    context_kv: Annotated[
        Literal["prefill_module", "own_module"],
        typer.Option(
            help="With --from: whose keys and values later steps see, as the authors decode, or as they train."
        ),
    ] = "prefill_module",
    num_target_layers: Annotated[
        int | None, typer.Option(help="With --from: decoder layers of the target, where --target is not given.")
    ] = None,
):
    """Convert a draft that others trained, or one of ours for others; all but prism-artifact is experimental."""
    from transformers.utils import logging

    from transformers_prism.conversion import eagle, eagle3, prism_artifact, sglang

    logging.disable_progress_bar()
    forms = {"prism-artifact": prism_artifact, "sglang": sglang, "eagle": eagle, "eagle3": eagle3}
    with user_errors():
        if (from_form is None) == (to_form is None):
            raise ValueError(f"expected either --from or --to, got {'none' if from_form is None else 'both'}")
        if from_form is not None:
            report = forms[from_form].convert(source, destination, target, context_kv, num_target_layers)
        else:
            report = forms[to_form].export(source, destination, target)
    typer.echo(str(report))


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="The draft's folder.")],
    measurements: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of `bench generate --json` and `verify --json`, in the card's order; they replace those in "
            "metrics.json, which stays as it is if none is named.",
            show_default=False,
        ),
    ] = None,
):
    """Write a draft's card, README.md, from its measurements and training record; figures not in them are refused."""
    from transformers_prism.hub.card import write_card

    with user_errors():
        for name in write_card(folder, measurements):
            typer.echo(f"wrote {folder / name}")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="The draft's folder, or its name on the Hub.")],
    repository: Annotated[str, typer.Argument(help="user/name on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: for yourself.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.", show_default=False)] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload draft",
):
    """Push a draft to the Hub: weights, code, card, metrics and licence, in one commit.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from transformers.utils import logging

    from transformers_prism.modeling_prism import PrismDraftModel

    logging.disable_progress_bar()
    with user_errors():
        draft = PrismDraftModel.from_pretrained(folder)
        commit = draft.push_to_hub(repository, private=private, revision=revision, commit_message=message)
    typer.echo(f"pushed {repository}, revision {commit.oid}")


if __name__ == "__main__":
    app()
