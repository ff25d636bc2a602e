"""What a draft accepts as the text grows, with sliding windows of several sizes. Nothing is timed.

    python -m benchmarks.long_texts measure spec_bench.jsonl long_texts.json --num-documents 12
    python -m benchmarks.long_texts show long_texts.json --plots long_texts

`measure` joins the prompts of Spec-Bench's summarization and retrieval tasks to documents and asks for a summary of the last
256 to 7936 tokens of each. Greedy text is the same whatever is drafted, so each text is decoded once, plainly, and its
hidden states are kept. The draft's rounds are then run on them for every tree and every window: the tokens that each round
commits are those of a generate() call (tests/test_long_texts.py), and the target's prefill is paid once. A run that was
interrupted resumes; a larger `--num-documents` adds documents.

Answers differ between text lengths, and may be easier or harder to draft. So two more figures are recorded: how sure the
target was of its tokens, and how often the draft's first choice is the target's at each position of the longest prompt itself,
where all windows see the same text.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from benchmarks.known_texts import KnownText, rounds_of
from benchmarks.plots import plot_windows
from benchmarks.tables import markdown_table
from transformers_prism.bench.acceptance import packed_for_cpu
from transformers_prism.bench.prompts import read_prompts, task_of
from transformers_prism.bench.record import finished_part, record_head
from transformers_prism.cli.demo import SHIPPED_DRAFT, chat_inputs, load_draft
from transformers_prism.cli.options import DraftOption, TargetOption, report_file, user_errors
from transformers_prism.configuration_prism import num_target_layers
from transformers_prism.decoding.target_support import hidden_state
from transformers_prism.hub.files import weights_sha256
from transformers_prism.target import load_target
from transformers_prism.training.alignment import aligned_forward, history_mask
from transformers_prism.transformers_names import cache_argument, output_embeddings, takes_logits_to_keep
from transformers_prism.whole_files import write_json

_TASKS = ("summarization", "rag")
_QUESTION = "Summarize the text above."
# Positions are counted in these parts: up to 128, to 256, and so on.
_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192)
_ROWS_AT_ONCE = 512


def documents(records: list[dict], tokenizer, num_documents: int, num_tokens: int) -> list[list[int]]:
    """Tokens of texts that share nothing, each of at least `num_tokens`.

    Raises:
        ValueError: if there is less text.
    """
    found: list[list[int]] = [[]]
    for record in records:
        if task_of(record) not in _TASKS:
            continue
        if len(found[-1]) >= num_tokens:
            found.append([])
        found[-1] += tokenizer(record["turns"][0] + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
    found = [one for one in found if len(one) >= num_tokens]
    if len(found) < num_documents:
        raise ValueError(
            f"num_documents: expected at most {len(found)}, the texts of {num_tokens} tokens that the prompts of the tasks "
            f"{', '.join(_TASKS)} make, got {num_documents}"
        )
    return found[:num_documents]


def question_about(tokenizer, document: list[int], length: int) -> torch.LongTensor:
    """A question about the end of a document, `(1, length)` or a few tokens less, the chat template included."""
    num_kept = length
    while True:
        text = tokenizer.decode(document[-num_kept:])
        input_ids = chat_inputs(tokenizer, f"{text}\n\n{_QUESTION}")["input_ids"]
        excess = input_ids.shape[1] - length
        if excess <= 0:
            return input_ids
        if num_kept <= excess:
            raise ValueError(f"lengths: expected room for a text beside the question, got {length} tokens")
        num_kept -= excess


@torch.no_grad()
def read_text(target, draft, input_ids: torch.LongTensor, max_new_tokens: int) -> KnownText:
    """Decode greedily, step by step, up to the end of the answer, keeping hidden states, so that a long prompt is read once."""
    last = num_target_layers(target.config.get_text_config())
    layer_ids = sorted({*draft.config.target_layer_ids, last})
    cache = DynamicCache(config=target.config)
    options: dict = {**cache_argument(target, cache), "use_cache": True, "output_hidden_states": layer_ids}
    if takes_logits_to_keep(target):
        options["logits_to_keep"] = 1
    ends = target.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    answer, probabilities = list[int](), list[float]()
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layer_ids}
    tokens: Any = input_ids
    for _ in range(max_new_tokens):
        outputs = target(tokens, **options)
        for layer, of_layer in states.items():
            of_layer.append(hidden_state(outputs, layer, target.config))
        probability, token = torch.softmax(outputs.logits[:, -1].float(), dim=-1).max(-1)
        answer.append(int(token))
        probabilities.append(float(probability))
        tokens = token[:, None]
        if answer[-1] in ends:
            break
    joined = {layer: torch.cat(of_layer, dim=1) for layer, of_layer in states.items()}
    return KnownText("", input_ids, answer, max_new_tokens, joined, probabilities)


@torch.no_grad()
def target_choices(target, text: KnownText) -> torch.Tensor:
    """The target's own next token at each position of the prompt but the first, `(1, T - 1)`."""
    head, last = output_embeddings(target), num_target_layers(target.config.get_text_config())
    parts = text.states[last][:, 1 : text.prompt.shape[1]].split(_ROWS_AT_ONCE, dim=1)
    return torch.cat([head(part).argmax(-1) for part in parts], dim=1)


@torch.no_grad()
def first_choices(draft, text: KnownText, wanted: torch.Tensor, num_steps: int) -> list[list[list[int]]]:
    """How often the draft's first choice is the target's (`wanted`) at positions of the prompt: for each draft step and each
    part that ends at one of `_EDGES`, hits and positions. The tokens before a position are always those of the prompt."""
    length = text.prompt.shape[1]
    token_ids: Any = text.prompt[:, 1:]
    states = text.states_of(draft.config.target_layer_ids)[:, : length - 1]
    text_rows, found = draft.text_rows(text.prompt), []
    part_of = torch.bucketize(torch.arange(1, length), torch.tensor(_EDGES), right=True)
    has_history = history_mask(length - 1, num_steps)
    for step, predictions in enumerate(aligned_forward(draft, token_ids, states, num_steps)):
        chosen = [draft.propose(part, 1, text_rows)[0][..., 0] for part in predictions.split(_ROWS_AT_ONCE, dim=1)]
        is_hit = (torch.cat(chosen, 1) == wanted)[0] & has_history[step]
        counts = [torch.bincount(part_of[rows], minlength=len(_EDGES) + 1) for rows in (is_hit, has_history[step])]
        found.append(torch.stack(counts, dim=1)[: len(_EDGES)].tolist())
    return found


def _committed(draft, text: KnownText, tree: str) -> list[int]:
    """Tokens that each round of a text commits."""
    (accepted,) = rounds_of(draft, [text], tree)
    return [count + 1 for count in accepted]


def _of_windows(draft, windows: list[int], num_positions: int, run: Callable[[], list]) -> dict[str, list]:
    """What `run()` finds without a window and with each, by name; a window that hides nothing has the same as none."""
    own = draft.config.sliding_window
    found: dict[str, list] = {}
    for window in (None, *windows):
        hides = window is None or window < num_positions
        if hides:
            draft.config.sliding_window = window
        found[name_of(window)] = run() if hides else found[name_of(None)]
    draft.config.sliding_window = own
    return found


def name_of(window: int | None) -> str:
    """A window in tables."""
    return "none" if window is None else str(window)


def measure(
    target, draft, tokenizer, texts: list[list[int]], settings: dict, path: Path, weights: str | None = None
) -> dict:
    """Go through documents and lengths, the shortest first; the file is written after each.

    Args:
        texts: tokens of the documents.
        settings: `lengths`, `windows`, `trees`, `max_new_tokens` and `num_steps`.
        path: of the JSON; what it holds already is kept.
        weights: [`weights_sha256`] of the draft.
    Returns:
        `dict`: `rows`, of each document and length the `num_tokens` of its prompt, the mean `probability` of the answer's
        tokens and the `rounds` by tree and window; `positions`, of each document [`first_choices`] by window.
    """
    head = record_head("long_texts", target, settings, weights)
    found = finished_part(path, head) or {**head, "rows": [], "positions": []}
    done = {(row["document"], row["length"]) for row in found["rows"]}
    windows = settings["windows"]
    for document, tokens in enumerate(texts):
        for length in settings["lengths"]:
            if (document, length) in done:
                continue
            text = read_text(target, draft, question_about(tokenizer, tokens, length), settings["max_new_tokens"])
            row: dict = {"document": document, "length": length, "num_tokens": text.prompt.shape[1]}
            row["probability"] = sum(text.probabilities) / len(text.probabilities)
            row["rounds"] = {
                tree: _of_windows(draft, windows, text.token_ids.shape[1], partial(_committed, draft, text, tree))
                for tree in settings["trees"]
            }
            if length == max(settings["lengths"]):
                run = partial(first_choices, draft, text, target_choices(target, text), settings["num_steps"])
                of_windows = _of_windows(draft, windows, text.prompt.shape[1], run)
                found["positions"].append({"document": document, **of_windows})
            found["rows"].append(row)
            write_json(path, found)
    return found


def taus(found: dict, tree: str) -> dict[str, dict[int, float]]:
    """Committed tokens per round of a tree, pooled over documents, by window and length."""
    pooled: dict = defaultdict(lambda: defaultdict(list))
    for row in found["rows"]:
        for window, rounds in row["rounds"][tree].items():
            pooled[window][row["length"]] += rounds
    return {
        window: {length: sum(rounds) / len(rounds) for length, rounds in sorted(by_length.items()) if rounds}
        for window, by_length in pooled.items()
    }


def shares_by_position(found: dict, step: int) -> dict[str, dict[int, float]]:
    """How often a draft step's first choice is the target's, pooled over documents, by window and part of the text."""
    shares: dict = {}
    for window in (name_of(one) for one in (None, *found["settings"]["windows"])):
        counts = torch.tensor([one[window][step] for one in found["positions"]]).sum(0)  # [parts, 2]
        shares[window] = {edge: hits / num for edge, (hits, num) in zip(_EDGES, counts.tolist(), strict=True) if num}
    return shares


def series_of(found: dict) -> dict[str, dict[str, dict[int, float]]]:
    """What is shown, by title: values by window, and by length or part of the text."""
    series = {f"tau, tree {tree}": taus(found, tree) for tree in found["settings"]["trees"]}
    if found["positions"]:
        for step in range(found["settings"]["num_steps"]):
            series[f"first choices of draft step {step}, up to position"] = shares_by_position(found, step)
    return series


def mean_probabilities(found: dict) -> dict[int, float]:
    """Mean probability that the target gave its own tokens, by length of the prompt."""
    probabilities = defaultdict(list)
    for row in found["rows"]:
        probabilities[row["length"]].append(row["probability"])
    return {length: sum(values) / len(values) for length, values in sorted(probabilities.items())}


def words_of(found: dict) -> str:
    """What stands above the tables."""
    num_texts = len({row["document"] for row in found["rows"]})
    probabilities = ", ".join(f"{value:.2f} at {length}" for length, value in mean_probabilities(found).items())
    return (
        f"A summary is asked for of the last tokens of {num_texts} texts, which Spec-Bench's summaries and passages make: "
        f"{found['settings']['max_new_tokens']} new tokens, greedy, by length of the prompt, with sliding windows that the draft "
        "was not trained with. Then how often the draft's first choice is the target's in the longest of these prompts, by "
        f"position. The target gave its own tokens a probability of {probabilities} tokens. Nothing was timed."
    )


def table_of(title: str, values: dict[str, dict[int, float]]) -> str:
    """A row per window."""
    columns = sorted({column for one in values.values() for column in one})
    rows = [[window, *(f"{one[column]:.3f}" if column in one else "" for column in columns)] for window, one in values.items()]
    return markdown_table([title, *map(str, columns)], rows)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])


@app.command("measure")
def measure_command(
    prompts: Annotated[Path, typer.Argument(help="Spec-Bench's prompts")],
    output: Annotated[Path, typer.Argument(help="JSON of the figures; a run that was interrupted is resumed")],
    target: TargetOption = None,
    draft: DraftOption = None,
    num_documents: Annotated[int, typer.Option(min=1, help="texts that share nothing")] = 12,
    length: Annotated[list[int] | None, typer.Option(min=64, help="tokens of the prompt; several")] = None,
    window: Annotated[list[int] | None, typer.Option(min=1, help="sliding windows; several")] = None,
    tree: Annotated[list[str] | None, typer.Option(help="nodes/depth/top-k; several")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="of each answer")] = 48,
    num_steps: Annotated[int, typer.Option(min=1, help="draft steps whose first choices are counted")] = 3,
) -> None:
    """Decode each document at each length, and run the draft's rounds on it with each tree and window."""
    settings: dict[str, Any] = {
        "lengths": sorted(length or [256, 1024, 2048, 4096, 7936]),
        "windows": sorted(window or [256, 512, 1024, 2048]),
        "trees": tree or ["15/4/4", "59/6/10"],
        "max_new_tokens": max_new_tokens,
        "num_steps": num_steps,
    }
    with user_errors():
        model, tokenizer = load_target(target)
        loaded = load_draft(draft or SHIPPED_DRAFT, model)
        texts = documents(read_prompts(prompts), tokenizer, num_documents, settings["lengths"][-1])
        with packed_for_cpu(model, loaded, True):
            measure(model, loaded, tokenizer, texts, settings, output, weights_sha256(draft or SHIPPED_DRAFT))
        report_file(output)


@app.command("show")
def show_command(
    figures: Annotated[Path, typer.Argument(help="of `measure`, finished or not")],
    plots: Annotated[Path | None, typer.Option(help="folder for pictures")] = None,
) -> None:
    """Print tables of what was measured: tau by length and window, and first choices by position."""
    with user_errors():
        found = json.loads(figures.read_text(encoding="utf-8"))
        tables = series_of(found)
        for title, values in tables.items():
            typer.echo(table_of(title, values) + "\n")
        typer.echo(table_of("mean probability of the target's tokens", {"": mean_probabilities(found)}))
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            for index, (title, values) in enumerate(tables.items()):
                plot_windows(plots / f"{index}.png", values, title)


if __name__ == "__main__":
    app()
