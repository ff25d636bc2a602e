"""What a study found, in words and tables: `README.md` in its folder of records, written from them and from nothing else."""

import itertools
import math
from pathlib import Path

from benchmarks.study_figures import (
    GROWING,
    at_common_volume,
    best_rates,
    conditional_acceptance,
    grouped,
    growth_interval,
    is_sweep,
    mean_of,
    of_common_seeds,
    pooled_tau,
    ratio_interval,
    tau_after,
    tau_interval,
)
from benchmarks.tables import markdown_table
from transformers_prism.whole_files import write_text

# What the PRISM paper says: the first accepts more than the second.
PAPER_CLAIMS = tuple(("prism-m2", other) for other in ("eagle2", "hass", "eagle3", "stacked2", "stacked3"))
# Where a lead comes from: fused states, modules, the order of training, more modules, more steps in training.
ABLATIONS = (
    *(("hass-fused", "hass"), ("prism-m2", "hass-fused"), ("prism-m2", "prism-m1"), ("prism-m2", "prism-m2-last")),
    *(("prism-m2-last", "hass"), ("prism-m2-last", "stacked2")),
    *(("prism-m2", "prism-m2-scratch"), ("prism-m2-scratch", "eagle2"), ("prism-m2-scratch", "hass-fused")),
    *(("prism-m3", "prism-m2"), ("prism-m3-s5", "prism-m3"), ("prism-m4-s5", "prism-m3-s5")),
)
# Other losses of the same draft: over a part of the vocabulary, and, dropped since, draft steps weighted by what the steps before
# got right, after D-PACE (arXiv:2605.18810), Spec-AUF (arXiv:2607.01893) and Draft-OPD (arXiv:2605.29343).
_DROPPED = ("confidence", "first-miss", "rejected")
LOSSES = tuple((f"prism-m2-{way}", "prism-m2") for way in ("vocab-sample", "vocab-sample-0.1", *_DROPPED))
_LAST_COMMIT_OF_DROPPED = "befad94"
CLAIMS = (*PAPER_CLAIMS, *ABLATIONS, *LOSSES)


def verdict(low: float, high: float) -> str:
    """What an interval of a ratio says."""
    return "holds" if low > 1 else "does not hold" if high < 1 else "undecided"


def write_study_page(records: list[dict], folder: Path, command: str, step_times: dict[str, float] | None = None) -> Path:
    """Write the page.

    Args:
        records (`list[dict]`): of a study.
        folder (`Path`): of the page; the plots of the study lie in it.
        command (`str`): that made them.
        step_times (`dict`, *optional*): seconds of a training step with each loss of prism-m2 over those without.
    """
    path = folder / "README.md"
    if is_sweep(records):
        write_text(path, "\n\n".join(["# Learning rates", *_rates(records), *_terms(records, command)]) + "\n")
        return path
    chosen = at_common_volume(records)
    with_more = [found for found in _by_volume(records) if found[0]["num_data_tokens"] > chosen[0]["num_data_tokens"]]
    parts = ["# Recipes on equal terms", *_findings(records, [*with_more, chosen]), *_terms(records, command)]
    parts += [*_ordering(chosen), "![tau by recipe](tau_by_recipe.png)", *_losses(records, chosen, step_times or {})]
    parts += [*_steps(chosen), "![acceptance by draft step](acceptance_by_step.png)"]
    for found in with_more:
        parts += [*_ordering(found), *_steps(found)]
    write_text(path, "\n\n".join([*parts, *_growth(records)]) + "\n")
    return path


def _by_volume(records: list[dict]) -> list[list[dict]]:
    """Records of each volume of data, the largest first."""
    by_volume = grouped(records, "num_data_tokens")
    return [by_volume[volume] for volume in sorted(by_volume, reverse=True)]


def _findings(records: list[dict], of_volumes: list[list[dict]]) -> list[str]:
    """The paper's claims in a line each: whether they hold, by how much, how sure; at the volume with most recipes, and at larger
    ones."""
    parts = []
    for chosen in of_volumes:
        lines = _compared(chosen, PAPER_CLAIMS, "{} commits more tokens a round than {}")
        if lines:
            parts += [f"With {_written(chosen[0]['num_data_tokens'])} tokens of training each:", "\n".join(lines)]
    growth = [line for other in GROWING for line in _gains(records, "prism-m2", other)]
    if growth:
        parts += ["With more tokens:", "\n".join(growth)]
    if parts:
        head = (
            "What the paper claims. Figures are ratios of tau, all trees and temperatures together, with intervals of 95 %; the tables "
            "below have each by itself."
        )
        parts = [head, *parts]
    for chosen in of_volumes:
        sources = _compared(chosen, ABLATIONS, "{} over {}")
        if sources:
            parts += [f"Where a lead comes from, with {_written(chosen[0]['num_data_tokens'])} tokens:", "\n".join(sources)]
    return parts


def _compared(chosen: list[dict], claims: tuple, told: str) -> list[str]:
    lines = []
    for better, worse in claims:
        ways = list(_ways(chosen, better, worse).values())
        if ways:
            lines.append(f"- {told.format(better, worse)}: {_told(ways, *ratio_interval(*ways))}")
    return lines


def _gains(records: list[dict], recipe: str, other: str) -> list[str]:
    """What each further volume of data adds, compared with what it adds to another recipe."""
    lines = []
    for volumes, ways in _growing_ways(records, recipe, other):
        told = _told(ways, *growth_interval(*ways))
        lines.append(f"- {recipe} gains more from {_written(volumes[0])} instead of {_written(volumes[1])} tokens than {other}: {told}")
    return lines


def _written(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _told(ways: list[tuple], ratio: float, low: float, high: float) -> str:
    num_seeds = len(ways[0][0])
    seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
    return f"**{verdict(low, high)}**, {ratio:.3f} times ({low:.3f} to {high:.3f}; {seeds})"


def _ways(chosen: list[dict], better: str, worse: str) -> dict[tuple, tuple]:
    """For each tree and temperature the records of two recipes, of those seeds that both have in all of them."""
    found = {
        way: [[one for one in members if one["recipe"] == name] for name in (better, worse)]
        for way, members in grouped(chosen, "tree", "temperature").items()
    }
    found = {way: sides for way, sides in found.items() if all(sides)}
    common = of_common_seeds(*(side for sides in found.values() for side in sides))
    pairs = zip(common[::2], common[1::2], strict=True)
    return {way: sides for way, sides in zip(found, pairs, strict=True) if sides[0]}


def _growing_ways(records: list[dict], recipe: str, other: str) -> list[tuple[tuple[int, int], list[tuple]]]:
    """For each pair of neighbouring volumes that both recipes were trained with: the pair, larger volume first, and the records
    for each tree and temperature. The largest volumes come first."""
    both = [[one for one in records if one["recipe"] == name] for name in (recipe, other)]
    volumes = sorted(set.intersection(*({one["num_data_tokens"] for one in side} for side in both)), reverse=True)
    found = []
    for pair in itertools.pairwise(volumes) if recipe != other else ():
        ways = [
            [
                [one for one in members if (one["recipe"], one["num_data_tokens"]) == (name, volume)]
                for name in (recipe, other)
                for volume in pair
            ]
            for members in grouped(records, "tree", "temperature").values()
        ]
        common = of_common_seeds(*(side for way in ways if all(way) for side in way))
        alike = [tuple(common[first : first + 4]) for first in range(0, len(common), 4) if common[first]]
        if alike:
            found.append((pair, alike))
    return found


def _terms(records: list[dict], command: str) -> list[str]:
    one = records[0]
    seeds = sorted({record["seed"] for record in records})
    machines = sorted({record["hardware"] for record in records})
    way = "the target decoded {} with it" if one["coupled"] else "each draft was led along what the target writes to {}"
    prompts = f"the same {one['num_prompts']} prompts, {one['max_new_tokens']} new tokens each"
    epochs = " or ".join(f"{number:g}" for number in sorted({record["epochs"] for record in records}))
    dtypes = " or ".join(sorted({record["compute_dtype"] for record in records}))
    return [
        "## How it was measured",
        "\n".join(
            [
                f"- **Training**: each recipe from random weights on the first tokens of the same data, {epochs} "
                f"epoch{'' if epochs == '1' else 's'} in all, in {dtypes}, with the best learning rate of a sweep of its own; variants of prism-m2's "
                "losses take prism-m2's. Seeds: "
                f"{', '.join(map(str, seeds))}; {' and '.join(machines)}. Seconds are those of one thread beside other runs.",
                f"- **Decoding**: {way.format(prompts)}, in trees of a fixed size (nodes/depth/top-k) and without n-grams.",
                "- **tau** is committed tokens per round, the target's own token included, pooled over rounds, the mean of the seeds.",
                "- **Intervals** are of 95 % by bootstrap over seeds and prompts; with one seed they leave out what another seed of "
                "training would change.",
                "- **Verdicts**: a claim *holds* if the whole interval of the ratio lies above 1, *does not hold* if it lies below, and "
                "is *undecided* otherwise. Of many that are decided, some are so by chance.",
                "- So little training tells recipes apart by what they learn first, not by what they end with.",
            ]
        ),
        f"```\n{command}\n```",
        "Recipes, volumes and seeds that it does not name were trained by the same command with theirs.",
    ]


def _rates(records: list[dict]) -> list[str]:
    """tau of each recipe by learning rate, the best in bold."""
    best, rates = best_rates(records), sorted({record["learning_rate"] for record in records})
    rows, at_edge = [], []
    for (recipe,), members in sorted(grouped(records, "recipe").items()):
        taus = {rate: pooled_tau(found) for (rate,), found in grouped(members, "learning_rate").items()}
        cells = {rate: f"**{tau:.3f}**" if rate == best[recipe] else f"{tau:.3f}" for rate, tau in taus.items()}
        rows.append([recipe, *(cells.get(rate, "") for rate in rates)])
        if best[recipe] in (min(taus), max(taus)):
            at_edge.append(recipe)
    edge = f"The best is the lowest or highest that was tried for {', '.join(at_edge)}." if at_edge else ""
    return [
        "tau by recipe and learning rate of the stages before the split; the split stage has a quarter of it, or all of it where no "
        f"stage comes before. {edge}".strip(),
        markdown_table(["recipe", *(f"{rate:g}" for rate in rates)], rows),
    ]


def _ordering(chosen: list[dict]) -> list[str]:
    rows = []
    for (tree, temperature), members in grouped(chosen, "tree", "temperature").items():
        for (recipe,), found in grouped(members, "recipe").items():
            low, high = tau_interval(found)
            rows.append(
                [
                    recipe,
                    tree,
                    f"{temperature:g}",
                    f"{pooled_tau(found):.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{found[0]['learning_rate']:g}",
                    *(str(round(mean_of(found, name))) for name in ("tokens_seen", "train_seconds")),
                    f"{mean_of(found, 'share_of_answers_in_a_loop'):.2f}",
                ]
            )
    heading = [
        "recipe",
        "tree",
        "temperature",
        "tau",
        "95 %",
        "rate",
        "tokens seen",
        "training seconds",
        "answers in a loop",
    ]
    claims = []
    for better, worse in CLAIMS:
        ways = _ways(chosen, better, worse)
        rows_of_claim: dict[tuple, tuple] = {way: (sides,) for way, sides in ways.items()}
        if len(ways) > 1:
            rows_of_claim = {("all", "all"): tuple(ways.values()), **rows_of_claim}
        for (tree, temperature), sides in rows_of_claim.items():
            ratio, low, high = ratio_interval(*sides)
            told = temperature if temperature == "all" else f"{temperature:g}"
            row = [f"{better} over {worse}", tree, told, str(len(sides[0][0])), f"{ratio:.3f}"]
            claims.append([*row, f"{low:.3f} to {high:.3f}", verdict(low, high)])
    parts = [
        f"## With {chosen[0]['num_data_tokens']} tokens of data",
        markdown_table(heading, rows),
    ]
    if claims:
        parts.append(
            markdown_table(["claim", "tree", "temperature", "seeds", "ratio of tau", "95 %", "found"], claims)
        )
    return parts


def _losses(records: list[dict], chosen: list[dict], step_times: dict[str, float]) -> list[str]:
    """What other losses bring, at equal tokens and, where the seconds of their steps are known, at equal seconds."""
    rows = []
    for way, plain in LOSSES:
        ways = _ways(chosen, way, plain)
        if not ways:
            continue
        sides = list(ways.values())
        ratio, low, high = ratio_interval(*sides)
        row = [way, str(len(sides[0][0])), f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", verdict(low, high)]
        step_time, by_seconds = step_times.get(way.removeprefix(f"{plain}-")), None
        if step_time is not None:
            by_seconds = _at_equal_seconds([one for one in records if one["recipe"] == plain], ways, step_time)
        figures = ((step_time, ".2f"), (by_seconds, ".3f"))
        rows.append([*row, *("" if value is None else f"{value:{form}}" for value, form in figures)])
    if not rows:
        return []
    heading = ["loss", "seeds", "at equal tokens", "95 %", "more tokens a round", "seconds of a step", "at equal seconds"]
    dropped = [name for name in _DROPPED if any(row[0].endswith(name) for row in rows)]
    told = f" `train` no longer has {', '.join(dropped)}; commit {_LAST_COMMIT_OF_DROPPED} was the last that did."
    return [
        "## Ways to learn more from a token",
        f"Ratios over {LOSSES[0][1]}, all trees and temperatures together. Seconds of a step are measured in turn "
        "(`python -m benchmarks.training`). At equal seconds, it has what the line between its volumes of data, over the logarithm of "
        f"their seconds, gives for those that the other takes.{told if dropped else ''}",
        markdown_table(heading, rows),
    ]


def _at_equal_seconds(plain: list[dict], ways: dict[tuple, tuple], step_time: float) -> float | None:
    """tau over what the plain recipe reaches in the same seconds, the geometric mean over ways of decoding; None if that is
    unknown. `step_time` is the seconds of a training step over those of the plain recipe."""
    logs = []
    for (tree, temperature), (found, others) in ways.items():
        of_way = [one for one in plain if (one["tree"], one["temperature"]) == (tree, temperature)]
        tau = tau_after(mean_of(others, "train_seconds") * step_time, of_way)
        if tau is None:
            return None
        logs.append(math.log(pooled_tau(found) / tau))
    return math.exp(sum(logs) / len(logs))


def _steps(chosen: list[dict]) -> list[str]:
    """Conditional acceptance of each recipe by draft step."""
    rows = [
        [recipe, tree, f"{temperature:g}", *(f"{share:.2f}" for share in conditional_acceptance(found))]
        for (recipe, tree, temperature), found in grouped(chosen, "recipe", "tree", "temperature").items()
    ]
    return [
        f"## Acceptance by draft step, with {chosen[0]['num_data_tokens']} tokens",
        "Share of the rounds in which a token of a draft step was accepted, among those that accepted one of the step before. Each "
        "recipe's later steps are of the rounds that came so far with it, which are easier ones where fewer do.",
        _table_of_steps(["recipe", "tree", "temperature"], rows),
        *_step_ratios(chosen),
    ]


def _step_ratios(chosen: list[dict]) -> list[str]:
    """Conditional acceptance of prism-m2 over that of others, step by step, all ways of decoding and seeds together."""
    rows = []
    for better, worse in PAPER_CLAIMS:
        ways = _ways(chosen, better, worse).values()
        own, others = (conditional_acceptance([one for way in ways for one in way[side]]) for side in (0, 1))
        if own:
            ratios = (f"{one / other:.3f}" if other else "" for one, other in zip(own, others, strict=False))
            rows.append([f"{better} over {worse}", *ratios])
    return ["All ways of decoding together, as ratios:", _table_of_steps([""], rows)] if rows else []


def _table_of_steps(heading: list[str], rows: list[list[str]]) -> str:
    """A table with the columns of the heading, then one per draft step; some rows reach fewer steps."""
    width = max(map(len, rows))
    steps = [f"step {step}" for step in range(1, width - len(heading) + 1)]
    return markdown_table([*heading, *steps], [[*row, *[""] * (width - len(row))] for row in rows])


def _growth(records: list[dict]) -> list[str]:
    chosen = [record for record in records if record["recipe"] in GROWING]
    volumes = sorted({record["num_data_tokens"] for record in chosen})
    if len(volumes) < 2:
        return []
    rows = []
    for (recipe, tree, temperature), members in grouped(chosen, "recipe", "tree", "temperature").items():
        by_volume = {volume: found for (volume,), found in grouped(members, "num_data_tokens").items()}
        cells = []
        for volume in volumes:
            found = by_volume.get(volume, [])
            cells.append(_with_interval(pooled_tau(found), *tau_interval(found)) if found else "")
        last, before = of_common_seeds(*(by_volume.get(volume, []) for volume in volumes[:-3:-1]))
        cells.append(_with_interval(*ratio_interval((last, before))) if last else "")
        rows.append([recipe, tree, f"{temperature:g}", *cells])
    heading = [
        "recipe",
        "tree",
        "temperature",
        *(f"{volume} tokens" for volume in volumes),
        "the last over the one before",
    ]
    return [
        "## How tau grows with the data",
        markdown_table(heading, rows),
        "![tau over the data](tau_over_volume.png)",
        *_equal_seconds(chosen, volumes[-1]),
    ]


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _equal_seconds(records: list[dict], most_tokens: int) -> list[str]:
    """What recipes reach in the time that the quickest takes with the most data."""
    largest = [one for one in records if one["num_data_tokens"] == most_tokens]
    seconds = min(mean_of(found, "train_seconds") for found in grouped(largest, "recipe").values())
    rows = []
    for (recipe, tree, temperature), members in grouped(records, "recipe", "tree", "temperature").items():
        tau = tau_after(seconds, members)
        if tau is not None:
            rows.append([recipe, tree, f"{temperature:g}", f"{tau:.3f}"])
    return [
        f"At equal training time: tau after {seconds:.0f} seconds, which the quickest of them takes with the most data; of "
        "the others it is read off the line between two volumes, over the logarithm of their seconds.",
        markdown_table(["recipe", "tree", "temperature", "tau"], rows),
    ]


__all__ = ["CLAIMS", "PAPER_CLAIMS", "verdict", "write_study_page"]
