"""What a study found, drawn: tau by recipe, and tau over the tokens of training data."""

import random
from collections import defaultdict
from pathlib import Path

# Recipes whose growth with the data is drawn.
GROWING = ("eagle2", "hass", "prism-m2")
_NUM_RESAMPLES = 1000


def pooled_tau(records: list[dict]) -> float:
    """Mean over records (seeds) of tau."""
    return sum(record["tau"] for record in records) / len(records)


def tau_interval(records: list[dict], seed: int = 0) -> tuple[float, float]:
    """95 % interval of [`pooled_tau`] by bootstrap: seeds are drawn again, and each seed's prompts.

    Args:
        records (`list[dict]`): of one recipe, volume, tree and temperature, one per seed.
        seed (`int`): of the draws.
    """
    generator = random.Random(seed)
    taus = []
    for _ in range(_NUM_RESAMPLES):
        drawn = []
        for record in generator.choices(records, k=len(records)):
            answers = generator.choices(record["answers"], k=len(record["answers"]))
            drawn.append(sum(one["num_committed"] for one in answers) / max(sum(one["num_rounds"] for one in answers), 1))
        taus.append(sum(drawn) / len(drawn))
    taus.sort()
    return taus[int(0.025 * _NUM_RESAMPLES)], taus[int(0.975 * _NUM_RESAMPLES) - 1]


def at_common_volume(records: list[dict]) -> list[dict]:
    """Records of the volume of data with which most recipes were trained, the larger one of two alike."""
    by_volume = _grouped(records, "num_data_tokens")
    common = max(by_volume, key=lambda volume: (len(_grouped(by_volume[volume], "recipe")), volume))
    return by_volume[common]


def plot_recipes(records: list[dict], path) -> None:
    """tau of each recipe at one volume of data, see [`at_common_volume`], a panel for each tree and temperature.

    Args:
        records (`list[dict]`): of a study.
        path (`str` or path): of the PNG file.
    """
    figure, panels = _panels(at_common_volume(records))
    for axes, members in panels:
        by_recipe = _grouped(members, "recipe")
        for place, (recipe, found) in enumerate(by_recipe.items()):
            _point(axes, place, found, label=recipe, color=f"C{place}")
        axes.set_xticks(range(len(by_recipe)), by_recipe, rotation=40, ha="right")
        axes.set_ylabel("tau")
    figure.savefig(Path(path), dpi=120)


def plot_volumes(records: list[dict], path) -> None:
    """tau over the tokens of training data for [`GROWING`]; nothing where no recipe was trained on two volumes.

    Args:
        records (`list[dict]`): of a study.
        path (`str` or path): of the PNG file.
    """
    chosen = [record for record in records if record["recipe"] in GROWING]
    if all(len(_grouped(found, "num_data_tokens")) < 2 for found in _grouped(chosen, "recipe").values()):
        return
    figure, panels = _panels(chosen)
    for axes, members in panels:
        for place, (recipe, found) in enumerate(_grouped(members, "recipe").items()):
            points = sorted(_grouped(found, "num_data_tokens").items())
            axes.plot([x for x, _ in points], [pooled_tau(one) for _, one in points], color=f"C{place}", label=recipe)
            for volume, one in points:
                _point(axes, volume, one, color=f"C{place}")
        axes.set(xscale="log", xlabel="tokens of training data", ylabel="tau")
        axes.legend()
    figure.savefig(Path(path), dpi=120)


def _grouped(records: list[dict], name: str) -> dict:
    groups = defaultdict(list)
    for record in records:
        groups[record[name]].append(record)
    return dict(groups)


def _panels(records: list[dict]):
    """A figure with a row per temperature and a column per tree, and the records of each panel."""
    import matplotlib.figure

    trees, temperatures = _grouped(records, "tree"), sorted(_grouped(records, "temperature"))
    figure = matplotlib.figure.Figure(figsize=(4.5 * len(trees), 3.6 * len(temperatures)), layout="constrained")
    grid = figure.subplots(len(temperatures), len(trees), squeeze=False)
    panels = []
    for row, temperature in enumerate(temperatures):
        for column, (tree, found) in enumerate(trees.items()):
            grid[row][column].set_title(f"tree {tree}, temperature {temperature:g}")
            panels.append((grid[row][column], [one for one in found if one["temperature"] == temperature]))
    return figure, panels


def _point(axes, place: float, records: list[dict], **style) -> None:
    low, high = tau_interval(records)
    middle = pooled_tau(records)
    axes.errorbar(place, middle, [[max(middle - low, 0)], [max(high - middle, 0)]], fmt="o", capsize=4, **style)


__all__ = ["GROWING", "at_common_volume", "plot_recipes", "plot_volumes", "pooled_tau", "tau_interval"]
