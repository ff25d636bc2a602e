"""Files of every format as rows: faults of single rows are counted with their places, and stop a run only if they are many."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, chat_tokenizer, save_chat_target, tiny_target, write_lines
from typer.testing import CliRunner

from transformers_prism.bench.prompts import read_prompts, task_of
from transformers_prism.cli.main import app
from transformers_prism.training.data.chats import COLUMNS, ROLES, RowError, chat_of
from transformers_prism.training.data.conversations import check_data, read_conversations
from transformers_prism.training.data.formats import (
    RowCounts,
    check_source,
    is_token_ids,
    read_chats,
    read_rows,
    usable_rows,
)

pytestmark = pytest.mark.quick

CHAT = [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w20 w21 w22"}]
ROW = {"messages": CHAT}
LINE = json.dumps(ROW)
IMAGE = {"type": "image_url", "image_url": {"url": "x.png"}}


def write_table(path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), path)


def write_arrow(path):
    import datasets

    datasets.Dataset.from_list([ROW, ROW]).save_to_disk(path)


FILES = {
    "lines.jsonl": lambda path: path.write_text(f"{LINE}\n\n{LINE}"),
    "no_suffix": lambda path: path.write_text(f"{LINE}\n{LINE}\n"),
    "windows.jsonl": lambda path: path.write_bytes(f"\ufeff{LINE}\r\n{LINE}\r\n".encode()),
    "wide.jsonl": lambda path: path.write_bytes(f"{LINE}\n{LINE}\n".encode("utf-16")),
    "array.json": lambda path: path.write_text(json.dumps([ROW, ROW])),
    "pretty.json": lambda path: path.write_text("\ufeff" + json.dumps([ROW, ROW], indent=2)),
    "array_in_lines.jsonl": lambda path: path.write_text(f"{json.dumps(CHAT)}\n{json.dumps(CHAT)}"),
    "wrapped.json": lambda path: path.write_text(json.dumps({"version": 1, "data": [ROW, ROW]}, indent=1)),
    "wrapped_in_a_line.json": lambda path: path.write_text(json.dumps({"data": [ROW, ROW]})),
    "lines.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(f"{LINE}\n{LINE}\n".encode())),
    "lines.jsonl.gz": lambda path: path.write_bytes(gzip.compress(f"{LINE}\n{LINE}\n".encode())),
    "array.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps([ROW, ROW]).encode())),
    "lines.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(f"{LINE}\n{LINE}\n".encode())),
    "table.parquet": write_table,
    "saved_to_disk": write_arrow,
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_format(tmp_path, name):
    path = tmp_path / name
    FILES[name](path)
    assert [chat_of(row) for _, row in read_rows(path)] == [CHAT, CHAT]


def test_one_object_is_one_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(ROW, indent=2))
    assert list(read_rows(path)) == [("one.json, row 1", ROW)]


def test_tables_of_text_have_no_types(tmp_path):
    """pandas would read "None" as nothing and "5" as a number."""
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,response\n"w10, w11",None\nw12,\nw13,5\n')
    assert [row for _, row in read_rows(path)] == [
        {"prompt": "w10, w11", "response": "None"},
        {"prompt": "w12"},
        {"prompt": "w13", "response": "5"},
    ]
    (tmp_path / "pairs.tsv").write_text("prompt\tresponse\nw1, w2\tw3\n")
    assert [row for _, row in read_rows(tmp_path / "pairs.tsv")] == [{"prompt": "w1, w2", "response": "w3"}]


def test_text_files_are_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("w10 w11\n\nw12\u2028w13\n")
    assert read_chats(path) == [[CHAT[0]], [{"role": "user", "content": "w12\u2028w13"}]]


def test_folders_are_read_by_kind_and_split(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name}))
    (tmp_path / "settings.json").write_text("{}")
    assert [row["prompt"] for _, row in read_rows(tmp_path)] == ["train-0.jsonl", "train-1.jsonl"]
    assert [row["prompt"] for _, row in read_rows(tmp_path, "test")] == ["test-0.jsonl"]
    assert len(list(read_rows(tmp_path, "validation"))) == 3
    write_table(tmp_path / "part.parquet")
    assert len(list(read_rows(tmp_path))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected files of .parquet, .* in 'empty', got none"):
        list(read_rows(tmp_path / "empty"))


def test_names_of_the_hub_are_told_from_files(monkeypatch, tmp_path):
    import datasets

    asked = []

    def load(name, split, streaming):
        asked.append((name, split, streaming))
        if name == "a/b":
            return iter([ROW])
        raise datasets.exceptions.DatasetNotFoundError("not there")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows("a/b", "test")) == [("a/b, row 1", ROW)]
    with pytest.raises(FileNotFoundError, match="got 'a/c', which is none of them here: not there"):
        list(read_rows("a/c"))
    assert asked == [("a/b", "test", True), ("a/c", "train", True)]
    check_source("user/name")
    for missing in ("a/b.jsonl", "/a/b", "./a", "a/b/c", "none.jsonl.gz", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="expected a file, a folder or a data set on the Hub, got .* not there"):
            check_source(missing)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(LINE.encode() * 9, mtime=0)[:-12], "expected .jsonl in cut.jsonl.gz, got: Compressed file ended"),
        ("plain.jsonl.gz", LINE.encode(), "expected .jsonl in plain.jsonl.gz, got: Not a gzipped file"),
        ("cut.parquet", b"PAR1 and then nothing", "expected .parquet in cut.parquet, got: "),
        ("cut.json", b'[\n{"prompt": "w1"},\n', "expected .json in cut.json, got: expected JSON, got"),
        ("empty.csv", b"", "expected .csv in empty.csv, got: No columns"),
    ],
)
def test_files_that_are_broken_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(tmp_path / name))


FAULTS = {
    "null": "expected a JSON object",
    "5": "expected a JSON object",
    '"w1"': "expected a JSON object",
    "not json": "expected JSON",
    '{"prompt": "cut': "expected JSON",
    "[" * 100000: "expected JSON",
    '{"prompt": "\\ud83d"}': "expected valid Unicode in prompt",
    '{"messages": []}': "expected at least one message in messages",
    '{"id": 7}': "expected one of the columns",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda text: text[:20])
@pytest.mark.parametrize("place", [0, 1])
def test_a_row_that_cannot_be_used_is_left_out(tmp_path, caplog, fault, place):
    lines = [LINE, LINE]
    lines.insert(place, fault)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_chats(tmp_path / "a.jsonl") == [CHAT, CHAT]
    assert "1 of 3 rows in a.jsonl are left out:\n       1  " + FAULTS[fault] in caplog.text
    assert f"a.jsonl, line {place + 1}: {FAULTS[fault]}" in caplog.text


def test_bytes_of_another_encoding_are_left_out(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(LINE.encode() + b'\n{"prompt": "caf\xe9"}\n')
    assert read_chats(tmp_path / "a.jsonl") == [CHAT]
    assert "a.jsonl, line 2: expected valid Unicode in prompt, got a lone surrogate or another encoding" in caplog.text


def test_many_faults_stop_the_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([LINE, "null", '{"prompt": 5}', "null", "null", "null", LINE]))
    with pytest.raises(ValueError, match=r"at most 50% of the rows in a.jsonl to be unusable \(max_bad_share\), got 5 of 7:") as caught:
        read_chats(path)
    told = str(caught.value).splitlines()[1:]
    assert [line.split()[0] for line in told] == ["4", "a.jsonl,", "a.jsonl,", "a.jsonl,", "1", "a.jsonl,"]
    assert "a.jsonl, line 3: expected text or a list of text parts in prompt, got 5" in told[-1]
    assert len(read_chats(path, max_bad_share=0.8)) == 2
    with pytest.raises(ValueError, match="at most 10% of the rows"):
        read_chats(path, max_bad_share=0.1)


def test_a_source_that_is_all_wrong_is_given_up_early(monkeypatch):
    rows = ((f"row {number}", None) for number in range(10**9))
    monkeypatch.setattr("transformers_prism.training.data.formats.read_rows", lambda source, split: rows)
    with pytest.raises(ValueError, match="got 1000 of 1000"):
        list(usable_rows("a", chat_of))


def test_counts_are_kept_for_the_caller(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(f"{LINE}\nnull\n")
    counts = RowCounts("a")
    assert list(usable_rows(tmp_path / "a.jsonl", chat_of, counts=counts)) == [CHAT]
    assert (counts.num_rows, counts.num_bad, dict(counts.left_out)) == (2, 1, {"expected a JSON object": 1})
    assert not caplog.text


def test_rows_of_token_ids_are_told_from_chats():
    assert is_token_ids({"input_ids": [1, 2], "prompt_length": 1, "text": "w1"})
    assert is_token_ids({"input_ids": [1, 2]})
    assert not is_token_ids({"messages": CHAT, "note": "input_ids"})
    assert not is_token_ids({"messages": CHAT, "input_ids": [1, 2]})
    assert not is_token_ids({"messages": CHAT, "input_ids": None})
    assert not is_token_ids(["input_ids"])


def test_prompts_of_benchmarks_are_read_alike(tmp_path):
    """A single text became one turn a letter, of which the first was measured."""
    rows = [
        {"category": "math", "turns": "w1 w2"},
        {"category": "math", "turns": [[{"type": "text", "text": "w10 "}, "w11"], "w3"]},
        {"category": "rag", "messages": [{"role": "system", "content": "w9"}, *CHAT, {"role": "user", "content": "w4"}]},
        {"instruction": "w7", "output": "w8"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_prompts(path)
    assert [record["turns"] for record in found] == [["w1 w2"], ["w10 w11", "w3"], ["w10 w11", "w4"], ["w7"]]
    assert [task_of(record) for record in found] == ["mt_bench", "mt_bench", "rag", "other"]
    for turns in ([IMAGE], [None], [5], []):
        path.write_text(json.dumps({"category": "math", "turns": turns}))
        with pytest.raises(ValueError, match=r"a.jsonl, line 1: expected "):
            read_prompts(path)


@pytest.mark.parametrize(
    "command",
    [
        ("train", "--use-cpu", "--output", "{out}", "--data"),
        ("train", "--use-cpu", "--output", "{out}", "--plan", "--data"),
        ("synthesize", "--num-tokens", "10", "--output", "{out}", "--prompts"),
        ("synthesize", "--num-tokens", "10", "--output", "{out}", "--exclude"),
        ("data", "preview", "--data"),
        ("data", "check"),
        ("bench", "generate", "--prompts"),
        ("verify", "--prompts"),
    ],
    ids=lambda words: " ".join(word for word in words if "{" not in word),
)
@pytest.mark.parametrize("content", [None, 5, {"a": "b"}, [IMAGE]], ids=["null", "number", "object", "image"])
def test_every_command_refuses_what_is_no_text(tmp_path, monkeypatch, command, content):
    """With the file and the line."""
    target, tokenizer = tiny_target("llama"), chat_tokenizer()
    for place in ("target", "training.train", "cli.demo"):
        monkeypatch.setattr(f"transformers_prism.{place}.load_target", lambda *names, **kwargs: (target, tokenizer))
    bad = json.dumps({"messages": [{"role": "user", "content": content}, CHAT[1]]})
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([LINE, bad, bad]))
    words = [word.format(out=tmp_path / "out") for word in command]
    result = CliRunner().invoke(app, [*words, str(path)])
    assert result.exit_code == 1, (result.output, result.exception)
    assert "chats.jsonl, line 2: expected text" in result.output
    assert "chats.jsonl, line 3: expected text" in result.output
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("one_thread")
def test_commands_take_a_sharegpt_array(tmp_path, monkeypatch):
    """As ShareGPT is published, with a few rows of the kind that it has: they ended in a page of traceback."""
    target, tokenizer = tiny_target("llama", max_position_embeddings=512), chat_tokenizer()
    for place in ("target", "training.train"):
        monkeypatch.setattr(f"transformers_prism.{place}.load_target", lambda *names, **kwargs: (target, tokenizer))
    rows = [
        {"id": str(row), "conversations": [{"from": "human", "value": f"w{10 + row}"}, {"from": "gpt", "value": f"w{30 + row} w50"}]}
        for row in range(12)
    ]
    rows += [{"id": "a", "conversations": []}, {"id": "b", "conversations": [{"from": "human", "value": "w9"}, {"from": "gpt", "value": 5}]}]
    path, out = tmp_path / "sharegpt.json", tmp_path / "out"
    path.write_text("\ufeff" + json.dumps(rows, indent=1))
    train = ["train", "--use-cpu", "--output", str(out / "run"), "--draft-vocab-size", "40", "--split-epochs", "0", "--warm-up-epochs", "0"]
    synthesize = ["synthesize", "--output", str(out / "data"), "--num-tokens", "40", "--max-user-tokens", "20", "--max-answer-tokens", "8"]
    for words in ([*train, "--data"], [*synthesize, "--no-packed", "--prompts"], ["data", "preview", "--data"], ["data", "check"]):
        result = CliRunner().invoke(app, [*words, str(path)])
        assert result.exit_code == 0, (words, result.output, result.exception)
    record = json.loads((out / "run" / "draft" / "training.json").read_text())
    assert record["data"]["training"]["num_conversations"] + record["data"]["validation"]["num_conversations"] == 12


def test_data_check_counts_rows_and_answers(tmp_path):
    """Without a target the shapes, with one its template, too."""
    folder = save_chat_target(tmp_path / "target")
    rows = [ROW, {"messages": [CHAT[0], {"role": "assistant", "content": "w5 <end> w6"}]}, {"prompt": "w1"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnull\n")
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "a.jsonl")])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "       4  rows in a.jsonl",
        "       3  rows that can be used",
        "       2  answers that are trained",
        "       1  chats without an answer: prompts for synthesize and bench",
        "       3  turns by the user",
        "       1  rows left out, by reason:",
        "       1  expected a JSON object",
        "          a.jsonl, line 4: expected a JSON object, got null",
    ]
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "a.jsonl"), "--target", str(folder)])
    assert result.exit_code == 0, result.output
    assert "       1  rows that can be used\n" in result.output
    assert "       9  tokens\n       4  tokens of answers\n       1  answers that are trained\n" in result.output
    assert "line 2: expected answers without special tokens of the target, got <end>" in result.output
    strict = CliRunner().invoke(app, ["data", "check", str(tmp_path / "a.jsonl"), "--max-bad-share", "0.1"])
    assert strict.exit_code == 1


def test_data_is_looked_at_without_weights_and_as_far_as_training_reads(tmp_path):
    folder = save_chat_target(tmp_path / "target")
    (folder / "model.safetensors").unlink()
    long = {"messages": [{"role": "user", "content": "w1 " * 40}, CHAT[1]]}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [ROW, long])))
    outputs = []
    for words in (["preview", "--data"], ["check"]):
        arguments = ["data", *words, str(tmp_path / "a.jsonl"), "--target", str(folder), "--max-length", "20"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (result.output, result.exception)
        outputs.append(result.output)
    assert json.loads(outputs[0].splitlines()[-1])["num_conversations"] == 1
    assert "       1  rows that can be used\n" in outputs[1]
    assert "line 2: expected an answer within 20 tokens, got none" in outputs[1]


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "data-formats.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|`]+) \| `([^`]+)` \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
LEFT_OUT = re.findall(r"^\| `([^`]+)` \| (expected [^|]+) \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("shape", "example", "outcome"), ROWS, ids=[f"{number} {row[0]}" for number, row in enumerate(ROWS)])
def test_examples_of_the_page_have_the_outcome_that_it_tells(tmp_path, shape, example, outcome):
    tokenizer = chat_tokenizer()
    # A template that writes tool calls.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "turn['content'] +", "turn['content'] + (turn.tool_calls[0].function.name if turn.tool_calls else '') +"
    )
    path = tmp_path / "a.jsonl"
    path.write_text(example)
    if "prompt" in outcome:
        assert [turn["role"] for turn in read_chats(path)[0]] in (["user"], ["user", "user"])
        with pytest.raises(ValueError, match="expected at least one conversation with an answer"):
            read_conversations(path, VOCAB_SIZE, tokenizer=tokenizer)
        return
    (conversation,) = read_conversations(path, VOCAB_SIZE, tokenizer=tokenizer)
    found = [tokenizer.decode(conversation.input_ids[start:end]) for start, end in conversation.assistant_spans]
    expected = [f"{text} <end>" for text in re.findall(r"`([^`]+)`", outcome)]
    if "the call" in outcome:
        expected.insert(0, "w30 <end>")
    assert found == expected


@pytest.mark.parametrize(("row", "reason"), LEFT_OUT)
def test_rows_that_the_page_says_are_left_out(tmp_path, row, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(row)
    counts, _ = check_data(path, (VOCAB_SIZE, chat_tokenizer()))
    ((found, count),) = counts.left_out.items()
    assert found.startswith(reason)
    assert count == counts.num_rows == 1


def test_the_page_tells_of_every_column_and_role():
    assert len(ROWS) == 26
    assert len(LEFT_OUT) == 14
    for name in (*COLUMNS, *ROLES):
        assert name in PAGE, name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_rows_of_a_table_that_are_longer_than_its_first_line(tmp_path, encoding):
    """Cells stay under their names: one more that is empty means nothing, one more that is not means that nobody knows."""
    path = tmp_path / "table.csv"
    path.write_text('prompt,response\nhi,hello,\n"What is 2+2?","It is 4, of\ncourse"\nWhat,It is 4, of course\nalone\n', encoding=encoding)
    rows = [row for _, row in read_rows(path)]
    assert rows[:2] == [{"prompt": "hi", "response": "hello"}, {"prompt": "What is 2+2?", "response": "It is 4, of\ncourse"}]
    assert isinstance(rows[2], RowError)
    assert "expected at most 2 cells" in str(rows[2])
    assert rows[3] == {"prompt": "alone"}


def test_bad_rows_at_the_beginning_are_a_share_of_all(tmp_path):
    """A source is given up early only if nothing of it was usable."""
    write_lines(tmp_path / "late.jsonl", [{"id": number} for number in range(1000)] + [{"prompt": "w9", "response": "w10"}] * 1500)
    counts = RowCounts("late.jsonl")
    assert len(list(usable_rows(tmp_path / "late.jsonl", chat_of, counts=counts))) == 1500
    assert (counts.num_bad, counts.num_rows) == (1000, 2500)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_source(name):
    """It would be the working folder."""
    with pytest.raises(FileNotFoundError, match="got an empty name"):
        list(read_rows(name))
