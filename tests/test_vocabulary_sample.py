"""The loss over a sample of the vocabulary: the definition, exact over all of it, without bias, and with less work."""

import math

import pytest
import torch
from test_alignment import VOCABULARY, WIDTH, make_pair
from torch.profiler import profile

from transformers_prism.training import vocabulary_sample
from transformers_prism.training.losses import LossWeights, aligned_loss
from transformers_prism.training.recipes import TrainConfig
from transformers_prism.training.vocabulary_sample import choose_tokens

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

FORMS = [{}, {"draft_vocab_size": 20}, {"draft_vocab_size": 20, "logit_softcap": 5.0, "logit_scale": 0.5}]
WEIGHTS = {"token": 0.5, "acceptance": 0.7, "hidden": 2.0, "steps": (1.0, 0.3)}


def batch(seed: int = 0, num_steps: int = 3, num_rows: int = 8) -> dict:
    """Predictions, labels and a mask of two sequences, the second one padded; the first steps have no history."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_steps + 1, 2, num_rows, WIDTH)
    *predictions, label = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.ones(num_steps, 2, num_rows, dtype=torch.bool)
    mask[:, 1, 5:] = False
    for step in range(num_steps):
        mask[step, :, :step] = False
    return {"predictions": [one.requires_grad_() for one in predictions], "label_hidden": label, "mask": mask}


def with_gradients(draft, weights: LossWeights, inputs: dict, **options) -> list[torch.Tensor]:
    """The loss, and its gradient at each prediction."""
    loss = aligned_loss(draft, **inputs, weights=weights, **options)
    return [loss.total.detach(), *torch.autograd.grad(loss.total, inputs["predictions"])]


@pytest.fixture
def drawn(monkeypatch):
    """The samples that are drawn: tokens, and how many each stands for."""
    found = []

    def choose(scores, share):
        found.append(choose_tokens(scores, share))
        return found[-1]

    monkeypatch.setattr(vocabulary_sample, "choose_tokens", choose)
    return found


@pytest.mark.parametrize("has_text", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_sample_gives_the_loss_that_is_defined(form, has_text, drawn, monkeypatch):
    """In float64, row by row: normaliser and sums over tokens are weighted by how many tokens each stands for."""
    monkeypatch.setattr("transformers_prism.training.losses.ROWS_PER_CHUNK", 4)
    target, draft = make_pair(torch.float64, **form)
    text = draft.text_rows(torch.tensor([3, 25, 30, 90])) if has_text else None
    inputs = batch()
    found = with_gradients(draft, LossWeights(**WEIGHTS, vocab_sample=0.4), inputs, text=text)
    label, mask = inputs["label_hidden"].flatten(0, 1), inputs["mask"].flatten(1)
    rows = mask.any(dim=0).nonzero()[:, 0].tolist()
    assert len(drawn) == math.ceil(len(rows) / 4)
    expected = 0.0
    for step, prediction in enumerate(inputs["predictions"]):
        sum_of_step = 0.0
        for place, row in enumerate(rows):
            tokens, stands_for = drawn[place // 4]
            p = torch.softmax(draft.compute_target_logits(label[row], text), dim=-1)[tokens].detach()
            z = draft.compute_logits(prediction.flatten(0, 1)[row], text)[tokens]
            log_q = z - (stands_for * z.exp()).sum().log()
            values = 0.5 * -(stands_for * p * log_q).sum() - 0.7 * (stands_for * torch.minimum(p, log_q.exp())).sum().log()
            distance = torch.nn.functional.smooth_l1_loss(prediction.flatten(0, 1)[row], label[row])
            sum_of_step = sum_of_step + mask[step, row] * (values + 2.0 * distance)
        expected = expected + (1.0, 0.3)[min(step, 1)] * sum_of_step / (mask[step].sum() + 1e-5)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    for left, right in zip(found[1:], torch.autograd.grad(expected, inputs["predictions"]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_sample_of_everything_is_exact(form, monkeypatch):
    """Each token stands for itself; value and gradients are those of the whole vocabulary."""
    _, draft = make_pair(torch.float64, **form)
    inputs = batch()
    expected = with_gradients(draft, LossWeights(**WEIGHTS), inputs)
    # Not quite 1, which would not sample at all, but rounded up to all tokens.
    found = with_gradients(draft, LossWeights(**WEIGHTS, vocab_sample=0.999), inputs)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_samples_have_the_gradient_of_the_whole_on_average():
    """Over many draws; half as far away with twice the share, since what is left is the bias of a logarithm."""
    _, draft = make_pair(torch.float64)
    inputs = batch(num_steps=1)
    whole = with_gradients(draft, LossWeights(token=1.0, hidden=0.0), inputs)
    distances = {}
    for share in (0.2, 0.4):
        weights = LossWeights(token=1.0, hidden=0.0, vocab_sample=share)
        torch.manual_seed(0)
        draws = [with_gradients(draft, weights, inputs) for _ in range(1500)]
        mean_value, mean_gradient = (torch.stack([one[place] for one in draws]).mean(dim=0) for place in range(2))
        assert mean_value == pytest.approx(float(whole[0]), rel=0.02)
        distances[share] = float((mean_gradient - whole[1]).norm() / whole[1].norm())
        spread = torch.stack([(one[1] - whole[1]).norm() / whole[1].norm() for one in draws]).mean()
        assert distances[share] < 0.2 * spread
    assert distances[0.4] < distances[0.2] < 0.1


def test_sampled_tokens_are_the_best_and_a_fair_draw():
    """Weights add up to the vocabulary; each token that is not among the best is drawn equally often."""
    scores = torch.arange(20.0)
    torch.manual_seed(0)
    counts = torch.zeros(20)
    for _ in range(2000):
        tokens, stands_for = choose_tokens(scores, 0.5)
        assert len(set(tokens.tolist())) == 10
        assert set(tokens[:5].tolist()) == {15, 16, 17, 18, 19}
        assert stands_for.tolist() == [1.0] * 5 + [3.0] * 5
        counts[tokens] += 1
    assert counts[15:].tolist() == [2000] * 5
    torch.testing.assert_close(counts[:15] / 2000, torch.full((15,), 1 / 3), atol=0.05, rtol=0)
    tokens, stands_for = choose_tokens(scores, 0.01)
    assert (len(tokens), stands_for.tolist()) == (1, [20.0])


@pytest.mark.parametrize(("share", "num_sampled"), [(1.0, VOCABULARY), (0.25, 25)])
def test_a_sample_takes_a_share_of_the_products(share, num_sampled):
    """The target's product is whole and made once for all steps; forward and backward of the draft's are sampled."""
    _, draft = make_pair()
    inputs = batch(num_steps=3)
    inputs = {
        "predictions": [one.detach().float().requires_grad_() for one in inputs["predictions"]],
        "label_hidden": inputs["label_hidden"].float(),
        "mask": inputs["mask"],
    }
    with profile(with_flops=True) as profiler:
        with_gradients(draft, LossWeights(vocab_sample=share), inputs)
    num_rows = int(inputs["mask"].any(dim=0).sum())
    products = sum(event.flops for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::bmm"))
    assert products == 2 * num_rows * WIDTH * (VOCABULARY + 3 * 2 * num_sampled)


def test_samples_follow_the_random_seed():
    """A checkpoint keeps the generator's state, so that a resumed run draws what it would have drawn."""
    _, draft = make_pair(torch.float64)
    weights = LossWeights(vocab_sample=0.3)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(with_gradients(draft, weights, batch())[1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_heads_that_cannot_be_sampled_are_refused():
    for form in ({"share_target_head": False}, {"module_form": "eagle3"}):
        _, draft = make_pair(torch.float64, **form)
        with pytest.raises(ValueError, match=r"vocab_sample: expected 1 for a draft with a head or norm .*, got 0.5"):
            with_gradients(draft, LossWeights(vocab_sample=0.5), batch())
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"vocab_sample: expected a share above 0 and up to 1, got {share}"):
            TrainConfig(vocab_sample=share)
