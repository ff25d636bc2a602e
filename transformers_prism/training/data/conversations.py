"""Conversations as token ids, with the answers that a draft is trained on.

A source holds chats in any of the usual shapes, which the target's chat template renders, or token ids: `input_ids` with
`assistant_spans` or `prompt_length`, as `transformers-prism synthesize` writes them, or with a column of [`MASKS`]. An
assistant span `[start, end)` holds an answer with the token that ends its turn.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers_prism.training.data.chats import NoAnswer, RowError, chat_of, tools_of
from transformers_prism.training.data.formats import MASKS, MAX_BAD_SHARE, RowCounts, is_token_ids, usable_rows
from transformers_prism.training.data.templates import is_trained, tokenize, tokenized_chat

logger = logging.getLogger(__name__)

# A text that shares a run of this many tokens with a benchmark prompt counts as contaminated.
CONTAMINATION_NGRAM = 13
# An answer loops if it ends in one run of tokens three times in a row, of at least this many tokens in total.
_LOOP_REPEATS, _LOOP_MIN_TOKENS, _LOOP_MAX_PERIOD = 3, 24, 64


@dataclass(frozen=True)
class Conversation:
    """Token ids of a whole conversation, template included, and `(start, end)` of each answer, in order and without
    overlap; `is_cut` if the conversation was cut to the length that training takes, and then `whole` is the hash of all of it."""

    input_ids: tuple[int, ...]
    assistant_spans: tuple[tuple[int, int], ...]
    is_cut: bool = False
    whole: str | None = field(default=None, compare=False)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first answer."""
        return self.assistant_spans[0][0]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(end - start for start, end in self.assistant_spans)


@dataclass(frozen=True)
class Part:
    """The conversations that a run trains on, or is validated on: those at `indices` of a list whose features are
    kept."""

    conversations: list[Conversation]
    indices: list[int]

    @property
    def chosen(self) -> list[Conversation]:
        """The conversations of this part."""
        return [self.conversations[index] for index in self.indices]


def read_conversations(
    sources, vocab_size: int, max_length: int | None = None, tokenizer=None, max_bad_share: float = MAX_BAD_SHARE
) -> list[Conversation]:
    """Read conversations of token ids, or finished chats, from sources one after the other.

    Args:
        vocab_size (`int`): tokens of the target's vocabulary; ids must be below it.
        max_length (`int`, *optional*): tokens that are kept of each conversation; cut ones are counted in a warning.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the target; renders chats.
        max_bad_share (`float`): share of a source's rows, 0 to 1, that may be unusable. They are left out with a
            warning.
    Returns:
        `list[Conversation]`: those with at least one answer token after the cut, in order.
    Raises:
        FileNotFoundError: if a source is not there.
        ValueError: if a source cannot be read, if too many rows of it cannot be used, or if nothing is left, saying
            where, expected and got.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)

    def convert(row) -> Conversation:
        return shorten(conversation_of(row, vocab_size, tokenizer), max_length)

    kept = [one for source in sources for one in usable_rows(source, convert, max_bad_share)]
    names = ", ".join(Path(source).name for source in sources)
    if not kept:
        raise ValueError(f"data: expected at least one conversation with an answer in {names}, got none")
    num_cut = sum(conversation.is_cut for conversation in kept)
    if num_cut:
        logger.warning("%d of %d conversations are cut at %s tokens.", num_cut, len(kept), max_length)
    return kept


def conversation_of(row, vocab_size: int, tokenizer=None) -> Conversation:
    """One row, of token ids or a chat, as a conversation; without a tokenizer there can be no chats.

    Raises:
        RowError: if the row cannot be used.
        ValueError: for token ids outside the vocabulary: then the whole source must come from another tokenizer.
    """
    if is_token_ids(row):
        return _of_token_ids(row, vocab_size)
    chat = chat_of(row)
    if tokenizer is None:
        raise RowError("expected token ids, since there is no tokenizer, got a chat")
    input_ids, spans = tokenized_chat(tokenizer, chat, tools_of(row))
    return Conversation(tuple(input_ids), tuple(spans))


def _of_token_ids(row: dict, vocab_size: int) -> Conversation:
    input_ids, spans = row["input_ids"], row.get("assistant_spans")
    if not isinstance(input_ids, list) or not all(type(token) is int for token in input_ids):
        raise RowError("expected integers in input_ids, got something else")
    outside = [token for token in input_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"expected token ids in 0..{vocab_size - 1} (the target's vocabulary), got {outside[0]}; was the data made "
            "with another tokenizer?"
        )
    input_ids, masks = _without_padding(row, input_ids)
    if masks and spans is None and row.get("prompt_length") is None:
        spans = _spans_of_masks(masks, input_ids)
    elif spans is None:
        spans = [[row.get("prompt_length"), len(input_ids)]]
    if not isinstance(spans, list) or not all(isinstance(span, list) and [type(edge) for edge in span] == [int, int] for span in spans):
        raise RowError(f"expected integers in prompt_length or assistant_spans, got {spans!r}")
    edges = [edge for span in spans for edge in span]
    if not spans or edges != sorted(edges) or edges[0] < 1 or edges[-1] > len(input_ids):
        raise RowError(
            "expected prompt_length or rising assistant_spans from 1 to the number of tokens, "
            f"got {spans!r} for {len(input_ids)} tokens"
        )
    return Conversation(tuple(input_ids), tuple((start, end) for start, end in spans))


def _without_padding(row: dict, input_ids: list[int]) -> tuple[list[int], dict[str, list[int]]]:
    """The token ids and the row's columns of [`MASKS`], without the places that `attention_mask` hides.

    Raises:
        RowError: if one of these is no list of an integer for each token, or if places are hidden that other columns count.
    """
    columns = {name: row[name] for name in (*MASKS, "attention_mask") if isinstance(row.get(name), list)}
    for name, column in columns.items():
        if len(column) != len(input_ids) or not all(type(one) in (int, bool) for one in column):
            raise RowError(f"expected {len(input_ids)} integers in {name}, one for each token, got {column!r}")
    is_seen = columns.pop("attention_mask", [1] * len(input_ids))
    if all(is_seen):
        return input_ids, columns
    if any(row.get(name) is not None for name in ("prompt_length", "assistant_spans")):
        raise RowError("expected no padding beside prompt_length or assistant_spans, got zeros in attention_mask")
    seen = [place for place, one in enumerate(is_seen) if one]
    return [input_ids[place] for place in seen], {name: [column[place] for place in seen] for name, column in columns.items()}


def _spans_of_masks(masks: dict[str, list[int]], input_ids: list[int]) -> list[list[int]]:
    """The runs of places that all masks count; never the first token, before which nothing could predict it."""
    labels = masks.get("labels", input_ids)
    if any(label not in (MASKS["labels"], token) for label, token in zip(labels, input_ids, strict=True)):
        raise RowError(f"expected labels that repeat input_ids at their place or are {MASKS['labels']}, got others")
    is_answer = [all(column[place] != MASKS[name] for name, column in masks.items()) for place in range(len(input_ids))]
    runs = itertools.groupby(range(1, len(input_ids)), is_answer.__getitem__)
    places = [list(run) for counts, run in runs if counts]
    if not places:
        raise NoAnswer(f"expected an answer to train on, got {' and '.join(masks)} without one")
    return [[run[0], run[-1] + 1] for run in places]


def check_data(source, target=None, split: str = "train", max_length: int | None = None) -> tuple[RowCounts, list[str]]:
    """Examine a source. Returns its counts, and lines to print: how many chats and answers can be used, and what is
    left out and why.

    Args:
        target (`tuple`, *optional*): vocabulary size and tokenizer of a target, whose template then renders the chats.
            Without it only the shapes are checked, and token ids are not.
        split (`str`): of a data set on the Hub.
        max_length (`int`, *optional*): with a target, tokens that are kept of each conversation.
    Raises:
        FileNotFoundError, ValueError: if the source is not there or cannot be read.
    """
    counts = RowCounts(Path(source).name)
    sums: Counter[str] = Counter()

    def convert(row) -> None:
        if target is not None:
            conversation = conversation_of(row, *target)
            if conversation.assistant_spans:
                conversation = shorten(conversation, max_length)
            sums["conversations cut at --max-length"] += conversation.is_cut
            sums.update({"tokens": len(conversation.input_ids), "tokens of answers": conversation.num_answer_tokens})
            sums["answers that are trained"] += len(conversation.assistant_spans)
        elif is_token_ids(row):
            sums["rows of token ids"] += 1
        else:
            chat = chat_of(row)
            answers = [turn for turn in chat if turn["role"] == "assistant"]
            sums["answers that are trained"] += sum(map(is_trained, answers))
            sums["answers that are not trained (empty, weight 0, or a tool call that cannot be read)"] += sum(
                not is_trained(turn) for turn in answers
            )
            sums["chats without an answer: prompts for synthesize and bench"] += not answers
            sums["turns by the user"] += sum(turn["role"] == "user" for turn in chat)

    for _ in usable_rows(source, convert, 1.0, split, counts):
        pass
    used = counts.num_rows - counts.left_out.total()
    lines = [f"{counts.num_rows:>8}  rows in {counts.source}", f"{used:>8}  rows that can be used"]
    lines += [f"{count:>8}  {name}" for name, count in sums.items() if count]
    if counts.left_out:
        lines += [f"{counts.left_out.total():>8}  rows left out, by reason:", *counts.lines()]
    return counts, lines


def shorten(conversation: Conversation, max_length: int | None) -> Conversation:
    """The beginning of a conversation, `max_length` tokens at most.

    Raises:
        NoAnswer: if no answer is left.
    """
    input_ids = conversation.input_ids[:max_length]
    spans = tuple((start, min(end, len(input_ids))) for start, end in conversation.assistant_spans)
    spans = tuple((start, end) for start, end in spans if start < end)
    # A position that is trained on needs three tokens: one whose state is read, the next, and the predicted one.
    if len(input_ids) < 3 or not spans:
        raise NoAnswer(f"expected an answer within {max_length} tokens, got none")
    is_cut = len(input_ids) < len(conversation.input_ids)
    return Conversation(input_ids, spans, is_cut, sha256_of([conversation.input_ids]) if is_cut else None)


def split_conversations(
    conversations: list[Conversation], validation_share: float, num_training: int = 0, num_validation: int = 0
) -> tuple[list[int], list[int]]:
    """Indices for training, in the order of the data, and for validation, in the order of their hashes.

    A hash of a conversation's tokens, before it is cut, decides where it belongs. What one run holds out, a run over more data, over
    the same data in another order, or with longer texts holds out as well. So a fine-tuned draft is never validated on what it was trained on.
    Copies stay together.

    Args:
        validation_share (`float`): held out, above 0 and below 1; at least one conversation, never all.
        num_training, num_validation (`int`): use the first N of each part; 0 is all.
    Raises:
        ValueError: if there are too few conversations for both.
    """
    if len(conversations) < 2:
        raise ValueError(f"data: expected at least 2 conversations (training and validation), got {len(conversations)}")
    places = [_place(conversation) for conversation in conversations]
    order = sorted(range(len(places)), key=places.__getitem__)
    num_held_out = sum(place < validation_share for place in places)
    num_held_out = min(max(num_held_out, 1), len(places) - 1)
    held_out = order[:num_held_out]
    training = sorted(order[num_held_out:])
    return training[: num_training or None], held_out[: num_validation or None]


def read_parts(config, vocab_size: int, tokenizer) -> tuple[Part, Part]:
    """The conversations that a run trains on and those that it is validated on: a share of its data, or separate ones,
    which are then left out of training.

    Raises:
        FileNotFoundError, ValueError: for data that cannot be used, as [`read_conversations`] says; if nothing is left
            to train on.
    """

    def read(sources: str) -> list[Conversation]:
        return read_conversations(sources.split(","), vocab_size, config.max_length, tokenizer, config.max_bad_share)

    conversations = read(config.data)
    if not config.validation_data:
        training, validation = split_conversations(
            conversations, config.validation_share, config.num_conversations, config.num_validation
        )
        return Part(conversations, training), Part(conversations, validation)
    held_out = read(config.validation_data)
    known = {one.input_ids for one in held_out}
    training = [index for index, one in enumerate(conversations) if one.input_ids not in known]
    if not training:
        raise ValueError("validation_data: expected data to hold other conversations, too, got none")
    logger.info("Left out of training, since they are validated on: %d conversations.", len(conversations) - len(training))
    validation = list(range(len(held_out)))[: config.num_validation or None]
    return Part(conversations, training[: config.num_conversations or None]), Part(held_out, validation)


def sha256_of(values: Iterable) -> str:
    """sha256 of JSON values one after the other, such as token ids; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def _place(conversation: Conversation) -> float:
    """A pseudo-random number in [0, 1): a hash of the tokens."""
    return int((conversation.whole or sha256_of([conversation.input_ids]))[:12], 16) / 2**48


def preview(conversation: Conversation, tokenizer):
    """The conversation as text, what is trained on in bold green, the rest dimmed, for rich to print."""
    from rich.text import Text

    text, position = Text(), 0
    for start, end in conversation.assistant_spans:
        text.append(tokenizer.decode(conversation.input_ids[position:start]), style="dim")
        text.append(tokenizer.decode(conversation.input_ids[start:end]), style="bold green")
        position = end
    text.append(tokenizer.decode(conversation.input_ids[position:]), style="dim")
    return text


def loop_period(token_ids: Iterable[int]) -> int | None:
    """Length of the run of tokens that an answer repeats at its end; None if it does not end in a loop."""
    tokens = list(token_ids)
    for period in range(1, min(_LOOP_MAX_PERIOD, len(tokens) // _LOOP_REPEATS) + 1):
        length = max(_LOOP_REPEATS * period, _LOOP_MIN_TOKENS)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return period
    return None


def before_loop(token_ids: list[int]) -> list[int]:
    """An answer without the loop at its end: of the repeated runs, only the first is kept."""
    period = loop_period(token_ids)
    if period is None:
        return token_ids
    end = len(token_ids)
    while end > period and token_ids[end - 1] == token_ids[end - 1 - period]:
        end -= 1
    return token_ids[:end]


class Contamination:
    """Token n-grams of benchmark prompts, used to leave out conversations that contain any of them."""

    def __init__(self, tokenizer, texts: Iterable[str]):
        self.ngrams: set[tuple[int, ...]] = set()
        self.short: set[tuple[int, ...]] = set()  # shorter prompts are compared as a whole
        for text in texts:
            tokens = tokenize(tokenizer, text.strip())
            self.ngrams.update(_ngrams(tokens))
            if 0 < len(tokens) < CONTAMINATION_NGRAM:
                self.short.add(tuple(tokens))

    def holds(self, token_ids: Iterable[int], user_turn: Iterable[int] = ()) -> bool:
        """Whether a conversation shares an n-gram with the benchmark, or its first user turn is one of its short prompts."""
        return tuple(user_turn) in self.short or any(ngram in self.ngrams for ngram in _ngrams(list(token_ids)))

    def hash(self) -> str:
        """sha256 over all n-grams and short prompts."""
        return hashlib.sha256(repr((sorted(self.ngrams), sorted(self.short))).encode()).hexdigest()


def _ngrams(tokens: list[int]) -> Iterator[tuple[int, ...]]:
    for start in range(len(tokens) - CONTAMINATION_NGRAM + 1):
        yield tuple(tokens[start : start + CONTAMINATION_NGRAM])


def describe(conversations: list[Conversation]) -> dict:
    """Counts of tokens, answers and loops, for provenance and preview."""
    answers = [one.input_ids[start:end] for one in conversations for start, end in one.assistant_spans]
    return {
        "num_conversations": len(conversations),
        "num_tokens": sum(len(one.input_ids) for one in conversations),
        "num_answer_tokens": sum(map(len, answers)),
        "share_of_answers_in_a_loop": sum(loop_period(one) is not None for one in answers) / max(len(answers), 1),
        "num_turns": dict(sorted(Counter(len(one.assistant_spans) for one in conversations).items())),
    }
