"""Benchmark prompts: Spec-Bench's question_id, category and turns, or any other shape of chats and prompts."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from torch.nn.utils.rnn import pad_sequence

from transformers_prism.decoding.target_side import num_learned_positions
from transformers_prism.training.data.chats import prompt_of
from transformers_prism.training.data.formats import usable_rows

# Spec-Bench's first task is MT-bench, whose records carry one of eight categories; the other tasks carry their own name.
MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

# Logits divided by less may be infinite.
_LEAST_TEMPERATURE = 1e-6


def task_of(record: dict) -> str:
    """The task that a record belongs to: "mt_bench" or its own category."""
    return "mt_bench" if record["category"] in MT_BENCH_CATEGORIES else record["category"]


def read_prompts(path: str | Path) -> list[dict]:
    """All records of a file in any of the shapes of `docs/data-formats.md`; `turns` are the texts of the user turns, and
    `category` is "other" where a record names none.

    Raises:
        FileNotFoundError, ValueError: as [`usable_rows`]; ValueError if there is no record.
    """

    def record_of(row) -> dict:
        turns = [turn["content"] for turn in prompt_of(row) if turn["role"] == "user"]
        record = row if isinstance(row, dict) else {}
        category = record.get("category")
        return {**record, "category": category if category and isinstance(category, str) else "other", "turns": turns}

    records = list(usable_rows(path, record_of))
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


class ContextFiller:
    """Brings prompts to `num_tokens` tokens, the chat template included: short ones get text of other records in front, long
    ones lose their middle. `records` must not be measured themselves, since n-grams would copy from their text.

    Raises:
        ValueError: if the records have less text.
    """

    def __init__(self, tokenizer, records: list[dict], num_tokens: int):
        self.tokenizer, self.num_tokens = tokenizer, num_tokens
        text = "\n\n".join(turn for record in records for turn in record["turns"])
        self.token_ids = self._encode(text)
        if len(self.token_ids) < num_tokens:
            raise ValueError(
                f"context: expected {num_tokens} tokens of text in the prompts that are not measured, "
                f"got {len(self.token_ids)}"
            )

    def fit(self, prompt: str, index: int, make_inputs: Callable[[str], dict]) -> dict:
        """Inputs of generate() for a prompt, `num_tokens` long or a few tokens less; each `index` takes another
        part of the text.

        Raises:
            ValueError: if the chat template leaves no room.
        """
        inputs = make_inputs(prompt)
        num_more = self.num_tokens - inputs["input_ids"].shape[1]
        # Text that was cut between tokens may give a few more tokens when it is tokenized again.
        while inputs["input_ids"].shape[1] != self.num_tokens:
            inputs = make_inputs(self._changed(prompt, index, num_more))
            excess = inputs["input_ids"].shape[1] - self.num_tokens
            if excess <= 0:
                break
            num_more -= excess
        return inputs

    def _changed(self, prompt: str, index: int, num_more: int) -> str:
        if num_more >= 0:
            start = index * self.num_tokens % (len(self.token_ids) - num_more + 1)
            return f"{self.tokenizer.decode(self.token_ids[start : start + num_more])}\n\n{prompt}"
        token_ids = self._encode(prompt)
        num_kept = len(token_ids) + num_more
        if num_kept < 2:
            raise ValueError(f"context: expected room for a prompt, got {self.num_tokens} tokens")
        head, tail = token_ids[: num_kept // 2], token_ids[len(token_ids) - (num_kept - num_kept // 2) :]
        return f"{self.tokenizer.decode(head)}\n{self.tokenizer.decode(tail)}"

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def contexts_of(
    tokenizer, records: list[dict], chosen: list[dict], num_tokens: int | None, make_inputs: Callable[[str], dict]
) -> list[dict]:
    """Inputs of generate() for the chosen records, brought to one length by text of the others; None leaves every
    prompt as it is."""
    prompts = [record["turns"][0] for record in chosen]
    if num_tokens is None:
        return [make_inputs(prompt) for prompt in prompts]
    filler = ContextFiller(tokenizer, [record for record in records if record not in chosen], num_tokens)
    return [filler.fit(prompt, index, make_inputs) for index, prompt in enumerate(prompts)]


def sampling_settings(
    max_new_tokens: int, temperature: float, top_p: float | None = None, repetition_penalty: float | None = None
) -> dict:
    """Arguments of generate(): greedy at temperature 0, else sampling.

    Raises:
        ValueError: for `top_p` with greedy decoding, which would ignore it, or for a number that cannot be served.
    """
    if not (temperature == 0 or _LEAST_TEMPERATURE <= temperature < math.inf):
        raise ValueError(f"temperature: expected 0 or a finite number of at least {_LEAST_TEMPERATURE}, got {temperature}")
    if repetition_penalty is not None and not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty: expected a finite number above 0, got {repetition_penalty}")
    if top_p is not None and temperature == 0:
        raise ValueError(f"top_p: expected a temperature above 0 with it, got {top_p} with greedy decoding")
    settings: dict = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        if top_p is not None:
            settings["top_p"] = top_p
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    return settings


def check_positions(target, prompts: Iterable[dict], max_new_tokens: int) -> None:
    """See that a target has positions for prompts (inputs of generate()) and their answers.

    Raises:
        ValueError: if it has learned positions, and too few.
    """
    most = num_learned_positions(target)
    longest = max((inputs["input_ids"].shape[1] for inputs in prompts), default=0)
    if most is not None and longest + max_new_tokens > most:
        raise ValueError(
            f"max_new_tokens: expected at most {most - longest} with a prompt of {longest} tokens, since the target has {most} "
            f"learned positions, got {max_new_tokens}"
        )


def batch_rows(rows: list[dict], pad_token_id: int) -> dict:
    """Inputs of generate() for several prompts, `(B, T)`, from those of single ones; the shorter ones are padded on
    the left and masked, so that any id will do."""
    input_ids, masks = ([row[name][0] for row in rows] for name in ("input_ids", "attention_mask"))
    return {
        "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=pad_token_id, padding_side="left"),
        "attention_mask": pad_sequence(masks, batch_first=True, padding_value=0, padding_side="left"),
    }
