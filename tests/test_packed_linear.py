"""`kernels/packed_linear.py`: the product of a few rows with a packed weight, compiled by the system's compiler."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

from transformers_prism.kernels import cpp
from transformers_prism.kernels import packed_linear as packed_linear_file
from transformers_prism.kernels.packed_linear import (
    pack_weight,
    packed_linear,
    packed_linear_is_available,
    packed_linear_reference,
    why_no_packed_linear,
)

pytestmark = pytest.mark.skipif(not packed_linear_is_available(), reason="the kernel needs a C++ compiler and an x86 CPU with AVX2")

# One panel or several, whole or not; inputs in one part of 256 or several.
SHAPES = [(1, 1), (7, 5), (64, 32), (576, 192), (300, 33), (1537, 97), (256, 16), (257, 15)]
# Of inputs and weights.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]
NUM_ROWS = (1, 2, 5, 6, 7, 11, 12, 13, 24, 25, 37, 60, 130)
# As a process of its own, since the kernels of a process are those of its CPU.
_CHECK = """
import torch
from transformers_prism.kernels.packed_linear import packed_linear_is_available, pack_weight, packed_linear, packed_linear_reference
assert torch.backends.cpu.get_cpu_capability() == "{cpu}" and packed_linear_is_available()
for shape in {shapes}:
    for dtype, of_weight in {dtypes}:
        packed, rounding = pack_weight(torch.randn(shape[1], shape[0]).to(of_weight)), torch.finfo(dtype).eps
        for num_rows in {num_rows}:
            input = torch.randn(num_rows, shape[0]).to(dtype)
            arguments = (packed, torch.randn(shape[1]).to(dtype), shape[1])
            torch.testing.assert_close(packed_linear(input, *arguments), packed_linear_reference(input, *arguments),
                                       atol=max(1e-4, rounding), rtol=max(1e-5, rounding))
print("equal")
"""


@pytest.fixture
def fresh_kernels():
    """The kernels are looked for again, and once more after the test."""
    packed_linear_file._built.cache_clear()
    yield
    packed_linear_file._built.cache_clear()


@pytest.fixture
def cache_folder(tmp_path, monkeypatch, fresh_kernels):
    """An empty Hugging Face cache folder."""
    monkeypatch.setattr(cpp.constants, "HF_HOME", str(tmp_path))
    return tmp_path / "prism" / "kernels"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "of_weight"), DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(shape, dtype, of_weight, has_bias, one_thread):
    """For every number of rows, and the same bits for a row alone and with others, by any number of threads."""
    num_inputs, num_outputs = shape
    packed, rounding = pack_weight(torch.randn(num_outputs, num_inputs).to(of_weight)), torch.finfo(dtype).eps
    bias = torch.randn(num_outputs).to(dtype) if has_bias else None
    for num_rows in NUM_ROWS:
        input = torch.randn(num_rows, num_inputs).to(dtype)
        output = packed_linear(input, packed, bias, num_outputs)
        expected = packed_linear_reference(input, packed, bias, num_outputs)
        torch.testing.assert_close(output, expected, atol=max(1e-4, rounding), rtol=max(1e-5, rounding))
        for row in {0, num_rows // 2, num_rows - 1}:
            assert torch.equal(output[row], packed_linear(input[row], packed, bias, num_outputs))
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)  # the fixture sets it back
            assert torch.equal(output, packed_linear(input, packed, bias, num_outputs))
        torch.set_num_threads(1)


def test_the_packed_weight_is_the_weight():
    """In panels, with zeros beyond the last output."""
    weight = torch.randn(50, 7)
    packed = pack_weight(weight)
    num_panels, num_inputs, num_columns = packed.shape
    assert num_inputs == 7
    assert torch.equal(packed.transpose(1, 2).flatten(0, 1)[:50], weight)
    assert not packed.transpose(1, 2).flatten(0, 1)[50:].any()
    assert num_panels == -(-50 // num_columns)


@pytest.mark.parametrize("shape", [(4096, 64), (14336, 32)])
def test_long_sums_are_as_exact_as_torchs(shape):
    """Against float64."""
    torch.manual_seed(0)
    weight, input = torch.randn(shape[1], shape[0]), torch.randn(8, shape[0])
    exact = input.double() @ weight.double().T
    errors = [
        (output - exact).pow(2).mean().sqrt()
        for output in (packed_linear(input, pack_weight(weight), None, shape[1]), torch.nn.functional.linear(input, weight))
    ]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_are_rounded_as_torch_rounds(dtype):
    """To the nearest, of two the even one; numbers too small, too large, infinite, and none."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = torch.cat((bits.view(dtype), bits.view(dtype).roll(1)))  # all there are
    halves = torch.tensor([[1.0, 0.5]], dtype=dtype)
    for weight in (torch.stack((values, values * 0)), torch.stack((values, values))):
        weight = weight.T.contiguous()
        output = packed_linear(halves, pack_weight(weight), None, len(weight))
        # 0 * inf is not a number, in either.
        expected = (weight[:, 0].float() + 0.5 * weight[:, 1].float()).to(dtype)
        assert torch.equal(output[0].isnan(), expected.isnan())
        assert torch.equal(output[0].nan_to_num(), expected.nan_to_num())


def test_inputs_of_every_layout():
    """More dimensions, none but the last, columns that do not follow one another, no rows, and numbers that are not finite."""
    packed = pack_weight(torch.randn(40, 24))
    for input in (torch.randn(2, 3, 24), torch.randn(24), torch.randn(24, 5).T, torch.randn(5, 48)[:, ::2], torch.randn(0, 24)):
        expected = packed_linear_reference(input, packed, None, 40)
        torch.testing.assert_close(packed_linear(input, packed, None, 40), expected, atol=1e-4, rtol=1e-5)
    negative, bias = torch.randn(3, 24, dtype=torch.complex64).conj().imag, torch.randn(80)[::2]
    expected = packed_linear_reference(negative, packed, bias, 40)
    torch.testing.assert_close(packed_linear(negative, packed, bias, 40), expected, atol=1e-4, rtol=1e-5)
    input = torch.randn(3, 24)
    input[0, 3], input[1, 5] = torch.nan, torch.inf
    output = packed_linear(input, packed, None, 40)
    assert output[0].isnan().all()
    assert output[1].isinf().all()
    assert output[2].isfinite().all()


def test_inputs_that_do_not_fit():
    """Refused, with what was expected and got; nothing is read beyond its end."""
    packed = pack_weight(torch.randn(40, 24))
    wrong_inputs = [torch.randn(3, 24).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    for input in (torch.randn(3, 23), torch.randn(3, 24, device="meta"), *wrong_inputs):
        with pytest.raises(ValueError, match=r"input: expected float32 of shape \(\.\.\., 24\) on the CPU, got"):
            packed_linear(input, packed, None, 40)
    of_half = pack_weight(torch.randn(40, 24).half())
    with pytest.raises(ValueError, match=r"input: expected float32 or float16 of shape \(\.\.\., 24\) on the CPU, got bfloat16"):
        packed_linear(torch.randn(3, 24).bfloat16(), of_half, None, 40)
    with pytest.raises(ValueError, match=r"bias: expected float16 of shape \(40,\) on the CPU, got float32"):
        packed_linear(torch.randn(3, 24).half(), of_half, torch.randn(40), 40)
    for wrong in (packed[:-1], packed.transpose(1, 2).contiguous(), packed.double(), packed.transpose(0, 1)):
        with pytest.raises(ValueError, match="packed: expected what pack_weight makes of a weight of 90 rows, got|input: expected"):
            packed_linear(torch.randn(3, 24), wrong, None, 90)
    for bias in (torch.randn(39), torch.randn(40).bfloat16(), torch.randn(40, device="meta")):
        with pytest.raises(ValueError, match=r"bias: expected float32 of shape \(40,\) on the CPU, got"):
            packed_linear(torch.randn(3, 24), packed, bias, 40)


def test_it_is_compiled_once_and_kept(cache_folder, monkeypatch):
    """A later process loads what an earlier one compiled; other code has another name."""
    assert packed_linear_is_available()
    (kept,) = cache_folder.iterdir()
    packed_linear_file._built.cache_clear()
    monkeypatch.setattr(cpp, "_compiled", lambda *arguments: pytest.fail("compiled again"))
    assert packed_linear_is_available()
    monkeypatch.undo()
    monkeypatch.setattr(cpp.constants, "HF_HOME", str(cache_folder.parents[1]))
    monkeypatch.setattr(packed_linear_file, "_SOURCE", packed_linear_file._SOURCE + "// changed\n")
    packed_linear_file._built.cache_clear()
    assert packed_linear_is_available()
    assert len(list(cache_folder.iterdir())) == 2
    assert kept.is_file()


@pytest.mark.parametrize("fails", ["folder", "copy", "load"])
def test_a_cache_folder_that_cannot_be_used(fails, cache_folder, tmp_path, monkeypatch):
    """A file in its place, a full disk, a disk from which nothing may be run: the process compiles for itself."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    load = cpp._load

    def refuse(*paths):
        raise OSError("not here")

    if fails == "folder":
        cache_folder.parent.write_text("a file")
    elif fails == "copy":
        monkeypatch.setattr(shutil, "copyfile", refuse)
    else:
        monkeypatch.setattr(cpp, "_load", lambda path: refuse() if cache_folder in path.parents else load(path))
    assert packed_linear_is_available()
    packed = pack_weight(torch.eye(3))
    assert torch.equal(packed_linear(torch.eye(3), packed, None, 3), torch.eye(3))
    assert not any(temporary.iterdir())


def test_a_compiler_that_does_not_work(cache_folder, monkeypatch):
    """`g++` takes its place."""
    monkeypatch.setenv("CXX", "no-such-compiler 'with an open quote")
    assert packed_linear_is_available()


@pytest.mark.parametrize("compiler", ["no-such-compiler", f"{sys.executable} -c raise(SystemExit(3))"])
def test_without_a_compiler(compiler, cache_folder, tmp_path, monkeypatch, caplog):
    """It is not there, and a log says why; nothing is left behind."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with caplog.at_level(logging.INFO):
        assert not packed_linear_is_available()
    assert "would be faster with packed_linear: expected a C++ compiler" in caplog.text
    assert not cache_folder.exists()
    assert not any(temporary.iterdir())
    with pytest.raises(ValueError, match=r"packed_linear: expected a C\+\+ compiler"):
        packed_linear(torch.randn(1, 2), torch.zeros(1, 2, 32), None, 3)


def test_a_file_that_is_no_library(cache_folder, tmp_path, monkeypatch):
    """It is compiled again."""
    assert packed_linear_is_available()
    (kept,) = cache_folder.iterdir()
    # In another folder, since a process opens a library once.
    broken = tmp_path / "other" / "prism" / "kernels" / kept.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    monkeypatch.setattr(cpp.constants, "HF_HOME", str(tmp_path / "other"))
    packed_linear_file._built.cache_clear()
    assert packed_linear_is_available()
    assert broken.stat().st_size == kept.stat().st_size


def test_the_kernel_of_a_cpu_without_avx512():
    """Half as wide; torch takes it for an older CPU."""
    script = _CHECK.format(cpu="AVX2", shapes=SHAPES, num_rows=NUM_ROWS, dtypes=DTYPES)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr


def test_another_cpu(monkeypatch, fresh_kernels):
    """Not available, and said."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not packed_linear_is_available()
    assert why_no_packed_linear() == "expected a CPU with AVX2 or AVX-512, got DEFAULT"
