"""Attention of draft step k over all rows of a training batch at once, as decoding does it for one row.

    output[b, i, h] = softmax_j(scale * query[b, h, i] . key[b, g, j]) value[b, g, j],   g = h // (H / G)

Query row i sees the rows j <= i - k through the keys and values of step 0, and its own path: row i - k + s through those
of step s, for s = 1..k. `starts[b, i]` is the first row that row i sees: with packed sequences the first row of its
own sequence, with a sliding window the first row of its window. A row that starts after itself, as padding does, sees
nothing: its output is zeros, and it has no gradients.

Layout: query `(B, H, T, E)`, keys and values k + 1 tensors `(B, G, T, E)` each, of any strides but a contiguous last
dimension; output `(B, T, H, E)`. Backward keeps query, keys, values, the output and each row's log-sum-exp
`(B, H, T)`, and computes scores again. No tensor of T x T is made. It takes three kernels, none of which adds to what
another wrote: the queries' gradients by rows, those of step 0's keys and values by keys, and those of the path, of which
each key is seen by one row only.

Bytes moved: a forward program holds 128 rows of a head (fewer in float32 and with wide heads) and reads the keys and
values before them, 4 * E bytes a row in 16 bits: half of B * H * T / 128 * T rows in all, without starts. The path adds k
keys and values a row, which are read like the query itself.
Source: context alignment of HASS (arXiv:2408.15766) and PRISM (arXiv:2602.01762), made equal to decoding; online softmax
and its backward as in FlashAttention-2 (arXiv:2307.08691).
"""

import torch

from .dispatch import (
    ALL_REGISTERS,
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


def context_alignment_scores(
    query: torch.Tensor, keys: list[torch.Tensor], starts: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The scores before the softmax, minus infinity at what a row does not see, `(B, G, H / G, T, T + k)`: those of step
    0's rows, then those of the path's steps 1..k."""
    step, num_rows = len(keys) - 1, query.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = (query.to(dtype) * scale).unflatten(1, (keys[0].shape[1], -1))  # [B, G, R, T, E]
    # The heads of a group share its keys: one product for all of them, without repeating any key.
    scores = grouped.flatten(2, 3) @ keys[0].to(dtype).transpose(-1, -2)
    scores = scores.unflatten(2, (-1, num_rows))  # [B, G, R, T, T]
    path = [shift_down(keys[s].to(dtype), step - s)[:, :, None] for s in range(1, step + 1)]  # [B, G, 1, T, E]
    scores = torch.cat((scores, *((grouped * one).sum(-1, keepdim=True).to(scores.dtype) for one in path)), dim=-1)
    rows = torch.arange(num_rows, device=query.device)
    own = rows[:, None] + torch.arange(1 - step, 1, device=query.device)  # [T, k]
    places = torch.cat((rows.expand(num_rows, -1), own), dim=1)  # [T, T + k]
    is_before = torch.nn.functional.pad(rows <= rows[:, None] - step, (0, step), value=True)
    first = rows.new_zeros(1, 1) if starts is None else starts
    visible = is_before & (places >= first[..., None])  # [B or 1, T, T + k]
    return scores.masked_fill(~visible[:, None, None], -torch.inf)


def context_alignment_attention_reference(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], starts: torch.Tensor | None,
    scale: float
) -> torch.Tensor:
    """The definition; see [`context_alignment_attention`]. Computes in float32, or in float64 if the tensors are."""
    step, num_rows = len(keys) - 1, query.shape[2]
    scores = context_alignment_scores(query, keys, starts, scale)
    sees_nothing = None
    if starts is not None:
        rows = torch.arange(num_rows, device=query.device)
        sees_nothing = (starts > rows)[:, None, None, :, None]  # [B, 1, 1, T, 1]
        # The softmax of nothing is NaN.
        scores = scores.masked_fill(sees_nothing, 0)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    if sees_nothing is not None:
        weights = weights.masked_fill(sees_nothing, 0)
    states = [one.to(weights.dtype) for one in values]
    output = (weights[..., :num_rows].flatten(2, 3) @ states[0]).unflatten(2, (-1, num_rows))  # [B, G, R, T, E]
    for s in range(1, step + 1):
        output = output + weights[..., num_rows + s - 1, None] * shift_down(states[s], step - s)[:, :, None]
    return output.flatten(1, 2).transpose(1, 2).to(query.dtype)


def shift_down(states: torch.Tensor, count: int) -> torch.Tensor:
    """Keys or values moved `count` rows towards later rows, so that row i holds what row i - count held."""
    if count == 0:
        return states
    return torch.nn.functional.pad(states, (0, 0, count, 0))[:, :, : states.shape[2]]


if triton is not None:

    @triton.jit
    def _program(num_heads, num_rows, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
        # What a program serves: the row of the batch, the head, a tile of rows of T, and the elements of a head.
        batch = tl.program_id(1).to(tl.int64) // num_heads
        head = tl.program_id(1).to(tl.int64) % num_heads
        tile = tl.program_id(0) * BLOCK
        row = (tile + tl.arange(0, BLOCK)).to(tl.int64)
        element = tl.arange(0, BLOCK_E)
        return batch, head, tile, row, row < num_rows, element, element < HEAD_DIM

    @triton.jit
    def _load(states, strides, batch, head, row, element, mask):
        # Rows [M, E] of one head of `states` [B, H, T, E].
        address = states + batch * strides[0] + head * strides[1] + element[None, :]
        return tl.load(address + row[:, None] * strides[2], mask=mask, other=0.0)

    @triton.jit
    def _context_alignment_attention_fwd_kernel(
        query, keys, values, starts, output, log_sums,
        query_strides, key_strides, value_strides, num_heads, num_rows, scale,
        STEP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_STARTS: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ):
        # One program: a tile of rows of one head. The running softmax is kept in powers of two.
        batch, head, tile, row, is_row, element, is_element = _program(num_heads, num_rows, HEAD_DIM, BLOCK_M, BLOCK_E)
        group = head // GROUP
        first = tl.zeros((BLOCK_M,), tl.int64)
        if HAS_STARTS:
            first = tl.load(starts + batch * num_rows + row, mask=is_row, other=num_rows)
        mask = is_row[:, None] & is_element[None, :]
        rows = _load(query, query_strides, batch, head, row, element, mask)
        scale = scale * 1.4426950408889634
        result = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        for step in tl.static_range(1, STEP + 1):
            own_place = row - (STEP - step)
            is_seen = is_row & (own_place >= first)
            seen_mask = is_seen[:, None] & is_element[None, :]
            own = _load(keys[step], key_strides[step], batch, group, own_place, element, seen_mask)  # [M, E]
            score = tl.sum(rows.to(tl.float32) * own.to(tl.float32), 1) * scale
            score = tl.where(is_seen, score, float("-inf"))
            new_max = tl.maximum(row_max, score)
            # A row that has seen nothing yet has no largest score to subtract.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            weight = tl.exp2(score - shift)
            decay = tl.exp2(row_max - shift)
            own = _load(values[step], value_strides[step], batch, group, own_place, element, seen_mask)
            result = result * decay[:, None] + weight[:, None] * own.to(tl.float32)
            row_sum = row_sum * decay + weight
            row_max = new_max
        key = keys[0] + batch * key_strides[0][0] + group * key_strides[0][1] + element[None, :]
        value = values[0] + batch * value_strides[0][0] + group * value_strides[0][1] + element[None, :]
        begin = 0
        if HAS_STARTS:
            begin = (tl.min(first, 0) // BLOCK_K * BLOCK_K).to(tl.int32)
        end = tl.minimum(tile + BLOCK_M, num_rows) - STEP
        for start in range(begin, end, BLOCK_K):
            place = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            place_mask = (place < num_rows)[:, None] & is_element[None, :]
            tile_keys = tl.load(key + place[:, None] * key_strides[0][2], mask=place_mask, other=0.0)  # [K, E]
            tile_values = tl.load(value + place[:, None] * value_strides[0][2], mask=place_mask, other=0.0)
            visible = is_row[:, None] & (place[None, :] <= row[:, None] - STEP) & (place[None, :] >= first[:, None])
            scores = tl.dot(rows, tl.trans(tile_keys), input_precision=PRECISION) * scale  # [M, K]
            scores = tl.where(visible, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            weights = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(row_max - shift)
            row_sum = row_sum * decay + tl.sum(weights, 1)
            result = result * decay[:, None]
            result += tl.dot(weights.to(tile_values.dtype), tile_values, input_precision=PRECISION)
            row_max = new_max
        result = result / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        tl.store(log_sums + (batch * num_heads + head) * num_rows + row, tl.log2(row_sum) + row_max, mask=is_row)
        cell = (batch * num_rows + row) * num_heads + head  # of [B, T, H]
        tl.store(output + cell[:, None] * HEAD_DIM + element[None, :], result.to(output.dtype.element_ty), mask=mask)

    @triton.jit
    def _context_alignment_attention_query_bwd_kernel(
        query, keys, values, starts, output, log_sums, grad_output, grad_query, deltas,
        query_strides, key_strides, value_strides, num_heads, num_rows, scale,
        STEP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_STARTS: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ):
        # One program: a tile of rows of one head, as forward. It also writes deltas [B, H, T], the products of outputs
        # with their gradients, for the kernels that follow.
        batch, head, tile, row, is_row, element, is_element = _program(num_heads, num_rows, HEAD_DIM, BLOCK_M, BLOCK_E)
        group = head // GROUP
        first = tl.zeros((BLOCK_M,), tl.int64)
        if HAS_STARTS:
            first = tl.load(starts + batch * num_rows + row, mask=is_row, other=num_rows)
        mask = is_row[:, None] & is_element[None, :]
        cell = ((batch * num_rows + row) * num_heads + head)[:, None] * HEAD_DIM + element[None, :]  # of [B, T, H, E]
        grads = tl.load(grad_output + cell, mask=mask, other=0.0)  # [M, E]
        outputs = tl.load(output + cell, mask=mask, other=0.0)
        delta = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
        place_of_sums = (batch * num_heads + head) * num_rows + row
        tl.store(deltas + place_of_sums, delta, mask=is_row)
        log_sum = tl.load(log_sums + place_of_sums, mask=is_row, other=0.0)
        rows = _load(query, query_strides, batch, head, row, element, mask)
        result = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        log2_scale = scale * 1.4426950408889634
        for step in tl.static_range(1, STEP + 1):
            own_place = row - (STEP - step)
            is_seen = is_row & (own_place >= first)
            seen_mask = is_seen[:, None] & is_element[None, :]
            own = _load(values[step], value_strides[step], batch, group, own_place, element, seen_mask)  # [M, E]
            grad_weight = tl.sum(grads.to(tl.float32) * own.to(tl.float32), 1)
            own = _load(keys[step], key_strides[step], batch, group, own_place, element, seen_mask).to(tl.float32)
            score = tl.sum(rows.to(tl.float32) * own, 1) * log2_scale
            weight = tl.where(is_seen, tl.exp2(score - log_sum), 0.0)
            result += (weight * (grad_weight - delta))[:, None] * own
        key = keys[0] + batch * key_strides[0][0] + group * key_strides[0][1] + element[None, :]
        value = values[0] + batch * value_strides[0][0] + group * value_strides[0][1] + element[None, :]
        begin = 0
        if HAS_STARTS:
            begin = (tl.min(first, 0) // BLOCK_K * BLOCK_K).to(tl.int32)
        end = tl.minimum(tile + BLOCK_M, num_rows) - STEP
        for start in range(begin, end, BLOCK_K):
            place = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            place_mask = (place < num_rows)[:, None] & is_element[None, :]
            tile_keys = tl.load(key + place[:, None] * key_strides[0][2], mask=place_mask, other=0.0)  # [K, E]
            tile_values = tl.load(value + place[:, None] * value_strides[0][2], mask=place_mask, other=0.0)
            visible = is_row[:, None] & (place[None, :] <= row[:, None] - STEP) & (place[None, :] >= first[:, None])
            scores = tl.dot(rows, tl.trans(tile_keys), input_precision=PRECISION) * log2_scale  # [M, K]
            weights = tl.where(visible, tl.exp2(scores - log_sum[:, None]), 0.0)
            grad_weights = tl.dot(grads, tl.trans(tile_values), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - delta[:, None])
            result += tl.dot(grad_scores.to(tile_keys.dtype), tile_keys, input_precision=PRECISION)
        address = grad_query + place_of_sums[:, None] * HEAD_DIM + element[None, :]
        tl.store(address, (result * scale).to(grad_query.dtype.element_ty), mask=mask)

    @triton.jit
    def _context_alignment_attention_key_bwd_kernel(
        query, key, value, starts, log_sums, deltas, grad_output, grad_key, grad_value,
        query_strides, key_strides, value_strides, num_heads, num_rows, scale,
        STEP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_STARTS: tl.constexpr,
        PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ):
        # One program: a tile of step 0's keys and values of one group, over all later rows of the group's heads.
        num_groups = num_heads // GROUP
        batch, group, tile, place, is_place, element, is_element = _program(num_groups, num_rows, HEAD_DIM, BLOCK_K, BLOCK_E)
        mask = is_place[:, None] & is_element[None, :]
        tile_keys = _load(key, key_strides, batch, group, place, element, mask)  # [K, E]
        tile_values = _load(value, value_strides, batch, group, place, element, mask)
        end = num_rows
        if HAS_STARTS:
            # Rows whose sequence begins after this tile see none of it; reading all starts costs next to nothing.
            last_place = tl.minimum(tile + BLOCK_K, num_rows) - 1
            end = 0
            for start in range(0, num_rows, 1024):
                row = (start + tl.arange(0, 1024)).to(tl.int64)
                first = tl.load(starts + batch * num_rows + row, mask=row < num_rows, other=num_rows)
                end = tl.maximum(end, tl.max(tl.where(first <= last_place, row + 1, 0), 0).to(tl.int32))
        key_result = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
        value_result = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
        log2_scale = scale * 1.4426950408889634
        for member in range(0, GROUP):
            head = group * GROUP + member
            for start in range((tile + STEP) // BLOCK_M * BLOCK_M, end, BLOCK_M):
                row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                is_row = row < num_rows
                row_mask = is_row[:, None] & is_element[None, :]
                rows = _load(query, query_strides, batch, head, row, element, row_mask)  # [M, E]
                cell = ((batch * num_rows + row) * num_heads + head)[:, None] * HEAD_DIM + element[None, :]
                grads = tl.load(grad_output + cell, mask=row_mask, other=0.0)
                place_of_sums = (batch * num_heads + head) * num_rows + row
                log_sum = tl.load(log_sums + place_of_sums, mask=is_row, other=0.0)
                delta = tl.load(deltas + place_of_sums, mask=is_row, other=0.0)
                visible = is_row[None, :] & (place[:, None] <= row[None, :] - STEP)
                if HAS_STARTS:
                    first = tl.load(starts + batch * num_rows + row, mask=is_row, other=num_rows)
                    visible = visible & (place[:, None] >= first[None, :])
                scores = tl.dot(tile_keys, tl.trans(rows), input_precision=PRECISION) * log2_scale  # [K, M]
                weights = tl.where(visible, tl.exp2(scores - log_sum[None, :]), 0.0)
                value_result += tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION)
                grad_weights = tl.dot(tile_values, tl.trans(grads), input_precision=PRECISION)
                grad_scores = weights * (grad_weights - delta[None, :])
                key_result += tl.dot(grad_scores.to(rows.dtype), rows, input_precision=PRECISION)
        address = ((batch * num_groups + group) * num_rows + place)[:, None] * HEAD_DIM + element[None, :]
        tl.store(grad_key + address, (key_result * scale).to(grad_key.dtype.element_ty), mask=mask)
        tl.store(grad_value + address, value_result.to(grad_value.dtype.element_ty), mask=mask)

    @triton.jit
    def _context_alignment_attention_path_bwd_kernel(
        query, keys, values, starts, log_sums, deltas, grad_output, grad_keys, grad_values,
        query_strides, key_strides, value_strides, num_heads, num_rows, scale,
        STEP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_STARTS: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ):
        # One program: a tile of keys and values of steps 1..k of one group; each is seen by one row of every head.
        num_groups = num_heads // GROUP
        batch, group, _, place, is_place, element, is_element = _program(num_groups, num_rows, HEAD_DIM, BLOCK_K, BLOCK_E)
        mask = is_place[:, None] & is_element[None, :]
        address_of_grads = ((batch * num_groups + group) * num_rows + place)[:, None] * HEAD_DIM + element[None, :]
        log2_scale = scale * 1.4426950408889634
        for step in tl.static_range(1, STEP + 1):
            row = place + (STEP - step)
            is_seen = row < num_rows
            if HAS_STARTS:
                is_seen = is_seen & (place >= tl.load(starts + batch * num_rows + row, mask=is_seen, other=num_rows))
            seen_mask = is_seen[:, None] & is_element[None, :]
            own_key = _load(keys[step], key_strides[step], batch, group, place, element, seen_mask)  # [K, E]
            own_value = _load(values[step], value_strides[step], batch, group, place, element, seen_mask)
            key_result = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
            value_result = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
            for member in range(0, GROUP):
                head = group * GROUP + member
                rows = _load(query, query_strides, batch, head, row, element, seen_mask).to(tl.float32)
                cell = ((batch * num_rows + row) * num_heads + head)[:, None] * HEAD_DIM + element[None, :]
                grads = tl.load(grad_output + cell, mask=seen_mask, other=0.0).to(tl.float32)
                place_of_sums = (batch * num_heads + head) * num_rows + row
                log_sum = tl.load(log_sums + place_of_sums, mask=is_seen, other=0.0)
                delta = tl.load(deltas + place_of_sums, mask=is_seen, other=0.0)
                score = tl.sum(rows * own_key.to(tl.float32), 1) * log2_scale
                weight = tl.where(is_seen, tl.exp2(score - log_sum), 0.0)
                value_result += weight[:, None] * grads
                grad_weight = tl.sum(grads * own_value.to(tl.float32), 1)
                key_result += (weight * (grad_weight - delta))[:, None] * rows
            grad_key, grad_value = grad_keys[step - 1], grad_values[step - 1]
            tl.store(grad_key + address_of_grads, (key_result * scale).to(grad_key.dtype.element_ty), mask=mask)
            tl.store(grad_value + address_of_grads, value_result.to(grad_value.dtype.element_ty), mask=mask)

    def _tiles(head_dim: int, itemsize: int, step: int) -> dict:
        """Tiles of the forward kernel by shape alone: as many rows as fit into registers next to the keys; float32 as in
        tree_attention."""
        block_e = max(16, triton.next_power_of_2(head_dim))
        tiles: dict
        if itemsize == 4:
            block_m = 64 if block_e <= 64 else 16
            tiles = {"PRECISION": "bf16x6", "BLOCK_M": block_m, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1}
            if block_e > 128:
                tiles = {"PRECISION": "ieee", "BLOCK_M": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
        else:
            tiles = {"PRECISION": "ieee", "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
            if block_e > 128:
                tiles.update(BLOCK_M=64, BLOCK_K=32)
            if _is_crowded(block_e, itemsize, step):
                tiles["BLOCK_M"] //= 2
        return {**tiles, "BLOCK_E": block_e}

    def _is_crowded(block_e: int, itemsize: int, step: int) -> bool:
        """Whether the addresses of a long path leave registers for only half as many rows of a wide head."""
        return itemsize == 2 and block_e >= 128 and step > 2

    def _backward_tiles(head_dim: int, itemsize: int, step: int) -> tuple[dict, dict]:
        """Tiles of the two backward kernels with a loop: a program usually holds twice as many rows as it loads at a time."""
        block_e = max(16, triton.next_power_of_2(head_dim))
        held, looped = (64, 32) if block_e <= 128 else (32, 16)
        options = {"PRECISION": "ieee", "BLOCK_E": block_e, "num_warps": 4, "num_stages": 1}
        if itemsize == 4:
            held, looped = (32, 16) if block_e <= 64 else (16, 16)
            options["PRECISION"] = "bf16x6" if block_e <= 64 else "ieee"
        if itemsize == 4 and block_e > 64:
            options.update(num_warps=8, num_stages=2)
        of_rows, of_keys = {**options, "BLOCK_M": held, "BLOCK_K": looped}, {**options, "BLOCK_M": looped, "BLOCK_K": held}
        if itemsize == 4 and block_e <= 128:
            of_keys["num_stages"] = 1
        # More threads hold a row's query, gradient and path, or there are fewer rows, so that no register spills.
        is_crowded = _is_crowded(block_e, itemsize, step) or (itemsize == 2 and block_e > 128)
        if block_e <= (128 if itemsize == 2 else 64) or is_crowded:
            of_rows["num_warps"] = 8
        if is_crowded:
            of_rows["BLOCK_M"] = held // 2
        return of_rows, of_keys

    def _strides(tensors: list[torch.Tensor]) -> tuple:
        return tuple(tuple(tensor.stride()[:3]) for tensor in tensors)

    def _context_alignment_attention_fwd(
        query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], starts: torch.Tensor | None,
        scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_batch, num_heads, num_rows, head_dim = query.shape
        output = torch.empty((num_batch, num_rows, num_heads, head_dim), dtype=query.dtype, device=query.device)
        log_sums = torch.empty((num_batch, num_heads, num_rows), dtype=torch.float32, device=query.device)
        tiles = _tiles(head_dim, query.element_size(), len(keys) - 1)
        grid = (triton.cdiv(num_rows, tiles["BLOCK_M"]), num_batch * num_heads)
        _context_alignment_attention_fwd_kernel[grid](
            query, tuple(keys), tuple(values), log_sums if starts is None else starts, output, log_sums,
            tuple(query.stride()[:3]), _strides(keys), _strides(values), num_heads, num_rows, scale,
            STEP=len(keys) - 1, GROUP=num_heads // keys[0].shape[1], HEAD_DIM=head_dim, HAS_STARTS=starts is not None,
            **tiles,
        )
        return output, log_sums

    def _context_alignment_attention_bwd(
        grad_output: torch.Tensor, output: torch.Tensor, log_sums: torch.Tensor, query: torch.Tensor,
        keys: list[torch.Tensor], values: list[torch.Tensor], starts: torch.Tensor | None, scale: float
    ) -> list[torch.Tensor]:
        num_batch, num_heads, num_rows, head_dim = query.shape
        num_groups, step = keys[0].shape[1], len(keys) - 1
        deltas = torch.empty_like(log_sums)
        shaped = (query, *keys, *values)
        grad_query, *grads = (torch.empty(one.shape, dtype=one.dtype, device=one.device) for one in shaped)
        grad_keys, grad_values = grads[: step + 1], grads[step + 1 :]
        tiles, key_tiles = _backward_tiles(head_dim, query.element_size(), step)
        first_rows = log_sums if starts is None else starts
        sizes = (num_heads, num_rows, scale)
        constants = {"STEP": step, "GROUP": num_heads // num_groups, "HEAD_DIM": head_dim, "HAS_STARTS": starts is not None}
        query_strides = tuple(query.stride()[:3])
        strides = (query_strides, _strides(keys), _strides(values))
        grid = (triton.cdiv(num_rows, tiles["BLOCK_M"]), num_batch * num_heads)
        _context_alignment_attention_query_bwd_kernel[grid](
            *(query, tuple(keys), tuple(values), first_rows, output, log_sums, grad_output, grad_query, deltas),
            *strides, *sizes, **constants, **tiles,
        )
        grid = (triton.cdiv(num_rows, key_tiles["BLOCK_K"]), num_batch * num_groups)
        _context_alignment_attention_key_bwd_kernel[grid](
            *(query, keys[0], values[0], first_rows, log_sums, deltas, grad_output, grad_keys[0], grad_values[0]),
            *(query_strides, strides[1][0], strides[2][0]), *sizes, **constants, **key_tiles,
        )
        if step:
            block_k = max(16, 2048 // tiles["BLOCK_E"])
            _context_alignment_attention_path_bwd_kernel[(triton.cdiv(num_rows, block_k), num_batch * num_groups)](
                *(query, tuple(keys), tuple(values), first_rows, log_sums, deltas, grad_output),
                *(tuple(grad_keys[1:]), tuple(grad_values[1:])), *strides, *sizes,
                **constants, BLOCK_K=block_k, BLOCK_E=tiles["BLOCK_E"], num_warps=8, **ALL_REGISTERS,
            )
        return [grad_query, *grads]

    _context_alignment_attention = operator(_NAMESPACE, _context_alignment_attention_fwd)
    _context_alignment_attention_backward = operator(_NAMESPACE, _context_alignment_attention_bwd)

    @_context_alignment_attention.register_fake
    def _(query, keys, values, starts, scale):
        num_batch, num_heads, num_rows, head_dim = query.shape
        output = query.new_empty((num_batch, num_rows, num_heads, head_dim))
        return output, query.new_empty((num_batch, num_heads, num_rows), dtype=torch.float32)

    @_context_alignment_attention_backward.register_fake
    def _(grad_output, output, log_sums, query, keys, values, starts, scale):
        return [one.new_empty(one.shape) for one in (query, *keys, *values)]

    def _keep_for_backward(ctx, inputs, output):
        query, keys, values, starts, scale = inputs
        ctx.scale, ctx.num_keys = scale, len(keys)
        ctx.save_for_backward(*output, query, *keys, *values, starts)

    def _backward(ctx, grad_output, _):
        output, log_sums, query, *states, starts = ctx.saved_tensors
        keys, values = states[: ctx.num_keys], states[ctx.num_keys :]
        grad_query, *grads = _context_alignment_attention_backward(
            grad_output.contiguous(), output, log_sums, query, keys, values, starts, ctx.scale
        )
        return grad_query, grads[: ctx.num_keys], grads[ctx.num_keys :], None, None

    _context_alignment_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def context_alignment_attention(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], starts: torch.Tensor | None = None,
    scale: float | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """Attention of draft step k over the committed rows, as step 0 wrote them, and over each row's own path.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, E)`): float32, float16 or bfloat16; on PyTorch's path float64 as well.
        keys, values (`list` of k + 1 `torch.Tensor` of shape `(B, G, T, E)`): of steps 0..k; H is a multiple of G, E at
            most 256. Which module's they are is the caller's choice.
        starts (`torch.LongTensor` of shape `(B, T)`, *optional*): first row that each row sees, of its sequence or its
            sliding window; a row of padding starts after itself. Absent, every row sees from row 0 on.
        scale (`float`, *optional*): of the scores; E ** -0.5 if absent.
        implementation (`str`): "auto", "triton" or "torch".

    Keys and values have a contiguous last dimension and are never copied; a query whose last dimension is not
    contiguous, and `starts`, are made contiguous.

    Returns:
        `torch.Tensor` of shape `(B, T, H, E)`, in the query's dtype; gradients reach query, keys and values.
    Raises:
        ValueError: if shapes, strides, dtypes or devices do not fit.
    """
    expect(query.dim() == 4 and query.numel() > 0, "query", "4 dimensions, none empty", tuple(query.shape))
    num_batch, num_heads, num_rows, head_dim = query.shape
    expect(head_dim <= MAX_HEAD_DIM, "query", f"a head dimension up to {MAX_HEAD_DIM}", head_dim)
    expect_float("query", query, has_double=True)
    expect(len(keys) > 0, "keys", "those of step 0 at least", "none")
    expect(len(values) == len(keys), "values", f"those of {len(keys)} steps", len(values))
    fits = keys[0].dim() == 4 and keys[0].shape[1] > 0
    expect(fits, "keys", f"shape {(num_batch, 'G', num_rows, head_dim)}", tuple(keys[0].shape))
    shape = (num_batch, keys[0].shape[1], num_rows, head_dim)
    expect(num_heads % shape[1] == 0, "query", f"a multiple of {shape[1]} heads", num_heads)
    for name, states in (("keys", keys), ("values", values)):
        for tensor in states:
            expect_tensors(query.device, **{name: (tensor, shape, query.dtype)})
            expect_rows(name, tensor)
    if starts is not None:
        expect_tensors(query.device, starts=(starts, (num_batch, num_rows), torch.int64))
        starts = starts.contiguous()
    scale = head_dim**-0.5 if scale is None else float(scale)
    if query.dtype == torch.float64:
        expect(implementation != "triton", "query", "dtype float32, float16 or bfloat16", query.dtype)
        implementation = "torch"
    if not use_triton(implementation, query.device):
        return context_alignment_attention_reference(query, keys, values, starts, scale)
    if query.stride(3) != 1:
        query = query.contiguous()
    output, _ = _context_alignment_attention(query, list(keys), list(values), starts, scale)
    return output
