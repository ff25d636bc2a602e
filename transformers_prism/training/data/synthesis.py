"""Conversations that the target writes itself: answers to given prompts, or user turns and answers both.

Given only the user prefix of its own chat template, an instruct model writes what a user might say; its answer to that
is what a draft has to predict. Conversation i depends on (seed, i) alone, not on what else is decoded, and shards hold
conversations in order, so an interrupted run can be resumed and writes the same.

    transformers-prism synthesize --num-tokens 1000000 --output data
    transformers-prism synthesize --prompts prompts.jsonl --num-tokens 1000000 --output data
Source: Magpie (arXiv:2406.08464) for asking with the user prefix alone.
"""

import hashlib
import json
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from transformers_prism.command_line import versions
from transformers_prism.configuration_prism import target_fingerprint
from transformers_prism.decoding.target_side import num_learned_positions
from transformers_prism.target import weights_digest
from transformers_prism.training.data.chats import RowError
from transformers_prism.training.data.conversations import Contamination, before_loop, loop_period
from transformers_prism.training.data.shards import ShardWriter, WrittenRow, claim_folder
from transformers_prism.training.data.templates import between_turns, opening, template_hash, tokenize, tokenize_behind
from transformers_prism.training.slots import Slots

logger = logging.getLogger(__name__)

# Beginnings of user turns that lead to a kind of task; the target writes the rest.
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
    # Tasks about a text, which the target writes, too.
    "reading": (
        "Summarize:",
        "Give a short summary of this article:",
        "Answer the question with the help of the text below.\nText:",
        "Read the passage and say what it is about.\n\n",
    ),
}

# A placeholder for the words that come before the template's text.
_WORD = "x"
# An answer that is cut by the time limit or by a loop is kept if it has at least this many tokens before the cut.
FEWEST_CUT_TOKENS = 16
# Tokens between two checks for a loop.
_TOKENS_BETWEEN_LOOKS = 16


@dataclass(frozen=True)
class SynthesisConfig:
    """What a run depends on in addition to the target.

    Args:
        num_tokens: stop when N tokens are kept.
        batch_size: sequences decoded at once.
        temperatures: of answers; each conversation draws one, 0 is greedy.
        top_k: tokens that sampling chooses from.
        user_temperature, user_top_k: of user turns.
        max_user_tokens, max_answer_tokens: a longer user turn drops the conversation; a longer answer is cut there.
        max_turns: user turns of a conversation at most; each conversation draws a number.
        topics: names of [`TOPICS`] that some user turns begin with.
        topic_share: share of conversations that begin with one.
        system_prompts: each conversation draws one; none leaves the template's own.
        max_length: tokens of a conversation at most; keys and values of that many positions are allocated per sequence.
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
        if not self.temperatures or not all(0 <= one < math.inf for one in self.temperatures):
            raise ValueError(f"temperatures: expected numbers of at least 0, none infinite, got {self.temperatures}")


def tokens_of_a_turn(tokenizer, config: SynthesisConfig) -> int:
    """Tokens of the longest user turn and answer, with what the chat template writes around them.

    Raises:
        ValueError: if the template cannot be taken apart.
    """
    openings = (opening(tokenizer, system) for system in config.system_prompts or (None,))
    longest = max(len(tokenize(tokenizer, text)) for text in openings)
    to_assistant = len(tokenize(tokenizer, between_turns(tokenizer)[0]))
    return longest + config.max_user_tokens + to_assistant + config.max_answer_tokens


class Synthesizer:
    """Writes conversations of an instruct model with its chat template: answers to `chats`, conversation i to chat i,
    or without them user turns and answers both.

    Raises:
        ValueError: if the template cannot be taken apart.
    """

    def __init__(self, target, tokenizer, config: SynthesisConfig, chats: Sequence[list[dict]] | None = None):
        self.target, self.tokenizer, self.config, self.chats = target, tokenizer, config, chats
        eos = target.generation_config.eos_token_id
        if eos is None:
            eos = tokenizer.eos_token_id
        self.eos_ids = set(eos if isinstance(eos, list) else [eos])
        self.texts_between = between_turns(tokenizer)
        self.to_assistant, self.to_user = (tokenize_behind(tokenizer, _WORD, text) for text in self.texts_between)
        # The token that ends a turn in the template; a target's generation settings may lack it.
        self.eos_ids.update(token for token in self.to_user[:1] if token in tokenizer.all_special_ids)
        num_positions = num_learned_positions(target)
        if num_positions is not None and config.max_length > num_positions:
            raise ValueError(f"max_length: expected at most {num_positions}, the target's positions, got {config.max_length}")
        needed = tokens_of_a_turn(tokenizer, config)  # also fails here if the template refuses a system prompt
        if chats is None and config.max_length < needed:
            raise ValueError(
                f"max_length: expected at least {needed}, room for a user turn, an answer and what the chat template writes "
                f"around them, got {config.max_length}"
            )

    @property
    def num_conversations(self) -> int | None:
        """How many conversations can be written; None if there is no limit."""
        return None if self.chats is None else len(self.chats)

    def run(self, indices: Iterator[int], is_over: Callable[[], bool] = lambda: False) -> Iterator[WrittenRow]:
        """Write the conversations of these numbers; they come out in the order in which they end.

        Args:
            indices (`Iterator[int]`): numbers of the conversations.
            is_over (`Callable`): asked before each forward; once True, answers end where they are.
        """
        slots = Slots(self.target, self.config.batch_size, self.config.max_length + 1)
        rows: dict[int, WrittenRow] = {}
        logits = torch.empty(0, device="cpu")  # [B, V], from the first row on
        waiting = iter(indices)
        while True:
            if is_over():
                yield from map(self._cut, rows.values())
                return
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
                of_row = slots.fill(slot, row.tokens, is_shared=self.chats is None)
                if not logits.numel():
                    logits = of_row.new_zeros(self.config.batch_size, len(of_row))
                logits[slot] = of_row
            if not rows:
                return
            for slot, token in self._choose(rows, logits).items():
                self._append(rows[slot], token)
            for slot in [slot for slot, row in rows.items() if self._is_done(row)]:
                yield rows.pop(slot)
            if rows:
                logits = slots.step({slot: row.tokens[-1] for slot, row in rows.items()})

    def _next_row(self, waiting: Iterator[int]) -> WrittenRow | None:
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
        if self.chats is not None:
            return self._row_of_chat(index, self.chats[index], temperature, system, generator)
        before = opening(self.tokenizer, system)
        tokens = tokenize(self.tokenizer, before)
        row = WrittenRow(index, tokens, temperature, num_turns, deque(), generator, is_user=True)
        row.user_start = row.start = len(tokens)
        row.forced.extend(tokenize_behind(self.tokenizer, before, topic) if topic else [])
        return row

    def _row_of_chat(self, index: int, chat: list[dict], temperature: float, system: str | None, generator) -> WrittenRow:
        own_system = next((turn["content"] for turn in chat if turn["role"] == "system"), system)
        turns = [turn["content"] for turn in chat if turn["role"] == "user"]
        to_assistant, to_user = self.texts_between
        texts = (f"{to_user}{turn}{to_assistant}" for turn in turns[1 : self.config.max_turns])
        given = deque(tokenize_behind(self.tokenizer, _WORD, text) for text in texts)
        row = WrittenRow(index, [], temperature, 1 + len(given), given, generator, is_user=False)
        if not turns or not tokenize(self.tokenizer, turns[0]):
            row.refusal = "no user turn"
            return row
        try:
            before = opening(self.tokenizer, own_system)
        except RowError as error:  # some templates take no system turn
            row.refusal = str(error)
            return row
        row.first_user = tuple(tokenize(self.tokenizer, turns[0]))
        # Tokenized as one text, as the target's prompts are elsewhere.
        row.tokens = tokenize(self.tokenizer, f"{before}{turns[0]}{to_assistant}")
        row.start = len(row.tokens)
        if len(row.tokens) + self.config.max_answer_tokens > self.config.max_length:
            row.refusal = "prompt too long"
        return row

    def _choose(self, rows: dict[int, WrittenRow], logits: torch.Tensor) -> dict[int, int]:
        """The next token of every row, by its slot, given the logits `(B, V)` of all slots."""
        chosen = {slot: row.forced.popleft() for slot, row in rows.items() if row.forced}
        free = [slot for slot in rows if slot not in chosen]
        drawn = [slot for slot in free if self._temperature(rows[slot]) > 0.0]
        if len(drawn) < len(free):
            best = logits.argmax(dim=-1).tolist()
            chosen.update((slot, best[slot]) for slot in free)
        if drawn:
            chosen.update(zip(drawn, self._draw(logits, {slot: rows[slot] for slot in drawn}), strict=True))
        return chosen

    def _temperature(self, row: WrittenRow) -> float:
        return self.config.user_temperature if row.is_user else row.temperature

    def _draw(self, logits: torch.Tensor, rows_of_slots: dict[int, WrittenRow]) -> list[int]:
        """Sample in some slots, each with its own random generator, so that it does not matter what else is decoded."""
        slots, rows = list(rows_of_slots), list(rows_of_slots.values())
        top_ks = [self.config.user_top_k if row.is_user else self.config.top_k for row in rows]
        # Top-k of all slots, since copying some of them takes longer. Only these few values leave an accelerator.
        values, tokens = (best.cpu()[slots] for best in logits.topk(min(max(top_ks), logits.shape[-1]), dim=-1))
        values, temperatures = values.float(), torch.tensor([self._temperature(row) for row in rows])[:, None]
        is_kept = torch.arange(values.shape[1])[None] < torch.tensor(top_ks)[:, None]
        probs = (values / temperatures).masked_fill(~is_kept, -torch.inf).softmax(dim=-1)
        # As many draws as the sequence itself can choose from, whatever the others need.
        noise = torch.ones(values.shape)
        for drawn, top_k, row in zip(noise, top_ks, rows, strict=True):
            drawn[:top_k].exponential_(generator=row.generator)
        return tokens.gather(1, (probs / noise).argmax(dim=-1, keepdim=True))[:, 0].tolist()

    def _append(self, row: WrittenRow, token: int) -> None:
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
        elif length % _TOKENS_BETWEEN_LOOKS == 0 and loop_period(row.tokens[row.start :]) is not None:
            self._end_answer(row, is_cut=True)

    def _end_user_turn(self, row: WrittenRow) -> None:
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

    def _end_answer(self, row: WrittenRow, is_cut: bool) -> None:
        answer = before_loop(row.tokens[row.start :])
        is_loop = row.start + len(answer) < len(row.tokens)
        row.tokens[row.start :] = answer
        row.spans.append((row.start, len(row.tokens)))
        if is_loop and len(answer) < FEWEST_CUT_TOKENS:
            row.refusal = "answer is a loop"
        elif len(answer) <= 1 and not is_cut:
            row.refusal = "empty answer"
        is_cut = is_cut or is_loop
        config = self.config
        room = config.max_length - len(row.tokens)
        needs = len(self.to_user) + config.max_user_tokens + len(self.to_assistant) + config.max_answer_tokens
        if row.given_turns:
            needs = len(row.given_turns[0]) + config.max_answer_tokens
        if is_cut or row.refusal or len(row.spans) >= row.num_turns or room < needs:
            row.num_turns = len(row.spans)
            return
        following = row.given_turns.popleft() if row.given_turns else self.to_user
        row.is_user = following is self.to_user
        self._force(row, following[1:] if following[:1] == row.tokens[-1:] else following)
        if row.is_user:
            row.user_start = row.start

    def _cut(self, row: WrittenRow) -> WrittenRow:
        """End a conversation whose time is up: keep its last answer as far as written, or drop a turn that has just begun."""
        if not row.is_user and len(row.tokens) - row.start >= FEWEST_CUT_TOKENS:
            self._end_answer(row, is_cut=True)
        elif row.spans:
            row.tokens, row.num_turns = row.tokens[: row.spans[-1][1]], len(row.spans)
        else:
            row.refusal = "no time for an answer"
        return row

    def _force(self, row: WrittenRow, tokens: list[int]) -> None:
        """Let these tokens come next; the turn begins after them."""
        row.start = len(row.tokens) + len(tokens)
        row.forced.extend(tokens)

    def _is_done(self, row: WrittenRow) -> bool:
        return row.refusal is not None or (
            not row.forced and len(row.spans) >= row.num_turns and row.spans[-1][1] == len(row.tokens)
        )


def synthesize(
    target, tokenizer, config: SynthesisConfig, output, chats: Sequence[list[dict]] | None = None,
    contamination: Contamination | None = None, part: tuple[int, int] = (0, 1),
    report: Callable[[dict], None] = lambda progress: None, is_over: Callable[[], bool] = lambda: False
) -> dict:
    """Write conversations to Parquet shards in a folder; an unfinished folder is resumed.

    Args:
        target, tokenizer, config, chats: as for [`Synthesizer`].
        output (`str` or path): the folder.
        contamination (`Contamination`, *optional*): leaves out conversations that contain a benchmark's prompts.
        part (`tuple[int, int]`): of `(index, count)` processes; each writes its share of the tokens to its own shards.
        report (`Callable`): called after each conversation with a dict of token counts: `written` by conversations that have
            ended, the `goal`, and those kept `before` by earlier runs.
        is_over (`Callable`): asked before each forward; once True, the run ends with what there is.
    Returns:
        `dict`: counts of what was kept and why the rest was not, over all shards of this process.
    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    folder = Path(output)
    synthesizer = Synthesizer(target, tokenizer, config, chats)
    provenance = _provenance(target, tokenizer, config, chats, contamination, part[1])
    claim_folder(folder, provenance)
    writer = ShardWriter(folder, provenance, config.num_tokens, contamination, part)
    num_before = writer.num_tokens
    try:
        while not writer.is_full:
            first = writer.num_decided
            # If late conversations are refused, for example as duplicates, another pass makes up for them.
            for row in synthesizer.run(_numbers(writer, part, synthesizer.num_conversations), is_over):
                writer.add(row)
                writer.check_progress()
                report({"written": writer.num_ended_tokens, "goal": writer.goal, "before": num_before})
            if writer.num_decided == first or is_over():
                writer.finish()
    except BaseException:
        writer.keep()
        raise
    summary = writer.summary()
    if summary["num_tokens"] < writer.goal and not is_over():
        logger.warning("The prompts are used up: %d of %d tokens were written.", summary["num_tokens"], writer.goal)
    return summary


def _numbers(writer: ShardWriter, part: tuple[int, int], num_conversations: int | None) -> Iterator[int]:
    """Numbers of the conversations to write, until enough are kept."""
    turn = writer.num_decided
    while not writer.has_enough:
        number = part[0] + turn * part[1]
        if num_conversations is not None and number >= num_conversations:
            return
        yield number
        turn += 1


def _provenance(target, tokenizer, config: SynthesisConfig, chats, contamination, num_processes: int) -> dict:
    is_list = isinstance(chats, list)  # else they are made on demand, and `source` describes them
    return {
        "target": target_fingerprint(target.config, tokenizer),
        "weights_sha256": weights_digest(target),
        "compute_dtype": str(target.dtype).removeprefix("torch."),
        "chat_template_sha256": template_hash(tokenizer),
        "source": getattr(chats, "source", None) or ("the target's own user turns" if chats is None else f"{len(chats)} given prompts"),
        "config": json.loads(json.dumps(asdict(config))),
        "num_processes": num_processes,
        "chats_sha256": hashlib.sha256(json.dumps(chats).encode()).hexdigest() if is_list else None,
        "exclude_sha256": None if contamination is None else contamination.hash(),
        "versions": versions(),
    }
