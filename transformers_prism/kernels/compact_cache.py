"""Move the accepted positions of a key/value cache to where they belong, in place, for all layers at once.

    buffer[b, :, destination[b, a]] = buffer[b, :, source[b, a]]      for every a at the same time

of buffers `(B, G, C, E)`: B rows of the batch, G key/value heads, C positions, E head dimension. `source` and
`destination` `(B, A)` hold positions; source and destination positions of a row may overlap. A pair with a position
outside [0, C) moves nothing. Destinations of a row must differ, unless their sources are the same.

One launch serves all buffers of one dtype and layout, however many layers they come from. It loads and stores
A * G * E elements per row and buffer, nothing else of the cache.
Source: ours.
"""

import torch

from .dispatch import expect, expect_tensors, operator, operator_namespace, use_triton

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

_NAMESPACE = operator_namespace(__name__, __file__)
# Most moves of one row in the kernel, which holds all of them at once.
MAX_MOVES = 1024
_TILE_ELEMENTS = 2048


def compact_cache_reference(
    buffers: list[torch.Tensor], source: torch.Tensor, destination: torch.Tensor
) -> None:
    """The definition; see [`compact_cache`]."""
    length = buffers[0].shape[2]
    is_move = (source >= 0) & (source < length) & (destination >= 0) & (destination < length)
    # A pair that moves nothing is replaced by a copy of the row's first move, or by position 0 onto itself if there is none.
    first = is_move.int().argmax(dim=1, keepdim=True)
    moves_any = is_move.any(dim=1, keepdim=True)
    source = torch.where(is_move, source, source.gather(1, first) * moves_any)
    destination = torch.where(is_move, destination, destination.gather(1, first) * moves_any)
    num_rows, num_heads, _, head_dim = buffers[0].shape
    if buffers[0].is_contiguous():
        # Rows, heads and positions are flattened, so that whole vectors are copied.
        starts = torch.arange(num_rows * num_heads, device=source.device).view(num_rows, -1, 1) * length  # [B, G, 1]
        source, destination = ((starts + positions[:, None]).flatten() for positions in (source, destination))
        for buffer in buffers:
            vectors = buffer.view(-1, head_dim)
            vectors.index_copy_(0, destination, vectors.index_select(0, source))
        return
    source, destination = (
        positions[:, None, :, None].expand(-1, num_heads, -1, head_dim) for positions in (source, destination)
    )  # [B, G, A, E]
    for buffer in buffers:
        buffer.scatter_(2, destination, buffer.gather(2, source))


if triton is not None:

    @triton.jit
    def _compact_cache_fwd_kernel(
        pointers, first_buffer, source, destination,
        stride_b, stride_g, stride_c, num_heads, length, num_moves,
        HEAD_DIM: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr,
    ):
        # One program: all moves of one head of one row in one buffer, a part of the head dimension at a time.
        row = tl.program_id(0).to(tl.int64) // num_heads
        head = tl.program_id(0).to(tl.int64) % num_heads
        address = tl.load(pointers + tl.program_id(1))
        # All buffers have the type of `first_buffer`.
        buffer = address.to(first_buffer.dtype) + row * stride_b + head * stride_g
        move = tl.arange(0, BLOCK_A)
        start = tl.load(source + row * num_moves + move, mask=move < num_moves, other=-1)  # [A]
        end = tl.load(destination + row * num_moves + move, mask=move < num_moves, other=-1)
        is_move = (start >= 0) & (start < length) & (end >= 0) & (end < length)
        column = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
        mask = is_move[:, None] & (column < HEAD_DIM)[None, :]
        moved = tl.load(buffer + start[:, None] * stride_c + column[None, :], mask=mask, other=0.0)  # [A, BLOCK_E]
        # What another warp is about to overwrite has to be read first.
        tl.debug_barrier()
        tl.store(buffer + end[:, None] * stride_c + column[None, :], moved, mask=mask)

    def _compact_cache_fwd(buffers: list[torch.Tensor], source: torch.Tensor, destination: torch.Tensor) -> None:
        first = buffers[0]
        num_rows, num_heads, length, head_dim = first.shape
        pointers = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64)
        pointers = pointers.to(first.device, non_blocking=True)
        block_a = max(triton.next_power_of_2(source.shape[1]), 2)
        block_e = min(triton.next_power_of_2(head_dim), _TILE_ELEMENTS // block_a)
        grid = (num_rows * num_heads, len(buffers), triton.cdiv(head_dim, block_e))
        _compact_cache_fwd_kernel[grid](
            pointers, first, source, destination, *first.stride()[:3], num_heads, length, source.shape[1],
            HEAD_DIM=head_dim, BLOCK_A=block_a, BLOCK_E=block_e, num_warps=4,
        )

    _compact_cache = operator(_NAMESPACE, _compact_cache_fwd, mutates_args=("buffers",))

    @_compact_cache.register_fake
    def _(buffers, source, destination):
        return None


def compact_cache(
    buffers: list[torch.Tensor], source: torch.Tensor, destination: torch.Tensor, implementation: str = "auto"
) -> None:
    """Move positions within each row of key and value buffers, in place; all moves happen at the same time.

    Args:
        buffers (`list` of `torch.Tensor` of shape `(B, G, C, E)`): keys and values of any number of layers on one
            device; G, C, E, dtype and strides may differ from layer to layer, which costs a launch for each kind.
        source (`torch.LongTensor` of shape `(B, A)`): positions to copy from.
        destination (`torch.LongTensor` of shape `(B, A)`): positions to copy to. A pair with a position outside
            [0, C) moves nothing.
        implementation (`str`): "auto", "triton" (A at most 1024) or "torch".

    Buffers have a contiguous last dimension; positions are made contiguous where they are not.

    Raises:
        ValueError: if shapes, strides, dtypes or devices do not fit, before anything is moved.
    """
    expect(len(buffers) > 0, "buffers", "at least one", 0)
    first = buffers[0]
    expect(first.dim() == 4 and first.numel() > 0, "buffers", "4 dimensions, none empty", tuple(first.shape))
    pairs = (first.shape[0], source.shape[-1] if source.dim() else 0)
    positions = {"source": (source, pairs, torch.int64), "destination": (destination, pairs, torch.int64)}
    expect_tensors(first.device, **positions)
    limit = MAX_MOVES if implementation == "triton" else pairs[1]
    expect(0 < pairs[1] <= limit, "source", f"1 to {MAX_MOVES} positions per row", pairs[1])
    kinds: dict = {}
    for buffer in buffers:
        kinds.setdefault((buffer.device, buffer.dtype, buffer.shape, buffer.stride()), []).append(buffer)
    wanted = (pairs[0], "G", "C", "E")
    for device, _, shape, strides in kinds:
        fits = len(shape) == 4 and shape[0] == pairs[0] and shape.numel() > 0
        expect(fits, "buffers", f"shape {wanted}", tuple(shape))
        expect(device == first.device, "buffers", f"device {first.device}", device)
        expect(strides[3] == 1, "buffers", "the last dimension contiguous", f"strides {strides}")
    has_kernel = use_triton(implementation, first.device) and pairs[1] <= MAX_MOVES
    run = _compact_cache if has_kernel else compact_cache_reference
    for kind in kinds.values():
        run(kind, source.contiguous(), destination.contiguous())
