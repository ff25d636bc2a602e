"""What `make-draft` does: from a model's name to a draft that can be pushed, within a given time.

Each step does what another command does: the checks of `doctor`, `synthesize` until its share of the time is used, a few
updates of `train` to time one, `train` with as many epochs as fit, and `bench generate`. Finished steps are recorded in
`steps.json` of the work folder; an interrupted step is resumed by its own command.
"""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformers_prism.cli.demo import PROMPTS, chat_inputs, load_draft, log_to
from transformers_prism.cli.doctor import (
    Finding,
    findings_table,
    has_failed,
    machine_findings,
    target_findings,
    tokenizer_findings,
)
from transformers_prism.cli.options import EXTRAS
from transformers_prism.configuration_prism import attention_heads, num_target_layers
from transformers_prism.cpu import PreparedModels, prepare_for_cpu
from transformers_prism.hub.card import add_to_card, names_target
from transformers_prism.target import find_device, load_target
from transformers_prism.whole_files import are_same_paths, read_json, write_json

# Shares of the time after which these steps should be finished; the rest is for measuring.
_SYNTHESIS_ENDS, _TRAINING_ENDS = 0.45, 0.85
# Synthesis continues beyond its share of the time until it has this many tokens: training needs at least that many.
FEWEST_TOKENS = 2000
# Most tokens of an answer, of a text's opening, and of a conversation.
_ANSWER_TOKENS, _OPENING_TOKENS, _MAX_LENGTH = 300, 12, 1024
# Fewest and most conversations written at once, and on a CPU the bytes that their keys and values may take if all are long.
_FEWEST_ROWS, _MOST_ROWS, _CACHE_BYTES = 16, 64, 4 * 2**30
# Updates of each stage in the timing trial; conversations of each validation; seed of the openings to measure with.
_TRIAL_UPDATES, _NUM_VALIDATION, _MEASURED_SEED = 4, 16, 10**6
_BATCH_SIZE = 4
# By stage: its share of the training time, and its most epochs, since more bring hardly anything.
_STAGES = {"single_step": (0.6, 6.0), "warm_up": (0.4, 4.0)}
_FEWEST_EPOCHS = 0.1
# Text as it is, for models without a chat template: a "user" begins a text, an "assistant" continues it.
_TEXT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def run_make_draft(output: Path, settings: dict, words: list[str], console: Console) -> None:
    """Check, synthesize, train, measure, and say how to push the draft.

    Args:
        output (`Path`): folder of the finished draft.
        settings (`dict`): model, minutes, format, chat_template (its text or None), prompts, max_new_tokens.
        words (`list[str]`): of the command, for the draft's record.
        console (`rich.console.Console`): where progress is told.
    """
    log_to(console)
    run = Run(output, settings, console)
    if not run.steps:
        check(settings["model"], settings["format"], settings["chat_template"], settings["prompts"], console)
    run.claim()
    run.synthesize()
    run.train(words)
    figures = run.measure()
    console.print(result_table(figures, run))
    if run.spent() > 1.2 * run.budget:
        told = f"That took {run.spent() / 60:.1f} minutes instead of {settings['minutes']:g}: even the minimum for a draft takes longer on this machine."
        console.print(told, style="yellow", soft_wrap=True, highlight=False)
    more = "" if names_target(output) else " --base-model NAME/OF-THE-TARGET"
    console.print(f"Push it: transformers-prism push {escape(str(output))} USER/{escape(output.name)}{more}", highlight=False, soft_wrap=True)


def check(model: str, form: str, template: str | None, prompts: str | None, console: Console) -> None:
    """The checks of `doctor` that need no weights, and whether the prompts are there.

    Raises:
        ValueError: if the model cannot get a draft here, after a table that says why.
    """
    findings = [_needed(one, form) for one in [*machine_findings(), *target_findings(model, template)]]
    if prompts is not None:
        from transformers_prism.training.data.formats import check_source

        check_source(prompts)
    if has_failed(findings):
        console.print(findings_table(findings))
        wrong = "; ".join(f"{one.name}: {one.text}" for one in findings if one.state == "fails")
        raise ValueError(f"expected a model and a machine that a draft can be made with, got {wrong}")


def _needed(finding: Finding, form: str) -> Finding:
    """The finding, as a failure if decoding works without it but training does not."""
    if finding.state != "note":
        return finding
    if finding.name == "extras":
        return Finding(finding.name, "fails", f"expected the extra 'train', got an incomplete one or none; pip install {' '.join(EXTRAS['train'])}")
    return Finding(finding.name, "fails", finding.text) if finding.name == "chat template" and form == "chat" else finding


def _is_same(name: str, before, now) -> bool:
    """Whether a setting is what it was when a run began; a path may be written in another way."""
    if name not in ("model", "prompts") or not before or not now:
        return before == now
    return are_same_paths(before, now)


class Run:
    """A run and its finished steps.

    Args:
        output (`Path`): folder of the finished draft.
        settings (`dict`): of the command; a resumed run must have the same.
        console (`Console`): where steps are reported.
    Raises:
        ValueError: if the work folder belongs to other settings, or `output` exists and is not of this run.
    """

    def __init__(self, output: Path, settings: dict, console: Console):
        self.output, self.settings, self.console = output, settings, console
        if not output.name:
            raise ValueError(f"output: expected a new folder, got {output}, which is there")
        self.work = output.with_name(f"{output.name}.work")
        self.path = self.work / "steps.json"
        self.budget = 60 * settings["minutes"]
        self.steps: dict[str, dict] = {}
        self.interrupted: dict[str, float] = {}  # seconds of steps that are not finished
        self._models: tuple | None = None
        self._packed: PreparedModels | None = None
        if not self.path.is_file():
            if output.exists():
                raise ValueError(f"output: expected a new folder, got {output}, which is there")
            return
        found = read_json(self.path)
        if not all(isinstance(found.get(name), dict) for name in ("settings", "steps")):
            raise ValueError(f"{self.path}: expected the record of a run, got one without settings and steps; remove {self.work}")
        changed = [name for name, value in settings.items() if not _is_same(name, found["settings"].get(name), value)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name}: expected {found['settings'].get(name)!r} as the run in {self.work} began, got {settings[name]!r}; "
                "remove that folder to begin anew"
            )
        self.steps, self.interrupted = found["steps"], found.get("interrupted", {})

    def claim(self) -> None:
        """Record the finished steps; the first call also claims the folder for this run."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"settings": self.settings, "steps": self.steps, "interrupted": self.interrupted})

    def step(self, name: str, work: Callable[[], dict]) -> dict:
        """The result of a step, which runs now unless it is finished. Its seconds include those of interrupted attempts."""
        if name not in self.steps:
            self.console.print(f"{name}: at {self.spent() / 60:.1f} of {self.budget / 60:g} minutes", style="dim")
            start, before = time.monotonic(), self.interrupted.get(name, 0.0)
            try:
                result = work()
                self.interrupted.pop(name, None)
                self.steps[name] = {**result, "seconds": round(before + time.monotonic() - start, 2)}
            except BaseException:
                self.interrupted[name] = round(before + time.monotonic() - start, 2)
                raise
            finally:
                self.claim()
        return self.steps[name]

    def spent(self) -> float:
        """Seconds of all steps, finished or not."""
        return sum(step["seconds"] for step in self.steps.values()) + sum(self.interrupted.values())

    def models(self, packed: bool = False) -> tuple:
        """The target on the available device, and its tokenizer with the template of this run.

        Args:
            packed (`bool`): whether the target's weights are to be packed for the CPU.
        """
        if self._models is None:
            self.console.print(f"loading {escape(str(self.settings['model']))}", style="dim", highlight=False, soft_wrap=True)
            device = find_device()
            target, tokenizer = load_target(self.settings["model"], getattr(torch, _dtype(device)))
            self._models = target.to(device), self._with_template(tokenizer, target)
        if packed and self._packed is None:
            self._packed = prepare_for_cpu(self._models[0])
        elif not packed and self._packed is not None:
            self._packed.undo()
            self._packed = None
        return self._models

    def _with_template(self, tokenizer, target):
        if self.settings["format"] == "text":
            # Begin with a BOS token if this tokenizer adds one to plain text.
            has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
            tokenizer.chat_template = "{{ bos_token }}" * has_bos + _TEXT_TEMPLATE
        elif self.settings["chat_template"] is not None:
            tokenizer.chat_template = self.settings["chat_template"]
        findings = tokenizer_findings(tokenizer, target.config.get_text_config().vocab_size)
        wrong = [one.text for one in findings if one.state != "ok"]  # a GGUF file could not be checked earlier
        if wrong:
            raise ValueError(f"expected a tokenizer and a chat template that training can use, got: {'; '.join(wrong)}")
        return tokenizer

    def synthesize(self) -> None:
        """Write conversations until their share of the time is used; shards of an earlier attempt are kept."""
        from transformers_prism.training.data.synthesis import SynthesisConfig, synthesize, tokens_of_a_turn
        from transformers_prism.training.progress_bar import ProgressBar

        def work() -> dict:
            written = 0
            end = time.monotonic() + _SYNTHESIS_ENDS * self.budget - self.spent()

            def is_over() -> bool:
                bar.update(written)  # also before the first conversation has ended
                return written >= FEWEST_TOKENS and time.monotonic() > end

            def report(counts: dict) -> None:
                nonlocal written
                written = counts["written"]
                bar.update(written)

            target, tokenizer = self.models(packed=True)
            longest = getattr(target.config.get_text_config(), "max_position_embeddings", None) or _MAX_LENGTH
            config = SynthesisConfig(
                num_tokens=10**9,  # the time limit ends it
                batch_size=_num_rows(target),
                max_answer_tokens=_ANSWER_TOKENS,
                max_length=_MAX_LENGTH,
            )
            chats = self._chats()
            # Room for a user turn and an answer at least, even if the model has fewer positions.
            fewest = tokens_of_a_turn(tokenizer, config) if chats is None else config.max_user_tokens + _ANSWER_TOKENS
            config = dataclasses.replace(config, max_length=max(min(longest, _MAX_LENGTH), fewest))
            with ProgressBar(f"synthesis, until minute {_SYNTHESIS_ENDS * self.budget / 60:.1f}", None, "tokens") as bar:
                folder = self.work / "data"
                summary = synthesize(target, tokenizer, config, folder, chats, report=report, is_over=is_over)
            if summary["num_conversations"] < 2:
                raise ValueError(
                    f"expected at least 2 usable conversations (training and validation), got {summary['num_conversations']}, "
                    f"left out: {summary['left_out'] or 'none'}; give more --prompts, or none, and remove {self.work}"
                )
            return {name: summary[name] for name in ("num_conversations", "num_tokens")}

        self.step("synthesis", work)

    def _chats(self) -> Sequence[list[dict]] | None:
        """What the target answers: given prompts, openings of texts, or None if it also writes the user turns."""
        from transformers_prism.training.data.formats import read_chats

        if self.settings["prompts"]:
            return read_chats(self.settings["prompts"])
        return Openings(*self.models(packed=True)) if self.settings["format"] == "text" else None

    def train(self, words: list[str]) -> None:
        """Compute hidden states and time a few updates; then train for as many epochs as fit."""
        trial = self.step("hidden states and trial", self._try)
        if "epochs" not in self.steps:
            self.steps["epochs"] = {**self._epochs(trial), "seconds": 0.0}
            self.claim()
        epochs = {name: value for name, value in self.steps["epochs"].items() if name != "seconds"}
        self.step("training", lambda: self._train(self.work / "run", words, **epochs))

    def _train(self, folder: Path, words: list[str] | None, **settings) -> dict:
        """A run of `train`, resumed if it was begun."""
        from transformers_prism.training.recipes import TrainConfig
        from transformers_prism.training.train import train

        target, tokenizer = self.models()
        config = TrainConfig(
            data=str(self.work / "data"),
            output=str(folder),
            target=self.settings["model"],
            features=str(self.work / "features"),
            recipe="hass",
            batch_size=_BATCH_SIZE,
            compute_dtype=_dtype(target.device),
            save_updates=25,
            num_validation=_NUM_VALIDATION,
            resume=(folder / "config.json").is_file(),
            **settings,
        )
        start = time.monotonic()
        train(config, words, (target, tokenizer))
        seconds = time.monotonic() - start
        record = json.loads((folder / "draft" / "training.json").read_text(encoding="utf-8"))
        updates = {stage["stage"]["name"]: [stage["num_updates"], stage["seconds"]] for stage in record["stages"]}
        rest = seconds - record["features_seconds"] - sum(spent for _, spent in updates.values())
        return {
            "num_conversations": record["data"]["training"]["num_conversations"],
            "updates": updates,
            "rest_seconds": round(max(rest, 0.0), 2),  # reading, validation, checkpoints
        }

    def _updates_per_epoch(self) -> int:
        return math.ceil(self.steps["synthesis"]["num_conversations"] / _BATCH_SIZE)

    def _try(self) -> dict:
        share = _TRIAL_UPDATES / self._updates_per_epoch()
        return self._train(self.work / "trial", None, single_step_epochs=share, warm_up_epochs=share)

    def _epochs(self, trial: dict) -> dict[str, float]:
        """Epochs of each stage that fit into the time, given the seconds of the trial's updates and of its other work."""
        left = max(_TRAINING_ENDS * self.budget - self.spent() - trial["rest_seconds"], 0.0)
        epochs = {}
        for name, (share, most) in _STAGES.items():
            num_updates, seconds = trial["updates"][name]
            fitting = share * left / (self._updates_per_epoch() * max(seconds / num_updates, 1e-6))
            epochs[f"{name}_epochs"] = round(min(max(fitting, _FEWEST_EPOCHS), most), 2)
        return epochs

    def measure(self) -> dict:
        """Decode with and without the draft, put the figures into its card, and let the finished folder appear."""
        finished = self.work / "finished" / self.output.name  # the card takes its name from the folder
        if self.output.exists() and "measuring" not in self.steps:
            raise ValueError(
                f"output: expected no such folder until the draft is finished, got {self.output}, which has appeared since; "
                "move it away and run the command again"
            )
        if not self.output.exists():
            shutil.rmtree(finished, ignore_errors=True)
            shutil.copytree(self.work / "run" / "draft", finished)
            self.step("measuring", lambda: self._measure(finished))
            add_to_card(finished, self.work / "bench.json")
            finished.rename(self.output)
        return self.steps["measuring"]

    def _measure(self, folder: Path) -> dict:
        from transformers_prism.bench.measurement import GenerateMeasurement
        from transformers_prism.bench.methods import parse_methods
        from transformers_prism.hub.files import weights_sha256

        target, tokenizer = self.models()
        path, draft = self.work / "bench.json", load_draft(folder, target)
        texts = list(PROMPTS)
        if self.settings["format"] == "text":
            texts = [chat[0]["content"] for chat in Openings(target, tokenizer, first_seed=_MEASURED_SEED)[: len(PROMPTS)]]
        methods = parse_methods(["auto"], target.device.type == "cpu")
        num_new = self.settings["max_new_tokens"]
        if "prompts" not in self.steps:
            start = time.monotonic()
            target.generate(**chat_inputs(tokenizer, texts[0], target.device), min_new_tokens=8, max_new_tokens=8)
            one = len(methods) * num_new * (time.monotonic() - start) / 8
            fitting = (self.budget - self.spent()) / max(one, 1e-6)
            self.steps["prompts"] = {"count": int(min(max(fitting, 1), len(texts))), "seconds": 0.0}
            self.claim()
        texts = texts[: self.steps["prompts"]["count"]]
        records = [{"question_id": number, "category": "make-draft", "turns": [text]} for number, text in enumerate(texts)]
        settings = {"max_new_tokens": num_new, "do_sample": False}
        measurement = GenerateMeasurement(methods, settings, "make-draft.jsonl", repeat=1)
        models = (target, tokenizer, draft, weights_sha256(folder))
        figures = measurement.run(*models, chat_inputs, records, records, path, path.is_file(), self.console)
        summary = figures["methods"]["auto"]["summary"]
        names = ("plain_tokens_per_second", "draft_tokens_per_second", "acceptance_length_pooled", "ratio", "num_identical")
        return {**{name: summary[name] for name in names}, "num_prompts": len(texts), "packed": methods[-1].is_prepared}


class Openings(Sequence):
    """First words of texts that the target writes without a prompt, as user turns; number i is the same at every access.

    Args:
        target (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): what writes.
        first_seed (`int`): of the first 16 openings; the next 16 have the next seed.
    """

    source = "openings that the target wrote"
    _BLOCK = 16

    def __init__(self, target, tokenizer, first_seed: int = 0):
        self.target, self.tokenizer, self.first_seed = target, tokenizer, first_seed
        self._blocks: dict[int, list[list[dict]]] = {}

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index):
        """One opening as messages, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        number, place = divmod(index, self._BLOCK)
        if number not in self._blocks:
            self._blocks = {number: self._write(self.first_seed + number)}
        return self._blocks[number][place]

    def _write(self, seed: int) -> list[list[dict]]:
        tokenizer, generator = self.tokenizer, torch.Generator().manual_seed(seed)
        num_tokens = min(len(tokenizer), self.target.config.get_text_config().vocab_size)
        start = torch.randint(num_tokens, (self._BLOCK, 1), generator=generator)
        if tokenizer.bos_token_id is not None:
            start.fill_(tokenizer.bos_token_id)
        start = start.to(self.target.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = {"do_sample": True, "top_k": 200, "max_new_tokens": _OPENING_TOKENS, "pad_token_id": 0}
            written = self.target.generate(start, attention_mask=torch.ones_like(start), **settings)
        texts = (text.strip() or "The" for text in tokenizer.batch_decode(written, skip_special_tokens=True))
        return [[{"role": "user", "content": text}] for text in texts]


def _num_rows(target) -> int:
    """Conversations to write at once: as many as speed up decoding, limited by the memory of their keys and values."""
    if target.device.type != "cpu":
        return _MOST_ROWS
    config = target.config.get_text_config()
    heads = attention_heads(config, config.hidden_size)
    size_of_position = 2 * num_target_layers(config) * heads["num_key_value_heads"] * heads["head_dim"]
    bytes_of_row = size_of_position * _MAX_LENGTH * target.dtype.itemsize
    return min(max(_CACHE_BYTES // bytes_of_row, _FEWEST_ROWS), _MOST_ROWS)


def _dtype(device: torch.device) -> str:
    return "float32" if device.type == "cpu" else "bfloat16"


def result_table(figures: dict, run: Run) -> Table:
    """A table: decoding without and with the draft, and what making it took."""
    data = run.steps["synthesis"]
    updates = sum(count for count, _ in run.steps["training"]["updates"].values())
    packed = ", weights packed for the CPU both times" if figures["packed"] else ""
    caption = (
        f"greedy, {run.settings['max_new_tokens']} new tokens, {figures['num_prompts']} prompt(s), {figures['num_identical']} with "
        f"the same output{packed}\nmade from {data['num_conversations']} conversations, {data['num_tokens']} tokens, {updates} "
        f"updates in {run.spent() / 60:.1f} minutes"
    )
    table = Table(box=box.SIMPLE, pad_edge=False, caption=caption)
    for name in ("", "tau", "tokens/s", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("without a draft", "1.00", f"{figures['plain_tokens_per_second']:.1f}", "1.00")
    tau, rate = figures["acceptance_length_pooled"] or 1.0, figures["draft_tokens_per_second"]
    table.add_row(f"with {escape(run.output.name)}", f"{tau:.2f}", f"{rate:.1f}", f"{figures['ratio']:.2f}")
    return table
