"""vLLM with a PRISM draft against vLLM without: text, acceptance length and tokens per second, on prompts of Spec-Bench.

    python integrations/vllm/benchmark.py --prompts spec_bench.jsonl --target TARGET --draft DRAFT --output vllm.json

It runs in vLLM's environment (`make test-vllm` makes one), best on an idle machine. The engines live in processes of their
own and answer each batch of prompts in turn, so that all of them see the same machine; each takes about 1.5 GB for a target
of 135M parameters. A run that was stopped goes on where it was when it is started again with the same settings.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

PLAIN = 0
# OpenMP threads of an engine that has just answered spin this long before they sleep.
_SECONDS_OF_SPINNING = 0.25
_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def choose_prompts(path: Path, num_prompts: int) -> list[str]:
    """First turns of Spec-Bench, spread over its tasks as `transformers-prism bench generate` spreads them."""
    by_task: dict[str, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        task = "mt_bench" if record["category"] in _MT_BENCH else record["category"]
        by_task.setdefault(task, []).append(record)
    counts = dict.fromkeys(by_task, 0)
    for task in itertools.islice(itertools.cycle(by_task), num_prompts):
        counts[task] += 1
    chosen = [by_task[task][index * len(by_task[task]) // count] for task, count in counts.items() for index in range(count)]
    return [record["turns"][0] for record in chosen]


class Engine:
    """An engine in a process of its own.

    Args:
        num_steps (`int`): draft tokens of a round; `PLAIN` for no draft.
        arguments (`argparse.Namespace`): of the command.
    """

    def __init__(self, num_steps: int, arguments: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, num_steps, vars(arguments)), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process ends a wait for it
        self.answer()  # it is up, and warm

    def ask(self, prompts: list[str]) -> dict[str, Any]:
        """Answer a batch; tokens of each prompt, seconds, rounds and accepted draft tokens."""
        self.pipe.send(prompts)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """What the process says next."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("expected an engine that starts, got an error; it is told above") from None


def _serve(pipe, num_steps: int, arguments: dict[str, Any]) -> None:
    """The other process: make an engine, warm it up, answer batches."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {}
    if num_steps != PLAIN:
        settings["speculative_config"] = {
            "method": "eagle3",
            "model": arguments["draft"],
            "num_speculative_tokens": num_steps,
            "use_local_argmax_reduction": True,
        }
    llm = LLM(
        arguments["target"],
        dtype=arguments["dtype"],
        max_model_len=arguments["max_model_len"],
        max_num_seqs=max(arguments["batch_sizes"]),
        enforce_eager=arguments["enforce_eager"],
        # Prompts are read anew in every batch.
        enable_prefix_caching=False,
        disable_log_stats=False,
        **settings,
    )
    sampling = SamplingParams(temperature=0, max_tokens=arguments["max_new_tokens"])

    spent = _time_drafting()

    def run(prompts: list[str]) -> dict[str, Any]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        before, start, drafting = _counts(llm), time.perf_counter(), spent[0]
        outputs = llm.chat(chats, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        rounds, accepted = (now - then for now, then in zip(_counts(llm), before, strict=True))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return {
            "tokens": tokens,
            "seconds": seconds,
            "draft_seconds": spent[0] - drafting,
            "rounds": rounds,
            "accepted": accepted,
        }

    run(["Why is the sky blue?"] * max(arguments["batch_sizes"]))
    pipe.send({})
    with contextlib.suppress(EOFError):  # the command has ended
        while True:
            pipe.send(run(pipe.recv()))


def _time_drafting() -> list[float]:
    """Seconds that vLLM's proposer has taken in this process, as the only entry, which grows."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    spent, propose = [0.0], SpecDecodeBaseProposer.propose

    def timed(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return propose(self, *args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    SpecDecodeBaseProposer.propose = timed  # type: ignore[method-assign]
    return spent


def _counts(llm) -> tuple[int, int]:
    """Rounds, and draft tokens that were accepted, since the engine started."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")
    return found.get(names[0], 0), found.get(names[1], 0)


def summary(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each batch size and number of draft tokens.

    Args:
        measured: `batch_size`, `first_prompt`, `num_steps` and what [`Engine.ask`] gives, of each batch.
    """
    plain = {(unit["batch_size"], unit["first_prompt"]): unit for unit in measured if unit["num_steps"] == PLAIN}
    entries = []
    for batch_size, num_steps in sorted({(unit["batch_size"], unit["num_steps"]) for unit in measured}):
        units = [unit for unit in measured if (unit["batch_size"], unit["num_steps"]) == (batch_size, num_steps)]
        tokens = sum(len(ids) for unit in units for ids in unit["tokens"])
        seconds = sum(unit["seconds"] for unit in units)
        entry = {"batch_size": batch_size, "num_steps": num_steps, "tokens": tokens, "tokens_per_second": tokens / seconds}
        if num_steps != PLAIN:
            pairs = [(unit, plain[batch_size, unit["first_prompt"]]) for unit in units]
            rounds, accepted = (sum(unit[name] for unit in units) for name in ("rounds", "accepted"))
            own, others = (sum(unit["seconds"] for unit in side) for side in zip(*pairs, strict=True))
            same = [ids == other for unit, twin in pairs for ids, other in zip(unit["tokens"], twin["tokens"], strict=True)]
            entry |= {
                "acceptance_length": 1 + accepted / rounds if rounds else None,
                "draft_share": sum(unit["draft_seconds"] for unit in units) / seconds,
                "speedup": others / own * tokens / sum(len(ids) for _, twin in pairs for ids in twin["tokens"]),
                "identical": sum(same),
                "prompts": len(same),
            }
        entries.append(entry)
    return entries


def _environment() -> dict[str, Any]:
    import torch
    import vllm

    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "command": " ".join(sys.argv),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not yet in the output file; it is written after every batch."""
    output = arguments.output
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "prompts")}
    report: dict[str, Any] = {"settings": settings, "environment": _environment(), "measured": []}
    if output.is_file():
        found = json.loads(output.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{output}: expected a file of the same settings, got {found['settings']}; name another file")
        report = found
    prompts = choose_prompts(arguments.prompts, arguments.num_prompts)
    is_done = {(unit["batch_size"], unit["first_prompt"], unit["num_steps"]) for unit in report["measured"]}
    all_steps = [PLAIN, *arguments.steps]
    units = [(size, first) for size in arguments.batch_sizes for first in range(0, len(prompts), size)]
    todo = [(*unit, steps) for unit in units for steps in all_steps if (*unit, steps) not in is_done]
    engines = {steps: Engine(steps, arguments) for steps in sorted({steps for *_, steps in todo})}
    # Each batch begins with another engine.
    for number, (size, first) in enumerate(units):
        shift = number % len(all_steps)
        for steps in all_steps[shift:] + all_steps[:shift]:
            if (size, first, steps) not in is_done:
                time.sleep(_SECONDS_OF_SPINNING)
                answer = engines[steps].ask(prompts[first : first + size])
                report["measured"].append({"batch_size": size, "first_prompt": first, "num_steps": steps, **answer})
        report["summary"] = summary(report["measured"])
        scratch = output.with_suffix(".unfinished")
        scratch.write_text(json.dumps(report), encoding="utf-8")
        scratch.replace(output)
        print(f"batch {size}: {min(first + size, len(prompts))} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    return report


def table(entries: list[dict[str, Any]]) -> str:
    """A summary as a table in Markdown."""
    lines = ["| batch | draft tokens | tokens/s | speed-up | acceptance length | time for drafting | same text |"]
    lines.append("|---|---|---|---|---|---|---|")
    for entry in entries:
        cells = [entry["batch_size"], entry["num_steps"] or "plain", f"{entry['tokens_per_second']:.1f}"]
        if entry["num_steps"] == PLAIN:
            cells += ["", "", "", ""]
        else:
            cells += [f"{entry['speedup']:.2f}", f"{entry['acceptance_length']:.3f}", f"{entry['draft_share']:.0%}"]
            cells.append(f"{entry['identical']} of {entry['prompts']}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with category and turns, as Spec-Bench")
    parser.add_argument("--target", required=True, help="folder or name on the Hub")
    parser.add_argument("--draft", required=True, help="folder or name on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="JSON; measured batches that it holds are kept")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="draft tokens of a round")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--enforce-eager", action="store_true", help="without compiling the target")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, and print the table."""
    arguments = parse()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process for each engine
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    # Left to itself, vLLM takes one thread where the engine is in the process that asks.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    if openmp.is_file():
        os.environ.setdefault("LD_PRELOAD", str(openmp))
    print(table(measure(arguments)["summary"]))


if __name__ == "__main__":
    main()
