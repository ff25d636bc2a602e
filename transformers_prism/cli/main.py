"""The `transformers-prism` command. Each command imports what it needs when it runs, so that `--help` is quick."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from transformers_prism.cli import serve
from transformers_prism.cli.bench import bench_app
from transformers_prism.cli.options import (
    DraftOption,
    JsonOption,
    PackedOption,
    RepetitionPenaltyOption,
    TargetOption,
    TemperatureOption,
    TopPOption,
    add_moved,
    report_file,
    sampling_settings,
    user_errors,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")
data_app = typer.Typer(no_args_is_help=True, help="Look at what training would learn from.")
app.add_typer(data_app, name="data")
serve.add_to(app)


@app.callback()
def main():
    """Lossless speculative decoding for transformers with PRISM drafts."""


@app.command()
def demo(
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 96,
    packed: PackedOption = True,
    web: Annotated[bool, typer.Option("--web", help="Show a page in the browser instead, to ask your own.")] = False,
    port: Annotated[int, typer.Option(help="With --web: port of the page, on this machine alone.")] = 7860,
):
    """Answer three prompts with and without a draft, and compare."""
    from rich.console import Console
    from transformers.utils import logging

    from transformers_prism.cli.demo import run_demo

    logging.disable_progress_bar()
    with user_errors():
        if web:
            from transformers_prism.cli.web import run_web

            return run_web(target, draft, packed, port)
        run_demo(target, draft, max_new_tokens, packed, Console())


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The user's turn.")],
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    seed: Annotated[int, typer.Option(help="Of torch's generator.")] = 0,
    packed: PackedOption = True,
):
    """Answer one prompt with a draft."""
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from transformers_prism.cli.demo import run_generate

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
    """Check that a draft is lossless here, on every path of generate(), with a broken verifier that each must catch.

    Takes a few minutes with the shipped draft.

    Exits with 0 only if all of it holds.
    """
    from rich.console import Console

    from transformers_prism.bench.prompts import choose_prompts, read_prompts
    from transformers_prism.bench.record import write_record
    from transformers_prism.bench.verify import TREE, as_json, check_table
    from transformers_prism.bench.verify import verify as verify_draft
    from transformers_prism.cli.demo import PROMPTS, SHIPPED_DRAFT, chat_inputs, load_pair
    from transformers_prism.hub.files import weights_sha256

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
    max_user_tokens: Annotated[
        int, typer.Option(min=1, help="A longer user turn that the target writes drops the conversation.")
    ] = 160,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="A longer answer is cut there.")] = 300,
    max_turns: Annotated[int, typer.Option(min=1, help="User turns of a conversation at most.")] = 2,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a conversation at most.")] = 1024,
    topic: Annotated[
        list[str] | None, typer.Option(help="code, math, writing, translation, reading: some user turns begin like one.")
    ] = None,
    topic_share: Annotated[float, typer.Option(min=0, max=1, help="Share of conversations that begin so.")] = 0.3,
    system: Annotated[list[str] | None, typer.Option(help="System prompts; each conversation draws one.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the target.")] = "float32",
    packed: PackedOption = True,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
):
    """Let the target write conversations: training data for its draft. Processes that `torchrun` starts share the work."""
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from transformers_prism.cpu import prepare_for_cpu
    from transformers_prism.target import load_target
    from transformers_prism.training.chats import read_chats, read_data_set
    from transformers_prism.training.conversations import Contamination
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
            max_user_tokens=max_user_tokens,
            max_answer_tokens=max_answer_tokens,
            max_turns=max_turns,
            topic_share=topic_share,
            max_length=max_length,
            seed=seed,
            **chosen,
        )
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context):
    """Train a draft on conversations of a target; `train --help` lists every setting with its unit."""
    from transformers_prism.training.train import main as train_main

    with user_errors():
        train_main(context.args)


add_moved(app, "study", "python -m benchmarks.study")


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
    """Write a draft's card, README.md, from its measurements and training record."""
    from transformers_prism.hub.card import write_card

    with user_errors():
        for name in write_card(folder, measurements):
            typer.echo(f"wrote {folder / name}")


@app.command()
def inspect(
    draft: Annotated[str, typer.Argument(help="The draft's folder, or its name on the Hub.")],
    target: Annotated[
        str | None, typer.Option(help="A target on this machine; the one that the draft names if absent.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the repository on the Hub.", show_default=False)] = None,
    verify_bytes: Annotated[
        bool, typer.Option("--verify", help="Check every byte against the repository's hashes and metrics.json.")
    ] = False,
):
    """Say what a draft is: target, modules, sizes, bytes read per draft step, whether the target here matches.

    Exits with 1 if the target here does not match, or with --verify if a byte is another.
    """
    from transformers_prism.hub.inspection import inspect_draft, verify_files

    with user_errors():
        inspection = inspect_draft(draft, target, revision)
        for name, text in inspection.rows():
            typer.echo(f"{name + ':':<36}{text}")
        if verify_bytes:
            typer.echo(f"{'verified:':<36}{verify_files(draft, revision)}")
    raise typer.Exit(1 if inspection.fatal else 0)


@app.command()
def push(
    folder: Annotated[
        str, typer.Argument(help="The draft's folder, or its name on the Hub; with --code-only user/name alone.")
    ],
    repository: Annotated[
        str | None, typer.Argument(help="user/name on the Hub; made if it is not there.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: for yourself.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; made if it is not there, unless --code-only.", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Of the commit; 'Upload draft' or 'Renew code' if absent.", show_default=False)
    ] = None,
    code_only: Annotated[
        bool, typer.Option("--code-only", help="Renew the code of a draft that is on the Hub; all else there stays.")
    ] = False,
):
    """Push a draft to the Hub: weights, code, card, metrics and licence, in one commit; or renew the code alone.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    with user_errors():
        if code_only:
            if repository is not None or private:
                raise ValueError("--code-only: expected the name of one draft on the Hub, got another name or --private")
            typer.echo(_renew_code(folder, revision, message or "Renew code"))
        elif repository is None:
            raise ValueError("expected a draft and the repository to push it to, user/name, got only the draft")
        else:
            typer.echo(_push_draft(folder, repository, private, revision, message or "Upload draft"))


def _push_draft(folder: str, repository: str, private: bool, revision: str | None, message: str) -> str:
    from transformers_prism.modeling_prism import PrismDraftModel

    draft = PrismDraftModel.from_pretrained(folder)
    commit = draft.push_to_hub(repository, private=private, revision=revision, commit_message=message)
    return f"pushed {repository}, revision {commit.oid}"


def _renew_code(repository: str, revision: str | None, message: str) -> str:
    from transformers_prism.hub.renewal import renew_code

    commit, is_new = renew_code(repository, revision=revision, message=message)
    if is_new:
        return f"renewed the code of {repository}, revision {commit.oid}"
    return f"the code of {repository} is this package's already, revision {commit.oid}"


if __name__ == "__main__":
    app()
