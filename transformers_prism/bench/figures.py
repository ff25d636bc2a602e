"""Figures from the timings of `bench generate`, per task and over all prompts, and tables of them.

t(step)        seconds of a plain step of the method's own target: plain decoding without its prefill, over its steps
ceiling        tau * t(step) / (t(verify) + t(draft)), the ratio if nothing else took time
ratio          tokens per second over a baseline's: all new tokens over the sum of the prompts' median seconds,
               prefill included; "decoding" leaves the prefill out on both sides
"""

import statistics

from rich import box
from rich.console import Console
from rich.table import Table

from transformers_prism.bench.generate import ItemResult, Outcome, sum_counts
from transformers_prism.bench.methods import Method
from transformers_prism.decoding.speculation import acceptance_length

_PHASES = ("draft", "verify", "commit", "other")
# Pages and cards report one method: the first of these that was measured.
_MAIN_KINDS = "auto draft static chain auto-no-ngrams assisted lookup compiled prepared plain".split()


def main_method(methods: list[Method]) -> Method:
    """The method that a measurement is mainly about, which a draft's card reports."""
    return min(methods, key=lambda method: _MAIN_KINDS.index(method.kind))


def summarize(results: list[ItemResult], method: Method, baselines: list[str]) -> dict:
    """Figures of one method over items; `baselines` are the plain methods that were measured, the method's own first.

    Returns:
        `dict`: counts of prompts, tau pooled and as the mean over prompts, milliseconds of a round, tokens per second,
            and in "over" the ratios to each baseline; those to the method's own are also at the top level. None where
            a figure does not apply.
    """
    outcomes = [result.outcomes[method.name] for result in results]
    taus = [
        tau
        for one in outcomes
        for committed, rounds in zip(one.num_committed, one.num_rounds, strict=True)
        if (tau := acceptance_length(committed, rounds)) is not None
    ]
    num_rounds = sum(sum(one.num_rounds) for one in outcomes)
    num_committed = sum(sum(one.num_committed) for one in outcomes)
    over = {name: _ratios(results, method.name, name) for name in baselines}
    own = over[method.baseline]
    figures = {
        "num_prompts": sum(len(one.num_new_tokens) for one in outcomes),
        "num_identical": sum(sum(one.is_identical) for one in outcomes),
        "num_declined": sum(one.declined is not None for one in outcomes),
        "num_new_tokens": _num_tokens(outcomes),
        "acceptance_length_pooled": acceptance_length(num_committed, num_rounds),
        "acceptance_length_per_prompt_mean": statistics.mean(taus) if taus else None,
        "step_ms": _step_ms([result.outcomes[method.baseline] for result in results]),
        "round_ms": _round_ms(outcomes),
        "step_counts": sum_counts([one.step_counts for one in outcomes]),
        "plain_tokens_per_second": _rate([result.outcomes[method.baseline] for result in results]),
        "draft_tokens_per_second": _rate(outcomes),
        "spread": max((_spread(one.seconds) for one in outcomes), default=None),
        "ratio": own["ratio"],
        "median_ratio": own["median"],
        "lowest_ratio": own["lowest"],
        "highest_ratio": own["highest"],
        "over": over,
    }
    return {**figures, **_ceiling(figures, own)}


def _ceiling(figures: dict, own: dict) -> dict:
    """The ceiling that drafting and verification of a round allow, and the share of it that was reached."""
    parts = figures["round_ms"]
    if parts is None or not parts["draft"] + parts["verify"] or figures["step_ms"] is None:
        return {"ceiling": None, "ceiling_share": None, "ceiling_share_decoding": None}
    ceiling = figures["acceptance_length_pooled"] * figures["step_ms"] / (parts["draft"] + parts["verify"])
    decoding = own["decoding"] and own["decoding"] / ceiling
    return {"ceiling": ceiling, "ceiling_share": own["ratio"] / ceiling, "ceiling_share_decoding": decoding}


def _num_tokens(outcomes: list[Outcome]) -> int:
    return sum(sum(one.num_new_tokens) for one in outcomes)


def _rate(outcomes: list[Outcome]) -> float:
    """Tokens per second, prefill included."""
    return _num_tokens(outcomes) / sum(statistics.median(one.seconds) for one in outcomes)


def _decoding_rate(outcomes: list[Outcome]) -> float | None:
    """Tokens per second without the prefill and without the one token per sequence that it gives."""
    num_tokens = _num_tokens(outcomes) - sum(len(one.num_new_tokens) for one in outcomes)
    return num_tokens / sum(map(_decoding_seconds, outcomes)) if num_tokens else None


def _decoding_seconds(outcome: Outcome) -> float:
    """Median seconds after the first token."""
    pairs = zip(outcome.seconds, outcome.prefill_seconds, strict=True)
    return statistics.median(whole - prefill for whole, prefill in pairs)


def _step_ms(outcomes: list[Outcome]) -> float | None:
    """Milliseconds of a plain step, on average."""
    num_steps = sum(one.num_forwards for one in outcomes)
    return 1000.0 * sum(map(_decoding_seconds, outcomes)) / num_steps if num_steps else None


def _round_ms(outcomes: list[Outcome]) -> dict | None:
    """Milliseconds of a round of the whole batch, on average over all rounds of all repeats; "rest" is commit and other.

    None without a draft.
    """
    with_draft = [one for one in outcomes if one.round_seconds]
    num_rounds = sum(one.num_forwards for one in with_draft)
    if not num_rounds:
        return None
    draft, verify, commit, other = (
        1000.0 * sum(seconds[phase] for one in with_draft for seconds in one.round_seconds) / num_rounds
        for phase in _PHASES
    )
    return {"draft": draft, "verify": verify, "rest": commit + other}


def _ratios(results: list[ItemResult], name: str, baseline: str) -> dict:
    ours, theirs = ([result.outcomes[one] for result in results] for one in (name, baseline))
    by_item = [_rate([one]) / _rate([other]) for one, other in zip(ours, theirs, strict=True)]
    our_decoding, their_decoding = _decoding_rate(ours), _decoding_rate(theirs)
    return {
        "ratio": _rate(ours) / _rate(theirs),
        "decoding": our_decoding / their_decoding if our_decoding and their_decoding else None,
        "median": statistics.median(by_item),
        "lowest": min(by_item),
        "highest": max(by_item),
    }


def _spread(seconds: list[float]) -> float:
    """Longest minus shortest of the repeats, over their median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def as_json(results: list[ItemResult], methods: list[Method]) -> dict:
    """What the JSON file holds besides its head: for each method, figures over all prompts and per task; each prompt.

    The figures of [`main_method`] are repeated at the top level, where a draft's card looks for them.
    """
    by_task: dict[str, list[ItemResult]] = {}
    for result in results:
        by_task.setdefault(result.task, []).append(result)
    figures = {}
    for method in methods:
        names = [other.name for other in methods if other.name == other.baseline]
        baselines = sorted(names, key=lambda name: name != method.baseline)
        figures[method.name] = {
            "summary": summarize(results, method, baselines),
            "tasks": {task: summarize(members, method, baselines) for task, members in by_task.items()},
        }
    return {
        **figures[main_method(methods).name],
        "methods": figures,
        "prompts": [result.as_json() for result in results],
    }


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def method_rows(figures: dict) -> tuple[list[str], list[list[str]]]:
    """A heading and a row per method: [`as_json`]'s "methods" as text; "\\n" separates two lines of a heading."""
    baselines = list(next(iter(figures.values()))["summary"]["over"])
    heading = ["method", "same", "tau", "mean\ntau", "draft\nms", "verify\nms", "rest\nms", "tok/s"]
    heading += [f"over\n{name}" for name in sorted(baselines)] + ["ceiling", "share"]
    rows = []
    for name, parts in figures.items():
        one = parts["summary"]
        plain_ms = {"draft": None, "verify": one["step_ms"] if name in baselines else None, "rest": None}
        round_ms = one["round_ms"] or plain_ms
        rows.append(
            [
                name,
                f"{one['num_identical']}/{one['num_prompts']}",
                *(_cell(one[f"acceptance_length_{way}"]) for way in ("pooled", "per_prompt_mean")),
                *(_cell(round_ms[part], 1) for part in ("draft", "verify", "rest")),
                _cell(one["draft_tokens_per_second"], 1),
                *(_cell(one["over"][baseline]["ratio"]) for baseline in sorted(baselines)),
                *(_cell(one[part]) for part in ("ceiling", "ceiling_share")),
            ]
        )
    return heading, rows


def task_rows(figures: dict, baseline: str) -> tuple[list[str], list[list[str]]]:
    """A heading and a row per method: its pooled ratio to a baseline by task, and for all prompts."""
    tasks = list(next(iter(figures.values()))["tasks"])
    heading = ["method", *(task.replace("_", "\n") for task in tasks), "all"]
    rows = []
    for name, parts in figures.items():
        members = [*(parts["tasks"][task] for task in tasks), parts["summary"]]
        rows.append([name, *(_cell(one["over"][baseline]["ratio"]) for one in members)])
    return heading, rows


def table_of(heading: list[str], rows: list[list[str]], caption: str) -> Table:
    """As wide as its cells: print it with `crop=False`, and a narrow terminal breaks lines instead of cutting figures off."""
    table = Table(caption=caption, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        table.add_row(*row)
    table.width = Console(width=10_000).measure(table).maximum
    return table


def result_tables(figures: dict, caption: str) -> list[Table]:
    """What `bench generate` prints at the end: all methods, and their ratios by task to each baseline."""
    baselines = sorted(next(iter(figures.values()))["summary"]["over"])
    tables = [table_of(*method_rows(figures), caption)]
    if len(next(iter(figures.values()))["tasks"]) > 1:
        tables += [table_of(*task_rows(figures, name), f"tokens/s over {name}, by task") for name in baselines]
    return tables


def differences(result: ItemResult) -> list[str]:
    """A line for each sequence that differs from its baseline."""
    return [
        f"{result.task} {result.question_ids[row]}, {name}: differs from token {outcome.first_difference[row]} on, "
        f"where the target's two best logits are {outcome.logit_gap[row]:.1e} apart"
        for name, outcome in result.outcomes.items()
        for row, is_identical in enumerate(outcome.is_identical)
        if not is_identical
    ]
