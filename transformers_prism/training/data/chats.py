"""One row of data as a chat: messages with a role and text, whatever shape the row has.

`docs/data-formats.md` shows every shape. What a row does not say is never guessed. A row that cannot be used raises
[`RowError`], which the readers of [`formats`] count.
"""

import functools
import json
import logging
import re

logger = logging.getLogger(__name__)


class RowError(ValueError):
    """One row cannot be used. Rows are counted by what the message says before ", got"."""

    @property
    def reason(self) -> str:
        """What was expected."""
        return str(self).partition(", got ")[0]


class NoAnswer(RowError):
    """A row that is fine, but has nothing to train on."""


# The first of these columns that is not null gives the shape of a row.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query")
ANSWER_COLUMNS = ("chosen", "completion", "response", "output", "answer")
COLUMNS = (*CHAT_COLUMNS, "turns", *PROMPT_COLUMNS, "chosen", "text")
_CONTEXT_COLUMNS = ("input", "context")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_ALIASES = {
    "user": ("human", "prompter"),
    "assistant": ("gpt", "bing", "chatgpt", "bard", "claude", "model", "bot", "ai", "function_call", "tool_call"),
    "system": ("developer",),
    "tool": ("function", "observation", "ipython", "function_response", "tool_response", "tool_result"),
}
ROLES = {name: role for role, aliases in _ALIASES.items() for name in (role, *aliases)}
# Thoughts of an answer, by the names that templates know them by.
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_TYPES = ("text", "input_text", "output_text")
# The transcripts of Anthropic's HH-RLHF.
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def chat_of(row) -> list[dict]:
    """A row, an object or a list of messages, as messages.

    Returns:
        `list[dict]`: messages with `role` (user, assistant, system, tool) and `content`, both text; an answer may have
            `tool_calls`. An answer with `"weight": 0` stays in the chat and is not trained, because the row says
            so, it is empty, or its tool call cannot be read.
    Raises:
        RowError: if the row has no known shape, or anything but text where text belongs.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {shown(row)}")
    # In a table with rows of several shapes, a row's columns for other shapes are null.
    filled = {name: value for name, value in row.items() if value is not None}
    chat = _chat(filled)
    system = _first(filled, _SYSTEM_COLUMNS)
    if system and filled[system] != "" and all(turn["role"] != "system" for turn in chat):
        chat.insert(0, {"role": "system", "content": text_of(filled[system], system)})
    return chat


def prompt_of(row) -> list[dict]:
    """A row as messages, at least one of them by the user; raises [`RowError`] if there is none, and where
    [`chat_of`] does."""
    chat = chat_of(row)
    if all(turn["role"] != "user" for turn in chat):
        raise RowError(f"expected at least one turn by the user, got {len(chat)} turns by others")
    return chat


def tools_of(row) -> list[dict] | None:
    """The tools that a row offers, as chat templates take them: its `tools`, a list or JSON of one, or `functions`."""
    if not isinstance(row, dict):
        return None
    tools = _from_json(row.get("tools") or row.get("functions"))
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        return None
    tools = [_without_nulls(tool) for tool in tools]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def text_of(content, name: str) -> str | None:
    """Text, or a list of text parts as one text; None for null. `name` is the column's, for the error.

    Raises:
        RowError: for anything else, and for text that is not valid Unicode.
    """
    if isinstance(content, list):
        return "".join(_text_of_part(part, name) for part in content)
    if content is None:
        return None
    if not isinstance(content, str):
        raise RowError(f"expected text or a list of text parts in {name}, got {shown(content)}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"expected valid Unicode in {name}, got a lone surrogate or another encoding at character {error.start}"
        ) from None
    return content


def is_messages(value) -> bool:
    """Whether a JSON value is a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and bool({"role", "from"} & turn.keys()) for turn in value)
    )


def shown(value) -> str:
    """The beginning of a JSON value, for an error; a part that is no text shows its type."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return f"a part of type {value['type'][:40]!r}"
    return json.dumps(value, default=repr)[:60]


def _chat(row: dict) -> list[dict]:
    """A row without null columns as messages."""
    if name := _first(row, CHAT_COLUMNS):
        return _messages(row[name], name)
    if "turns" in row:
        turns = row["turns"]
        if is_messages(turns):
            return _messages(turns, "turns")
        if not isinstance(turns, list):
            turns = [turns]
        if not turns:
            raise RowError("expected at least one turn in turns, got an empty list")
        return [_user(turn, "turns") for turn in turns]
    answer = _first(row, ANSWER_COLUMNS)
    if name := _first(row, PROMPT_COLUMNS):
        return _prompt_and_answer(row, name, answer)
    if answer and is_messages(row[answer]):
        return _messages(row[answer], answer)
    if "chosen" in row:
        return _transcript(row["chosen"])
    if "text" in row:
        return [_user(row["text"], "text")]
    raise RowError(f"expected one of the columns {', '.join(COLUMNS)}, got {sorted(map(str, row))[:8] or 'none that is filled'}")


def _prompt_and_answer(row: dict, name: str, answer: str | None) -> list[dict]:
    """Alpaca, TRL's prompt and completion, preferences, and other pairs of columns."""
    if is_messages(row[name]):
        chat = _messages(row[name], name)
    elif isinstance(row[name], list) and row[name] and all(isinstance(turn, str) for turn in row[name]):
        # The user's turns of a benchmark, such as MT-bench's.
        if answer is not None:
            raise RowError(f"expected one text in {name} next to an answer in {answer}, got a list of {len(row[name])}")
        return [_user(turn, name) for turn in row[name]]
    else:
        parts = [text_of(row[name], name)]
        context = _first(row, _CONTEXT_COLUMNS)
        if context and name in ("instruction", "question"):
            parts.append(text_of(row[context], context))
        chat = [*_history(row.get("history")), _user("\n\n".join(part for part in parts if part), name)]
    # In Alpaca an empty output means that there is no answer yet.
    if answer is None or row[answer] == "":
        return chat
    value = row[answer]
    if is_messages(value):
        answers = _messages(value, answer)
        # Preference data often repeats the prompt in the answer.
        is_whole = any(turn["role"] == "user" for turn in answers)
        return answers if is_whole else [*chat, *answers]
    if isinstance(value, list) and not any(isinstance(part, dict) for part in value):
        raise RowError(f"expected one answer in {answer}, got a list of {len(value)}")
    return [*chat, _assistant({"content": value}, answer)]


def _history(pairs) -> list[dict]:
    """Earlier turns as pairs of a user's text and an answer."""
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError(f"expected pairs of a user's text and an answer in history, got {shown(pairs)}")
    return [turn for user, answer in pairs for turn in (_user(user, "history"), _assistant({"content": answer}, "history"))]


def _transcript(text) -> list[dict]:
    _, *pieces = _TRANSCRIPT.split(text_of(text, "chosen") or "")
    if not pieces:
        raise RowError(f"expected a prompt with chosen, or a transcript in it, got {shown(text)}")
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [_message({"role": role, "content": words.strip()}) for role, words in turns]


def _messages(turns, name: str) -> list[dict]:
    turns = _from_json(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"expected a list of messages in {name}, got {shown(turns)}")
    if not turns:
        raise RowError(f"expected at least one message in {name}, got an empty list")
    messages = [_message(turn) for turn in turns]
    # An empty system turn counts as none.
    return [turn for turn in messages if turn["role"] != "system" or turn["content"]]


def _message(turn: dict) -> dict:
    role_name = "from" if "from" in turn and "role" not in turn else "role"
    text_name = "value" if "value" in turn and "content" not in turn else "content"
    name = turn.get(role_name)
    if not isinstance(name, str):
        raise RowError(f"expected text in {role_name}, got {shown(name)}")
    name = name.strip().lower()
    role = "assistant" if name == "assistant" else ROLES.get(name)
    if role is None:
        raise RowError(f"expected a role such as user, assistant, system or tool, got {name[:40]!r}")
    calls = turn.get("tool_calls") or turn.get("function_call")
    if text_name not in turn and not calls:
        raise RowError(f"expected {role_name} and {text_name} in a message, got {sorted(turn)[:8]}")
    if name in ("function_call", "tool_call"):
        return _assistant({**turn, "content": None, "tool_calls": turn[text_name]}, text_name)
    if role == "assistant":
        return _assistant({**turn, "content": turn.get(text_name), "tool_calls": calls}, text_name)
    content = text_of(turn.get(text_name), text_name)
    if role == "system":
        return {"role": role, "content": content or ""}
    if content is None or role == "user" and not content.strip():
        raise RowError(f"expected text in {text_name} of a turn by {role}, got {shown(content)}")
    return {"role": role, "content": content, **({"name": turn["name"]} if isinstance(turn.get("name"), str) else {})}


def _user(content, name: str) -> dict:
    text = text_of(content, name)
    if not (text or "").strip():
        raise RowError(f"expected text in {name}, got {shown(text)}")
    return {"role": "user", "content": text}


@functools.cache  # once
def _warn_of_reasoning() -> None:
    logger.warning("Answers with reasoning: what stands in %s is left out, the words of the answers are trained.", " or ".join(_REASONING))


def _assistant(turn: dict, name: str) -> dict:
    if any(turn.get(field) for field in _REASONING):
        _warn_of_reasoning()
    message: dict = {"role": "assistant", "content": text_of(turn["content"], name) or ""}
    given = turn.get("tool_calls")
    calls = _tool_calls(given) if given else None
    if calls:
        message["tool_calls"] = calls
    says_something = bool(calls) if given else bool(message["content"].strip())
    if not says_something or turn.get("weight") == 0:
        message["weight"] = 0
    return message


def _tool_calls(given) -> list[dict] | None:
    """Tool calls as templates take them, the arguments an object; None if one of them cannot be read."""
    # In tables, the arguments of other tools are filled with null.
    given = _from_json(given) if isinstance(given, str) else _without_nulls(given)
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = _from_json(call.get("function", call)) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        arguments = _from_json(function.get("arguments", function.get("parameters")) or "{}")
        if not isinstance(arguments, dict):
            return None
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
        if isinstance(call.get("id"), str):
            calls[-1]["id"] = call["id"]
    return calls


def _first(row: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if row.get(name) is not None), None)


def _from_json(value):
    """The value of JSON text; anything else unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(value):
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _text_of_part(part, name: str) -> str:
    if isinstance(part, dict) and part.get("type") in _TEXT_TYPES:
        part = part.get("text")
    if not isinstance(part, str):
        raise RowError(f"expected text parts in {name}, got {shown(part)}")
    return text_of(part, name) or ""
