"""What a study found, drawn: tau by recipe and over the tokens of training data, acceptance by draft step."""

from pathlib import Path

from benchmarks.study_figures import (
    GROWING,
    at_common_volume,
    conditional_acceptance,
    grouped,
    pooled_tau,
    tau_interval,
)


def plot_recipes(records: list[dict], path) -> None:
    """tau of each recipe at one volume of data, see [`at_common_volume`], a panel for each tree and temperature.

    Args:
        records (`list[dict]`): of a study.
        path (`str` or path): of the PNG file.
    """
    figure, panels = _panels(at_common_volume(records))
    for axes, members in panels:
        by_recipe = {recipe: found for (recipe,), found in grouped(members, "recipe").items()}
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
    if all(len(grouped(found, "num_data_tokens")) < 2 for found in grouped(chosen, "recipe").values()):
        return
    figure, panels = _panels(chosen)
    for axes, members in panels:
        for place, ((recipe,), found) in enumerate(grouped(members, "recipe").items()):
            points = sorted((volume, one) for (volume,), one in grouped(found, "num_data_tokens").items())
            bands = [tau_interval(one) for _, one in points]
            x = [volume for volume, _ in points]
            axes.plot(x, [pooled_tau(one) for _, one in points], "o-", color=f"C{place}", label=recipe)
            axes.fill_between(x, [low for low, _ in bands], [high for _, high in bands], color=f"C{place}", alpha=0.15)
        volumes = sorted({one["num_data_tokens"] for one in members})
        axes.set(xscale="log", xlabel="tokens of training data", ylabel="tau")
        axes.set_xticks(volumes, [f"{volume:,}" for volume in volumes])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(Path(path), dpi=120)


def plot_steps(records: list[dict], path) -> None:
    """[`conditional_acceptance`] by draft step, a line for each recipe at one volume of data.

    Args:
        records (`list[dict]`): of a study.
        path (`str` or path): of the PNG file.
    """
    figure, panels = _panels(at_common_volume(records))
    for axes, members in panels:
        for place, ((recipe,), found) in enumerate(grouped(members, "recipe").items()):
            shares = conditional_acceptance(found)
            axes.plot(range(1, len(shares) + 1), shares, "o-", color=f"C{place % 10}", label=recipe, alpha=0.8)
        axes.set(xlabel="draft step", ylabel="acceptance if reached", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0][0].legend(fontsize="small")
    figure.savefig(Path(path), dpi=120)


def _panels(records: list[dict]):
    """A figure with a row per tree and a column per temperature, and the records of each panel."""
    import matplotlib.figure

    trees, temperatures = grouped(records, "tree"), sorted({record["temperature"] for record in records})
    figure = matplotlib.figure.Figure(figsize=(4.5 * len(temperatures), 3.6 * len(trees)), layout="constrained")
    grid = figure.subplots(len(trees), len(temperatures), squeeze=False)
    panels = []
    for row, ((tree,), found) in enumerate(trees.items()):
        for column, temperature in enumerate(temperatures):
            grid[row][column].set_title(f"tree {tree}, temperature {temperature:g}")
            panels.append((grid[row][column], [one for one in found if one["temperature"] == temperature]))
    return figure, panels


def _point(axes, place: float, records: list[dict], **style) -> None:
    low, high = tau_interval(records)
    middle = pooled_tau(records)
    axes.errorbar(place, middle, [[max(middle - low, 0)], [max(high - middle, 0)]], fmt="o", capsize=4, **style)


__all__ = ["plot_recipes", "plot_steps", "plot_volumes"]
