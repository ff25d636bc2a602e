"""Every type of model that transformers can generate text with, with a draft and without one.

    python -m tests.compatibility                   all types and variants, with the installed release of transformers
    python -m tests.compatibility --only llama      types and variants of which this is the model
    python -m tests.compatibility --quick           a part that takes two minutes
    python -m tests.compatibility --update          write the page and the list of types from the results of all releases

Results are kept in a JSON file of the release and are not made anew if the command is started again; --again does.
The exit code is 1 where a text differs, a call crashes, or a type proves nothing.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from compatibility_models import all_types, build
from compatibility_page import faults_section, page, read_results, soak_section, tried_file
from compatibility_runs import BAD, Case, run_case
from compatibility_variants import variants

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "compatibility"
SECONDS_PER_CASE = 240
# One of each kind: trees, a chain, windows of both kinds, no rotary table, recurrent layers, frequencies that change.
QUICK = ("llama", "gemma3_text", "mistral", "gpt2", "lfm2", "kimi_linear", "llama: dynamic rotary table across its length")


def all_cases() -> dict[str, Case]:
    """The sweep by name: types, then variants."""
    cases = [Case(name, name) for name in all_types()] + variants()
    assert len({case.name for case in cases}) == len(cases)
    return {case.name: case for case in cases}


def results_file() -> Path:
    """Where the results of the installed release stand."""
    return RESULTS / f"transformers-{transformers.__version__}.json"


def _work(case: Case, pipe) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(run_case(case))
    except Exception:
        pipe.send({"outcome": "crash", "detail": "of the sweep: " + " ".join(traceback.format_exc(limit=-2).split())})


def run_in_time(case: Case, seconds: float) -> dict:
    """The result of a case from a process of its own, which may hang or die."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(case, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"outcome": "unproven", "detail": f"took more than {seconds:.0f} seconds"}
        return ours.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return {"outcome": "not built", "detail": "the system ended the process, as it does where memory runs out"}
        return {"outcome": "crash", "detail": f"the process ended with {process.exitcode}"}
    finally:
        if process.is_alive():
            process.join(1)
        if process.is_alive():
            process.kill()
        process.join()


def written_files() -> dict[Path, str]:
    """What `--update` writes: text by path."""
    results = read_results(RESULTS)
    sections = {"soak.json": soak_section, "faults.json": faults_section}
    found = {RESULTS / name: section for name, section in sections.items() if (RESULTS / name).exists()}
    others = "".join(section(json.loads(path.read_text(encoding="utf-8"))) for path, section in found.items())
    return {
        ROOT / "docs" / "compatibility.md": page(results) + others,
        ROOT / "transformers_prism" / "tried_targets.py": tried_file(results),
    }


def _write_results(path: Path, results: dict) -> None:
    """One line for each case, so that changes can be read."""
    lines = [f"{json.dumps(name)}: {json.dumps(result)}" for name, result in results.items()]
    head = f'{{"transformers": "{transformers.__version__}", "results": {{\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


def sweep(cases: list[Case], path: Path | None, seconds: float = SECONDS_PER_CASE, again: bool = False) -> dict:
    """Results by name; those that stand in the file are taken from there, unless `again`."""
    results = json.loads(path.read_text())["results"] if path is not None and path.exists() else {}
    todo = [case for case in cases if again or case.name not in results]
    build("llama")  # what all of them import, once
    start = time.monotonic()
    for index, case in enumerate(todo):
        began = time.monotonic()
        result = run_in_time(case, seconds)
        results[case.name] = result
        left = (time.monotonic() - start) / (index + 1) * (len(todo) - index - 1)
        took = time.monotonic() - began
        what = " ".join(str(result[key]) for key in ("outcome", "tokens_per_round", "detail") if key in result)
        say(f"{index + 1}/{len(todo)} {case.name}: {what} ({took:.0f} s, {left / 60:.0f} min left)")
        if path is not None:
            _write_results(path, results)
    return {case.name: results[case.name] for case in cases}


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv=None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], help="name of a case, or of a model with its variants")
    parser.add_argument("--outcome", action="append", default=[], help="cases that had this outcome in the results")
    parser.add_argument("--quick", action="store_true", help="a part that takes two minutes")
    parser.add_argument("--update", action="store_true", help="write the page and the list of tried types, run nothing")
    parser.add_argument("--again", action="store_true", help="also cases that have a result")
    parser.add_argument("--json", type=Path, default=None, help="the file of results")
    parser.add_argument("--seconds", type=float, default=SECONDS_PER_CASE, help="time of a case")
    arguments = parser.parse_args(argv)
    if arguments.update:
        for path, text in written_files().items():
            path.write_text(text, encoding="utf-8")
        return 0
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    cases = all_cases()
    path = arguments.json or results_file()
    if arguments.quick:
        cases = {name: cases[name] for name in QUICK}
    if arguments.only:
        cases = {name: case for name, case in cases.items() if {name, case.model} & set(arguments.only)}
    if arguments.outcome:
        known = json.loads(path.read_text())["results"]
        cases = {n: case for n, case in cases.items() if known.get(n, {}).get("outcome") in arguments.outcome}
    results = sweep(list(cases.values()), path, arguments.seconds, arguments.again)
    say(", ".join(f"{count} {outcome}" for outcome, count in Counter(r["outcome"] for r in results.values()).most_common()))
    bad = {name: result for name, result in results.items() if result["outcome"] in BAD}
    for name, result in bad.items():
        say(f"{result['outcome']}: {name}: {result.get('detail', '')}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
