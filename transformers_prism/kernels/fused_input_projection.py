"""The product that a processing module starts with: token embedding and hidden state, joined and projected.

    output[n] = weight[:, :D] (scale * embedding[token_ids[n]]) + weight[:, D:] hidden[n] + bias

of N rows of width D. `weight` `(D, 2 * D)` and `bias` belong to the module of the draft step; the embedding table
`(V, D)` is the target's. The scaled embedding is rounded to the tensors' dtype, as it would be if it were stored.

With 16 rows or fewer, nearly all traffic is the weight: 2 * D * D elements, loaded once. Each program computes a few columns
of the output and reads both halves of their weights; no joined rows [N, 2 * D] and no gathered embeddings are stored. The
2 * N * D elements of the inputs are read again by every program, from the L2 cache. With more rows torch's own product over
the joined rows is used.
Source: ours; the formula is EAGLE's (arXiv:2401.15077).
"""

import torch

from .dispatch import (
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
# Most rows that the kernel takes: those of a tensor core's smallest matrix product.
MAX_ROWS = 16


def fused_input_projection_reference(
    token_ids: torch.Tensor, hidden: torch.Tensor, embedding: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The definition; see [`fused_input_projection`]."""
    joined = torch.cat((embedding[token_ids] * scale, hidden), dim=-1)  # [N, 2 * D]
    return torch.nn.functional.linear(joined, weight, bias)


if triton is not None:

    @triton.jit(do_not_specialize=["num_rows", "num_tokens"])
    def _fused_input_projection_fwd_kernel(
        token_ids, hidden, embedding, weight, bias, output,
        stride_hidden, stride_embedding, stride_weight, num_rows, num_tokens, scale,
        HIDDEN_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    ):
        # One program: BLOCK_D columns of the output for all rows.
        row = tl.arange(0, BLOCK_N).to(tl.int64)
        is_row = row < num_rows
        feature = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        is_feature = feature < HIDDEN_SIZE
        token = tl.load(token_ids + row, mask=is_row, other=-1)
        is_token = (token >= 0) & (token < num_tokens)
        result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for start in range(0, HIDDEN_SIZE, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            is_column = column < HIDDEN_SIZE
            weight_mask = is_feature[:, None] & is_column[None, :]
            weights = weight + feature[:, None] * stride_weight + column[None, :]  # [BLOCK_D, BLOCK_K]
            address = embedding + token[:, None] * stride_embedding + column[None, :]
            rows = tl.load(address, mask=is_token[:, None] & is_column[None, :], other=0.0)  # [N, BLOCK_K]
            rows = (rows.to(tl.float32) * scale).to(rows.dtype)
            factor = tl.load(weights, mask=weight_mask, other=0.0)
            result = tl.dot(rows, tl.trans(factor), result, input_precision=PRECISION)
            address = hidden + row[:, None] * stride_hidden + column[None, :]
            rows = tl.load(address, mask=is_row[:, None] & is_column[None, :], other=0.0)
            factor = tl.load(weights + HIDDEN_SIZE, mask=weight_mask, other=0.0)
            result = tl.dot(rows, tl.trans(factor), result, input_precision=PRECISION)
        if HAS_BIAS:
            result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
        mask = is_row[:, None] & is_feature[None, :]
        address = output + row[:, None] * HIDDEN_SIZE + feature[None, :]
        tl.store(address, result.to(output.dtype.element_ty), mask=mask)

    def _tiles(hidden_size: int, itemsize: int) -> dict:
        """Columns of a program, fewer where there would be too few programs; a load brings at most 16 KB."""
        block_d = 32 if hidden_size >= 32 * NUM_PROGRAMS else 16
        block_k = min(64 if itemsize == 4 else 128, max(16, triton.next_power_of_2(hidden_size)))
        # float32 as six products of bfloat16 parts, which are as exact.
        precision = "bf16x6" if itemsize == 4 else "ieee"
        tiles = {"PRECISION": precision, "BLOCK_N": MAX_ROWS, "BLOCK_D": block_d, "BLOCK_K": block_k}
        return {**tiles, "num_warps": 4, "num_stages": 4}

    def _fused_input_projection_fwd(
        token_ids: torch.Tensor, hidden: torch.Tensor, embedding: torch.Tensor, weight: torch.Tensor,
        bias: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        num_rows, hidden_size = hidden.shape
        output = torch.empty((num_rows, hidden_size), dtype=hidden.dtype, device=hidden.device)
        tiles = _tiles(hidden_size, hidden.element_size())
        grid = (triton.cdiv(hidden_size, tiles["BLOCK_D"]),)
        _fused_input_projection_fwd_kernel[grid](
            token_ids, hidden, embedding, weight, weight if bias is None else bias, output, hidden.stride(0),
            embedding.stride(0), weight.stride(0), num_rows, embedding.shape[0], scale,
            HIDDEN_SIZE=hidden_size, HAS_BIAS=bias is not None, **tiles,
        )
        return output

    _fused_input_projection = operator(_NAMESPACE, _fused_input_projection_fwd)

    @_fused_input_projection.register_fake
    def _(token_ids, hidden, embedding, weight, bias, scale):
        return hidden.new_empty(hidden.shape)


def fused_input_projection(
    token_ids: torch.Tensor, hidden: torch.Tensor, embedding: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None = None, scale: float = 1.0, implementation: str = "auto"
) -> torch.Tensor:
    """Project token embeddings and hidden states, joined in this order, to one residual stream.

    Args:
        token_ids (`torch.LongTensor` of shape `(...)`): of N >= 1 rows in all, each in [0, V). On Triton's path an id
            outside of that gets an embedding of zeros.
        hidden (`torch.Tensor` of shape `(..., D)`): float32, float16 or bfloat16.
        embedding (`torch.Tensor` of shape `(V, D)`): the table.
        weight (`torch.Tensor` of shape `(D, 2 * D)`): of the processing module.
        bias (`torch.Tensor` of shape `(D,)`, *optional*): of the processing module.
        scale (`float`): of the embeddings.
        implementation (`str`): "auto", "triton" (N at most 16; no gradients) or "torch". "auto" takes torch's product
            for more rows and where gradients are asked for.

    Table, weight and bias have a contiguous last dimension and are never copied; token ids and hidden states are made
    contiguous where they are not.

    Returns:
        `torch.Tensor` of shape `(..., D)`.
    Raises:
        ValueError: if shapes, strides, dtypes or devices do not fit.
    """
    expect(hidden.dim() > 0 and hidden.numel() > 0, "hidden", "rows that are not empty", tuple(hidden.shape))
    expect_float("hidden", hidden)
    hidden_size, dtype = hidden.shape[-1], hidden.dtype
    fits = embedding.dim() == 2 and embedding.shape[0] > 0 and embedding.shape[1] == hidden_size
    expect(fits, "embedding", f"shape {('V', hidden_size)}", tuple(embedding.shape))
    expect_tensors(hidden.device, token_ids=(token_ids, tuple(hidden.shape[:-1]), torch.int64))
    tensors = {
        "embedding": (embedding, tuple(embedding.shape), dtype),
        "weight": (weight, (hidden_size, 2 * hidden_size), dtype),
        **({} if bias is None else {"bias": (bias, (hidden_size,), dtype)}),
    }
    expect_tensors(hidden.device, **tensors)
    for name, (tensor, *_) in tensors.items():
        expect_rows(name, tensor)
    num_rows = token_ids.numel()
    limit = MAX_ROWS if implementation == "triton" else num_rows
    expect(num_rows <= limit, "hidden", f"at most {MAX_ROWS} rows", num_rows)
    has_kernel = use_triton(implementation, hidden.device)
    if implementation == "auto":
        parts = [hidden, *(tensor for tensor, *_ in tensors.values())]
        wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        has_kernel = has_kernel and num_rows <= MAX_ROWS and not wants_gradient
    if not has_kernel:
        return fused_input_projection_reference(token_ids, hidden, embedding, weight, bias, scale)
    rows = hidden.reshape(num_rows, hidden_size).contiguous()
    output = _fused_input_projection(token_ids.reshape(num_rows).contiguous(), rows, embedding, weight, bias, scale)
    return output.view(hidden.shape)
