"""Attention of tree nodes to the committed prefix and to their own ancestors.

    output[b, n, h] = softmax_j(cap(scale * query[b, h, n] . key[b, g, j]) + mask[b, n, j]) value[b, g, j],   g = h // (H / G)

with cap(x) = softcap * tanh(x / softcap), or x itself. The keys are P of the prefix, then R of the tree; the queries are
the tree's last N nodes. Node n sees prefix key j where `committed[b, j]`, and tree key j where bit j of
`ancestors[b, n]` is set (bit j % 64 of word j // 64). A sliding window also asks for index[j] > index[n] - window,
where a prefix key's index is its place and a node's is `node_index`. A query that sees nothing gets zeros.

Layout: query `(B, H, N, E)`, key and value `(B, G, P + R, E)` of any strides but a contiguous last dimension (views of
a longer buffer), output `(B, N, H, E)`. Bytes moved: a program holds up to 128 of the N * H / G rows that share a head
of keys (64 with E > 128; in float32 32 with E > 64, 16 with E > 128), and each tile of rows reads those keys and
values once: 2 * B * G * (P + R) * E elements for each tile of rows.
Where that makes too few programs the prefix is split; each part writes B * N * H * (E + 1) float32, which a second
kernel adds up. There are never so many parts that this exceeds the prefix's own bytes.

Source: online softmax and splits as in FlashAttention (arXiv:2205.14135) and Flash-Decoding (Dao et al., 2023).
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
MAX_HEAD_DIM = 256
_WORD = 64
_BITS = 1 << torch.arange(_WORD)  # each number with one bit


def pack_ancestors(ancestors: torch.Tensor) -> torch.Tensor:
    """A bool mask `(B, N, R)` over tree keys as the bits of int64 words, `(B, N, ceil(R / 64))`."""
    num_keys = ancestors.shape[2]
    padded = torch.nn.functional.pad(ancestors, (0, -num_keys % _WORD)).unflatten(2, (-1, _WORD))  # [B, N, W, 64]
    return (padded.long() << torch.arange(_WORD, device=ancestors.device)).sum(-1)


def unpack_ancestors(ancestors: torch.Tensor, num_keys: int) -> torch.Tensor:
    """The inverse of [`pack_ancestors`]: words `(B, N, W)` as a bool mask `(B, N, num_keys)`."""
    device = ancestors.device
    bits = _BITS if device.type == "cpu" else 1 << torch.arange(_WORD, device=device)
    return (ancestors[..., None] & bits != 0).flatten(2)[..., :num_keys]  # from [B, N, W, 64]


def tree_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ancestors: torch.Tensor, committed: torch.Tensor,
    node_index: torch.Tensor | None, sliding_window: int | None, softcap: float | None, scale: float
) -> torch.Tensor:
    """The definition; see [`tree_attention`]. Computes in float32, or in float64 if the tensors are."""
    num_prefix, num_nodes = committed.shape[1], query.shape[2]
    visible = unpack_ancestors(ancestors, key.shape[2] - num_prefix)
    visible = torch.cat((committed[:, None].expand(-1, num_nodes, -1), visible), dim=2)  # [B, N, P + R]
    if sliding_window is not None:
        assert node_index is not None  # it comes with a window
        places = torch.arange(num_prefix, device=query.device).expand(len(query), -1)
        index = torch.cat((places, node_index), dim=1)  # [B, P + R]
        visible = visible & (index[:, None] > node_index[:, -num_nodes:, None] - sliding_window)
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).unflatten(1, (key.shape[1], -1))  # [B, G, H / G, N, E]
    scores = (grouped.flatten(2, 3) @ key.to(dtype).transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(2, (-1, num_nodes)).masked_fill(~visible[:, None, None], -torch.inf)
    # Rows without any key give NaN here.
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible[:, None, None], 0)
    output = (weights.flatten(2, 3) @ value.to(dtype)).unflatten(2, (-1, num_nodes))  # [B, G, H / G, N, E]
    return output.flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()


if triton is not None:

    @triton.jit
    def _attend(
        query, keys, values, visible, output, row_max, row_sum,
        scale, softcap,
        HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    ):
        # One tile of keys [E, K] and values [K, E] into the running softmax, which is kept in powers of two.
        scores = tl.dot(query, keys, input_precision=PRECISION) * scale  # [M, K]
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / softcap)) + 1.0))
        scores = tl.where(visible, scores * 1.4426950408889634, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet has no largest score to subtract.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        output = output * decay[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        return output, new_max, row_sum

    # Sizes that grow from round to round must not lead to recompilation.
    @triton.jit(do_not_specialize=["num_prefix", "num_tree_keys", "split_length", "num_words"])
    def _tree_attention_fwd_kernel(
        query, key, value, ancestors, committed, node_index, output, part_sums,
        stride_qb, stride_qh, stride_qn, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt,
        stride_committed, num_nodes, num_heads, num_prefix, num_tree_keys, num_words, split_length, sliding_window,
        scale, softcap,
        GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
        IS_SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_E: tl.constexpr,
    ):
        # One program: a tile of the rows that share a head of keys, over one part of the prefix; the last part also
        # takes the tree's keys.
        num_groups = num_heads // GROUP
        batch = tl.program_id(1).to(tl.int64) // num_groups
        group = tl.program_id(1).to(tl.int64) % num_groups
        split = tl.program_id(2)
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = row < num_nodes * GROUP
        node = (row // GROUP).to(tl.int64)
        head = group * GROUP + row % GROUP
        element = tl.arange(0, BLOCK_E)
        is_element = element < HEAD_DIM
        query += batch * stride_qb + head * stride_qh + node * stride_qn
        rows = tl.load(query[:, None] + element[None, :], mask=is_row[:, None] & is_element[None, :], other=0.0)
        key += batch * stride_kb + group * stride_kg
        value += batch * stride_vb + group * stride_vg
        begin = split * split_length
        end = tl.minimum(begin + split_length, num_prefix)
        oldest = tl.full((BLOCK_M,), 0, tl.int64)
        if HAS_WINDOW:
            node_index += batch * num_tree_keys
            own_place = tl.load(node_index + num_tree_keys - num_nodes + node, mask=is_row, other=9223372036854775807)
            oldest = own_place - sliding_window + 1
            # Whole tiles that no row of this program can see are not read.
            begin = tl.maximum(begin, (tl.maximum(tl.min(oldest, 0), 0) // BLOCK_K * BLOCK_K).to(tl.int32))
        result = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(begin, end, BLOCK_K):
            place = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            is_key = place < end
            seen = tl.load(committed + batch * stride_committed + place, mask=is_key, other=0) != 0  # [K]
            visible = is_row[:, None] & seen[None, :]
            if HAS_WINDOW:
                visible = visible & (place[None, :] >= oldest[:, None])
            # Padding and holes may hold anything, and 0 * NaN is NaN.
            mask = seen[:, None] & is_element[None, :]
            keys = tl.load(key + place[:, None] * stride_kt + element[None, :], mask=mask, other=0.0)
            values = tl.load(value + place[:, None] * stride_vt + element[None, :], mask=mask, other=0.0)
            result, row_max, row_sum = _attend(
                rows, tl.trans(keys), values, visible, result, row_max, row_sum, scale, softcap, HAS_SOFTCAP, PRECISION
            )
        is_last = split == tl.num_programs(2) - 1
        for start in range(0, num_tree_keys * is_last.to(tl.int32), BLOCK_K):
            tree_key = start + tl.arange(0, BLOCK_K)
            is_key = tree_key < num_tree_keys
            # A tile is as wide as a word or a part of it.
            word = tl.load(
                ancestors + (batch * num_nodes + node) * num_words + start // 64, mask=is_row, other=0
            )  # [M]
            visible = ((word[:, None] >> (tree_key % 64).to(tl.int64)[None, :]) & 1) != 0
            visible = visible & is_key[None, :]
            if HAS_WINDOW:
                tree_place = tl.load(node_index + tree_key, mask=is_key, other=0)
                visible = visible & (tree_place[None, :] >= oldest[:, None])
            mask = is_key[:, None] & is_element[None, :]
            stored = (num_prefix + tree_key).to(tl.int64)
            keys = tl.load(key + stored[:, None] * stride_kt + element[None, :], mask=mask, other=0.0)
            values = tl.load(value + stored[:, None] * stride_vt + element[None, :], mask=mask, other=0.0)
            result, row_max, row_sum = _attend(
                rows, tl.trans(keys), values, visible, result, row_max, row_sum, scale, softcap, HAS_SOFTCAP, PRECISION
            )
        result = result / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        cell = (batch * num_nodes + node) * num_heads + head  # of [B, N, H]
        if IS_SPLIT:
            num_cells = tl.num_programs(1).to(tl.int64) * GROUP * num_nodes
            cell += split * num_cells
            tl.store(part_sums + cell, tl.log2(row_sum) + row_max, mask=is_row)
        mask = is_row[:, None] & is_element[None, :]
        tl.store(output + cell[:, None] * HEAD_DIM + element[None, :], result.to(output.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["num_splits"])
    def _tree_attention_reduce_fwd_kernel(
        parts, part_sums, output,
        num_cells, num_splits,
        HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    ):
        # One program: the parts of one query of one head.
        cell = tl.program_id(0).to(tl.int64)
        element = tl.arange(0, BLOCK_E)
        result = tl.zeros((BLOCK_E,), tl.float32)
        largest = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        for start in range(0, num_splits, BLOCK_S):
            split = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
            is_split = split < num_splits
            sums = tl.load(part_sums + split * num_cells + cell, mask=is_split, other=float("-inf"))  # [S]
            new_largest = tl.maximum(largest, tl.max(sums, 0))
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = tl.exp2(sums - shift)
            decay = tl.exp2(largest - shift)
            mask = is_split[:, None] & (element < HEAD_DIM)[None, :]
            address = parts + (split * num_cells + cell)[:, None] * HEAD_DIM + element[None, :]
            result = result * decay + tl.sum(weights[:, None] * tl.load(address, mask=mask, other=0.0), 0)
            total = total * decay + tl.sum(weights, 0)
            largest = new_largest
        result = result / tl.where(total > 0, total, 1.0)
        tl.store(output + cell * HEAD_DIM + element, result.to(output.dtype.element_ty), mask=element < HEAD_DIM)

    def _tiles(num_rows: int, head_dim: int, itemsize: int) -> dict:
        """Tiles by shape alone: rows up to 128, and as many keys as registers and shared memory hold in addition.

        float32 products are six products of bfloat16 parts, as exact as float32 itself; with wide heads, where those would not
        fit into registers, they are plain float32.
        """
        block_e = max(16, triton.next_power_of_2(head_dim))
        block_m = min(64 if block_e > 128 else 128, max(16, triton.next_power_of_2(num_rows)))
        block_k, precision, num_stages = min(64, 8192 // block_e), "ieee", 2
        num_warps = 8 if block_m * block_e * itemsize >= 16384 else 4
        if itemsize == 4:
            # A second stage in flight would not fit into the 64 KiB of shared memory of an MI300X's compute units.
            block_k, precision, num_stages = 16, "bf16x6", 1
            if block_e > 64:
                precision, num_warps, num_stages = "ieee", 8, 2
                block_m = min(block_m, 32 if block_e <= 128 else 16)
        tiles = {"PRECISION": precision, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_E": block_e}
        return {**tiles, "num_warps": num_warps, "num_stages": num_stages, **ALL_REGISTERS}

    def _num_splits(
        num_programs: int, num_rows: int, num_prefix: int, head_dim: int, itemsize: int, block_k: int
    ) -> int:
        """Parts of the prefix: enough programs, no part shorter than a tile, no more partial results than prefix."""
        wanted = triton.cdiv(NUM_PROGRAMS, num_programs)
        most = 2 * num_prefix * head_dim * itemsize // (4 * num_rows * (head_dim + 1))
        return max(1, min(wanted, most, triton.cdiv(num_prefix, block_k)))

    def _tree_attention_fwd(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ancestors: torch.Tensor, committed: torch.Tensor,
        node_index: torch.Tensor | None, sliding_window: int | None, softcap: float | None, scale: float
    ) -> torch.Tensor:
        num_batch, num_heads, num_nodes, head_dim = query.shape
        num_groups, num_prefix = key.shape[1], committed.shape[1]
        num_rows = num_nodes * num_heads // num_groups
        tiles = _tiles(num_rows, head_dim, key.element_size())
        programs = (triton.cdiv(num_rows, tiles["BLOCK_M"]), num_batch * num_groups)
        num_splits = _num_splits(
            programs[0] * programs[1], num_rows, num_prefix, head_dim, key.element_size(), tiles["BLOCK_K"]
        )
        split_length = triton.cdiv(triton.cdiv(num_prefix, num_splits), tiles["BLOCK_K"]) * tiles["BLOCK_K"]
        num_splits = max(1, triton.cdiv(num_prefix, max(split_length, 1)))
        output = torch.empty((num_batch, num_nodes, num_heads, head_dim), dtype=query.dtype, device=query.device)
        parts = part_sums = output
        if num_splits > 1:
            shape = (num_splits, num_batch, num_nodes, num_heads, head_dim)
            parts = torch.empty(shape, dtype=torch.float32, device=query.device)
            part_sums = torch.empty(shape[:-1], dtype=torch.float32, device=query.device)
        grid = (*programs, num_splits)
        _tree_attention_fwd_kernel[grid](
            query, key, value, ancestors, committed, ancestors if node_index is None else node_index, parts, part_sums,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], committed.stride(0), num_nodes, num_heads,
            num_prefix, key.shape[2] - num_prefix, ancestors.shape[2], split_length, sliding_window or 0, scale,
            softcap or 1.0,
            GROUP=num_heads // num_groups, HEAD_DIM=head_dim, HAS_WINDOW=sliding_window is not None,
            HAS_SOFTCAP=softcap is not None, IS_SPLIT=num_splits > 1, **tiles,
        )
        if num_splits > 1:
            num_cells = num_batch * num_nodes * num_heads
            _tree_attention_reduce_fwd_kernel[(num_cells,)](
                parts, part_sums, output, num_cells, num_splits, head_dim,
                BLOCK_S=16, BLOCK_E=tiles["BLOCK_E"], **ALL_REGISTERS,
            )
        return output

    _tree_attention = operator(_NAMESPACE, _tree_attention_fwd)

    @_tree_attention.register_fake
    def _(query, key, value, ancestors, committed, node_index, sliding_window, softcap, scale):
        num_batch, num_heads, num_nodes, head_dim = query.shape
        return query.new_empty((num_batch, num_nodes, num_heads, head_dim))


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ancestors: torch.Tensor, committed: torch.Tensor,
    node_index: torch.Tensor | None = None, sliding_window: int | None = None, softcap: float | None = None,
    scale: float | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """Attention of tree nodes to the committed prefix and to their own ancestors.

    Args:
        query (`torch.Tensor` of shape `(B, H, N, E)`): of the tree's last N nodes; float32, float16 or bfloat16.
        key, value (`torch.Tensor` of shape `(B, G, P + R, E)`): of the prefix, then of the tree's R >= N nodes; H is a
            multiple of G, E at most 256.
        ancestors (`torch.LongTensor` of shape `(B, N, W)`): bit masks over the tree's keys, as [`pack_ancestors`]
            makes them; R is at most 64 * W.
        committed (`torch.BoolTensor` of shape `(B, P)`): False at padding and holes of the prefix.
        node_index (`torch.LongTensor` of shape `(B, R)`, *optional*): place of each node in its row's sequence; a
            sliding window needs it.
        sliding_window (`int`, *optional*): positions that a node sees, itself included.
        softcap (`float`, *optional*): bound of the scores.
        scale (`float`, *optional*): of the scores; E ** -0.5 if absent.
        implementation (`str`): "auto", "triton" or "torch".

    Keys and values have a contiguous last dimension and are never copied. A query whose last dimension is not
    contiguous, `ancestors`, `committed` and `node_index` are made contiguous where they are not.

    Returns:
        `torch.Tensor` of shape `(B, N, H, E)`, contiguous, in the query's dtype.
    Raises:
        ValueError: if shapes, strides, dtypes or devices do not fit.
    """
    expect(query.dim() == 4 and query.numel() > 0, "query", "4 dimensions, none empty", tuple(query.shape))
    num_batch, num_heads, num_nodes, head_dim = query.shape
    expect(head_dim <= MAX_HEAD_DIM, "query", f"a head dimension up to {MAX_HEAD_DIM}", head_dim)
    expect_float("query", query)
    fits = key.dim() == 4 and key.shape[0] == num_batch and key.shape[3] == head_dim and key.shape[1] > 0
    expect(fits, "key", f"shape {(num_batch, 'G', 'P + R', head_dim)}", tuple(key.shape))
    expect(num_heads % key.shape[1] == 0, "query", f"a multiple of {key.shape[1]} heads", num_heads)
    fits = committed.dim() == 2 and committed.shape[0] == num_batch
    expect(fits, "committed", f"shape {(num_batch, 'P')}", tuple(committed.shape))
    num_tree_keys = key.shape[2] - committed.shape[1]
    expect(num_tree_keys >= num_nodes, "key", f"{committed.shape[1]} + {num_nodes} positions or more", key.shape[2])
    fits = ancestors.dim() == 3 and tuple(ancestors.shape[:2]) == (num_batch, num_nodes)
    expect(fits, "ancestors", f"shape {(num_batch, num_nodes, 'W')}", tuple(ancestors.shape))
    limit = _WORD * ancestors.shape[2]
    expect(num_tree_keys <= limit, "key", f"a tree of at most {limit} nodes, the bits of ancestors", num_tree_keys)
    expect(
        (node_index is None) == (sliding_window is None),
        "node_index",
        "it with sliding_window and only then",
        node_index,
    )
    if node_index is not None:
        expect_tensors(query.device, node_index=(node_index, (num_batch, num_tree_keys), torch.int64))
        expect(sliding_window is not None and sliding_window > 0, "sliding_window", "at least 1", sliding_window)
        node_index = node_index.contiguous()
    expect(softcap is None or softcap > 0, "softcap", "more than 0", softcap)
    shape = tuple(key.shape)
    expect_tensors(
        query.device,
        key=(key, shape, query.dtype),
        value=(value, shape, query.dtype),
        ancestors=(ancestors, tuple(ancestors.shape), torch.int64),
        committed=(committed, tuple(committed.shape), torch.bool),
    )
    expect_rows("key", key)
    expect_rows("value", value)
    if query.stride(3) != 1:
        query = query.contiguous()
    if committed.shape[1] > 1 and committed.stride(1) != 1:
        committed = committed.contiguous()
    scale = head_dim**-0.5 if scale is None else float(scale)
    run = _tree_attention if use_triton(implementation, query.device) else tree_attention_reference
    return run(query, key, value, ancestors.contiguous(), committed, node_index, sliding_window, softcap, scale)
