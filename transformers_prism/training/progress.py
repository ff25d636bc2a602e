"""What a training run shows: a table of its figures with the time left, and curves at the end."""

import re
import statistics
from pathlib import Path

from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from transformers_prism.decoding.transfer import clock
from transformers_prism.training.progress_bar import ProgressBar
from transformers_prism.whole_files import whole_file

# Columns of the log and their labels; a column with one value per draft step shows all of them.
_COLUMNS = {
    "loss": "loss",
    "token_loss": "token loss by step",
    "acceptance_loss": "acceptance loss by step",
    "hidden_loss": "hidden loss by step",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}
_VALIDATION = {
    "eval_agreement": "top-1 accuracy by step",
    "eval_acceptance": "acceptance of a drawn token by step",
    "eval_tau": "tau",
    "eval_conditional": "conditional acceptance by step",
    "eval_speedup_estimate": "speed-up",
    "eval_loop_share": "share of answers in a loop",
}


class TrainingLog(TrainerCallback):
    """A table of a stage's figures, with one row per log entry and one line per validation, above a bar with the time left."""

    def __init__(self, title: str, console: Console | None = None):
        self.title, self.console = title, console
        self.bar: ProgressBar | None = None
        self.head = ""

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the bar."""
        self.bar = ProgressBar(
            self.title, state.max_steps, "updates", state.global_step, self.console, state.is_world_process_zero
        ).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        self.bar.update(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar; the table stays."""
        self.bar.__exit__()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print a row of the table, or the figures of a validation."""
        logs = logs or {}
        if self.bar is None:
            return
        if "loss" in logs:
            cells = {"update": str(state.global_step), **_cells(logs, _COLUMNS)}
            widths = [max(len(name), len(text), 10) for name, text in cells.items()]
            head = "  ".join(name.rjust(width) for name, width in zip(cells, widths, strict=True))
            if head != self.head:
                self.bar.print(head)
                self.head = head
            self.bar.print("  ".join(text.rjust(width) for text, width in zip(cells.values(), widths, strict=True)))
        elif any(name.startswith("eval_") for name in logs):
            told = "; ".join(f"{name} {text}" for name, text in _cells(logs, _VALIDATION).items())
            self.bar.print(f"validation at update {state.global_step}: {told}")


def _cells(logs: dict, columns: dict[str, str]) -> dict[str, str]:
    """Name and text of each column that a log has figures for."""
    cells = {}
    for prefix, label in columns.items():
        names = [prefix] if prefix in logs else [name for name in logs if re.fullmatch(rf"{prefix}_\d+", name)]
        if names:
            cells[label] = " ".join(f"{float(logs[name]):.4g}" for name in names)
    return cells


class UpdateClock(TrainerCallback, ExportableState):
    """Seconds spent in updates, including the hidden states of their batches, over a run and its resumptions. Validation
    and checkpoints are not counted."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.started = seconds, 0.0

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_epoch_begin(self, args, state, control, **kwargs):
        """The first batches are fetched next."""
        self.started = clock(args.device)

    # The clock restarts after a validation or a checkpoint, so that neither counts.
    on_evaluate = on_save = on_epoch_begin

    def on_step_end(self, args, state, control, **kwargs):
        """An update ends, and the batches of the next one are fetched."""
        now = clock(args.device)
        self.seconds, self.started = self.seconds + now - self.started, now


def smoothed(line: list[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """Running mean: each point with the points before it, over a window of this share of all points, at least two."""
    width = max(2, round(share * len(line)))
    values = [y for _, y in line]
    means = (statistics.mean(values[max(0, place + 1 - width) : place + 1]) for place in range(len(values)))
    return [(x, mean) for (x, _), mean in zip(line, means, strict=True)]


def plot_curves(results: list[dict], path) -> None:
    """Loss, top-1 accuracy and, where it was measured, tau over the tokens seen, all stages one after the other, as a
    PNG file.

    The loss is drawn pale as logged and dark as a running mean. Validations are joined across stages. A figure that
    never changes, such as a share of loops that is always 0, gets no panel. `results` holds each stage's `history`,
    `num_updates` and `tokens_seen`.
    """
    import matplotlib.figure

    panels = {
        "loss": "training loss",
        "eval_agreement_0": "validation: top-1 accuracy of step 0",
        "eval_tau": "validation: tau",
        "eval_loop_share": "validation: share of answers in a loop",
    }
    points: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in panels}
    seen = 0
    for result in results:
        per_update = result["tokens_seen"] / max(result["num_updates"], 1)
        for name, lines in points.items():
            values: dict[int, float] = {}
            for entry in result["history"]:
                # The kept checkpoint may be validated again, logged at the last update: the first value of an update counts.
                if name in entry:
                    values.setdefault(entry["step"], entry[name])
            lines.append([((seen + step * per_update) / 1e6, value) for step, value in values.items()])
        seen += result["tokens_seen"]
    shown = [name for name, lines in points.items() if len({y for line in lines for _, y in line}) > 1] or ["loss"]
    figure = matplotlib.figure.Figure(figsize=(5 * len(shown), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        if name == "loss":
            for place, (result, line) in enumerate(zip(results, points[name], strict=True)):
                if line:
                    axes.plot(*zip(*line, strict=True), color=f"C{place % 10}", alpha=0.25)
                    axes.plot(*zip(*smoothed(line), strict=True), color=f"C{place % 10}", label=result["stage"]["name"])
            if any(points[name]):  # a short run may have logged nothing
                axes.legend()
        else:
            joined = [point for line in points[name] for point in line]
            axes.plot(*zip(*joined, strict=True), color="black", marker=".")
        axes.set(xlabel="million tokens seen", title=panels[name])
    with whole_file(Path(path)) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
