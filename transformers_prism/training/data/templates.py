"""Chats as the target's template writes them: rendered text, token ids, and which tokens are answers."""

import hashlib
import json
import unicodedata
from dataclasses import dataclass

from transformers_prism.training.data.chats import NoAnswer, RowError, shown


def render(tokenizer, chat: list[dict], add_generation_prompt: bool = False, tools: list[dict] | None = None) -> str:
    """A chat as the target's template writes it.

    Raises:
        ValueError: without a chat template.
        RowError: if the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise ValueError("tokenizer: expected one with a chat template, got none")
    try:
        return tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is code that came with the target, and raises what it likes
        raise RowError(f"expected a chat that the target's template takes, got its error: {error}") from error


def opening(tokenizer, system: str | None = None) -> str:
    """The template's text up to the first user's words."""
    chat = [{"role": "system", "content": system}] if system else []
    return render(tokenizer, [*chat, {"role": "user", "content": "MARKONE"}]).split("MARKONE")[0]


def tokenize(tokenizer, text: str) -> list[int]:
    """Token ids of text that already contains its special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenize_behind(tokenizer, before: str, text: str) -> list[int]:
    """Token ids of text as it follows other text: some tokenizers add a space mark at the start of a text only."""
    ids, known = tokenize(tokenizer, before + text), tokenize(tokenizer, before)
    return ids[len(known) :] if ids[: len(known)] == known else tokenize(tokenizer, text)


def template_hash(tokenizer) -> str:
    """First 16 digits of the sha256 of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()[:16]


def between_turns(tokenizer) -> tuple[str, str]:
    """What a chat template writes between a user's words and the answer, and between an answer and the next user's words,
    found by rendering a conversation of marker words.

    Raises:
        ValueError: if the tokenizer has no chat template, or one that drops or changes what is said.
    """
    marks = ["MARKONE", "MARKTWO", "MARKTHREE"]
    roles = ("user", "assistant", "user")
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    text = render(tokenizer, chat, add_generation_prompt=True)
    counts = [text.count(mark) for mark in marks]
    if counts != [1, 1, 1]:
        raise ValueError(f"chat_template: expected one that writes user and assistant turns once each, got {counts} of them")
    _, after_first = text.split(marks[0])
    to_assistant, after_answer = after_first.split(marks[1])
    return to_assistant, after_answer.split(marks[2])[0]


def is_trained(turn: dict) -> bool:
    """Whether a message is an answer that is trained."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def tokenized_chat(
    tokenizer, chat: list[dict], tools: list[dict] | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a chat, and `(start, end)` of each answer that is trained, with the token that ends its turn.

    An answer is trained if the text before it is the prompt that the target would get, and if its tokens decode to
    what the row says. What the template adds to it, such as an empty thought, is not part of it. Tool calls are
    trained as the template writes them; if it leaves them out, that turn is not trained, and neither are answers to
    tool results that it leaves out. The tokenizer must return character offsets (a fast one).

    Raises:
        NoAnswer: if the chat has nothing to train on.
        RowError: if the template refuses the chat or changes its answers, or if the tokens do not decode to them.
    """
    if all(turn["role"] != "assistant" for turn in chat):
        raise NoAnswer(f"expected a chat with at least one assistant turn, got {len(chat)} turns without")
    chat, text, spans = _rendered(tokenizer, chat, tools)
    spans += _answer_spans(tokenizer, chat, text, tools)
    if not spans:
        raise NoAnswer("expected an answer to train on, got only answers that are empty, have weight 0, or that the template hides")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    return input_ids, [_token_span(tokenizer, text, input_ids, offsets, span) for span in sorted(spans)]


@dataclass(frozen=True, order=True)
class _Span:
    """An answer in the rendered text, in characters: what the row says, then the end of the turn."""

    start: int
    said_end: int
    end: int
    has_calls: bool = False


def _rendered(tokenizer, chat: list[dict], tools) -> tuple[list[dict], str, list[_Span]]:
    """The chat, with weight 0 for answers that its template hides, its text, and the spans of tool calls."""
    try:
        text = render(tokenizer, chat, tools=tools)
    except RowError:
        if not any(turn.get("tool_calls") for turn in chat):
            raise
        chat = [_without_calls(turn) for turn in chat]
        text = render(tokenizer, chat, tools=tools)
    spans: list[_Span] = []
    chat, is_hidden = list(chat), False
    for index, turn in enumerate(chat):
        if turn["role"] == "user":
            is_hidden = False
        elif turn["role"] == "tool":
            is_hidden |= not _is_written(turn["content"].strip(), text)
        elif is_hidden and turn["role"] == "assistant":
            chat[index] = {**turn, "weight": 0}
        elif turn.get("tool_calls") and is_trained(turn):
            span = _call_span(tokenizer, chat, index, text, tools)
            if span is None:
                chat[index] = {**turn, "weight": 0}
            else:
                spans.append(span)
    return chat, text, spans


def _is_written(words: str, text: str) -> bool:
    """Whether a template has written these words, as they are or, as those of Llama 3 write results of tools, as JSON."""
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _without_calls(turn: dict) -> dict:
    if not turn.get("tool_calls"):
        return turn
    return {"role": turn["role"], "content": turn["content"], "weight": 0}


def _call_span(tokenizer, chat: list[dict], index: int, text: str, tools) -> _Span | None:
    """The span of a turn with tool calls; None if the template does not write them there."""
    if not index:  # a turn that begins a chat answers no prompt
        return None
    before = render(tokenizer, chat[:index], True, tools)
    through = render(tokenizer, chat[: index + 1], False, tools).rstrip()
    if not text.startswith(before) or not text.startswith(through):
        return None
    marked = render(tokenizer, [*chat[:index], {**chat[index], "content": "MARKONE"}], False, tools)
    opened, found, _ = marked.partition("MARKONE")
    # What the template adds before the words, such as an empty thought, is not the row's.
    start = len(opened) if found and opened.startswith(before) and text.startswith(opened) else len(before)
    said = through[start:]
    functions = [call["function"] for call in chat[index]["tool_calls"]]
    words = [chat[index]["content"].strip()]
    words += [word for function in functions for word in (function["name"], *map(str, function["arguments"]))]
    return _Span(start, len(through), len(through), True) if all(word in said for word in words) else None


def _answer_spans(tokenizer, chat: list[dict], text: str, tools) -> list[_Span]:
    """The spans of answers without tool calls. The chat is also rendered with markers in their places; the text around the
    markers must be the text around the answers."""
    indices = [index for index, turn in enumerate(chat) if is_trained(turn) and not turn.get("tool_calls")]
    if not indices:
        return []
    marks = {index: f"PRISM{index}MARK" for index in indices}
    marked = [{**turn, "content": marks[index]} if index in marks else turn for index, turn in enumerate(chat)]
    rest, position = render(tokenizer, marked, tools=tools), 0
    spans: list[_Span] = []
    if [rest.count(mark) for mark in marks.values()] != [1] * len(marks):
        raise RowError("expected a template that writes answers as they are, got one that changes them")
    first = render(tokenizer, marked[: indices[0] + 1], tools=tools)
    turn_end = first.partition(marks[indices[0]])[2].rstrip()
    for index, mark in marks.items():
        piece, _, rest = rest.partition(mark)
        next_piece = rest.partition(marks[indices[len(spans) + 1]])[0] if len(spans) + 1 < len(indices) else rest
        start = position + len(piece)
        content = chat[index]["content"]
        said = next((one for one in (content, content.strip()) if text.startswith(one + next_piece, start)), None)
        if said is None or not text.startswith(piece, position):
            raise RowError(f"expected a template that writes answers as they are, got one that changes {shown(content)}")
        position = start + len(said)
        end = position + (len(turn_end) if text.startswith(turn_end, position) else 0)
        spans.append(_Span(start, position, end))
    # The target's prompt will be the beginning of the chat, rendered alone.
    # A turn that begins a chat answers no prompt.
    befores = [render(tokenizer, chat[:index], True, tools) if index else None for index in indices]
    pairs = [(span, before) for span, before in zip(spans, befores, strict=True) if before is not None]
    asked = [span for span, before in pairs if text[: span.start].startswith(before.rstrip())]
    if pairs and not asked:
        raise RowError("expected a template that writes a chat turn by turn, got one that rewrites it")
    return asked


def _token_span(tokenizer, text: str, input_ids: list[int], offsets, span: _Span) -> tuple[int, int]:
    """The token span of an answer, after its tokens were decoded and compared with its text."""
    inside, said = [], []
    for position, (first, last) in enumerate(offsets):
        # A space before a word is part of its token.
        first += len(text[first:last]) - len(text[first:last].lstrip())
        if span.start <= min(first, last - 1) and last <= span.end and last > 0:
            inside.append(position)
            if last <= span.said_end:
                said.append(position)
    expected = text[span.start : span.said_end].strip()
    said_ids = [input_ids[position] for position in said]
    read_back = tokenizer.decode(said_ids, clean_up_tokenization_spaces=False)
    # A special token that is written out in an answer would be tokenized as that token, such as the end of its turn.
    if not span.has_calls and read_back != tokenizer.decode(said_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content in expected]
        if special:
            raise RowError(f"expected answers without special tokens of the target, got {', '.join(special)}")
    read_back = read_back.strip()
    # Some tokenizers compose accents.
    if unicodedata.normalize("NFC", read_back) != unicodedata.normalize("NFC", expected):
        raise RowError(
            f"expected tokens that read back as the answer, got {read_back[:60]!r} for {expected[:60]!r}; is this the "
            "target's tokenizer?"
        )
    return inside[0], inside[-1] + 1
