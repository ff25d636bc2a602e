"""A linear layer over a few rows on a CPU, in the time that its weight takes to arrive from memory.

    output[m, n]    = sum of input[m, k] * weight[n, k] over k, in float32, + bias[n]
    packed[p, k, c] = weight[p * C + c, k], zero beyond the last row: panels of C outputs, in the order in which they are read

For 2 to 30 rows, torch's products wait for the weight first and compute then. Here each core reads its panels in order, and
while it multiplies one it has memory send the next, so that eight rows take little longer than one. The weight is float32 or
float16, and is read once: N * K * 4 or 2 bytes.

A row is summed in the same order whatever the number of rows, in parts of 256: its output is the same, bit for bit, whether it
is computed alone or with others.

The kernel is C++, compiled when it is first needed, in a second or two, by the compiler that `CXX` names, or by `g++`. The
result is kept in the Hugging Face cache folder. It uses the threads of torch's own OpenMP, which is GNU's. Without a compiler
for that, or on other CPUs than x86 with AVX2 or AVX-512, it is not available.
Shape letters: M rows, K inputs, N outputs, P panels, C outputs of a panel.
"""

import contextlib
import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from ..whole_files import name_of_parts, whole_file

logger = logging.getLogger(__name__)

# By what torch says of the CPU: floats in a register, rows whose sums fit the registers, and options of the compiler.
_CPUS = {"AVX512": (16, 12, "-mavx512f -mfma -mf16c"), "AVX2": (8, 6, "-mavx2 -mfma -mf16c")}
_COMPILE_SECONDS = 120
_SOURCE = r"""
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <immintrin.h>

constexpr long PART = 256, LINE = 64, PANEL = 2 * WIDTH;
typedef float Floats __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

static inline Floats load(const float* weights) { return *(const Floats*)weights; }
static inline Floats load(const uint16_t* weights) {
#if WIDTH == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)weights));
#else
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)weights));
#endif
}

static inline Floats add_product(float value, Floats weights, Floats sum) {
#if WIDTH == 16
  return (Floats)_mm512_fmadd_ps(_mm512_set1_ps(value), (__m512)weights, (__m512)sum);
#else
  return (Floats)_mm256_fmadd_ps(_mm256_set1_ps(value), (__m256)weights, (__m256)sum);
#endif
}

// ROWS rows times a panel. For each k memory is asked for `bytes` more at `ahead`.
template <typename T, int ROWS>
static void multiply(const float* input, long K, const T* panel, float* output, long N, const float* bias, long count,
                     const char* ahead, long bytes) {
  Floats sums[ROWS][2] = {};
  for (long start = 0; start < K; start += PART) {
    Floats part[ROWS][2] = {};
    for (long k = start; k < std::min(start + PART, K); ++k, panel += PANEL, ahead += bytes) {
      __builtin_prefetch(ahead, 0, 2);
      if (bytes > LINE) __builtin_prefetch(ahead + LINE, 0, 2);
      const Floats left = load(panel), right = load(panel + WIDTH);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const float value = input[row * K + k];
        part[row][0] = add_product(value, left, part[row][0]);
        part[row][1] = add_product(value, right, part[row][1]);
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      sums[row][0] += part[row][0];
      sums[row][1] += part[row][1];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    const float* sum = (const float*)sums[row];
    for (long n = 0; n < count; ++n) output[row * N + n] = bias ? sum[n] + bias[n] : sum[n];
  }
}

// The same for a number of rows that is only known now.
template <typename T, int ROWS = MOST_ROWS, typename... Rest>
static void multiply_rows(long rows, Rest... rest) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return multiply_rows<T, ROWS - 1>(rows, rest...);
  multiply<T, ROWS>(rest...);
}

template <typename T>
static void linear(const float* input, const T* packed, const float* bias, float* output, long M, long K, long N, int threads) {
  if (M == 0) return;
  const long panels = (N + PANEL - 1) / PANEL, blocks = (M + MOST_ROWS - 1) / MOST_ROWS;
  const long bytes = PANEL * sizeof(T) / blocks;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < panels; ++p) {
    const T* panel = packed + p * PANEL * K;
    // Each block of rows asks for its share of the next panel.
    const char* ahead = (const char*)(panel + PANEL * K);
    for (long block = 0, row = 0; block < blocks; ++block, ahead += bytes * K) {
      const long rows = (M - row + blocks - block - 1) / (blocks - block), n = p * PANEL;
      multiply_rows<T>(rows, input + row * K, K, panel, output + row * N + n, N, bias ? bias + n : nullptr,
                       std::min(PANEL, N - n), ahead, bytes);
      row += rows;
    }
  }
}

extern "C" void linear_float32(const float* input, const float* packed, const float* bias, float* output, long M, long K,
                               long N, int threads) {
  linear(input, packed, bias, output, M, K, N, threads);
}

extern "C" void linear_float16(const float* input, const uint16_t* packed, const float* bias, float* output, long M, long K,
                               long N, int threads) {
  linear(input, packed, bias, output, M, K, N, threads);
}
"""


def packed_linear_is_available() -> bool:
    """Whether the kernel can run here; compiles it if it has to be."""
    return why_no_packed_linear() is None


def why_no_packed_linear() -> str | None:
    """Why the kernel cannot run here, and what it would need; None if it can."""
    return _built()[1]


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight as the kernel reads it.

    Args:
        weight (`torch.Tensor` of shape `(N, K)`): float32 or float16, on the CPU.
    Returns:
        `torch.Tensor` of shape `(P, K, C)`.
    """
    panel = 2 * _CPUS[torch.backends.cpu.get_cpu_capability()][0]
    num_missing = -len(weight) % panel
    whole = torch.nn.functional.pad(weight, (0, 0, 0, num_missing)) if num_missing else weight
    return whole.reshape(-1, panel, weight.shape[1]).transpose(1, 2).contiguous()


def packed_linear_reference(
    input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> torch.Tensor:
    """The definition; see [`packed_linear`]."""
    weight = packed.transpose(1, 2).flatten(0, 1)[:num_outputs]
    return torch.nn.functional.linear(input, weight.float(), bias)


def packed_linear(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, num_outputs: int) -> torch.Tensor:
    """`input @ weight.T + bias`, without gradients.

    Args:
        input (`torch.Tensor` of shape `(..., K)`): float32, on the CPU.
        packed (`torch.Tensor` of shape `(P, K, C)`): from [`pack_weight`].
        bias (`torch.Tensor` of shape `(N,)`, *optional*): float32.
        num_outputs (`int`): N.
    Returns:
        `torch.Tensor` of shape `(..., N)`, float32.
    Raises:
        ValueError: if inputs and weight do not fit each other, or the kernel is not available here.
    """
    (kernels, reason), (num_panels, num_inputs, width) = _built(), packed.shape
    if reason is not None:
        raise ValueError(f"packed_linear: {reason}")
    if num_panels != -(-num_outputs // width) or packed.dtype not in kernels or not packed.is_contiguous():
        found = f"{packed.dtype}, {tuple(packed.shape)}"
        raise ValueError(f"packed: expected what pack_weight makes of a weight of {num_outputs} rows, got {found}")
    if input.dtype is not torch.float32 or not input.is_cpu or input.shape[-1] != num_inputs:
        found = f"{input.dtype}, {tuple(input.shape)} on {input.device}"
        raise ValueError(f"input: expected float32 of shape (..., {num_inputs}) on the CPU, got {found}")
    if bias is not None:
        if bias.dtype is not torch.float32 or not bias.is_cpu or bias.shape != (num_outputs,):
            found = f"{bias.dtype}, {tuple(bias.shape)} on {bias.device}"
            raise ValueError(f"bias: expected float32 of shape ({num_outputs},) on the CPU, got {found}")
        bias = bias.contiguous()
    input = input.resolve_neg().contiguous()
    output = input.new_empty((*input.shape[:-1], num_outputs))
    pointers = input.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), output.data_ptr()
    kernels[packed.dtype](*pointers, input.numel() // num_inputs, num_inputs, num_outputs, torch.get_num_threads())
    return output


@functools.cache
def _built() -> tuple[dict[torch.dtype, Any], str | None]:
    """The compiled functions, by the dtype of the weight; none, and the reason, where they cannot be had."""
    cpu = torch.backends.cpu.get_cpu_capability()
    if cpu not in _CPUS:
        return {}, f"expected a CPU with AVX2 or AVX-512, got {cpu}"
    width, most_rows, of_cpu = _CPUS[cpu]
    options = ["-O3", "-std=c++17", *of_cpu.split(), f"-DWIDTH={width}", f"-DMOST_ROWS={most_rows}"]
    path = Path(constants.HF_HOME) / "prism" / "kernels" / f"packed_linear_{name_of_parts([_SOURCE, options])}.so"
    with contextlib.suppress(OSError):  # absent, or not whole
        return _load(path), None
    found = []
    for compiler in dict.fromkeys((os.environ.get("CXX") or "g++", "g++")):
        with tempfile.TemporaryDirectory(prefix="prism_kernels_") as folder:
            try:
                library = _compiled([*shlex.split(compiler), *options], Path(folder))
                with contextlib.suppress(OSError):  # a folder that cannot be written, or from which nothing may be run
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(path) as unfinished:
                        shutil.copyfile(library, unfinished)
                    return _load(path), None
                return _load(library), None  # which may be removed once it is loaded
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                found.append(f"{compiler}: {(getattr(error, 'stderr', None) or error)!s}".strip())
    reason = f"expected a C++ compiler for GNU's OpenMP (g++, or what CXX names), got {'; '.join(found)}"
    logger.info("prepare_for_cpu would make forwards over a few tokens faster still: %s", reason)
    return {}, reason


def _compiled(command: list[str], folder: Path) -> Path:
    """The compiled source in a folder."""
    objects, library = folder / "packed_linear.o", folder / "packed_linear.so"
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    run([*command, "-fopenmp", "-fPIC", "-x", "c++", "-c", "-", "-o", str(objects)], input=_SOURCE)
    # Without -fopenmp, which would bring a second OpenMP, whose threads would compete with those of torch.
    run([*command, "-shared", str(objects), "-o", str(library)])
    return library


def _load(path: Path) -> dict[torch.dtype, Any]:
    """The functions in a compiled file."""
    library = ctypes.CDLL(str(path))
    kernels: dict[torch.dtype, Any] = {torch.float32: library.linear_float32, torch.float16: library.linear_float16}
    for kernel in kernels.values():
        kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_int]
        kernel.restype = None
    return kernels
