"""Several ways of decoding the same prompts, in turn, in one process.

    transformers-prism bench generate --prompts spec_bench.jsonl --num-prompts 8 --json result.json
    transformers-prism bench generate --prompts spec_bench.jsonl --num-prompts 1 --max-new-tokens 16 --repeat 1

`methods.py` lists the ways of decoding, `figures.py` computes figures from the timings.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from transformers.generation import BaseStreamer

from transformers_prism.bench.methods import Contest, Method
from transformers_prism.bench.prompts import batch_rows, task_of
from transformers_prism.decoding.speculation import Speculation

# After the target was packed or unpacked, its weights are read once before anything is timed.
_TOKENS_AFTER_CHANGE = 4
_WARM_UP_TOKENS = 16


@dataclass
class Item:
    """Prompts that are decoded together, one or a batch: their ids, their task or "mixed", and inputs of generate(),
    `(B, T)`."""

    question_ids: list
    task: str
    inputs: dict


def check_batches(num_prompts: int, batch_size: int) -> None:
    """See that prompts fill their batches.

    Raises:
        ValueError: if the last batch would have fewer prompts.
    """
    if num_prompts % batch_size:
        raise ValueError(f"num_prompts: expected a multiple of the batch size {batch_size}, got {num_prompts}")


def make_items(records: list[dict], rows: list[dict], batch_size: int, pad_token_id: int) -> list[Item]:
    """Batches of prompts, in order.

    Args:
        records: in Spec-Bench's form.
        rows: inputs of generate() for each of them, `(1, T)`.
        pad_token_id: masked out, so that any id will do.
    Raises:
        ValueError: if the last batch would have fewer prompts.
    """
    check_batches(len(records), batch_size)
    items = []
    for start in range(0, len(records), batch_size):
        members = records[start : start + batch_size]
        tasks = {task_of(record) for record in members}
        task = tasks.pop() if len(tasks) == 1 else "mixed"
        inputs = batch_rows(rows[start : start + batch_size], pad_token_id)
        items.append(Item([record.get("question_id") for record in members], task, inputs))
    return items


@dataclass
class Outcome:
    """What one method did with an item.

    Args:
        num_new_tokens: of each row, up to its end.
        num_rounds, num_committed: of each row: rounds, and tokens that they committed. With a PRISM draft summed over all
            repeats, since automatic trees differ between them; else of one repeat. For assisted decoding of transformers, a
            round is one call of the streamer; for plain decoding, a token.
        num_forwards: target forwards of the whole batch after the first token, over the same repeats.
        seconds: whole generate() calls, one per repeat.
        prefill_seconds: of these, until the first token came.
        round_seconds: with a PRISM draft, per repeat, the host's seconds in "draft", "verify", "commit" and "other".
        step_counts: with a PRISM draft, per draft step: rounds of all repeats that drafted this step and accepted all steps
            before it, and how many of them accepted its token.
        is_identical: of each sequence, whether every repeat gave the tokens of the baseline's run.
        first_difference: of each row, index of the first new token that differs; None if none does.
        logit_gap: of each row, the gap between the target's two best raw logits at that token; None if none differs.
        declined: why the draft was not used; None if it was.
    """

    num_new_tokens: list[int] = field(default_factory=list)
    num_rounds: list[int] = field(default_factory=list)
    num_committed: list[int] = field(default_factory=list)
    num_forwards: int = 0
    seconds: list[float] = field(default_factory=list)
    prefill_seconds: list[float] = field(default_factory=list)
    round_seconds: list[dict[str, float]] = field(default_factory=list)
    step_counts: list[list[int]] = field(default_factory=list)
    is_identical: list[bool] = field(default_factory=list)
    first_difference: list[int | None] = field(default_factory=list)
    logit_gap: list[float | None] = field(default_factory=list)
    declined: str | None = None


@dataclass
class ItemResult:
    """An item's outcomes by the methods' names; lengths in tokens, one per row."""

    question_ids: list
    task: str
    num_prompt_tokens: list[int]
    outcomes: dict[str, Outcome]

    @classmethod
    def from_json(cls, content: dict) -> "ItemResult":
        """What [`as_json`] wrote."""
        outcomes = {name: Outcome(**outcome) for name, outcome in content["outcomes"].items()}
        return cls(content["question_ids"], content["task"], content["num_prompt_tokens"], outcomes)

    def as_json(self) -> dict:
        """Everything, for the measurement's file."""
        return asdict(self)


class TokenClock(BaseStreamer):
    """Notes when tokens come: at first the prompt, then every call of the decoding loop."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        """Called with the prompt and then with tokens."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to close."""


def bench_generate(
    contest: Contest, items: list[Item], settings: dict, repeat: int = 3, seed: int = 0, warm_up: int = 1,
    advance: Callable[[], None] = lambda: None
) -> Iterator[ItemResult]:
    """Time every method on every item; each result is yielded as soon as it is complete.

    Args:
        settings: further arguments of generate(), the same for all methods.
        repeat: how often each method is timed on each item; the methods take turns, in reverse order every second time.
        seed: set before every run, so that sampled runs can be compared.
        warm_up: how often each method decodes a few tokens of the first item beforehand, untimed.
        advance: called after every timed run.
    """
    short = {**settings, "max_new_tokens": min(_WARM_UP_TOKENS, settings["max_new_tokens"])}
    for method in contest.methods if items else []:
        contest.enter(method)
        for _ in range(warm_up):
            contest.target.generate(**items[0].inputs, **short, **contest.arguments(method))
    for item in items:
        result = ItemResult(
            item.question_ids,
            item.task,
            item.inputs["attention_mask"].sum(dim=1).tolist(),
            {method.name: Outcome() for method in contest.methods},
        )
        for repetition in range(repeat):
            outputs = {}
            for method in contest.methods[:: -1 if repetition % 2 else 1]:
                _enter(contest, method, item.inputs, settings)
                outputs[method.name] = _run(contest, method, item.inputs, settings, seed, result.outcomes[method.name])
                advance()
            for method in contest.methods:
                plain, new = outputs[method.baseline], outputs[method.name]
                _compare(contest, item.inputs, plain, new, result.outcomes[method.name])
        yield result


def _enter(contest: Contest, method: Method, inputs: dict, settings: dict) -> None:
    """Bring the target into the method's state, and warm up if that changed its weights."""
    if not contest.enter(method):
        return
    few = {**settings, "max_new_tokens": min(_TOKENS_AFTER_CHANGE, settings["max_new_tokens"])}
    # The end of each prompt is never padding.
    ends = {name: tensor[:, -8:] for name, tensor in inputs.items()}
    for other in contest.methods:
        if other.is_prepared == method.is_prepared and other.kind != "compiled":
            contest.target.generate(**ends, **few, **contest.arguments(other))


def _run(contest: Contest, method: Method, inputs: dict, settings: dict, seed: int, outcome: Outcome) -> torch.Tensor:
    """One timed generate() call; returns the new tokens on the CPU."""
    arguments = {**inputs, **settings, **contest.arguments(method)}
    clock = TokenClock()
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = contest.target.generate(**arguments, streamer=clock).cpu()  # the copy waits for the device
    outcome.seconds.append(time.perf_counter() - start)
    outcome.prefill_seconds.append(clock.times[1] - start)
    new = output[:, inputs["input_ids"].shape[1] :]
    outcome.num_new_tokens = _lengths(contest.target, new)
    if method.uses_draft:
        _note_speculation(contest.drafts[method.name].last_speculation, outcome)
        return new
    num_calls = len(clock.times) - 1
    outcome.num_forwards = num_calls - 1
    outcome.num_committed = outcome.num_new_tokens
    is_assisted = method.kind in ("lookup", "assisted")
    outcome.num_rounds = [num_calls] if is_assisted else outcome.num_new_tokens
    return new


def _note_speculation(speculation: Speculation, outcome: Outcome) -> None:
    outcome.round_seconds.append(dict(speculation.seconds))
    outcome.num_rounds = _sums(outcome.num_rounds, speculation.num_rounds)
    outcome.num_committed = _sums(outcome.num_committed, speculation.num_committed)
    outcome.num_forwards += len(speculation.trees) or max(speculation.num_rounds)
    outcome.step_counts = sum_counts([outcome.step_counts, count_steps(speculation)])
    outcome.declined = speculation.declined


def _sums(before: list[int], found: list[int]) -> list[int]:
    return list(map(sum, zip(before, found, strict=True))) if before else list(found)


def sum_counts(parts: list[list[list[int]]]) -> list[list[int]]:
    """Counts by draft step, as in [`Outcome`], of several measurements together."""
    deepest = max(map(len, parts), default=0)
    return [[sum(part[step][i] for part in parts if len(part) > step) for i in (0, 1)] for step in range(deepest)]


def count_steps(speculation: Speculation) -> list[list[int]]:
    """How often each draft step was reached and accepted, as in [`Outcome`]; in a batch, by sequences in every round."""
    counts: list[list[int]] = []
    for accepted in speculation.accepted_per_round:
        if len(accepted) != len(speculation.trees):
            continue
        for num_accepted, tree in zip(accepted, speculation.trees, strict=True):
            reached = min(num_accepted + 1, tree.num_steps)
            counts += [[0, 0] for _ in range(reached - len(counts))]
            for step in range(reached):
                counts[step][0] += 1
                counts[step][1] += num_accepted > step
    return counts


def _lengths(target, new: torch.Tensor) -> list[int]:
    """New tokens of each sequence, up to and including its end token."""
    end_ids = target.generation_config.eos_token_id
    if end_ids is None:
        return [new.shape[1]] * new.shape[0]
    is_end = torch.isin(new, torch.tensor(end_ids))
    return [int(row.nonzero()[0]) + 1 if row.any() else new.shape[1] for row in is_end]


def _compare(contest: Contest, inputs: dict, plain: torch.Tensor, new: torch.Tensor, outcome: Outcome) -> None:
    """Note for each sequence whether it equals the baseline's; the first repeat that differs counts."""
    num_rows = new.shape[0]
    if not outcome.is_identical:
        outcome.is_identical, outcome.first_difference = [True] * num_rows, [None] * num_rows
        outcome.logit_gap = [None] * num_rows
    for row in range(num_rows):
        shared = min(plain.shape[1], new.shape[1])
        differing = (plain[row, :shared] != new[row, :shared]).nonzero().flatten()
        if not len(differing) and len(_trimmed(contest, plain[row])) == len(_trimmed(contest, new[row])):
            continue
        if outcome.is_identical[row]:
            position = int(differing[0]) if len(differing) else shared
            prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            text = torch.cat((prompt, plain[row, :position].to(prompt.device)))
            outcome.is_identical[row], outcome.first_difference[row] = False, position
            outcome.logit_gap[row] = _logit_gap(contest.target, text[None])


def _trimmed(contest: Contest, new: torch.Tensor) -> torch.Tensor:
    return new[: _lengths(contest.target, new[None])[0]]


@torch.no_grad()
def _logit_gap(target, input_ids) -> float:
    """The gap between the two best next tokens in the target's raw logits: near 0, rounding decides."""
    best = target(input_ids).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
