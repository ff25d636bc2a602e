"""What a draft accepts: tau of fixed trees on benchmark prompts, greedy and sampled. Nothing is timed.

    transformers-prism bench acceptance --prompts spec_bench.jsonl --json acceptance.json
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from transformers_prism.bench.methods import can_be_packed
from transformers_prism.bench.prompts import sampling_settings
from transformers_prism.bench.record import finished_part, record_head
from transformers_prism.cpu import PreparedModels, prepare_for_cpu
from transformers_prism.decoding.speculation import acceptance_length
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.training.data.conversations import loop_period
from transformers_prism.whole_files import write_json

# Nodes/depth/top-k; the first is the tree of the EAGLE and PRISM papers.
TREES = ("59/6/10", "15/4/4", "5/5/1")
TEMPERATURES = (0.0, 0.8)


def tree_settings(tree: str) -> dict:
    """Generation settings of a tree written as nodes/depth/top-k.

    Raises:
        ValueError: if it is written in another way.
    """
    parts = tree.split("/")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"trees: expected nodes/depth/top-k such as 59/6/10, got {tree!r}")
    num_nodes, depth, top_k = map(int, parts)
    most = depth if top_k == 1 else TreeSettings("static", top_k, depth, num_nodes).pool_size(depth)
    if num_nodes > most:
        raise ValueError(f"trees: expected at most {most} nodes with depth {depth} and top-k {top_k}, got {tree!r}")
    kind = "chain" if top_k == 1 else "static"
    return {"tree": kind, "tree_num_nodes": num_nodes, "tree_depth": depth, "tree_top_k": top_k}


def packed_for_cpu(target, draft, packed: bool) -> PreparedModels:
    """A context in which the models' weights are packed, if that is asked for and they are on a CPU."""
    return prepare_for_cpu(*(target, draft) if packed and can_be_packed(target.device, target.dtype) else ())


@torch.no_grad()
def decode_prompts(
    target, draft, questions: Iterable[tuple[str, dict]], tree: str, temperature: float, max_new_tokens: int,
    seed: int, is_coupled: bool = True, advance: Callable[[], None] = lambda: None
) -> list[dict]:
    """Decode prompts with a draft, one by one, greedily at temperature 0. The draft's tree settings are changed.

    Args:
        questions: task and generate()'s inputs of each prompt.
        tree (`str`): nodes/depth/top-k.
        is_coupled (`bool`): whether the draft uses the random numbers of sampling.
        advance: called after each answer.
    Returns:
        `list[dict]`: of each answer its `task`, `num_rounds`, `num_committed`, the rounds in which 0, 1, 2, ... drafted tokens
            were accepted (`num_rounds_by_accepted`), and whether it `ends_in_a_loop`.
    """
    draft.generation_config.update(**tree_settings(tree), tree_coupled=is_coupled)
    settings, answers = sampling_settings(max_new_tokens, temperature), []
    for task, inputs in questions:
        torch.manual_seed(seed)
        output = target.generate(**inputs, **settings, assistant_model=draft)
        speculation = draft.last_speculation
        answer = output[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(answer_figures(task, answer, list(itertools.chain(*speculation.accepted_per_round))))
        advance()
    return answers


def answer_figures(task: str, answer: list[int], accepted: list[int]) -> dict:
    """The record of an answer, from the number of drafted tokens that each of its rounds accepted."""
    counts = Counter(accepted)
    return {
        "task": task,
        "num_rounds": len(accepted),
        "num_committed": sum(accepted) + len(accepted),
        "num_rounds_by_accepted": [counts[count] for count in range(max(counts, default=-1) + 1)],
        "ends_in_a_loop": loop_period(answer) is not None,
    }


def acceptance_figures(answers: list[dict]) -> dict:
    """What [`decode_prompts`] found, summed up: `num_rounds`, `num_committed`, their quotient `tau` (None without
    rounds), and `share_of_answers_in_a_loop`, which raises tau."""
    num_rounds, num_committed = (sum(one[name] for one in answers) for name in ("num_rounds", "num_committed"))
    tau = acceptance_length(num_committed, num_rounds)
    return {
        "num_rounds": num_rounds,
        "num_committed": num_committed,
        "tau": tau and round(tau, 4),
        "share_of_answers_in_a_loop": round(sum(one["ends_in_a_loop"] for one in answers) / len(answers), 4),
    }


def bench_acceptance(
    target, draft, questions: list[tuple[str, dict]], settings: dict, weights: str, path: Path | None = None,
    resume: bool = False, advance: Callable[[], None] = lambda: None
) -> list[dict]:
    """Measure a draft with every tree at every temperature; the file is written after each of them.

    Args:
        questions: task and generate()'s inputs of each prompt.
        settings (`dict`): `trees`, `temperatures`, `max_new_tokens`, `seed`, `coupled`, `packed`, and what else the
            file is to record; `text_tokens` is the draft's own setting.
        weights (`str`): [`weights_sha256`] of the draft.
        resume (`bool`): keep what the file holds already.
        advance: called after each answer.
    Returns:
        `list[dict]`: per tree and temperature [`acceptance_figures`], those of each task in `tasks`, and the
            `answers`.
    Raises:
        ValueError: for a tree that cannot be read, or a file of another measurement.
    """
    ways = list(itertools.product(settings["trees"], settings["temperatures"]))
    for tree, _ in ways:
        tree_settings(tree)
    head = record_head("acceptance", target, settings, weights)
    found = finished_part(path, head) if path is not None and resume else None
    rows = found["rows"] if found else []
    with packed_for_cpu(target, draft, settings["packed"]):
        for tree, temperature in ways[len(rows) :]:
            how = {"max_new_tokens": settings["max_new_tokens"], "seed": settings["seed"], "is_coupled": settings["coupled"]}
            answers = decode_prompts(target, draft, questions, tree, temperature, advance=advance, **how)
            by_task = defaultdict(list)
            for answer in answers:
                by_task[answer["task"]].append(answer)
            tasks = {task: acceptance_figures(members) for task, members in by_task.items()}
            rows.append(
                {
                    "tree": tree,
                    "temperature": temperature,
                    "num_prompts": len(answers),
                    **acceptance_figures(answers),
                    "tasks": tasks,
                    "answers": answers,
                }
            )
            if path is not None:
                write_json(path, {**head, "rows": rows})
    return rows


def acceptance_rows(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines of a table: a column per tree and temperature, tau of all prompts and of each task below it."""

    def taus(figures: list[dict]) -> list[str]:
        return ["" if one["tau"] is None else f"{one['tau']:.2f}" for one in figures]

    heading = ["tau", *(f"{row['tree']}\nT = {row['temperature']:g}" for row in rows)]
    lines = [[task, *taus([row["tasks"][task] for row in rows])] for task in rows[0]["tasks"]]
    loops = [f"{row['share_of_answers_in_a_loop']:.2f}" for row in rows]
    return heading, [*lines, ["all", *taus(rows)], ["share of answers in a loop", *loops]]
