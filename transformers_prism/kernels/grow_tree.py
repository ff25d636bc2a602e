"""How a tree of drafted tokens grows, for a batch of rows: one draft step, the choice of nodes, and their ancestors.

[`grow_tree`], a draft step that has drawn K children of each of W nodes:

    log_probs[b, w * K + k] = node_log_probs[b, w] + child_log_probs[b, w, k]
    chosen[b]               = indices of the largest of these, best first: the nodes that the next step expands
    ancestors[b, j]         = node_ancestors[b, chosen[b, j] // K], and bit first_bit + j

[`choose_nodes`], at the end: the most probable nodes of all that were drawn, as a tree in the order drawn. The choice is
closed under parents, because log-probabilities never rise along a path and parents come first.

[`ancestor_bits`]: the ancestors of each node of a tree, itself included, from the nodes' parents.

Ancestors are bits of int64 words `(B, N, ceil(R / 64))`, bit j % 64 of word j // 64, as the tree attention takes them.
Of equal log-probabilities the smaller index comes first; NaN counts as minus infinity. All paths give the same bits.

Bytes moved: inputs and outputs once, a few KB a row. The kernels save launches: one instead of about ten, twenty and
twenty-five. Each program serves a row. A candidate is one 64-bit number: in its high bits the log-probability in an
order-preserving form, in its low bits the index counted backwards, so that comparing two also decides ties.
Source: EAGLE-2 (arXiv:2406.16858), section 4; ties and orders as in its released code.
"""

from typing import NamedTuple

import torch

from .dispatch import expect, expect_tensors, operator, operator_namespace, use_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_NAMESPACE = operator_namespace(__name__, __file__)
_WORD = 64
_NUM_KEPT_WORDS = 4
# Limits of the kernels: nodes that a step expands, children of a step, and nodes of a tree, the root included.
MAX_WIDTH = 64
MAX_CHILDREN = 4096
MAX_NODES = 128


class GrownStep(NamedTuple):
    """The result of a draft step: all C children, and the N of them that the next step expands, best first."""

    all_log_probs: torch.Tensor  # [B, C], cumulative
    chosen: torch.Tensor  # [B, N], index of each node among the children
    token_ids: torch.Tensor  # [B, N]
    log_probs: torch.Tensor  # [B, N], cumulative
    parents: torch.Tensor  # [B, N], index of each node's parent in the step before
    ancestors: torch.Tensor  # [B, N, words]


def stable_top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest values along the last dimension, ties to the smaller index, NaN last; `(..., k)`."""
    values = torch.nan_to_num(values, nan=-torch.inf, neginf=-torch.inf)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def grow_tree_reference(
    child_ids: torch.Tensor, child_log_probs: torch.Tensor, log_probs: torch.Tensor, ancestors: torch.Tensor,
    num_next: int, first_bit: int
) -> GrownStep:
    """The definition; see [`grow_tree`]."""
    all_log_probs = (log_probs[..., None] + child_log_probs).flatten(1)  # [B, C]
    chosen = stable_top_k(all_log_probs, num_next)
    parents = chosen // child_ids.shape[2]
    own = _own_bits(first_bit, num_next, ancestors.shape[2], ancestors.device)
    inherited = ancestors.gather(1, parents[..., None].expand(-1, -1, ancestors.shape[2]))
    token_ids = child_ids.flatten(1).gather(1, chosen)
    return GrownStep(all_log_probs, chosen, token_ids, all_log_probs.gather(1, chosen), parents, inherited | own)


def _own_bits(first: int, count: int, num_words: int, device) -> torch.Tensor:
    """Words `(count, num_words)` of which row j has bit `first + j`."""
    if num_words <= _NUM_KEPT_WORDS and device.type == "cpu":
        return _BITS[first : first + count, :num_words]
    return _single_bits(first, count, num_words, device)


def _single_bits(first: int, count: int, num_words: int, device) -> torch.Tensor:
    bit = torch.arange(first, first + count, device=device)[:, None]
    own = torch.ones_like(bit) << (bit & (_WORD - 1))
    return own if num_words == 1 else own * (torch.arange(num_words, device=device) == bit // _WORD)


_BITS = _single_bits(0, _WORD * _NUM_KEPT_WORDS, _NUM_KEPT_WORDS, torch.device("cpu"))


def choose_nodes_reference(
    root_ids: torch.Tensor, token_ids: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor,
    log_probs: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition; see [`choose_nodes`]."""
    chosen = stable_top_k(log_probs, num_nodes).sort(dim=-1).values  # [B, n]
    node_of_candidate = torch.zeros_like(token_ids)
    order = torch.arange(1, num_nodes + 1, device=chosen.device).expand_as(chosen)
    node_of_candidate.scatter_(1, chosen, order)
    pool_parents = parents.gather(1, chosen)
    tree_parents = node_of_candidate.gather(1, pool_parents.clamp(min=0)) * (pool_parents >= 0)
    zeros = torch.zeros_like(root_ids)[:, None]
    return (
        torch.cat((root_ids[:, None], token_ids.gather(1, chosen)), dim=1),
        torch.cat((zeros, tree_parents), dim=1),
        torch.cat((zeros, depths.gather(1, chosen)), dim=1),
        torch.cat((zeros.to(log_probs.dtype), log_probs.gather(1, chosen)), dim=1),
    )


def ancestor_bits_reference(parents: torch.Tensor) -> torch.Tensor:
    """The definition; see [`ancestor_bits`]."""
    num_rows, num_nodes = parents.shape
    num_words = -(-num_nodes // _WORD)
    bits = _own_bits(0, num_nodes, num_words, parents.device).expand(num_rows, -1, -1)
    ancestor = parents
    # Each pass doubles the levels that a node knows: it adds those that its farthest known ancestor knows.
    for _ in range((num_nodes - 1).bit_length()):
        bits = bits | bits.gather(1, ancestor[..., None].expand(-1, -1, num_words))
        ancestor = ancestor.gather(1, ancestor)
    return bits.contiguous()


if triton is not None:

    @triton.jit
    def _as_candidates(values, index, is_candidate):
        # NaN as minus infinity, minus zero as zero; of negative numbers the larger has the smaller bits.
        values = tl.where(values == values, values, float("-inf"))
        bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        candidates = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
        return tl.where(is_candidate, candidates, -9223372036854775808)

    @triton.jit
    def _insert(candidates, best, NUM_BEST: tl.constexpr):
        # The largest of `best` [NUM_BEST] and `candidates`, in no order; all numbers of `best` differ.
        num_better = tl.sum((candidates > tl.min(best, 0)).to(tl.int32), 0)
        for _ in range(0, tl.minimum(num_better, NUM_BEST)):
            largest = tl.max(candidates, 0)
            smallest = tl.min(best, 0)
            best = tl.where((best == smallest) & (largest > smallest), largest, best)
            candidates = tl.where(candidates == largest, -9223372036854775808, candidates)
        return best

    @triton.jit(do_not_specialize=["num_children", "first_bit"])
    def _grow_tree_fwd_kernel(
        child_ids, child_log_probs, log_probs, ancestors, all_log_probs, chosen, next_ids, next_log_probs,
        next_parents, next_ancestors,
        num_children, first_bit,
        TOP_K: tl.constexpr, NUM_NEXT: tl.constexpr, NUM_WORDS: tl.constexpr, NUM_BEST: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
    ):
        # One program: all children of one row.
        row = tl.program_id(0).to(tl.int64)
        width = num_children // TOP_K
        child = tl.arange(0, BLOCK_C)
        is_child = child < num_children
        first = row * num_children
        values = tl.load(child_log_probs + first + child, mask=is_child, other=0.0)
        values += tl.load(log_probs + row * width + child // TOP_K, mask=is_child, other=0.0)
        tl.store(all_log_probs + first + child, values, mask=is_child)
        rank = tl.arange(0, NUM_BEST)
        # Less than any candidate, and all different.
        best = rank.to(tl.int64) - 9223372036854775807
        best = _insert(_as_candidates(values, child, is_child), best, NUM_BEST)
        # The position of each is the number of those that are better.
        position = tl.sum((best[None, :] > best[:, None]).to(tl.int32), 1)
        is_next = position < NUM_NEXT
        index = tl.where(is_next, 0x7FFFFFFF - (best & 0x7FFFFFFF), 0)
        parent = index // TOP_K
        value = tl.load(child_log_probs + first + index, mask=is_next, other=0.0)
        value += tl.load(log_probs + row * width + parent, mask=is_next, other=0.0)
        cell = row * NUM_NEXT + position
        tl.store(chosen + cell, index, mask=is_next)
        tl.store(next_ids + cell, tl.load(child_ids + first + index, mask=is_next, other=0), mask=is_next)
        tl.store(next_log_probs + cell, value, mask=is_next)
        tl.store(next_parents + cell, parent, mask=is_next)
        word = tl.arange(0, BLOCK_W)
        mask = is_next[:, None] & (word < NUM_WORDS)[None, :]
        address = ancestors + (row * width + parent)[:, None] * NUM_WORDS + word[None, :]
        bit = (first_bit + position).to(tl.int64)
        own = (word[None, :] == (bit // 64)[:, None]).to(tl.int64) << (bit % 64)[:, None]
        bits = tl.load(address, mask=mask, other=0) | own
        tl.store(next_ancestors + cell[:, None] * NUM_WORDS + word[None, :], bits, mask=mask)

    @triton.jit(do_not_specialize=["num_candidates"])
    def _choose_nodes_fwd_kernel(
        root_ids, token_ids, parents, depths, log_probs, tree_ids, tree_parents, tree_depths, tree_log_probs,
        num_candidates,
        NUM_NODES: tl.constexpr, NUM_BEST: tl.constexpr, BLOCK_C: tl.constexpr,
    ):
        # One program: all candidates of one row.
        row = tl.program_id(0).to(tl.int64)
        first = row * num_candidates
        best = tl.arange(0, NUM_BEST).to(tl.int64) - 9223372036854775807
        for start in range(0, num_candidates, BLOCK_C):
            candidate = start + tl.arange(0, BLOCK_C)
            is_candidate = candidate < num_candidates
            values = tl.load(log_probs + first + candidate, mask=is_candidate, other=0.0)
            best = _insert(_as_candidates(values, candidate, is_candidate), best, NUM_BEST)
        is_node = tl.sum((best[None, :] > best[:, None]).to(tl.int32), 1) < NUM_NODES
        # What was not chosen gets an index beyond all candidates, so that nothing below counts it.
        index = tl.where(is_node, 0x7FFFFFFF - (best & 0x7FFFFFFF), 0x7FFFFFFF).to(tl.int32)
        parent = tl.load(parents + first + index, mask=is_node, other=-1).to(tl.int32)
        node = 1 + tl.sum((index[None, :] < index[:, None]).to(tl.int32), 1)
        parent_node = 1 + tl.sum((index[None, :] < parent[:, None]).to(tl.int32), 1)
        has_parent = tl.sum((index[None, :] == parent[:, None]).to(tl.int32), 1) > 0
        tree = row * (NUM_NODES + 1)
        tl.store(tree_parents + tree + node, tl.where(has_parent, parent_node, 0).to(tl.int64), mask=is_node)
        tl.store(tree_ids + tree + node, tl.load(token_ids + first + index, mask=is_node, other=0), mask=is_node)
        tl.store(tree_depths + tree + node, tl.load(depths + first + index, mask=is_node, other=0), mask=is_node)
        value = tl.load(log_probs + first + index, mask=is_node, other=0.0)
        tl.store(tree_log_probs + tree + node, value, mask=is_node)
        zero = row * 0
        tl.store(tree_ids + tree, tl.load(root_ids + row))
        tl.store(tree_parents + tree, zero)
        tl.store(tree_depths + tree, zero)
        tl.store(tree_log_probs + tree, zero.to(tl.float32))

    @triton.jit
    def _ancestor_bits_fwd_kernel(
        parents, bits, NUM_NODES: tl.constexpr, NUM_WORDS: tl.constexpr, BLOCK_N: tl.constexpr
    ):
        # One program: all nodes of one row, each on its way to the root.
        row = tl.program_id(0).to(tl.int64)
        node = tl.arange(0, BLOCK_N).to(tl.int64)
        word = tl.arange(0, triton.next_power_of_2(NUM_WORDS))
        is_node = node < NUM_NODES
        at = tl.where(is_node, node, 0)
        result = (word[None, :] == (at // 64)[:, None]).to(tl.int64) << (at % 64)[:, None]
        num_left = tl.max(tl.where(is_node, NUM_NODES, 0), 0)
        # The bound ends the loop even if the parents form no tree.
        while (tl.max(at, 0) > 0) & (num_left > 0):
            at = tl.load(parents + row * NUM_NODES + at, mask=(at >= 0) & (at < NUM_NODES), other=0)
            result |= (word[None, :] == (at // 64)[:, None]).to(tl.int64) << (at % 64)[:, None]
            num_left -= 1
        mask = is_node[:, None] & (word < NUM_WORDS)[None, :]
        tl.store(bits + (row * NUM_NODES + node)[:, None] * NUM_WORDS + word[None, :], result, mask=mask)

    def _grow_tree_fwd(
        child_ids: torch.Tensor, child_log_probs: torch.Tensor, log_probs: torch.Tensor, ancestors: torch.Tensor,
        num_next: int, first_bit: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows, width, top_k = child_ids.shape
        num_words, device = ancestors.shape[2], child_ids.device
        all_log_probs = torch.empty((num_rows, width * top_k), dtype=torch.float32, device=device)
        chosen = torch.empty((num_rows, num_next), dtype=torch.int64, device=device)
        next_ids, next_parents = torch.empty_like(chosen), torch.empty_like(chosen)
        next_log_probs = torch.empty((num_rows, num_next), dtype=torch.float32, device=device)
        next_ancestors = torch.empty((num_rows, num_next, num_words), dtype=torch.int64, device=device)
        outputs = (all_log_probs, chosen, next_ids, next_log_probs, next_parents, next_ancestors)
        block_c = triton.next_power_of_2(width * top_k)
        _grow_tree_fwd_kernel[(num_rows,)](
            child_ids, child_log_probs, log_probs, ancestors, *outputs, width * top_k, first_bit,
            TOP_K=top_k, NUM_NEXT=num_next, NUM_WORDS=num_words, NUM_BEST=max(2, triton.next_power_of_2(num_next)),
            BLOCK_C=max(2, block_c), BLOCK_W=triton.next_power_of_2(num_words), num_warps=8 if block_c > 1024 else 4,
        )
        return outputs

    def _choose_nodes_fwd(
        root_ids: torch.Tensor, token_ids: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor,
        log_probs: torch.Tensor, num_nodes: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        num_rows, num_candidates = token_ids.shape
        tree_ids = torch.empty((num_rows, num_nodes + 1), dtype=torch.int64, device=token_ids.device)
        tree_parents, tree_depths = torch.empty_like(tree_ids), torch.empty_like(tree_ids)
        tree_log_probs = torch.empty((num_rows, num_nodes + 1), dtype=torch.float32, device=token_ids.device)
        outputs = (tree_ids, tree_parents, tree_depths, tree_log_probs)
        num_best = max(2, triton.next_power_of_2(num_nodes))
        _choose_nodes_fwd_kernel[(num_rows,)](
            root_ids, token_ids, parents, depths, log_probs, *outputs, num_candidates,
            NUM_NODES=num_nodes, NUM_BEST=num_best, BLOCK_C=1024, num_warps=8 if num_best > 64 else 4,
        )
        return outputs

    def _ancestor_bits_fwd(parents: torch.Tensor) -> torch.Tensor:
        num_rows, num_nodes = parents.shape
        num_words = triton.cdiv(num_nodes, _WORD)
        bits = torch.empty((num_rows, num_nodes, num_words), dtype=torch.int64, device=parents.device)
        _ancestor_bits_fwd_kernel[(num_rows,)](
            parents, bits,
            NUM_NODES=num_nodes, NUM_WORDS=num_words, BLOCK_N=max(2, triton.next_power_of_2(num_nodes)), num_warps=4,
        )
        return bits

    _grow_tree = operator(_NAMESPACE, _grow_tree_fwd)
    _choose_nodes = operator(_NAMESPACE, _choose_nodes_fwd)
    _ancestor_bits = operator(_NAMESPACE, _ancestor_bits_fwd)

    @_grow_tree.register_fake
    def _(child_ids, child_log_probs, log_probs, ancestors, num_next, first_bit):
        num_rows, width, top_k = child_ids.shape
        shape = (num_rows, num_next)
        return (
            log_probs.new_empty((num_rows, width * top_k)),
            child_ids.new_empty(shape),
            child_ids.new_empty(shape),
            log_probs.new_empty(shape),
            child_ids.new_empty(shape),
            ancestors.new_empty((*shape, ancestors.shape[2])),
        )

    @_choose_nodes.register_fake
    def _(root_ids, token_ids, parents, depths, log_probs, num_nodes):
        shape = (token_ids.shape[0], num_nodes + 1)
        return (*(token_ids.new_empty(shape) for _ in range(3)), log_probs.new_empty(shape))

    @_ancestor_bits.register_fake
    def _(parents):
        return parents.new_empty((*parents.shape, -(-parents.shape[1] // _WORD)))


def grow_tree(
    child_ids: torch.Tensor, child_log_probs: torch.Tensor, log_probs: torch.Tensor, ancestors: torch.Tensor,
    num_next: int, first_bit: int, implementation: str = "auto"
) -> GrownStep:
    """Add the children that a draft step has drawn, and choose those that the next step expands.

    Tensors of any strides are made contiguous.

    Args:
        child_ids (`torch.LongTensor` of shape `(B, W, K)`): tokens drawn below each of W nodes.
        child_log_probs (`torch.FloatTensor` of shape `(B, W, K)`): of each token, given the path to its node, in nats.
        log_probs (`torch.FloatTensor` of shape `(B, W)`): cumulative ones of the W nodes.
        ancestors (`torch.LongTensor` of shape `(B, W, words)`): bits of the W nodes.
        num_next (`int`): nodes to choose, 1 to W * K.
        first_bit (`int`): bit of the first of them; the others get the bits after it.
        implementation (`str`): "auto", "triton" (W * K at most 4096, `num_next` at most 64) or "torch". "auto" takes
            PyTorch's path beyond.
    Returns:
        `GrownStep`: the cumulative log-probabilities, and the chosen nodes.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or there are too few bits for the nodes.
    """
    expect(
        child_ids.dim() == 3 and child_ids.numel() > 0, "child_ids", "3 dimensions, none empty", tuple(child_ids.shape)
    )
    num_rows, width, top_k = child_ids.shape
    expect(child_ids.dtype == torch.int64, "child_ids", "dtype torch.int64", child_ids.dtype)
    num_words = ancestors.shape[-1] if ancestors.dim() else 0
    expect_tensors(
        child_ids.device,
        child_log_probs=(child_log_probs, (num_rows, width, top_k), torch.float32),
        log_probs=(log_probs, (num_rows, width), torch.float32),
        ancestors=(ancestors, (num_rows, width, num_words), torch.int64),
    )
    num_children = width * top_k
    most_children, most = num_children, num_children
    if implementation == "triton":
        most_children, most = MAX_CHILDREN, min(num_children, MAX_WIDTH)
    expect(num_children <= most_children, "child_ids", f"at most {MAX_CHILDREN} children of a row", num_children)
    expect(1 <= num_next <= most, "num_next", f"1 to {most}", num_next)
    last, num_bits = first_bit + num_next, _WORD * num_words
    expect(0 <= first_bit and last <= num_bits, "ancestors", f"bits for {last} nodes of a tree", num_bits)
    fits = num_children <= MAX_CHILDREN and num_next <= MAX_WIDTH
    if not (use_triton(implementation, child_ids.device) and fits):
        return grow_tree_reference(child_ids, child_log_probs, log_probs, ancestors, num_next, first_bit)
    tensors = (tensor.contiguous() for tensor in (child_ids, child_log_probs, log_probs, ancestors))
    return GrownStep(*_grow_tree(*tensors, num_next, first_bit))


def choose_nodes(
    root_ids: torch.Tensor, token_ids: torch.Tensor, parents: torch.Tensor, depths: torch.Tensor,
    log_probs: torch.Tensor, num_nodes: int, implementation: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the most probable of C candidates as a tree below each row's last committed token.

    Tensors of any strides are made contiguous.

    Args:
        root_ids (`torch.LongTensor` of shape `(B,)`): last committed token of each row.
        token_ids, parents, depths (`torch.LongTensor` of shape `(B, C)`): in the order drawn; a parent is a smaller
            index among the candidates, or -1 for the root.
        log_probs (`torch.FloatTensor` of shape `(B, C)`): cumulative ones.
        num_nodes (`int`): candidates to keep, 1 to C.
        implementation (`str`): "auto", "triton" (`num_nodes` at most 127) or "torch". "auto" takes PyTorch's path
            beyond.
    Returns:
        `tuple`: token ids, parents, depths and cumulative log-probabilities of the tree's nodes, each of shape
        `(B, num_nodes + 1)`: the root, then the chosen candidates in the order drawn. The root is its own parent.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    expect(
        token_ids.dim() == 2 and token_ids.numel() > 0, "token_ids", "2 dimensions, none empty", tuple(token_ids.shape)
    )
    shape, integer = tuple(token_ids.shape), torch.int64
    expect_tensors(
        token_ids.device,
        token_ids=(token_ids, shape, integer),
        root_ids=(root_ids, shape[:1], integer),
        parents=(parents, shape, integer),
        depths=(depths, shape, integer),
        log_probs=(log_probs, shape, torch.float32),
    )
    most = min(shape[1], MAX_NODES - 1) if implementation == "triton" else shape[1]
    expect(1 <= num_nodes <= most, "num_nodes", f"1 to {most}", num_nodes)
    has_kernel = use_triton(implementation, token_ids.device) and num_nodes < MAX_NODES
    if not has_kernel:
        return choose_nodes_reference(root_ids, token_ids, parents, depths, log_probs, num_nodes)
    tensors = (tensor.contiguous() for tensor in (root_ids, token_ids, parents, depths, log_probs))
    return _choose_nodes(*tensors, num_nodes)


def ancestor_bits(parents: torch.Tensor, implementation: str = "auto") -> torch.Tensor:
    """The ancestors of each node of a tree, itself included.

    Parents of any strides are made contiguous.

    Args:
        parents (`torch.LongTensor` of shape `(B, N)`): index of each node's parent, smaller than its own; 0 for the
            root, which is node 0.
        implementation (`str`): "auto", "triton" (N at most 128) or "torch". "auto" takes PyTorch's path beyond.
    Returns:
        `torch.LongTensor` of shape `(B, N, ceil(N / 64))`: bits over the nodes.
    Raises:
        ValueError: if shape or dtype do not fit.
    """
    expect(parents.dim() == 2 and parents.numel() > 0, "parents", "2 dimensions, none empty", tuple(parents.shape))
    expect(parents.dtype == torch.int64, "parents", "dtype torch.int64", parents.dtype)
    most = MAX_NODES if implementation == "triton" else parents.shape[1]
    expect(parents.shape[1] <= most, "parents", f"at most {MAX_NODES} nodes", parents.shape[1])
    has_kernel = use_triton(implementation, parents.device) and parents.shape[1] <= MAX_NODES
    return (_ancestor_bits if has_kernel else ancestor_bits_reference)(parents.contiguous())
