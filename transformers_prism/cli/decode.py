"""The commands that decode with a draft: `demo`, `doctor`, `generate` and `verify`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from transformers_prism.cli.options import (
    ADVANCED,
    COST,
    AnswerTokensOption,
    Commands,
    DeviceOption,
    DraftOption,
    DtypeOption,
    JsonOption,
    PackedOption,
    RepetitionPenaltyOption,
    RunSeedOption,
    SeedOption,
    TargetOption,
    TemperatureOption,
    TopPOption,
    in_a_folder,
    report_file,
)


def add_to(app: Commands) -> None:
    """Add the commands to the command line."""
    app.command("demo")(demo)
    app.command("doctor")(doctor)
    app.command("generate")(generate)
    app.command("verify")(verify)


def demo(
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 96,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
    web: Annotated[bool, typer.Option("--web", help="Show a page in the browser instead, to ask your own.")] = False,
    port: Annotated[int, typer.Option(help="With --web: port of the page, on this machine alone.")] = 7860,
):
    """Answer three prompts with and without a draft, and compare."""
    if web:
        from transformers_prism.cli.web import run_web

        return run_web(target, draft, packed, device, dtype, port, max_new_tokens)
    from rich.console import Console

    from transformers_prism.cli.demo import run_demo

    run_demo(target, draft, max_new_tokens, packed, device, dtype, Console())


def doctor(
    target: TargetOption = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub id of a draft. If absent, the one that the repository ships is tried with the demo target, and an "
            "untrained one with a target of your own.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens of the trial.", rich_help_panel=COST)] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File to write the findings to.", callback=in_a_folder, rich_help_panel=ADVANCED),
    ] = None,
):
    """Check this machine, a target and a draft: versions, tokenizer, memory, way of verifying, expected gain.

    Exits with 0 if drafts can be used here, else with 1.
    """
    from rich.console import Console

    from transformers_prism.cli.doctor import examine, findings_table, has_failed
    from transformers_prism.whole_files import write_json

    console, findings = Console(), []
    for one in examine(target, draft, max_new_tokens, packed, device, dtype):
        findings.append(one)
        console.print(findings_table([one]))
    if json_file is not None:
        write_json(json_file, {"findings": [asdict(one) for one in findings], "works": not has_failed(findings)})
        report_file(json_file)
    raise typer.Exit(1 if has_failed(findings) else 0)


def generate(
    prompt: Annotated[str, typer.Option(help="The user's turn.")],
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
):
    """Answer one prompt with a draft, and say how the draft did."""
    import torch
    from rich.console import Console

    from transformers_prism.bench.prompts import sampling_settings
    from transformers_prism.cli.demo import run_generate

    torch.manual_seed(seed)
    settings = sampling_settings(max_new_tokens, temperature, top_p, repetition_penalty)
    run_generate(target, draft, prompt, settings, packed, device, dtype, Console())


def verify(
    target: TargetOption = None,
    draft: DraftOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts or chats in any usual shape (docs/data-formats.md); three questions if absent.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts taken from the file. 4, or all of fewer, if absent.", rich_help_panel=COST)
    ] = None,
    max_new_tokens: AnswerTokensOption = 64,
    seed: RunSeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
):
    """Check that a draft is lossless here, on every path of generate(), with a broken verifier that each must catch.

    Takes a few minutes with the shipped draft.

    Exits with 0 only if all of it holds.
    """
    from rich.console import Console

    from transformers_prism.bench.prompts import check_positions, choose_prompts, read_prompts
    from transformers_prism.bench.record import write_record
    from transformers_prism.bench.verify import TREE, as_json, check_table
    from transformers_prism.bench.verify import verify as verify_draft
    from transformers_prism.cli.demo import PROMPTS, SHIPPED_DRAFT, chat_inputs, load_pair
    from transformers_prism.hub.files import weights_sha256

    questions = list(PROMPTS)
    if prompts is not None:
        records = read_prompts(prompts)
        count = min(4, len(records)) if num_prompts is None else num_prompts
        questions = [record["turns"][0] for record in choose_prompts(records, count)]
    target_model, tokenizer, draft_model = load_pair(target, draft, device=device, dtype=dtype)
    weights = weights_sha256(draft or SHIPPED_DRAFT)
    inputs = [chat_inputs(tokenizer, question, target_model.device) for question in questions]
    check_positions(target_model, inputs, max_new_tokens)
    checks = verify_draft(target_model, draft_model, inputs, max_new_tokens, seed)
    figures = as_json(checks)
    Console().print(check_table(checks))
    settings = {"max_new_tokens": max_new_tokens, "seed": seed, "num_prompts": len(questions), **TREE}
    write_record(json_file, "verify", target_model, settings, figures, weights)
    report_file(json_file)
    typer.echo("lossless: all of it holds" if figures["holds"] else "NOT lossless, or the control was not caught")
    raise typer.Exit(0 if figures["holds"] else 1)
