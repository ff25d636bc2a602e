"""Weights of draft steps by what the steps of the same path got right.

A round reaches draft step k only if all earlier steps of the path proposed the right token, so that training on rows whose
path would have ended earlier may be wasted, and it ends where a step is wrong, which is what there is to learn. The path of step k at
row i is step 0 at row i - k, step 1 at row i - k + 1, and so on; the right token is the one of the text. A row without a loss,
as in a prompt, begins the path anew.

Shape letters: B batch, T rows, S draft steps, R rows that count, V draft vocabulary.
Source: weights by confidence from D-PACE (arXiv:2605.18810), the cut after the first miss from Spec-AUF (arXiv:2607.01893), what
rounds reject from Draft-OPD (arXiv:2605.29343), which replays it.
"""

import torch

# "confidence" multiplies the draft's probabilities of the right tokens; "first-miss" is 1 until its first choice is wrong, then 0;
# "rejected" is 3 where its first choice is the first of the path that is wrong, else 1.
PATH_WEIGHTS = ("none", "confidence", "first-miss", "rejected")
_OF_REJECTED = 3.0


class PathWeights:
    """Weights of the rows of each draft step, known as soon as the steps before are recorded; they have no gradients.

    Args:
        kind (`str`): of `PATH_WEIGHTS`.
        draft (`PrismDraftModel`), text (`TextRows`, *optional*): whose vocabulary counts.
        input_ids (`torch.LongTensor` of shape `(B, T)`): at row t the token after the one whose state is read there.
        rows (`torch.LongTensor` of shape `(R,)`): those that count of all B * T, in rising order.
        num_steps (`int`): S.
    """

    def __init__(self, kind: str, draft, text, input_ids: torch.Tensor, rows: torch.Tensor, num_steps: int):
        self.kind, self.rows = kind, rows
        # What row t predicts is the token after input_ids[t]. The last one is not known, and nothing follows it.
        right = input_ids.roll(-1, dims=1).flatten()[rows]
        names = draft.draft_to_target if text is None else text.token_ids
        if names is not None:
            # One place more, for tokens behind the vocabulary, which stand for images.
            places = torch.full((draft.config.vocab_size + 1,), -1, device=rows.device)
            places[names] = torch.arange(len(names), device=rows.device)
            right = places[right.clamp(max=draft.config.vocab_size)]
        self.right = right  # -1 where the draft cannot propose it
        # What the steps before have left of each path. One row more: a path goes on at the row after.
        self.paths = torch.ones(num_steps, input_ids.numel() + 1, device=rows.device)

    def of_hidden_states(self) -> torch.Tensor:
        """Weights `(S, R)` of their loss, once all steps are weighed; "rejected" is of the loss over the vocabulary alone."""
        weights = self.paths[:, self.rows]
        return torch.ones_like(weights) if self.kind == "rejected" else weights

    def weigh(self, step: int, chunk: slice, log_probs: torch.Tensor) -> torch.Tensor:
        """Weights of some of the R rows at a step, by what the draft predicts there, `(rows, V)`; after earlier rows and steps."""
        right, rows = self.right[chunk], self.rows[chunk]
        path = self.paths[step, rows]
        if self.kind == "confidence":
            value = log_probs.gather(-1, right.clamp(min=0)[:, None])[:, 0].exp() * (right >= 0)
        else:
            value = (log_probs.argmax(dim=-1) == right).float()
        if step + 1 < len(self.paths):
            self.paths[step + 1, rows + 1] = path * value
        return path if self.kind != "rejected" else 1.0 + (_OF_REJECTED - 1.0) * path * (1.0 - value)
