"""What the Trainer trains: a draft's training-time-test steps with the loss of a stage on top."""

import torch
from torch import nn

from transformers_prism.borrowed_layers import place_of, target_logits
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.training.alignment import aligned_forward, history_mask
from transformers_prism.training.losses import ROWS_PER_CHUNK, aligned_loss
from transformers_prism.training.recipes import Stage
from transformers_prism.transformers_names import output_embeddings


def label_width(config) -> int:
    """Width of the target's last state, which its vocabulary head reads."""
    return config.target_embedding_size or config.target_hidden_size


class AlignedTraining(nn.Module):
    """What the Trainer trains: the training-time-test steps of a draft, bound to its target, with the loss of one
    stage on top; `options` are further arguments of [`aligned_forward`]."""

    def __init__(self, draft: PrismDraftModel, target, stage: Stage, text_tokens: bool = True, **options):
        super().__init__()
        head = output_embeddings(target)
        if head is not None and getattr(head, "weight", None) is not None and head.weight.is_inference():
            raise ValueError(
                "target: expected weights that a loss can be computed with, got some that were made in torch.inference_mode; "
                "load the target outside of it"
            )
        self.draft, self.stage, self.text_tokens, self.options = draft, stage, text_tokens, options
        # Inside a function the target is not registered as a submodule, so it is neither trained nor saved.
        self.target = lambda: target

    def forward(self, input_ids, states, mask):
        """Loss of a batch of [`collate`].

        Returns:
            `dict`: `loss`, and its `parts` without gradients, `(3, S)`: token, acceptance and hidden-state loss.
        """
        predictions = self.predict(input_ids, states, self.stage.num_steps, self.stage.is_detached)
        history = history_mask(input_ids.shape[1], self.stage.num_steps, input_ids.device)
        loss = aligned_loss(
            self.draft,
            predictions,
            self._labels(states),
            mask[None] & history[:, None],
            self.stage.loss,
            text=self._text_rows(input_ids),
        )
        return {"loss": loss.total, "parts": torch.stack((loss.token, loss.acceptance, loss.hidden))}

    def _text_rows(self, input_ids):
        return self.draft.text_rows(input_ids) if self.text_tokens else None

    def _labels(self, states):
        """What each step predicts: the target's last, normed states from the second token on."""
        return states[:, 1:, -label_width(self.draft.config) :]

    def predict(self, input_ids, states, num_steps: int, is_detached: bool = False):
        """The outputs of the steps, from the fused layers' states before each token."""
        fused = states[:, :-1, : self.draft.config.fused_hidden_size]
        return aligned_forward(self.draft, input_ids, fused, num_steps, is_detached, **self.options)

    @torch.no_grad()
    def count_agreements(self, input_ids, states, mask, num_steps: int) -> torch.Tensor:
        """How close each step comes to the target: `(S, 3)` sums over rows.

        The sums are: rows where the step's first choice is the target's, over the whole vocabulary; the probability that a
        token drawn from the draft is accepted, sum min(p, q); and the number of rows. The draft can propose the tokens of the
        whole text, including those that come later.
        """
        predictions = self.predict(input_ids, states, num_steps)
        history = history_mask(input_ids.shape[1], num_steps, input_ids.device)
        counts = torch.zeros(num_steps, 3, dtype=torch.float64, device=input_ids.device)
        label = self._labels(states)
        # One text at a time: the draft can propose this text's tokens only, so counts do not depend on the rest of the batch.
        for row, positions in enumerate(mask):
            rows = positions.nonzero()[:, 0]
            text = self._text_rows(input_ids[row, : int(rows.max()) + 1]) if len(rows) else None
            for chunk in rows.split(ROWS_PER_CHUNK):
                outputs = [prediction[row, chunk] for prediction in predictions]
                counts += self._closeness(outputs, label[row, chunk], history[:, chunk], text)
        return counts

    def _closeness(self, predictions, label, is_valid, text) -> torch.Tensor:
        """The sums of some rows of one text."""
        names = self.draft.draft_to_target if text is None else text.token_ids
        whole = self._target_logits(label)
        expected = whole.argmax(dim=-1)
        # Probability that the target gives to tokens outside the draft vocabulary can never be accepted.
        target = (self.draft.compute_target_logits(label, text).float() - whole.logsumexp(dim=-1, keepdim=True)).exp()
        sums = []
        for prediction, valid in zip(predictions, is_valid, strict=True):
            logits = self.draft.compute_logits(prediction, text)
            choice = logits.argmax(dim=-1)
            if names is not None:
                choice = names[choice]
            accepted = torch.minimum(target, torch.softmax(logits.float(), dim=-1)).sum(dim=-1)
            found = ((choice == expected) & valid, accepted * valid, valid)
            sums.append(torch.stack([one.sum(dtype=torch.float64) for one in found]))
        return torch.stack(sums)

    def _target_logits(self, label: torch.Tensor) -> torch.Tensor:
        """The target's own logits over the whole vocabulary, `(R, V)` in float32."""
        head = output_embeddings(self.target())
        logits = head(label.to(*place_of(head, self.target(), label.dtype))).to(self.draft.device).float()
        return target_logits(self.target(), logits)


def reaches_all_weights(draft: PrismDraftModel, stage: Stage) -> bool:
    """Whether the loss of a stage has a gradient for every weight of a draft. A module that no step of the stage uses gets
    none, nor does the draft's own head without a loss over the vocabulary."""
    modules = {draft.config.module_of_step(step) for step in range(stage.num_steps)}
    has_head_loss = bool(stage.loss.of_vocabulary) or not draft.head_parameters()
    return len(modules) == draft.config.num_processing_modules and has_head_loss
