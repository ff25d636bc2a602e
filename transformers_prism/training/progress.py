"""What a training run shows: one live view in a terminal, and curves at the end."""

import statistics
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# Figures that have one value for each draft step, and how they are called in the view.
_PER_STEP = {
    "token_loss": "token loss",
    "acceptance_loss": "acceptance loss",
    "hidden_loss": "hidden loss",
    "eval_agreement": "agreement",
    "eval_acceptance": "acceptance of a drawn token",
    "eval_conditional": "conditional acceptance",
}
_SINGLE = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "eval_tau": "tau",
    "eval_speedup_estimate": "speed-up",
    "eval_loop_share": "share of answers in a loop",
}


class LiveView(TrainerCallback):
    """The last figures of a stage in one table, with what is left of it; nothing where there is no terminal.

    Args:
        title (`str`): of the stage.
        console (`Console`, *optional*): where it is shown.
    """

    def __init__(self, title: str, console: Console | None = None):
        self.title, self.console = title, console or Console()
        self.figures: dict[str, float] = {}
        self.live: Live | None = None
        self.started, self.first_update = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the view."""
        self.started, self.first_update = time.monotonic(), state.global_step
        if self.console.is_terminal and state.is_world_process_zero:
            self.live = Live(self.render(state), console=self.console, auto_refresh=False)
            self.live.start()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Take up new figures."""
        self.figures.update(logs or {})
        self._show(state)

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar."""
        self._show(state)

    def on_train_end(self, args, state, control, **kwargs):
        """Close the view; its last state stays."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _show(self, state):
        if self.live is not None:
            self.live.update(self.render(state), refresh=True)

    def render(self, state) -> Group:
        """The view for a Trainer's state."""
        done, total = state.global_step, max(state.max_steps, 1)
        speed = (done - self.first_update) / max(time.monotonic() - self.started, 1e-9)
        left = f"{(total - done) / speed:.0f} s left" if speed else ""
        steps = range(1 + max((number for number, *_ in self._per_step()), default=0))
        table = Table("", *(f"step {step}" for step in steps), title=self.title)
        for name, label in _SINGLE.items():
            if name in self.figures:
                table.add_row(label, f"{float(self.figures[name]):.5g}")
        for prefix, label in _PER_STEP.items():
            values = {step: value for step, found, value in self._per_step() if found == prefix}
            if values:
                table.add_row(label, *(f"{values[step]:.4f}" if step in values else "" for step in steps))
        return Group(table, Text(f"{done} of {total} updates  {left}"), ProgressBar(total=total, completed=done))

    def _per_step(self) -> list[tuple[int, str, float]]:
        found = []
        for name, value in self.figures.items():
            prefix, _, number = name.rpartition("_")
            if prefix in _PER_STEP and number.isdigit():
                found.append((int(number), prefix, float(value)))
        return found


class UpdateClock(TrainerCallback, ExportableState):
    """Seconds spent in updates, over a run and its resumptions; validation and checkpoints are not counted.

    Args:
        seconds (`float`): spent before.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.started = seconds, 0.0

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def on_step_begin(self, args, state, control, **kwargs):
        """An update begins."""
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """An update ends."""
        self.seconds += time.perf_counter() - self.started


def smoothed(line: list[tuple[float, float]], share: float = 0.05) -> list[tuple[float, float]]:
    """The mean of each point and those before it that lie within a share of the line's points; at least of two."""
    width = max(2, round(share * len(line)))
    values = [y for _, y in line]
    means = (statistics.mean(values[max(0, place + 1 - width) : place + 1]) for place in range(len(values)))
    return [(x, mean) for (x, _), mean in zip(line, means, strict=True)]


def plot_curves(results: list[dict], path) -> None:
    """Loss, top-1 accuracy and, where it was measured, tau over the tokens seen, all stages one after the other.

    The loss is drawn pale as logged and dark as a running mean. Validations are joined across stages. What never changes
    (as a share of loops that is always 0) gets no panel.

    Args:
        results (`list[dict]`): of the stages, each with its `history`, `num_updates` and `tokens_seen`.
        path (`str` or path): of the PNG file.
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
                # The checkpoint that is kept is validated once more after the last update, where it does not belong.
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
            axes.legend()
        else:
            joined = [point for line in points[name] for point in line]
            axes.plot(*zip(*joined, strict=True), color="black", marker=".")
        axes.set(xlabel="million tokens seen", title=panels[name])
    figure.savefig(Path(path), dpi=120)


__all__ = ["LiveView", "UpdateClock", "plot_curves"]
