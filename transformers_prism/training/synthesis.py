"""Conversations that the target writes itself: answers to given prompts, or user turns and answers both.

An instruct model asked with nothing but its own template's user prefix writes what a user might say; its answer to
that is what a draft has to predict. Conversation number i depends on (seed, i) alone, not on what is decoded beside it,
and shards hold the numbers in order, so that an interrupted run goes on as if it had not been.

    transformers-prism synthesize --num-tokens 1000000 --output data
    transformers-prism synthesize --prompts prompts.jsonl --num-tokens 1000000 --output data
Source: Magpie (arXiv:2406.08464) for asking with the user prefix alone.
"""

import json
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from transformers_prism.configuration_prism import target_fingerprint
from transformers_prism.training.conversations import (
    ChatPieces,
    Contamination,
    Conversation,
    loop_period,
    opening,
    template_hash,
    tokenize,
)
from transformers_prism.training.slots import Slots
from transformers_prism.whole_files import whole_file, write_json

logger = logging.getLogger(__name__)

CONVERSATIONS_PER_SHARD = 64
# Ways to begin a user turn that lead to a kind of task; the target writes the rest.
TOPICS = {
    "code": (
        "Write a Python function that",
        "Write a function in JavaScript that",
        "Here is my code:\n```python\n",
        "How do I use SQL to",
        "Explain what this code does:\n```",
    ),
    "math": ("A farmer has", "Solve for x:", "If a train", "What is the sum of", "A store sells", "Calculate the"),
    "writing": ("Write a short story about", "Write an email to", "Rewrite the following", "Summarize this text:"),
    "translation": (
        "Translate the following sentence into",
        "How do you say",
        "Translate German to English:",
        "Translate this French text to English:",
        "Translate from Spanish to English:",
    ),
    # Texts that the answer is about, which the target writes, too.
    "reading": (
        "Summarize:",
        "Give a short summary of this article:",
        "Answer the question with the help of the text below.\nText:",
        "Read the passage and say what it is about.\n\n",
    ),
}


@dataclass(frozen=True)
class SynthesisConfig:
    """What a run depends on besides the target.

    Args:
        num_tokens: stop when so many tokens are kept.
        batch_size: rows decoded at once.
        temperatures: of answers; each conversation draws one, 0 is greedy.
        top_k: tokens that sampling chooses from.
        user_temperature, user_top_k: of user turns.
        max_user_tokens, max_answer_tokens: a longer user turn drops the conversation; a longer answer is cut there.
        max_turns: user turns of a conversation at most; each conversation draws a number.
        topics: names of [`TOPICS`] that some user turns begin with.
        topic_share: share of conversations that do.
        system_prompts: each conversation draws one; none leaves the template's own.
        max_length: tokens of a conversation; a batch's keys and values take room for so many in every row at once.
        seed: of everything.
    """

    num_tokens: int
    batch_size: int = 64
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.0, 0.6, 0.7, 0.8)
    top_k: int = 100
    user_temperature: float = 0.9
    user_top_k: int = 200
    max_user_tokens: int = 160
    max_answer_tokens: int = 300
    max_turns: int = 2
    topics: tuple[str, ...] = ()
    topic_share: float = 0.3
    system_prompts: tuple[str, ...] = ()
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self):
        for name in ("num_tokens", "batch_size", "max_user_tokens", "max_answer_tokens", "max_turns", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        turn = self.max_user_tokens + self.max_answer_tokens
        if self.max_length < turn:
            raise ValueError(
                f"max_length: expected at least {turn}, room for a user turn and an answer, got {self.max_length}"
            )
        unknown = [topic for topic in self.topics if topic not in TOPICS]
        if unknown:
            raise ValueError(f"topics: expected some of {', '.join(TOPICS)}, got {unknown[0]!r}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures: expected numbers of at least 0, got {self.temperatures}")


@dataclass
class _Row:
    """A conversation being written.

    `forced` holds tokens that come next whatever the target says: what the template writes between turns, and given
    user turns.
    """

    index: int
    tokens: list[int]
    temperature: float
    num_turns: int
    given_turns: deque[list[int]]
    generator: torch.Generator
    is_user: bool
    forced: deque[int] = field(default_factory=deque)
    spans: list[tuple[int, int]] = field(default_factory=list)
    user_start: int = 0
    start: int = 0  # of the turn that is being written
    first_user: tuple[int, ...] = ()
    refusal: str | None = None

    def conversation(self) -> Conversation:
        """What was written."""
        return Conversation(tuple(self.tokens), tuple(self.spans))


class Synthesizer:
    """Writes conversations.

    Args:
        target (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): an instruct model with its chat template.
        config (`SynthesisConfig`): of the run.
        chats (`list[list[dict]]`, *optional*): given prompts as messages; conversation i answers chat i. Without them
            the target writes the user turns, too.
    Raises:
        ValueError: if the template cannot be taken apart.
    """

    def __init__(self, target, tokenizer, config: SynthesisConfig, chats: list[list[dict]] | None = None):
        self.target, self.tokenizer, self.config, self.chats = target, tokenizer, config, chats
        eos = target.generation_config.eos_token_id
        if eos is None:
            eos = tokenizer.eos_token_id
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        pieces = ChatPieces.of(tokenizer)
        self.to_assistant = tokenize(tokenizer, pieces.user_to_assistant)
        self.to_user = tokenize(tokenizer, pieces.assistant_to_user)

    @property
    def num_conversations(self) -> int | None:
        """How many there can be; None without end."""
        return None if self.chats is None else len(self.chats)

    def run(self, indices: Iterator[int]) -> Iterator[_Row]:
        """Write the conversations of these numbers; they come out in the order in which they end."""
        slots = Slots(self.target, self.config.batch_size, self.config.max_length + 1)
        rows: dict[int, _Row] = {}
        logits: dict[int, torch.Tensor] = {}
        waiting = iter(indices)
        while True:
            for slot in range(self.config.batch_size):
                if slot in rows:
                    continue
                row = self._next_row(waiting)
                if row is None:
                    break
                if row.refusal is not None:
                    yield row
                    continue
                rows[slot] = row
                logits[slot] = slots.fill(slot, row.tokens, is_shared=self.chats is None)
            if not rows:
                return
            for slot, token in self._choose(rows, logits).items():
                self._append(rows[slot], token)
            for slot in [slot for slot, row in rows.items() if self._is_done(row)]:
                yield rows.pop(slot)
            logits = slots.step({slot: row.tokens[-1] for slot, row in rows.items()}) if rows else {}

    def _next_row(self, waiting: Iterator[int]) -> _Row | None:
        index = next(waiting, None)
        if index is None:
            return None
        config, chance = self.config, random.Random(f"{self.config.seed}-{index}")
        generator = torch.Generator().manual_seed(chance.getrandbits(60))
        temperature = chance.choice(config.temperatures)
        system = chance.choice(config.system_prompts) if config.system_prompts else None
        num_turns = chance.randint(1, config.max_turns)
        topic = ""
        if config.topics and chance.random() < config.topic_share:
            topic = chance.choice(TOPICS[chance.choice(config.topics)])
        if self.chats is None:
            tokens = tokenize(self.tokenizer, opening(self.tokenizer, system))
            row = _Row(index, tokens, temperature, num_turns, deque(), generator, is_user=True)
            row.user_start = row.start = len(tokens)
            row.forced.extend(tokenize(self.tokenizer, topic) if topic else [])
            return row
        return self._row_of_chat(index, temperature, system, generator)

    def _row_of_chat(self, index: int, temperature: float, system: str | None, generator) -> _Row:
        chat = self.chats[index]
        own_system = next((turn["content"] for turn in chat if turn["role"] == "system"), system)
        turns = [tokenize(self.tokenizer, turn["content"]) for turn in chat if turn["role"] == "user"]
        tokens = tokenize(self.tokenizer, opening(self.tokenizer, own_system))
        given = deque(turns[1 : self.config.max_turns])
        row = _Row(index, tokens, temperature, 1 + len(given), given, generator, is_user=False)
        if not turns or not turns[0]:
            row.refusal = "no user turn"
            return row
        row.first_user = tuple(turns[0])
        row.tokens = [*tokens, *turns[0], *self.to_assistant]
        row.start = len(row.tokens)
        if len(row.tokens) + self.config.max_answer_tokens > self.config.max_length:
            row.refusal = "prompt too long"
        return row

    # --- one token -----------------------------------------------------------------------------------------------

    def _choose(self, rows: dict[int, _Row], logits: dict[int, torch.Tensor]) -> dict[int, int]:
        """The next token of every row."""
        chosen = {slot: row.forced.popleft() for slot, row in rows.items() if row.forced}
        free = [slot for slot in rows if slot not in chosen]
        if not free:
            return chosen
        stacked = torch.stack([logits[slot] for slot in free]).float()
        greedy = [self._temperature(rows[slot]) == 0.0 for slot in free]
        best = stacked.argmax(dim=-1).tolist()
        drawn = [i for i, is_greedy in enumerate(greedy) if not is_greedy]
        if drawn:
            logits_drawn = stacked[torch.tensor(drawn, device=stacked.device)]
            tokens = self._draw(logits_drawn, [rows[free[i]] for i in drawn])
            for i, token in zip(drawn, tokens, strict=True):
                best[i] = token
        chosen.update(zip(free, best, strict=True))
        return chosen

    def _temperature(self, row: _Row) -> float:
        return self.config.user_temperature if row.is_user else row.temperature

    def _draw(self, logits: torch.Tensor, rows: list[_Row]) -> list[int]:
        """Sample each row with noise of its own, so that it does not matter what is decoded beside it."""
        top_ks = [self.config.user_top_k if row.is_user else self.config.top_k for row in rows]
        # Of an accelerator's logits only these few come to the host.
        values, tokens = (best.cpu() for best in logits.topk(min(max(top_ks), logits.shape[-1]), dim=-1))
        temperatures = torch.tensor([self._temperature(row) for row in rows])[:, None]
        is_kept = torch.arange(values.shape[1])[None] < torch.tensor(top_ks)[:, None]
        probs = (values / temperatures).masked_fill(~is_kept, -torch.inf).softmax(dim=-1)
        noise = torch.stack([torch.empty(values.shape[1]).exponential_(generator=row.generator) for row in rows])
        return tokens.gather(1, (probs / noise).argmax(dim=-1, keepdim=True))[:, 0].tolist()

    def _append(self, row: _Row, token: int) -> None:
        """Add a token, and what the template writes if it ends a turn."""
        was_forced = len(row.tokens) < row.start
        if row.is_user and token in self.eos_ids and not was_forced:
            self._end_user_turn(row)
            return
        row.tokens.append(token)
        if was_forced:
            return
        length = len(row.tokens) - row.start
        if row.is_user:
            if length >= self.config.max_user_tokens:
                row.refusal = "user turn too long"
        elif token in self.eos_ids or length >= self.config.max_answer_tokens:
            self._end_answer(row, is_cut=token not in self.eos_ids)

    def _end_user_turn(self, row: _Row) -> None:
        words = tuple(row.tokens[row.user_start :])
        if len(words) < 3:
            row.refusal = "empty user turn"
            # The row ends here: nothing more is fed.
            return
        if not row.spans:
            row.first_user = words
        row.is_user = False
        # The template's own end of the turn takes the place of the token that ended it.
        self._force(row, self.to_assistant)
        row.tokens.append(row.forced.popleft())

    def _end_answer(self, row: _Row, is_cut: bool) -> None:
        row.spans.append((row.start, len(row.tokens)))
        if len(row.tokens) - row.start <= 1 and not is_cut:
            row.refusal = "empty answer"
        elif loop_period(row.tokens[row.start :]) is not None:
            row.refusal = "answer ends in a loop"
        config = self.config
        room = config.max_length - len(row.tokens) - len(self.to_user) - len(self.to_assistant)
        needs = config.max_user_tokens + config.max_answer_tokens
        if row.given_turns:
            needs = len(row.given_turns[0]) + config.max_answer_tokens
        if is_cut or row.refusal or len(row.spans) >= row.num_turns or room < needs:
            row.num_turns = len(row.spans)
            return
        between = self.to_user[1:] if self.to_user[:1] == row.tokens[-1:] else self.to_user
        if row.given_turns:
            self._force(row, [*between, *row.given_turns.popleft(), *self.to_assistant])
            return
        row.is_user = True
        self._force(row, between)
        row.user_start = row.start

    def _force(self, row: _Row, tokens: list[int]) -> None:
        """Let these tokens come next; the turn begins behind them."""
        row.start = len(row.tokens) + len(tokens)
        row.forced.extend(tokens)

    def _is_done(self, row: _Row) -> bool:
        return row.refusal is not None or (
            not row.forced and len(row.spans) >= row.num_turns and row.spans[-1][1] == len(row.tokens)
        )


# --- the run -----------------------------------------------------------------------------------------------------


def synthesize(
    target,
    tokenizer,
    config: SynthesisConfig,
    output,
    chats: list[list[dict]] | None = None,
    contamination: Contamination | None = None,
    part: tuple[int, int] = (0, 1),
    report: Callable[[dict], None] = lambda progress: None,
) -> dict:
    """Write conversations to Parquet shards in a folder; a folder with a part of them is gone on with.

    Args:
        target, tokenizer, config, chats: as for [`Synthesizer`].
        output (`str` or path): the folder.
        contamination (`Contamination`, *optional*): leaves conversations out that hold a benchmark's prompts.
        part (`tuple[int, int]`): of `(index, count)` processes; each writes its share of the tokens to its own shards.
        report (`Callable`): called after each conversation with tokens kept, of how many, and tokens written per second.
    Returns:
        `dict`: counts of what was kept and why the rest was not, over all shards of this process.
    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    folder = Path(output)
    synthesizer = Synthesizer(target, tokenizer, config, chats)
    provenance = _provenance(target, tokenizer, config, chats, part[1])
    _claim(folder, provenance, part)
    writer = _Shards(folder, provenance, config, contamination, part)
    started, num_written = time.monotonic(), 0
    while not writer.is_full:
        first = writer.num_decided
        # What is refused at the end, as a duplicate of what was still being written, is made up for.
        for row in synthesizer.run(_numbers(writer, part, synthesizer.num_conversations)):
            num_written += len(row.tokens)
            writer.add(row)
            seconds = time.monotonic() - started
            report({"kept": writer.num_tokens, "goal": writer.goal, "tokens_per_second": num_written / seconds})
        if writer.num_decided == first:
            writer.finish()
    return writer.summary()


def _numbers(writer: "_Shards", part: tuple[int, int], num_conversations: int | None) -> Iterator[int]:
    """Numbers of the conversations to write, until enough are kept."""
    turn = writer.num_decided
    while not writer.has_enough:
        number = part[0] + turn * part[1]
        if num_conversations is not None and number >= num_conversations:
            return
        yield number
        turn += 1


def _provenance(target, tokenizer, config: SynthesisConfig, chats, num_processes: int) -> dict:
    import transformers

    import transformers_prism

    return {
        "target": target_fingerprint(target.config, tokenizer),
        "compute_dtype": str(target.dtype).removeprefix("torch."),
        "chat_template_sha256": template_hash(tokenizer),
        "source": "the target's own user turns" if chats is None else f"{len(chats)} given prompts",
        "config": json.loads(json.dumps(asdict(config))),
        "num_processes": num_processes,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "transformers_prism": transformers_prism.__version__,
        },
    }


def _claim(folder: Path, provenance: dict, part: tuple[int, int]) -> None:
    """Record what the folder holds, or compare with what it says it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "provenance.json"
    if not path.is_file():
        write_json(path, provenance)
        return
    found = json.loads(path.read_text())
    for name in ("target", "chat_template_sha256", "source", "config", "num_processes"):
        if found.get(name) != provenance[name]:
            raise ValueError(
                f"{folder.name}: expected a run with {name}={found.get(name)!r} as it began, got {provenance[name]!r}; "
                "use another folder"
            )


class _Shards:
    """Decides in the order of their numbers which conversations are kept, and writes them, a shard at a time."""

    def __init__(self, folder: Path, provenance: dict, config: SynthesisConfig, contamination, part: tuple[int, int]):
        self.folder, self.provenance, self.contamination, self.part = folder, provenance, contamination, part
        self.goal = -(-config.num_tokens // part[1])
        self.waiting: dict[int, _Row] = {}  # ended before one with a smaller number
        self.kept: list[_Row] = []
        self.refused: Counter[str] = Counter()
        self.seen: set[tuple[int, ...]] = set()
        self.num_tokens = self.num_waiting_tokens = 0
        self.num_decided = self.num_shards = self.num_kept = 0
        self.is_full = False
        self._read_back()

    @property
    def has_enough(self) -> bool:
        """Whether nothing new needs to be begun."""
        return self.num_tokens + self.num_waiting_tokens >= self.goal

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{self.part[0]:03d}-{number:05d}.parquet"

    def _read_back(self) -> None:
        """Take stock of shards that an earlier run wrote."""
        import pyarrow.parquet

        while self._path(self.num_shards).is_file():
            table = pyarrow.parquet.read_table(self._path(self.num_shards))
            state = json.loads(table.schema.metadata[b"prism_state"])
            self.num_decided, self.is_full = state["num_decided"], state["is_full"]
            self.refused = Counter(state["refused"])
            self.seen.update(map(tuple, table["first_user_turn"].to_pylist()))
            self.num_tokens += sum(map(len, table["input_ids"].to_pylist()))
            self.num_kept += table.num_rows
            self.num_shards += 1

    def add(self, row: _Row) -> None:
        """Take in a conversation that has ended."""
        self.waiting[(row.index - self.part[0]) // self.part[1]] = row
        self.num_waiting_tokens += 0 if row.refusal else len(row.tokens)
        while self.num_decided in self.waiting and not self.is_full:
            self._decide(self.waiting.pop(self.num_decided))

    def _decide(self, row: _Row) -> None:
        self.num_waiting_tokens -= 0 if row.refusal else len(row.tokens)
        self.num_decided += 1
        if row.refusal is None and row.first_user in self.seen:
            row.refusal = "duplicate"
        elif row.refusal is None and self.contamination is not None:
            if self.contamination.holds(row.tokens, row.first_user):
                row.refusal = "holds a benchmark's prompt"
        if row.refusal is not None:
            self.refused[row.refusal] += 1
        else:
            self.seen.add(row.first_user)
            self.kept.append(row)
            self.num_tokens += len(row.tokens)
        self.is_full = self.num_tokens >= self.goal
        if self.num_decided % CONVERSATIONS_PER_SHARD == 0 or self.is_full:
            self._write()

    def finish(self) -> None:
        """Write what is left where the prompts have run out."""
        if not self.is_full:
            self.is_full = True
            self._write()

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = {
            "index": [row.index for row in self.kept],
            "input_ids": [row.tokens for row in self.kept],
            "assistant_spans": [[list(span) for span in row.spans] for row in self.kept],
            "first_user_turn": [list(row.first_user) for row in self.kept],
            "temperature": [row.temperature for row in self.kept],
        }
        types = pyarrow.schema(
            [
                ("index", pyarrow.int64()),
                ("input_ids", pyarrow.list_(pyarrow.int32())),
                ("assistant_spans", pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
                ("first_user_turn", pyarrow.list_(pyarrow.int32())),
                ("temperature", pyarrow.float32()),
            ]
        )
        state = {"num_decided": self.num_decided, "is_full": self.is_full, "refused": dict(self.refused)}
        metadata = {"prism": json.dumps(self.provenance), "prism_state": json.dumps(state)}
        table = pyarrow.table(columns, schema=types.with_metadata(metadata))
        with whole_file(self._path(self.num_shards)) as unfinished:
            pyarrow.parquet.write_table(table, unfinished, compression="zstd")
        self.num_kept += len(self.kept)
        self.num_shards += 1
        self.kept = []

    def summary(self) -> dict:
        """Counts over all shards."""
        return {
            "num_conversations": self.num_kept,
            "num_tokens": self.num_tokens,
            "left_out": dict(self.refused.most_common()),
            "num_shards": self.num_shards,
        }


class SynthesisProgress:
    """Shows how far a run is: a bar in a terminal, else a line every half minute. Called with what `report` gets."""

    def __init__(self):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} tokens, {task.fields[speed]:.0f}/s"))
        self.bar = Progress(*columns, TimeRemainingColumn())
        self.is_terminal = self.bar.console.is_terminal
        self.task = self.bar.add_task("", total=None, speed=0.0) if self.is_terminal else None
        self.last_line = 0.0

    def __enter__(self) -> "SynthesisProgress":
        if self.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error) -> None:
        if self.is_terminal:
            self.bar.stop()

    def __call__(self, progress: dict) -> None:
        kept, goal, speed = (progress[name] for name in ("kept", "goal", "tokens_per_second"))
        if self.is_terminal:
            self.bar.update(self.task, completed=kept, total=goal, speed=speed)
        elif time.monotonic() - self.last_line > 30:
            self.last_line = time.monotonic()
            seconds = max(goal - kept, 0) / max(speed, 1e-9)
            logger.warning("%d of %d tokens kept, %.0f tokens/s, %.0f s left", kept, goal, speed, seconds)
