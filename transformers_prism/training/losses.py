"""How far a draft's predictions are from the target: in the distribution of the next token, and in the hidden state.

Shape letters: B batch, T rows, D hidden, S draft steps, V draft vocabulary, R rows that count.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Rows of logits that live at once: 256 rows of 8192 float32 logits are 8 MB, which stays in a CPU's last cache.
ROWS_PER_CHUNK = 256


@dataclass
class AlignedLoss:
    """The loss and its parts. `total` carries gradients; the parts are sums over the rows that count.

    Args:
        total (`torch.Tensor` of shape `()`): sum over steps of the weighted, normalised parts.
        token (`torch.Tensor` of shape `(S,)`): soft cross-entropy in nats, mean over rows.
        hidden (`torch.Tensor` of shape `(S,)`): SmoothL1 distance, mean over rows and features.
    """

    total: torch.Tensor
    token: torch.Tensor
    hidden: torch.Tensor


def aligned_loss(
    draft,
    predictions: list[torch.Tensor],
    label_hidden: torch.Tensor,
    mask: torch.Tensor,
    token_weight: float = 0.1,
    hidden_weight: float = 1.0,
) -> AlignedLoss:
    """Soft cross-entropy against the target's distribution over the draft vocabulary, and SmoothL1 on hidden states.

    Args:
        draft (`PrismDraftModel`): bound to its target.
        predictions (`list` of S `torch.Tensor` of shape `(B, T, D)`): outputs of the aligned forwards.
        label_hidden (`torch.Tensor` of shape `(B, T, D)`): the target's last, normed states that they predict.
        mask (`torch.Tensor` of shape `(S, B, T)`): rows of each step that count.
        token_weight, hidden_weight (`float`): weights of the two parts.
    Returns:
        `AlignedLoss`: summed over steps, each step normalised by the number of its rows.
    Source: EAGLE's losses as the PRISM artifact weighs them (0.1 and 1.0).
    """
    rows = mask.any(dim=0)  # [B, T]
    weights = mask[:, rows].to(torch.float32)  # [S, R]
    weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-5)
    stacked = torch.stack([prediction[rows] for prediction in predictions])  # [S, R, D]
    label_hidden = label_hidden[rows].to(stacked.dtype)
    token = token_loss(draft, stacked, label_hidden, weights)
    hidden = token.new_zeros(token.shape)
    if hidden_weight:
        distance = F.smooth_l1_loss(stacked.float(), label_hidden.float().expand_as(stacked), reduction="none")
        hidden = (distance.mean(dim=-1) * weights).sum(dim=1)
    total = (token_weight * token + hidden_weight * hidden).sum()
    return AlignedLoss(total, token.detach(), hidden.detach())


def token_loss(draft, predictions: torch.Tensor, label_hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Soft cross-entropy of every step, in chunks of rows: no tensor of all rows by all tokens is ever made.

    Args:
        draft (`PrismDraftModel`): bound to its target.
        predictions (`torch.Tensor` of shape `(S, R, D)`): predicted hidden states.
        label_hidden (`torch.Tensor` of shape `(R, D)`): the target's states.
        weights (`torch.Tensor` of shape `(S, R)`): of each row in the sum.
    Returns:
        `torch.Tensor` of shape `(S,)` in nats.
    """
    return _ChunkedTokenLoss.apply(draft, label_hidden, weights, predictions, *draft.head_parameters())


class _ChunkedTokenLoss(torch.autograd.Function):
    """Forward computes the gradients too, chunk by chunk, so that logits are made once and dropped at once."""

    @staticmethod
    def forward(ctx, draft, label_hidden, weights, predictions, *head):
        num_steps, num_rows = predictions.shape[:2]
        losses = predictions.new_zeros(num_steps, dtype=torch.float32)
        gradient = torch.empty_like(predictions)
        head_gradient = [torch.zeros(num_steps, *parameter.shape).to(parameter) for parameter in head]
        for start in range(0, num_rows, ROWS_PER_CHUNK):
            chunk = slice(start, start + ROWS_PER_CHUNK)
            target = torch.softmax(draft.compute_target_logits(label_hidden[chunk]).float(), dim=-1)
            for step in range(num_steps):
                with torch.enable_grad():
                    prediction = predictions[step, chunk].detach().requires_grad_()
                    log_probs = torch.log_softmax(draft.compute_logits(prediction).float(), dim=-1)
                    loss = -(torch.linalg.vecdot(target, log_probs) * weights[step, chunk]).sum()
                found = torch.autograd.grad(loss, [prediction, *head])
                gradient[step, chunk] = found[0]
                losses[step] += loss.detach()
                for total, part in zip(head_gradient, found[1:], strict=True):
                    total[step] += part
        ctx.save_for_backward(gradient, *head_gradient)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        gradient, *head_gradient = ctx.saved_tensors
        head = [torch.tensordot(grad_losses.to(part.dtype), part, dims=1) for part in head_gradient]
        return None, None, None, gradient * grad_losses[:, None, None].to(gradient.dtype), *head


__all__ = ["AlignedLoss", "aligned_loss", "token_loss"]
