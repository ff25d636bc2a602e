"""The command `make-draft`: from a model's name to a draft that can be pushed, within a given time.

Each step is what another command does: `doctor`'s checks, `synthesize` in chunks until its share of the time is spent, a
short `train` that measures the time of an update, `train` with as many epochs as fit, and `bench generate`. Steps that are
finished stand in `steps.json` of the work folder; a step that was interrupted is resumed by its own means.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transformers_prism.cli.demo import PROMPTS, chat_inputs
from transformers_prism.cli.doctor import (
    Finding,
    findings_table,
    has_failed,
    machine_findings,
    target_findings,
    tokenizer_findings,
)
from transformers_prism.cli.options import ADVANCED, COST, Commands
from transformers_prism.hub.card import add_to_card, names_target
from transformers_prism.whole_files import write_json

# Shares of the time at whose end a step should be finished; the rest is for measuring.
_SYNTHESIS_ENDS, _TRAINING_ENDS = 0.45, 0.85
# Tokens of the first chunk, which tells how fast the target writes.
FIRST_TOKENS = 4000
# A chunk that would take less than this share of the synthesis is not begun.
_SHORTEST_CHUNK = 0.15
# Conversations and tokens of the trial that tells how long an update takes; of an answer; of a text's opening.
_TRIAL_CONVERSATIONS, _ANSWER_TOKENS, _OPENING_TOKENS = 16, 300, 12
_BATCH_SIZE = 4
# Of the training time, by stage, and the most epochs of each: more hardly teach anything new.
_STAGES = {"single_step": (0.6, 6.0), "warm_up": (0.4, 4.0)}
_FEWEST_EPOCHS = 0.1
# Text as it is, for models without a chat template: a "user" begins a text, an "assistant" continues it.
_TEXT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def add_to(app: Commands) -> None:
    """Add the command to the command line."""
    app.command("make-draft")(make_draft)


def make_draft(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The target: Hub id, folder or .gguf file.")],
    output: Annotated[Path, typer.Option(help="Folder for the finished draft; work goes on in OUTPUT.work beside it.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="Time to take, as closely as steps allow.", rich_help_panel=COST)] = 30,
    form: Annotated[
        Literal["chat", "text"],
        typer.Option("--format", help="What the draft learns: chats, or for base models continuations of the target's own text."),
    ] = "chat",
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template, for a tokenizer without one.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to answer, as for `synthesize`; the target writes its own if absent.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=8, help="Tokens per answer of the measurement.", rich_help_panel=ADVANCED)
    ] = 64,
):
    """Make a draft for a model: check, synthesize, train and measure. The same command resumes an interrupted run."""
    console = Console()
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    settings = {"model": model, "minutes": minutes, "format": form, "chat_template": template, "max_new_tokens": max_new_tokens}
    check(model, form, template, console)
    run = Run(output, {**settings, "prompts": prompts and str(prompts)}, console)
    run.synthesize()
    run.train(["transformers-prism", "make-draft", *context.meta["words"]])
    figures = run.measure()
    console.print(result_table(figures, run))
    more = "" if names_target(output) else " --base-model NAME/OF-THE-TARGET"
    console.print(f"Push it: transformers-prism push {output} USER/{output.name}{more}", highlight=False, soft_wrap=True)


def check(model: str, form: str, template: str | None, console: Console) -> None:
    """The checks of `doctor` that need no weights.

    Raises:
        ValueError: if the model cannot get a draft here, after a table that says why.
    """
    findings = [_needed(one, form) for one in [*machine_findings(), *target_findings(model, template)]]
    if has_failed(findings):
        console.print(findings_table(findings))
        wrong = "; ".join(f"{one.name}: {one.text}" for one in findings if one.state == "fails")
        raise ValueError(f"expected a model and a machine that a draft can be made with, got {wrong}")


def _needed(finding: Finding, form: str) -> Finding:
    """A finding that decoding can live with and training cannot."""
    is_fatal = finding.name == "chat template" and form == "chat" or finding.name == "extras"
    return Finding(finding.name, "fails", finding.text) if is_fatal and finding.state == "note" else finding


class Run:
    """A run and what is finished of it.

    Args:
        output (`Path`): folder of the finished draft.
        settings (`dict`): of the command; a resumed run must have the same.
        console (`Console`): where steps are told of.
    Raises:
        ValueError: if the work folder is of other settings, or `output` is there and not of this run.
    """

    def __init__(self, output: Path, settings: dict, console: Console):
        self.output, self.settings, self.console = output, settings, console
        self.work = output.with_name(f"{output.name}.work")
        self.path = self.work / "steps.json"
        self.budget = 60 * settings["minutes"]
        self._loaded: tuple | None = None
        if not self.path.is_file():
            if output.exists():
                raise ValueError(f"output: expected a new folder, got {output}, which is there")
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"settings": settings, "steps": {}})
        found = json.loads(self.path.read_text(encoding="utf-8"))
        changed = [name for name, value in settings.items() if found["settings"].get(name) != value]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name}: expected {found['settings'].get(name)!r} as the run in {self.work} began, got {settings[name]!r}; "
                "remove that folder to begin anew"
            )
        self.steps: dict[str, dict] = found["steps"]

    def step(self, name: str, work: Callable[[], dict]) -> dict:
        """The result of a step, done now if it was not finished before; the time that it took counts once."""
        if name not in self.steps:
            self.console.print(f"{name} ({self.spent() / 60:.1f} of {self.budget / 60:g} minutes)", style="dim")
            start = time.monotonic()
            result = work()
            self.steps[name] = {**result, "seconds": round(time.monotonic() - start, 2)}
            write_json(self.path, {"settings": self.settings, "steps": self.steps})
        return self.steps[name]

    def spent(self) -> float:
        """Seconds of all finished steps."""
        return sum(step["seconds"] for step in self.steps.values())

    def loaded(self) -> tuple:
        """The target on the device that is there, packed on a CPU, and its tokenizer with the template of this run."""
        from transformers_prism.cpu import prepare_for_cpu

        if self._loaded is None:
            self._loaded = self._load()
            if self._loaded[0].device.type == "cpu":
                prepare_for_cpu(self._loaded[0])
        return self._loaded

    def _load(self) -> tuple:
        from transformers_prism.target import load_target

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        target, tokenizer = load_target(self.settings["model"], torch.float32 if device.type == "cpu" else torch.bfloat16)
        return target.to(device), self._with_template(tokenizer, target)

    def _with_template(self, tokenizer, target):
        if self.settings["format"] == "text":
            # As plain text is read by this tokenizer: with a token for its beginning, or without.
            has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            tokenizer.chat_template = "{{ bos_token }}" * has_bos + _TEXT_TEMPLATE
        elif self.settings["chat_template"] is not None:
            tokenizer.chat_template = self.settings["chat_template"]
        findings = tokenizer_findings(tokenizer, target.config.get_text_config().vocab_size)
        wrong = [one.text for one in findings if one.state != "ok"]  # of a GGUF file nothing was known before
        if wrong:
            raise ValueError(f"expected a tokenizer and a chat template that training can use, got: {'; '.join(wrong)}")
        return tokenizer

    def chunks(self) -> list[dict]:
        """The finished chunks of conversations."""
        return [step for name, step in self.steps.items() if name.startswith("synthesis")]

    def synthesize(self) -> None:
        """Chunk after chunk until its share of the time is spent; each is as large as what is left of it allows."""
        end = _SYNTHESIS_ENDS * self.budget
        while "enough conversations" not in self.steps:
            chunks, left = self.chunks(), end - self.spent()
            number, goal = len(chunks), float(FIRST_TOKENS)
            if chunks:
                seconds, tokens = (sum(chunk[name] for chunk in chunks) for name in ("seconds", "num_tokens"))
                goal = max(0.9 * left * tokens / max(seconds, 1e-9), 1)
            is_last = bool(chunks) and (left < _SHORTEST_CHUNK * end or not chunks[-1]["num_conversations"])
            # A chunk that was begun belongs to the run, however late it is.
            if is_last and f"size of chunk {number}" not in self.steps:
                self.step("enough conversations", partial(dict, num_chunks=number))
                return
            self.step(f"size of chunk {number}", partial(dict, goal=math.ceil(goal)))
            self.step(f"synthesis {number}", partial(self._chunk, number))

    def _chunk(self, number: int) -> dict:
        """Conversations for the goal of this chunk; resumed by the shards that are there."""
        from transformers_prism.training.data.synthesis import SynthesisConfig, synthesize
        from transformers_prism.training.progress_bar import ProgressBar

        goal = self.steps[f"size of chunk {number}"]["goal"]
        target, tokenizer = self.loaded()
        batch_size = 16 if target.device.type == "cpu" else 64
        chats = self._chats(number, goal, batch_size)
        if chats == []:
            return {"num_conversations": 0, "num_tokens": 0, "num_prompts": 0}
        config = SynthesisConfig(
            goal, batch_size=batch_size, max_answer_tokens=_ANSWER_TOKENS, seed=number, max_length=self._max_length(target)
        )
        with ProgressBar("synthesis", goal, "tokens") as bar:
            summary = synthesize(
                *(target, tokenizer, config, self.work / f"data-{number}", chats),
                report=lambda told: bar.update(told["kept"], told["goal"]),
            )
        counts = {name: summary[name] for name in ("num_conversations", "num_tokens")}
        return {**counts, "num_prompts": len(chats or [])}

    def _max_length(self, target) -> int:
        longest = getattr(target.config.get_text_config(), "max_position_embeddings", None) or 1024
        return max(min(longest, 1024), _ANSWER_TOKENS + 160)

    def _chats(self, number: int, goal: int, batch_size: int) -> list[list[dict]] | None:
        """What the target answers in this chunk: prompts that were given, openings of texts, or None: it asks itself."""
        from transformers_prism.training.data.formats import read_chats

        # As long as answers are on average, with some to spare for those that are refused.
        count = max(math.ceil(4 * goal / _ANSWER_TOKENS), batch_size)
        if self.settings["prompts"]:
            first = sum(chunk["num_prompts"] for chunk in self.chunks())
            return read_chats(self.settings["prompts"])[first : first + count]
        if self.settings["format"] == "text":
            return [[{"role": "user", "content": text}] for text in self.openings(str(number), count)]
        return None

    def openings(self, name: str, count: int) -> list[str]:
        """First words of texts that the target writes from nothing, kept in a file, so that a resumed run has the same."""
        path = self.work / f"openings-{name}.json"
        if not path.is_file():
            target, tokenizer = self.loaded()
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            first = tokenizer.bos_token_id
            texts: list[str] = []
            while len(texts) < count:
                start = torch.full((16, 1), first or 0)
                if first is None:
                    start = torch.randint(len(tokenizer), (16, 1), generator=generator)
                start = start.to(target.device)
                with torch.random.fork_rng():
                    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                    settings = {"do_sample": True, "top_k": 200, "max_new_tokens": _OPENING_TOKENS, "pad_token_id": 0}
                    written = target.generate(start, attention_mask=torch.ones_like(start), **settings)
                texts += [text.strip() or "The" for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
            write_json(path, {"texts": texts[:count]})
        return json.loads(path.read_text(encoding="utf-8"))["texts"]

    def train(self, argv: list[str]) -> None:
        """A trial that measures the time of an update, then as many epochs as fit."""
        if "training" in self.steps:
            return
        trial = self.step("time of an update", self._time_updates)
        epochs = self.step("epochs", lambda: self._epochs(trial))
        epochs = {name: value for name, value in epochs.items() if name != "seconds"}
        self.step("training", lambda: self._train(self.work / "run", argv, **epochs))

    def _train(self, folder: Path, argv: list[str] | None, **settings) -> dict:
        """A run of `train`, resumed if it was begun."""
        from transformers_prism.training.recipes import TrainConfig
        from transformers_prism.training.train import train

        self._loaded = None  # the run loads the target for itself
        data = ",".join(str(self.work / f"data-{number}") for number, one in enumerate(self.chunks()) if one["num_conversations"])
        config = TrainConfig(
            data=data,
            output=str(folder),
            target=self.settings["model"],
            recipe="hass",
            batch_size=_BATCH_SIZE,
            compute_dtype="bfloat16" if torch.accelerator.is_available() else "float32",
            save_updates=25,
            draft_vocab_size=min(8192, self._vocab_size()),
            resume=(folder / "config.json").is_file(),
            **settings,
        )
        train(config, argv)
        record = json.loads((folder / "draft" / "training.json").read_text(encoding="utf-8"))
        return {
            "num_conversations": record["data"]["training"]["num_conversations"],
            "updates": {stage["stage"]["name"]: [stage["num_updates"], stage["seconds"]] for stage in record["stages"]},
        }

    def _vocab_size(self) -> int:
        """Of the target, as the synthesis recorded it."""
        record = json.loads((self.work / "data-0" / "provenance.json").read_text(encoding="utf-8"))
        return record["target"]["vocab_size"]

    def _time_updates(self) -> dict:
        one_epoch = {"single_step_epochs": 1.0, "warm_up_epochs": 1.0}
        # Conversations are told apart by their tokens, so that these two runs hold out the same ones.
        return self._train(self.work / "trial", None, num_conversations=_TRIAL_CONVERSATIONS, num_validation=4, **one_epoch)

    def _epochs(self, trial: dict) -> dict[str, float]:
        """Epochs of each stage that fit into the time, by the trial's updates."""
        per_epoch = math.ceil(sum(chunk["num_conversations"] for chunk in self.chunks()) / _BATCH_SIZE)
        left = max(_TRAINING_ENDS * self.budget - self.spent(), 0.0)
        epochs = {}
        for name, (share, most) in _STAGES.items():
            num_updates, seconds = trial["updates"][name]
            fitting = share * left / (per_epoch * max(seconds / num_updates, 1e-6))
            epochs[f"{name}_epochs"] = round(min(max(fitting, _FEWEST_EPOCHS), most), 2)
        return epochs

    def measure(self) -> dict:
        """Decode with and without the draft, put the figures into its card, and let the finished folder appear."""
        finished = self.work / self.output.name
        if not self.output.exists():
            shutil.rmtree(finished, ignore_errors=True)
            shutil.copytree(self.work / "run" / "draft", finished)
            summary = self.step("measuring", lambda: self._measure(finished))
            add_to_card(finished, self.work / "bench.json")
            finished.rename(self.output)
            return summary
        return self.steps["measuring"]

    def _measure(self, folder: Path) -> dict:
        from transformers_prism.bench.measurement import GenerateMeasurement
        from transformers_prism.bench.methods import parse_methods
        from transformers_prism.cli.demo import load_draft
        from transformers_prism.hub.files import weights_sha256

        texts = self.openings("measured", 4)[:3] if self.settings["format"] == "text" else PROMPTS
        self._loaded = None
        target, tokenizer = self._load()
        records = [{"question_id": number, "category": "make-draft", "turns": [text]} for number, text in enumerate(texts)]
        settings = {"max_new_tokens": self.settings["max_new_tokens"], "do_sample": False}
        measurement = GenerateMeasurement(parse_methods(["auto"], target.device.type == "cpu"), settings, "make-draft.jsonl", repeat=1)
        models = (target, tokenizer, load_draft(folder, target), weights_sha256(folder))
        path = self.work / "bench.json"
        figures = measurement.run(*models, chat_inputs, records, records, path, path.is_file(), self.console)
        summary = figures["methods"]["auto"]["summary"]
        names = ("plain_tokens_per_second", "draft_tokens_per_second", "acceptance_length_pooled", "ratio", "num_identical")
        return {name: summary[name] for name in names}


def result_table(figures: dict, run: Run) -> Table:
    """Before and after, and what it took."""
    tokens, conversations = (sum(chunk[name] for chunk in run.chunks()) for name in ("num_tokens", "num_conversations"))
    updates = sum(count for count, _ in run.steps["training"]["updates"].values())
    caption = f"{conversations} conversations, {tokens} tokens, {updates} updates, {run.spent() / 60:.1f} minutes; greedy, three prompts"
    table = Table(box=box.SIMPLE, pad_edge=False, caption=caption)
    for name in ("", "tau", "tokens/s", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("without a draft", "1.00", f"{figures['plain_tokens_per_second']:.1f}", "1.00")
    tau, rate = figures["acceptance_length_pooled"] or 1.0, figures["draft_tokens_per_second"]
    table.add_row(f"with {run.output.name}", f"{tau:.2f}", f"{rate:.1f}", f"{figures['ratio']:.2f}")
    return table
