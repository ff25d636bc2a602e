"""The loss over a sample of the vocabulary, since the product with the vocabulary head is most of a training step's work.

Half of the sample is the target's most probable tokens, each with weight 1. The other half is drawn uniformly from the rest,
and each of these tokens has the weight 1 / its probability of being drawn. So sums over the vocabulary are estimated without
bias: the normaliser of the draft's softmax (its logarithm has a small bias), sum(p log q) and
sum(min(p, q)). The target's own logits are still computed over the whole vocabulary, once for all draft steps.

Shape letters: R rows, D hidden, V draft vocabulary, C sampled tokens.
"""

import math

import torch

from transformers_prism.kernels.linear_distillation_loss import head_logits


class VocabularySample:
    """One sample of tokens, shared by a chunk of rows. `token_weights` `(C,)` is how many tokens each one stands for;
    `target_log_probs` `(R, C)` are the target's exact log-probabilities.

    Args:
        head (`torch.Tensor` of shape `(V, D)`): the frozen head that draft and target share.
        numerics (`dict`): scales and soft-caps of both, as [`~PrismDraftModel.shared_head`] gives them.
        share (`float`): C / V, up to 1, where the loss is exact.
        label_hidden (`torch.Tensor` of shape `(R, D)`): the target's last, normed states.
    """

    def __init__(self, head: torch.Tensor, numerics: dict, share: float, label_hidden: torch.Tensor):
        self.student = (numerics["student_scale"], numerics["student_softcap"])
        teacher = (numerics["teacher_scale"], numerics["teacher_softcap"])
        logits = head_logits(label_hidden.to(head.dtype), head, *teacher).float()
        target_log_probs = torch.log_softmax(logits, dim=-1)  # [R, V]
        tokens, self.token_weights = choose_tokens(target_log_probs.amax(dim=0), share)
        self.target_log_probs = target_log_probs[:, tokens]
        self.head = head[tokens]

    def log_probs(self, prediction: torch.Tensor) -> torch.Tensor:
        """The draft's log-probabilities `(R, C)` at its outputs `(R, D)`, with the estimated normaliser."""
        logits = head_logits(prediction.to(self.head.dtype), self.head, *self.student).float()
        return logits - torch.logsumexp(logits + self.token_weights.log(), dim=-1, keepdim=True)


def choose_tokens(scores: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a sample of the vocabulary, with the global random generator, whose state checkpoints keep.

    Args:
        scores (`torch.Tensor` of shape `(V,)`): the tokens with the highest scores are always taken.
        share (`float`): C / V.
    Returns:
        `tuple`: distinct tokens `(C,)`, and how many tokens of the vocabulary each stands for `(C,)`.
    """
    size = len(scores)
    count = math.ceil(share * size)
    num_best = count // 2
    keys = torch.rand(size, device=scores.device)
    keys[scores.topk(num_best).indices] = 2.0  # above any random number
    token_weights = torch.ones(count, device=scores.device)
    token_weights[num_best:] = (size - num_best) / (count - num_best)
    return keys.topk(count).indices, token_weights
