"""Chats as people keep them, brought to one form: messages with a role and text.

A row says what it says: nothing is made up for what it leaves open, and what is no text is refused where it stands.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path


def read_chats(path) -> Iterator[list[dict]]:
    """Chats of a JSON-lines file as lists of `{"role": ..., "content": ...}`; see [`chat_of`].

    Args:
        path (`str` or path): JSON lines, gzipped if named .gz.
    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if a line holds no chat, naming file and line.
    """
    return (chat for _, chat in placed_chats(Path(path)))


def placed_chats(path: Path) -> Iterator[tuple[str, list[dict]]]:
    """The chats of [`read_chats`], each with where it stands."""
    if not path.is_file():
        raise FileNotFoundError(f"prompts: expected a JSON-lines file, got {path.name!r}, which is not there")
    for where, line in placed_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{where}: expected a JSON object, got {line.strip()[:60]!r}") from None
        yield where, chat_of(row, where)


def placed_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file, gzipped if named .gz, that are not empty, each with where it stands.

    Raises:
        ValueError: if the file cannot be read.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path.name}, line {number}", line
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"data: expected JSON lines (gzipped if named .gz) in {path.name}, got: {error}") from None


def read_data_set(name: str, split: str = "train") -> Iterator[list[dict]]:
    """Chats of a data set on the Hub, or of a folder or file that `datasets` reads, row by row as [`read_chats`]."""
    import datasets

    for number, row in enumerate(datasets.load_dataset(name, split=split, streaming=True), start=1):
        yield chat_of(row, f"{name}, row {number}")


# --- one row -----------------------------------------------------------------------------------------------------

_FORMS = ("messages", "conversations", "instruction", "turns", "prompt", "text")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def chat_of(row, where: str) -> list[dict]:
    """One row of a data set as messages.

    Understood: `messages`; ShareGPT's `conversations` with `from` and `value`; Alpaca's `instruction` with `input` and
    `output`; `prompt`, `turns` (user turns) or `text` with plain text. Wherever there is text, there may be a list of text
    parts, which are joined. An answer that is null, that calls tools or that has the weight 0 has `"weight": 0` in its
    message: it is part of the chat and not learnt.

    Args:
        row (`dict`): of JSON values.
        where (`str`): named in errors.
    Returns:
        `list[dict]`: messages with `role` and `content`, both text.
    Raises:
        ValueError: if the row has none of these forms, or something that is no text in the place of text.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_shown(row)}")
    # Where rows of several forms are in one table, the columns of the others are null.
    form = next((name for name in _FORMS if row.get(name) is not None), None)
    if form is None:
        raise ValueError(f"{where}: expected messages, conversations, instruction, turns, prompt or text, got {sorted(row)[:8]}")
    if form in ("messages", "conversations"):
        return _messages(row[form], where, form)
    if form == "instruction":
        return _alpaca(row, where)
    turns = row[form] if form == "turns" and isinstance(row[form], list) else [row[form]]
    return [_message("user", turn, where, form) for turn in turns]


def text_of(content, where: str, name: str) -> str | None:
    """Text, or a list of text parts as one text; None for null.

    Args:
        content: a JSON value.
        where (`str`), name (`str`): of the value, for errors.
    Raises:
        ValueError: for anything else.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected text or a list of text parts in {name}, got {_shown(content)}")
    return "".join(_text_of_part(part, where, name) for part in content)


def _text_of_part(part, where: str, name: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        part = part.get("text")
    if not isinstance(part, str):
        raise ValueError(f"{where}: expected text parts in {name}, got {_shown(part)}")
    return part


def _messages(turns, where: str, form: str) -> list[dict]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: expected a list of objects in {form}, got {_shown(turns)}")
    role_name, text_name = ("role", "content") if form == "messages" else ("from", "value")
    messages = []
    for turn in turns:
        role = turn.get(role_name)
        if form == "conversations" and isinstance(role, str):
            role = _SHAREGPT_ROLES.get(role)
        if not isinstance(role, str):
            expected = f"one of {', '.join(_SHAREGPT_ROLES)}" if form == "conversations" else "text"
            raise ValueError(f"{where}: expected {expected} in {role_name}, got {_shown(turn.get(role_name))}")
        calls_tools = bool(turn.get("tool_calls") or turn.get("function_call"))
        if text_name not in turn and not calls_tools:
            raise ValueError(f"{where}: expected {role_name} and {text_name} in a turn, got {sorted(turn)[:8]}")
        content = turn.get(text_name)
        # A system turn that says nothing is one that is not there.
        if role == "system" and content is None:
            continue
        is_learnt = not calls_tools and turn.get("weight") != 0
        messages.append(_message(role, content, where, text_name, is_learnt))
    return messages


def _message(role: str, content, where: str, name: str, is_learnt: bool = True) -> dict:
    text = text_of(content, where, name)
    if role == "assistant" and (text is None or not is_learnt):
        return {"role": role, "content": text or "", "weight": 0}
    if text is None:
        raise ValueError(f"{where}: expected text in {name} of a turn by {role}, got null")
    return {"role": role, "content": text}


def _alpaca(row: dict, where: str) -> list[dict]:
    parts = [text_of(row.get(name), where, name) for name in ("instruction", "input")]
    chat = [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]
    # An output that is left empty is one that is still to be written.
    if row.get("output", "") != "":
        chat.append(_message("assistant", row["output"], where, "output"))
    return chat


def _shown(value) -> str:
    """The beginning of a JSON value; a part that is no text shows its type."""
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return f"a part of type {value['type'][:40]!r}"
    return json.dumps(value, default=repr)[:60]


__all__ = ["chat_of", "placed_chats", "placed_lines", "read_chats", "read_data_set", "text_of"]
