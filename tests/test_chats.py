"""Chats of every form, brought to messages: what is null is not learnt, parts of text are joined, all else is refused."""

import json

import pytest
from tiny_models import VOCAB_SIZE, chat_tokenizer, tiny_target
from typer.testing import CliRunner

from transformers_prism.bench.prompts import read_prompts
from transformers_prism.cli.main import app
from transformers_prism.training.data.chats import chat_of, read_chats, read_data_set
from transformers_prism.training.data.conversations import read_conversations

pytestmark = pytest.mark.quick

CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w20 w21 w22"}]
PARTS = [{"type": "text", "text": "w10 "}, "w11"]
CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
UNLEARNT = {"role": "assistant", "content": "", "weight": 0}
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages(*turns):
    return [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": CHAT}, CHAT),
        ({"conversations": [{"from": "human", "value": "w10 w11"}, {"from": "gpt", "value": "w20 w21 w22"}]}, CHAT),
        ({"instruction": "w1", "input": "w2", "output": "w3"}, [("user", "w1\n\nw2"), ("assistant", "w3")]),
        ({"instruction": "w1", "input": ""}, [("user", "w1")]),
        ({"instruction": "w1", "input": None, "output": ""}, [("user", "w1")]),
        ({"question_id": 3, "turns": ["w1", "w2"]}, [("user", "w1"), ("user", "w2")]),
        ({"turns": "w1 w2"}, [("user", "w1 w2")]),
        ({"prompt": "w1"}, [("user", "w1")]),
        ({"text": "w1"}, [("user", "w1")]),
        # A table of several forms: the columns of the others are null.
        ({"messages": None, "prompt": None, "text": "w1"}, [("user", "w1")]),
    ],
)
def test_forms_of_chats(row, chat):
    assert chat_of(row, "here") == messages(*chat)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": PARTS}]},
        {"conversations": [{"from": "human", "value": PARTS}]},
        {"instruction": PARTS},
        {"turns": [PARTS]},
        {"prompt": PARTS},
        {"text": PARTS},
    ],
    ids=lambda row: next(iter(row)),
)
def test_parts_of_text_are_joined(row):
    assert chat_of(row, "here") == messages(("user", "w10 w11"))


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": CALL}]}, [CHAT[0], UNLEARNT]),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": CALL}]}, [CHAT[0], UNLEARNT]),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": CALL}]}, [CHAT[0], UNLEARNT]),
        # The call that the answer ends with is not in the text.
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": "w5", "function_call": {"name": "add"}}]},
            [CHAT[0], {**UNLEARNT, "content": "w5"}],
        ),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": None}]}, CHAT),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [], "weight": 1}]}, CHAT),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, [CHAT[0], {**CHAT[1], "weight": 0}]),
        ({"messages": [{"role": "system", "content": None}, *CHAT]}, CHAT),
        ({"conversations": [{"from": "human", "value": "w10 w11"}, {"from": "gpt", "value": None}]}, [CHAT[0], UNLEARNT]),
        ({"instruction": "w10 w11", "output": None}, [CHAT[0], UNLEARNT]),
    ],
)
def test_answers_that_say_nothing_are_not_learnt(row, chat):
    """Null became the text "None" and was learnt; so were the ends of answers whose tool calls were left out."""
    assert chat_of(row, "here") == chat


@pytest.mark.parametrize("content", [5, 0, 1.5, True, False, {"text": "w1"}, {}, [5], [None], [["w1"]], [IMAGE], ["w1", IMAGE]])
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_content_that_is_no_text_is_refused(role, content):
    with pytest.raises(ValueError, match=r"a.jsonl, line 7: expected text.* in content, got "):
        chat_of({"messages": [{"role": role, "content": content}]}, "a.jsonl, line 7")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "expected text in content of a turn by user, got null"),
        ({"messages": [{"role": "tool", "content": None}]}, "expected text in content of a turn by tool, got null"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "text parts in content, got a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "expected text parts in content, got null"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "text parts in content, got 5"),
        ({"messages": [{"role": None, "content": "w1"}]}, "expected text in role, got null"),
        ({"messages": [{"role": "user", "text": "w1"}]}, r"expected role and content in a turn, got \['role', 'text'\]"),
        ({"messages": "w1"}, 'expected a list of objects in messages, got "w1"'),
        ({"messages": ["w1"]}, r"expected a list of objects in messages, got \[\"w1\"\]"),
        ({"conversations": [{"from": "human", "value": None}]}, "expected text in value of a turn by user, got null"),
        ({"conversations": [{"from": "bing", "value": "w1"}]}, 'one of human, .*, system in from, got "bing"'),
        ({"turns": [None]}, "expected text in turns of a turn by user, got null"),
        ({"turns": ["w1", 2]}, "expected text or a list of text parts in turns, got 2"),
        ({"turns": {"first": "w1"}}, "expected text or a list of text parts in turns, got"),
        ({"prompt": 5}, "expected text or a list of text parts in prompt, got 5"),
        ({"text": {"a": 1}}, "expected text or a list of text parts in text, got"),
        ({"instruction": "w1", "output": 0}, "expected text or a list of text parts in output, got 0"),
        ({"instruction": 3}, "expected text or a list of text parts in instruction, got 3"),
        ({"question": "w1"}, r"expected messages, conversations, .* or text, got \['question'\]"),
        ({"prompt": None}, r"expected messages, conversations, .* or text, got \['prompt'\]"),
        ([1, 2], r"expected a JSON object, got \[1, 2\]"),
        (None, "expected a JSON object, got null"),
    ],
)
def test_rows_that_hold_no_chat_are_named(tmp_path, row, message):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "w1"}, row])
    with pytest.raises(ValueError, match=rf"^a.jsonl, line 2: .*{message}"):
        list(read_chats(path))


def test_files_that_hold_no_chats_are_named(tmp_path):
    (tmp_path / "b.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="b.jsonl, line 1: expected a JSON object, got 'not json'"):
        list(read_chats(tmp_path / "b.jsonl"))
    with pytest.raises(FileNotFoundError, match="expected a JSON-lines file, got 'none.jsonl'"):
        list(read_chats(tmp_path / "none.jsonl"))


def test_data_sets_are_read_through_datasets(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"messages": CHAT}, {"messages": CHAT[:1]}])
    assert list(read_data_set(str(tmp_path))) == [CHAT, CHAT[:1]]


# --- what training makes of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [False, True])
def test_only_answers_that_say_something_are_marked(tmp_path, marks, caplog):
    """With the template's own marks and without: a null answer stays in the chat, the answer after it is learnt."""
    tokenizer = chat_tokenizer()
    if marks:
        tokenizer.chat_template = (
            "{% for turn in messages %}{{ '<' + turn['role'] + '> ' }}"
            "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
            "{% else %}{{ turn['content'] + ' <end> ' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
        )
    silent = {"role": "assistant", "content": None, "tool_calls": CALL}
    rows = [
        {"messages": [CHAT[0], silent, {"role": "user", "content": "w12"}, CHAT[1]]},
        {"messages": [CHAT[0], CHAT[1], CHAT[0], silent]},
        {"messages": [CHAT[0], silent]},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    first, second = read_conversations(path, VOCAB_SIZE, tokenizer=tokenizer)
    for conversation in (first, second):
        ((start, end),) = conversation.assistant_spans
        assert tokenizer.decode(conversation.input_ids[start:end]) == "w20 w21 w22 <end>"
    assert tokenizer.decode(first.input_ids) == (
        "<user> w10 w11 <end> <assistant> <end> <user> w12 <end> <assistant> w20 w21 w22 <end>"
    )
    assert "1 of 3 conversations have no answer and are left out" in caplog.text


def test_a_chat_that_mentions_input_ids_is_a_chat(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHAT, "note": "input_ids"}])
    (conversation,) = read_conversations(path, VOCAB_SIZE, tokenizer=chat_tokenizer())
    assert len(conversation.assistant_spans) == 1


def test_prompts_of_benchmarks_are_read_alike(tmp_path):
    """A single text became one turn a letter, of which the first was measured."""
    rows = [
        {"category": "math", "turns": "w1 w2"},
        {"category": "math", "turns": [PARTS, "w3"]},
        {"category": "math", "messages": [{"role": "system", "content": "w9"}, *CHAT, {"role": "user", "content": "w4"}]},
    ]
    found = [record["turns"] for record in read_prompts(write_lines(tmp_path / "a.jsonl", rows))]
    assert found == [["w1 w2"], ["w10 w11", "w3"], ["w10 w11", "w4"]]
    for turns in ([IMAGE], [None], [5], []):
        with pytest.raises(ValueError, match=r"b.jsonl, line 1: expected "):
            read_prompts(write_lines(tmp_path / "b.jsonl", [{"category": "math", "turns": turns}]))


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--use_cpu", "--output", "{out}", "--data"),
        ("train", "--use_cpu", "--output", "{out}", "--plan", "--data"),
        ("synthesize", "--num-tokens", "10", "--output", "{out}", "--prompts"),
        ("synthesize", "--num-tokens", "10", "--output", "{out}", "--exclude"),
        ("data", "preview", "--data"),
        ("bench", "generate", "--prompts"),
        ("verify", "--prompts"),
    ],
    ids=lambda words: " ".join(word for word in words if "{" not in word),
)
@pytest.mark.parametrize("content", [None, 5, {"a": "b"}, [IMAGE]], ids=["null", "number", "object", "image"])
def test_every_command_refuses_what_is_no_text(tmp_path, monkeypatch, command, content):
    """In one line, with the file and the line."""
    target, tokenizer = tiny_target("llama"), chat_tokenizer()
    for place in ("target", "training.train", "training.plan", "cli.demo"):
        monkeypatch.setattr(f"transformers_prism.{place}.load_target", lambda *names, **kwargs: (target, tokenizer))
    row = {"category": "math", "messages": [{"role": "user", "content": content}, CHAT[1]]}
    path = write_lines(tmp_path / "chats.jsonl", [{"category": "math", "messages": CHAT}, row])
    words = [word.format(out=tmp_path / "out") for word in command]
    result = CliRunner().invoke(app, [*words, str(path)])
    assert result.exit_code == 1, (result.output, result.exception)
    assert "chats.jsonl, line 2: expected text" in result.stderr
    assert "Traceback" not in result.output
