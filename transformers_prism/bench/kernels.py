"""The Triton kernels on a GPU, checked against PyTorch and timed.

    transformers-prism bench kernels --json timed.json

Each file of `kernel_cases/` names the calls of one kernel. `benchmarks/compile_kernels.py` compiles them without a GPU.
"""

import importlib
import pkgutil
from dataclasses import asdict, dataclass
from types import ModuleType

import torch

from transformers_prism.bench import kernel_cases
from transformers_prism.bench.kernel_cases import Inputs, KernelCase
from transformers_prism.kernels.dispatch import TRITON_DEVICES


def kernel_modules(kernels: list[str] | None = None) -> dict[str, ModuleType]:
    """The files of `kernel_cases/` by the name of the kernel: those that are asked for, or all.

    Raises:
        ValueError: if there is no such kernel.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(kernel_cases.__path__))
    unknown = sorted(set(kernels or ()) - set(names))
    if unknown:
        raise ValueError(f"kernel: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    chosen = names if kernels is None else [name for name in names if name in kernels]
    return {name: importlib.import_module(f"{kernel_cases.__name__}.{name}") for name in chosen}


@dataclass
class Timing:
    """One case on a GPU: the largest relative error against PyTorch and, if that is small enough, times in ms."""

    kernel: str
    config: str
    error: float
    tolerance: float
    triton_ms: float | None = None
    torch_ms: float | None = None
    compiled_ms: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether the error is small enough for the kernel to be timed; NaN is not."""
        return self.error <= self.tolerance


def relative_error(case: KernelCase, device, implementation: str = "triton") -> float:
    """Largest difference between an implementation and the PyTorch path, relative to the largest value of the latter."""
    arguments, expected_arguments = case.make(Inputs(device)), case.make(Inputs(device))
    found = case.results(arguments, case.call(*arguments, implementation=implementation))
    expected = case.results(expected_arguments, case.call(*expected_arguments, implementation="torch"))
    errors = []
    for ours, theirs in zip(_as_tuple(found), _as_tuple(expected), strict=True):
        largest = theirs.double().abs().max().clamp(min=1e-30)
        errors.append(float((ours.double() - theirs.double()).abs().max() / largest))
    # max() would drop a NaN that does not come first.
    return max(errors) if all(error == error for error in errors) else float("nan")


def _as_tuple(values) -> tuple:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def bench_case(kernel: str, case: KernelCase, device, with_compiled: bool = True) -> Timing:
    """Check a case and time it, the PyTorch path and, `with_compiled`, what torch.compile makes of that, which takes seconds to
    compile; a failing case is not timed."""
    from triton.testing import do_bench

    timing = Timing(kernel, case.config, relative_error(case, device), case.tolerance)
    if timing.is_right:
        arguments = case.make(Inputs(device))
        timing.triton_ms = do_bench(lambda: case.call(*arguments, implementation="triton"))
        timing.torch_ms = do_bench(lambda: case.call(*arguments, implementation="torch"))
        if with_compiled:
            torch.compiler.reset()  # torch compiles no more than eight graphs of one line of code
            compiled = torch.compile(lambda *inputs: case.call(*inputs, implementation="torch"))
            timing.compiled_ms = do_bench(lambda: compiled(*arguments))
    return timing


def bench_kernels(device, kernels=None, log=lambda line: None) -> list[Timing]:
    """Check and time every case of some kernels, or of all, on a GPU; `log` is called with each case before it runs.

    Raises:
        ValueError: if `device` is one that Triton does not compile for, or there is no such kernel.
    """
    if torch.device(device).type not in TRITON_DEVICES:
        raise ValueError(f"expected a device of {TRITON_DEVICES}, got {device}")
    timings = []
    for name, module in kernel_modules(kernels).items():
        for case in module.cases():
            log(f"{name}: {case.config}")
            timings.append(bench_case(name, case, device))
    return timings


def timings_as_json(timings: list[Timing], device) -> dict:
    """What the JSON file holds: the device, versions and a row for each case."""
    import triton

    return {
        "device": torch.get_device_module(device).get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": [{**asdict(timing), "is_right": timing.is_right} for timing in timings],
    }


def timing_table(timings: list[Timing]) -> str:
    """Timings as a Markdown table."""
    table = ["| kernel | config | error (limit) | Triton, ms | PyTorch, ms | torch.compile, ms |", "|---" * 6 + "|"]
    for timing in timings:
        times = (timing.triton_ms, timing.torch_ms, timing.compiled_ms)
        cells = " | ".join("not timed" if time is None else f"{time:.4f}" for time in times)
        error = f"{timing.error:.1e} ({timing.tolerance:.0e})"
        table.append(f"| `{timing.kernel}` | {timing.config} | {error} | {cells} |")
    return "\n".join(table)
