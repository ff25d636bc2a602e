"""Conversations: what a file may hold, which tokens are the target's own, what is left out, and what is said if not."""

import gzip
import json

import pytest
from tiny_models import VOCAB_SIZE, chat_tokenizer, write_lines

from transformers_prism.training.data.conversations import (
    Contamination,
    Conversation,
    describe,
    loop_period,
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
    assert "1 of 2 rows in a.jsonl are left out" in caplog.text
    assert "a.jsonl, line 2: expected an answer within 7 tokens, got none" in caplog.text
    assert "1 of 1 conversations are cut at 7 tokens" in caplog.text


def test_chats_without_answers_are_left_out_and_no_fault(tmp_path, caplog):
    """However many there are: they are fine, there is only nothing to train on."""
    rows = [{"messages": CHAT}, *({"messages": CHAT[:1]} for _ in range(3)), {"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}]
    found = read_conversations(write_lines(tmp_path / "a.jsonl", rows), VOCAB_SIZE, tokenizer=chat_tokenizer(), max_bad_share=0.0)
    assert len(found) == 1
    assert "a.jsonl, line 2: expected a chat with at least one assistant turn, got 1 turns without" in caplog.text
    assert "a.jsonl, line 5: expected an answer to train on, got only answers that are empty" in caplog.text


@pytest.mark.parametrize(
    ("name", "other"), [("labels", -100), ("assistant_masks", 0), ("loss_mask", 0)], ids=lambda value: str(value)
)
def test_masks_give_the_answers(tmp_path, name, other):
    """Every run that counts is an answer; the first token is none, since nothing comes before it."""
    ids = [3, 5, 4, 7, 8, 9]
    masks = [[True, True, False, False, True, True], [False] * 6]
    own = ids if name == "labels" else [1] * len(ids)
    columns = [[one if is_answer else other for one, is_answer in zip(own, mask, strict=True)] for mask in masks]
    rows = [{"input_ids": ids, name: column} for column in columns]
    found = read_conversations(write_lines(tmp_path / "a.jsonl", rows), VOCAB_SIZE)
    assert found == [Conversation(tuple(ids), ((1, 2), (4, 6)))]


def test_padding_is_dropped_and_masks_count_together(tmp_path):
    """Tokens that `attention_mask` hides are no context; an answer is what every mask counts."""
    row = {"input_ids": [0, 0, 3, 5, 4, 7], "attention_mask": [0, 0, 1, 1, 1, 1], "labels": [-100, -100, -100, 5, 4, 7]}
    rows = [row, {**row, "assistant_masks": [0, 0, 0, 0, 1, 1]}]
    found = read_conversations(write_lines(tmp_path / "a.jsonl", rows), VOCAB_SIZE)
    assert found == [Conversation((3, 5, 4, 7), ((1, 4),)), Conversation((3, 5, 4, 7), ((2, 4),))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, 97, 4], "prompt_length": 1}, r"a.jsonl, line 1: expected token ids in 0\.\.96 .* got 97; was the"),
        ({"input_ids": [3, "x", 4], "prompt_length": 1}, "expected integers in input_ids"),
        ({"input_ids": [3, 5, 4], "assistant_spans": [[1, 2], [1, 3]]}, "rising assistant_spans"),
        ({"input_ids": [3, 5, 4], "assistant_spans": [[1, 4]]}, r"number of tokens, got \[\[1, 4\]\] for 3 tokens"),
        ({"input_ids": [3, 5, 4], "assistant_spans": 5}, "expected integers in prompt_length or assistant_spans, got 5"),
        ({"input_ids": [3, 5, 4], "assistant_spans": []}, "rising assistant_spans"),
        ({"input_ids": [3, 5, 4], "assistant_spans": [[1.0, 2]]}, "expected integers in prompt_length"),
        ({"input_ids": [3, 5, 4]}, r"expected integers in prompt_length or assistant_spans, got \[\[None, 3\]\]"),
        ({"input_ids": [3, 5, 4], "labels": [-100, 4, -100]}, "expected labels that repeat input_ids at their place or are -100"),
        ({"input_ids": [3, 5, 4], "attention_mask": [0, 1, 1], "prompt_length": 1}, "expected no padding beside prompt_length"),
        ({"input_ids": [3, 5, 4], "labels": [-100, 5]}, "expected 3 integers in labels, one for each token"),
        ({"input_ids": [3, 5, 4], "loss_mask": [0, 0.5, 1]}, "expected 3 integers in loss_mask"),
        ({"messages": CHAT}, "expected token ids, since there is no tokenizer, got a chat"),
    ],
)
def test_broken_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_conversations(write_lines(tmp_path / "a.jsonl", [row]), VOCAB_SIZE)


def test_one_row_of_another_vocabulary_stops_the_run(tmp_path):
    """The others were made with that tokenizer, too."""
    rows = [*({"input_ids": [3, 4, 5], "prompt_length": 1} for _ in range(9)), {"input_ids": [3, 97, 4], "prompt_length": 1}]
    with pytest.raises(ValueError, match="a.jsonl, line 10: expected token ids in 0..96"):
        read_conversations(write_lines(tmp_path / "a.jsonl", rows), VOCAB_SIZE)


def test_a_source_without_conversations_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected at least one conversation with an answer in a.jsonl, got none"):
        read_conversations(write_lines(tmp_path / "a.jsonl", []), VOCAB_SIZE)


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
