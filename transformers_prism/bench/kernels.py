"""The Triton kernels: compiled without a GPU, their traffic counted, and on a GPU checked against PyTorch and timed.

    transformers-prism bench kernels --compile-only --json compiled.json
    transformers-prism bench kernels --json timed.json

Each file of `kernel_cases/` names the calls of one kernel:

    cases()              a list of `KernelCase`
    every_tile()         where tiles depend on shapes, one `KernelCase` for each choice of them, only to be compiled
    traffic(num_nodes)   the `Traffic` of one call at LLaMA-3-8B's sizes, from the grid and the tiles of its launches

Nothing about a kernel is written down twice: signatures, constants and grids are recorded from its own launcher, which
runs on tensors of the meta device.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from transformers_prism.bench import kernel_cases
from transformers_prism.whole_files import write_text

# Compute capabilities of the A100, H100 and B200, and the architecture of the MI300X.
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
# Bytes of shared memory that one program may use.
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Published memory bandwidths in bytes per second, and multiprocessors, of the 80 GB SXM A100, the SXM H100 and the H200.
# Source: NVIDIA's data sheets of the three.
GPUS = {"A100": (2.039e12, 108), "H100": (3.35e12, 132), "H200": (4.8e12, 132)}


class Inputs:
    """Makes arguments: random on a real device, without memory on the meta device; the same at every call.

    Args:
        device (`torch.device` or `str`): of the tensors.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype=torch.float32, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed numbers."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, dtype)

    def integers(self, low: int, high: int, *shape: int) -> torch.LongTensor:
        """Integers from `low` to `high - 1`."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.int64, device=self.device)
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


@dataclass
class KernelCase:
    """One call of a kernel.

    Args:
        config: sizes and dtype, to read.
        make: the arguments, from [`Inputs`]; called anew for each run, since an operation may write to them.
        call: the public function; takes the arguments and `implementation`.
        launch: the launcher of the Triton kernels; takes the arguments.
        tolerance: largest difference from the PyTorch path, relative to its largest value.
        results: the tensors to compare, from the arguments and what `call` returned.
    """

    config: str
    make: Callable[[Inputs], tuple]
    call: Callable
    launch: Callable
    tolerance: float
    results: Callable = field(default=lambda arguments, returned: returned)


@dataclass
class Traffic:
    """Bytes that one call moves between memory and the processor, counted from its launches.

    Args:
        num_nodes: N, tree nodes of the call.
        num_rows: rows that a program's tile holds at most 128 of.
        num_programs: of the launch that reads the streams.
        streams: the large inputs: bytes that all programs together load of each, and its own bytes.
        partials: bytes of a split's partial results, written once and read once.
        other: bytes of the remaining inputs and of the outputs, each counted once.
        cached: bytes loaded again by further programs, which find them in the second-level cache.
    """

    num_nodes: int
    num_rows: int
    num_programs: int
    streams: dict[str, tuple[int, int]]
    partials: int = 0
    other: int = 0
    cached: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that memory has to move."""
        return sum(loaded for loaded, _ in self.streams.values()) + 2 * self.partials + self.other

    def bound_us(self, gpu: str) -> float:
        """Microseconds that a GPU's published bandwidth needs for these bytes: a bound, not a measurement."""
        return 1e6 * self.num_bytes / GPUS[gpu][0]


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
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    packed = function._pack_args(backend, dict(launch.kwargs), bound, specialization, options)
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
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    static = re.search(r"(\d+) bytes smem", log)
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": int(static[1]) if static else 0,
    }


def _amd_figures(assembly: str) -> dict:
    """Vector registers and scratch bytes of a thread, from the metadata of the assembly."""

    def read(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    return {"registers": read("vgpr_count"), "spill_bytes": read("private_segment_fixed_size"), "shared_bytes": 0}


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
        log: told of each kernel before it is compiled.
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


def traffic_rows(kernels=None, num_nodes=(16, 64)) -> list[dict]:
    """The traffic model of every kernel, at LLaMA-3-8B's sizes.

    Args:
        kernels: names of kernels; all if absent.
        num_nodes: N, tree nodes.
    Returns:
        `list` of `dict`: a row for each kernel and N, with the roofline bound of each GPU in microseconds.
    """
    rows = []
    for name, module in kernel_modules().items():
        if kernels is not None and name not in kernels:
            continue
        for count in num_nodes:
            traffic = module.traffic(count)
            bounds = {gpu: traffic.bound_us(gpu) for gpu in GPUS}
            rows.append({"kernel": name, **asdict(traffic), "num_bytes": traffic.num_bytes, "bound_us": bounds})
    return rows


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
        log: told of each case before it runs.
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


def traffic_table(rows: list[dict]) -> str:
    """Rows of [`traffic_rows`] as a Markdown table."""
    table = [
        f"| kernel | N | programs | streams, MB (times) | partials, MB | cached, MB | {' | '.join(f'{gpu}, us' for gpu in GPUS)} |",
        "|---" * (6 + len(GPUS)) + "|",
    ]
    for row in rows:
        streams = ", ".join(
            f"{name} {loaded / 1e6:.2f} ({loaded / own:.2f})" for name, (loaded, own) in row["streams"].items()
        )
        streams = streams or f"none; {row['other'] / 1e6:.2f} in all"
        bounds = " | ".join(f"{row['bound_us'][gpu]:.2f}" for gpu in GPUS)
        table.append(
            f"| `{row['kernel']}` | {row['num_nodes']} | {row['num_programs']} | {streams} "
            f"| {row['partials'] / 1e6:.2f} | {row['cached'] / 1e6:.2f} | {bounds} |"
        )
    return "\n".join(table)


def write_tables(readme: Path, compiled: list[dict], traffic: list[dict]) -> None:
    """Replace what stands between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a Markdown file by the tables."""
    text = readme.read_text(encoding="utf-8")
    for name, table in (("compiled", compiled_table(compiled)), ("traffic", traffic_table(traffic))):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"{readme}: expected the marks <!-- {name} --> and <!-- /{name} -->, got none")
        text = re.sub(pattern, rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    write_text(readme, text)
