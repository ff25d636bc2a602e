"""Side by side with rivals: what is measured, resumed, compared and written, with decoders that take no time."""

import itertools
import json
import os
import sys
from pathlib import Path

import pytest
from tiny_models import word_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.page import write_page
from benchmarks.rivals import run, worker
from transformers_prism.transformers_names import name_of

pytestmark = pytest.mark.quick
PROMPTS = [{"id": str(index), "task": "qa", "ids": [5, 6, 7 + index]} for index in range(3)]


def task_of(**changes) -> dict:
    """What a worker is told."""
    settings = {"max_new_tokens": 6, "seconds": 100.0, "num_threads": 1, "target": "nowhere", "hardware": "a CPU, 2 cores"}
    return {"name": "abc", "prompts": PROMPTS, **settings, **changes}


def decoder(answers, calls):
    """Opens a rival that gives the same answer to everything."""

    def opened(task):
        def decode(ids, num_tokens):
            calls.append((tuple(ids), num_tokens))
            return answers[:num_tokens] if isinstance(answers, list) else answers

        return decode

    return opened


def test_a_worker_measures_resumes_and_stops_in_time(tmp_path, monkeypatch):
    """Each prompt twice, after a warm-up; what the file holds is not decoded again."""
    calls: list = []
    monkeypatch.setitem(worker.DECODERS, "transformers", decoder([8, 9, 10, 11, 12, 13], calls))
    clock = itertools.count()
    path = tmp_path / "transformers.json"
    record = worker.work("transformers", task_of(seconds=4.5), path, lambda: float(next(clock)))
    # Four looks at the clock a prompt, one before each: the second prompt begins at five seconds.
    assert [one["id"] for one in record["prompts"]] == ["0"]
    assert calls == [((5, 6, 7), 1), ((5, 6, 7), 6), ((5, 6, 7), 1), ((5, 6, 7), 6)]
    assert record["prompts"][0] | {"id": "0", "seconds": 1.0, "first_seconds": 1.0, "num_new": 6} == record["prompts"][0]
    calls.clear()
    record = worker.work("transformers", task_of(), path, lambda: float(next(clock)))
    assert [one["id"] for one in record["prompts"]] == ["0", "1", "2"]
    assert ((5, 6, 7), 6) in calls[:2]
    assert calls[2:] == [((5, 6, 8), 1), ((5, 6, 8), 6), ((5, 6, 9), 1), ((5, 6, 9), 6)]
    assert json.loads(path.read_text())["memory_bytes"] > 2**20
    calls.clear()
    worker.work("transformers", task_of(), path)
    assert calls == []


def record_of(rival, seconds, tokens, text=None, ids=("0", "1")) -> dict:
    """A rival's file: six tokens, the first after a second."""
    one = {"task": "qa", "seconds": seconds, "first_seconds": 1.0, "num_new": 6, "tokens": tokens, "text": text}
    return {"rival": rival, "task": "abc", "versions": {"x": "1"}, "memory_bytes": 2**30, "prompts": [{"id": id, **one} for id in ids]}


def test_the_table_compares_prompts_that_both_answered():
    """Whole calls, decoding alone, the same answers as tokens or as text."""
    tokens = [8, 9, 10, 11, 12, 13]
    text = word_tokenizer().decode(tokens)
    records = [
        record_of("llama.cpp", 3.0, None, text, ids=("1", "2")),
        record_of("transformers", 6.0, tokens),
        record_of("prism", 2.0, [8, 9, 10, 11, 12, 14]),
    ]
    heading, rows = run.rows_of(records, word_tokenizer().decode)
    assert [row[0] for row in rows] == ["transformers", "prism", "llama.cpp"]
    by_name = {row[0]: dict(zip(heading[1:], row[1:], strict=True)) for row in rows}
    assert by_name["transformers"]["tokens/s"] == "1.0"
    assert by_name["transformers"]["decoding alone, tokens/s"] == "1.0"
    assert by_name["prism"]["over transformers"] == "3.00"
    assert by_name["prism"]["same answers"] == "0/2"
    assert by_name["llama.cpp"]["same answers"] == "1/1"
    assert by_name["llama.cpp"]["decoding alone, tokens/s"] == "2.5"


def test_every_rival_has_an_environment():
    """With what pip shall install there."""
    assert {run.environment_of(rival) for rival in worker.DECODERS} == set(run.REQUIREMENTS)


def test_a_worker_runs_in_its_environment_by_its_path(tmp_path):
    """The file needs nothing but Python; what goes wrong is told in a line, and results of other prompts are not joined."""
    folder = tmp_path / "environments" / "llama_cpp" / "bin"
    folder.mkdir(parents=True)
    assert "--install" in run.run_rival("llama.cpp", task_of(gguf="none"), tmp_path, tmp_path / "environments")
    (folder / "python").symlink_to(sys.executable)
    # Without site-packages, there is no xllamacpp.
    (folder / "python").unlink()
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    os.chmod(folder / "python", 0o755)
    problem = run.run_rival("llama.cpp", task_of(gguf="none"), tmp_path, tmp_path / "environments")
    assert "No module named 'xllamacpp'" in problem
    (tmp_path / "llama.cpp.json").write_text(json.dumps({"task": "other"}))
    with pytest.raises(ValueError, match="expected results of these prompts and lengths to resume, got others; remove it"):
        run.run_rival("llama.cpp", task_of(gguf="none"), tmp_path, tmp_path / "environments")


def test_a_task_has_the_prompts_of_all_tasks_in_turn(tmp_path, tiny_folders):
    """Ids with the chat template, ends, and a name that other prompts or lengths do not have."""
    prompts = tmp_path / "prompts.jsonl"
    records = [{"question_id": index, "category": "qa" if index < 2 else "rag", "turns": [f"w{30 + index} w31"]} for index in range(4)]
    prompts.write_text("\n".join(map(json.dumps, records)))
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "target").symlink_to(tiny_folders[0])
    task, target = run.make_task(prompts, 4, folder, tmp_path / "model.gguf", max_new_tokens=6, seconds=1.0)
    assert name_of(target.config) == "model.gguf"
    assert [one["id"] for one in task["prompts"]] == ["0", "2", "1", "3"]
    assert all(isinstance(token, int) for one in task["prompts"] for token in one["ids"])
    other, _ = run.make_task(prompts, 4, folder, tmp_path / "model.gguf", max_new_tokens=7, seconds=1.0)
    assert other["name"] != task["name"]


def test_the_page_shows_the_record(tmp_path, tiny_folders, monkeypatch, capsys):
    """`--json` holds the table; the page shows it after the advice."""
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "results"
    prompts.write_text(json.dumps({"question_id": 1, "category": "qa", "turns": ["w30 w31"]}))
    folder.mkdir()
    (folder / "target").symlink_to(tiny_folders[0])

    def run_rival(rival, task, folder, environments):
        record = record_of(rival, 3.0 if rival == "prism" else 6.0, [8, 9, 10, 11, 12, 13])
        (folder / f"{rival}.json").write_text(json.dumps({**record, "task": task["name"]}))

    monkeypatch.setattr(run, "run_rival", run_rival)
    settings = {"environments": None, "rival": ["transformers", "prism"], "num_prompts": 1, "max_new_tokens": 6, "seconds": 1.0}
    settings |= {"threads": 1, "gguf": tmp_path / "model.gguf", "draft": Path(tiny_folders[1]), "openvino": None}
    settings |= {"vllm_settings": "{}", "vllm_speculative": "{}", "json_file": tmp_path / "rivals.json", "is_installing": False}
    run.main(prompts, folder, **settings)
    assert "| prism | 2.0 | 2.00 |" in capsys.readouterr().out
    write_page([tmp_path / "rivals.json"], tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    assert text.index("make-draft") < text.index("1 prompts of `prompts.jsonl`") < text.index("| prism | 2.0 | 2.00 |")
