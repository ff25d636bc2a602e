"""Conversations as token ids: what training learns from, where it comes from, and which tokens are the target's own.

Sources are Parquet shards of `transformers-prism synthesize`, JSON lines of token ids (`input_ids` with
`assistant_spans` or `prompt_length`), and JSON lines of chats in the usual forms, which are rendered by the target's
chat template. An assistant span `[start, end)` holds an answer with the token that ends its turn.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers_prism.training.chats import placed_chats, placed_lines

logger = logging.getLogger(__name__)

# A shared run of so many tokens marks a text as known from a benchmark.
CONTAMINATION_NGRAM = 13
# An answer loops if its end is one run of tokens three times over, at least so many tokens in all.
_LOOP_REPEATS, _LOOP_MIN_TOKENS, _LOOP_MAX_PERIOD = 3, 24, 64


@dataclass(frozen=True)
class Conversation:
    """Token ids of a conversation.

    Args:
        input_ids: the whole conversation, template included.
        assistant_spans: `(start, end)` of each answer, rising and apart from each other.
        is_cut: whether there was more of it than training takes.
    """

    input_ids: tuple[int, ...]
    assistant_spans: tuple[tuple[int, int], ...]
    is_cut: bool = False

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
    """The conversations of a run that are learnt, or those that it is validated on.

    Args:
        conversations: a list that features are kept of as a whole.
        indices: those of the list that belong to this part.
    """

    conversations: list[Conversation]
    indices: list[int]

    @property
    def chosen(self) -> list[Conversation]:
        """The conversations of this part."""
        return [self.conversations[index] for index in self.indices]


# --- reading -----------------------------------------------------------------------------------------------------


def read_conversations(
    paths, vocab_size: int, max_length: int | None = None, tokenizer=None
) -> list[Conversation]:
    """Read conversations of token ids, or finished chats.

    Args:
        paths (`str`, path, or a list of them): JSON lines, gzipped if the name ends in `.gz`, or folders of Parquet
            shards; several are read one after the other.
        vocab_size (`int`): tokens of the target's vocabulary; ids must be below it.
        max_length (`int`, *optional*): tokens that are kept of each conversation; cut ones are counted in a warning.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the target; renders JSON lines of chats ([`read_chats`]).
    Returns:
        `list[Conversation]`: those with at least one answer token after the cut, in order.
    Raises:
        FileNotFoundError: if a source is not there.
        ValueError: if a line or shard cannot be read, or if nothing is left, saying where, expected and got.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    kept, num_empty = [], 0
    for path in map(Path, paths):
        for conversation in _conversations(path, vocab_size, tokenizer):
            shortened = shorten(conversation, max_length)
            if shortened is None:
                num_empty += 1
            else:
                kept.append(shortened)
    names = ", ".join(path.name for path in map(Path, paths))
    if not kept:
        raise ValueError(f"data: expected at least one conversation with an answer in {names}, got none")
    num_cut = sum(conversation.is_cut for conversation in kept)
    if num_empty or num_cut:
        logger.warning(
            "%d of %d conversations have no answer and are left out; %d are cut at %s tokens.",
            num_empty,
            num_empty + len(kept),
            num_cut,
            max_length,
        )
    return kept


def shorten(conversation: Conversation, max_length: int | None) -> Conversation | None:
    """The beginning of a conversation, `max_length` tokens at most; None if no answer to learn from is left."""
    input_ids = conversation.input_ids[:max_length]
    spans = tuple((start, min(end, len(input_ids))) for start, end in conversation.assistant_spans)
    spans = tuple((start, end) for start, end in spans if start < end)
    # A row of the draft joins three tokens: one whose state it reads, the next, and the one that it predicts.
    if len(input_ids) < 3 or not spans:
        return None
    return Conversation(input_ids, spans, is_cut=len(input_ids) < len(conversation.input_ids))


def split_conversations(
    conversations: list[Conversation], validation_share: float, num_training: int = 0, num_validation: int = 0
) -> tuple[list[int], list[int]]:
    """Indices for training and for validation.

    A conversation's own tokens decide where it belongs, whatever else there is: what one run holds out, another run over
    more data, or the same in another order, holds out as well, so that a draft that is carried on is never validated on
    what it has learnt from. Copies stay together.

    Args:
        conversations (`list[Conversation]`): all of them.
        validation_share (`float`): held out, above 0 and below 1: about so many, at least one, never all.
        num_training, num_validation (`int`): use the first so many of each part; 0 is all.
    Returns:
        training indices in the order of the data, and validation indices in an order of their own.
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
    """What a run learns and what it is validated on: a share of its data, or conversations of their own.

    Args:
        config (`TrainConfig`): names the sources and how many to use.
        vocab_size (`int`): of the target.
        tokenizer (`PreTrainedTokenizerBase`): of the target.
    Returns:
        the training part and the validation part. With `validation_data` all of `data` is learnt but what is in both.
    Raises:
        FileNotFoundError, ValueError: for data that cannot be used, as [`read_conversations`] says; if nothing is left to
            learn.
    """

    def read(sources: str) -> list[Conversation]:
        return read_conversations(sources.split(","), vocab_size, config.max_length, tokenizer)

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
    validation = range(len(held_out))
    return (
        Part(conversations, training[: config.num_conversations or None]),
        Part(held_out, list(validation[: config.num_validation or None])),
    )


def _place(conversation: Conversation) -> float:
    """A number in [0, 1), as good as drawn, that the tokens alone decide."""
    digest = hashlib.sha256(json.dumps(conversation.input_ids).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _conversations(path: Path, vocab_size: int, tokenizer) -> Iterator[Conversation]:
    if tokenizer is not None and path.is_file() and path.suffix != ".parquet" and not _holds_token_ids(path):
        for where, chat in placed_chats(path):
            yield masked_conversation(tokenizer, chat, where)
        return
    for where, row in _rows(path):
        yield _checked(row, where, vocab_size)


def _holds_token_ids(path: Path) -> bool:
    """Whether the first line of a file is a row of token ids rather than a chat."""
    _, first = next(placed_lines(path), ("", "{}"))
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and "input_ids" in row


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Each row of a source, with where it stands."""
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise FileNotFoundError(f"data: expected Parquet shards in {path.name!r}, got none")
        for shard in shards:
            yield from _parquet_rows(shard)
        return
    if not path.is_file():
        raise FileNotFoundError(f"data: expected a file of conversations, got {path.name!r}, which is not there")
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    for where, line in placed_lines(path):
        try:
            row = json.loads(line)
            if "assistant_spans" not in row:
                row = {**row, "assistant_spans": [[row["prompt_length"], len(row["input_ids"])]]}
            yield where, {"input_ids": row["input_ids"], "assistant_spans": row["assistant_spans"]}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{where}: expected a JSON object with input_ids and prompt_length or assistant_spans, "
                f"got {line.strip()[:60]!r}"
            ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, columns=["input_ids", "assistant_spans"]).to_pylist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
        raise ValueError(f"data: expected a Parquet shard in {path.name}, got: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path.name}, row {number}", row


def _checked(row: dict, where: str, vocab_size: int) -> Conversation:
    input_ids = row["input_ids"]
    spans = row["assistant_spans"]
    if not isinstance(input_ids, list) or not all(type(token) is int for token in input_ids):
        raise ValueError(f"{where}: expected integers in input_ids, got something else")
    outside = [token for token in input_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(
            f"{where}: expected token ids in 0..{vocab_size - 1} (the target's vocabulary), got {outside[0]}; "
            "was the data made with another tokenizer?"
        )
    if not all(len(span) == 2 and all(type(edge) is int for edge in span) for span in spans):
        raise ValueError(f"{where}: expected integers in prompt_length or assistant_spans, got {spans!r}")
    edges = [edge for span in spans for edge in span]
    if not spans or edges != sorted(edges) or edges[0] < 1 or edges[-1] > len(input_ids):
        raise ValueError(
            f"{where}: expected prompt_length or rising assistant_spans in 1..{len(input_ids)} (tokens), got {spans!r}"
        )
    return Conversation(tuple(input_ids), tuple((start, end) for start, end in spans))


# --- chats -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatPieces:
    """What a chat template writes around the words, as text.

    Args:
        user_to_assistant: between a user's words and the answer.
        assistant_to_user: between an answer and the next user's words.
    """

    user_to_assistant: str
    assistant_to_user: str

    @classmethod
    def of(cls, tokenizer) -> "ChatPieces":
        """Found by rendering a conversation of marks.

        Raises:
            ValueError: if the tokenizer has no chat template, or one that drops or changes what is said.
        """
        marks = ["MARKONE", "MARKTWO", "MARKTHREE"]
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        text = render(tokenizer, chat, add_generation_prompt=True)
        counts = [text.count(mark) for mark in marks]
        if counts != [1, 1, 1]:
            raise ValueError(
                f"chat_template: expected one that writes user and assistant turns once each, got {counts} of them"
            )
        _, after_first = text.split(marks[0])
        to_assistant, after_answer = after_first.split(marks[1])
        return cls(to_assistant, after_answer.split(marks[2])[0])


def render(tokenizer, chat: list[dict], add_generation_prompt: bool = False) -> str:
    """A chat as the target's template writes it.

    Raises:
        ValueError: without a chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: expected one with a chat template, got none")
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)


def opening(tokenizer, system: str | None = None) -> str:
    """The template's text up to the first user's words."""
    chat = [{"role": "system", "content": system}] if system else []
    return render(tokenizer, [*chat, {"role": "user", "content": "MARKONE"}]).split("MARKONE")[0]


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of text that holds its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def masked_conversation(tokenizer, chat: list[dict], where: str = "chat") -> Conversation:
    """A finished chat as token ids with its answers marked, in two ways that must agree.

    The first way is the template's own `{% generation %}` marks, or, without them, the text between the rendered
    beginnings of the chat; the second reads the tokens under the mask back and compares them with what was said.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the target, with character offsets (a fast one).
        chat (`list[dict]`): messages, at least one by the assistant; answers whose `weight` is 0 are not marked.
        where (`str`): named in errors.
    Returns:
        `Conversation`: with no spans at all if no answer is to be learnt.
    Raises:
        ValueError: if there is no assistant turn, if the mask is all ones or all zeros, or if the two ways disagree.
    """
    turns = [turn for turn in chat if turn["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{where}: expected a chat with at least one assistant turn, got {len(chat)} turns without")
    answers = [turn["content"] for turn in turns if is_learnt(turn)]
    if not answers:
        return Conversation((), ())
    # The template's own marks are at all answers.
    own = _template_mask(tokenizer, chat) if len(answers) == len(turns) else None
    input_ids, mask = own or _rendered_mask(tokenizer, chat, where)
    if not any(mask) or all(mask):
        found = "all ones" if all(mask) else "all zeros"
        raise ValueError(f"{where}: expected a mask with ones at assistant turns and zeros elsewhere, got {found}")
    spans = _runs(mask)
    if len(spans) != len(answers):
        raise ValueError(f"{where}: expected {len(answers)} marked answers, got {len(spans)}")
    for answer, (start, end) in zip(answers, spans, strict=True):
        read_back = tokenizer.decode(input_ids[start:end], skip_special_tokens=True).strip()
        if read_back != answer.strip():
            raise ValueError(
                f"{where}: expected the marked tokens to say {answer.strip()[:60]!r}, got {read_back[:60]!r}; "
                "is this the target's tokenizer and chat template?"
            )
    return Conversation(tuple(input_ids), tuple(spans))


def is_learnt(turn: dict) -> bool:
    """Whether a message, if it is an answer, is one to learn."""
    return turn.get("weight") != 0


def _template_mask(tokenizer, chat: list[dict]) -> tuple[list[int], list[int]] | None:
    if "{% generation" not in (tokenizer.chat_template or "") and "{%- generation" not in (tokenizer.chat_template or ""):
        return None
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), list(encoded["assistant_masks"])


def _rendered_mask(tokenizer, chat: list[dict], where: str) -> tuple[list[int], list[int]]:
    text = render(tokenizer, chat)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, mask = list(encoded["input_ids"]), [0] * len(encoded["input_ids"])
    for index, turn in enumerate(chat):
        if turn["role"] != "assistant" or not is_learnt(turn):
            continue
        before = render(tokenizer, chat[:index], add_generation_prompt=True)
        through = render(tokenizer, chat[: index + 1])
        if not text.startswith(before) or not text.startswith(through.rstrip()):
            raise ValueError(f"{where}: expected a template that writes a chat turn by turn, got one that rewrites it")
        start = len(before)
        said = through[start:].rstrip()  # the line break after the end of a turn belongs to the next one
        for position, (first, last) in enumerate(encoded["offset_mapping"]):
            if first >= start and last <= start + len(said) and last > first:
                mask[position] = 1
    return input_ids, mask


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """`(start, end)` of each run of ones."""
    edges = [0, *mask, 0]
    starts = [i for i in range(len(mask) + 1) if not edges[i] and edges[i + 1]]
    ends = [i for i in range(len(mask) + 1) if edges[i] and not edges[i + 1]]
    return list(zip(starts, ends, strict=True))


def preview(conversation: Conversation, tokenizer):
    """The conversation as text, what training learns from in bold green, the rest dimmed, for rich to print."""
    from rich.text import Text

    text, position = Text(), 0
    for start, end in conversation.assistant_spans:
        text.append(tokenizer.decode(conversation.input_ids[position:start]), style="dim")
        text.append(tokenizer.decode(conversation.input_ids[start:end]), style="bold green")
        position = end
    text.append(tokenizer.decode(conversation.input_ids[position:]), style="dim")
    return text


# --- what is left out --------------------------------------------------------------------------------------------


def loop_period(token_ids: Iterable[int]) -> int | None:
    """Length of the run of tokens that an answer ends in three times over; None if it does not end in a loop."""
    tokens = list(token_ids)
    for period in range(1, min(_LOOP_MAX_PERIOD, len(tokens) // _LOOP_REPEATS) + 1):
        length = max(_LOOP_REPEATS * period, _LOOP_MIN_TOKENS)
        tail = tokens[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return period
    return None


class Contamination:
    """Runs of tokens that benchmark prompts hold, to keep conversations with any of them out of the data.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the target.
        texts (`Iterable[str]`): the prompts.
    """

    def __init__(self, tokenizer, texts: Iterable[str]):
        self.ngrams: set[tuple[int, ...]] = set()
        self.short: set[tuple[int, ...]] = set()  # prompts of fewer tokens count as a whole
        for text in texts:
            tokens = tokenize(tokenizer, text.strip())
            self.ngrams.update(_ngrams(tokens))
            if 0 < len(tokens) < CONTAMINATION_NGRAM:
                self.short.add(tuple(tokens))

    def holds(self, token_ids: Iterable[int], user_turn: Iterable[int] = ()) -> bool:
        """Whether a conversation shares a run with the benchmark, or its first user turn is one of its short prompts."""
        return tuple(user_turn) in self.short or any(ngram in self.ngrams for ngram in _ngrams(list(token_ids)))


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


def template_hash(tokenizer) -> str:
    """First 16 digits of the sha256 of the chat template."""
    return hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]
