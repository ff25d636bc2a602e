"""What batches could gain: decoding with trees against plain steps, if nothing but forwards took time.

    python -m benchmarks.batch_bound spec_bench.jsonl --batch-size 4 --batch-size 8 --batch-size 16 --batch-size 32 --json bound.json
    python -m benchmarks.batch_bound spec_bench.jsonl --num-prompts 4 --batch-size 2 --max-new-tokens 12

The bound of a batch, without its prefill:

    plain     steps until its longest answer ends, each over all sequences, since plain decoding keeps those that ended
    trees     rounds as they went, each over the nodes of the sequences that were still active, with its draft steps
    bound     seconds of the plain steps over those of the rounds, both from the same measured costs

The share is the measured ratio over the bound. Whole calls are compared, too, prefill included: over all batches, and
of the batch that gains least. The table says where the rest goes: drafting and verifying beyond their costs, time outside
forwards, and what the bound itself would be if sequences never waited for the slowest.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.tables import markdown_table
from transformers_prism.bench.generate import ItemResult, bench_generate, make_items
from transformers_prism.bench.methods import Contest, parse_methods
from transformers_prism.bench.prompts import choose_prompts, read_prompts
from transformers_prism.bench.record import record_head
from transformers_prism.cli.demo import SHIPPED_DRAFT, chat_inputs, load_draft
from transformers_prism.cli.options import report_file, user_errors
from transformers_prism.decoding.speculation import Speculation
from transformers_prism.hub.files import weights_sha256
from transformers_prism.policy.costs import RoundCosts
from transformers_prism.target import load_target
from transformers_prism.whole_files import write_json


def active_by_round(speculation: Speculation) -> list[int]:
    """Number of active sequences in each round; a sequence takes part from the first round until it ends."""
    lengths = [len(accepted) for accepted in speculation.accepted_per_round]
    return [sum(length > index for length in lengths) for index in range(len(speculation.trees))]


def bound_of(speculation: Speculation, costs: RoundCosts, num_sequences: int, num_steps: int) -> dict:
    """Seconds that plain steps and rounds should take by measured costs.

    Args:
        speculation: of the batch.
        costs: of its target forwards and draft steps.
        num_sequences: in the batch, B.
        num_steps: plain steps until the longest answer ends, the prefill's token not counted.
    Returns:
        `dict`: `plain`, `verify` and `draft` in seconds; `bound`, their ratio; `even_bound`, the same if the batch had
        as many rounds as its sequences have on average.
    """
    plain = num_steps * costs.verify(num_sequences)
    verify = draft = 0.0
    active = active_by_round(speculation)
    for num_active, tree in zip(active, speculation.trees, strict=True):
        verify += costs.verify(num_active * (tree.num_nodes + 1))
        # A draft step was measured over all sequences; over fewer it reads the same weights.
        draft += costs.step_seconds * tree.num_steps
    even = sum(active) / (num_sequences * len(active)) if active else 1.0
    return {
        "plain": plain,
        "verify": verify,
        "draft": draft,
        "bound": plain / (verify + draft),
        "even_bound": plain / ((verify + draft) * even),
    }


def figures_of(result: ItemResult, speculation: Speculation, costs: RoundCosts) -> dict:
    """The bound of one batch and what was reached of it; costs are scaled to the plain steps that were measured."""
    ours, plain = result.outcomes["auto"], result.outcomes["prepared"]
    num_sequences = len(result.num_prompt_tokens)
    found = bound_of(speculation, costs, num_sequences, plain.num_forwards)
    decoding = {
        name: min(whole - prefill for whole, prefill in zip(one.seconds, one.prefill_seconds, strict=True))
        for name, one in (("ours", ours), ("plain", plain))
    }
    scale = decoding["plain"] / found["plain"]
    spent, lengths = speculation.seconds, result.num_prompt_tokens
    return {
        **found,
        "scale": scale,
        "ratio": decoding["plain"] / decoding["ours"],
        "whole_ratio": min(plain.seconds) / min(ours.seconds),
        "whole_seconds": {"ours": min(ours.seconds), "plain": min(plain.seconds)},
        "padding": 1 - sum(lengths) / (num_sequences * max(lengths)),
        "share": decoding["plain"] / decoding["ours"] / found["bound"],
        "seconds": decoding,
        "beyond_draft": spent["draft"] - scale * found["draft"],
        "beyond_verify": spent["verify"] - scale * found["verify"],
        "no_forward": spent["commit"] + spent["other"] + spent["check"],
        "num_rounds": len(speculation.trees),
        "tau": speculation.acceptance_length,
        "is_identical": all(ours.is_identical),
    }


def measure(target, draft, records: list[dict], rows: list[dict], batch_size: int, max_new_tokens: int, pad_id: int) -> list[dict]:
    """The figures of each batch; the plain method decodes with the prepared target."""
    items = make_items(records, rows, batch_size, pad_id)
    longest = max(item.inputs["input_ids"].shape[1] for item in items)
    contest = Contest(target, draft, None, parse_methods(["auto"], is_packed=True, batch_size=batch_size), longest + max_new_tokens)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    figures = []
    try:
        for result in bench_generate(contest, items, settings, repeat=1):
            speculation = contest.drafts["auto"].last_speculation
            known = {name: speculation.estimates[name] for name in ("num_tokens", "verify_seconds", "step_seconds")}
            figures.append(figures_of(result, speculation, RoundCosts(**known)))
    finally:
        contest.close()
    return figures


def rows_of(batches: dict[int, list[dict]]) -> tuple[list[str], list[list[str]]]:
    """Heading and a row for each batch size; seconds are summed over its batches."""
    heading = ["sequences", "bound", "reached", "share", "whole calls", "lowest", "if none waited", "tau", "padding %"]
    heading += ["draft +%", "verify +%", "no forward %"]
    rows = []
    for size, figures in batches.items():
        plain, ours = (sum(one["seconds"][name] for one in figures) for name in ("plain", "ours"))
        whole = {name: sum(one["whole_seconds"][name] for one in figures) for name in ("ours", "plain")}
        modelled = sum(one["scale"] * (one["verify"] + one["draft"]) for one in figures)
        even = sum(one["scale"] * one["plain"] / one["even_bound"] for one in figures)
        parts = [100 * sum(one[name] for one in figures) / ours for name in ("beyond_draft", "beyond_verify", "no_forward")]
        rows.append(
            [
                str(size),
                f"{plain / modelled:.2f}",
                f"{plain / ours:.2f}",
                f"{modelled / ours:.2f}",
                f"{whole['plain'] / whole['ours']:.2f}",
                f"{min(one['whole_ratio'] for one in figures):.2f}",
                f"{plain / even:.2f}",
                f"{sum(one['tau'] for one in figures) / len(figures):.2f}",
                f"{100 * sum(one['padding'] for one in figures) / len(figures):.0f}",
                *(f"{part:.1f}" for part in parts),
            ]
        )
    return heading, rows


def main(
    prompts: Annotated[Path, typer.Argument(help="prompts in any usual shape, as Spec-Bench's")],
    batch_size: Annotated[list[int], typer.Option(help="sequences of a batch; repeat it for several")],
    target: Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file; the demo target if absent")] = None,
    draft: Annotated[str | None, typer.Option(help="folder or Hub id; the shipped draft if absent")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="spread over the tasks")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="of each answer")] = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here, after each batch size")] = None,
) -> None:
    """Measure each batch size and print the table."""
    with user_errors():
        model, tokenizer = load_target(target)
        loaded = load_draft(draft or SHIPPED_DRAFT, model)
        chosen = choose_prompts(read_prompts(prompts), num_prompts)
        rows = [chat_inputs(tokenizer, record["turns"][0]) for record in chosen]
        batches: dict[int, list[dict]] = {}
        for size in batch_size:
            torch.manual_seed(0)
            batches[size] = measure(model, loaded, chosen, rows, size, max_new_tokens, tokenizer.pad_token_id or 0)
            if json_file is not None:
                settings = {"prompts": prompts.name, "num_prompts": num_prompts, "max_new_tokens": max_new_tokens}
                head = record_head("batch_bound", model, settings, weights_sha256(draft or SHIPPED_DRAFT))
                write_json(json_file, {**head, "batches": {str(one): figures for one, figures in batches.items()}})
        typer.echo(markdown_table(*rows_of(batches)))
        report_file(json_file)


if __name__ == "__main__":
    typer.run(main)
