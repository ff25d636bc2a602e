"""Kernels in C++ for CPUs: compiled where they run, when they are first needed, in a second or two each.

The compiler is the one that `CXX` names, or `g++`. What it makes is kept in the Hugging Face cache folder. Kernels use the
threads of torch's own OpenMP, which is GNU's. Without a compiler for that, or on other CPUs than x86 with AVX2 or AVX-512,
there are none.
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

import torch
from huggingface_hub import constants

from ..whole_files import name_of_parts, whole_file

logger = logging.getLogger(__name__)

# By what torch says of the CPU: floats in a register, rows of two registers whose sums fit the registers, and options of the
# compiler.
_CPUS = {"AVX512": (16, 12, "-mavx512f -mfma -mf16c"), "AVX2": (8, 6, "-mavx2 -mfma -mf16c")}
_COMPILE_SECONDS = 120
_PRELUDE = r"""
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

typedef float Floats __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));

static inline Floats load(const float* values) { return *(const Floats*)values; }
static inline void store(Floats values, float* output) { *(Floats*)output = values; }

struct Float16 { uint16_t bits; };
struct Bfloat16 { uint16_t bits; };

#if WIDTH == 16
static inline Floats load(const Float16* values) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)values));
}
static inline Floats load(const Bfloat16* values) {
  return (Floats)((Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values)) << 16);
}
static inline void store_low_halves(Bits values, Bfloat16* output) {
  _mm256_storeu_si256((__m256i*)output, _mm512_cvtepi32_epi16((__m512i)values));
}
#else
static inline Floats load(const Float16* values) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)values)); }
static inline Floats load(const Bfloat16* values) {
  return (Floats)((Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)values)) << 16);
}
static inline void store_low_halves(Bits values, Bfloat16* output) {
  const __m128i low = _mm256_castsi256_si128((__m256i)values), high = _mm256_extracti128_si256((__m256i)values, 1);
  _mm_storeu_si128((__m128i*)output, _mm_packus_epi32(low, high));
}
#endif

// Rounded to the nearest, of two the even one.
static inline void store(Floats values, Float16* output) {
#if WIDTH == 16
  _mm256_storeu_si256((__m256i*)output, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128((__m128i*)output, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
#endif
}
static inline void store(Floats values, Bfloat16* output) {
  const Bits bits = (Bits)values, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  // Rounding up could make a NaN zero.
  store_low_halves(values == values ? rounded : Bits{} + 0x7fc0, output);
}

// Numbers of 16 bits as floats.
template <typename Value>
static inline void convert(const Value* values, long count, float* floats) {
  long place = 0;
  for (; place + WIDTH <= count; place += WIDTH) store(load(values + place), floats + place);
  Value last[WIDTH] = {};
  float converted[WIDTH];
  memcpy(last, values + place, (count - place) * sizeof(Value));
  store(load(last), converted);
  memcpy(floats + place, converted, (count - place) * sizeof(float));
}

static inline Floats add_product(float value, Floats factors, Floats sum) {
#if WIDTH == 16
  return (Floats)_mm512_fmadd_ps(_mm512_set1_ps(value), (__m512)factors, (__m512)sum);
#else
  return (Floats)_mm256_fmadd_ps(_mm256_set1_ps(value), (__m256)factors, (__m256)sum);
#endif
}

// Calls a function with a number of 1 to MOST_ROWS, known only now, as a constant.
template <int COUNT = MOST_ROWS, typename Function>
static inline void with_constant(long count, Function function) {
  if constexpr (COUNT > 1)
    if (count < COUNT) return with_constant<COUNT - 1>(count, function);
  function(std::integral_constant<int, COUNT>());
}
"""


def vector_width() -> int:
    """Floats in a register of this CPU, as far as kernels use them."""
    return _CPUS[torch.backends.cpu.get_cpu_capability()][0]


def compiled_library(name: str, source: str) -> tuple[ctypes.CDLL | None, str | None]:
    """A library with the functions of a source; None, and the reason, where it cannot be had.

    Args:
        name (`str`): of the kernel.
        source (`str`): C++17, with `Floats` of `WIDTH` numbers, and `MOST_ROWS`, the rows of two such whose sums fit the registers.
    """
    cpu = torch.backends.cpu.get_cpu_capability()
    if cpu not in _CPUS:
        return None, f"expected a CPU with AVX2 or AVX-512, got {cpu}"
    width, most_rows, of_cpu = _CPUS[cpu]
    options = ["-O3", "-std=c++17", *of_cpu.split(), f"-DWIDTH={width}", f"-DMOST_ROWS={most_rows}"]
    source = _PRELUDE + source
    path = Path(constants.HF_HOME) / "prism" / "kernels" / f"{name}_{name_of_parts([source, options])}.so"
    with contextlib.suppress(OSError):  # absent, or not whole
        return _load(path), None
    found = []
    for compiler in dict.fromkeys((os.environ.get("CXX") or "g++", "g++")):
        with tempfile.TemporaryDirectory(prefix="prism_kernels_") as folder:
            try:
                library = _compiled([*shlex.split(compiler), *options], source, Path(folder))
                with contextlib.suppress(OSError):  # a folder that cannot be written, or from which nothing may be run
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with whole_file(path) as unfinished:
                        shutil.copyfile(library, unfinished)
                    return _load(path), None
                return _load(library), None  # which may be removed once it is loaded
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                found.append(f"{compiler}: {(getattr(error, 'stderr', None) or error)!s}".strip())
    reason = f"expected a C++ compiler for GNU's OpenMP (g++, or what CXX names), got {'; '.join(found)}"
    logger.info("forwards over a few tokens would be faster with %s: %s", name, reason)
    return None, reason


def _compiled(command: list[str], source: str, folder: Path) -> Path:
    """The compiled source in a folder."""
    objects, library = folder / "kernel.o", folder / "kernel.so"
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
    run([*command, "-fopenmp", "-fPIC", "-x", "c++", "-c", "-", "-o", str(objects)], input=source)
    # Without -fopenmp, which would bring a second OpenMP, whose threads would compete with those of torch.
    run([*command, "-shared", str(objects), "-o", str(library)])
    return library


def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
