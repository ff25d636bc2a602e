"""What a study found, in words and tables: `README.md` in its folder of records, written from them and from nothing else."""

from pathlib import Path

from benchmarks.page import markdown_table
from benchmarks.study_figures import (
    GROWING,
    at_common_volume,
    grouped,
    mean_of,
    of_common_seeds,
    pooled_tau,
    ratio_interval,
    tau_after,
    tau_interval,
)
from transformers_prism.whole_files import write_text

# What the PRISM paper says, what a mistake of its training code would cost, and what the acceptance-aware loss is worth:
# the first accepts more than the second.
CLAIMS = (
    ("prism-m2", "eagle2"),
    ("prism-m2", "hass"),
    ("prism-m2", "eagle3"),
    ("prism-m2", "stacked2"),
    ("prism-m3", "prism-m2"),
    ("prism-m2", "prism-m2-compat"),
    ("prism-m2-acceptance", "prism-m2"),
)


def verdict(low: float, high: float) -> str:
    """What an interval of a ratio says."""
    return "holds" if low > 1 else "does not hold" if high < 1 else "undecided"


def write_study_page(records: list[dict], folder: Path, command: str) -> Path:
    """Write the page.

    Args:
        records (`list[dict]`): of a study.
        folder (`Path`): of the page; the plots of the study lie in it.
        command (`str`): that made them.
    """
    path = folder / "README.md"
    write_text(path, "\n\n".join([*_introduction(records, command), *_ordering(records), *_growth(records)]) + "\n")
    return path


def _introduction(records: list[dict], command: str) -> list[str]:
    one = records[0]
    seeds = sorted({record["seed"] for record in records})
    machines = sorted({record["hardware"] for record in records})
    hidden = "" if one["coupled"] else ", the random numbers of sampling hidden from the draft"
    return [
        "# Recipes on equal terms",
        f"Written by `python -m benchmarks.study` from the files beside it. Each recipe was trained from random weights on the "
        f"first tokens of the same data, then decoded the same {one['num_prompts']} prompts, {one['max_new_tokens']} new "
        f"tokens each, with fixed trees (nodes/depth/top-k) and without n-grams{hidden}. Seeds: {', '.join(map(str, seeds))}; "
        f"{' and '.join(machines)}. tau is committed tokens per round, pooled over rounds, the mean of the seeds; intervals are of "
        "95 % by bootstrap over seeds and prompts. So little training tells recipes apart by what they learn first, not by "
        "what they end with.",
        f"```\n{command}\n```",
    ]


def _ordering(records: list[dict]) -> list[str]:
    chosen = at_common_volume(records)
    ways = grouped(chosen, "tree", "temperature")
    rows = []
    for (tree, temperature), members in ways.items():
        for (recipe,), found in grouped(members, "recipe").items():
            low, high = tau_interval(found)
            rows.append(
                [
                    recipe,
                    tree,
                    f"{temperature:g}",
                    f"{pooled_tau(found):.3f}",
                    f"{low:.3f} to {high:.3f}",
                    *(str(round(mean_of(found, name))) for name in ("tokens_seen", "train_seconds")),
                    f"{mean_of(found, 'share_of_answers_in_a_loop'):.2f}",
                ]
            )
    heading = ["recipe", "tree", "temperature", "tau", "95 %", "tokens seen", "training seconds", "answers in a loop"]
    claims = []
    for better, worse in CLAIMS:
        for (tree, temperature), members in ways.items():
            by_recipe = {recipe: found for (recipe,), found in grouped(members, "recipe").items()}
            first, second = of_common_seeds(by_recipe.get(better, []), by_recipe.get(worse, []))
            if not first:
                continue
            ratio, low, high = ratio_interval(first, second)
            row = [f"{better} over {worse}", tree, f"{temperature:g}", str(len(first)), f"{ratio:.3f}"]
            claims.append([*row, f"{low:.3f} to {high:.3f}", verdict(low, high)])
    parts = [f"## With {chosen[0]['num_data_tokens']} tokens of data", markdown_table(heading, rows), "![tau by recipe](tau_by_recipe.png)"]
    if claims:
        parts += [
            "That the first accepts more than the second *holds* if the whole interval of the ratio lies above 1, *does not "
            "hold* if below, and is *undecided* otherwise:",
            markdown_table(["claim", "tree", "temperature", "seeds", "ratio of tau", "95 %", "found"], claims),
        ]
    return parts


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
        last, before = of_common_seeds(by_volume.get(volumes[-1], []), by_volume.get(volumes[-2], []))
        cells.append(_with_interval(*ratio_interval(last, before)) if last else "")
        rows.append([recipe, tree, f"{temperature:g}", *cells])
    heading = ["recipe", "tree", "temperature", *(f"{volume} tokens" for volume in volumes), "the last over the one before"]
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


__all__ = ["CLAIMS", "verdict", "write_study_page"]
