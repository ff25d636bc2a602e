"""Everything that only a GPU can show, in one run of less than eight minutes, without network: `make gpu`.

    python -m benchmarks.gpu                             a machine with CUDA; writes gpu-report.json and gpu-report.png
    TRITON_INTERPRET=1 python -m benchmarks.gpu --trial  the same code at tiny sizes on a CPU; figures say nothing

1. The tests marked `gpu`.
2. Every kernel against its PyTorch reference and what torch.compile makes of it.
3. Random targets of the sizes of LLaMA-3-8B and SmolLM2-135M, with drafts of M = 1, 2, 4 and 8 modules: plain decoding,
   compiled with a static cache, and with the draft. By script, three drafted tokens of each round are right.
4. One round as torch.profiler saw it: kernels, and the gaps in which the device waited for the host.

The exit code is 0 only if every test passes, every kernel agrees with its reference and every text is that of plain decoding.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation import BaseStreamer
from transformers.utils import logging

import transformers_prism
from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.bench import kernels
from transformers_prism.bench.figures import as_json
from transformers_prism.bench.generate import bench_generate, make_items
from transformers_prism.bench.methods import Contest, Method, parse_methods
from transformers_prism.bench.record import hardware
from transformers_prism.decoding.drafter import Drafter
from transformers_prism.decoding.sampler import treating_cpus_as_accelerators
from transformers_prism.whole_files import write_json

ROOT = Path(__file__).resolve().parent.parent
NUM_RIGHT = 3  # drafted tokens of a round
MODES = ["auto", "chain:4", "static:4,4,15", "static:10,6,59"]
# The token after v is v + this, modulo the vocabulary.
_STRIDE = 7919
_RIGHT_LOGIT = 14.0
_SMALL = 0.002  # weights that hardly change the residual stream


@dataclass(frozen=True)
class Size:
    """A target's sizes, how much is decoded, and the memory that this takes.

    Args:
        name: of the model that has these sizes.
        config: of a `LlamaConfig`.
        gigabytes: of free memory, below which it is left out.
        num_new, num_prompt: tokens.
        repeat: runs of each method.
    """

    name: str
    config: dict
    gigabytes: float
    num_new: int = 96
    num_prompt: int = 256
    repeat: int = 2


LLAMA = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
}
SMOLLM = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0},
}
TINY = {
    **{"vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
SIZES = (Size("SmolLM2-135M", SMOLLM, 4.0), Size("LLaMA-3-8B", LLAMA, 40.0))
TRIAL_SIZES = (Size("tiny", TINY, 0.0, num_new=20, num_prompt=9, repeat=1),)


def scripted_target(size: Size, device: torch.device, dtype: torch.dtype):
    """A random target with all computations of a real one, which continues token v with v + a stride: the residual stream
    stays close to the embedding, and the head is a permutation of the embedding. The best logit is far ahead of the others,
    so that rounding does not decide."""
    config = LlamaConfig(
        **size.config,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        initializer_range=_SMALL,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        embedding = target.get_input_embeddings().weight.normal_()
        order = (torch.arange(config.vocab_size, device=device) - _STRIDE) % config.vocab_size
        target.lm_head.weight.copy_(embedding[order] * (_RIGHT_LOGIT / config.hidden_size))
    return target.requires_grad_(False)


class _ScriptedDrafter(Drafter):
    """Right in the first draft steps of a round, wrong in the others; everything is computed."""

    def _propose(self, output, top_k: int, depth: int, coupling):
        token_ids, log_probs = super()._propose(output, top_k, depth, coupling)
        if depth < NUM_RIGHT:
            return token_ids, log_probs
        return (token_ids + 1) % self.draft.config.vocab_size, log_probs


class ScriptedDraft(PrismDraftModel):
    """A random draft that predicts [`scripted_target`], except where its drafter makes it wrong."""

    def make_drafter(self) -> Drafter:
        """The scripted drafter."""
        return _ScriptedDrafter(self)


def scripted_draft(target, num_modules: int) -> ScriptedDraft:
    """A draft of the target's width whose step k is served by module k."""
    config = PrismConfig.from_target(
        target,
        num_processing_modules=num_modules,
        draft_step_to_module=list(range(num_modules)),
        context_kv="prefill_module",
    )
    with torch.device(target.device):
        draft = ScriptedDraft(config).to(target.dtype).eval().requires_grad_(False)
    width = config.hidden_size
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=_SMALL)
            if name.endswith("input_projection.weight"):  # [embedding ; hidden state]
                parameter[:, :width] += torch.eye(width, dtype=parameter.dtype, device=parameter.device)
    return draft.bind(target)


def run_tests(seconds: float) -> dict:
    """The tests marked `gpu`, which are in one file."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_kernels_compiled.py")]
    start = time.perf_counter()
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return {"is_right": False, "seconds": seconds, "output": f"not finished: {(error.stdout or b'')[-2000:]!r}"}
    lines = result.stdout.strip().splitlines()
    return {
        "is_right": result.returncode == 0,
        "seconds": time.perf_counter() - start,
        "output": "\n".join(lines[-30:] if result.returncode else lines[-1:]) + result.stderr[-1000:],
    }


def run_kernels(device: torch.device, deadline: float) -> dict:
    """Every kernel's first case, then the other cases of each in turn until the time is up."""
    cases = {name: module.cases() for name, module in kernels.kernel_modules().items()}
    turns = [(name, members[turn]) for turn in range(max(map(len, cases.values()))) for name, members in cases.items() if turn < len(members)]
    rows: list[dict] = []
    left_out = []
    for index, (name, case) in enumerate(turns):
        if index >= len(cases) and time.monotonic() > deadline:
            left_out.append(f"{name}: {case.config}")
            continue
        try:
            timing = kernels.bench_case(name, case, device, with_compiled=index < len(cases))
            rows.append({**asdict(timing), "is_right": timing.is_right})
        except Exception as error:  # of any kind: the other kernels are still to be seen
            rows.append({"kernel": name, "config": case.config, "is_right": False, "failure": _text_of(error)})
        _free()
    return {"is_right": all(row["is_right"] for row in rows), "rows": rows, "left_out": left_out}


def run_size(size: Size, device: torch.device, deadline: float) -> dict:
    """Decode with every method; drafts with more than one module are run in two of the modes."""
    target = scripted_target(size, device, torch.bfloat16)
    start = torch.randint(size.config["vocab_size"], (1, 1), generator=torch.Generator().manual_seed(1))
    ids = (start + _STRIDE * torch.arange(size.num_prompt)) % size.config["vocab_size"]
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    found: dict = {"config": size.config, "num_new": size.num_new, "num_prompt": size.num_prompt, "modules": {}, "left_out": [], "failures": []}
    for num_modules in (1, 2, 4, 8):
        if num_modules > 1 and time.monotonic() > deadline:
            found["left_out"].append(f"M = {num_modules}")
            continue
        draft = scripted_draft(target, num_modules)
        modes = ["compiled", *MODES] if num_modules == 1 else [MODES[0], MODES[-1]]
        try:
            found["modules"][num_modules] = _decode(target, draft, inputs, modes, size)
            if num_modules == 1:
                with profiled_rounds(target, draft, inputs, MODES[-1]) as events:
                    found["timeline"] = timeline(events, device.type)
        except Exception as error:  # of any kind: the other drafts are still to be seen
            found["failures"].append(f"M = {num_modules}: {_text_of(error)}")
        del draft
        _free()
    found["is_right"] = not found["failures"] and all(one["is_right"] for one in found["modules"].values())
    return found


def _decode(target, draft, inputs: dict, modes: list[str], size: Size) -> dict:
    """Speed, acceptance and memory of each mode, and whether it gave plain's text."""
    methods = parse_methods(modes, is_packed=False)
    contest = Contest(target, draft, None, methods, size.num_prompt + size.num_new)
    settings = {"max_new_tokens": size.num_new, "do_sample": False}
    items = make_items([{"question_id": 0, "category": "random"}], [inputs], 1, pad_token_id=0)
    results = list(bench_generate(contest, items, settings, size.repeat))
    figures = as_json(results, methods)["methods"]
    found: dict = {"is_right": True, "methods": {}}
    for method in methods:
        summary, outcome = figures[method.name]["summary"], results[0].outcomes[method.name]
        is_right = all(outcome.is_identical) and outcome.declined is None
        # The script says what a fixed tree commits; the last rounds have less text left.
        if method.kind in ("static", "chain"):
            is_right &= abs(summary["acceptance_length_pooled"] - (NUM_RIGHT + 1)) < 0.5
        found["is_right"] &= is_right
        found["methods"][method.name] = {
            "is_right": is_right,
            "tokens_per_second": summary["draft_tokens_per_second"],
            "over_plain": summary["ratio"],
            "tau": summary["acceptance_length_pooled"],
            "round_ms": summary["round_ms"],
            "step_ms": summary["step_ms"],
            "declined": outcome.declined,
            "peak_bytes": _peak_bytes(target, {**inputs, **settings, **contest.arguments(method)}, bytes_beside(contest, draft, method)),
        }
    return found


def bytes_beside(contest: Contest, draft, method: Method) -> int:
    """Bytes of drafts and of a static cache that are there for other methods, and that this one would not need."""
    drafts = [draft, *(one for name, one in contest.drafts.items() if name != method.name)]
    held = [tensor for one in drafts for tensor in (*one.parameters(), *one.buffers())]
    if method.kind != "compiled":
        held += [states for layer in contest.static_cache.layers if layer.is_initialized for states in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in held)


def _text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]


def _peak_bytes(target, arguments: dict, beside: int) -> int | None:
    """Bytes of the device's memory that a generate() call needs at most, weights included, less those `beside` it; None on a CPU."""
    if target.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    target.generate(**arguments)
    return torch.cuda.max_memory_allocated() - beside


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # after an error of the device each further call brings it again
            torch.cuda.empty_cache()


class _Rounds(BaseStreamer):
    """Tells the profiler where rounds begin and end."""

    def __init__(self):
        self.current = None

    def put_round(self, num_accepted: int) -> None:
        """A round has ended, and the next begins."""
        self.end()
        self.current = record_function("round")
        self.current.__enter__()

    def put(self, value) -> None:
        """Tokens are not looked at."""

    def end(self) -> None:
        """There is no further round."""
        if self.current is not None:
            self.current.__exit__(None, None, None)
            self.current = None


@contextmanager
def profiled_rounds(target, draft, inputs: dict, mode: str) -> Iterator[list]:
    """The profiler's events of a few rounds, after a warm-up call."""
    (method,) = [one for one in parse_methods([mode], is_packed=False) if one.name == mode]
    draft.generation_config.update(**method.tree)
    settings = {"max_new_tokens": 8 * (NUM_RIGHT + 1), "do_sample": False, "assistant_model": draft}
    target.generate(**inputs, **settings)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if target.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        target.generate(**inputs, **settings, streamer=_Rounds())
    yield profiler.events()


def timeline(events: list, device_type: str) -> dict:
    """One round in the middle of a call: what ran on the device, or on a CPU its operators, and the gaps between.

    Args:
        events: of the profiler.
        device_type (`str`): "cuda", or "cpu" where there are no kernels to be seen.
    Returns:
        `dict`: `round_us`; `kernels`, a list of name, start and microseconds; `busy_us`; `gaps`, a list of start and
        microseconds, the longest first; `by_name`, microseconds and calls of each kernel.
    """
    rounds = [event for event in events if event.name == "round" and event.device_type == torch.autograd.DeviceType.CPU]
    window = rounds[len(rounds) // 2].time_range
    if device_type == "cuda":
        shown = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA and event.name != "round"]
    else:
        shown = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
    inside = sorted(
        (event for event in shown if window.start <= event.time_range.start < window.end), key=lambda event: event.time_range.start
    )
    gaps, end, busy = [], window.start, 0.0
    for event in inside:
        start, stop = event.time_range.start, min(event.time_range.end, window.end)
        if start > end:
            gaps.append((end - window.start, start - end))
        busy += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    gaps.append((end - window.start, max(window.end - end, 0.0)))
    by_name: dict[str, list] = {}
    for event in inside:
        entry = by_name.setdefault(event.name, [0.0, 0])
        entry[0] += event.time_range.elapsed_us()
        entry[1] += 1
    return {
        "round_us": window.end - window.start,
        "busy_us": busy,
        "kernels": [[event.name[:80], event.time_range.start - window.start, event.time_range.elapsed_us()] for event in inside],
        "gaps": sorted(gaps, key=lambda gap: -gap[1]),
        "by_name": dict(sorted(by_name.items(), key=lambda item: -item[1][0])),
    }


def draw(path: Path, timelines: dict[str, dict]) -> None:
    """A picture of one round of each target: kernels above, gaps below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(timelines), 1, figsize=(12, 2 * len(timelines) + 0.6), squeeze=False)
    for axis, (name, one) in zip(axes[:, 0], timelines.items(), strict=True):
        axis.broken_barh([(start / 1e3, us / 1e3) for _, start, us in one["kernels"]], (1, 0.8), facecolors="tab:blue")
        axis.broken_barh([(start / 1e3, us / 1e3) for start, us in one["gaps"]], (0, 0.8), facecolors="tab:red")
        axis.set_yticks([0.4, 1.4], ["device waits", "kernels"])
        axis.set_title(f"{name}, {MODES[-1]}: {one['round_us'] / 1e3:.2f} ms, device busy {one['busy_us'] / one['round_us']:.0%}")
        axis.set_xlim(0, one["round_us"] / 1e3)
    axes[-1, 0].set_xlabel("milliseconds of a round")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def measure(device: torch.device, sizes: tuple[Size, ...], minutes: float, log: Callable[[str], None], has_tests: bool = True) -> dict:
    """Everything, in at most about this many minutes."""
    begun = time.monotonic()
    report: dict = {
        "device": hardware(device),
        "versions": {"torch": torch.__version__, "transformers_prism": transformers_prism.__version__, "cuda": torch.version.cuda},
        "targets": {},
    }
    if has_tests:
        log("tests marked gpu")
        report["tests"] = run_tests(60 * minutes * 0.4)
    for index, size in enumerate(sizes):
        free = torch.cuda.mem_get_info()[0] / 1e9 if device.type == "cuda" else float("inf")
        if free < size.gigabytes:
            report["targets"][size.name] = {"is_right": True, "left_out": [f"needs {size.gigabytes:g} GB, got {free:.0f} GB"]}
            continue
        log(f"target of the sizes of {size.name}")
        try:
            report["targets"][size.name] = run_size(size, device, begun + 60 * minutes * (0.45 + 0.25 * index))
        except Exception as error:  # of any kind: the rest is still to be seen
            report["targets"][size.name] = {"is_right": False, "failures": [_text_of(error)]}
        _free()
    log("kernels")
    report["kernels"] = run_kernels(device, begun + 60 * minutes * 0.95)
    parts = [report["kernels"], *report["targets"].values(), *([report["tests"]] if has_tests else [])]
    report["is_right"] = all(part["is_right"] for part in parts)
    report["minutes"] = (time.monotonic() - begun) / 60
    return report


def summary(report: dict) -> str:
    """The figures, to read."""
    lines = [f"{report['device']}, {report['minutes']:.1f} minutes: {'everything holds' if report['is_right'] else 'SOMETHING IS WRONG'}"]
    if "tests" in report:
        lines.append(f"tests: {report['tests']['output']}")
    for name, target in report["targets"].items():
        for num_modules, one in target.get("modules", {}).items():
            for mode, row in one["methods"].items():
                peak = "" if row["peak_bytes"] is None else f", peak {row['peak_bytes'] / 2**30:.1f} GiB"
                tau = "" if row["tau"] is None else f", tau {row['tau']:.2f}"
                wrong = "" if row["is_right"] else "  WRONG"
                lines.append(
                    f"{name}, M = {num_modules}, {mode:15s} {row['tokens_per_second']:8.1f} tokens/s, {row['over_plain']:.2f} of plain{tau}{peak}{wrong}"
                )
        if "timeline" in target:
            one = target["timeline"]
            lines.append(f"{name}: a round of {one['round_us'] / 1e3:.2f} ms, {len(one['kernels'])} kernels, device busy {one['busy_us'] / one['round_us']:.0%}")
        lines += [f"{name}: left out, {what}" for what in target.get("left_out", [])]
        lines += [f"{name}: FAILED, {what}" for what in target.get("failures", [])]
    for row in report["kernels"]["rows"]:
        if not row["is_right"]:
            wrong = f"FAILED, {row['failure']}" if "failure" in row else f"WRONG, error {row['error']:.1e} above {row['tolerance']:.0e}"
            lines.append(f"{row['kernel']}, {row['config']}: {wrong}")
    lines.append(f"kernels: {len(report['kernels']['rows'])} cases, left out for time: {len(report['kernels']['left_out'])}")
    return "\n".join(lines)


def main(
    output: Annotated[Path, typer.Option(help="the report; its picture goes beside it")] = Path("gpu-report.json"),
    minutes: Annotated[float, typer.Option(min=0.1, help="after about which further cases are left out")] = 7.5,
    is_trial: Annotated[bool, typer.Option("--trial", help="tiny sizes on the CPU, without the tests")] = False,
) -> None:
    """Measure, write the report, and end with 0 only if everything holds."""
    if not is_trial and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, got none; --trial runs the same code at tiny sizes on a CPU")
    logging.set_verbosity_error()
    device = torch.device("cpu" if is_trial else "cuda")
    with treating_cpus_as_accelerators() if is_trial else nullcontext():
        report = measure(device, TRIAL_SIZES if is_trial else SIZES, minutes, lambda line: typer.echo(line, err=True), not is_trial)
    write_json(output, report)
    timelines = {name: one["timeline"] for name, one in report["targets"].items() if "timeline" in one}
    if timelines:
        draw(output.with_suffix(".png"), timelines)
    typer.echo(summary(report))
    raise typer.Exit(0 if report["is_right"] else 1)


if __name__ == "__main__":
    typer.run(main)
