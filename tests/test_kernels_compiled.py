"""Every kernel compiled for GPUs that are not here: no spills, shared memory that fits, traffic that was promised."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from kernel_traffic import TRAFFIC

import transformers_prism
from benchmarks import compile_kernels as bench
from transformers_prism.bench.kernels import kernel_modules, relative_error
from transformers_prism.cli.main import app
from transformers_prism.kernels import context_alignment_attention, top_k_log_prob, tree_attention

KERNELS = sorted(kernel_modules())
NUM_MULTIPROCESSORS = 132  # of an H100 and an H200; an A100 has 108. Source: NVIDIA's data sheets.
TILED = ["context_alignment_attention", "top_k_log_prob", "tree_attention"]


def check_rows(rows):
    """No spills on sm_90 and sm_100, and shared memory within what a program may have."""
    assert rows
    for row in rows:
        assert row["shared_bytes"] <= bench.MAX_SHARED_BYTES[row["arch"]], row
        # The threads of a program share 65536 registers, given out in eights; Triton launches 4 warps if it is not told.
        named = re.search(r"num_warps=(\d+)", row["config"])
        num_threads = 32 * (4 if named is None else int(named[1]))
        assert row["arch"] == "gfx942" or -(-row["registers"] // 8) * 8 * num_threads <= 65536, row
        assert row["arch"] not in ("sm_90", "sm_100") or row["spill_bytes"] == 0, row


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles_without_spills(kernel):
    """For sm_90 and, where shared memory is tighter, sm_80."""
    check_rows(bench.compile_all([kernel], ["sm_80", "sm_90"]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_all_kernels_compile_for(arch):
    """The other two architectures."""
    check_rows(bench.compile_all(None, [arch]))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", TILED)
def test_every_tile_compiles_without_spills(kernel):
    """Whatever tile a launcher may choose, for sm_90."""
    check_rows(bench.compile_all([kernel], ["sm_90"], every_tile=True))


def tiles_by_shape(kernel: str) -> set:
    """Tiles that a launcher chooses, over all sizes of rows, heads and dtypes."""
    itemsizes, head_dims = (2, 4), range(32, 257, 8)
    if kernel == "tree_attention":
        chosen = [tree_attention._tiles(*one) for one in itertools.product(range(1, 400), head_dims, itemsizes)]
    elif kernel == "top_k_log_prob":
        sizes = itertools.product(range(1, 400), range(256, 8193, 256), itemsizes)
        tiles = [top_k_log_prob._tiles(*one) for one in sizes]
        lists = {top_k_log_prob._num_best(k) for k in range(1, 65)}
        chosen = [{**one, "NUM_BEST": num_best} for one in tiles for num_best in lists]
    else:
        sizes = list(itertools.product(head_dims, itemsizes, range(0, 8)))
        chosen = [context_alignment_attention._tiles(*one) for one in sizes]
        chosen += [tiles for one in sizes for tiles in context_alignment_attention._backward_tiles(*one)]
    return {tuple(sorted(tiles.items())) for tiles in chosen}


@pytest.mark.quick
@pytest.mark.parametrize("kernel", TILED)
def test_every_tile_is_among_those_compiled(kernel):
    """No shape of a head dimension of 32 or more makes a launcher choose what the test above has not compiled."""
    wanted = tiles_by_shape(kernel)
    names = {name for tiles in wanted for name, _ in tiles}
    launches = [launch for case in bench.cases_of_every_tile(kernel) for launch in bench.launches_of(case)]
    compiled = {tuple(sorted((k, v) for k, v in launch.kwargs.items() if k in names)) for launch in launches}
    assert wanted <= compiled


@pytest.mark.quick
def test_spills_are_seen():
    """The figures are real: a kernel that is denied registers is caught."""
    launch = bench.launches_of(kernel_modules()["compact_cache"].cases()[3])[0]
    launch.kwargs["maxnreg"] = 24
    figures = bench.compile_launch(launch, "sm_90")
    assert figures["spill_bytes"] > 0
    with pytest.raises(AssertionError):
        check_rows([{"arch": "sm_90", "config": "num_warps=4", **figures}])


@pytest.mark.quick
def test_figures_are_kept_and_no_launch_is_compiled_twice(monkeypatch):
    """The assembler does not run again for a kernel that it has seen, and equal launches of several cases are one row."""
    rows = bench.compile_all(["compact_cache"], ["sm_90"])
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: pytest.fail("the assembler ran again"))
    assert bench.compile_all(["compact_cache"], ["sm_90"]) == rows
    case, compiled = kernel_modules()["compact_cache"].cases()[0], []
    monkeypatch.setattr(kernel_modules()["compact_cache"], "cases", lambda: [case, case])
    monkeypatch.setattr(bench, "compile_launch", lambda *launch: compiled.append(launch) or {})
    assert len(bench.compile_all(["compact_cache"], ["sm_90"])) == len(compiled) == 1


@pytest.mark.quick
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_nodes", [16, 64])
def test_kernel_moves_no_more_than_it_should(kernel, num_nodes):
    """Streams are loaded once for every 128 rows, a split's partial results are no larger than what it splits, and
    there is a program for every multiprocessor; where nothing is large, a call moves less than 64 KiB."""
    traffic = TRAFFIC[kernel](num_nodes)
    if not traffic.streams:
        assert traffic.num_bytes < 2**16
        return
    for name, (loaded, own) in traffic.streams.items():
        assert loaded <= own * -(-traffic.num_rows // 128), name
        assert loaded >= own, name
    assert traffic.partials <= sum(own for _, own in traffic.streams.values())
    assert traffic.num_programs >= NUM_MULTIPROCESSORS


@pytest.mark.quick
def test_bench_kernels_writes_rows(tmp_path):
    """The command prints the table and writes rows with the six keys."""
    file = tmp_path / "compiled.json"
    arguments = ["--kernel", "compact_cache", "--arch", "sm_90"]
    result = CliRunner().invoke(bench.app, [*arguments, "--json", str(file)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert rows
    for row in rows:
        assert set(row) == {"kernel", "config", "arch", "registers", "spill_bytes", "shared_bytes"}
        assert row["kernel"] in result.output
        assert row["registers"] > 0


@pytest.mark.quick
def test_bench_kernels_needs_a_gpu_to_measure():
    """Without one it says what it expected."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(app, ["bench", "kernels"])
    assert result.exit_code == 1
    assert "expected a device of ('cuda', 'xpu'), got cpu" in result.output


@pytest.mark.quick
def test_readme_holds_every_compiled_kernel():
    """The table in kernels/README.md was written by the command for the kernels that exist."""
    text = (Path(transformers_prism.__file__).parent / "kernels" / "README.md").read_text(encoding="utf-8")
    for module in kernel_modules().values():
        for case in module.cases():
            for launch in bench.launches_of(case):
                assert f"`{launch.function.__name__.strip('_')}`" in text
                assert launch.constants in text, "run: python -m benchmarks.compile_kernels --readme"


@pytest.mark.gpu
def test_kernels_equal_pytorch_on_the_gpu():
    """Every case of every kernel, as the bench checks it."""
    for name, module in kernel_modules().items():
        for case in module.cases():
            assert relative_error(case, "cuda") <= case.tolerance, (name, case.config)
