"""`docs/performance.md`: a page of measurements, written from their files and from nothing else.

    python -m benchmarks.page greedy.json sampled.json scaling.json rounds.json --output docs/performance.md

Every figure is one of the files'.
"""

import re
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import plots
from transformers_prism.bench.acceptance import acceptance_rows
from transformers_prism.bench.figures import glance_rows, method_rows, task_rows
from transformers_prism.bench.record import UNTRAINED, read_record
from transformers_prism.bench.rounds import profile_rows
from transformers_prism.bench.scaling import axis_rows, modules_text
from transformers_prism.cli.options import report_file, user_errors
from transformers_prism.whole_files import write_text

KINDS = ("generate", "acceptance", "rounds", "scaling", "modules", "training", "synthesize")


def write_page(files: list[Path], output: Path) -> list[Path]:
    """Write the page, and its pictures into a folder beside it that bears its name.

    Args:
        files (`list[Path]`): of `bench` commands whose kind is one of `KINDS`, in the page's order.
        output (`Path`): the page.
    Returns:
        `list[Path]`: what was written, the page first.
    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if a file is none of these.
    """
    records = []
    for file in files:
        record = read_record(file)
        if record["kind"] not in KINDS:
            raise ValueError(f"{file}: expected a measurement of kind {', '.join(KINDS)}, got {record['kind']!r}")
        records.append((re.sub(r"\W+", "_", file.stem), record))
    folder = output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    page = _Page(folder)
    page.add(_introduction(records))
    generate = [(stem, record) for stem, record in records if record["kind"] == "generate"]
    page.add(*_glance([record for _, record in generate]))
    for stem, record in generate:
        page.add_generate(stem, record)
    page.add_comparison(generate, "batch_size", "rows of a batch", "Batches")
    page.add_comparison(generate, "context", "tokens of the prompt", "Contexts")
    page.add_rounds([record for _, record in records if record["kind"] == "rounds"])
    for stem, record in records:
        if record["kind"] == "scaling":
            page.add_scaling(stem, record)
        elif record["kind"] in _SECTIONS:
            page.add(*_SECTIONS[record["kind"]](record))
    write_text(output, "\n\n".join(page.parts) + "\n")
    return [output, *page.pictures]


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """A table, the first column left, the others right."""
    heading = [name.replace("\n", " ") for name in heading]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def levers(summary: dict) -> list[tuple[str, float]]:
    """What decoding would gain over plain steps if one part of the round were other than it is.

    Args:
        summary: of a method with a draft.
    Returns:
        `list`: what changes, and the ratio it would give, prefill left out; as measured first.
    """
    parts, step, tau = summary["round_ms"], summary["step_ms"], summary["acceptance_length_pooled"]
    whole = sum(parts.values())
    cheap = step + parts["draft"] + parts["rest"]
    return [
        ("as measured", tau * step / whole),
        ("the verification as cheap as a plain step", tau * step / min(cheap, whole)),
        ("drafting for nothing", tau * step / (whole - parts["draft"])),
        ("the rest for nothing", tau * step / (whole - parts["rest"])),
        ("one more token accepted per round", (tau + 1) * step / whole),
    ]


def _command_block(record: dict) -> str:
    """The command, which weights it measured where there is a draft, and the machine."""
    weights = record["weights_sha256"]
    return f"```\n{record['command']}\n```\n\n" + (f"Draft `{weights[:12]}` on " if weights else "On ") + f"{record['hardware']}."


def _introduction(records: list[tuple[str, dict]]) -> str:
    machines = dict.fromkeys(
        f"{record['hardware']}, {record['device']}, {record['num_threads']} threads, {record['dtype']}; "
        f"target `{record['target']}`; torch {record['versions']['torch']}, "
        f"transformers {record['versions']['transformers']}"
        for _, record in records
    )
    return "\n".join(
        [
            "# Performance",
            "",
            "Written by `python -m benchmarks.page` from the files of the measurements below. *plain* is `generate` of the",
            "target as loaded, *prepared* the same after `prepare_for_cpu`. Ratios are tokens per second of whole calls,",
            "prefill included: all tokens over the sum of the prompts' median seconds. tau is committed tokens per round. The",
            "ceiling is tau x t(plain step) / (t(verify) + t(draft)), and *share* the part of it that was reached.",
            "",
            "Measured on:",
            *(f"- {machine}" for machine in machines),
        ]
    )


def _title(record: dict) -> str:
    settings, sampling = record["settings"], record["settings"]["generate"]
    decoding = f"temperature {sampling['temperature']:g}" if sampling["do_sample"] else "greedy"
    context = f", context {settings['context']}" if settings["context"] else ""
    untrained = ", untrained draft" if record["weights_sha256"] == UNTRAINED else ""
    return f"{decoding}, batch {settings['batch_size']}{context}{untrained}".capitalize()


def _glance(records: list[dict]) -> list[str]:
    """The main method of each run of `bench generate` in one table."""
    if not records:
        return []
    names = [f"{_title(record)}, `{record['settings']['prompts']}`" for record in records]
    baseline = max(name for record in records for name in record["summary"]["over"])
    return [
        "## At a glance",
        markdown_table(*glance_rows(names, records)),
        f"*Single prompts*, or batches of them: the lowest and the highest ratio over `{baseline}`.",
    ]


def _acceptance(record: dict) -> list[str]:
    settings = record["settings"]
    hidden = "" if settings["coupled"] else ", the draws of sampling hidden from it"
    if settings.get("text_tokens") is False:
        hidden += ", which proposes nothing outside its draft vocabulary"
    temperatures = " and ".join(f"{temperature:g}" for temperature in settings["temperatures"])
    prompts = f"{settings['num_prompts']} prompts of `{settings['prompts']}`"
    return [
        f"## What the draft accepts at T = {temperatures}{hidden}: {prompts}",
        markdown_table(*acceptance_rows(record["rows"])),
        f"tau of fixed trees (nodes/depth/top-k; top-k 1 is a chain), pooled over rounds, without n-grams; "
        f"{settings['max_new_tokens']} new tokens, seed {settings['seed']}. *In a loop*: answers that end in one, which "
        "flatters tau.",
        _command_block(record),
    ]


def _modules(record: dict) -> list[str]:
    # Records of `bench modules`, whose place `bench scaling --modules` has taken.
    pairs = zip(record["num_modules"], record["median_ms"], strict=True)
    rows = [[str(count), f"{milliseconds:.2f}"] for count, milliseconds in pairs]
    low, high = record["interval"]
    return [
        "## Many modules against one",
        markdown_table(["modules M", "round ms (median)"], rows),
        f"Median ratio of pairs {record['median_ratio']:.4f}, 95 % interval {low:.4f} to {high:.4f}; the bar is "
        f"{record['max_ratio']:g}: {'met' if record['is_within_bar'] else 'not met'}.",
        _command_block(record),
    ]


def _training(record: dict) -> list[str]:
    settings, speeds, seconds = record["settings"], record["tokens_per_second"], record["seconds_by_steps"]
    low, high = record["interval"]
    parts = [
        f"## A training step: {settings['batch_size']} x {settings['length']} tokens",
        f"Forward, loss and backward with S = {settings['num_steps']}: {speeds['ours']:.0f} tokens/s, with the authors' way "
        f"of aligning {speeds['authors']:.0f}; median ratio of pairs {record['ratio']:.2f}, 95 % interval {low:.2f} to "
        f"{high:.2f}. Medians of {settings['repeat']} steps of each kind, in turn.",
        markdown_table(
            ["aligned forwards S", "seconds", "over S = 1"],
            [[str(count), f"{one:.2f}", f"{one / seconds[0]:.2f}"] for count, one in enumerate(seconds, start=1)],
        ),
    ]
    if "peak_bytes" in record:
        kept, again = (record["peak_bytes"][name] / 2**30 for name in ("kept", "checkpointed"))
        parts.append(
            f"Peak memory of a step over 2048 tokens with S = 5, beside weights, gradients and data: {kept:.2f} GiB, with "
            f"activation checkpointing {again:.2f} GiB."
        )
    return [*parts, _command_block(record)]


def _synthesize(record: dict) -> list[str]:
    settings = record["settings"]
    return [
        "## Writing training data",
        f"{record['num_prompts']} prompts answered greedily, {settings['batch_size']} rows at once, at most "
        f"{settings['max_new_tokens']} tokens: `synthesize` {record['synthesize_tokens_per_second']:.1f} tokens/s, "
        f"`generate` in batches {record['generate_tokens_per_second']:.1f}, ratio {record['ratio']:.2f}; "
        f"{record['num_identical']} answers identical. Medians of {settings['repeat']} runs of each, in turn.",
        _command_block(record),
    ]


_SECTIONS = {"acceptance": _acceptance, "modules": _modules, "training": _training, "synthesize": _synthesize}


class _Page:
    """The parts of the page so far, and its pictures.

    Args:
        folder (`Path`): of the pictures.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: list[str] = []
        self.pictures: list[Path] = []

    def add(self, *parts: str) -> None:
        """Go on with these paragraphs."""
        self.parts += parts

    def _picture(self, name: str, text: str) -> Path:
        self.pictures.append(self.folder / name)
        self.add(f"![{text}]({self.folder.name}/{name})")
        return self.pictures[-1]

    def add_generate(self, stem: str, record: dict) -> None:
        """A section for a run of `bench generate`: tables, a picture, what limits the main method."""
        settings, figures = record["settings"], record["methods"]
        title = _title(record)
        main = settings["main_method"]
        baselines = sorted(record["summary"]["over"])
        self.add(f"## {title}: {record['summary']['num_prompts']} prompts of `{settings['prompts']}`")
        self.add(markdown_table(*method_rows(figures)))
        runs = "one run of each prompt and method."
        if settings["repeat"] > 1:
            apart = f"{100 * record['summary']['spread']:.0f} %"
            runs = f"median of {settings['repeat']} runs; those of a prompt with `{main}` lie up to {apart} apart."
        self.add(
            f"{settings['generate']['max_new_tokens']} new tokens, {runs} *same*: rows with the tokens of the plain "
            "method on the same target. Milliseconds are of a round, or of a plain step."
        )
        self.add(_command_block(record))
        if len(record["tasks"]) > 1:
            for baseline in baselines:
                self.add(
                    f"Tokens per second over `{baseline}`, by task:", markdown_table(*task_rows(figures, baseline))
                )
            if len(figures) > len(baselines):
                picture = self._picture(
                    f"{stem}_tasks.png", f"{title}: tokens per second over {baselines[-1]}, by task"
                )
                plots.plot_tasks(picture, figures, baselines[-1], title)
        if record["summary"]["round_ms"] is not None:
            rows = [[name, f"{ratio:.2f}"] for name, ratio in levers(record["summary"])]
            self.add(
                f"What limits `{main}`: decoding over plain steps of the same target, if one thing were otherwise:",
                markdown_table(["", "ratio"], rows),
            )

    def add_comparison(self, records: list[tuple[str, dict]], setting: str, label: str, title: str) -> None:
        """Runs that differ in one setting side by side, if there are such, greedy ones and each temperature apart."""
        other = {"batch_size": "context", "context": "batch_size"}[setting]
        groups: dict[str, list[dict]] = {}
        for _, record in records:
            settings = record["settings"]
            if settings[setting] is not None and record["weights_sha256"] != UNTRAINED:
                key = str((settings["generate"], settings[other]))
                groups.setdefault(key, []).append(record)
        for number, members in enumerate(groups.values()):
            if len({record["settings"][setting] for record in members}) > 1:
                self._add_group(
                    sorted(members, key=lambda record: record["settings"][setting]), setting, label, title, number
                )

    def _add_group(self, members: list[dict], setting: str, label: str, title: str, number: int) -> None:
        series: dict[str, list[tuple[float, float]]] = {}
        rows = []
        baseline = sorted(members[0]["summary"]["over"])[-1]
        for record in members:
            for name, parts in record["methods"].items():
                if name in parts["summary"]["over"] or baseline not in parts["summary"]["over"]:
                    continue
                one = parts["summary"]
                series.setdefault(name, []).append((record["settings"][setting], one["over"][baseline]["ratio"]))
                ratios = [f"{one['over'][key]['ratio']:.2f}" for key in sorted(members[0]["summary"]["over"])]
                tau = one["acceptance_length_pooled"]
                rows.append(
                    [
                        str(record["settings"][setting]),
                        name,
                        str(one["num_prompts"]),
                        "" if tau is None else f"{tau:.2f}",
                        *ratios,
                    ]
                )
        if not rows:
            return
        decoding = _title(members[0]).split(",")[0]
        self.add(f"## {title}, {decoding.lower()}")
        heading = [
            label,
            "method",
            "prompts",
            "tau",
            *(f"over {key}" for key in sorted(members[0]["summary"]["over"])),
        ]
        self.add(markdown_table(heading, rows))
        plots.plot_series(
            self._picture(f"{setting}_{number}.png", f"{title}: tokens per second over {baseline}"),
            series,
            label,
            baseline,
        )

    def add_rounds(self, records: list[dict]) -> None:
        """Profiles of rounds, of all files in one table and one picture."""
        if not records:
            return
        profiles: list[dict] = []
        labels: list[str] = []
        rows: list[list[str]] = []
        heading: list[str] = []
        for record in records:
            name = record["settings"]["label"] or record["settings"]["method"]
            heading, own = profile_rows(record["profiles"])
            rows += [[name, *row] for row in own]
            profiles += record["profiles"]
            labels += [f"{name}, context {one['context']}" for one in record["profiles"]]
        self.add("## Where the time of a round goes", markdown_table(["", *heading], rows))
        labels = [
            f"{label} ({number})" if labels.count(label) > 1 else label for number, label in enumerate(labels, 1)
        ]
        plots.plot_rounds(self._picture("rounds.png", "Milliseconds of a round by part"), profiles, labels)
        last = records[-1]
        share = last["bytes"]["draft_step"] / last["bytes"]["target"]
        times = [
            f"{one['draft_step_ms'] / one['step_ms']:.3f} at context {one['context']}"
            for one in last["profiles"]
            if one["draft_step_ms"] is not None
        ]
        self.add(
            f"A draft step reads {last['bytes']['draft_step'] / 1e6:.1f} MB of weights, a target forward "
            f"{last['bytes']['target'] / 1e6:.1f} MB: a share of {share:.3f}. Their measured times (draft step over plain "
            f"step): {', '.join(times) or 'nothing was drafted'}."
        )
        self.add(*(_command_block(record) for record in records))

    def add_scaling(self, stem: str, record: dict) -> None:
        """Round latency along each axis."""
        base = ", ".join(f"{name} {value}" for name, value in record["settings"]["base"].items())
        title = "Many modules against one" if set(record["axes"]) == {"modules"} else "How a round grows"
        self.add(f"## {title}", f"Random drafts; what does not vary: {base}.")
        self.add(markdown_table(*axis_rows(record["axes"])))
        if (text := modules_text(record["axes"])) is not None:
            self.add(text + ".")
        plots.plot_scaling(self._picture(f"{stem}.png", "Milliseconds of a round along each axis"), record["axes"])
        self.add(_command_block(record))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    files: Annotated[
        list[Path],
        typer.Argument(help="Of bench generate, acceptance, rounds, scaling and benchmarks.training, benchmarks.synthesize, in order."),
    ],
    output: Annotated[Path, typer.Option(help="The page; its pictures go into a folder of its name.")] = Path(
        "docs/performance.md"
    ),
):
    """Write a page of tables and pictures from the files of measurements."""
    with user_errors():
        for path in write_page(files, output):
            report_file(path)


if __name__ == "__main__":
    app()
