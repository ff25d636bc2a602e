"""The k most probable next tokens after each of N hidden states, and their log-probabilities, straight from the head.

    logits[n, v] = cap(scale * (hidden[n] . weight[v] + bias[v])),    cap(x) = softcap * tanh(x / softcap), or x itself
    log_prob[n, v] = logits[n, v] - log sum_w exp(logits[n, w])

Best first; ties go to the smaller row of the head. A row of the head is a token, or stands for the token `token_ids[v]` of a
larger vocabulary. A state with a NaN among its logits has no log-probabilities: all k are minus infinity, and their tokens
are any k different ones.

Nearly all traffic is the head `(V, D)`: V * D elements, loaded once for up to 128 rows of `hidden` (64 in float32). Each
program goes through a few tiles of the vocabulary and keeps the largest logit, the sum of exponentials and the best k of what
it has seen; it writes N * (k' + 1) 8-byte numbers (k' is k rounded up to 2, 16 or 64). A second kernel joins these lists. No
logits reach memory.
A candidate is one 64-bit number: in its high bits the logit in an order-preserving form, in its low bits the row counted
backwards, so that comparing two also decides ties, and no two are equal.
Source: ours; the running sum is that of online softmax (Milakov and Gimelshein, arXiv:1805.02867).
"""

import torch

from .dispatch import (
    ALL_REGISTERS,
    NUM_PROGRAMS,
    expect,
    expect_float,
    expect_rows,
    expect_tensors,
    operator,
    operator_namespace,
    use_triton,
)

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_NAMESPACE = operator_namespace(__name__, __file__)
# Limits of the kernel: a program keeps at most MAX_TOP_K of the best for each row.
MAX_TOP_K = 64
MAX_TOKENS = 262144
# On a CPU, logits are searched in columns of this length if there are at least this many logits.
_COLUMN = 32
_MANY_LOGITS = 2**15


def top_k_of_logits(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable indices `(..., k)` of logits `(..., V)`, best first, and their log-probabilities in float32;
    minus infinity in place of NaN. Equal ones come in any order."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    values, indices = top_k_by_columns(log_probs, k) if log_probs.device.type == "cpu" else log_probs.topk(k, dim=-1)
    # One NaN among the logits makes all log-probabilities NaN.
    return indices, torch.nan_to_num(values, nan=-torch.inf, neginf=-torch.inf)


def top_k_by_columns(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `values.topk(k, dim=-1)` returns, equal values in any order; two to three times as fast on a CPU.

    `(..., V)` is read as a matrix. The k largest values are in the k columns with the largest maxima. These maxima are
    computed on whole vectors, while `torch.topk` compares numbers one by one.
    """
    size = values.shape[-1]
    width = size // _COLUMN
    if values.numel() < _MANY_LOGITS or k > width // 4:
        return values.topk(k, dim=-1)
    matrix = values[..., : width * _COLUMN].unflatten(-1, (_COLUMN, width))
    columns = matrix.amax(dim=-2).topk(k, dim=-1, sorted=False).indices  # [..., k]
    rows = torch.arange(0, width * _COLUMN, width, device=values.device)[:, None]
    index = (columns[..., None, :] + rows).flatten(-2)  # [..., _COLUMN * k]
    if width * _COLUMN < size:
        rest = torch.arange(width * _COLUMN, size, device=values.device)
        index = torch.cat((index, rest.expand(*index.shape[:-1], -1)), dim=-1)
    largest, place = values.gather(-1, index).topk(k, dim=-1)
    return largest, index.gather(-1, place)


def top_k_log_prob_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor | None, k: int,
    scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition; see [`top_k_log_prob`]. Unlike the kernel, it has no order for equal logits."""
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float()) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    indices, log_probs = top_k_of_logits(logits, k)
    return indices if token_ids is None else token_ids[indices], log_probs


if triton is not None:

    @triton.jit
    def _insert(candidates, best, NUM_BEST: tl.constexpr):
        # The largest of `best` [N, NUM_BEST] and `candidates` [N, C], in no order; all numbers of `best` differ.
        smallest = tl.min(best, 1)
        num_better = tl.max(tl.max(tl.sum((candidates > smallest[:, None]).to(tl.int32), 1)[None, :], 1), 0)
        for _ in range(0, tl.minimum(num_better, NUM_BEST)):
            largest = tl.max(candidates, 1)
            smallest = tl.min(best, 1)
            takes_place = (best == smallest[:, None]) & (largest > smallest)[:, None]
            best = tl.where(takes_place, largest[:, None], best)
            candidates = tl.where(candidates == largest[:, None], -9223372036854775808, candidates)
        return best

    @triton.jit(do_not_specialize=["num_rows", "split_length"])
    def _top_k_log_prob_fwd_kernel(
        hidden, weight, bias, part_best, part_max, part_sum,
        stride_hidden, stride_weight, num_rows, num_tokens, split_length, scale, softcap,
        HIDDEN_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, NUM_BEST: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        # One program: BLOCK_N rows over a part of the vocabulary.
        row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        is_row = row < num_rows
        split = tl.program_id(1)
        begin = split * split_length
        end = tl.minimum(begin + split_length, num_tokens)
        rank = tl.arange(0, NUM_BEST)
        # Less than any candidate, and all different.
        best = tl.zeros((BLOCK_N, NUM_BEST), tl.int64) + (rank.to(tl.int64) - 9223372036854775807)[None, :]
        row_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(begin, end, BLOCK_V):
            token = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
            is_token = token < end
            logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for first in range(0, HIDDEN_SIZE, BLOCK_K):
                column = first + tl.arange(0, BLOCK_K)
                is_column = column < HIDDEN_SIZE
                address = hidden + row[:, None] * stride_hidden + column[None, :]
                states = tl.load(address, mask=is_row[:, None] & is_column[None, :], other=0.0)  # [N, BLOCK_K]
                address = weight + token[:, None] * stride_weight + column[None, :]
                factor = tl.load(address, mask=is_token[:, None] & is_column[None, :], other=0.0)  # [V, BLOCK_K]
                logits = tl.dot(states, tl.trans(factor), logits, input_precision=PRECISION)
            if HAS_BIAS:
                logits += tl.load(bias + token, mask=is_token, other=0.0).to(tl.float32)[None, :]
            logits = logits * scale
            if HAS_SOFTCAP:
                logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.8853900817779268 / softcap)) + 1.0))
            logits = tl.where(is_token[None, :], logits, float("-inf"))
            # NaN is part of the sum, which becomes NaN for the whole row, but not of comparisons.
            ordered = tl.where(logits == logits, logits, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(ordered, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = tl.exp2((logits - shift[:, None]) * 1.4426950408889634)
            row_sum = row_sum * tl.exp2((row_max - shift) * 1.4426950408889634) + tl.sum(weights, 1)
            row_max = new_max
            # Minus zero equals zero; of negative numbers the larger has the smaller bits.
            bits = tl.where(ordered == 0.0, 0.0, ordered).to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            candidates = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token)[None, :]
            candidates = tl.where(is_token[None, :], candidates, -9223372036854775808)
            best = _insert(candidates, best, NUM_BEST)
        cell = row * tl.num_programs(1) + split
        tl.store(part_best + cell[:, None] * NUM_BEST + rank[None, :], best, mask=is_row[:, None])
        tl.store(part_max + cell, row_max, mask=is_row)
        tl.store(part_sum + cell, row_sum, mask=is_row)

    @triton.jit(do_not_specialize=["num_splits"])
    def _top_k_log_prob_reduce_fwd_kernel(
        part_best, part_max, part_sum, token_ids, best_ids, best_log_probs,
        num_splits,
        NUM_CHOSEN: tl.constexpr, HAS_IDS: tl.constexpr, NUM_BEST: tl.constexpr, BLOCK_S: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # One program: the parts of one row.
        row = tl.program_id(0).to(tl.int64)
        split = tl.arange(0, BLOCK_S)
        cell = row * num_splits + split
        is_split = split < num_splits
        largest = tl.load(part_max + cell, mask=is_split, other=float("-inf"))
        sums = tl.load(part_sum + cell, mask=is_split, other=0.0)
        row_max = tl.max(largest, 0)
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        total = tl.sum(sums * tl.exp2((largest - shift) * 1.4426950408889634), 0)
        normalizer = shift + tl.log2(total) * 0.6931471805599453
        rank = tl.arange(0, NUM_BEST)
        best = (rank.to(tl.int64) - 9223372036854775807)[None, :]
        num_candidates = num_splits * NUM_BEST
        for start in range(0, num_candidates, BLOCK_C):
            place = start + tl.arange(0, BLOCK_C)
            address = part_best + row * num_candidates + place
            candidates = tl.load(address, mask=place < num_candidates, other=-9223372036854775808)
            best = _insert(candidates[None, :], best, NUM_BEST)
        best = tl.reshape(best, (NUM_BEST,))
        # The position of each is the number of those that are better.
        position = tl.sum((best[None, :] > best[:, None]).to(tl.int32), 1)
        bits = (best >> 32).to(tl.int32)
        logit = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        log_prob = logit - normalizer
        log_prob = tl.where(log_prob == log_prob, log_prob, float("-inf"))
        is_chosen = position < NUM_CHOSEN
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        if HAS_IDS:
            token = tl.load(token_ids + token, mask=is_chosen, other=0)
        tl.store(best_ids + row * NUM_CHOSEN + position, token, mask=is_chosen)
        tl.store(best_log_probs + row * NUM_CHOSEN + position, log_prob, mask=is_chosen)

    def _tiles(num_rows: int, hidden_size: int, itemsize: int) -> dict:
        """Tiles by shape alone: rows up to 128, in float32 up to 64, so that the head is read once for all of them."""
        block_n = min(64 if itemsize == 4 else 128, max(16, triton.next_power_of_2(num_rows)))
        is_narrow = itemsize == 2 and block_n < 64
        block_k = min(64 if is_narrow else 32, max(16, triton.next_power_of_2(hidden_size)))
        # float32 as six products of bfloat16 parts, which are as exact.
        precision = "bf16x6" if itemsize == 4 else "ieee"
        # 128 rows and their lists, or the parts of float32 products, leave registers for fewer candidates.
        block_v = 16 if block_n == 128 else 32 if itemsize == 4 and block_n == 16 else 64
        tiles = {"PRECISION": precision, "BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_K": block_k}
        # All threads of a program share 65536 registers, which the assembler exceeds if it is told that each may have 255.
        registers = dict.fromkeys(ALL_REGISTERS, 128) if block_n == 128 else ALL_REGISTERS
        return {**tiles, "num_warps": 16 if block_n == 128 else 8, "num_stages": 4 if is_narrow else 3, **registers}

    def _num_best(k: int) -> int:
        """How many of the best a program keeps: a few sizes, so that each of them is compiled in the tests."""
        return next(size for size in (2, 16, MAX_TOP_K) if k <= size)

    def _top_k_log_prob_fwd(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, token_ids: torch.Tensor | None, k: int,
        scale: float, softcap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, hidden_size = hidden.shape
        num_tokens, device = weight.shape[0], hidden.device
        tiles = _tiles(num_rows, hidden_size, hidden.element_size())
        split_length = triton.cdiv(triton.cdiv(num_tokens, NUM_PROGRAMS), tiles["BLOCK_V"]) * tiles["BLOCK_V"]
        num_splits = triton.cdiv(num_tokens, split_length)
        num_best = _num_best(k)
        part_best = torch.empty((num_rows, num_splits, num_best), dtype=torch.int64, device=device)
        part_max = torch.empty((num_rows, num_splits), dtype=torch.float32, device=device)
        part_sum = torch.empty((num_rows, num_splits), dtype=torch.float32, device=device)
        best_ids = torch.empty((num_rows, k), dtype=torch.int64, device=device)
        best_log_probs = torch.empty((num_rows, k), dtype=torch.float32, device=device)
        _top_k_log_prob_fwd_kernel[(triton.cdiv(num_rows, tiles["BLOCK_N"]), num_splits)](
            hidden, weight, weight if bias is None else bias, part_best, part_max, part_sum, hidden.stride(0),
            weight.stride(0), num_rows, num_tokens, split_length, scale, softcap or 1.0,
            HIDDEN_SIZE=hidden_size, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, NUM_BEST=num_best,
            **tiles,
        )
        _top_k_log_prob_reduce_fwd_kernel[(num_rows,)](
            part_best, part_max, part_sum, best_ids if token_ids is None else token_ids, best_ids, best_log_probs,
            num_splits,
            NUM_CHOSEN=k, HAS_IDS=token_ids is not None, NUM_BEST=num_best,
            BLOCK_S=triton.next_power_of_2(NUM_PROGRAMS), BLOCK_C=1024, num_warps=4,
            **ALL_REGISTERS,
        )
        return best_ids, best_log_probs

    _top_k_log_prob = operator(_NAMESPACE, _top_k_log_prob_fwd)

    @_top_k_log_prob.register_fake
    def _(hidden, weight, bias, token_ids, k, scale, softcap):
        shape = (hidden.shape[0], k)
        return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=torch.float32)


def top_k_log_prob(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, bias: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None, scale: float = 1.0, softcap: float | None = None,
    implementation: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most probable next tokens after each hidden state, best first; it has no gradients.

    Args:
        hidden (`torch.Tensor` of shape `(..., D)`): N >= 1 rows in all; float32, float16 or bfloat16.
        weight (`torch.Tensor` of shape `(V, D)`): of the head.
        k (`int`): 1 to V; on Triton's path V is at most 262144 and k at most 64. "auto" takes PyTorch's beyond.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): of the head.
        token_ids (`torch.LongTensor` of shape `(V,)`, *optional*): the token of each row of the head; its index if
            absent.
        scale (`float`): of the logits.
        softcap (`float`, *optional*): bound of the logits, after the scale.
        implementation (`str`): "auto", "triton" or "torch".

    The head's rows are contiguous and never copied; hidden states are made contiguous where they are not. No gradient
    reaches any argument.

    Returns:
        `tuple`: tokens, a `torch.LongTensor` of shape `(..., k)`, and their log-probabilities in nats, a
        `torch.FloatTensor` of the same shape. Of equal logits the smaller row of the head comes first on Triton's
        path; on PyTorch's they come in any order.
    Raises:
        ValueError: if shapes, strides, dtypes or devices do not fit.
    """
    expect(hidden.dim() > 0 and hidden.numel() > 0, "hidden", "rows that are not empty", tuple(hidden.shape))
    expect_float("hidden", hidden)
    hidden_size = hidden.shape[-1]
    fits = weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden_size
    expect(fits, "weight", f"shape {('V', hidden_size)}", tuple(weight.shape))
    expect_tensors(hidden.device, weight=(weight, tuple(weight.shape), hidden.dtype))
    expect_rows("weight", weight)
    num_tokens = weight.shape[0]
    most_tokens, most = num_tokens, num_tokens
    if implementation == "triton":
        most_tokens, most = MAX_TOKENS, min(num_tokens, MAX_TOP_K)
    expect(num_tokens <= most_tokens, "weight", f"at most {MAX_TOKENS} rows", num_tokens)
    expect(1 <= k <= most, "k", f"1 to {most}", k)
    expect(softcap is None or softcap > 0, "softcap", "more than 0", softcap)
    for name, tensor, dtype in (("bias", bias, hidden.dtype), ("token_ids", token_ids, torch.int64)):
        if tensor is not None:
            expect_tensors(hidden.device, **{name: (tensor, (num_tokens,), dtype)})
            expect_rows(name, tensor)
    has_kernel = use_triton(implementation, hidden.device) and num_tokens <= MAX_TOKENS and k <= MAX_TOP_K
    rows = hidden.detach().reshape(-1, hidden_size).contiguous()
    run = _top_k_log_prob if has_kernel else top_k_log_prob_reference
    tokens, log_probs = run(
        rows, weight.detach(), bias if bias is None else bias.detach(), token_ids, k, scale, softcap
    )
    shape = (*hidden.shape[:-1], k)
    return tokens.view(shape), log_probs.view(shape)
