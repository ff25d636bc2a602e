"""`make gpu` at tiny sizes: scripted models on what behaves as an accelerator, kernels in Triton's interpreter."""

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DEVICE as KERNEL_DEVICE
from kernel_checks import run_interpreted
from test_device_walk import move_to_accelerator
from tiny_models import prompts, tiny_draft, tiny_target

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretend_accelerator import OnDevice, PretendedAccelerator

from benchmarks import gpu
from transformers_prism.bench import kernels
from transformers_prism.bench.methods import Contest, parse_methods
from transformers_prism.decoding.sampler import treating_cpus_as_accelerators
from transformers_prism.transformers_names import CACHE_KEYWORD

CPU = torch.device("cpu")
(TINY,) = gpu.TRIAL_SIZES
# Of each kernel, what makes its first case tiny.
TINY_CASES: dict[str, dict] = {
    "compact_cache": {"num_heads": 2, "length": 32, "head_dim": 16},
    "context_alignment_attention": {"step": 1, "num_rows": 20, "num_heads": 2, "num_groups": 1, "head_dim": 16},
    "fused_input_projection": {"num_rows": 3, "hidden_size": 32, "num_tokens": 20},
    "grow_tree": {"width": 3, "top_k": 3},
    "linear_distillation_loss": {"num_steps": 1, "num_rows": 5, "hidden_size": 32, "num_tokens": 40},
    "top_k_log_prob": {"num_rows": 3, "hidden_size": 32, "num_tokens": 100, "k": 2},
    "tree_attention": {"num_nodes": 4, "num_prefix": 20, "num_heads": 2, "num_groups": 1, "head_dim": 16},
    "verify_tree": {"num_nodes": 4, "vocab_size": 50, "num_steps": 3},
}


@pytest.fixture
def no_compilation(monkeypatch):
    """torch.compile takes seconds for each case, and says nothing here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_a_size_is_measured_in_every_mode(one_thread, cheap_rounds, monkeypatch):
    """With drafts of 1, 2, 4 and 8 modules: plain's text, three right tokens a round, a timeline of one round."""
    monkeypatch.setattr(gpu, "parse_methods", lambda names, is_packed: PARSE([n for n in names if n != "compiled"], is_packed))
    with treating_cpus_as_accelerators():
        found = gpu.run_size(TINY, CPU, time.monotonic() + 1000)
    assert found["is_right"], found
    assert set(found["modules"]) == {1, 2, 4, 8}
    methods = found["modules"][1]["methods"]
    assert set(methods) == {"plain", *gpu.MODES}
    # The last round has less text left.
    assert all(3.5 < methods[name]["tau"] <= 4 for name in gpu.MODES if name != "auto")
    one = found["timeline"]
    assert 0 < one["busy_us"] <= one["round_us"]
    assert one["kernels"]
    assert one["busy_us"] + sum(us for _, us in one["gaps"]) == pytest.approx(one["round_us"])


PARSE = gpu.parse_methods


@pytest.mark.quick
def test_a_wrong_text_is_told(one_thread, cheap_rounds, monkeypatch):
    """A draft that is right too often or a text that is not plain's: not everything holds."""
    monkeypatch.setattr(gpu, "NUM_RIGHT", 9)
    target = gpu.scripted_target(TINY, CPU, torch.bfloat16)
    inputs = {"input_ids": torch.arange(9)[None] * 7919 % 211, "attention_mask": torch.ones((1, 9), dtype=torch.long)}
    found = gpu._decode(target, gpu.scripted_draft(target, 1), inputs, ["static:4,4,15"], TINY)
    assert not found["is_right"]
    assert found["methods"]["plain"]["is_right"]


@pytest.mark.quick
@pytest.mark.parametrize("tree", [{"tree": "auto"}, {"tree": "chain", "tree_depth": 4, "tree_num_nodes": 4}, {"tree": "static"}])
def test_scripted_models_run_on_an_accelerator(tree, monkeypatch, cheap_rounds):
    """On the pretended one, where no tensor of the host meets one of the device."""
    target = gpu.scripted_target(TINY, CPU, torch.float32)
    draft = gpu.scripted_draft(target, 2)
    draft.generation_config.update(**tree)
    ids = torch.arange(9)[None] * 7919 % 211
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(plain[0, 1:], (plain[0, :-1] + 7919) % 211)
    move_to_accelerator(monkeypatch, target, draft)
    with PretendedAccelerator():
        output = target.generate(OnDevice(ids), attention_mask=OnDevice(torch.ones_like(ids)), assistant_model=draft, **settings)
    assert torch.equal(output.host, plain)
    assert draft.last_speculation.acceptance_length > 1.5


@pytest.mark.quick
def test_memory_of_other_methods_does_not_count():
    """Each has a copy of the draft, and the compiled one a static cache; a method needs one draft, or none."""
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    methods = parse_methods(["compiled", "auto", "chain"], is_packed=False)
    contest = Contest(target, draft, None, methods, max_length=20)
    size = sum(tensor.nbytes for tensor in (*draft.parameters(), *draft.buffers()))
    kinds = {method.kind: method for method in methods}
    assert [gpu.bytes_beside(contest, draft, kinds[kind]) for kind in ("plain", "auto", "chain")] == [3 * size, 2 * size, 2 * size]
    target.generate(prompts(1)[0], max_new_tokens=2, **{CACHE_KEYWORD: contest.static_cache})
    assert gpu.bytes_beside(contest, draft, kinds["compiled"]) == 3 * size
    assert gpu.bytes_beside(contest, draft, kinds["auto"]) > 2 * size


@pytest.mark.quick
def test_one_failure_does_not_lose_the_report(monkeypatch, one_thread):
    """Of a kernel, or of a target: the others are still measured, and the report says what failed."""

    def fail(*args, **kwargs):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(gpu.kernels, "bench_case", fail)
    found = gpu.run_kernels(CPU, time.monotonic() - 1)
    assert not found["is_right"]
    assert len(found["rows"]) == len(gpu.kernels.kernel_modules())
    monkeypatch.setattr(gpu, "_decode", fail)
    target = gpu.run_size(TINY, CPU, time.monotonic() + 1000)
    assert not target["is_right"]
    assert len(target["failures"]) == 4
    told = gpu.summary({"device": "d", "minutes": 1.0, "is_right": False, "targets": {"tiny": target}, "kernels": found})
    assert told.count("FAILED, RuntimeError: out of resources") == len(found["rows"])
    assert "tiny: FAILED, M = 8: RuntimeError: out of resources" in told


@pytest.mark.quick
def test_the_report_is_wrong_if_a_part_is(monkeypatch, tmp_path):
    """Exit code, summary and picture."""
    timeline = {"round_us": 10.0, "busy_us": 5.0, "kernels": [["k", 1.0, 5.0]], "gaps": [[6.0, 4.0], [0.0, 1.0]], "by_name": {}}
    row = {"is_right": True, "tokens_per_second": 1.0, "over_plain": 1.0, "tau": None, "peak_bytes": 2**30}
    target = {"is_right": True, "modules": {1: {"methods": {"plain": row}}}, "timeline": timeline, "left_out": []}
    monkeypatch.setattr(gpu, "run_size", lambda *args: target)
    for is_right in (True, False):
        part = {"is_right": is_right, "left_out": [], "rows": [{"kernel": "k", "config": "c", "is_right": is_right, "error": 1.0, "tolerance": 0.1}]}
        monkeypatch.setattr(gpu, "run_kernels", lambda *args, part=part: part)
        with pytest.raises(gpu.typer.Exit) as ended:
            gpu.main(tmp_path / "report.json", minutes=1.0, is_trial=True)
        assert ended.value.exit_code == int(not is_right)
    assert (tmp_path / "report.png").stat().st_size > 1000
    report = json.loads((tmp_path / "report.json").read_text())
    assert "WRONG" in gpu.summary(report)


@pytest.mark.quick
def test_without_a_gpu_it_says_so():
    """And names the trial."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(gpu.typer.BadParameter, match="expected a CUDA device, got none; --trial"):
        gpu.main(Path("unused.json"), minutes=1.0, is_trial=False)


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """All tests of this file marked `kernel`."""
    assert run_interpreted(__file__) == len(TINY_CASES) + 1


@pytest.mark.kernel
@pytest.mark.parametrize("kernel", TINY_CASES)
def test_each_kernel_is_checked_and_timed(kernel, monkeypatch, no_compilation):
    """Against its reference, and three times."""
    import triton.testing

    monkeypatch.setattr(triton.testing, "do_bench", lambda run: (run(), 1.0)[1])
    module = kernels.kernel_modules()[kernel]
    case = module.cases()[0]
    make = partial(getattr(module, "_make", None) or module._make_step, **TINY_CASES[kernel])
    tiny = SimpleNamespace(cases=lambda: [dataclasses.replace(case, make=make)] * 2)
    monkeypatch.setattr(kernels, "kernel_modules", lambda: {kernel: tiny})
    found = gpu.run_kernels(KERNEL_DEVICE, deadline=0.0)
    assert found["is_right"], found
    assert found["rows"][0]["compiled_ms"] == 1.0
    assert len(found["left_out"]) == 1


@pytest.mark.kernel
def test_tiny_cases_are_those_of_every_kernel():
    """None is forgotten."""
    assert set(TINY_CASES) == set(kernels.kernel_modules())
