"""Rows of every shape, brought to messages: what is null or empty is not trained, parts are joined, all else is refused."""

import json

import pytest

from transformers_prism.training.data.chats import ROLES, RowError, _warn_of_reasoning, chat_of, prompt_of, tools_of

pytestmark = pytest.mark.quick

CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w20 w21 w22"}]
USER, ANSWER = CHAT
PARTS = [{"type": "text", "text": "w10 "}, "w11"]
FUNCTION = {"name": "add", "arguments": {"a": 1}}
CALL = [{"type": "function", "function": FUNCTION}]
CALLING = {"role": "assistant", "content": "", "tool_calls": CALL}
UNTRAINED = {"role": "assistant", "content": "", "weight": 0}
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


def answered(answer):
    return {"messages": [USER, {"role": "assistant", **answer}]}


SHAPES = {
    "messages": ({"messages": CHAT}, CHAT),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, CHAT),
    "a list of messages": (CHAT, CHAT),
    "capitalised roles": ({"messages": [{**USER, "role": "User"}, {**ANSWER, "role": "ASSISTANT"}]}, CHAT),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "w10 w11"}, {"from": "gpt", "value": "w20 w21 w22"}]}, CHAT),
    "ShareGPT of bing": ({"conversations": [{"from": "human", "value": "w10 w11"}, {"from": "bing", "value": "w20 w21 w22"}]}, CHAT),
    "role and content in conversations": ({"conversations": CHAT}, CHAT),
    "from and value in messages": ({"messages": [{"from": "human", "value": "w10 w11"}, {"from": "gpt", "value": "w20 w21 w22"}]}, CHAT),
    "conversation": ({"conversation": CHAT}, CHAT),
    "a column of the system": ({"system": "w9", "conversations": CHAT}, [{"role": "system", "content": "w9"}, *CHAT]),
    "an empty system": ({"system": "", "messages": [{"role": "system", "content": None}, *CHAT]}, CHAT),
    "Alpaca": ({"instruction": "w1", "input": "w2", "output": "w3"}, [("user", "w1\n\nw2"), ("assistant", "w3")]),
    "Alpaca without input": ({"instruction": "w1", "input": "", "output": "w3"}, [("user", "w1"), ("assistant", "w3")]),
    "Alpaca to be written": ({"instruction": "w1", "input": None, "output": ""}, [("user", "w1")]),
    "Alpaca with history": (
        {"instruction": "w1", "output": "w3", "history": [["w5", "w6"]]},
        [("user", "w5"), ("assistant", "w6"), ("user", "w1"), ("assistant", "w3")],
    ),
    "Dolly": ({"instruction": "w1", "context": "w2", "response": "w3"}, [("user", "w1\n\nw2"), ("assistant", "w3")]),
    "prompt and response": ({"prompt": "w10 w11", "response": "w20 w21 w22"}, CHAT),
    "prompt and completion": ({"prompt": "w10 w11", "completion": "w20 w21 w22"}, CHAT),
    "TRL, conversational": ({"prompt": [USER], "completion": [ANSWER]}, CHAT),
    "question and answer": ({"question": "w10 w11", "answer": "w20 w21 w22"}, CHAT),
    "a table of prompts and chats": ({"messages": None, "prompt": "w1", "completion": None}, [("user", "w1")]),
    "DPO": ({"prompt": "w10 w11", "chosen": "w20 w21 w22", "rejected": "w5"}, CHAT),
    "DPO, answers as messages": ({"prompt": "w10 w11", "chosen": [ANSWER], "rejected": [ANSWER]}, CHAT),
    "DPO, whole chats": ({"prompt": "w10 w11", "chosen": CHAT, "rejected": CHAT[:1]}, CHAT),
    "DPO, whole chats alone": ({"chosen": CHAT, "rejected": CHAT[:1]}, CHAT),
    "DPO, transcript": ({"chosen": "\n\nHuman: w10 w11\n\nAssistant: w20 w21 w22"}, CHAT),
    "Spec-Bench": ({"question_id": 3, "turns": ["w1", "w2"]}, [("user", "w1"), ("user", "w2")]),
    "turns as one text": ({"turns": "w1 w2"}, [("user", "w1 w2")]),
    "turns as messages": ({"turns": CHAT}, CHAT),
    "prompt": ({"prompt": "w1"}, [("user", "w1")]),
    "prompt as messages": ({"prompt": [USER]}, [USER]),
    "text": ({"text": "w1"}, [("user", "w1")]),
    "weight 0": ({"messages": [USER, {**ANSWER, "weight": 0}]}, [USER, {**ANSWER, "weight": 0}]),
    "null answer": (answered({"content": None}), [USER, UNTRAINED]),
    "empty answer": (answered({"content": " "}), [USER, {**UNTRAINED, "content": " "}]),
    "tool call": (answered({"content": None, "tool_calls": CALL}), [USER, CALLING]),
    "tool call without content": (answered({"tool_calls": CALL}), [USER, CALLING]),
    "no tool call": (answered({"content": "w20 w21 w22", "tool_calls": [], "weight": 1}), CHAT),
    "arguments as JSON": (answered({"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}), [USER, CALLING]),
    "arguments of a table": (
        answered({"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "of_others": None}}}]}),
        [USER, CALLING],
    ),
    "function_call": (answered({"content": "w5", "function_call": FUNCTION}), [USER, {**CALLING, "content": "w5"}]),
    "function_call that cannot be read": (
        answered({"content": "w5", "function_call": {"name": "add", "arguments": "a=1"}}),
        [USER, {**UNTRAINED, "content": "w5"}],
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "w10 w11"},
                {"from": "function_call", "value": json.dumps(FUNCTION)},
                {"from": "observation", "value": "w7"},
                {"from": "gpt", "value": "w20 w21 w22"},
            ]
        },
        [USER, CALLING, {"role": "tool", "content": "w7"}, ANSWER],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_rows(name):
    row, chat = SHAPES[name]
    expected = [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in chat]
    assert chat_of(row) == expected


@pytest.mark.parametrize("alias", ROLES)
def test_roles_have_aliases(alias):
    (message,) = chat_of({"conversations": [{"from": alias.title(), "value": '{"name": "add"}'}]})
    assert message["role"] == ROLES[alias]
    assert ("tool_calls" in message) == (alias in ("function_call", "tool_call"))


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
    assert chat_of(row) == [USER]


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_texts_of_a_prompt_are_turns(name):
    """As in MT-bench on the Hub; they became one text without a space between them."""
    assert chat_of({name: ["w1 w2", "w3"], "category": "writing"}) == [
        {"role": "user", "content": "w1 w2"},
        {"role": "user", "content": "w3"},
    ]
    with pytest.raises(RowError, match=f"expected one text in {name} next to an answer in response, got a list of 2"):
        chat_of({name: ["w1", "w3"], "response": "w4"})


@pytest.mark.parametrize("content", [5, 0, 1.5, True, False, {"text": "w1"}, {}, [5], [None], [["w1"]], [IMAGE], ["w1", IMAGE]])
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_content_that_is_no_text_is_refused(role, content):
    with pytest.raises(RowError, match=r"expected text.* in content, got "):
        chat_of({"messages": [{"role": role, "content": content}]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "expected text in content of a turn by user, got null"),
        ({"messages": [{"role": "tool", "content": None}]}, "expected text in content of a turn by tool, got null"),
        ({"messages": [{"role": "user", "content": " "}]}, 'expected text in content of a turn by user, got " "'),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "text parts in content, got a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "expected text parts in content, got null"),
        ({"messages": [{"role": "user", "content": "w1 \ud83d"}]}, "valid Unicode in content, got a lone surrogate .* character 3"),
        ({"messages": [{"role": "user", "content": ["\udce9"]}]}, "valid Unicode in content, got a lone surrogate"),
        ({"messages": [{"role": None, "content": "w1"}]}, "expected text in role, got null"),
        ({"messages": [{"role": "narrator", "content": "w1"}]}, "expected a role such as user, .* got 'narrator'"),
        ({"messages": [{"role": "user", "text": "w1"}]}, r"expected role and content in a message, got \['role', 'text'\]"),
        ({"messages": "w1"}, 'expected a list of messages in messages, got "w1"'),
        ({"messages": ["w1"]}, r"expected a list of messages in messages, got \[\"w1\"\]"),
        ({"messages": []}, "expected at least one message in messages, got an empty list"),
        ({"turns": []}, "expected at least one turn in turns, got an empty list"),
        ({"turns": [None]}, "expected text in turns, got null"),
        ({"turns": ["w1", 2]}, "expected text or a list of text parts in turns, got 2"),
        ({"turns": {"first": "w1"}}, "expected text or a list of text parts in turns, got"),
        ({"prompt": 5}, "expected text or a list of text parts in prompt, got 5"),
        ({"prompt": ""}, 'expected text in prompt, got ""'),
        ({"prompt": "w1", "response": 5}, "expected text or a list of text parts in response, got 5"),
        ({"question": "w1", "answer": ["w2", "w3"]}, "expected one answer in answer, got a list of 2"),
        ({"chosen": "w1"}, "expected a prompt with chosen, or a transcript in it, got"),
        ({"instruction": "w1", "output": "w2", "history": ["w3"]}, "expected pairs of a user's text and an answer in history"),
        ({"response": "w1"}, r"expected one of the columns messages, .*, text, got \['response'\]"),
        ({"prompt": None}, r"expected one of the columns messages, .*, text, got none that is filled"),
        ([1, 2], r"expected a list of messages in messages, got \[1, 2\]"),
        (None, "expected a JSON object, got null"),
    ],
)
def test_rows_that_hold_no_chat_are_refused(row, message):
    with pytest.raises(RowError, match=message) as caught:
        chat_of(row)
    assert ", got" not in caught.value.reason


def test_prompts_need_a_turn_by_the_user():
    assert prompt_of({"messages": CHAT}) == CHAT
    with pytest.raises(RowError, match="expected at least one turn by the user, got 1 turns by others"):
        prompt_of({"messages": CHAT[1:]})


def test_reasoning_is_left_out_with_a_warning(caplog):
    """Once."""
    _warn_of_reasoning.cache_clear()
    row = {"messages": [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w20", "reasoning_content": "w30"}]}
    for _ in range(2):
        assert chat_of(row) == [{"role": "user", "content": "w10"}, {"role": "assistant", "content": "w20"}]
    assert [record.message.split(":")[0] for record in caplog.records] == ["Answers with reasoning"]


def test_tools_are_read_from_lists_and_json():
    tool = {"name": "add", "parameters": {"type": "object"}}
    expected = [{"type": "function", "function": tool}]
    for tools in ([tool], expected, json.dumps([tool]), [{**tool, "of_others": None}]):
        assert tools_of({"messages": CHAT, "tools": tools}) == expected
    for row in ({"tools": "none"}, {"tools": []}, {}, CHAT):
        assert tools_of(row) is None
