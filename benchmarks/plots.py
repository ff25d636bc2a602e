"""The pictures of measurements, as small PNG files; the same figures give the same files."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers_prism.bench.rounds import PARTS

_COLOURS = ("#33658a", "#f26419", "#55a630", "#7b4b94", "#e0a100", "#c9184a", "#2a9d8f", "#6c584c")
# A method has the same colour in every picture; one that is not listed gets a colour from above by a hash of its name.
_METHOD_COLOURS = {
    "auto": "#33658a",
    "auto-no-ngrams": "#86bbd8",
    "chain": "#e0a100",
    "static:10,6,59": "#55a630",
    "static:4,4,15": "#8ac926",
    "static:3,3,7": "#c5e59a",
    "static": "#3a7d22",
    "lookup": "#7b4b94",
    "assisted": "#c9184a",
    "compiled": "#6c584c",
}
_GREY = "#8d99ae"


def colour_of(method: str) -> str:
    """The colour of a method of `bench generate`, the same in every picture."""
    return _METHOD_COLOURS.get(method) or _COLOURS[zlib.crc32(method.encode()) % len(_COLOURS)]


@contextmanager
def _figure(path: Path, width: float = 7.2, height: float = 3.6, num_panels: int = 1) -> Iterator:
    """Axes to draw on; the file is written at the end.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("expected matplotlib for the plots, got none; pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    yield panels
    # Without the library's version.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_tasks(path: Path, figures: dict, baseline: str, title: str) -> None:
    """Bars of tokens per second over a baseline, per task and for all, a colour per method.

    Args:
        figures: a measurement's "methods".
    """
    names = [name for name in figures if name not in figures[baseline]["summary"]["over"]]
    tasks = list(figures[baseline]["tasks"])
    with _figure(path, width=max(7.2, 1.1 + 0.22 * len(names) * (len(tasks) + 1))) as (axes,):
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            parts = [*(figures[name]["tasks"][task] for task in tasks), figures[name]["summary"]]
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(parts))]
            ratios = [one["over"][baseline]["ratio"] for one in parts]
            bars = axes.bar(places, ratios, 0.92 * width, label=name, color=colour_of(name))
            if len(names) <= 3:
                axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1.0, color=_GREY, linewidth=1)
        axes.set_xticks(range(len(tasks) + 1), [*(task.replace("_", "\n") for task in tasks), "all"], fontsize=8)
        axes.set_ylabel(f"tokens/s over {baseline}")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        axes.figure.legend(fontsize=7, frameon=False, ncols=min(len(names), 6), loc="outside lower center")


def plot_series(path: Path, series: dict[str, list[tuple[float, float]]], label: str, baseline: str) -> None:
    """Lines of tokens per second over a baseline against a setting, a line per method.

    Args:
        series: by method, pairs of setting and ratio, in order.
        label: what the setting is.
    """
    with _figure(path) as (axes,):
        values = sorted({x for pairs in series.values() for x, _ in pairs})
        for name, pairs in series.items():
            places = [values.index(x) for x, _ in pairs]
            axes.plot(places, [ratio for _, ratio in pairs], marker="o", label=name, color=colour_of(name))
        axes.axhline(1.0, color=_GREY, linewidth=1)
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.set(xlabel=label, ylabel=f"tokens/s over {baseline}")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)


def plot_rounds(path: Path, profiles: list[dict], labels: list[str]) -> None:
    """A bar per profile: milliseconds of a round's parts, and a line at the plain step."""
    with _figure(path, height=1.5 + 0.6 * len(profiles)) as (axes,):
        left = [0.0] * len(profiles)
        for index, part in enumerate(PARTS):
            widths = [one["parts_ms"][part] for one in profiles]
            axes.barh(labels, widths, left=left, height=0.62, label=part, color=_COLOURS[index])
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, one in enumerate(profiles):
            axes.plot([one["step_ms"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.5)
            axes.text(left[place], place, f" {one['round_ms']:.1f} ms", va="center", fontsize=8)
        axes.plot([], [], color="black", linewidth=1.5, label="a plain step")
        axes.grid(axis="y", alpha=0)
        axes.grid(axis="x", alpha=0.25)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds of a round")
        axes.figure.legend(
            *axes.get_legend_handles_labels(), fontsize=7, frameon=False, ncols=4, loc="outside upper center"
        )


def plot_scaling(path: Path, axes_figures: dict) -> None:
    """A panel per axis: medians of a round and of a plain step, with their quartiles."""
    labels = {
        "modules": "processing modules M",
        "nodes": "nodes of the tree",
        "context": "context (tokens)",
        "batch": "sequences",
    }
    with _figure(path, width=2.9 * len(axes_figures), height=3.0, num_panels=len(axes_figures)) as panels:
        for axes, (axis, members) in zip(panels, axes_figures.items(), strict=True):
            places = range(len(members))
            for index, kind in enumerate(("round", "step")):
                low, high = ([one[f"{kind}_quartiles"][end] for one in members] for end in (0, 1))
                name = "round" if kind == "round" else "plain step"
                medians = [one[f"{kind}_median"] for one in members]
                axes.plot(places, medians, marker="o", markersize=4, label=name, color=_COLOURS[index])
                axes.fill_between(places, low, high, alpha=0.2, color=_COLOURS[index])
            axes.set_xticks(places, [str(one["value"]) for one in members], fontsize=8)
            axes.set_xlabel(labels[axis])
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("milliseconds")
        panels[0].legend(fontsize=8, frameon=False)


def plot_windows(path: Path, series: dict[str, dict[int, float]], title: str) -> None:
    """A line per sliding window of the draft: what was measured, by length or position of the text."""
    with _figure(path) as (axes,):
        places = sorted({place for values in series.values() for place in values})
        for index, (window, values) in enumerate(series.items()):
            label = "no window" if window == "none" else f"window {window}"
            axes.plot(list(map(places.index, values)), list(values.values()), marker="o", label=label, color=_COLOURS[index])
        axes.set_xticks(range(len(places)), list(map(str, places)))
        axes.set(xlabel="tokens", ylabel=title)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)
