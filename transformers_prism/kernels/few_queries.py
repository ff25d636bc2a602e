"""Attention of a few queries over many keys on a CPU: the nodes of a tree, over the keys that each of them sees.

A query's output is the same, bit for bit, whatever the other queries, the keys that it does not see and the number of threads
are. So a node gets what the token at its place of the text will get in a step of plain decoding, and a target whose other
layers keep to that, too, writes the same text with and without a draft.

    scores[b, h, n, k]  = scale * query[b, h, n] . key[b, g, k], minus infinity where visible[b, n, k] is False
    output[b, n, h]     = sum of softmax(scores)[b, h, n, k] * value[b, g, k] over k,        g = h // (H / G)

Where nothing is visible, the output is 0. Keys and values are read once for all queries of a group, in parts of PART keys; a part
takes its scores, their largest value, its sum of exponentials and its weighted values, and these are joined in the order of the
parts. Parts that no query sees are not read. While a core computes scores, it has memory send the values, and while it weighs
these, the keys of its next part. Bytes moved: keys and values once, B * G * K * (E + V) times their size, and B * H * N * V * 4 for
what each part has weighed, written and read.

A part is one of the text, not of the cache: nodes of a tree lie behind the text so far, whatever place of the text they are for. So
the keys from a whole part on (`Tail`) may be read several times, each time with the mask of one part of the text. Hidden keys
weigh 0, which changes no sum.

The lanes of a register are queries while scores are computed, so that no sum goes across a register. All sums are in float32. The
kernel is C++ (see `cpp.py`), for float32, float16 and bfloat16.
Shape letters: B sequences, H heads, G groups of heads that share keys, N queries, K keys, E head size, V head size of values.
Source: parts joined as in flash-decoding (Dao et al. 2023); the exponential is that of Cephes.
"""

import ctypes
import functools
import threading
from typing import Any, NamedTuple

import torch

from .cpp import compiled_library, vector_width
from .dispatch import dtype_name

# More queries are those of a prompt.
MAX_QUERIES = 128
# Keys of a part: so many that what they weigh is soon more than what each part leaves, so few that several threads have work.
PART = 256
# Floats that each thread keeps for later calls at most, since fresh pages take longer than a short attention.
_KEPT = 2**22
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_scratch = threading.local()
_SOURCE = r"""
#include <math.h>
#include <omp.h>

constexpr long PART = PARTS_KEYS;

struct Sizes {
  long B, H, G, N, K, E, V, width, start, tails, threads;  // visible has `width` keys, whole parts end at key `start`
  long query[3], key[3], value[3];  // strides of sequence, head or group, and query or key
  long tail[3];                     // of sequence, part and query

  long rows() const { return H / G * N; }
  long lanes() const { return (rows() + WIDTH - 1) / WIDTH * WIDTH; }
  long parts() const { return start / PART + tails; }
  long longest() const { return start ? std::max(PART, K - start) : K - start; }
  long of_part() const { return 2 * lanes() + rows() * V; }  // numbers that a part leaves
};

static inline Floats larger(Floats left, Floats right) { return left > right ? left : right; }

// e^x for x <= 0, within two units of the last place; 0 below -87, NaN of NaN.
static inline Floats exponential(Floats x) {
  constexpr float SHIFT = 12582912.0f;  // numbers near it are integers
  const Floats shifted = x * 1.44269504f + SHIFT, n = shifted - SHIFT;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * r + 8.3334519073e-3f;
  sum = sum * r + 4.1665795894e-2f;
  sum = sum * r + 1.6666665459e-1f;
  sum = sum * r + 5.0000001201e-1f;
  sum = sum * r * r + r + 1.0f;
  const Floats power = (Floats)((Bits)sum + ((Bits)shifted << 23));
  return x < -87.0f ? Floats{} : (x == x ? power : x);
}

// Scores of KEYS keys for a register of queries, given as E rows of L numbers. For each e memory is asked for `bytes` more at
// `ahead`.
template <int KEYS>
static void score(const float* queries, long L, long E, const float* key, long stride, float* scores, const char* ahead,
                  long bytes) {
  Floats sums[KEYS] = {};
  for (long e = 0; e < E; ++e, ahead += bytes) {
    __builtin_prefetch(ahead, 0, 2);
    const Floats one = load(queries + e * L);
#pragma GCC unroll 16
    for (int k = 0; k < KEYS; ++k) sums[k] = add_product(key[k * stride + e], one, sums[k]);
  }
  for (int k = 0; k < KEYS; ++k) store(sums[k], scores + k * L);
}

// Values weighted by ROWS queries, a register of each value. For each k memory is asked for `bytes` more at `ahead`.
template <int ROWS>
static void weigh(const float* weights, long L, long count, const float* value, long stride, float* output, long length,
                  const char* ahead, long bytes) {
  Floats sums[ROWS] = {};
  for (long k = 0; k < count; ++k, ahead += bytes) {
    __builtin_prefetch(ahead, 0, 2);
    const Floats one = load(value + k * stride);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) sums[row] = add_product(weights[k * L + row], one, sums[row]);
  }
  for (int row = 0; row < ROWS; ++row) store(sums[row], output + row * length);
}

// One part: the largest score and the sum of exponentials of each query, and its weighted values. `visible` has a row of `step`
// for each query.
static void attend(const Sizes& s, const float* queries, const float* key, long key_step, const float* value, long value_step,
                   const uint8_t* visible, long step, long count, float* scores, float* largest) {
  const long rows = s.rows(), L = s.lanes();
  float *total = largest + L, *weighted = total + L;
  bool is_seen = !visible;
  for (long n = 0; n < s.N && !is_seen; ++n) is_seen = memchr(visible + n * step, 1, count);
  if (!is_seen) {
    std::fill(largest, largest + L, -INFINITY);
    memset(total, 0, L * sizeof(float));
    memset(weighted, 0, rows * s.V * sizeof(float));
    return;
  }
  // Each register of queries asks for its share of the values, and each pass over the values for its share of the next keys.
  const long registers = L / WIDTH, passes = (rows + MOST_ROWS - 1) / MOST_ROWS * ((s.V + WIDTH - 1) / WIDTH);
  for (long lane = 0; lane < L; lane += WIDTH) {
    const long values = count * value_step * sizeof(float) / registers;
    const char* ahead = (const char*)value + lane / WIDTH * values;
    for (long k = 0; k < count; k += MOST_ROWS)
      with_constant(count - k, [&](auto keys) {
        score<decltype(keys)::value>(queries + lane, L, s.E, key + k * key_step, key_step, scores + k * L + lane,
                                     ahead + values / count * k, values / count * MOST_ROWS / s.E);
      });
  }
  for (long n = 0; visible && n < s.N; ++n)
    if (memchr(visible + n * step, 0, count))
      for (long k = 0; k < count; ++k)
        if (!visible[n * step + k])
          for (long row = n; row < rows; row += s.N) scores[k * L + row] = -INFINITY;
  for (long lane = 0; lane < L; lane += WIDTH) {
    Floats most = Floats{} - INFINITY, sum = {};
    for (long k = 0; k < count; ++k) most = larger(most, load(scores + k * L + lane));
    store(most, largest + lane);
    const Floats from = most == -INFINITY ? Floats{} : most;  // where nothing is visible
    for (long k = 0; k < count; ++k) {
      const Floats weight = exponential(load(scores + k * L + lane) - from);
      store(weight, scores + k * L + lane);
      sum += weight;
    }
    store(sum, total + lane);
  }
  const long keys = count * key_step * sizeof(float) / passes;
  const char* ahead = (const char*)(key + count * key_step);
  for (long row = 0; row < rows; row += MOST_ROWS)
    for (long v = 0; v < s.V; v += WIDTH, ahead += keys)
      with_constant(rows - row, [&](auto some) {
        weigh<decltype(some)::value>(scores + row, L, count, value + v, value_step, weighted + row * s.V + v, s.V, ahead,
                                     keys / count);
      });
}

// Rows of numbers as floats, in `memory` if they have 16 bits; `step` becomes the distance between rows.
static const float* as_floats(const float* values, long, long, float*, long&) { return values; }
template <typename Value>
static const float* as_floats(const Value* values, long count, long length, float* memory, long& step) {
  for (long row = 0; row < count; ++row) convert(values + row * step, length, memory + row * length);
  step = length;
  return memory;
}

extern "C" long few_queries_scratch(const Sizes* sizes) {
  const Sizes& s = *sizes;
  return s.B * s.G * (s.E * s.lanes() + s.parts() * s.of_part()) + s.threads * s.longest() * (s.lanes() + s.E + s.V);
}

template <typename Value>
static void few_queries(const Value* query, const Value* key, const Value* value, const uint8_t* visible, const uint8_t* tail,
                        Value* output, float* memory, const Sizes& s, float scale) {
  const long shared = s.H / s.G, rows = s.rows(), L = s.lanes(), groups = s.B * s.G, parts = s.parts(), of_part = s.of_part();
  const long of_queries = s.E * L, whole = s.start / PART;
  float *queries = memory, *done = queries + groups * of_queries, *scratch = done + groups * parts * of_part;
#pragma omp parallel num_threads(s.threads)
  {
    float* scores = scratch + omp_get_thread_num() * s.longest() * (L + s.E + s.V);
    float *keys = scores + s.longest() * L, *values = keys + s.longest() * s.E;
#pragma omp for schedule(static)
    for (long group = 0; group < groups; ++group)
      for (long row = 0; row < L; ++row) {
        const long head = group % s.G * shared + row / s.N;
        float* to = queries + group * of_queries + row;
        if (row < rows) {
          long step = s.E;
          const Value* given = query + group / s.G * s.query[0] + head * s.query[1] + row % s.N * s.query[2];
          const float* from = as_floats(given, 1, s.E, keys, step);
          for (long e = 0; e < s.E; ++e) to[e * L] = from[e] * scale;
        } else {
          for (long e = 0; e < s.E; ++e) to[e * L] = 0.0f;
        }
      }
#pragma omp for schedule(static)
    for (long task = 0; task < groups * parts; ++task) {
      const long group = task / parts, place = task % parts, b = group / s.G, g = group % s.G;
      const bool is_whole = place < whole;
      const long first = is_whole ? place * PART : s.start, count = is_whole ? PART : s.K - s.start;
      const uint8_t* seen = nullptr;
      if (is_whole && visible) seen = visible + b * s.N * s.width + first;
      if (!is_whole && tail) seen = tail + b * s.tail[0] + (place - whole) * s.tail[1];
      long key_step = s.key[2], value_step = s.value[2];
      const float* of_keys = as_floats(key + b * s.key[0] + g * s.key[1] + first * s.key[2], count, s.E, keys, key_step);
      const float* of_values = as_floats(value + b * s.value[0] + g * s.value[1] + first * s.value[2], count, s.V, values, value_step);
      attend(s, queries + group * of_queries, of_keys, key_step, of_values, value_step, seen, is_whole ? s.width : s.tail[2], count,
             scores, done + task * of_part);
    }
#pragma omp for schedule(static)
    for (long group = 0; group < groups; ++group) {
      float* first = done + group * parts * of_part;
      for (long lane = 0; lane < L; lane += WIDTH) {
        Floats most = Floats{} - INFINITY, sum = {};
        for (long p = 0; p < parts; ++p) most = larger(most, load(first + p * of_part + lane));
        most = most == -INFINITY ? Floats{} : most;
        for (long p = 0; p < parts; ++p) {
          float* part = first + p * of_part + lane;
          const Floats factor = exponential(load(part) - most);
          sum += factor * load(part + L);
          store(factor, part);
        }
        const Floats inverse = sum == 0.0f ? Floats{} : 1.0f / sum;
        for (long p = 0; p < parts; ++p) store(load(first + p * of_part + lane) * inverse, first + p * of_part + lane);
      }
    }
#pragma omp for schedule(static)
    for (long task = 0; task < groups * rows; ++task) {
      const long group = task / rows, row = task % rows, head = group % s.G * shared + row / s.N;
      Value* to = output + ((group / s.G * s.N + row % s.N) * s.H + head) * s.V;
      for (long v = 0; v < s.V; v += WIDTH) {
        Floats sum = {};
        for (long p = 0; p < parts; ++p) {
          const float* part = done + (group * parts + p) * of_part;
          sum = add_product(part[row], load(part + 2 * L + row * s.V + v), sum);
        }
        store(sum, to + v);
      }
    }
  }
}

#define EXPORT(NAME, VALUE)                                                                                               \
  extern "C" void NAME(const VALUE* query, const VALUE* key, const VALUE* value, const uint8_t* visible, const uint8_t* tail, \
                       VALUE* output, float* memory, const Sizes* sizes, float scale) {                                   \
    few_queries(query, key, value, visible, tail, output, memory, *sizes, scale);                                         \
  }
EXPORT(few_queries_float32, float)
EXPORT(few_queries_float16, Float16)
EXPORT(few_queries_bfloat16, Bfloat16)
"""


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("B", "H", "G", "N", "K", "E", "V", "width", "start", "tails", "threads")),
        *((name, ctypes.c_long * 3) for name in ("query", "key", "value", "tail")),
    ]


class Tail(NamedTuple):
    """What queries see of the last keys, by part of the text.

    Args:
        start (`int`): the first of these J keys, a multiple of PART; before it a key's index is its place in the text.
        visible (`torch.BoolTensor` of shape `(B, T, N, J)`): of T parts of the text in order, what each query sees.
    """

    start: int
    visible: torch.Tensor


def few_queries_is_available() -> bool:
    """Whether the kernel can run here; compiles it if it has to be."""
    return _built() is not None


def serves_few_queries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel can serve these, and is there; arguments as for [`few_queries_attention`]."""
    states, (num_rows, num_heads, num_queries, head_dim), num_groups = (query, key, value), query.shape, key.shape[1]
    if num_queries > MAX_QUERIES or not head_dim or not num_groups or num_heads % num_groups:
        return False
    # SDPA would broadcast sizes of 1.
    if (num_rows, head_dim) != (len(key), key.shape[3]) or key.shape[:3] != value.shape[:3]:
        return False
    # Under autocast the dtypes differ. Subclasses may only stand for a tensor, as all do while a graph is traced.
    if query.dtype not in _DTYPES or any(type(one) is not torch.Tensor or one.dtype is not query.dtype or not one.is_cpu for one in states):
        return False
    if any(one.stride(3) != 1 or one.requires_grad or one.is_neg() for one in states) or torch.jit.is_tracing():
        return False
    return not torch.compiler.is_compiling() and few_queries_is_available() and value.shape[3] % vector_width() == 0


def few_queries_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float, tail: Tail | None = None
) -> torch.Tensor:
    """The definition; see [`few_queries_attention`]."""
    if tail is not None:
        before = query.new_ones((len(query), query.shape[2], tail.start), dtype=torch.bool) if visible is None else visible[..., : tail.start]
        visible = torch.cat((before, tail.visible.any(dim=1)), dim=-1)
        key, value = key[:, :, : visible.shape[-1]], value[:, :, : visible.shape[-1]]
    num_shared = query.shape[1] // key.shape[1]
    key, value = (states.float().repeat_interleave(num_shared, dim=1) for states in (key, value))
    scores = scale * query.float() @ key.transpose(2, 3)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num() @ value).transpose(1, 2).to(query.dtype)


def few_queries_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float, tail: Tail | None = None
) -> torch.Tensor:
    """Attention of each query over the keys that it sees, without gradients.

    Args:
        query (`torch.Tensor` of shape `(B, H, N, E)`): float32, float16 or bfloat16, on the CPU; N is at most MAX_QUERIES. The last
            dimension of all three is contiguous.
        key (`torch.Tensor` of shape `(B, G, K, E)`), value (`torch.Tensor` of shape `(B, G, K, V)`): V fills whole registers.
        visible (`torch.BoolTensor` of shape `(B, N, K)`, *optional*): what each query sees; everything if absent.
        scale (`float`): of the scores.
        tail (`Tail`, *optional*): the last keys by part of the text, which counts in place of `visible` there; keys behind its J
            are not read. Without it a key's index is its place in the text.
    Returns:
        `torch.Tensor` of shape `(B, N, H, V)`, contiguous.
    Raises:
        ValueError: if the kernel does not serve these (see [`serves_few_queries`]).
    """
    if not serves_few_queries(query, key, value):
        found = ", ".join(f"{states.dtype} {tuple(states.shape)}" for states in (query, key, value))
        raise ValueError(f"few_queries_attention: expected what serves_few_queries accepts, got {found}")
    (num_rows, _, num_queries, _), num_keys = query.shape, key.shape[2]
    wanted: tuple[int, ...] = (num_rows, num_queries, num_keys)
    if visible is not None and (visible.dtype is not torch.bool or visible.shape != wanted):
        found = f"{visible.dtype} {tuple(visible.shape)}"
        raise ValueError(f"few_queries_attention: expected visible as torch.bool {wanted}, got {found}")
    if tail is not None:
        given, (_, num_tails, _, num_last) = tail.visible, tail.visible.shape
        wanted = (num_rows, num_tails, num_queries, num_last)
        if given.dtype is not torch.bool or given.shape != wanted or tail.start % PART or tail.start + num_last > num_keys:
            found = f"{given.dtype} {tuple(given.shape)} from key {tail.start} on"
            raise ValueError(f"few_queries_attention: expected tail as torch.bool (B, T, N, J) from a whole part on, got {found}")
    return attend_served(query, key, value, visible, scale, tail)


def attend_served(query, key, value, visible, scale: float, tail: Tail | None = None) -> torch.Tensor:
    """[`few_queries_attention`] of arguments that are known to fit, for each layer of each forward."""
    (num_rows, num_heads, num_queries, head_dim), (_, num_groups, num_keys, _) = query.shape, key.shape
    output = query.new_empty((num_rows, num_queries, num_heads, value.shape[3]))
    if not (output.numel() and num_keys):
        return output.zero_()
    visible = None if visible is None else visible.contiguous()
    of_tail = None if tail is None else tail.visible.contiguous()
    if of_tail is None:
        start, num_tails = (num_keys - 1) // PART * PART, 1
        last_parts = None if visible is None else visible.data_ptr() + start
        of_tails: tuple[int, ...] = (num_queries * num_keys, 0, num_keys)
    else:
        start, num_tails, of_tails = tail.start, of_tail.shape[1], tuple(of_tail.stride()[:3])  # type: ignore[union-attr]
        last_parts = of_tail.data_ptr()
    width, num_keys = num_keys, num_keys if of_tail is None else start + of_tail.shape[3]
    num_threads = min(torch.get_num_threads(), num_rows * num_groups * (start // PART + num_tails))
    counts = (num_rows, num_heads, num_groups, num_queries, num_keys, head_dim, value.shape[3], width, start, num_tails, num_threads)
    sizes, memory = _sizes_and_memory(counts, (query.stride()[:3], key.stride()[:3], value.stride()[:3], of_tails))
    seen = None if visible is None else visible.data_ptr()
    given = (query.data_ptr(), key.data_ptr(), value.data_ptr(), seen, last_parts, output.data_ptr(), memory.data_ptr())
    _built()[0][query.dtype](*given, sizes, scale)  # type: ignore[index]
    return output


def _sizes_and_memory(counts: tuple, strides: tuple) -> tuple[_Sizes, torch.Tensor]:
    """The kernel's sizes and its memory, made anew where they differ from those of this thread's last call: all layers of a forward
    have the same."""
    last, sizes, memory = vars(_scratch).get("last", (None, None, None))
    if last != (counts, strides):
        sizes = _Sizes(*counts, *((ctypes.c_long * 3)(*one) for one in strides))
        length = _built()[1](sizes)  # type: ignore[index]
        if memory is None or memory.numel() < length:
            memory = torch.empty(length, dtype=torch.float32, device="cpu")
        if memory.numel() <= _KEPT:
            _scratch.last = (counts, strides), sizes, memory
    return sizes, memory


@functools.cache
def _built() -> tuple[dict[torch.dtype, Any], Any] | None:
    """The compiled functions by dtype, and that for the length of their memory; None where they cannot be had."""
    library, _ = compiled_library("few_queries", _SOURCE.replace("PARTS_KEYS", str(PART)))
    if library is None:
        return None
    kernels = {dtype: getattr(library, f"few_queries_{dtype_name(dtype)}") for dtype in _DTYPES}
    for kernel in kernels.values():
        kernel.argtypes = [ctypes.c_void_p] * 7 + [ctypes.POINTER(_Sizes), ctypes.c_float]
        kernel.restype = None
    library.few_queries_scratch.argtypes = [ctypes.POINTER(_Sizes)]
    library.few_queries_scratch.restype = ctypes.c_long
    return kernels, library.few_queries_scratch
