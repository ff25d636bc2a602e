"""What a terminal shows: text as it is decoded, with accepted and bonus tokens in two colours, and a table of figures."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from transformers_prism.bench.methods import can_be_packed
from transformers_prism.bench.prompts import check_positions
from transformers_prism.cli.options import log_information
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.decoding.speculation import Speculation, acceptance_length
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import find_device, load_target, naming
from transformers_prism.transformers_names import name_of

logger = logging.getLogger(__name__)

SHIPPED_DRAFT = Path(__file__).resolve().parents[2] / "hub_cards" / "SmolLM2-135M-Instruct-PRISM"
PROMPTS = (
    "Why is the sky blue? Answer in three sentences.",
    "Write a short story about a robot that learns to paint.",
    "Give me five tips for learning a new language.",
)
STYLES = {"plain": "default", "accepted": "green", "bonus": "bold yellow"}


class RoundStreamer(BaseStreamer):
    """Prints tokens as they come: those of the draft that were accepted in one colour, the target's own in another.

    Args:
        console (`rich.console.Console`): where to print.
        tokenizer (`PreTrainedTokenizerBase`): decodes the tokens.
    """

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase):
        self.console = console
        self.tokenizer = tokenizer
        self.has_prompt = False
        self.num_accepted = 0  # of the current round, still to come
        self.is_round = False
        self.token_ids: list[int] = []
        self.num_printed = 0  # characters

    def put_round(self, num_accepted: int) -> None:
        """Called before the tokens of a round: that many were drafted, and one bonus token follows."""
        self.num_accepted = num_accepted
        self.is_round = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt `(1, T)`, then one token `(1,)` at a time."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        for token_id in value.flatten().tolist():
            kind = "plain" if not self.is_round else "accepted" if self.num_accepted > 0 else "bonus"
            self.num_accepted -= 1
            self.token_ids.append(token_id)
            text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
            # A character of several bytes may need several tokens; until it is whole it ends in a replacement mark.
            if not text.endswith("\ufffd"):
                self._print(text[self.num_printed :], kind)
                self.num_printed = len(text)

    def end(self) -> None:
        """Close the line."""
        self.console.print()

    def _print(self, text: str, kind: str) -> None:
        self.console.print(Text(text, style=STYLES[kind]), end="", soft_wrap=True)


@dataclass(frozen=True)
class Comparison:
    """One prompt decoded with and without a draft; seconds are those of whole generate() calls."""

    prompt: str
    num_tokens: int
    is_identical: bool
    num_rounds: int
    num_committed: int
    plain_seconds: float
    draft_seconds: float


def chat_inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, device="cpu") -> dict:
    """A prompt as the inputs of generate(), in the chat template if the tokenizer has one."""
    if tokenizer.chat_template is None:
        inputs = dict(tokenizer(prompt, return_tensors="pt").to(device))
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError("prompt: expected a text of at least one token, got none")
        return inputs
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return dict(inputs.to(device))


def load_draft(folder: str | Path, target: PreTrainedModel) -> PrismDraftModel:
    """A draft from a folder or the Hub, in the target's dtype and on its device, and bound to it.

    Raises:
        FileNotFoundError: if the draft that this repository ships is asked for and is not there.
        ValueError: if it was made for another target.
    """
    if folder == SHIPPED_DRAFT and not (SHIPPED_DRAFT / "config.json").is_file():
        raise FileNotFoundError(
            f"expected the trained draft in {SHIPPED_DRAFT}, got no config.json there; install a clone of the "
            "repository with `pip install -e .`, or name a draft with --draft"
        )
    draft = PrismDraftModel.from_pretrained(str(folder), dtype=target.dtype).to(target.device)
    return draft.eval().bind(target)


def leave_beams(target: PreTrainedModel) -> str:
    """Let a target decode with one beam where its own generation settings ask for more; returns what to tell the user, or ""."""
    num_beams = target.generation_config.num_beams or 1
    if num_beams == 1:
        return ""
    target.generation_config.update(num_beams=1, num_beam_groups=None, early_stopping=None, length_penalty=None)
    return f"the target's own settings ask for {num_beams} beams; a draft serves one, so one is used here (num_beams=1)"


def load_pair(
    target_name: str | None,
    draft_name: str | None,
    packed: bool = False,
    device: str = "auto",
    dtype: str = "float32",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PrismDraftModel]:
    """A target with its tokenizer, and a draft bound to it.

    Args:
        target_name (`str`, *optional*): as for [`load_target`]; None is the demo target.
        draft_name (`str`, *optional*): folder or Hub id of the draft; None is the one that the repository ships.
        packed (`bool`): prepare both models with [`prepare_for_cpu`], if they are on a CPU, in a dtype that it can pack;
            plain decoding gets them, too.
        device (`str`): of both models, as for [`find_device`].
        dtype (`str`): of both models, such as "bfloat16".
    """
    place = find_device(device)
    with naming("target", target_name):
        target, tokenizer = load_target(target_name, getattr(torch, dtype))
    target.to(place)
    if note := leave_beams(target):
        logger.warning(note)
    with naming("draft", draft_name):
        draft = load_draft(draft_name or SHIPPED_DRAFT, target)
    if packed and can_be_packed(target.device, target.dtype):
        prepare_for_cpu(target, draft)
    return target, tokenizer, draft


def answer_once(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, draft: PrismDraftModel) -> None:
    """Decode a short answer, in which costs are measured, so that the first real answer does not wait for that."""
    inputs = chat_inputs(tokenizer, "Hello!", target.device)
    target.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=draft)


def run_demo(
    target_name: str | None, draft_folder: str | None, max_new_tokens: int, packed: bool, device: str, dtype: str, console: Console
) -> None:
    """Answer three prompts with and without the draft: text that streams, then a table.

    Args:
        target_name, draft_folder, packed, device, dtype: as for [`load_pair`].
        max_new_tokens (`int`): tokens per answer.
        console (`rich.console.Console`): where to print.
    """
    log_to(console)
    target, tokenizer, draft = load_pair(target_name, draft_folder, packed, device, dtype)
    console.print(f"Target: {name_of(target.config)}. Draft: {draft_folder or SHIPPED_DRAFT.name}.", soft_wrap=True)
    console.print(_legend())
    target.generate(**chat_inputs(tokenizer, "Hello!", target.device), max_new_tokens=8, do_sample=False)
    comparisons = []
    for prompt in PROMPTS:
        console.print(Text(f"\n> {prompt}", style="bold"))
        inputs = chat_inputs(tokenizer, prompt, target.device)
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
        target.generate(**inputs, **settings, assistant_model=draft, streamer=RoundStreamer(console, tokenizer))
        comparisons.append(compare(target, draft, inputs, settings, prompt))
    console.print()
    weights = "weights packed for the CPU, for both ways" if packed and can_be_packed(target.device, target.dtype) else "weights as loaded"
    console.print(comparison_table(comparisons, f"greedy decoding, {weights}"))


def run_generate(
    target_name, draft_folder, prompt: str, settings: dict, packed: bool, device: str, dtype: str, console: Console
) -> None:
    """Answer one prompt with a draft and say how it went.

    Args:
        target_name, draft_folder, packed, device, dtype: as for [`load_pair`].
        prompt (`str`): the user's turn.
        settings (`dict`): further arguments of generate().
        console (`rich.console.Console`): where to print.
    """
    log_to(console)
    target, tokenizer, draft = load_pair(target_name, draft_folder, packed, device, dtype)
    console.print(_legend())
    inputs = chat_inputs(tokenizer, prompt, target.device)
    check_positions(target, [inputs], settings["max_new_tokens"])
    streamer = RoundStreamer(console, tokenizer)
    target.generate(**inputs, **settings, assistant_model=draft, streamer=streamer, tokenizer=tokenizer)
    assert draft.last_speculation is not None, "generate() leaves what it did"
    console.print(draft.last_speculation.summary(), highlight=False, soft_wrap=True)


def compare(target, draft, inputs: dict, settings: dict, prompt: str = "") -> Comparison:
    """Decode once without and once with the draft, silently, and compare."""
    plain, plain_seconds = _timed(target, inputs, settings)
    speculated, draft_seconds = _timed(target, inputs, {**settings, "assistant_model": draft})
    speculation: Speculation = draft.last_speculation
    return Comparison(
        prompt=prompt,
        num_tokens=speculated.shape[1] - inputs["input_ids"].shape[1],
        is_identical=torch.equal(plain, speculated),
        num_rounds=sum(speculation.num_rounds),
        num_committed=sum(speculation.num_committed),
        plain_seconds=plain_seconds,
        draft_seconds=draft_seconds,
    )


def _timed(target, inputs, settings):
    start = time.perf_counter()
    output = target.generate(**inputs, **settings).cpu()
    return output, time.perf_counter() - start


def comparison_table(comparisons: list[Comparison], how: str = "") -> Table:
    """A row per prompt and one for all of them, whose rates are total tokens over total seconds; `how` is a caption."""
    caption = f"{how}\ntok/s: tokens per second of one whole generate() call".strip()
    table = Table(caption=caption, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("prompt", max_width=24, no_wrap=True)
    names = ("same\noutput", "\ntokens", "\nrounds", "accept.\nlength", "plain\ntok/s", "draft\ntok/s", "\nratio")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=max(len(line) for line in name.splitlines()))
    for comparison in comparisons:
        table.add_row(*_cells(comparison))
    table.add_section()
    table.add_row(
        *_cells(
            Comparison(
                prompt="all (pooled)",
                num_tokens=sum(comparison.num_tokens for comparison in comparisons),
                is_identical=all(comparison.is_identical for comparison in comparisons),
                num_rounds=sum(comparison.num_rounds for comparison in comparisons),
                num_committed=sum(comparison.num_committed for comparison in comparisons),
                plain_seconds=sum(comparison.plain_seconds for comparison in comparisons),
                draft_seconds=sum(comparison.draft_seconds for comparison in comparisons),
            )
        )
    )
    return table


def _cells(comparison: Comparison) -> list[str]:
    plain, draft = (comparison.num_tokens / s for s in (comparison.plain_seconds, comparison.draft_seconds))
    tau = acceptance_length(comparison.num_committed, comparison.num_rounds)
    return [
        comparison.prompt,
        "yes" if comparison.is_identical else "NO",
        str(comparison.num_tokens),
        str(comparison.num_rounds),
        "" if tau is None else f"{tau:.2f}",
        f"{plain:.1f}",
        f"{draft:.1f}",
        f"{draft / plain:.2f}",
    ]


def _legend() -> Text:
    return Text.assemble(
        ("accepted", STYLES["accepted"]), " tokens were drafted, ", ("bonus", STYLES["bonus"]), " tokens are the target's own."
    )


class _ConsoleHandler(logging.Handler):
    """Prints what is logged."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        self.console.print(record.getMessage(), style="dim", soft_wrap=True)


def log_to(console: Console) -> None:
    """Show log messages about loading the target (a download, a conversion) on this console."""
    logger = logging.getLogger("transformers_prism")
    if not logger.handlers:
        logger.addHandler(_ConsoleHandler(console))
        log_information()


__all__ = [
    "Comparison", "RoundStreamer", "answer_once", "chat_inputs", "compare", "comparison_table", "leave_beams", "load_draft",
    "load_pair", "log_to", "run_demo", "run_generate",
]
