"""Benchmark prompts in Spec-Bench's form, one JSON object a line: question_id, category, turns."""

import json
from pathlib import Path

# Spec-Bench's first task is MT-bench, whose records carry one of eight categories; the other tasks carry their own name.
MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def task_of(record: dict) -> str:
    """The task that a record belongs to: "mt_bench" or its own category."""
    return "mt_bench" if record["category"] in MT_BENCH_CATEGORIES else record["category"]


def read_prompts(path: str | Path) -> list[dict]:
    """All records of a file.

    Raises:
        ValueError: if a line is not a record, naming the line.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            complete = bool(record["category"]) and isinstance(record["turns"][0], str)
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            complete = False
        if not complete:
            raise ValueError(f"{path}, line {number}: expected question_id, category and turns, got {line[:80]!r}")
        records.append(record)
    if not records:
        raise ValueError(f"{path}: expected at least one record, got none")
    return records


def choose_prompts(records: list[dict], num_prompts: int) -> list[dict]:
    """Spread `num_prompts` records over the tasks, in the tasks' order, and evenly over the records of each.

    Raises:
        ValueError: if there are fewer records.
    """
    if not 1 <= num_prompts <= len(records):
        raise ValueError(f"num_prompts: expected 1 to {len(records)}, got {num_prompts}")
    by_task: dict[str, list[dict]] = {}
    for record in records:
        by_task.setdefault(task_of(record), []).append(record)
    counts = dict.fromkeys(by_task, 0)
    while sum(counts.values()) < num_prompts:
        for task, members in by_task.items():
            if sum(counts.values()) < num_prompts and counts[task] < len(members):
                counts[task] += 1
    chosen = []
    for task, members in by_task.items():
        chosen += [members[index * len(members) // counts[task]] for index in range(counts[task])]
    return chosen
