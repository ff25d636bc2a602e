"""Attention of a few queries over many keys on a CPU: the nodes of a tree, over the keys that each of them sees.

    scores[b, h, n, k]  = scale * query[b, h, n] . key[b, g, k], minus infinity where visible[b, n, k] is False
    output[b, n, h]     = sum of softmax(scores)[b, h, n, k] * value[b, g, k] over k,        g = h // (H / G)

Where nothing is visible, the output is 0. Keys and values are read once for all queries of a group, in parts; a part takes its
scores, their largest value, its sum of exponentials and its weighted values, and these are joined in the order of the parts. So the
output is the same, bit for bit, for any number of threads. Bytes moved: keys and values once, B * G * K * (E + V) * 4, and for
long contexts at most half as many for what parts have weighed. Parts that no query sees are not read. While a core computes scores,
it has memory send the values, and while it weighs these, the keys of its next part.

The lanes of a register are queries while scores are computed, so that no sum goes across a register. The kernel is C++ (see
`cpp.py`), for float32.
Shape letters: B sequences, H heads, G groups of heads that share keys, N queries, K keys, E head size, V head size of values.
Source: parts joined as in flash-decoding (Dao et al. 2023); the exponential is that of Cephes.
"""

import ctypes
import functools
import threading
from typing import Any

import torch

from .cpp import compiled_library, vector_width

# More queries are those of a prompt.
MAX_QUERIES = 64
# Up to this many keys, parts are short, so that all threads have work.
_FEW_KEYS, _SHORT, _LONG = 512, 36, 132
# Floats that each thread keeps for later calls at most, since fresh pages take longer than a short attention.
_KEPT = 2**22
_scratch = threading.local()
_SOURCE = r"""
#include <math.h>
#include <omp.h>

struct Sizes {
  long B, H, G, N, K, E, V, part, threads;
  long query[3], key[3], value[3];  // strides of sequence, head or group, and query or key

  long rows() const { return H / G * N; }
  long lanes() const { return (rows() + WIDTH - 1) / WIDTH * WIDTH; }
  long parts() const { return (K + part - 1) / part; }
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

// One part: the largest score and the sum of exponentials of each query, and its weighted values.
static void attend(const Sizes& s, const float* queries, const float* key, const float* value, const uint8_t* visible,
                   long count, float* scores, float* largest) {
  const long rows = s.rows(), L = s.lanes();
  float *total = largest + L, *weighted = total + L;
  bool is_seen = !visible;
  for (long n = 0; n < s.N && !is_seen; ++n) is_seen = memchr(visible + n * s.K, 1, count);
  if (!is_seen) {
    std::fill(largest, largest + L, -INFINITY);
    memset(total, 0, L * sizeof(float));
    memset(weighted, 0, rows * s.V * sizeof(float));
    return;
  }
  // Each register of queries asks for its share of the values, and each pass over the values for its share of the next keys.
  const long registers = L / WIDTH, passes = (rows + MOST_ROWS - 1) / MOST_ROWS * ((s.V + WIDTH - 1) / WIDTH);
  for (long lane = 0; lane < L; lane += WIDTH) {
    const long values = count * s.value[2] * sizeof(float) / registers;
    const char* ahead = (const char*)value + lane / WIDTH * values;
    for (long k = 0; k < count; k += MOST_ROWS)
      with_constant(count - k, [&](auto keys) {
        score<decltype(keys)::value>(queries + lane, L, s.E, key + k * s.key[2], s.key[2], scores + k * L + lane,
                                     ahead + values / count * k, values / count * MOST_ROWS / s.E);
      });
  }
  for (long n = 0; visible && n < s.N; ++n)
    if (memchr(visible + n * s.K, 0, count))
      for (long k = 0; k < count; ++k)
        if (!visible[n * s.K + k])
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
  const long keys = count * s.key[2] * sizeof(float) / passes;
  const char* ahead = (const char*)(key + count * s.key[2]);
  for (long row = 0; row < rows; row += MOST_ROWS)
    for (long v = 0; v < s.V; v += WIDTH, ahead += keys)
      with_constant(rows - row, [&](auto some) {
        weigh<decltype(some)::value>(scores + row, L, count, value + v, s.value[2], weighted + row * s.V + v, s.V, ahead,
                                     keys / count);
      });
}

extern "C" long few_queries_scratch(const Sizes* sizes) {
  const Sizes& s = *sizes;
  return s.B * s.G * (s.E * s.lanes() + s.parts() * s.of_part()) + s.threads * s.part * s.lanes();
}

extern "C" void few_queries(const float* query, const float* key, const float* value, const uint8_t* visible, float* output,
                            float* memory, const Sizes* sizes, float scale) {
  const Sizes& s = *sizes;
  const long shared = s.H / s.G, rows = s.rows(), L = s.lanes(), groups = s.B * s.G, parts = s.parts(), of_part = s.of_part();
  const long of_queries = s.E * L, of_thread = s.part * L;
  float *queries = memory, *done = queries + groups * of_queries, *scratch = done + groups * parts * of_part;
#pragma omp parallel num_threads(s.threads)
  {
    float* scores = scratch + omp_get_thread_num() * of_thread;
#pragma omp for schedule(static)
    for (long group = 0; group < groups; ++group)
      for (long row = 0; row < L; ++row) {
        const long head = group % s.G * shared + row / s.N;
        const float* from = query + group / s.G * s.query[0] + head * s.query[1] + row % s.N * s.query[2];
        for (long e = 0; e < s.E; ++e) queries[group * of_queries + e * L + row] = row < rows ? from[e] * scale : 0.0f;
      }
#pragma omp for schedule(static)
    for (long task = 0; task < groups * parts; ++task) {
      const long group = task / parts, first = task % parts * s.part, b = group / s.G, g = group % s.G;
      float* part = done + task * of_part;
      attend(s, queries + group * of_queries, key + b * s.key[0] + g * s.key[1] + first * s.key[2],
             value + b * s.value[0] + g * s.value[1] + first * s.value[2],
             visible ? visible + b * s.N * s.K + first : nullptr, std::min(s.part, s.K - first), scores, part);
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
      float* to = output + ((group / s.G * s.N + row % s.N) * s.H + head) * s.V;
      for (long p = 0; p < parts; ++p) {
        const float* part = done + (group * parts + p) * of_part;
        for (long v = 0; v < s.V; v += WIDTH)
          store(add_product(part[row], load(part + 2 * L + row * s.V + v), p ? load(to + v) : Floats{}), to + v);
      }
    }
  }
}
"""


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("B", "H", "G", "N", "K", "E", "V", "part", "threads")),
        *((name, ctypes.c_long * 3) for name in ("query", "key", "value")),
    ]


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
    if any(type(one) is not torch.Tensor or one.dtype is not torch.float32 or not one.is_cpu for one in states):
        return False
    if any(one.stride(3) != 1 or one.requires_grad or one.is_neg() for one in states) or torch.jit.is_tracing():
        return False
    return not torch.compiler.is_compiling() and few_queries_is_available() and value.shape[3] % vector_width() == 0


def few_queries_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The definition; see [`few_queries_attention`]."""
    num_shared = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(num_shared, dim=1) for states in (key, value))
    scores = scale * query @ key.transpose(2, 3)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num() @ value).transpose(1, 2)


def few_queries_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of each query over the keys that it sees, without gradients.

    Args:
        query (`torch.Tensor` of shape `(B, H, N, E)`): float32, on the CPU; N is at most MAX_QUERIES. The last dimension of all
            three is contiguous.
        key (`torch.Tensor` of shape `(B, G, K, E)`), value (`torch.Tensor` of shape `(B, G, K, V)`): V fills whole registers.
        visible (`torch.BoolTensor` of shape `(B, N, K)`, *optional*): what each query sees; everything if absent.
        scale (`float`): of the scores.
    Returns:
        `torch.Tensor` of shape `(B, N, H, V)`, contiguous.
    Raises:
        ValueError: if the kernel does not serve these (see [`serves_few_queries`]).
    """
    if not serves_few_queries(query, key, value):
        found = ", ".join(f"{states.dtype} {tuple(states.shape)}" for states in (query, key, value))
        raise ValueError(f"few_queries_attention: expected what serves_few_queries accepts, got {found}")
    (num_rows, num_heads, num_queries, head_dim), (_, num_groups, num_keys, _) = query.shape, key.shape
    wanted = (num_rows, num_queries, num_keys)
    if visible is not None and (visible.dtype is not torch.bool or visible.shape != wanted):
        found = f"{visible.dtype} {tuple(visible.shape)}"
        raise ValueError(f"few_queries_attention: expected visible as torch.bool {wanted}, got {found}")
    output = query.new_empty((num_rows, num_queries, num_heads, value.shape[3]))
    if not (output.numel() and num_keys):
        return output.zero_()
    # Long enough that what a part has weighed is half of its keys and values.
    part = _SHORT if num_keys <= _FEW_KEYS else max(_LONG, 2 * num_heads // num_groups * num_queries)
    num_threads = min(torch.get_num_threads(), num_rows * num_groups * -(-num_keys // part))
    strides = ((ctypes.c_long * 3)(*states.stride()[:3]) for states in (query, key, value))
    counts = (num_rows, num_heads, num_groups, num_queries, num_keys, head_dim, value.shape[3], part, num_threads)
    sizes, (kernel, length_of) = _Sizes(*counts, *strides), _built()  # type: ignore[misc]
    length, memory = length_of(sizes), getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < length:
        memory = torch.empty(length, dtype=torch.float32, device="cpu")
        if length <= _KEPT:
            _scratch.memory = memory
    visible = None if visible is None else visible.contiguous()
    pointers = [None if states is None else states.data_ptr() for states in (query, key, value, visible, output, memory)]
    kernel(*pointers, sizes, scale)
    return output


@functools.cache
def _built() -> tuple[Any, Any] | None:
    """The compiled function, and that for the length of its memory; None where they cannot be had."""
    library, _ = compiled_library("few_queries", _SOURCE)
    if library is None:
        return None
    library.few_queries.argtypes = [ctypes.c_void_p] * 6 + [ctypes.POINTER(_Sizes), ctypes.c_float]
    library.few_queries.restype = None
    library.few_queries_scratch.argtypes = [ctypes.POINTER(_Sizes)]
    library.few_queries_scratch.restype = ctypes.c_long
    return library.few_queries, library.few_queries_scratch
