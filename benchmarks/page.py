"""`docs/performance.md`: a page written from the files of measurements, and from nothing else.

    python -m benchmarks.page greedy.json sampled.json scaling.json rounds.json --output docs/performance.md

Every figure is one of the files'. Every table names draft, machine and date, and no picture joins measurements of
different drafts or machines.
"""

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import batch_bound, long_texts, plots, replay
from benchmarks.scaling import axis_rows, modules_ratio, modules_text
from benchmarks.tables import markdown_table
from transformers_prism.bench.acceptance import acceptance_rows
from transformers_prism.bench.figures import method_rows, task_rows
from transformers_prism.bench.record import UNTRAINED, read_record
from transformers_prism.bench.rounds import profile_rows
from transformers_prism.cli.options import report_file, user_errors
from transformers_prism.whole_files import write_text

KINDS = ("generate", "acceptance", "rounds", "scaling", "modules", "training", "synthesize", "batch_bound", "replay", "long_texts", "rivals")
_ADVICE = Path(__file__).with_name("what_to_use.md")
# Commands of earlier releases that records name.
_RENAMED = {
    "transformers-prism bench modules --packed": "python -m benchmarks.scaling --modules 1 --modules 8 --num-rounds 200",
    "transformers-prism bench scaling": "python -m benchmarks.scaling",
    "transformers-prism bench training": "python -m benchmarks.training",
    "transformers-prism bench synthesize": "python -m benchmarks.synthesize",
}
WORDS = """| word | means |
|---|---|
| plain | `generate()` of the target as loaded |
| prepared | the same after `prepare_for_cpu`, which packs weights once |
| over plain, over prepared | tokens per second of whole calls, prefill included, over those of that baseline: all tokens over the sum of the prompts' median seconds |
| tau | committed tokens per round; a round is one forward of the target |
| same | answers with exactly the tokens of the plain method on the same target |
| ceiling | tau x t(plain step) / (t(verify) + t(draft)): what would be gained if nothing else took time |
| share | the part of the ceiling that was reached |
| single prompts | lowest and highest ratio of one prompt, or one batch of prompts, over the last baseline |"""


def write_page(files: list[Path], output: Path) -> list[Path]:
    """Write the page, and its pictures into a folder of the same name.

    Args:
        files (`list[Path]`): of measurements whose kind is one of `KINDS`, in the page's order.
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
    page.add("# Performance", *_three_figures([record for _, record in records]))
    here, elsewhere = _by_place(records)
    for _, record in records:
        if record["kind"] == "rivals":
            page.add(*_rivals(record))
    page.add("## Words", WORDS, _machines([record for _, record in records]))
    page.add_records(here)
    if elsewhere:
        page.add("## Other machines and earlier drafts", "What follows was not measured with the draft and on the machine of the above.")
        first = len(page.parts)
        page.prefix = "other_"
        page.add_records(elsewhere)
        page.parts[first:] = [re.sub(r"^#", "##", part) for part in page.parts[first:]]
    page.add("Written by `python -m benchmarks.page`; `docs/performance/measure.sh` makes all files and then the page.")
    write_text(output, "\n\n".join(page.parts) + "\n")
    return [output, *page.pictures]


def _by_place(records: list[tuple[str, dict]]) -> tuple[list, list]:
    """Records with the draft and on the machine of the first run of `bench generate`, and the others."""
    main = next((one for _, one in records if one["kind"] == "generate" and one["weights_sha256"] != UNTRAINED), None)
    if main is None:
        return records, []
    drafts = (main["weights_sha256"], UNTRAINED, None)
    here: list[tuple[str, dict]] = []
    elsewhere: list[tuple[str, dict]] = []
    for stem, one in records:
        is_here = one["weights_sha256"] in drafts and one["hardware"] == main["hardware"]
        (here if is_here else elsewhere).append((stem, one))
    return here, elsewhere


def levers(summary: dict) -> list[tuple[str, float]]:
    """The speed-up over plain steps if one part of the round were different.

    Args:
        summary: of a method with a draft.
    Returns:
        `list`: what changes and the ratio that it would give, prefill left out; the measured ratio comes first.
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
    """The command as it is called today, and draft, machine and date that it was run with."""
    command = record["command"]
    for old, new in _RENAMED.items():
        command = command.replace(old, new)
    if label := record["settings"].get("label"):
        command = re.sub(r"--label .*?(?= --|$)", f"--label {shlex.quote(label)}", command)
    return f"```bash\n{command}\n```\n\n{_where(record)}."


def _draft(record: dict) -> str:
    """A draft by the beginning of its weights' hash."""
    weights = record["weights_sha256"]
    return "random" if weights == UNTRAINED else f"`{weights[:8]}`" if weights else "none"


def _where(record: dict) -> str:
    draft = f"Draft {_draft(record)}, " if record["weights_sha256"] else ""
    return f"{draft}{record['hardware']}, {record.get('date') or 'no date'}"


def _machines(records: list[dict]) -> str:
    machines = dict.fromkeys(
        f"- {record['hardware']}, {record['num_threads']} thread(s), {record['device']}, {record['dtype']}; target "
        f"`{record['target']}`; torch {record['versions']['torch']}, transformers {record['versions']['transformers']}"
        for record in records
    )
    note = ""
    if any(record["target"].endswith(".gguf") for record in records):
        note = "\n\nA target in a GGUF file was dequantised: its weights are the original's, rounded and converted back."
    return "Measured on:\n\n" + "\n".join(machines) + note


def _three_figures(records: list[dict]) -> list[str]:
    """The main figures: speed, acceptance, and the price of more modules, each with what it was measured on."""
    parts = []
    speed = next((one for one in records if one["kind"] == "generate" and one["weights_sha256"] != UNTRAINED), None)
    if speed is not None:
        summary, settings = speed["summary"], speed["settings"]
        ratios = " and ".join(f"**{one['ratio']:.2f}** times {name}" for name, one in sorted(summary["over"].items()))
        parts.append(
            f"**Speed.** {ratios}: tokens per second with the draft over those without. {_title(speed)}, "
            f"{summary['num_prompts']} prompts of `{settings['prompts']}`, {settings['generate']['max_new_tokens']} new "
            f"tokens; {summary['num_identical']} answers were the same. {_where(speed)}."
        )
    accepted = next((one for one in records if one["kind"] == "acceptance"), None)
    if accepted is not None:
        taus = " and ".join(f"**{row['tau']:.2f}** with {row['tree']}" for row in accepted["rows"] if row["tau"])
        temperatures = " and ".join(f"{one:g}" for one in accepted["settings"]["temperatures"])
        parts.append(
            f"**Acceptance.** {taus} tokens per forward of the target, for trees of a fixed size (nodes/depth/top-k) at "
            f"temperature {temperatures}. It depends on the draft and the text, not on the machine. {_where(accepted)}."
        )
    modules = [found for one in records if (found := _modules_cost(one)) is not None]
    if modules:
        many, few, (ratio, low, high), record = min(modules, key=lambda found: found[2][2] - found[2][1])
        parts.append(
            f"**The price of parameters.** **{ratio:.3f}**: the time of a round with {many} processing modules over that "
            f"with {few} (95 % interval {low:.3f} to {high:.3f}). A draft can hold many times the parameters at the same "
            f"cost. {_where(record)}."
        )
    return ["\n".join(f"{number}. {part}" for number, part in enumerate(parts, 1))] if parts else []


def _modules_cost(record: dict) -> tuple[int, int, tuple[float, float, float], dict] | None:
    """Largest and smallest number of modules and what [`modules_ratio`] says of them; None if that was not measured."""
    if record["kind"] == "modules":
        low, high = record["interval"]
        counts = record["num_modules"]
        return counts[-1], counts[0], (record["median_ratio"], low, high), record
    members = record["axes"].get("modules", []) if record["kind"] == "scaling" else []
    if len(members) < 2:
        return None
    return members[-1]["value"], members[0]["value"], modules_ratio(members), record


def _title(record: dict) -> str:
    settings, sampling = record["settings"], record["settings"]["generate"]
    decoding = f"temperature {sampling['temperature']:g}" if sampling["do_sample"] else "greedy"
    context = f", context {settings['context']}" if settings["context"] else ""
    untrained = ", untrained draft" if record["weights_sha256"] == UNTRAINED else ""
    dtype = "" if record["dtype"] == "float32" else f", {record['dtype']}"
    return f"{decoding}, batch {settings['batch_size']}{context}{dtype}{untrained}".capitalize()


def _glance(records: list[dict]) -> list[str]:
    """The main method of each run of `bench generate` in one table."""
    if not records:
        return []
    baselines = sorted({name for record in records for name in record["summary"]["over"]})
    heading = ["run", "text", "draft", "machine", "date", "method", "prompts", "same", "tau"]
    heading += [*(f"over {name}" for name in baselines), "single prompts", "share"]
    rows = []
    for record in records:
        one, settings = record["summary"], record["settings"]
        ratios = [f"{one['over'][name]['ratio']:.2f}" if name in one["over"] else "" for name in baselines]
        tau, share = one["acceptance_length_pooled"], one["ceiling_share"]
        rows.append(
            [
                *(_title(record), Path(settings["prompts"]).stem, _draft(record), record["hardware"]),
                *(record.get("date") or "", settings["main_method"], str(one["num_prompts"]), str(one["num_identical"])),
                "" if tau is None else f"{tau:.2f}",
                *(*ratios, f"{one['lowest_ratio']:.2f} to {one['highest_ratio']:.2f}"),
                "" if share is None else f"{share:.2f}",
            ]
        )
    note = "One row is one run. Compare rows of the same draft and machine only; a draft is named by its weights' hash."
    return ["## At a glance", note, markdown_table(heading, rows)]


def _acceptance(record: dict) -> list[str]:
    settings = record["settings"]
    without = "" if settings["coupled"] else ", without shared randomness"
    if settings.get("text_tokens") is False:
        without += ", without the text's tokens"
    temperatures = " and ".join(f"{temperature:g}" for temperature in settings["temperatures"])
    return [
        f"## Acceptance length at temperature {temperatures}{without}",
        f"Trees of a fixed size (nodes/depth/top-k; top-k 1 is a chain), without copies from the text: "
        f"{settings['num_prompts']} prompts of `{settings['prompts']}`, {settings['max_new_tokens']} new tokens, seed "
        f"{settings['seed']}. Answers that end in a loop are easy to guess.",
        markdown_table(*acceptance_rows(record["rows"])),
        _command_block(record),
    ]


def _modules(record: dict) -> list[str]:
    # Records of `bench modules`, which `benchmarks.scaling --modules` replaces.
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
        f"Forward, loss and backward with S = {settings['num_steps']} training-time-test steps: {speeds['ours']:.0f} tokens/s "
        f"with this package's alignment, {speeds['authors']:.0f} with the PRISM authors'; median ratio of pairs "
        f"{record['ratio']:.2f}, 95 % interval {low:.2f} to {high:.2f}. Medians of {settings['repeat']} steps of each kind, in "
        "turn.",
        markdown_table(
            ["steps S", "seconds", "over S = 1"],
            [[str(count), f"{one:.2f}", f"{one / seconds[0]:.2f}"] for count, one in enumerate(seconds, start=1)],
        ),
    ]
    if "over_plain_loss" in record:
        rows = [[name, f"{ratio:.2f}"] for name, ratio in record["over_plain_loss"].items()]
        parts += ["With other losses, as [the study](study/README.md) names them, over the usual one, in turn:", markdown_table(["loss", "seconds"], rows)]
    if "peak_bytes" in record:
        kept, again = (record["peak_bytes"][name] / 2**30 for name in ("kept", "checkpointed"))
        parts.append(
            f"Peak memory of a step over 2048 tokens with S = 5, in addition to weights, gradients and data: {kept:.2f} GiB, "
            f"with activation checkpointing {again:.2f} GiB."
        )
    return [*parts, _command_block(record)]


def _batch_bound(record: dict) -> list[str]:
    settings = record["settings"]
    return [
        "## Batches against their bound",
        f"{settings['num_prompts']} prompts of `{settings['prompts']}`, {settings['max_new_tokens']} new tokens, greedy, over the "
        "prepared target. The bound is what the trees of these batches would gain if nothing but forwards took time, by their "
        "measured costs; bound, reached and share leave the prompts' forwards out, whole calls have them; lowest is the batch "
        "that gains least. Percentages are of the time of our rounds: drafting and verifying beyond their measured costs, and "
        "what is no forward.",
        markdown_table(*batch_bound.rows_of(record["batches"])),
        _command_block(record),
    ]


def _replay(record: dict) -> list[str]:
    return [*replay.section_of(record), _command_block(record)]


def _rivals(record: dict) -> list[str]:
    """The alternatives to this package, after advice that is written by hand: review it when the figures change."""
    settings = record["settings"]
    return [
        "## What to use when",
        _ADVICE.read_text(encoding="utf-8").strip(),
        f"{settings['num_prompts']} prompts of `{settings['prompts']}`, one at a time, {settings['max_new_tokens']} new tokens, "
        f"greedy, {settings['num_threads']} threads, each program in an environment of its own, in turn for half a minute each, three "
        "times; whole calls. Some began fewer prompts before their time was up: a ratio is over the prompts that both answered. Memory is "
        "the most that the process held. llama.cpp and OpenVINO compute with the file's 4 bits, the others with the same "
        "weights in float32, or in 16 bits where the name says so: their answers differ from those in float32.",
        markdown_table(record["heading"], record["rows"]),
        _command_block(record),
    ]


def _synthesize(record: dict) -> list[str]:
    settings = record["settings"]
    return [
        "## Writing training data",
        f"{record['num_prompts']} prompts answered greedily, {settings['batch_size']} sequences at once, at most "
        f"{settings['max_new_tokens']} tokens: `synthesize` {record['synthesize_tokens_per_second']:.1f} tokens/s, "
        f"`generate` in batches {record['generate_tokens_per_second']:.1f}, ratio {record['ratio']:.2f}; "
        f"{record['num_identical']} answers identical. Medians of {settings['repeat']} runs of each, in turn.",
        _command_block(record),
    ]


_SECTIONS = {
    "acceptance": _acceptance,
    "modules": _modules,
    "training": _training,
    "synthesize": _synthesize,
    "batch_bound": _batch_bound,
    "replay": _replay,
}


class _Page:
    """The parts of the page so far, and its pictures.

    Args:
        folder (`Path`): of the pictures.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.prefix = ""  # of the names of pictures
        self.parts: list[str] = []
        self.pictures: list[Path] = []

    def add_records(self, records: list[tuple[str, dict]]) -> None:
        """All sections of these records: tables of several, then one for each."""
        generate = [(stem, record) for stem, record in records if record["kind"] == "generate"]
        self.add(*_glance([record for _, record in generate]))
        self.add_comparison(generate, "batch_size", "sequences in a batch", "Batches")
        self.add_comparison(generate, "context", "tokens of the prompt", "Contexts")
        self.add_rounds([record for _, record in records if record["kind"] == "rounds"])
        for stem, record in records:
            if record["kind"] == "scaling":
                self.add_scaling(stem, record)
            elif record["kind"] == "long_texts":
                self.add_long_texts(stem, record)
            elif record["kind"] in _SECTIONS:
                self.add(*_SECTIONS[record["kind"]](record))
        if generate:
            self.add("## Run by run", "Milliseconds are of a round, or of a plain step.")
        for stem, record in generate:
            self.add_generate(stem, record)

    def add(self, *parts: str) -> None:
        """Append paragraphs."""
        self.parts += parts

    def _picture(self, name: str, text: str) -> Path:
        self.pictures.append(self.folder / (self.prefix + name))
        self.add(f"![{text}]({self.folder.name}/{self.prefix}{name})")
        return self.pictures[-1]

    def add_generate(self, stem: str, record: dict) -> None:
        """A run of `bench generate`: its methods, and folded away the tasks, a picture, and what limits the main method."""
        settings, figures = record["settings"], record["methods"]
        title, main, baselines = _title(record), settings["main_method"], sorted(record["summary"]["over"])
        prompts = f"{record['summary']['num_prompts']} prompts of `{settings['prompts']}`"
        runs = "one run of each prompt and method"
        if settings["repeat"] > 1:
            apart = f"{100 * record['summary']['spread']:.0f} %"
            runs = f"median of {settings['repeat']} runs, those of a prompt with `{main}` up to {apart} apart"
        self.add(f"### {title}, {Path(settings['prompts']).stem}, {stem}")
        self.add(f"{prompts}, {settings['generate']['max_new_tokens']} new tokens, {runs}.")
        self.add(markdown_table(*method_rows(figures)), _command_block(record))
        has_tasks, has_parts = len(record["tasks"]) > 1, record["summary"]["round_ms"] is not None
        if not has_tasks and not has_parts:
            return
        # `markdown` is for the documentation site; GitHub reads Markdown in there anyway.
        self.add("<details markdown><summary>By task, and what limits it</summary>")
        if has_tasks:
            for baseline in baselines:
                self.add(f"Tokens per second over `{baseline}`:", markdown_table(*task_rows(figures, baseline)))
            if len(figures) > len(baselines):
                text = f"{title}: tokens per second over {baselines[-1]}, by task"
                plots.plot_tasks(self._picture(f"{stem}_tasks.png", text), figures, baselines[-1], title)
        if has_parts:
            rows = [[name, f"{ratio:.2f}"] for name, ratio in levers(record["summary"])]
            self.add(f"Decoding with `{main}` over plain steps, if one thing were otherwise:", markdown_table(["", "ratio"], rows))
        self.add("</details>")

    def add_comparison(self, records: list[tuple[str, dict]], setting: str, label: str, title: str) -> None:
        """Runs that differ in one setting alone, in a table and a picture for each draft, machine and way of decoding."""
        other = {"batch_size": "context", "context": "batch_size"}[setting]
        groups: dict[tuple, list[dict]] = {}
        for _, record in records:
            settings = record["settings"]
            if settings[setting] is not None and record["weights_sha256"] != UNTRAINED:
                # Contexts may differ in the number of prompts, since long prompts are few.
                same = ("generate", other, "prompts", *(["num_prompts"] if setting == "batch_size" else []))
                key = (*(str(settings[name]) for name in same), record["weights_sha256"], record["hardware"], record["dtype"])
                groups.setdefault(key, []).append(record)
        for number, members in enumerate(groups.values()):
            if len({record["settings"][setting] for record in members}) > 1:
                self._add_group(sorted(members, key=lambda one: one["settings"][setting]), setting, label, title, number)

    def _add_group(self, members: list[dict], setting: str, label: str, title: str, number: int) -> None:
        series: dict[str, list[tuple[float, float]]] = {}
        baselines = sorted(members[0]["summary"]["over"])
        rows = []
        for record in members:
            for name, parts in record["methods"].items():
                one = parts["summary"]
                if name in one["over"] or baselines[-1] not in one["over"]:
                    continue
                series.setdefault(name, []).append((record["settings"][setting], one["over"][baselines[-1]]["ratio"]))
                tau = one["acceptance_length_pooled"]
                rows.append(
                    [
                        *(str(record["settings"][setting]), name, str(one["num_prompts"]), "" if tau is None else f"{tau:.2f}"),
                        *(f"{one['over'][key]['ratio']:.2f}" for key in baselines),
                    ]
                )
        if not rows:
            return
        self.add(f"## {title}, {_title(members[0]).split(',')[0].lower()}", f"{_where(members[-1])}.")
        self.add(markdown_table([label, "method", "prompts", "tau", *(f"over {key}" for key in baselines)], rows))
        picture = self._picture(f"{setting}_{number}.png", f"{title}: tokens per second over {baselines[-1]}")
        plots.plot_series(picture, series, label, baselines[-1])

    def add_rounds(self, records: list[dict]) -> None:
        """Profiles of rounds; a table and a picture for each draft and machine."""
        groups: dict[tuple, list[dict]] = {}
        for record in records:
            groups.setdefault((record["weights_sha256"], record["hardware"]), []).append(record)
        for number, members in enumerate(groups.values()):
            self.add("## Where the time of a round goes" + (f": draft {_draft(members[0])}" if len(groups) > 1 else ""))
            self._add_profiles(members, number)

    def _add_profiles(self, records: list[dict], number: int) -> None:
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
        labels = [
            f"{label} ({place})" if labels.count(label) > 1 else label for place, label in enumerate(labels, 1)
        ]
        self.add(markdown_table(["", *heading], rows))
        plots.plot_rounds(self._picture(f"rounds_{number}.png", "Milliseconds of a round by part"), profiles, labels)
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

    def add_long_texts(self, stem: str, record: dict) -> None:
        """What is accepted as the text grows, and where in a text the draft's first choice is right."""
        self.add("## Long texts", long_texts.words_of(record))
        for index, (title, values) in enumerate(long_texts.series_of(record).items()):
            self.add(long_texts.table_of(title, values))
            # Later draft steps look like the first one.
            if index <= len(record["settings"]["trees"]):
                plots.plot_windows(self._picture(f"{stem}_{index}.png", title), values, title)
        self.add(_command_block(record))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    files: Annotated[list[Path], typer.Argument(help=f"Measurements of kind {', '.join(KINDS)}, in order.")],
    output: Annotated[Path, typer.Option(help="The page; its pictures go into a folder of the same name.")] = Path(
        "docs/performance.md"
    ),
):
    """Write a page of tables and pictures from the files of measurements."""
    with user_errors():
        for path in write_page(files, output):
            report_file(path)


if __name__ == "__main__":
    app()
