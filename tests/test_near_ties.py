"""Places where a text is not plain decoding's, and whether rounding decides there."""

import math

import pytest
import torch
from tiny_models import PAD_ID, prompts, varied_target

from transformers_prism.bench import near_ties
from transformers_prism.bench.near_ties import (
    Difference,
    _explain,
    _noise,
    _one_step,
    _Step,
    find_differences,
    generator_state,
)

pytestmark = pytest.mark.quick

SETTINGS = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD_ID}


@pytest.fixture(scope="module")
def batch():
    """A target, two prompts of different lengths, and plain decoding's text."""
    input_ids, mask = prompts(2)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    target = varied_target("llama", num_distinct=5, **inputs, max_new_tokens=8, pad_token_id=PAD_ID)
    return target, inputs, target.generate(**inputs, **SETTINGS)


def end_of_first(inputs, plain):
    """A token that ends the first row alone."""
    first, second = plain[:, inputs["input_ids"].shape[1] :].tolist()
    return next(token for token in first[:5] if token not in second)


def test_only_a_gap_below_twice_the_noise_is_a_near_tie():
    """A measurement that failed excuses nothing."""
    assert Difference(0, 3, 1.9e-6, 1e-6).is_near_tie
    assert not Difference(0, 3, 2e-6, 1e-6).is_near_tie
    assert not Difference(0, 3, math.inf, 0.0).is_near_tie
    assert not Difference(0, 3, 1.0, math.inf).is_near_tie
    assert not Difference(0, 3, math.nan, 1.0).is_near_tie


@pytest.mark.parametrize("do_sample", [False, True])
def test_plain_text_has_no_differences(batch, do_sample):
    """Nor any other draws; padded, with temperature, penalty, top-p and the end of a row."""
    target, inputs, plain = batch
    end = end_of_first(inputs, plain)
    settings = {**SETTINGS, "do_sample": do_sample, "eos_token_id": end}
    settings.update({"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.1} if do_sample else {})
    torch.manual_seed(7)
    text = target.generate(**inputs, **settings)
    state = generator_state(text.device)
    assert do_sample or PAD_ID in text[0, inputs["input_ids"].shape[1] :]
    found, state_of_steps = find_differences(target, inputs, settings, text, seed=7)
    assert found == []
    assert torch.equal(state, state_of_steps)


def test_every_error_is_found_where_it_is(batch):
    """Another token in the second row; what stands behind is compared given that token, and nothing behind an error."""
    target, inputs, plain = batch
    text, start = plain.clone(), inputs["input_ids"].shape[1]
    text[1, start + 2] = (text[1, start + 2] + 1) % 90 + 3
    (found,), _ = find_differences(target, inputs, SETTINGS, text)
    assert (found.row, found.position, found.is_near_tie) == (1, 2, False)
    assert found.gap > 1e-3 > 2 * found.rounding


@pytest.mark.parametrize("fault", ["short", "long", "behind the end"])
def test_another_length_is_an_error(batch, fault):
    """Too short without an end, too long, or with a token behind the end."""
    target, inputs, plain = batch
    start = inputs["input_ids"].shape[1]
    settings, text, place = SETTINGS, plain, 6
    if fault == "short":
        text = plain[:, :-2]
    elif fault == "long":
        settings = {**SETTINGS, "max_new_tokens": 6}
    else:
        end = end_of_first(inputs, plain)
        text, place = plain.clone(), plain[0, start:].tolist().index(end) + 1
        settings = {**SETTINGS, "eos_token_id": end}
    found, _ = find_differences(target, inputs, settings, text)
    assert [(one.position, one.gap) for one in found] == [(place, math.inf)]


def test_the_noise_is_what_sampling_draws(batch):
    """The best of the scores with it is the token that plain decoding samples; the generator stays where it was."""
    target, inputs, _ = batch
    for seed in range(4):
        torch.manual_seed(seed)
        state = generator_state(torch.device("cpu"))
        step = _one_step(target, inputs["input_ids"], inputs["attention_mask"], {"do_sample": True, "temperature": 2.0})
        behind = generator_state(torch.device("cpu"))
        best = (step.scores.log_softmax(dim=-1) - _noise(step.scores, state).log()).argmax(dim=-1)
        assert torch.equal(best, step.token_ids)
        assert torch.equal(behind, generator_state(torch.device("cpu")))


@pytest.mark.parametrize(("of_last", "is_tie"), [(2.0, True), (1.0, False)])
def test_a_token_at_the_edge_of_top_p_is_a_near_tie(monkeypatch, of_last, is_tie):
    """Rounding decides which of the least likely tokens is dropped; one far below that edge is an error."""
    monkeypatch.setattr(near_ties, "_measure_noise", lambda *args: 0.2)
    logits = torch.tensor([5.0, 4.0, 2.1, of_last])
    scores = logits.clone()
    scores[3] = -math.inf
    step = _Step(torch.tensor([0]), logits[None], scores[None], None)
    for written in (3, 1):  # the draw that prefers the one that was dropped, and the choice if the lowest were dropped, too
        noise = torch.tensor([10.0, 1.0, 0.01, 0.01]) if written == 1 else torch.tensor([10.0, 10.0, 10.0, 0.01])
        found = _explain(None, torch.zeros(1, 3), {}, step, 0, 0, written, noise)
        assert found.is_near_tie == (is_tie or written == 1)
