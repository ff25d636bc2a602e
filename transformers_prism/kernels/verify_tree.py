"""The walk through a verified tree for a batch of rows: which tokens plain decoding would have emitted.

    choice[b, n] = argmax_v logits[b, n, v]                                                 greedy
    choice[b, n] = argmax_v softmax(warped logits[b, n])[v] / noise[step(b) + depth(n), row(b), v]   sampled
    walk         from the root to the child that holds the node's choice, as long as there is one

The warpers are transformers': temperature, top-k, top-p, min-p and typical decoding, in this order. The noise is
exponential: `torch.multinomial(p, 1)` equals `argmax(p / noise)` with noise drawn by the same generator, so that seeds
keep their meaning.

Layout: logits `(B, N, V)`, the tree's tensors `(B, N)`, noise `(W, R, V)`, and one small result `(B, 1 + 2 * S)`: how
many tokens a row emits, the nodes that they are emitted at, the tokens. Nothing is read by the host.

Three launches: `bounds`, only where warpers remove tokens, one program for each node; `choose`, a program for each node
and 4096 tokens; `walk`, one program for each row. A node's logits are never sorted. What a warper keeps is an interval
of values. A bisection over the numbers that the dtype can hold finds its bounds: each pass over the node's row, from the L2
cache, counts or weighs the tokens above a bound, and there are as many passes as the dtype has bits. Of the tokens at the
lower end of top-p's interval only some may be kept; those with the smaller ids are removed first, as a stable sort would.
Bytes moved: the logits once (V * N * B elements), W * R * V float32 of noise, and 16 bytes per program of `choose`.
Source: walk and noise are ours; the warpers are those of transformers' `generation/logits_process.py`.
"""

import torch
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from .dispatch import expect, expect_float, expect_rows, expect_tensors, operator, operator_namespace, use_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_NAMESPACE = operator_namespace(__name__, __file__)
# The walk holds a row's whole tree in registers.
MAX_NODES = 1024
# Warpers by the names of their settings in `verify_tree`, in the order in which transformers applies them.
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
}


def verify_tree_reference(
    logits: torch.Tensor, token_ids: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, num_steps: int,
    noise: torch.Tensor | None, noise_steps: torch.Tensor | None, noise_rows: torch.Tensor | None,
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, typical_p: float | None
) -> torch.Tensor:
    """The definition; see [`verify_tree`]. The warpers are transformers' own."""
    scores = logits.float()
    if noise is not None:
        assert noise_steps is not None, "expected noise_steps with noise"
        assert noise_rows is not None, "expected noise_rows with noise"
        rows = scores.flatten(0, 1)  # [B * N, V]
        settings = (temperature, top_k, top_p, min_p, typical_p)
        for warper, setting in zip(WARPERS.values(), settings, strict=True):
            rows = rows if setting is None else warper(setting)(None, rows)
        probs = torch.softmax(rows, dim=-1).view(scores.shape)
        # Nodes that are too deep for the noise are too deep for the walk.
        steps = (noise_steps[:, None] + depths).clamp(max=noise.shape[0] - 1)
        scores = probs / noise[steps, noise_rows[:, None]]
        is_bad = probs.isnan().any(dim=-1)
    else:
        is_bad = scores.isnan().any(dim=-1)
    choices = scores.argmax(dim=-1).masked_fill(is_bad, -1)  # [B, N]
    node = torch.zeros_like(parents[:, 0])
    is_going = torch.ones_like(node, dtype=torch.bool)
    nodes, tokens, num_emitted = [], [], torch.zeros_like(node)
    for _ in range(num_steps):
        token = choices.gather(1, node[:, None])
        nodes.append(node * is_going)
        tokens.append(token[:, 0] * is_going)
        num_emitted = num_emitted + is_going
        is_child = (parents == node[:, None]) & (token_ids == token) & (depths > 0)
        is_going = is_going & is_child.any(dim=1)
        node = is_child.int().argmax(dim=1)
    return torch.stack((num_emitted, *nodes, *tokens), dim=1)


if triton is not None:

    @triton.jit
    def _float_of(key, SHIFT: tl.constexpr):
        # The float of an integer, in the same order; for a dtype with SHIFT fewer bits than float32.
        bits = key.to(tl.int32) << SHIFT
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _key_of(value, SHIFT: tl.constexpr):
        bits = value.to(tl.int32, bitcast=True)
        return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)

    @triton.jit
    def _is_kept(value, token, floor, ceiling, first_tie):
        return (value <= ceiling) & ((value > floor) | ((value == floor) & (token >= first_tie)))

    @triton.jit
    def _top_k_floor(row, smallest, largest, top_k, vocab_size, SHIFT: tl.constexpr, BLOCK_V: tl.constexpr):
        # The largest number that at least top_k tokens reach.
        low, high = _key_of(smallest, SHIFT), _key_of(largest, SHIFT)
        while low < high:
            middle = (low + high + 1) >> 1
            bound = _float_of(middle, SHIFT)
            counts = tl.zeros((BLOCK_V,), tl.int32)
            for start in range(0, vocab_size, BLOCK_V):
                token = start + tl.arange(0, BLOCK_V)
                value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
                counts += (value >= bound).to(tl.int32)
            is_enough = tl.sum(counts, 0) >= top_k
            low = tl.where(is_enough, middle, low)
            high = tl.where(is_enough, high, middle - 1)
        return tl.maximum(_float_of(low, SHIFT), smallest)

    @triton.jit
    def _top_p_floor(row, floor, largest, rest, scale, vocab_size, SHIFT: tl.constexpr, BLOCK_V: tl.constexpr):
        # The largest number below which at most the share `rest` of the weight lies, and the first token that is kept
        # of those with this number.
        weights = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, vocab_size, BLOCK_V):
            token = start + tl.arange(0, BLOCK_V)
            value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            weights += tl.where(value >= floor, tl.exp2((value - largest) * scale), 0.0)
        budget = rest * tl.sum(weights, 0)
        low, high = _key_of(floor, SHIFT), _key_of(largest, SHIFT)
        removed = budget * 0.0
        while low < high:
            middle = (low + high + 1) >> 1
            bound = _float_of(middle, SHIFT)
            weights = tl.zeros((BLOCK_V,), tl.float32)
            for start in range(0, vocab_size, BLOCK_V):
                token = start + tl.arange(0, BLOCK_V)
                value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
                is_below = (value >= floor) & (value < bound)
                weights += tl.where(is_below, tl.exp2((value - largest) * scale), 0.0)
            below = tl.sum(weights, 0)
            removed = tl.where(below <= budget, below, removed)
            low = tl.where(below <= budget, middle, low)
            high = tl.where(below <= budget, high, middle - 1)
        bound = tl.maximum(_float_of(low, SHIFT), floor)
        lowest = tl.full((BLOCK_V,), float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK_V):
            token = start + tl.arange(0, BLOCK_V)
            value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            lowest = tl.minimum(lowest, tl.where(value >= bound, value, float("inf")))
        new_floor = tl.min(lowest, 0)
        num_dropped = ((budget - removed) / tl.exp2((new_floor - largest) * scale)).to(tl.int32)
        num_seen = num_dropped * 0
        first_kept = num_dropped * 0 + vocab_size
        last = num_dropped * 0
        for start in range(0, vocab_size, BLOCK_V):
            token = start + tl.arange(0, BLOCK_V)
            value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            is_tie = value == new_floor
            rank = num_seen + tl.cumsum(is_tie.to(tl.int32), 0)  # from 1
            first_kept = tl.minimum(first_kept, tl.min(tl.where(is_tie & (rank > num_dropped), token, vocab_size), 0))
            last = tl.maximum(last, tl.max(tl.where(is_tie, token, 0), 0))
            num_seen += tl.sum(is_tie.to(tl.int32), 0)
        return new_floor, tl.minimum(first_kept, last)

    @triton.jit
    def _min_p_floor(row, floor, first_tie, largest, min_p, scale, vocab_size, BLOCK_V: tl.constexpr):
        # The smallest number kept whose weight is at least min_p of the largest.
        lowest = tl.full((BLOCK_V,), float("inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK_V):
            token = start + tl.arange(0, BLOCK_V)
            value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            is_kept = _is_kept(value, token, floor, largest, first_tie)
            is_kept = is_kept & (tl.exp2((value - largest) * scale) >= min_p)
            lowest = tl.minimum(lowest, tl.where(is_kept, value, float("inf")))
        return tl.min(lowest, 0)

    @triton.jit
    def _typical_bounds(row, floor, first_tie, largest, mass, scale, vocab_size, BLOCK_V: tl.constexpr):
        # The smallest interval around the mean log-probability that holds the share `mass` of the weight: how far a
        # token's surprise is from the entropy is how far its log-probability is from their mean.
        weights = tl.zeros((BLOCK_V,), tl.float32)
        products = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, vocab_size, BLOCK_V):
            token = start + tl.arange(0, BLOCK_V)
            value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            is_kept = _is_kept(value, token, floor, largest, first_tie)
            power = tl.where(is_kept, (value - largest) * scale, 0.0)
            weight = tl.where(is_kept, tl.exp2(power), 0.0)
            weights += weight
            products += weight * power
        total = tl.sum(weights, 0)
        mean = tl.sum(products, 0) / total
        new_floor, ceiling = floor, largest
        low, high = _key_of(total * 0.0, 0), _key_of(total * 0.0 + float("inf"), 0)
        while low < high:
            middle = (low + high) >> 1
            bound = _float_of(middle, 0)
            weights = tl.zeros((BLOCK_V,), tl.float32)
            lowest = tl.full((BLOCK_V,), float("inf"), tl.float32)
            highest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
            for start in range(0, vocab_size, BLOCK_V):
                token = start + tl.arange(0, BLOCK_V)
                value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
                power = (value - largest) * scale
                is_near = _is_kept(value, token, floor, largest, first_tie) & (tl.abs(power - mean) <= bound)
                weights += tl.where(is_near, tl.exp2(power), 0.0)
                lowest = tl.minimum(lowest, tl.where(is_near, value, float("inf")))
                highest = tl.maximum(highest, tl.where(is_near, value, float("-inf")))
            is_enough = tl.sum(weights, 0) >= mass * total
            # Taken from the pass with enough weight, since another might round the distance to a token differently.
            new_floor = tl.where(is_enough, tl.min(lowest, 0), new_floor)
            ceiling = tl.where(is_enough, tl.max(highest, 0), ceiling)
            low = tl.where(is_enough, low, middle + 1)
            high = tl.where(is_enough, middle, high)
        return new_floor, ceiling

    @triton.jit
    def _verify_tree_bounds_fwd_kernel(
        logits, bounds, first_ties,
        stride_b, stride_n, num_nodes, vocab_size, scale, top_k, rest, min_p, mass,
        HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, HAS_MIN_P: tl.constexpr, HAS_TYPICAL: tl.constexpr,
        SHIFT: tl.constexpr, BLOCK_V: tl.constexpr,
    ):
        # One program: what the warpers keep of one node's tokens. Those of probability 0 never count.
        cell = tl.program_id(0).to(tl.int64)
        row = logits + cell // num_nodes * stride_b + cell % num_nodes * stride_n
        lowest = tl.full((BLOCK_V,), float("inf"), tl.float32)
        highest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK_V):
            token = start + tl.arange(0, BLOCK_V)
            value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
            lowest = tl.minimum(lowest, tl.where(value > float("-inf"), value, float("inf")))
            highest = tl.maximum(highest, value)
        largest = tl.max(highest, 0)
        floor = tl.min(lowest, 0)
        ceiling = largest
        first_tie = vocab_size * 0
        if HAS_TOP_K:
            floor = _top_k_floor(row, floor, largest, top_k, vocab_size, SHIFT, BLOCK_V)
        if HAS_TOP_P:
            floor, first_tie = _top_p_floor(row, floor, largest, rest, scale, vocab_size, SHIFT, BLOCK_V)
        if HAS_MIN_P:
            new_floor = _min_p_floor(row, floor, first_tie, largest, min_p, scale, vocab_size, BLOCK_V)
            first_tie = tl.where(new_floor == floor, first_tie, 0)
            floor = new_floor
        if HAS_TYPICAL:
            new_floor, ceiling = _typical_bounds(row, floor, first_tie, largest, mass, scale, vocab_size, BLOCK_V)
            first_tie = tl.where(new_floor == floor, first_tie, 0)
            floor = new_floor
        tl.store(bounds + 2 * cell, floor)
        tl.store(bounds + 2 * cell + 1, ceiling)
        tl.store(first_ties + cell, first_tie)

    # Not specialised, since the number of noise steps changes from round to round.
    @triton.jit(do_not_specialize=["num_noise_steps", "num_noise_rows"])
    def _verify_tree_choose_fwd_kernel(
        logits, depths, noise, noise_steps, noise_rows, bounds, first_ties, part_values, part_largest, part_tokens,
        stride_b, stride_n, num_nodes, vocab_size, num_noise_steps, num_noise_rows, scale,
        IS_SAMPLED: tl.constexpr, HAS_BOUNDS: tl.constexpr, BLOCK_V: tl.constexpr,
    ):
        # One program: the best of BLOCK_V tokens of one node.
        cell = tl.program_id(0).to(tl.int64)
        batch = cell // num_nodes
        token = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        row = logits + batch * stride_b + cell % num_nodes * stride_n
        value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        num_bad = tl.sum((value != value).to(tl.int32), 0)
        part = cell * tl.num_programs(1) + tl.program_id(1)
        if IS_SAMPLED:
            num_bad += tl.sum((value == float("inf")).to(tl.int32), 0)
            is_kept = value > float("-inf")
            if HAS_BOUNDS:
                floor, ceiling = tl.load(bounds + 2 * cell), tl.load(bounds + 2 * cell + 1)
                is_kept = is_kept & _is_kept(value, token, floor, ceiling, tl.load(first_ties + cell))
            largest = tl.max(tl.where(is_kept, value, float("-inf")), 0)
            step = tl.load(noise_steps + batch) + tl.load(depths + cell)
            noise_row = tl.load(noise_rows + batch)
            # Nodes that are too deep for the noise are too deep for the walk.
            is_drawn = (step >= 0) & (step < num_noise_steps) & (noise_row >= 0) & (noise_row < num_noise_rows)
            noise += (step * num_noise_rows + noise_row) * vocab_size
            divisor = tl.load(noise + token, mask=token < tl.where(is_drawn, vocab_size, 0), other=1.0)
            value = tl.where(is_kept, tl.exp2((value - largest) * scale) / divisor, -1.0)
            tl.store(part_largest + part, largest)
        best, place = tl.max(value, 0, return_indices=True)
        tl.store(part_values + part, best)
        tl.store(part_tokens + part, tl.where(num_bad > 0, -1, tl.program_id(1) * BLOCK_V + place).to(tl.int64))

    @triton.jit(do_not_specialize=["num_steps"])
    def _verify_tree_walk_fwd_kernel(
        token_ids, parents, part_values, part_largest, part_tokens, output,
        num_nodes, num_steps, num_parts, scale,
        IS_SAMPLED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    ):
        # One program: the walk of one row.
        batch = tl.program_id(0).to(tl.int64)
        index = tl.arange(0, BLOCK_N)
        is_child = (index > 0) & (index < num_nodes)
        held = tl.load(token_ids + batch * num_nodes + index, mask=is_child, other=-1)
        parent = tl.load(parents + batch * num_nodes + index, mask=is_child, other=-1)
        part = tl.arange(0, BLOCK_P)
        is_part = part < num_parts
        steps = tl.arange(0, BLOCK_S)
        nodes = tl.zeros((BLOCK_S,), tl.int64)
        tokens = tl.zeros((BLOCK_S,), tl.int64)
        node = tl.min(index, 0)
        step = tl.min(index, 0)
        is_going = step < num_steps
        while is_going:
            cells = (batch * num_nodes + node) * num_parts + part
            values = tl.load(part_values + cells, mask=is_part, other=float("-inf"))
            found = tl.load(part_tokens + cells, mask=is_part, other=0)
            is_bad = tl.min(found, 0) < 0
            if IS_SAMPLED:
                largest = tl.load(part_largest + cells, mask=is_part, other=float("-inf"))
                of_all = tl.max(largest, 0)
                is_bad = is_bad | (of_all == float("-inf"))
                values = tl.where(largest > float("-inf"), values * tl.exp2((largest - of_all) * scale), -1.0)
            _, place = tl.max(values, 0, return_indices=True)
            token = tl.where(is_bad, -1, tl.sum(tl.where(part == place, found, 0), 0))
            nodes = tl.where(steps == step, node, nodes)
            tokens = tl.where(steps == step, token, tokens)
            child = tl.min(tl.where(is_child & (parent == node) & (held == token), index, BLOCK_N), 0)
            step += 1
            is_going = (child < BLOCK_N) & (token >= 0) & (step < num_steps)
            node = child
        output += batch * (1 + 2 * num_steps)
        tl.store(output, step.to(tl.int64))
        tl.store(output + 1 + steps, nodes, mask=steps < num_steps)
        tl.store(output + 1 + num_steps + steps, tokens, mask=steps < num_steps)

    _LOG2_E = 1.4426950408889634

    def _tile(vocab_size: int, most: int, num_warps: int) -> dict:
        """Tokens that a program holds at once."""
        return {"BLOCK_V": min(most, max(128, triton.next_power_of_2(vocab_size))), "num_warps": num_warps}

    def _verify_tree_bounds_fwd(
        logits: torch.Tensor, scale: float, top_k: int | None, top_p: float | None, min_p: float | None,
        typical_p: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_batch, num_nodes, vocab_size = logits.shape
        bounds = torch.empty((num_batch, num_nodes, 2), dtype=torch.float32, device=logits.device)
        first_ties = torch.empty((num_batch, num_nodes), dtype=torch.int32, device=logits.device)
        _verify_tree_bounds_fwd_kernel[(num_batch * num_nodes,)](
            logits,
            bounds,
            first_ties,
            *logits.stride()[:2],
            num_nodes,
            vocab_size,
            scale,
            top_k or 0,
            1.0 - (top_p or 0.0),
            min_p or 0.0,
            typical_p or 0.0,
            HAS_TOP_K=top_k is not None,
            HAS_TOP_P=top_p is not None,
            HAS_MIN_P=min_p is not None,
            HAS_TYPICAL=typical_p is not None,
            SHIFT={torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[logits.dtype],
            # Each program has a multiprocessor to itself.
            **_tile(vocab_size, 8192, num_warps=16),
        )
        return bounds, first_ties

    def _verify_tree_fwd(
        logits: torch.Tensor, token_ids: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, num_steps: int,
        noise: torch.Tensor | None, noise_steps: torch.Tensor | None, noise_rows: torch.Tensor | None,
        temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None,
        typical_p: float | None
    ) -> torch.Tensor:
        num_batch, num_nodes, vocab_size = logits.shape
        device, scale = logits.device, _LOG2_E / (temperature or 1.0)
        tile = _tile(vocab_size, 4096, num_warps=8)
        num_parts = triton.cdiv(vocab_size, tile["BLOCK_V"])
        shape = (num_batch, num_nodes, num_parts)
        values, largest = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
        output = torch.empty((num_batch, 1 + 2 * num_steps), dtype=torch.int64, device=device)
        has_bounds = any(setting is not None for setting in (top_k, top_p, min_p, typical_p))
        bounds = first_ties = tokens
        if has_bounds:
            bounds, first_ties = _verify_tree_bounds_fwd(logits, scale, top_k, top_p, min_p, typical_p)
        is_sampled = noise is not None
        _verify_tree_choose_fwd_kernel[(num_batch * num_nodes, num_parts)](
            logits, depths, *((noise, noise_steps, noise_rows) if is_sampled else (values, depths, depths)), bounds,
            first_ties, values, largest, tokens, *logits.stride()[:2], num_nodes, vocab_size,
            *(noise.shape[:2] if noise is not None else (0, 0)), scale,
            IS_SAMPLED=is_sampled, HAS_BOUNDS=has_bounds, **tile,
        )
        _verify_tree_walk_fwd_kernel[(num_batch,)](
            token_ids, parents, values, largest, tokens, output, num_nodes, num_steps, num_parts, scale,
            IS_SAMPLED=is_sampled, BLOCK_N=max(2, triton.next_power_of_2(num_nodes)),
            BLOCK_S=max(2, triton.next_power_of_2(num_steps)), BLOCK_P=max(2, triton.next_power_of_2(num_parts)),
            num_warps=1,
        )
        return output

    _verify_tree = operator(_NAMESPACE, _verify_tree_fwd)

    @_verify_tree.register_fake
    def _(logits, token_ids, parents, depths, num_steps, *rest):
        return token_ids.new_empty((token_ids.shape[0], 1 + 2 * num_steps))


def verify_tree(
    logits: torch.Tensor, token_ids: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor, num_steps: int,
    noise: torch.Tensor | None = None, noise_steps: torch.Tensor | None = None, noise_rows: torch.Tensor | None = None,
    temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
    typical_p: float | None = None, implementation: str = "auto"
) -> torch.Tensor:
    """Walk from each row's root to the children that hold the chosen tokens, without a read by the host.

    Args:
        logits (`torch.Tensor` of shape `(B, N, V)`): the target's at each node; float32, float16 or bfloat16.
        token_ids, parents, depths (`torch.LongTensor` of shape `(B, N)`): the tree, as `Tree` holds it; of twins (two
            children with one token) the first is taken.
        num_steps (`int`): S, tokens emitted at most; with the tree's depth + 1, no walk ends early.
        noise (`torch.Tensor` of shape `(W, R, V)`, *optional*): float32, exponential, of W steps of a batch of R rows.
            Tokens are sampled with it; without it they are the argmax, and no warper may be given.
        noise_steps (`torch.LongTensor` of shape `(B,)`): which of the W steps each row's next token is.
        noise_rows (`torch.LongTensor` of shape `(B,)`): which of the R rows each row is.
        temperature, top_k, top_p, min_p, typical_p (*optional*): the warpers of transformers, each with its default
            `filter_value` and `min_tokens_to_keep`; absent ones are not applied.
        implementation (`str`): "auto", "triton" (N at most 1024) or "torch".

    Logits have a contiguous last dimension and noise is contiguous; neither is ever copied. The tree's tensors,
    `noise_steps` and `noise_rows` are made contiguous where they are not.

    Returns:
        `torch.LongTensor` of shape `(B, 1 + 2 * S)`: n, the number of tokens emitted; then the nodes that they are
        emitted at, the root first; then the tokens. After the first n of each come zeros. A node whose probabilities
        are not numbers emits -1 and ends the walk.
    Raises:
        ValueError: if shapes, strides, dtypes, devices or settings do not fit, before anything is computed.
    """
    expect(logits.dim() == 3 and logits.numel() > 0, "logits", "3 dimensions, none empty", tuple(logits.shape))
    expect_float("logits", logits)
    expect_rows("logits", logits)
    expect(num_steps > 0, "num_steps", "at least 1", num_steps)
    num_batch, num_nodes, vocab_size = logits.shape
    for name, tensor in (("token_ids", token_ids), ("parents", parents), ("depths", depths)):
        expect_tensors(logits.device, **{name: (tensor, (num_batch, num_nodes), torch.int64)})
    settings = (temperature, top_k, top_p, min_p, typical_p)
    if noise is None:
        named = zip(("noise_steps", "noise_rows", *WARPERS), (noise_steps, noise_rows, *settings), strict=True)
        for name, value in named:
            expect(value is None, name, "it with noise only", value)
    else:
        fits = noise.dim() == 3 and noise.numel() > 0 and noise.shape[2] == vocab_size and noise.is_contiguous()
        expect(fits, "noise", f"shape {('W', 'R', vocab_size)}, contiguous", tuple(noise.shape))
        expect_tensors(logits.device, noise=(noise, tuple(noise.shape), torch.float32))
        for name, indices in (("noise_steps", noise_steps), ("noise_rows", noise_rows)):
            if indices is None:
                raise ValueError(f"{name}: expected it with noise, got None")
            expect_tensors(logits.device, **{name: (indices, (num_batch,), torch.int64)})
        for warper, setting in zip(WARPERS.values(), settings, strict=True):
            if setting is not None:
                warper(setting)  # refuses what makes no sense
    limit = MAX_NODES if implementation == "triton" else num_nodes
    expect(num_nodes <= limit, "logits", f"at most {MAX_NODES} nodes", num_nodes)
    has_kernel = use_triton(implementation, logits.device) and num_nodes <= MAX_NODES
    run = _verify_tree if has_kernel else verify_tree_reference
    tree = (token_ids.contiguous(), parents.contiguous(), depths.contiguous())
    if noise_steps is not None and noise_rows is not None:
        noise_steps, noise_rows = noise_steps.contiguous(), noise_rows.contiguous()
    drawn = (noise, noise_steps, noise_rows)
    return run(logits, *tree, num_steps, *drawn, temperature, top_k, top_p, min_p, typical_p)
