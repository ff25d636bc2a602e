"""The Triton kernels: compiled without a GPU, and on a GPU checked against PyTorch and timed.

    transformers-prism bench kernels --compile-only --json compiled.json
    transformers-prism bench kernels --json timed.json

Each file of `kernel_cases/` names the calls of one kernel. Nothing about a kernel is written down twice: signatures,
constants and grids are recorded from its own launcher, which runs on tensors of the meta device.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from transformers_prism.bench import kernel_cases
from transformers_prism.bench.kernel_cases import Inputs, KernelCase
from transformers_prism.whole_files import write_text

# Compute capabilities of the A100, H100 and B200, and the architecture of the MI300X.
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
# Bytes of shared memory that one program may use.
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclass
class Launch:
    """A recorded launch of a Triton kernel."""

    function: Any
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict

    @property
    def num_programs(self) -> int:
        """Programs of the grid."""
        return int(torch.Size(self.grid).numel())

    @property
    def constants(self) -> str:
        """Constants and options, to read."""
        return " ".join(f"{name}={value}" for name, value in self.kwargs.items())


def kernel_modules() -> dict[str, ModuleType]:
    """The files of `kernel_cases/`, by the name of the kernel."""
    names = sorted(module.name for module in pkgutil.iter_modules(kernel_cases.__path__))
    return {name: importlib.import_module(f"{kernel_cases.__name__}.{name}") for name in names}


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Note launches of Triton kernels instead of running them; of an autotuned kernel every configuration."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    originals = (JITFunction.run, Autotuner.run)

    def record(self, *args, grid, warmup, **kwargs):
        grid = grid(kwargs) if callable(grid) else grid
        launches.append(Launch(self, tuple(grid), args, kwargs))

    def record_all(self, *args, **kwargs):
        for config in self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = record, record_all
    try:
        yield launches
    finally:
        JITFunction.run, Autotuner.run = originals


def launches_of(case: KernelCase) -> list[Launch]:
    """What a case launches."""
    with recorded_launches() as launches:
        case.launch(*case.make(Inputs("meta")))
    return launches


def compile_launch(launch: Launch, arch: str) -> dict:
    """Compile a recorded launch as Triton would on a GPU of this architecture, without one.

    Returns:
        `dict`: registers of a thread, spill_bytes of a thread and shared_bytes of a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    is_amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", ARCHITECTURES[arch], 32)
    backend, function = make_backend(target), launch.function
    bind = create_function_from_signature(function.signature, function.params, backend)
    kwargs = {name: value for name, value in launch.kwargs.items() if not (is_amd and name == "maxnreg")}
    bound, specialization, options = bind(*launch.args, **kwargs)
    packed = function._pack_args(backend, dict(kwargs), bound, specialization, options)
    options, signature, constants, attributes = packed
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    figures = _amd_figures(compiled.asm["amdgcn"]) if is_amd else _ptxas_figures(compiled.asm["ptx"], arch)
    figures["shared_bytes"] += compiled.metadata.shared
    return figures


def _ptxas_figures(ptx: str, arch: str) -> dict:
    """What `ptxas -v` says of a kernel; PTX for sm_90 and later needs the newer one of the two that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = ARCHITECTURES[arch]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        name = sm_arch_from_capability(capability)
        command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", str(file)]
        result = subprocess.run([*command, "-o", f"{folder}/kernel.o"], capture_output=True, text=True, check=True)
    log = result.stderr
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        "shared_bytes": _number(r"(\d+) bytes smem", log) if "bytes smem" in log else 0,
    }


def _number(pattern: str, text: str) -> int:
    """The number that the compiler tells in these words."""
    found = re.search(pattern, text)
    assert found is not None, f"expected {pattern} in {text}"
    return int(found[1])


def _amd_figures(assembly: str) -> dict:
    """Vector registers and scratch bytes of a thread, from the metadata of the assembly."""

    registers, scratch = (rf"\.{name}:\s*(\d+)" for name in ("vgpr_count", "private_segment_fixed_size"))
    return {"registers": _number(registers, assembly), "spill_bytes": _number(scratch, assembly), "shared_bytes": 0}


def check_choice(kernels: list[str] | None, architectures: list[str] | None) -> None:
    """Raise a ValueError for names of kernels or architectures that do not exist."""
    for name, chosen, known in (("kernel", kernels, kernel_modules()), ("arch", architectures, ARCHITECTURES)):
        unknown = sorted(set(chosen or ()) - set(known))
        if unknown:
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown)}")


def compile_all(
    kernels=None, architectures=tuple(ARCHITECTURES), log=lambda line: None, every_tile: bool = False
) -> list[dict]:
    """Compile every launch of every case, each distinct one once.

    Args:
        kernels: names of kernels; all if absent.
        architectures: keys of `ARCHITECTURES`.
        log: called with each kernel before it is compiled.
        every_tile: compile the calls of `every_tile()` instead of those of `cases()`.
    Returns:
        `list` of `dict`: rows of kernel, config, arch, registers, spill_bytes, shared_bytes.
    """
    rows: dict = {}
    for name, module in kernel_modules().items():
        if kernels is not None and name not in kernels:
            continue
        log(name)
        for case in module.every_tile() if every_tile else module.cases():
            for launch in launches_of(case):
                config = f"{case.config}: {launch.constants}"
                for arch in architectures:
                    figures = compile_launch(launch, arch)
                    row = {"kernel": launch.function.__name__.strip("_"), "config": config, "arch": arch, **figures}
                    rows.setdefault((row["kernel"], launch.constants, _dtypes(launch), arch), row)
    return list(rows.values())


def _dtypes(launch: Launch) -> tuple:
    return tuple(arg.dtype for arg in launch.args if isinstance(arg, torch.Tensor))


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
        """Whether the kernel may be timed; an error that is not a number is none."""
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


def bench_case(kernel: str, case: KernelCase, device) -> Timing:
    """Check a case and time it, the PyTorch path and what torch.compile makes of that; a failing case is not timed."""
    from triton.testing import do_bench

    timing = Timing(kernel, case.config, relative_error(case, device), case.tolerance)
    if timing.is_right:
        arguments = case.make(Inputs(device))
        compiled = torch.compile(lambda *inputs: case.call(*inputs, implementation="torch"))
        timing.triton_ms = do_bench(lambda: case.call(*arguments, implementation="triton"))
        timing.torch_ms = do_bench(lambda: case.call(*arguments, implementation="torch"))
        timing.compiled_ms = do_bench(lambda: compiled(*arguments))
    return timing


def bench_kernels(device, kernels=None, log=lambda line: None) -> list[Timing]:
    """Check and time every case on a GPU.

    Args:
        device (`torch.device`): the GPU.
        kernels: names of kernels; all if absent.
        log: called with each case before it runs.
    Raises:
        ValueError: if `device` is one that Triton does not compile for.
    """
    from transformers_prism.kernels.dispatch import TRITON_DEVICES

    if torch.device(device).type not in TRITON_DEVICES:
        raise ValueError(f"expected a device of {TRITON_DEVICES}, got {device}; --compile-only needs none")
    timings = []
    for name, module in kernel_modules().items():
        for case in module.cases() if kernels is None or name in kernels else ():
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


def compiled_table(rows: list[dict]) -> str:
    """Rows of [`compile_all`] as a Markdown table: registers / spilled bytes / shared bytes for each architecture."""
    architectures = list(dict.fromkeys(row["arch"] for row in rows))
    lines: dict = {}
    for row in rows:
        cells = lines.setdefault((row["kernel"], row["config"]), {})
        cells[row["arch"]] = f"{row['registers']} / {row['spill_bytes']} / {row['shared_bytes']}"
    table = [f"| kernel | config | {' | '.join(architectures)} |", "|---" * (len(architectures) + 2) + "|"]
    for (kernel, config), cells in lines.items():
        table.append(f"| `{kernel}` | {config} | {' | '.join(cells.get(arch, '') for arch in architectures)} |")
    return "\n".join(table)


def write_table(readme: Path, rows: list[dict]) -> None:
    """Replace the text between the marks `<!-- compiled -->` and `<!-- /compiled -->` of a Markdown file by a table.

    Args:
        readme (`Path`): the file.
        rows (`list[dict]`): of [`compile_all`].
    Raises:
        ValueError: if the marks are missing.
    """
    text = readme.read_text(encoding="utf-8")
    pattern = r"(<!-- compiled -->\n).*?(<!-- /compiled -->)"
    if not re.search(pattern, text, flags=re.DOTALL):
        raise ValueError(f"{readme}: expected the marks <!-- compiled --> and <!-- /compiled -->, got none")
    table = compiled_table(rows)
    write_text(readme, re.sub(pattern, lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL))
