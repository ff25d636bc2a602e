"""Decoding with and without a draft, on the same prompts, in turn, in one process.

transformers-prism bench generate --prompts spec_bench.jsonl --num-prompts 8 --json result.json
transformers-prism bench generate --prompts spec_bench.jsonl --num-prompts 1 --max-new-tokens 16 --repeat 1
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from rich import box
from rich.table import Table

from transformers_prism.benchmark.prompts import task_of
from transformers_prism.speculation import Speculation


@dataclass
class PromptResult:
    """One prompt.

    Args:
        question_id, task: which prompt.
        num_prompt_tokens, num_new_tokens: lengths, in tokens.
        is_identical: whether every repeat with the draft gave the tokens of the plain run before it.
        first_difference: index of the first new token that differs; None if none does.
        logit_gap: there, what separates the target's two best raw logits for plain decoding; None if none differs.
        acceptance_length: tau of the prompt, the bonus included.
        num_rounds, num_committed: rounds, and tokens that they committed.
        plain_seconds, draft_seconds: whole generate() calls, one per repeat.
        round_seconds: per repeat, the host's seconds in "draft", "verify", "commit" and "other" of all rounds.
        step_counts: for draft step i, rounds whose tree was drafted deeper than i and that accepted i tokens, and how
            many of them accepted the next as well.
        declined: why the draft was not used; None if it was.
    """

    question_id: int | str | None
    task: str
    num_prompt_tokens: int
    num_new_tokens: int = 0
    is_identical: bool = True
    first_difference: int | None = None
    logit_gap: float | None = None
    acceptance_length: float = float("nan")
    num_rounds: int = 0
    num_committed: int = 0
    plain_seconds: list[float] = field(default_factory=list)
    draft_seconds: list[float] = field(default_factory=list)
    round_seconds: list[dict[str, float]] = field(default_factory=list)
    step_counts: list[list[int]] = field(default_factory=list)
    declined: str | None = None

    @property
    def ratio(self) -> float:
        """Tokens per second with the draft over plain, medians of the repeats."""
        return statistics.median(self.plain_seconds) / statistics.median(self.draft_seconds)


def bench_generate(
    target,
    tokenizer,
    draft,
    records: list[dict],
    make_inputs: Callable[..., dict],
    settings: dict,
    repeat: int = 3,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[PromptResult]:
    """Time both ways of decoding.

    Args:
        target, tokenizer, draft: the models; the draft's `generation_config` says which tree.
        records: prompts in Spec-Bench's form; the first turn is used.
        make_inputs: of (tokenizer, prompt, device), gives the inputs of generate().
        settings: further arguments of generate(), the same for both.
        repeat: how often each way is timed on each prompt; the two take turns.
        seed: set before every run, so that sampled runs can be compared.
        report: called with a line per prompt.
    """
    inputs = [make_inputs(tokenizer, record["turns"][0], target.device) for record in records]
    results = [
        PromptResult(record.get("question_id"), task_of(record), one["input_ids"].shape[1])
        for record, one in zip(records, inputs, strict=True)
    ]
    warm_up = {**settings, "max_new_tokens": min(16, settings["max_new_tokens"])}
    for assistant in ({}, {"assistant_model": draft}):
        target.generate(**inputs[0], **warm_up, **assistant)
    for index, (one, result) in enumerate(zip(inputs, results, strict=True)):
        for _ in range(repeat):
            _time_both(target, draft, one, settings, seed, result)
        report(
            f"{index + 1}/{len(results)} {result.task}: identical {result.is_identical}, "
            f"tau {result.acceptance_length:.2f}, ratio {result.ratio:.2f}"
        )
    return results


def _time_both(target, draft, inputs: dict, settings: dict, seed: int, result: PromptResult) -> None:
    plain, seconds = _run(target, inputs, settings, seed)
    result.plain_seconds.append(seconds)
    speculated, seconds = _run(target, inputs, {**settings, "assistant_model": draft}, seed)
    result.draft_seconds.append(seconds)
    speculation = draft.last_speculation
    result.round_seconds.append(dict(speculation.seconds))
    result.num_new_tokens = speculated.shape[1] - result.num_prompt_tokens
    result.num_rounds = sum(speculation.num_rounds)
    result.num_committed = sum(speculation.num_committed)
    result.acceptance_length = speculation.acceptance_length
    result.step_counts = count_steps(speculation)
    result.declined = speculation.declined
    if not torch.equal(plain, speculated) and result.is_identical:
        result.is_identical = False
        shared = min(plain.shape[1], speculated.shape[1])
        differing = (plain[0, :shared] != speculated[0, :shared]).nonzero().flatten()
        position = int(differing[0]) if len(differing) else shared
        result.first_difference = position - result.num_prompt_tokens
        result.logit_gap = _logit_gap(target, plain[:, :position])


def count_steps(speculation: Speculation) -> list[list[int]]:
    """How often each draft step was reached and accepted, in the first row, as in [`PromptResult`]."""
    counts: list[list[int]] = []
    for num_accepted, tree in zip(speculation.accepted_per_round[0], speculation.trees, strict=True):
        reached = min(num_accepted + 1, tree.num_steps)
        counts += [[0, 0] for _ in range(reached - len(counts))]
        for step in range(reached):
            counts[step][0] += 1
            counts[step][1] += num_accepted > step
    return counts


def _run(target, inputs: dict, settings: dict, seed: int):
    torch.manual_seed(seed)
    start = time.perf_counter()
    output = target.generate(**inputs, **settings).cpu()  # the copy waits for the device
    return output, time.perf_counter() - start


@torch.no_grad()
def _logit_gap(target, input_ids) -> float:
    """What separates the two best next tokens, in the target's raw logits: near 0, a rounding error decides."""
    best = target(input_ids.to(target.device)).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def summarize(results: list[PromptResult]) -> dict:
    """Figures over all prompts: tau pooled and as the mean over prompts, ms of a round, tokens/s of both ways.

    Tokens per second are all new tokens over the sum of the prompts' median seconds, prefill included. Milliseconds of
    a round are means over all rounds of all repeats; "rest" is commit and other. Range of the prompts' ratios beside it.
    """
    repeats = [len(result.plain_seconds) for result in results]
    num_rounds = sum(result.num_rounds * count for result, count in zip(results, repeats, strict=True))
    seconds = {
        phase: sum(one[phase] for result in results for one in result.round_seconds)
        for phase in ("draft", "verify", "commit", "other")
    }
    num_tokens = sum(result.num_new_tokens for result in results)
    plain, draft = (
        num_tokens / sum(statistics.median(getattr(result, name)) for result in results)
        for name in ("plain_seconds", "draft_seconds")
    )
    with_rounds = [result for result in results if result.num_rounds]
    per_round = 1000.0 / num_rounds if num_rounds else float("nan")
    nan = float("nan")
    return {
        "num_prompts": len(results),
        "num_identical": sum(result.is_identical for result in results),
        "num_declined": sum(result.declined is not None for result in results),
        "acceptance_length_pooled": sum(r.num_committed for r in results) / sum(r.num_rounds for r in results)
        if with_rounds
        else nan,
        "acceptance_length_per_prompt_mean": statistics.mean(r.acceptance_length for r in with_rounds)
        if with_rounds
        else nan,
        "round_ms": {
            "draft": seconds["draft"] * per_round,
            "verify": seconds["verify"] * per_round,
            "rest": (seconds["commit"] + seconds["other"]) * per_round,
        },
        "step_counts": _sum_counts([result.step_counts for result in results]),
        "plain_tokens_per_second": plain,
        "draft_tokens_per_second": draft,
        "ratio": draft / plain,
        "lowest_ratio": min(result.ratio for result in results),
        "highest_ratio": max(result.ratio for result in results),
    }


def _sum_counts(parts: list[list[list[int]]]) -> list[list[int]]:
    deepest = max(map(len, parts), default=0)
    return [[sum(part[step][i] for part in parts if len(part) > step) for i in (0, 1)] for step in range(deepest)]


def as_json(results: list[PromptResult]) -> dict:
    """What the JSON file holds beside the run's settings: figures over all prompts, for each task, for each prompt."""
    tasks = {result.task: [one for one in results if one.task == result.task] for result in results}
    return {
        "summary": summarize(results),
        "tasks": {task: summarize(members) for task, members in tasks.items()},
        "prompts": [{**asdict(result), "ratio": result.ratio} for result in results],
    }


def result_table(results: list[PromptResult], caption: str) -> Table:
    """A row per prompt, and one for all; "no: 33, 1e-06" is the first differing token and the target's logit gap there."""
    table = Table(caption=caption, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("\nprompt", no_wrap=True)
    names = ("\nidentical", "\ntokens", "\nrounds", "\ntau", "plain\ntok/s", "draft\ntok/s", "\nratio")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=max(4, *map(len, name.splitlines())))
    for result in results:
        plain, draft = (
            result.num_new_tokens / statistics.median(seconds)
            for seconds in (result.plain_seconds, result.draft_seconds)
        )
        table.add_row(
            f"{result.task} {result.question_id}",
            "yes" if result.is_identical else f"no: {result.first_difference}, {result.logit_gap:.0e}",
            *(str(number) for number in (result.num_new_tokens, result.num_rounds)),
            *(f"{number:.2f}" for number in (result.acceptance_length, plain, draft, result.ratio)),
        )
    total = summarize(results)
    table.add_section()
    table.add_row(
        "all (tau pooled)",
        f"{total['num_identical']} of {total['num_prompts']}",
        *(str(sum(getattr(result, name) for result in results)) for name in ("num_new_tokens", "num_rounds")),
        f"{total['acceptance_length_pooled']:.2f}",
        *(f"{total[name]:.2f}" for name in ("plain_tokens_per_second", "draft_tokens_per_second", "ratio")),
    )
    return table
