"""Rows decoded in slots get the logits that a forward over each of them alone gives, whatever is beside them."""

import random

import pytest
import torch
from compatibility_models import build
from tiny_models import VOCAB_SIZE, tiny_target

from transformers_prism.training.slots import Slots
from transformers_prism.transformers_names import cache_argument, cache_of

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


@torch.no_grad()
def logits_alone(target, tokens):
    return target(torch.tensor([tokens]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen2_mixed_windows", "mistral", "gemma2", "gemma3_text", "granite", "gpt2", "mixtral"]
)
def test_rows_do_not_see_each_other(architecture):
    """Rows of many lengths come and go; every step's logits are those of the row alone."""
    target, rng = tiny_target(architecture), random.Random(0)
    slots, rows = Slots(target, num_slots=3, max_length=40), {}
    for step in range(24):
        if step % 5 == 0:
            slot = rng.randrange(3)
            rows[slot] = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 14))]
            torch.testing.assert_close(slots.fill(slot, rows[slot]), logits_alone(target, rows[slot]), atol=2e-4, rtol=1e-4)
        moved = {slot: rng.randrange(3, VOCAB_SIZE) for slot in rows if rng.random() < 0.8} or {slot: 3}
        for slot, token in moved.items():
            rows[slot].append(token)
        logits = slots.step(moved)
        assert logits.shape == (3, VOCAB_SIZE)
        for slot in moved:
            torch.testing.assert_close(logits[slot], logits_alone(target, rows[slot]), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "nemotron_h", "mamba2", "jamba", "qwen2_vl"])
def test_rows_keep_their_recurrent_states(name):
    """Rows of many lengths come and go and rest; states and positions of each are its own, as single steps leave them."""
    target, rng = build(name), random.Random(0)
    slots, rows, alone = Slots(target, num_slots=3, max_length=40), {}, {}

    @torch.no_grad()
    def step_alone(slot, token):
        positions = {"position_ids": torch.tensor([[rows[slot]]])} if slots.takes_positions else {}
        rows[slot] += 1
        cache = cache_argument(target, alone[slot])
        return target(torch.tensor([[token]]), **cache, **positions, use_cache=True).logits[0, -1]

    for step in range(16):
        if step % 4 == 0:
            slot = rng.randrange(3)
            tokens = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 14))]
            with torch.no_grad():
                output = target(torch.tensor([tokens]), use_cache=True)
            rows[slot], alone[slot] = len(tokens), cache_of(output)
            torch.testing.assert_close(slots.fill(slot, tokens), output.logits[0, -1], atol=2e-4, rtol=1e-4)
        moved = {slot: rng.randrange(3, VOCAB_SIZE) for slot in rows if rng.random() < 0.7} or {slot: 3}
        logits = slots.step(moved)
        for slot, token in moved.items():
            torch.testing.assert_close(logits[slot], step_alone(slot, token), atol=2e-4, rtol=1e-4)


def test_shared_beginnings_are_read_once():
    target = tiny_target()
    slots, num_forwards = Slots(target, num_slots=4, max_length=20), 0

    def count(*_):
        nonlocal num_forwards
        num_forwards += 1

    handle = target.register_forward_hook(count)
    expected = slots.fill(0, [5, 6, 7], is_shared=True)
    assert torch.equal(slots.fill(3, [5, 6, 7], is_shared=True), expected)
    assert num_forwards == 1
    handle.remove()
    logits = slots.step({0: 8, 3: 8})
    assert torch.allclose(logits[0], logits[3], atol=1e-5)


def test_limits_are_said():
    slots = Slots(tiny_target(), num_slots=2, max_length=8)
    with pytest.raises(ValueError, match="expected 1 to 7 tokens, got 8"):
        slots.fill(0, list(range(8)))
    with pytest.raises(ValueError, match="expected 1 to 7 tokens, got 0"):
        slots.fill(0, [])
    slots.fill(0, list(range(3, 10)))
    slots.step({0: 5})
    with pytest.raises(ValueError, match="expected room for one more token, got a slot with 8 of 8"):
        slots.step({0: 5})


def test_target_is_left_as_it_was(monkeypatch):
    """The attention that reads groups together is the target's only while a step runs, even one that fails."""
    target = tiny_target()
    slots = Slots(target, num_slots=1, max_length=8)
    slots.fill(0, [5, 6])
    monkeypatch.setattr(target.model.layers[1], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        slots.step({0: 7})
    assert target.config._attn_implementation == "sdpa"
