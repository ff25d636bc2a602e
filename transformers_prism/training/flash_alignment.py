"""Attention of a training-time-test step on a CPU without a T x T tensor: flash attention over the committed rows, merged
with attention to the path's few keys.

Attention over two sets of keys is the attention over each set, weighted by the set's share of the sum of exponentials. So the
committed rows go through PyTorch's fused attention, shifted by k rows so that the mask is causal. The k keys of each query's
path go through row-wise products. Backward passes the merged output and log-sum-exp to the fused backward, whose formula then
gives the gradients of the whole softmax. With a sliding window, one T x T mask is made for all heads.

Shape letters: B batch, T rows, H query heads, G key/value heads, R = H / G, E head dim, k the draft step.
Source: FlashAttention-2 (arXiv:2307.08691), whose backward needs nothing but output and log-sum-exp.
"""

import torch

from transformers_prism.kernels.context_alignment_attention import shift_down

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_alignment_attention(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], scale: float,
    sliding_window: int | None = None
) -> torch.Tensor:
    """The same as [`context_alignment_attention`], on a CPU, for a batch without packed sequences.

    Args:
        query (`torch.Tensor` of shape `(B, H, T, E)`): of draft step k.
        keys, values (`list` of k + 1 `torch.Tensor` of shape `(B, G, T, E)`): of draft steps 0..k.
        scale (`float`): of the scores.
        sliding_window (`int`, *optional*): positions that a query sees, its own included.
    Returns:
        `torch.Tensor` of shape `(B, T, H, E)`, in the query's dtype; computed in float32, or float64 if the tensors are.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, *states = (one.to(dtype) for one in (query, *keys, *values))
    return _FlashAlignment.apply(scale, sliding_window, query, *states).transpose(1, 2).to(keys[0].dtype)


class _FlashAlignment(torch.autograd.Function):
    """Output `(B, H, T, E)` of query and states: keys of all steps, then values of all steps."""

    @staticmethod
    def forward(ctx, scale, sliding_window, query, *states):
        keys, values = states[: len(states) // 2], states[len(states) // 2 :]
        step, groups = len(keys) - 1, query.shape[1] // keys[0].shape[1]
        num_rows = query.shape[2]
        window = num_rows if sliding_window is None else sliding_window
        num_seeing = max(num_rows - step, 0) if window > step else 0  # rows that see a committed row
        path_keys, path_values = (_path(one, groups) for one in (keys, values))
        scores = []
        for num_before, one in zip(range(step - 1, -1, -1), path_keys, strict=True):
            num_hidden = num_before if num_before < window else num_rows
            scores.append(_visible((query * one).sum(-1) * scale, num_hidden))
        log_sums = query.new_full((len(scores) + 1, *query.shape[:3]), -torch.inf)
        output = torch.zeros_like(query)
        if num_seeing:
            committed = [one[0][:, :, :num_seeing].repeat_interleave(groups, dim=1) for one in (keys, values)]
            mask = _window_mask(num_seeing, window - step, query)
            output[:, :, step:], log_sums[0, :, :, step:] = _flash(
                query[:, :, step:], *committed, 0.0, mask is None, attn_mask=mask, scale=scale
            )
        for s, one in enumerate(scores, start=1):
            log_sums[s] = one
        log_sum = log_sums.logsumexp(dim=0)  # [B, H, T]
        shares = (log_sums - log_sum).exp_()[..., None]  # [k + 1, B, H, T, 1]
        output *= shares[0]
        for share, one in zip(shares[1:], path_values, strict=True):
            output.addcmul_(share, one)
        ctx.scale, ctx.groups, ctx.num_seeing, ctx.window = scale, groups, num_seeing, window
        ctx.save_for_backward(query, output, log_sum, shares[1:], *states)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        query, output, log_sum, shares, *states = ctx.saved_tensors
        keys, values = states[: len(states) // 2], states[len(states) // 2 :]
        step, groups, num_seeing = len(keys) - 1, ctx.groups, ctx.num_seeing
        grad_query = torch.zeros_like(query)
        grad_keys, grad_values = ([torch.zeros_like(one) for one in found] for found in (keys, values))
        if num_seeing:
            later = (slice(None), slice(None), slice(step, None))
            committed = [one[0][:, :, :num_seeing].repeat_interleave(groups, dim=1) for one in (keys, values)]
            mask = _window_mask(num_seeing, ctx.window - step, query)
            grad_query[later], *found = _flash_backward(
                *(grad_output[later], query[later], *committed, output[later], log_sum[later], 0.0, mask is None),
                attn_mask=mask,
                scale=ctx.scale,
            )
            for gradients, one in zip((grad_keys, grad_values), found, strict=True):
                gradients[0][:, :, :num_seeing] = _of_groups(one, groups)
        mean = (grad_output * output).sum(-1, keepdim=True)
        paths = zip(_path(keys, groups), _path(values, groups), shares, strict=True)
        for s, (path_key, path_value, share) in enumerate(paths, start=1):
            grad_score = share * ((grad_output * path_value).sum(-1, keepdim=True) - mean) * ctx.scale
            grad_query.addcmul_(grad_score, path_key)
            for gradients, one in ((grad_keys, grad_score * query), (grad_values, share * grad_output)):
                gradients[s][:, :, : query.shape[2] - (step - s)] = _of_groups(one[:, :, step - s :], groups)
        return None, None, grad_query, *grad_keys, *grad_values


def _path(states: tuple[torch.Tensor, ...], groups: int) -> list[torch.Tensor]:
    """Keys or values of the path that each query sees, `(B, H, T, E)`: those of step s are k - s rows before the query."""
    step = len(states) - 1
    moved = [shift_down(one, step - s) for s, one in enumerate(states[1:], start=1)]
    return [one.repeat_interleave(groups, dim=1) for one in moved]


def _visible(scores: torch.Tensor, num_before: int) -> torch.Tensor:
    """Scores `(B, H, T)` with minus infinity in the first rows, whose path would begin before row 0."""
    scores[:, :, :num_before] = -torch.inf
    return scores


def _window_mask(num_rows: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask `(num_rows, num_rows)`: causal, over `window` keys; None if the window hides nothing."""
    if num_rows <= window:
        return None
    rows = torch.arange(num_rows)
    is_seen = (rows <= rows[:, None]) & (rows > rows[:, None] - window)
    return like.new_zeros((num_rows, num_rows)).masked_fill_(~is_seen, -torch.inf)


def _of_groups(gradients: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradients of repeated keys or values, `(B, H, T, E)`, summed to `(B, G, T, E)`."""
    return gradients.unflatten(1, (-1, groups)).sum(dim=2)
