"""A mistake of the PRISM authors' training code, repeated to see what it costs.

Their mask is computed and never added: later rows and padding count in every softmax with a score of 0, though decoding
never sees them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from transformers_prism.kernels.context_alignment_attention import context_alignment_scores
from transformers_prism.training import alignment


class UnmaskedPasses(alignment.AlignedPasses):
    """Aligned forwards whose softmax is not masked; a row holds one sequence, and there is no kernel."""

    def _attend(self, attention, attention_input, keys_values) -> torch.Tensor:
        queries = self._rotate(self._heads(attention.q_proj(attention_input)))  # [B, H, T, E]
        return self._attend_by_group(queries, keys_values, attention.scaling).flatten(2)

    def _define(self, queries, keys, values, starts, scale: float) -> torch.Tensor:
        # Diluted by a score of 0 for every later row of the batch.
        output = super()._define(queries, keys, values, starts, scale)
        log_sums = context_alignment_scores(queries, keys, starts, scale).logsumexp(dim=-1).flatten(1, 2)  # [B, H, T]
        num_later = torch.arange(queries.shape[2] - 1, -1, -1, device=queries.device)
        share = torch.sigmoid(log_sums - num_later.log())
        return output * share.transpose(1, 2)[..., None].to(output.dtype)


@contextmanager
def unmasked_softmax() -> Iterator[None]:
    """All aligned forwards of this process repeat the mistake while this lasts."""
    masked = alignment.AlignedPasses
    alignment.AlignedPasses = UnmaskedPasses  # type: ignore[misc]
    try:
        yield
    finally:
        alignment.AlignedPasses = masked  # type: ignore[misc]


__all__ = ["unmasked_softmax"]
