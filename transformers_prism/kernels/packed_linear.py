"""A linear layer over a few rows on a CPU, in the time that its weight takes to arrive from memory.

    output[m, n]    = sum of input[m, k] * weight[n, k] over k, in float32, + bias[n]
    packed[p, k, c] = weight[p * C + c, k], zero beyond the last row: panels of C outputs, in the order in which they are read

For 2 to 30 rows, torch's products wait for the weight first and compute then. Here each core reads its panels in order, and
while it multiplies one it has memory send the next, so that eight rows take little longer than one. The weight is read once:
N * K * 4 bytes in float32, 2 in float16 or bfloat16. Inputs and outputs have the weight's dtype, or are float32 with a weight in
float16. Sums are float32 always, and an output is rounded once.

A row is summed in the same order whatever the number of rows, in parts of 256: its output is the same, bit for bit, whether it
is computed alone or with others.

The kernel is C++ (see `cpp.py`).
Shape letters: M rows, K inputs, N outputs, P panels, C outputs of a panel.
"""

import ctypes
import functools
from typing import Any

import torch

from .cpp import compiled_library, vector_width
from .dispatch import dtype_name

_INPUT_AND_WEIGHT_DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
)
_WEIGHT_DTYPES = {weight for _, weight in _INPUT_AND_WEIGHT_DTYPES}
_SOURCE = r"""
constexpr long PART = 256, LINE = 64, PANEL = 2 * WIDTH;

// ROWS rows times a panel. For each k memory is asked for `bytes` more at `ahead`.
template <typename Weight, typename Value, int ROWS>
static void multiply(const float* input, long K, const Weight* panel, Value* output, long N, const Value* bias, long count,
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
  Value added[PANEL] = {}, rounded[PANEL];
  if (bias) memcpy(added, bias, count * sizeof(Value));
  for (int row = 0; row < ROWS; ++row) {
    for (int half = 0; half < 2; ++half)
      store(bias ? sums[row][half] + load(added + half * WIDTH) : sums[row][half], rounded + half * WIDTH);
    memcpy(output + row * N, rounded, count * sizeof(Value));
  }
}

// Whether there was enough memory.
template <typename Weight, typename Value>
static bool linear(const Value* given, const Weight* packed, const Value* bias, Value* output, long M, long K, long N,
                   int threads) {
  if (M == 0) return true;
  const long panels = (N + PANEL - 1) / PANEL, blocks = (M + MOST_ROWS - 1) / MOST_ROWS;
  const long bytes = PANEL * sizeof(Weight) / blocks;
  float* converted = nullptr;
  const float* input;
  if constexpr (std::is_same_v<Value, float>) {
    input = given;
  } else {
    input = converted = (float*)malloc(M * K * sizeof(float));
    if (!converted) return false;
    convert(given, M * K, converted);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long p = 0; p < panels; ++p) {
    const Weight* panel = packed + p * PANEL * K;
    // Each block of rows asks for its share of the next panel.
    const char* ahead = (const char*)(panel + PANEL * K);
    for (long block = 0, row = 0; block < blocks; ++block, ahead += bytes * K) {
      const long rows = (M - row + blocks - block - 1) / (blocks - block), n = p * PANEL;
      with_constant(rows, [&](auto count) {
        multiply<Weight, Value, decltype(count)::value>(input + row * K, K, panel, output + row * N + n, N,
                                                        bias ? bias + n : nullptr, std::min(PANEL, N - n), ahead, bytes);
      });
      row += rows;
    }
  }
  free(converted);
  return true;
}

#define EXPORT(NAME, WEIGHT, VALUE)                                                                                   \
  extern "C" bool NAME(const VALUE* input, const WEIGHT* packed, const VALUE* bias, VALUE* output, long M, long K, long N, \
                       int threads) {                                                                                 \
    return linear(input, packed, bias, output, M, K, N, threads);                                                     \
  }
EXPORT(float32_by_float32, float, float)
EXPORT(float32_by_float16, Float16, float)
EXPORT(float16_by_float16, Float16, Float16)
EXPORT(bfloat16_by_bfloat16, Bfloat16, Bfloat16)
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
        weight (`torch.Tensor` of shape `(N, K)`): float32, float16 or bfloat16, on the CPU.
    Returns:
        `torch.Tensor` of shape `(P, K, C)`.
    """
    panel = 2 * vector_width()
    num_missing = -len(weight) % panel
    whole = torch.nn.functional.pad(weight, (0, 0, 0, num_missing)) if num_missing else weight
    return whole.reshape(-1, panel, weight.shape[1]).transpose(1, 2).contiguous()


def packed_linear_reference(
    input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, num_outputs: int
) -> torch.Tensor:
    """The definition; see [`packed_linear`]."""
    weight = packed.transpose(1, 2).flatten(0, 1)[:num_outputs]
    output = torch.nn.functional.linear(input.float(), weight.float(), None if bias is None else bias.float())
    return output.to(input.dtype)


def packed_linear(input: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, num_outputs: int) -> torch.Tensor:
    """`input @ weight.T + bias`, without gradients.

    Args:
        input (`torch.Tensor` of shape `(..., K)`): of the weight's dtype, or float32 with a weight in float16; on the CPU.
        packed (`torch.Tensor` of shape `(P, K, C)`): from [`pack_weight`].
        bias (`torch.Tensor` of shape `(N,)`, *optional*): of the input's dtype.
        num_outputs (`int`): N.
    Returns:
        `torch.Tensor` of shape `(..., N)`, of the input's dtype.
    Raises:
        ValueError: if inputs and weight do not fit each other, or the kernel is not available here.
        MemoryError: if there is none left for the inputs in float32.
    """
    (kernels, reason), (num_panels, num_inputs, width) = _built(), packed.shape
    if reason is not None:
        raise ValueError(f"packed_linear: {reason}")
    if num_panels != -(-num_outputs // width) or packed.dtype not in _WEIGHT_DTYPES or not packed.is_contiguous():
        found = f"{packed.dtype}, {tuple(packed.shape)}"
        raise ValueError(f"packed: expected what pack_weight makes of a weight of {num_outputs} rows, got {found}")
    kernel = kernels.get((input.dtype, packed.dtype))
    if kernel is None or not input.is_cpu or input.shape[-1] != num_inputs:
        expected = " or ".join(dtype_name(value) for value, weight in _INPUT_AND_WEIGHT_DTYPES if weight is packed.dtype)
        found = f"{dtype_name(input.dtype)}, {tuple(input.shape)} on {input.device}"
        raise ValueError(f"input: expected {expected} of shape (..., {num_inputs}) on the CPU, got {found}")
    if bias is not None:
        if bias.dtype is not input.dtype or not bias.is_cpu or bias.shape != (num_outputs,):
            found = f"{dtype_name(bias.dtype)}, {tuple(bias.shape)} on {bias.device}"
            raise ValueError(f"bias: expected {dtype_name(input.dtype)} of shape ({num_outputs},) on the CPU, got {found}")
        bias = bias.contiguous()
    input = input.resolve_neg().contiguous()
    output = input.new_empty((*input.shape[:-1], num_outputs))
    pointers = input.data_ptr(), packed.data_ptr(), None if bias is None else bias.data_ptr(), output.data_ptr()
    if not kernel(*pointers, input.numel() // num_inputs, num_inputs, num_outputs, torch.get_num_threads()):
        raise MemoryError(f"packed_linear: expected memory for {input.numel()} numbers in float32, got none")
    return output


@functools.cache
def _built() -> tuple[dict[tuple[torch.dtype, torch.dtype], Any], str | None]:
    """The compiled functions, by the dtypes of input and weight; none, and the reason, where they cannot be had."""
    library, reason = compiled_library("packed_linear", _SOURCE)
    kernels = {}
    for value, weight in _INPUT_AND_WEIGHT_DTYPES if library is not None else ():
        kernel = kernels[value, weight] = getattr(library, f"{dtype_name(value)}_by_{dtype_name(weight)}")
        kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_int]
        kernel.restype = ctypes.c_bool
    return kernels, reason
