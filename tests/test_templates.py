"""Answers of chats as tokens: those that the row says and the target would be asked for, whatever a template writes around."""

import pytest
from tiny_models import CHAT_TEMPLATE, chat_tokenizer, word_tokenizer

from transformers_prism.training.data.chats import NoAnswer, RowError, chat_of
from transformers_prism.training.data.templates import between_turns, opening, render, tokenized_chat

pytestmark = pytest.mark.quick

CHAT = [
    {"role": "user", "content": "w10 w11"},
    {"role": "assistant", "content": "w20 w21 w22"},
    {"role": "user", "content": "w12"},
    {"role": "assistant", "content": "w23"},
]
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "w30", "arguments": {"w31": 1}}}]}
RESULT = {"role": "tool", "content": "w32"}
GENERATION = "{% generation %}{{ turn['content'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
# Qwen3's way: an empty thought before the last answer, none before the others.
THOUGHT = (
    "{% for turn in messages %}{{ '<' + turn['role'] + '> ' }}"
    "{% if turn['role'] == 'assistant' and loop.last %}{{ 'w90 w91 ' }}{% endif %}{{ turn['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
WITH_CALLS = (
    "{% for turn in messages %}{{ '<' + turn['role'] + '> ' + turn['content'] }}"
    "{% for call in turn.tool_calls %}{{ ' ' + call.function.name }}"
    "{% for name in call.function.arguments %}{{ ' ' + name }}{% endfor %}{% endfor %}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_TEMPLATE
ALTERNATES = (
    "{% for turn in messages %}{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)


def tokenizer_of(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def answers(template, chat, tools=None):
    """What is trained, as text."""
    tokenizer = tokenizer_of(template)
    input_ids, spans = tokenized_chat(tokenizer, chat, tools)
    return [tokenizer.decode(input_ids[start:end]) for start, end in spans]


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        CHAT_TEMPLATE.replace("turn['content'] + ' <end> '", "turn['content'] | trim + ' <end> '"),
        CHAT_TEMPLATE.replace("turn['content']", "' ' + turn['content']"),
        "{% for turn in messages %}{{ '<' + turn['role'] + '> ' }}" + GENERATION + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}",
    ],
    ids=["plain", "trimmed", "a space more", "generation marks"],
)
def test_answers_are_marked_with_the_token_that_ends_them(template):
    input_ids, spans = tokenized_chat(tokenizer_of(template), CHAT)
    assert input_ids == [4, 10, 11, 1, 5, 20, 21, 22, 1, 4, 12, 1, 5, 23, 1]
    assert spans == [(5, 9), (13, 15)]


def test_what_the_template_adds_to_an_answer_is_not_trained():
    assert answers(THOUGHT, CHAT) == ["w20 w21 w22 <end>", "w23 <end>"]
    tokenizer = tokenizer_of(THOUGHT)
    assert "<assistant> w90 w91 w23 <end>" in tokenizer.decode(tokenized_chat(tokenizer, CHAT)[0])


def test_answers_that_the_template_leaves_without_an_end():
    assert answers("{% for turn in messages %}{{ turn['content'] + ' ' }}{% endfor %}", CHAT) == ["w20 w21 w22", "w23"]


def test_a_template_that_changes_answers_is_refused():
    """Some templates drop what earlier answers said; training on that text would learn what is never written."""
    with pytest.raises(RowError, match="expected a template that writes answers as they are"):
        answers(CHAT_TEMPLATE.replace("turn['content'] + ' <end> '", "turn['content'][:3] + ' <end> '"), CHAT)
    with pytest.raises(RowError, match='answers as they are, got one that changes "w20 w21 w22"'):
        answers(CHAT_TEMPLATE.replace("turn['content'] +", "turn['content'].replace('w21', 'w9') +"), CHAT)
    rewrites = "{% if messages[-1]['role'] == 'assistant' %}{{ 'w9 ' }}{% endif %}" + CHAT_TEMPLATE
    with pytest.raises(RowError, match="turn by turn, got one that rewrites it"):
        answers(rewrites, CHAT)


def test_answers_that_mention_special_tokens_are_refused():
    chat = [CHAT[0], {"role": "assistant", "content": "w20 <end> w21"}]
    with pytest.raises(RowError, match="expected answers without special tokens of the target, got <end>"):
        answers(CHAT_TEMPLATE, chat)
    # What a user says is not trained, and the target would read it in the same way.
    assert answers(CHAT_TEMPLATE, [{"role": "user", "content": "w10 <end>"}, CHAT[1]]) == ["w20 w21 w22 <end>"]


def test_tokens_that_do_not_read_back_are_refused():
    with pytest.raises(RowError, match="expected tokens that read back as the answer, got '<unknown>' for 'hello'"):
        answers(CHAT_TEMPLATE, [CHAT[0], {"role": "assistant", "content": "hello"}])


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (REFUSES_SYSTEM, [{"role": "system", "content": "w9"}, *CHAT], "template takes, got its error: System role not supported"),
        (ALTERNATES, [CHAT[0], *CHAT], "template takes, got its error: Conversation roles must alternate"),
        ("{{ messages[0]['content'] + messages[0]['none'] }}", CHAT, "template takes, got its error"),
        ("{{ messages[5]['content'].none() }}", CHAT, "template takes, got its error"),
    ],
)
def test_chats_that_the_template_refuses(template, chat, message):
    with pytest.raises(RowError, match=message):
        answers(template, chat)


def test_a_chat_needs_an_answer_and_a_template():
    with pytest.raises(NoAnswer, match="expected a chat with at least one assistant turn, got 1 turns without"):
        answers(CHAT_TEMPLATE, CHAT[:1])
    with pytest.raises(NoAnswer, match="expected an answer to train on"):
        answers(CHAT_TEMPLATE, [CHAT[0], {**CHAT[1], "weight": 0}])
    with pytest.raises(ValueError, match="expected one with a chat template, got none") as caught:
        tokenized_chat(word_tokenizer(), CHAT)
    assert not isinstance(caught.value, RowError)


def test_answers_of_weight_0_stay_in_the_chat():
    chat = [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT[2:]]
    input_ids, spans = tokenized_chat(chat_tokenizer(), chat)
    assert input_ids == [4, 10, 11, 1, 5, 20, 21, 22, 1, 4, 12, 1, 5, 23, 1]
    assert spans == [(13, 15)]


def test_tool_calls_are_trained_as_the_template_writes_them():
    chat = [CHAT[0], CALLING, RESULT, CHAT[1]]
    assert answers(WITH_CALLS, chat) == ["w30 w31 <end>", "w20 w21 w22 <end>"]


def test_what_the_template_adds_to_a_call_is_not_trained():
    template = WITH_CALLS.replace("+ turn['content']", "+ ('w90 ' if turn.tool_calls else '') + turn['content']")
    assert answers(template, [CHAT[0], {**CALLING, "content": "w33"}]) == ["w33 w30 w31 <end>"]
    assert answers(template, [CHAT[0], CALLING]) == ["w30 w31 <end>"]


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        # Names the tool, not what it is called with.
        WITH_CALLS.replace("{{ ' ' + name }}", ""),
        "{% for turn in messages if turn.tool_calls %}{{ raise_exception('no tools') }}{% endfor %}" + CHAT_TEMPLATE,
    ],
    ids=["left out", "without arguments", "refused"],
)
def test_tool_calls_that_the_template_leaves_out_are_not_trained(template):
    assert answers(template, [CHAT[0], CALLING, RESULT, CHAT[1]]) == ["w20 w21 w22 <end>"]


def test_answers_to_results_that_the_template_leaves_out_are_not_trained():
    template = CHAT_TEMPLATE.replace("for turn in messages", "for turn in messages if turn['role'] != 'tool'")
    chat = [CHAT[0], CALLING, RESULT, CHAT[1], *CHAT[2:]]
    assert answers(template, chat) == ["w23 <end>"]


def test_results_that_the_template_writes_as_json_count_as_written():
    """As those of Llama 3 write quotes and lines."""
    template = WITH_CALLS.replace("turn['content']", "(turn['content'] | tojson if turn['role'] == 'tool' else turn['content'])")
    result = {"role": "tool", "content": '{"w31":\n"w32"}'}
    assert answers(template, [CHAT[0], CALLING, result, CHAT[1]])[-1] == "w20 w21 w22 <end>"


def test_tools_are_given_to_the_template():
    template = "{% for tool in tools %}{{ tool.function.name + ' ' }}{% endfor %}" + CHAT_TEMPLATE
    tokenizer = tokenizer_of(template)
    input_ids, _ = tokenized_chat(tokenizer, CHAT, [{"type": "function", "function": {"name": "w30"}}])
    assert input_ids[0] == 30


def test_a_call_from_a_row_is_trained_as_it_is():
    row = {
        "conversations": [
            {"from": "human", "value": "w10"},
            {"from": "function_call", "value": '{"name": "w30", "arguments": {"w31": null}}'},
            {"from": "observation", "value": "w32"},
            {"from": "gpt", "value": "w20"},
        ]
    }
    assert answers(WITH_CALLS, chat_of(row)) == ["w30 w31 <end>", "w20 <end>"]


def test_template_pieces():
    tokenizer = chat_tokenizer()
    assert between_turns(tokenizer) == (" <end> <assistant> ", " <end> <user> ")
    assert opening(tokenizer) == "<user> "
    assert opening(tokenizer, "w30") == "<system> w30 <end> <user> "
    tokenizer.chat_template = "{% for turn in messages if turn['role'] == 'user' %}{{ turn['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"expected one that writes user and assistant turns once each, got \[1, 0, 1\]"):
        between_turns(tokenizer)


def test_render_takes_a_prompt():
    assert render(chat_tokenizer(), CHAT[:1], add_generation_prompt=True) == "<user> w10 w11 <end> <assistant> "


def test_a_turn_that_begins_a_chat_is_not_asked_for():
    """As a greeting; the answers behind it are trained."""
    greeting = {"role": "assistant", "content": "w9 w9"}
    ids, spans = tokenized_chat(chat_tokenizer(), [greeting, *CHAT])
    plain_ids, plain_spans = tokenized_chat(chat_tokenizer(), CHAT)
    behind = len(ids) - len(plain_ids)
    assert spans == [(start + behind, end + behind) for start, end in plain_spans]
    with pytest.raises(NoAnswer):
        tokenized_chat(chat_tokenizer(), [greeting, CHAT[0]])
