"""The commands of `transformers-prism bench`. Each imports what it needs when it runs, so that `--help` is quick."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from transformers_prism.cli.options import (
    ADVANCED,
    COST,
    AnswerTokensOption,
    Commands,
    DeviceOption,
    DtypeOption,
    JsonOption,
    PackedOption,
    RepetitionPenaltyOption,
    RunSeedOption,
    TargetOption,
    TemperatureOption,
    TopPOption,
    add_moved,
    report_file,
)
from transformers_prism.whole_files import write_json

bench_app = Commands(help="Measure: decoding with and without a draft, or a round's cost.")

PromptsOption = Annotated[
    Path,
    typer.Option(
        help="Prompts or chats in any usual shape (docs/data-formats.md), as Spec-Bench's question_id, category, turns."
    ),
]
MeasuredDraftOption = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id, or 'random' for an untrained one; the shipped draft if absent.", show_default=False),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Measure only what the file lacks.", rich_help_panel=ADVANCED)]
UpdateCardOption = Annotated[
    Path | None, typer.Option(help="Draft's folder whose card takes these figures.", show_default=False, rich_help_panel=ADVANCED)
]


def _no_plot(path: Path | None) -> None:
    if path is not None:
        raise typer.BadParameter(
            "pictures are drawn from --json files: `python -m benchmarks.page`, in a clone of the repository"
        )


def _no_compilation(is_wanted: bool) -> None:
    if is_wanted:
        raise typer.BadParameter("kernels are compiled by `python -m benchmarks.compile_kernels`, in a clone of the repository")


# Options of the last release; their errors name the replacement.
PlotOption = Annotated[Path | None, typer.Option("--plot", hidden=True, callback=_no_plot)]
CompileOnlyOption = Annotated[bool, typer.Option("--compile-only", hidden=True, callback=_no_compilation)]
add_moved(bench_app, "modules", "python -m benchmarks.scaling --modules 1 --modules 8")
for _name in ("page", "training", "synthesize", "scaling"):
    add_moved(bench_app, _name, f"python -m benchmarks.{_name}")


def _at_most(usual: int, given: int | None, batch_size: int = 1) -> Callable[[int], int]:
    """A function from the number of all prompts to the number to measure: `given`, or by default at most `usual`, as many as
    fill batches."""
    from transformers_prism.bench.generate import check_batches

    if given is not None:
        check_batches(given, batch_size)

    def count(number: int) -> int:
        if number < batch_size:
            raise ValueError(f"prompts: expected at least {batch_size}, which fill a batch, got {number}")
        return min(max(usual, batch_size), number) // batch_size * batch_size if given is None else given

    return count


def _half(number: int) -> int:
    """Of all prompts the number to measure where the others lengthen them."""
    if number < 2:
        raise ValueError(f"prompts: expected at least 2, some to measure and others to lengthen them with, got {number}")
    return min(12, number // 2)


def _check_file(json_file: Path | None, resume: bool, update_card: Path | None) -> None:
    """Refuse --resume and --update-card without --json, since both need the file."""
    if (resume or update_card) and json_file is None:
        raise ValueError(f"expected --json with {'--resume' if resume else '--update-card'}, got none")
    if update_card and not (update_card / "config.json").is_file():
        raise ValueError(f"update_card: expected the folder of a draft, got {update_card}, which has no config.json")


def _load(prompts: Path, count: Callable[[int], int], target: str | None, draft: str | None, device: str, dtype: str) -> tuple:
    """All prompts of a file, those to measure (`count` gives their number), then target, tokenizer, draft, and the hash of the
    draft's weights; the draft "random" is an untrained one."""
    import torch

    from transformers_prism.bench.methods import random_draft
    from transformers_prism.bench.prompts import choose_prompts, read_prompts
    from transformers_prism.bench.record import UNTRAINED
    from transformers_prism.cli.demo import SHIPPED_DRAFT, leave_beams, load_draft
    from transformers_prism.hub.files import weights_sha256
    from transformers_prism.target import find_device, load_target

    place, records = find_device(device), read_prompts(prompts)
    chosen = choose_prompts(records, count(len(records)))
    model, tokenizer = load_target(target, getattr(torch, dtype))
    model.to(place)
    if note := leave_beams(model):
        typer.echo(f"warning: {note}", err=True)
    if draft == UNTRAINED:
        return records, chosen, model, tokenizer, random_draft(model, 2, {"tree": "auto"}).bind(model), draft
    return records, chosen, model, tokenizer, load_draft(draft or SHIPPED_DRAFT, model), weights_sha256(draft or SHIPPED_DRAFT)


def _can_be_packed(device: str, dtype: str) -> bool:
    import torch

    from transformers_prism.bench.methods import can_be_packed
    from transformers_prism.target import find_device

    return can_be_packed(find_device(device), getattr(torch, dtype))


def _update_card(folder: Path | None, measurement: Path | None) -> None:
    """Put a measurement into the card of a draft's folder, if both are given."""
    from transformers_prism.hub.card import add_to_card

    if folder is None or measurement is None:
        return
    for name in add_to_card(folder, measurement):
        typer.echo(f"wrote {folder / name}")


@bench_app.command("generate")
def bench_generate_command(
    prompts: PromptsOption,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="plain, prepared, compiled, lookup[:N], assisted, draft, auto, auto-no-ngrams, chain[:DEPTH], "
            "static[:TOP_K,DEPTH,NODES]; repeat it for several. The plain ones are added; the draft if absent.",
            show_default=False,
        ),
    ] = None,
    target: TargetOption = None,
    draft: MeasuredDraftOption = None,
    assistant: Annotated[
        str | None,
        typer.Option(
            help="For assisted: Hub id or folder, or 'random' for a tiny one.", show_default=False, rich_help_panel=ADVANCED
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts, spread over the tasks. 8, or all of fewer, if absent.", rich_help_panel=COST),
    ] = None,
    max_new_tokens: AnswerTokensOption = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded at once.", rich_help_panel=COST)] = 1,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Bring prompts to this number of tokens, by text of other prompts.", show_default=False),
    ] = None,
    repeat: Annotated[
        int, typer.Option(min=1, help="Runs of each method per prompt, in turn; medians count.", rich_help_panel=COST)
    ] = 3,
    warm_up: Annotated[int, typer.Option(min=0, help="Short runs of each method beforehand.", rich_help_panel=COST)] = 1,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: RunSeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
    json_file: JsonOption = None,
    resume: ResumeOption = False,
    update_card: UpdateCardOption = None,
):
    """Decode prompts in several ways, in turn: identity, acceptance length, milliseconds of a round, rates.

    The file is written after every prompt; --resume continues an interrupted measurement.
    """
    from rich.console import Console

    from transformers_prism.bench.figures import result_tables
    from transformers_prism.bench.measurement import GenerateMeasurement
    from transformers_prism.bench.methods import parse_methods
    from transformers_prism.bench.prompts import sampling_settings
    from transformers_prism.cli.demo import chat_inputs

    console = Console()
    _check_file(json_file, resume, update_card)
    methods = parse_methods(method or ["draft"], packed and _can_be_packed(device, dtype), batch_size)
    generate = sampling_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    records, chosen, model, tokenizer, model_draft, weights = _load(prompts, _at_most(8, num_prompts, batch_size), target, draft, device, dtype)
    measurement = GenerateMeasurement(methods, generate, prompts.name, batch_size, context, repeat, warm_up, seed, assistant)
    models = (model, tokenizer, model_draft, weights)
    figures = measurement.run(*models, chat_inputs, chosen, records, json_file, resume, console)
    for table in result_tables(figures["methods"], f"median of {repeat}, batch {batch_size}"):
        console.print(table, crop=False)
    report_file(json_file)
    _update_card(update_card, json_file)


@bench_app.command("acceptance")
def bench_acceptance_command(
    prompts: PromptsOption,
    target: TargetOption = None,
    draft: MeasuredDraftOption = None,
    tree: Annotated[
        list[str] | None,
        typer.Option(help="Nodes/depth/top-k; repeat it for several. 59/6/10, 15/4/4 and 5/5/1 (a chain) if absent."),
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy; repeat it for several. 0 and 0.8 if absent.")
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts, spread over the tasks. 48, or all of fewer, if absent.", rich_help_panel=COST),
    ] = None,
    max_new_tokens: AnswerTokensOption = 128,
    seed: RunSeedOption = 0,
    coupled: Annotated[
        bool,
        typer.Option(
            "--coupled/--no-coupled",
            help="Let the draft see the random numbers of sampling. --no-coupled: hide them.",
            rich_help_panel=ADVANCED,
        ),
    ] = True,
    text_tokens: Annotated[
        bool | None,
        typer.Option(
            "--text-tokens/--no-text-tokens",
            help="Let the text's tokens join the draft vocabulary; as the draft says if absent. --no-text-tokens: leave them out.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
    json_file: JsonOption = None,
    resume: ResumeOption = False,
    update_card: UpdateCardOption = None,
):
    """Acceptance length of fixed trees, greedy and sampled; nothing is timed, and n-grams take no part."""
    from rich.console import Console

    from transformers_prism.bench.acceptance import TEMPERATURES, TREES, acceptance_rows, bench_acceptance
    from transformers_prism.bench.figures import table_of
    from transformers_prism.bench.prompts import check_positions, task_of
    from transformers_prism.bench.record import prompts_sha256
    from transformers_prism.cli.demo import chat_inputs
    from transformers_prism.training.progress_bar import ProgressBar

    console = Console()
    settings: dict = {
        "prompts": prompts.name,
        "trees": tree or list(TREES),
        "temperatures": temperature or list(TEMPERATURES),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "coupled": coupled,
        "packed": packed,
    }
    _check_file(json_file, resume, update_card)
    _, chosen, model, tokenizer, model_draft, weights = _load(prompts, _at_most(48, num_prompts), target, draft, device, dtype)
    settings["num_prompts"] = len(chosen)
    if text_tokens is not None:
        model_draft.generation_config.tree_text_tokens = text_tokens
    settings["text_tokens"] = model_draft.generation_config.tree_text_tokens
    questions = [(task_of(one), chat_inputs(tokenizer, one["turns"][0], model.device)) for one in chosen]
    check_positions(model, [inputs for _, inputs in questions], max_new_tokens)
    settings["prompts_sha256"] = prompts_sha256(inputs for _, inputs in questions)
    num_answers = len(questions) * len(settings["trees"]) * len(settings["temperatures"])
    with ProgressBar("answers", num_answers, console=console) as bar:
        rows = bench_acceptance(model, model_draft, questions, settings, weights, json_file, resume, bar.advance)
    console.print(table_of(*acceptance_rows(rows), f"tau, {len(chosen)} prompts"), crop=False)
    report_file(json_file)
    _update_card(update_card, json_file)


@bench_app.command("kernels")
def bench_kernels_command(
    kernel: Annotated[
        list[str] | None, typer.Option(help="Only this kernel; may be repeated.", show_default=False)
    ] = None,
    json_file: JsonOption = None,
    compile_only: CompileOnlyOption = False,
):
    """Triton kernels on a GPU, checked against PyTorch and timed.

    Not yet run on a GPU. Exits with 1 if a kernel's check fails; such a kernel is not timed.
    """
    import torch

    from transformers_prism.bench.kernels import bench_kernels, timing_table, timings_as_json

    accelerator = torch.accelerator.current_accelerator()
    timings = bench_kernels(accelerator or torch.device("cpu"), kernel, typer.echo)
    typer.echo(timing_table(timings))
    if json_file is not None:
        write_json(json_file, timings_as_json(timings, accelerator))
        report_file(json_file)
    if not all(timing.is_right for timing in timings):
        raise typer.Exit(1)


@bench_app.command("rounds")
def bench_rounds_command(
    prompts: PromptsOption,
    target: TargetOption = None,
    draft: MeasuredDraftOption = None,
    method: Annotated[
        str, typer.Option(help="draft, auto, auto-no-ngrams, chain[:DEPTH] or static[:TOP_K,DEPTH,NODES].")
    ] = "auto",
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens to bring prompts to; repeat it for several. 128 and 4096 if absent.")
    ] = None,
    num_rounds: Annotated[int, typer.Option(min=1, help="Rounds at each context.", rich_help_panel=COST)] = 60,
    label: Annotated[
        str | None, typer.Option(help="What the page calls this profile.", show_default=False, rich_help_panel=ADVANCED)
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
    json_file: JsonOption = None,
    plot: PlotOption = None,
):
    """Where the time of a round goes: forwards of target and draft, selection, masks, walk, commit, other."""
    from rich.console import Console

    from transformers_prism.bench.figures import table_of
    from transformers_prism.bench.methods import Contest, parse_methods
    from transformers_prism.bench.prompts import contexts_of
    from transformers_prism.bench.record import write_record
    from transformers_prism.bench.rounds import profile_rounds, profile_rows, weight_bytes
    from transformers_prism.cli.demo import chat_inputs

    console, packed = Console(), packed and _can_be_packed(device, dtype)
    (chosen,) = (one for one in parse_methods([method], packed) if one.name == method)
    if not chosen.uses_draft:
        raise ValueError(f"method: expected one with a draft, got {method!r}")
    records, measured, model, tokenizer, measured_draft, weights = _load(prompts, _half, target, draft, device, dtype)
    contest = Contest(model, measured_draft, None, [chosen], max_length=1)
    contest.enter(chosen)
    profiles = []
    for length in context or [128, 4096]:
        inputs = contexts_of(tokenizer, records, measured, length, lambda text: chat_inputs(tokenizer, text, model.device))
        profile = profile_rounds(model, contest.drafts[method], inputs, num_rounds)
        profiles.append({"context": length, **profile})
    figures = {"profiles": profiles, "bytes": weight_bytes(model, contest.drafts[method])}
    contest.close()
    console.print(table_of(*profile_rows(profiles), f"milliseconds of a round, {method}"), crop=False)
    settings = {"method": method, "label": label, "prompts": prompts.name, "num_rounds": num_rounds, "packed": packed}
    write_record(json_file, "rounds", model, settings, figures, weights)
    report_file(json_file)
