"""Weights of draft steps by what their path got right: against a loop over paths in float64, and bad settings."""

import pytest
import torch
from test_alignment import VOCABULARY, WIDTH, make_pair
from test_vocabulary_sample import batch, with_gradients

from transformers_prism.training.losses import LossWeights, aligned_loss
from transformers_prism.training.recipes import TrainConfig

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

WEIGHTS = {"token": 0.5, "acceptance": 0.7, "hidden": 2.0, "steps": (1.0, 0.3)}
EAGLE3 = {"module_form": "eagle3", "share_target_head": False, "draft_vocab_size": 20}


def path_weight(kind: str, log_probs, counts, following, step: int, row: int) -> float:
    """By definition: the earlier steps of the path to a row, the latest first, as far as their rows have a loss."""
    weight = 1.0
    for earlier in reversed(range(step)):
        place = row - step + earlier
        right = following[place]
        if not counts[place]:
            break
        if kind == "confidence":
            weight *= 0.0 if right is None else float(log_probs[earlier, place, right].exp())
        else:
            weight *= float(right is not None and int(log_probs[earlier, place].argmax()) == right)
    if kind == "rejected":
        right = following[row]
        is_hit = right is not None and int(log_probs[step, row].argmax()) == right
        return 1.0 if is_hit else 1.0 + 2.0 * weight
    return weight


@pytest.mark.parametrize("has_text", [False, True])
@pytest.mark.parametrize("form", [{}, {"draft_vocab_size": 20}, EAGLE3], ids=str)
@pytest.mark.parametrize("kind", ["confidence", "first-miss", "rejected"])
def test_steps_are_weighted_by_their_path(kind, form, has_text, monkeypatch):
    """Chunks that cut paths, padding, a part that is not trained, and tokens that the draft cannot propose."""
    monkeypatch.setattr("transformers_prism.training.losses.ROWS_PER_CHUNK", 3)
    _, draft = make_pair(torch.float64, **form)
    inputs = batch(num_steps=4)
    inputs["mask"][:, 0, 3] = False
    # Tokens that the draft itself prefers, in part, so that some paths go on.
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
    choices = [draft.compute_logits(one).argmax(-1) for one in inputs["predictions"]]
    for row in range(7):
        step = row % 4
        token = choices[step][0, row]
        input_ids[0, row + 1] = token if draft.draft_to_target is None else draft.draft_to_target[token]
    text = draft.text_rows(input_ids) if has_text else None
    names = draft.draft_to_target if text is None else text.token_ids
    places = {int(token): place for place, token in enumerate(range(VOCABULARY) if names is None else names)}

    loss = aligned_loss(
        draft, **inputs, weights=LossWeights(**WEIGHTS, path_weights=kind), text=text, input_ids=input_ids
    )
    found = torch.autograd.grad(loss.total, inputs["predictions"])
    expected, all_weights = 0.0, []
    for sequence in range(2):
        following = [places.get(int(token)) for token in input_ids[sequence, 1:]] + [None]
        label = inputs["label_hidden"][sequence]
        target = torch.softmax(draft.compute_target_logits(label, text), dim=-1).detach()
        own = [torch.log_softmax(draft.compute_logits(one[sequence], text), dim=-1) for one in inputs["predictions"]]
        counts = inputs["mask"][0, sequence]
        for step, log_probs in enumerate(own):
            for row in inputs["mask"][step, sequence].nonzero()[:, 0].tolist():
                weight = path_weight(kind, torch.stack(own).detach(), counts, following, step, row)
                all_weights += [weight] if step else []
                p, log_q = target[row], log_probs[row]
                value = -0.5 * (p * log_q).sum() - 0.7 * torch.minimum(p, log_q.exp()).sum().log()
                prediction = inputs["predictions"][step][sequence, row]
                distance = 2.0 * torch.nn.functional.smooth_l1_loss(prediction, label[row])
                share = (1.0, 0.3)[min(step, 1)] / (inputs["mask"][step].sum() + 1e-5)
                expected = expected + share * (weight * value + (1.0 if kind == "rejected" else weight) * distance)
    assert len({round(weight, 6) for weight in all_weights}) > 1
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    for left, right in zip(found, torch.autograd.grad(expected, inputs["predictions"]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["confidence", "first-miss"])
def test_the_first_step_is_as_before(kind):
    """With one step there is no path; nor does the last step's prediction count."""
    _, draft = make_pair(torch.float64)
    inputs = batch(num_steps=1)
    input_ids = torch.zeros(2, 8, dtype=torch.long)
    expected = with_gradients(draft, LossWeights(**WEIGHTS), inputs)
    found = with_gradients(draft, LossWeights(**WEIGHTS, path_weights=kind), inputs, input_ids=input_ids)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)
    assert inputs["label_hidden"].shape[-1] == WIDTH


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="path_weights: expected one of none, confidence, first-miss, rejected, got 'miss'"):
        TrainConfig(path_weights="miss")
    with pytest.raises(ValueError, match="path_weights: expected vocab_sample 1, .*, got 'confidence' with 0.5"):
        TrainConfig(path_weights="confidence", vocab_sample=0.5)
    _, draft = make_pair(torch.float64)
    with pytest.raises(ValueError, match="input_ids: expected those of the batch, .* got none"):
        aligned_loss(draft, **batch(), weights=LossWeights(path_weights="confidence"))
    with pytest.raises(ValueError, match="path_weights: .* token_weight or acceptance_weight above 0"):
        TrainConfig(path_weights="first-miss", token_weight=0.0, split_epochs=0.0)
