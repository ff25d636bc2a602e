"""How much each kernel moves between memory and the processor in one call, from the grid and the tiles of its launches."""

from dataclasses import dataclass

import torch

from benchmarks.compile_kernels import recorded_launches
from transformers_prism.bench.kernel_cases import Inputs
from transformers_prism.bench.kernel_cases import compact_cache as compact_cache_cases
from transformers_prism.bench.kernel_cases import context_alignment_attention as context_alignment_attention_cases
from transformers_prism.bench.kernel_cases import fused_input_projection as fused_input_projection_cases
from transformers_prism.bench.kernel_cases import grow_tree as grow_tree_cases
from transformers_prism.bench.kernel_cases import linear_distillation_loss as linear_distillation_loss_cases
from transformers_prism.bench.kernel_cases import top_k_log_prob as top_k_log_prob_cases
from transformers_prism.bench.kernel_cases import tree_attention as tree_attention_cases
from transformers_prism.bench.kernel_cases import verify_tree as verify_tree_cases


@dataclass
class Traffic:
    """Bytes that one call moves between memory and the processor, counted from its launches.

    Args:
        num_nodes: N, tree nodes of the call.
        num_rows: rows that a program's tile holds at most 128 of.
        num_programs: of the launch that reads the streams.
        streams: the large inputs: bytes that all programs together load of each, and its own bytes.
        partials: bytes of a split's partial results, written once and read once.
        other: bytes of the remaining inputs and of the outputs, each counted once.
        cached: bytes loaded again by further programs, which find them in the second-level cache.
    """

    num_nodes: int
    num_rows: int
    num_programs: int
    streams: dict[str, tuple[int, int]]
    partials: int = 0
    other: int = 0
    cached: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that memory has to move."""
        return sum(loaded for loaded, _ in self.streams.values()) + 2 * self.partials + self.other


def _compact_cache(num_nodes: int) -> Traffic:
    """32 layers, 6 accepted rows whatever N is."""
    arguments = compact_cache_cases._make(Inputs("meta"), num_layers=32)
    with recorded_launches() as launches:
        compact_cache_cases._compact_cache_fwd(*arguments)
    (launch,) = launches
    buffer = arguments[0][0]
    num_moves, block_a, block_e = arguments[1].shape[1], launch.kwargs["BLOCK_A"], launch.kwargs["BLOCK_E"]
    # Rows of a tile beyond the moves are masked and not loaded.
    per_program = min(num_moves, block_a) * min(block_e, buffer.shape[3]) * buffer.element_size()
    moved = len(arguments[0]) * buffer.shape[1] * num_moves * buffer.shape[3] * buffer.element_size()
    loaded = launch.num_programs * per_program
    return Traffic(num_nodes, num_moves, launch.num_programs, {"accepted rows": (loaded, moved)}, other=loaded)


def _context_alignment_attention(num_nodes: int) -> Traffic:
    """The forward pass of draft step 2 over 2048 rows, whatever N is: 32 heads, 8 of keys, head dimension 128."""
    query, keys, values, starts, scale = context_alignment_attention_cases._make(Inputs("meta"))
    with recorded_launches() as launches:
        context_alignment_attention_cases._context_alignment_attention_fwd(query, keys, values, starts, scale)
    (launch,) = launches
    size, step = query.element_size(), len(keys) - 1
    num_heads, num_rows, head_dim = query.shape[1:]
    num_groups, block_m, block_k = keys[0].shape[1], launch.kwargs["BLOCK_M"], launch.kwargs["BLOCK_K"]
    # A program reads whole tiles up to the last row that it sees.
    ends = [min(tile * block_m + block_m, num_rows) - step for tile in range(launch.grid[0])]
    seen = sum(min(-(-end // block_k) * block_k, num_rows) for end in ends)
    loaded = num_heads * seen * head_dim * size
    own = keys[0].numel() * size
    path = 2 * step * own
    again = (num_heads // num_groups - 1) * path
    streams = {"keys of step 0": (loaded, own), "values of step 0": (loaded, own)}
    other = 2 * query.numel() * size + path + num_heads * num_rows * 4
    return Traffic(
        num_nodes, num_rows * num_heads // num_groups, launch.num_programs, streams, other=other, cached=again
    )


def _fused_input_projection(num_nodes: int) -> Traffic:
    """A draft step over the 16 rows that the kernel takes at most, whatever N is."""
    arguments = fused_input_projection_cases._make(Inputs("meta"), num_rows=16)
    with recorded_launches() as launches:
        fused_input_projection_cases._fused_input_projection_fwd(*arguments)
    (launch,) = launches
    _, hidden, _, weight, bias, _ = arguments
    size = hidden.element_size()
    # Columns of a last tile beyond the width are masked and not loaded.
    num_columns = min(launch.num_programs * launch.kwargs["BLOCK_D"], weight.shape[0])
    streams = {"weight": (num_columns * weight.shape[1] * size, weight.numel() * size)}
    inputs = 2 * hidden.numel() * size
    other = inputs + hidden.numel() * size + bias.numel() * size
    return Traffic(num_nodes, 16, launch.num_programs, streams, other=other, cached=(launch.num_programs - 1) * inputs)


def _grow_tree(num_nodes: int) -> Traffic:
    """The choice of N - 1 nodes among 710 candidates: kilobytes, in one program for each row of the batch, whose time is
    that of a launch."""
    arguments = grow_tree_cases._make_pool(Inputs("meta"), num_nodes=num_nodes - 1)
    with recorded_launches() as launches:
        chosen = grow_tree_cases._choose_nodes_fwd(*arguments)
    (launch,) = launches
    tensors = [one for one in (*arguments, *chosen) if isinstance(one, torch.Tensor)]
    other = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Traffic(num_nodes, num_nodes, launch.num_programs, {}, other=other)


def _linear_distillation_loss(num_nodes: int) -> Traffic:
    """The forward pass of three draft steps over 1024 rows and a draft vocabulary of 32000, whatever N is."""
    student, teacher, head, losses, *rest = linear_distillation_loss_cases._make(Inputs("meta"))
    rows = student.flatten(0, 1)
    with recorded_launches() as launches:
        linear_distillation_loss_cases._linear_distillation_loss_fwd(rows, teacher, head, ",".join(losses), *rest)
    launch = launches[0]
    size = rows.element_size()
    row_tiles, num_splits = launch.grid
    # Each part ends where the next begins; masked rows of its last tile are not loaded.
    loaded = row_tiles * head.numel() * size
    partials = launch.args[3].numel() * 4
    tiles_of_tokens = -(-head.shape[0] // launch.kwargs["BLOCK_V"])
    states = 2 * rows.numel() * size
    own = rows.numel() * size + teacher.numel() * size
    return Traffic(
        num_nodes,
        len(rows),
        launch.num_programs,
        {"head": (loaded, head.numel() * size)},
        partials,
        other=own,
        cached=tiles_of_tokens * states - own,
    )


def _top_k_log_prob(num_nodes: int) -> Traffic:
    """LLaMA-3's head of 128256 rows over N hidden states, the ten best of each."""
    arguments = top_k_log_prob_cases._make(Inputs("meta"), num_rows=num_nodes, num_tokens=128256)
    with recorded_launches() as launches:
        returned = top_k_log_prob_cases._top_k_log_prob_fwd(*arguments)
    launch = launches[0]
    hidden, weight = arguments[:2]
    size, (num_row_tiles, num_splits) = hidden.element_size(), launch.grid
    split_length = dict(zip(launch.function.arg_names, launch.args, strict=False))["split_length"]
    # Rows of the head beyond a part's end are masked and not loaded.
    lengths = [min(split_length, weight.shape[0] - part * split_length) for part in range(num_splits)]
    streams = {"head": (num_row_tiles * sum(lengths) * weight.shape[1] * size, weight.numel() * size)}
    partials = sum(tensor.numel() * tensor.element_size() for tensor in launch.args[3:6])
    other = hidden.numel() * size + sum(tensor.numel() * tensor.element_size() for tensor in returned)
    num_reads = sum(-(-length // launch.kwargs["BLOCK_V"]) for length in lengths)
    cached = (num_reads - 1) * hidden.numel() * size
    return Traffic(num_nodes, num_nodes, launch.num_programs, streams, partials, other, cached)


def _tree_attention(num_nodes: int) -> Traffic:
    """One layer of the target's verification over a prefix of 4096: 32 heads, 8 of keys, head dimension 128."""
    query, key, value, ancestors, committed, *rest = tree_attention_cases._make(Inputs("meta"), num_nodes=num_nodes)
    with recorded_launches() as launches:
        tree_attention_cases._tree_attention_fwd(query, key, value, ancestors, committed, *rest)
    attention = launches[0]
    num_row_tiles, num_heads, num_splits = attention.grid
    size = key.element_size()
    num_rows = num_nodes * query.shape[1] // key.shape[1]
    split_length = dict(zip(attention.function.arg_names, attention.args, strict=False))["split_length"]
    num_prefix = committed.shape[1]
    # Each part ends where the next begins; masked keys of its last tile are not loaded.
    lengths = [max(0, min(split_length, num_prefix - part * split_length)) for part in range(num_splits)]
    loaded = num_row_tiles * num_heads * sum(lengths) * key.shape[3] * size
    own = num_heads * num_prefix * key.shape[3] * size
    parts = 0
    if num_splits > 1:
        parts = sum(tensor.numel() * tensor.element_size() for tensor in attention.args[6:8])
    tree = 2 * num_heads * num_nodes * key.shape[3] * size
    other = 2 * query.numel() * size + tree + ancestors.numel() * 8 + committed.numel()
    again = (num_splits - 1) * query.numel() * size + (num_row_tiles - 1) * tree
    streams = {"prefix keys": (loaded, own), "prefix values": (loaded, own)}
    return Traffic(num_nodes, num_rows, attention.num_programs, streams, parts, other, again)


def _verify_tree(num_nodes: int) -> Traffic:
    """A round sampled at a temperature, batch 1: logits and the noise of 7 steps."""
    arguments = verify_tree_cases._make(Inputs("meta"), num_nodes=num_nodes, temperature=0.8)
    with recorded_launches() as launches:
        verify_tree_cases._verify_tree_fwd(*arguments)
    choose, _ = launches
    logits, noise = arguments[0], arguments[5]
    # Tokens of a last tile beyond the vocabulary are masked and not loaded.
    per_node = min(choose.grid[1] * choose.kwargs["BLOCK_V"], logits.shape[2])
    own = logits.numel() * logits.element_size()
    streams = {"logits": (choose.grid[0] * per_node * logits.element_size(), own)}
    noise_bytes = noise.numel() * noise.element_size()
    parts = sum(one.numel() * one.element_size() for one in launches[1].args[2:5])
    again = choose.grid[0] * per_node * noise.element_size() - noise_bytes
    return Traffic(num_nodes, num_nodes, choose.num_programs, streams, parts, noise_bytes, again)


# By the name of the kernel.
TRAFFIC = {"compact_cache": _compact_cache, "context_alignment_attention": _context_alignment_attention, "fused_input_projection": _fused_input_projection, "grow_tree": _grow_tree, "linear_distillation_loss": _linear_distillation_loss, "top_k_log_prob": _top_k_log_prob, "tree_attention": _tree_attention, "verify_tree": _verify_tree}
