"""Compile the Triton kernels for GPUs that this machine need not have: registers, spilled bytes and shared memory.

    python -m benchmarks.compile_kernels --json compiled.json
    python -m benchmarks.compile_kernels --readme transformers_prism/kernels/README.md

Nothing about a kernel is written down twice: signatures, constants and grids are recorded from its own launcher, which
runs the calls of `bench/kernel_cases/` on tensors of the meta device.
"""

import hashlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from transformers_prism.bench.kernel_cases import Inputs, KernelCase
from transformers_prism.bench.kernels import kernel_modules
from transformers_prism.cli.options import JsonOption, report_file, user_errors
from transformers_prism.whole_files import write_json, write_text

# Compute capabilities of the A100, H100 and B200, and the architecture of the MI300X.
ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
# Bytes of shared memory that one program may use.
MAX_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
_DTYPES = (torch.bfloat16, torch.float32)
# Sizes for each tile that a launcher may choose, with everything that takes registers.
_TILE_SIZES = {
    "context_alignment_attention": [
        {"dtype": dtype, "head_dim": head_dim, "step": step, "num_sequences": 4}
        for dtype, head_dim, step in itertools.product(_DTYPES, (32, 64, 128, 256), (2, 7))
    ],
    "top_k_log_prob": [
        {"dtype": dtype, "num_rows": num_rows, "k": k, "hidden_size": 2048, "has_bias": True, "softcap": 30.0}
        for dtype, num_rows, k in itertools.product(_DTYPES, (16, 32, 64, 128), (1, 10, 64))
    ],
    "tree_attention": [
        {"dtype": dtype, "head_dim": head_dim, "num_nodes": num_nodes, "sliding_window": 1024, "softcap": 50.0}
        for dtype, head_dim, num_nodes in itertools.product(_DTYPES, (32, 64, 128, 256), (4, 8, 16, 32))
    ],
}


def cases_of_every_tile(kernel: str) -> list[KernelCase]:
    """A call for each tile that the launcher of a kernel may choose; none where tiles do not depend on shapes."""
    module = kernel_modules([kernel])[kernel]
    first = module.cases()[0]
    return [replace(first, config=str(one), make=partial(module._make, **one)) for one in _TILE_SIZES.get(kernel, ())]


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
        """Constants and options, for display."""
        return " ".join(f"{name}={value}" for name, value in self.kwargs.items())


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches of Triton kernels instead of running them; for an autotuned kernel, every configuration."""
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
    from triton.runtime.cache import get_cache_manager

    capability = ARCHITECTURES[arch]
    command = [get_ptxas(capability).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(capability)}"]
    # Kept in Triton's own cache, since the assembler takes as long as the compiler.
    cache = get_cache_manager(hashlib.sha256("\n".join([*command, version("triton"), ptx]).encode()).hexdigest())
    path = cache.get_file("ptxas.log")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.ptx"
            file.write_text(ptx)
            words = [*command, str(file), "-o", f"{folder}/kernel.o"]
            path = cache.put(subprocess.run(words, capture_output=True, text=True, check=True).stderr, "ptxas.log", binary=False)
    log = Path(path).read_text()
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spill_bytes": _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        "shared_bytes": _number(r"(\d+) bytes smem", log) if "bytes smem" in log else 0,
    }


def _number(pattern: str, text: str) -> int:
    """The number in the compiler's output that matches this pattern."""
    found = re.search(pattern, text)
    assert found is not None, f"expected {pattern} in {text}"
    return int(found[1])


def _amd_figures(assembly: str) -> dict:
    """Vector registers and scratch bytes of a thread, from the metadata of the assembly."""

    registers, scratch = (rf"\.{name}:\s*(\d+)" for name in ("vgpr_count", "private_segment_fixed_size"))
    return {"registers": _number(registers, assembly), "spill_bytes": _number(scratch, assembly), "shared_bytes": 0}


def compile_all(
    kernels=None, architectures=tuple(ARCHITECTURES), log=lambda line: None, every_tile: bool = False
) -> list[dict]:
    """Compile every launch of every case, each distinct one once.

    Args:
        kernels: names of kernels; all if absent.
        architectures: keys of `ARCHITECTURES`.
        log: called with each kernel before it is compiled.
        every_tile: compile those of [`cases_of_every_tile`] instead of `cases()`.
    Returns:
        `list` of `dict`: rows of kernel, config, arch, registers, spill_bytes, shared_bytes.
    """
    rows: dict = {}
    for name, module in kernel_modules(kernels).items():
        log(name)
        for case in cases_of_every_tile(name) if every_tile else module.cases():
            for launch in launches_of(case):
                function = launch.function.__name__.strip("_")
                for arch in architectures:
                    key = (function, launch.constants, _dtypes(launch), arch)
                    if key not in rows:
                        config = f"{case.config}: {launch.constants}"
                        rows[key] = {"kernel": function, "config": config, "arch": arch, **compile_launch(launch, arch)}
    return list(rows.values())


def _dtypes(launch: Launch) -> tuple:
    return tuple(arg.dtype for arg in launch.args if isinstance(arg, torch.Tensor))


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


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    kernel: Annotated[list[str] | None, typer.Option(help="Only this kernel; may be repeated.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; all if absent.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file whose table is replaced.")] = None,
    json_file: JsonOption = None,
):
    """Compile the Triton kernels: registers, spills and shared memory."""
    with user_errors():
        unknown = sorted(set(arch or ()) - set(ARCHITECTURES))
        if unknown:
            raise ValueError(f"arch: expected some of {', '.join(ARCHITECTURES)}, got {', '.join(unknown)}")
        rows = compile_all(kernel, arch or tuple(ARCHITECTURES), typer.echo)
        if readme is not None:
            write_table(readme, rows)
    typer.echo(compiled_table(rows))
    if json_file is not None:
        write_json(json_file, {"rows": rows})
        report_file(json_file)


if __name__ == "__main__":
    app()
