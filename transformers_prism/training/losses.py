"""How far a draft's predictions are from the target: in the distribution of the next token, and in the hidden state.

Shape letters: B batch, T rows, D hidden, S draft steps, V draft vocabulary, R rows that count.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from transformers_prism.borrowed_layers import TextRows
from transformers_prism.kernels.dispatch import expect, use_triton
from transformers_prism.kernels.linear_distillation_loss import distillation_losses, linear_distillation_loss
from transformers_prism.training.vocabulary_sample import VocabularySample

# Rows of logits that live at once: 256 rows of 8192 float32 logits are 8 MB, which stays in a CPU's last cache.
ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss: soft cross-entropy, negative log of the probability that a drafted token is
    accepted, and distance between hidden states. `steps` weighs draft steps 0, 1, ...; its last entry also all later ones.

    `vocab_sample` is the share of the vocabulary that the first two are computed over (see [`VocabularySample`]).
    """

    token: float = 0.1
    acceptance: float = 0.0
    hidden: float = 1.0
    steps: tuple[float, ...] = (1.0,)
    vocab_sample: float = 1.0

    def __post_init__(self):
        if not 0 < self.vocab_sample <= 1:
            raise ValueError(f"vocab_sample: expected a share above 0 and up to 1, got {self.vocab_sample}")

    @property
    def of_vocabulary(self) -> dict[str, float]:
        """The losses of [`linear_distillation_loss`] with a weight other than 0, and that weight."""
        weights = {"cross_entropy": self.token, "negative_log_acceptance": self.acceptance}
        return {name: weight for name, weight in weights.items() if weight}

    def of_steps(self, num_steps: int) -> torch.Tensor:
        """Weights `(S,)` of the first `num_steps` draft steps."""
        last = len(self.steps) - 1
        return torch.tensor([self.steps[min(step, last)] for step in range(num_steps)])


@dataclass
class AlignedLoss:
    """The loss, with gradients, and for each step means of its parts over the rows that count, `(S,)`: soft
    cross-entropy and negative log of the acceptance probability in nats, SmoothL1 distance of hidden states."""

    total: torch.Tensor
    token: torch.Tensor
    acceptance: torch.Tensor
    hidden: torch.Tensor


def aligned_loss(
    draft, predictions: list[torch.Tensor], label_hidden: torch.Tensor, mask: torch.Tensor, weights: LossWeights,
    implementation: str = "auto", text: TextRows | None = None
) -> AlignedLoss:
    """Distances from the target's distribution over the draft vocabulary, and from its hidden states, summed over
    steps, each step normalised by the number of its rows.

    Args:
        predictions (`list` of S `torch.Tensor` of shape `(B, T, D)`): outputs of the training-time-test steps.
        label_hidden (`torch.Tensor` of shape `(B, T, D)`): the target's last, normed states that they predict.
        mask (`torch.Tensor` of shape `(S, B, T)`): rows of each step that count.
        text (`TextRows`, *optional*): tokens that the draft can propose in addition to its vocabulary.
    Source: EAGLE's losses as the PRISM artifact weighs them (0.1 and 1.0).
    """
    # Indices are made once, since each use of a boolean mask would wait for the device.
    rows = mask.any(dim=0).flatten().nonzero()[:, 0]  # [R]
    row_weights = mask.flatten(1).index_select(1, rows).to(torch.float32)  # [S, R]
    row_weights = row_weights / (row_weights.sum(dim=1, keepdim=True) + 1e-5)
    stacked = torch.stack([one.flatten(0, 1).index_select(0, rows) for one in predictions])  # [S, R, D]
    label_hidden = label_hidden.flatten(0, 1).index_select(0, rows).to(stacked.dtype)
    vocabulary, token, acceptance = vocabulary_loss(draft, stacked, label_hidden, row_weights, weights, implementation, text)
    hidden = vocabulary.new_zeros(vocabulary.shape)
    if weights.hidden:
        distance = F.smooth_l1_loss(stacked.float(), label_hidden.float().expand_as(stacked), reduction="none")
        hidden = (distance.mean(dim=-1) * row_weights).sum(dim=1)
    step_weights = weights.of_steps(len(predictions)).to(vocabulary)
    total = (step_weights * (vocabulary + weights.hidden * hidden)).sum()
    return AlignedLoss(total, token, acceptance, hidden.detach())


def vocabulary_loss(
    draft, predictions: torch.Tensor, label_hidden: torch.Tensor, row_weights: torch.Tensor, weights: LossWeights,
    implementation: str = "auto", text: TextRows | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parts of the loss that need logits. No tensor of all rows by all tokens is ever made.

    With p the target's and q the draft's distribution over the draft vocabulary, the soft cross-entropy is -sum(p log
    q), and a token drawn from q is accepted with probability sum(min(p, q)) = 1 - TV(p, q).

    Args:
        predictions, label_hidden (`torch.Tensor`): predicted hidden states `(S, R, D)`, and the target's `(R, D)`.
        row_weights (`torch.Tensor` of shape `(S, R)`): of each row in the sums.
        implementation (`str`): "auto", "triton" or "torch". "auto" takes [`linear_distillation_loss`] on a GPU, if
            the draft trains no norm or head of its own. Otherwise, and always for a sample of the vocabulary, logits are
            made in chunks of rows.
    Returns:
        `tuple` of the weighted sum, the soft cross-entropy and the negative log acceptance, each of shape `(S,)` in
            nats; only the first carries gradients.
    """
    coefficients = weights.of_vocabulary
    zero = predictions.new_zeros(len(predictions), dtype=torch.float32)
    if not coefficients:
        return zero, zero, zero
    has_kernel = weights.vocab_sample == 1 and use_triton(implementation, predictions.device)
    head = draft.shared_head(text) if has_kernel else None
    expect(head is not None or implementation != "triton", "implementation", "auto or torch for this head", "triton")
    if head is None or not predictions.numel():
        vocabulary = _vocabulary_of(draft, text, weights.vocab_sample)
        total, sums = _ChunkedVocabularyLoss.apply(
            vocabulary, label_hidden, row_weights, coefficients, predictions, *draft.head_parameters()
        )
    else:
        weight, numerics = head
        values = linear_distillation_loss(
            predictions.to(weight.dtype),
            label_hidden.to(weight.dtype),
            weight,
            tuple(coefficients),
            implementation=implementation,
            **numerics,
        )  # [K, S, R]
        sums = (values * row_weights).sum(dim=-1)
        total = _weighted(sums, coefficients)
    named = dict(zip(coefficients, sums.detach(), strict=True))
    return total, named.get("cross_entropy", zero), named.get("negative_log_acceptance", zero)


def _vocabulary_of(draft, text: TextRows | None, share: float) -> Callable:
    """A function from the target's states of a chunk of rows to the vocabulary that the chunk's loss is computed over."""
    if share == 1:
        return functools.partial(_WholeVocabulary, draft, text)
    shared = draft.shared_head(text)
    if shared is None:
        raise ValueError(
            f"vocab_sample: expected 1 for a draft with a head or norm of its own, and for a target whose head is quantised or "
            f"has a bias, got {share}"
        )
    head, numerics = shared
    return functools.partial(VocabularySample, head, numerics, share)


class _WholeVocabulary:
    """All tokens that the draft can propose; for a sample of them see [`VocabularySample`]."""

    token_weights = None

    def __init__(self, draft, text: TextRows | None, label_hidden: torch.Tensor):
        self.draft, self.text = draft, text
        self.target_log_probs = torch.log_softmax(draft.compute_target_logits(label_hidden, text).float(), dim=-1)

    def log_probs(self, prediction: torch.Tensor) -> torch.Tensor:
        """The draft's log-probabilities, `(R, V)`."""
        return torch.log_softmax(self.draft.compute_logits(prediction, self.text).float(), dim=-1)


def _weighted(sums: torch.Tensor, coefficients: dict[str, float]) -> torch.Tensor:
    # A product with a vector of coefficients would be rounded to 16 bits under autocast.
    return torch.stack([weight * one for weight, one in zip(coefficients.values(), sums, strict=True)]).sum(dim=0)


class _ChunkedVocabularyLoss(torch.autograd.Function):
    """The weighted total `(S,)`, and each loss that has a weight, `(K, S)`, without gradients.

    Forward computes the gradients too, chunk by chunk, so that each chunk's logits are made once and freed at once.
    """

    @staticmethod
    def forward(ctx, vocabulary_of, label_hidden, row_weights, coefficients, predictions, *head):
        num_steps, num_rows = predictions.shape[:2]
        sums = predictions.new_zeros(len(coefficients), num_steps, dtype=torch.float32)
        gradient = torch.empty_like(predictions)
        head_gradient = [parameter.new_zeros(num_steps, *parameter.shape) for parameter in head]
        for start in range(0, num_rows, ROWS_PER_CHUNK):
            chunk = slice(start, start + ROWS_PER_CHUNK)
            vocabulary = vocabulary_of(label_hidden[chunk])
            distribution = (vocabulary.target_log_probs, vocabulary.target_log_probs.exp())
            for step in range(num_steps):
                weights = row_weights[step, chunk]
                with torch.enable_grad():
                    prediction = predictions[step, chunk].detach().requires_grad_()
                    log_probs = vocabulary.log_probs(prediction)
                    values = distillation_losses(log_probs, *distribution, tuple(coefficients), vocabulary.token_weights)
                    parts = (values * weights).sum(dim=1)
                    loss = _weighted(parts, coefficients)
                found = torch.autograd.grad(loss, [prediction, *head])
                gradient[step, chunk] = found[0]
                sums[:, step] += parts.detach()
                for total, part in zip(head_gradient, found[1:], strict=True):
                    total[step] += part
        ctx.save_for_backward(gradient, *head_gradient)
        ctx.mark_non_differentiable(sums)
        return _weighted(sums, coefficients), sums

    @staticmethod
    def backward(ctx, grad_losses, _):
        gradient, *head_gradient = ctx.saved_tensors
        head = [torch.tensordot(grad_losses.to(part.dtype), part, dims=1) for part in head_gradient]
        return None, None, None, None, gradient * grad_losses[:, None, None].to(gradient.dtype), *head
