"""`docs/compatibility.md` and the list of types that were tried, from the results of one sweep for each release."""

import json
import textwrap
from collections import Counter
from pathlib import Path

from compatibility_runs import BAD, DRAFTED, IMAGE_RUNS

ROOT = Path(__file__).resolve().parent.parent
_HEADINGS = {
    "different": "Different from plain decoding",
    "crash": "Crashes",
    "unproven": "Nothing proven",
    "tree": "Trees",
    "chain": "Chains",
    "plain": "Decoded plainly, with a warning that says why",
    "refused": "Refused with an error",
    "fails": "Plain decoding with text alone fails",
    "not built": "Not built",
}
_INTRODUCTION = """# Compatibility

Every type of model that transformers {releases} can generate text with, as a tiny random model in float32, with a draft
and without one. Made by

    python -m tests.compatibility            # once with each release of transformers; it goes on where it was stopped
    python -m tests.compatibility --update   # writes this page and transformers_prism/tried_targets.py

A type counts as drafted if its text was the same token for token, greedy and sampled with the same seed, and a round
committed {rate:.0f} tokens and more, on texts longer than every limit of its tiny configuration (sliding window, number of chosen
keys, chunk: 8 tokens; length of the rotary table: 24). Drafts are scripted to be right most of the time. Every target that counts was
shown to give a different text when the mask of a round is off by one, or when keys are moved to a wrong place and recurrent
states are halved: an error of that kind could not have hidden. Audio models get text alone here;
prompts with sounds are in `tests/test_audio_targets.py`.

The numbers are tokens a round. "batch" is three rows with left padding, "static" `cache_implementation="static"`, "chat"
a second call with the cache of the first, "image" a picture in the prompt and a second call behind it, for models that take
images. In these columns "tree" or "chain" means that it was drafted so, with plain decoding's text; "plain" that it was decoded
plainly, with a warning; "-" that plain decoding fails, too (for images see below).
"""


# What a run says of a type that was wrong as long as it was taken for tried.
_UNTRIED = ("the check stopped", "nobody has tried")


def tried_types(results: dict[str, dict]) -> list[str]:
    """The model types whose trees or chains had the text of plain decoding on every release, sorted.

    A composite model has two types, its own and its text part's; both count. A type with several cases counts only if all
    of them do, and none whose rounds a check had to stop in any run.

    Args:
        results: by release, the results of its sweep by name of the case.
    """
    outcomes: dict[str, set] = {}
    for of_release in results.values():
        for name, result in of_release.items():
            for model_type in result.get("model_types", ()) if ":" not in name else ():
                runs = result.get("runs", {}).values()
                details = [run.get("detail", "") for run in runs]
                is_stopped = any(words in detail for detail in details for words in _UNTRIED)
                outcomes.setdefault(model_type, set()).add("stopped" if is_stopped else result["outcome"])
    return sorted(model_type for model_type, found in outcomes.items() if found <= set(DRAFTED))


def read_results(folder: Path) -> dict[str, dict]:
    """Results by release, the oldest first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("transformers-*.json")]
    files.sort(key=lambda file: [int(part) for part in file["transformers"].split(".")[:2]])
    return {file["transformers"]: file["results"] for file in files}


def page(results: dict[str, dict]) -> str:
    """The page as text."""
    releases = list(results)
    newest = results[releases[-1]]
    text = _INTRODUCTION.format(releases=" and ".join(releases), rate=2)
    types = [name for name in _names(results) if ":" not in name]
    text += "\n## Counts\n\n" + _counts(results, types)
    variants = [name for name in _names(results) if ":" in name]
    for outcome, heading in _HEADINGS.items():
        names = [name for name in types if _outcome(results, name) == outcome]
        if names:
            text += f"\n## {heading}\n\n" + _table(outcome, names, results, newest)
    text += "\n## Images\n\nPrompts with an image that are decoded plainly, or that plain decoding fails at here, be it in\n"
    text += "the second call of \"image\" alone.\n\n"
    text += _image_table(types, results)
    return text + "\n## Variants\n\n" + _variant_table(variants, results)


def soak_section(tally: dict) -> str:
    """What random calls found.

    Args:
        tally: the file of `python -m tests.soak --json`.
    """
    counts = tally["counts"]
    growth = "too few generations to tell" if tally["growth"] is None else f"{100 * (tally['growth'] - 1):+.1f} %"
    text = f"""
## Random settings

    python -m tests.soak --generations {tally["num_generations"] // 500 * 500} --json docs/compatibility/soak.json

Calls and chats with random settings of generate() (processors, stops, batches, caches, trees) on drafts that were fitted to
tiny targets: sequences, scores and the generator's end state equal plain decoding's, or both raise. transformers
{tally["transformers"]}, torch {tally["torch"]}.

"""
    rows = [
        ["generations", tally["num_generations"]],
        ["different from plain decoding", len(tally["differences"])],
        ["with the draft", counts["drafted"]],
        ["both raised", counts.get("both raised", 0)],
        ["near ties, not compared", counts.get("near ties, not compared", 0)],
        ["tokens a round", f"{tally['tokens_per_round']:.2f}"],
        ["resident memory, last 500 against generations 500 to 1000", growth],
    ]
    return text + _markdown(["what", "figure"], rows)


def faults_section(record: dict) -> str:
    """What exceptions in the middle of a call left behind.

    Args:
        record: the file of `python -m tests.faults --json`.
    """
    text = f"""
## Faults

    python -m tests.faults --json docs/compatibility/faults.json

Errors and interrupts at each line of a call, at its first run and in the middle of its runs: afterwards models, caches and
settings must be as before, and the next call right. One kind of error is `--errors KeyboardInterrupt`, a call alone
`--part lines --scenario tree`. transformers {record["transformers"]}, torch {record["torch"]}.

"""
    lines = record["lines"].items()
    rows = [[name, len(one["errors"]), one["places"], one["faults"], one["failed"]] for name, one in lines]
    others = [[name, "", "", "", num_failed] for name, num_failed in record["others"].items()]
    return text + _markdown(["call", "kinds of errors", "places", "faults", "failed"], [*rows, *others])


def _names(results: dict[str, dict]) -> list[str]:
    return list(dict.fromkeys(name for of_release in reversed(list(results.values())) for name in of_release))


def _outcome(results: dict[str, dict], name: str) -> str:
    """Of the newest release that has the type; what must not be comes first."""
    found = [of_release[name]["outcome"] for of_release in results.values() if name in of_release]
    return next((outcome for outcome in found if outcome in BAD), found[-1])


def _counts(results: dict[str, dict], types: list[str]) -> str:
    rows = []
    for outcome, heading in _HEADINGS.items():
        cells = []
        for of_release in results.values():
            kinds = [
                Counter(result["outcome"] for name, result in of_release.items() if (":" in name) == is_variant)
                for is_variant in (False, True)
            ]
            cells.append(f"{kinds[0][outcome]} types, {kinds[1][outcome]} variants")
        rows.append([heading, *cells])
    return _markdown(["outcome", *results], rows)


def _cell(of_release: dict, name: str, with_rate: bool = True) -> str:
    result = of_release.get(name)
    if result is None:
        return "no such type"
    rate = result.get("tokens_per_round")
    return f"{result['outcome']} {rate}" if rate is not None and result["outcome"] in DRAFTED else result["outcome"]


def _run_cell(result: dict, run: str) -> str:
    outcome = result.get("runs", {}).get(run, {}).get("outcome", "")
    return {"fails": "-", "refused": "refused"}.get(outcome, outcome)


def _table(outcome: str, names: list[str], results: dict[str, dict], newest: dict) -> str:
    latest = {name: next(of[name] for of in reversed(list(results.values())) if name in of) for name in names}
    if outcome in DRAFTED:
        columns = ["type", *results, "batch", "static", "chat", "image"] + ["why no tree"] * (outcome == "chain")
        runs = ("padded", "static", "chat", "image")
        rows = [
            [f"`{name}`", *(_cell(of, name) for of in results.values()), *(_run_cell(latest[name], run) for run in runs)]
            + [_shown(latest[name].get("detail", ""))] * (outcome == "chain")
            for name in names
        ]
        return _markdown(columns, rows)
    rows = [
        # Where only the second call of "image" fails, the others say what becomes of an image.
        [f"`{name}`", *(_cell(of, name) for of in results.values()), _run_cell(latest[name], "image sampled")]
        + [_shown(latest[name].get("detail", ""))]
        for name in names
    ]
    return _markdown(["type", *results, "image", "why"], rows)


def _image_table(names: list[str], results: dict[str, dict]) -> str:
    rows = []
    for name in sorted(names):
        runs = next(of[name] for of in reversed(list(results.values())) if name in of).get("runs", {})
        found = {run: runs[run] for run in IMAGE_RUNS if runs.get(run, {}).get("outcome") in ("plain", "fails")}
        if found:
            run, first = next(iter(found.items()))
            rows.append([f"`{name}`", run, first["outcome"], _shown(first.get("detail", ""))])
    return _markdown(["type", "run", "outcome", "why"], rows)


def _variant_table(names: list[str], results: dict[str, dict]) -> str:
    rows = []
    for name in sorted(names):
        detail = next((of[name].get("detail") for of in reversed(list(results.values())) if name in of), None)
        rows.append([name, *(_cell(of, name) for of in results.values()), _shown(detail or "")])
    return _markdown(["variant", *results, "why"], rows)


def _shown(detail: str) -> str:
    return detail.replace("|", "\\|")[:160]


def _markdown(columns: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [columns, ["---"] * len(columns), *rows]]
    return "\n".join(lines) + "\n"


def tried_file(results: dict[str, dict]) -> str:
    """The text of `transformers_prism/tried_targets.py`."""
    head = (ROOT / "transformers_prism" / "tried_targets.py").read_text(encoding="utf-8").partition("TRIED_TYPES")[0]
    types = textwrap.fill(" ".join(tried_types(results)), 115, break_long_words=False, break_on_hyphens=False)
    return f'{head}TRIED_TYPES = frozenset(\n    """\n{textwrap.indent(types, "    ")}\n    """.split()\n)\n'
