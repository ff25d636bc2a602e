"""Conversations: what a file may hold, which tokens are the target's own, what is left out, and what is said if not."""

import gzip
import json

import pytest
from tiny_models import CHAT_TEMPLATE, VOCAB_SIZE, chat_tokenizer, word_tokenizer

from transformers_prism.training.data.conversations import (
    ChatPieces,
    Contamination,
    Conversation,
    describe,
    loop_period,
    masked_conversation,
    opening,
    preview,
    read_conversations,
)

pytestmark = pytest.mark.quick

CHAT = [
    {"role": "user", "content": "w10 w11"},
    {"role": "assistant", "content": "w20 w21 w22"},
    {"role": "user", "content": "w12"},
    {"role": "assistant", "content": "w23"},
]
CHAT_IDS = (4, 10, 11, 1, 5, 20, 21, 22, 1, 4, 12, 1, 5, 23, 1)
GENERATION_TEMPLATE = (
    "{% for turn in messages %}{{ '<' + turn['role'] + '> ' }}"
    "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ turn['content'] + ' <end> ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION_TEMPLATE], ids=["rendered", "generation marks"])
def test_answers_are_marked_with_the_token_that_ends_them(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    assert masked_conversation(tokenizer, CHAT) == Conversation(CHAT_IDS, ((5, 9), (13, 15)))


def test_a_template_that_changes_answers_is_refused():
    """Some templates drop what earlier answers said; training on that text would learn what is never written."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("turn['content'] + ' <end> '", "turn['content'][:3] + ' <end> '")
    with pytest.raises(ValueError, match="expected the marked tokens to say 'w20 w21 w22', got 'w20"):
        masked_conversation(tokenizer, CHAT)
    rewrites = "{% if messages[-1]['role'] == 'assistant' %}{{ 'w9 ' }}{% endif %}" + CHAT_TEMPLATE
    tokenizer.chat_template = rewrites
    with pytest.raises(ValueError, match="turn by turn, got one that rewrites it"):
        masked_conversation(tokenizer, CHAT)


def test_masks_that_mark_all_or_nothing_are_refused():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{% generation %}{{ turn['content'] + ' ' }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="zeros elsewhere, got all ones"):
        masked_conversation(tokenizer, CHAT)
    tokenizer.chat_template = "{# {% generation %} #}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="ones at assistant turns and zeros elsewhere, got all zeros"):
        masked_conversation(tokenizer, CHAT)


def test_a_mask_over_the_wrong_turns_is_refused():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = GENERATION_TEMPLATE.replace("turn['role'] == 'assistant'", "turn['role'] == 'user'")
    with pytest.raises(ValueError, match="expected the marked tokens to say 'w20 w21 w22', got 'w10 w11'"):
        masked_conversation(tokenizer, CHAT)


def test_a_chat_needs_an_answer_and_a_template():
    with pytest.raises(ValueError, match="chat: expected a chat with at least one assistant turn, got 1 turns without"):
        masked_conversation(chat_tokenizer(), CHAT[:1])
    with pytest.raises(ValueError, match="expected one with a chat template, got none"):
        masked_conversation(word_tokenizer(), CHAT)


def test_template_pieces():
    tokenizer = chat_tokenizer()
    assert ChatPieces.of(tokenizer) == ChatPieces(" <end> <assistant> ", " <end> <user> ")
    assert opening(tokenizer) == "<user> "
    assert opening(tokenizer, "w30") == "<system> w30 <end> <user> "
    tokenizer.chat_template = "{% for turn in messages if turn['role'] == 'user' %}{{ turn['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"expected one that writes user and assistant turns once each, got \[1, 0, 1\]"):
        ChatPieces.of(tokenizer)


# --- reading -----------------------------------------------------------------------------------------------------


def test_sources_of_all_kinds_are_read_in_order(tmp_path):
    """Token ids with a prompt's length or with spans, gzipped or not, Parquet, and chats."""
    import pyarrow
    import pyarrow.parquet

    plain = write_lines(tmp_path / "a.jsonl", [{"input_ids": [7, 8, 9], "prompt_length": 1}])
    zipped = tmp_path / "b.jsonl.gz"
    with gzip.open(zipped, "wt") as file:
        file.write(json.dumps({"input_ids": [7, 8, 9, 10], "assistant_spans": [[1, 2], [3, 4]]}) + "\n")
    shards = tmp_path / "shards"
    shards.mkdir()
    table = pyarrow.table({"input_ids": [[5, 6, 7]], "assistant_spans": [[[2, 3]]]})
    pyarrow.parquet.write_table(table, shards / "part-0.parquet")
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    found = read_conversations([plain, zipped, shards, chats], VOCAB_SIZE, tokenizer=chat_tokenizer())
    assert found == [
        Conversation((7, 8, 9), ((1, 3),)),
        Conversation((7, 8, 9, 10), ((1, 2), (3, 4))),
        Conversation((5, 6, 7), ((2, 3),)),
        Conversation(CHAT_IDS, ((5, 9), (13, 15))),
    ]
    assert read_conversations(shards / "part-0.parquet", VOCAB_SIZE) == [found[2]]


def test_long_conversations_are_cut_and_counted(tmp_path, caplog):
    rows = [{"input_ids": list(range(3, 13)), "assistant_spans": [[2, 4], [6, 10]]}, {"input_ids": [4] * 9, "prompt_length": 8}]
    found = read_conversations(write_lines(tmp_path / "a.jsonl", rows), VOCAB_SIZE, max_length=7)
    assert found == [Conversation(tuple(range(3, 10)), ((2, 4), (6, 7)), is_cut=True)]
    assert "1 of 2 conversations have no answer and are left out; 1 are cut at 7 tokens" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, 97, 4], "prompt_length": 1}, r"a.jsonl, line 1: expected token ids in 0\.\.96 .* got 97; was the"),
        ({"input_ids": [3, "x", 4], "prompt_length": 1}, "expected integers in input_ids"),
        ({"input_ids": [3, 5, 4], "assistant_spans": [[1, 2], [1, 3]]}, "rising assistant_spans"),
        ({"input_ids": [3, 5, 4], "assistant_spans": [[1, 4]]}, r"in 1\.\.3 \(tokens\), got \[\[1, 4\]\]"),
        ({"input_ids": [3, 5, 4], "assistant_spans": []}, "rising assistant_spans"),
        ({"input_ids": [3, 5, 4], "assistant_spans": [[1.0, 2]]}, "expected integers in prompt_length"),
        ({"input_ids": [3, 5, 4]}, "expected a JSON object with input_ids and prompt_length or assistant_spans"),
    ],
)
def test_broken_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_conversations(write_lines(tmp_path / "a.jsonl", [row]), VOCAB_SIZE)


def test_sources_that_are_not_there_or_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file of conversations, got 'none.jsonl'"):
        read_conversations(tmp_path / "none.jsonl", VOCAB_SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected Parquet shards in 'empty', got none"):
        read_conversations(tmp_path / "empty", VOCAB_SIZE)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="expected a Parquet shard in cut.parquet"):
        read_conversations(tmp_path / "cut.parquet", VOCAB_SIZE)
    with pytest.raises(ValueError, match="expected at least one conversation with an answer in a.jsonl, got none"):
        read_conversations(write_lines(tmp_path / "a.jsonl", []), VOCAB_SIZE)


# --- what is left out, and what is shown -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([5] * 24, 1),
        ([1, 2, 3] + [7, 8] * 12, 2),
        (list(range(10)) * 3, 10),
        ([5] * 23, None),
        (list(range(10)) * 2, None),
        ([*list(range(10)) * 3, 99], None),
        ([], None),
    ],
)
def test_loops(tokens, period):
    assert loop_period(tokens) == period


def test_contamination():
    tokenizer = chat_tokenizer()
    long = " ".join(f"w{i}" for i in range(20, 35))
    contamination = Contamination(tokenizer, [long, "w40 w41"])
    assert contamination.holds([3, *range(21, 34), 3])
    assert not contamination.holds([3, *range(21, 33), 3])  # 12 in a row
    # A short prompt is only known again as a whole turn: its words are in many texts.
    assert contamination.holds([3, 40, 41, 5], user_turn=[40, 41])
    assert not contamination.holds([3, 40, 41, 5], user_turn=[40, 41, 5])


def test_preview_colours_what_is_learned_from():
    conversation = Conversation(CHAT_IDS, ((5, 9), (13, 15)))
    text = preview(conversation, chat_tokenizer())
    coloured = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert coloured == ["w20 w21 w22 <end>", "w23 <end>"]


def test_description():
    looping = Conversation((3, *[7] * 30), ((1, 31),))
    found = describe([looping, Conversation(CHAT_IDS, ((5, 9), (13, 15)))])
    assert found == {
        "num_conversations": 2,
        "num_tokens": 46,
        "num_answer_tokens": 36,
        "share_of_answers_in_a_loop": pytest.approx(1 / 3),
        "num_turns": {1: 1, 2: 1},
    }
