"""What is read from a target in train mode is what it says in eval mode, and its mode comes back."""

import pytest
import torch
from tiny_models import EOS_ID, PAD_ID, chat_tokenizer, generate_twice, prompts, tiny_draft, tiny_target
from torch import nn

from transformers_prism.decoding.eval_mode import in_eval_mode
from transformers_prism.training.acceptance import measure_acceptance
from transformers_prism.training.data.conversations import Conversation
from transformers_prism.training.data.synthesis import SynthesisConfig, Synthesizer
from transformers_prism.training.features import target_states
from transformers_prism.training.slots import Slots

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def target():
    """With dropout and gradient checkpointing, in train mode but for one layer."""
    target = tiny_target("llama", seed=1, attention_dropout=0.5, eos_token_id=EOS_ID)
    # By its name of either release.
    getattr(target, "activation_checkpointing_enable", target.gradient_checkpointing_enable)()
    target.train()
    target.model.layers[2].eval()
    return target


def modes(target):
    return [module.training for module in target.modules()]


def synthesized(target):
    config = SynthesisConfig(
        1000, batch_size=2, temperatures=(0.0,), max_user_tokens=8, max_answer_tokens=12, max_turns=1, max_length=60
    )
    chats = [[{"role": "user", "content": f"w{word} w50"}] for word in range(20, 24)]
    rows = Synthesizer(target, chat_tokenizer(), config, chats).run(iter(range(4)))
    return sorted((row.index, tuple(row.tokens)) for row in rows)


@torch.no_grad()
def slot_logits(target):
    slots = Slots(target, num_slots=2, max_length=12)
    first = slots.fill(0, [5, 6, 7])
    return torch.stack((first, slots.step({0: 8})[0]))


def acceptance(target):
    conversation = Conversation((5, 6, 7, 8, 9, 9), ((4, 6),))
    draft = tiny_draft(target).bind(target)
    counts = measure_acceptance(draft, target, [conversation], num_new_tokens=12)
    return counts[[0, 1, *range(5, len(counts))]]  # without seconds


@pytest.mark.parametrize(
    "read",
    [synthesized, slot_logits, acceptance, lambda target: target_states(target, (5, 6, 7, 8), [1, 4])],
    ids=["synthesis", "slots", "acceptance", "features"],
)
def test_a_target_in_train_mode_is_read_in_eval_mode(target, read):
    """Dropout was in what it said, and with gradient checkpointing it kept no cache."""
    before = modes(target)
    found = read(target)
    assert modes(target) == before
    expected = read(target.eval())
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


def test_the_mode_comes_back_after_an_error(target, monkeypatch):
    before = modes(target)
    monkeypatch.setattr(target.model.layers[1], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        target_states(target, (5, 6, 7), [1])
    assert modes(target) == before
    with in_eval_mode(target):
        assert not any(modes(target))
    assert modes(target) == before


def test_dropout_of_an_adapter_in_train_mode_is_decoded_plainly():
    """The configuration says nothing of it; each forward would draw anew."""

    class Adapter(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.dropout = module, nn.Dropout(0.3)

        def forward(self, states):
            return self.module(states) + 0.3 * self.module(self.dropout(states))

    target = tiny_target("llama", 3)
    for layer in target.model.layers:
        layer.mlp = Adapter(layer.mlp)
    draft = tiny_draft(target)
    input_ids, mask = prompts(1)
    settings = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD_ID}
    target.train()
    with pytest.warns(UserWarning, match="decoding without the draft: dropout or jitter in train mode"):
        plain, speculative, is_same_state = generate_twice(target, draft, input_ids, mask, **settings)
    assert torch.equal(plain, speculative)
    assert is_same_state
    target.eval()
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, **settings)
    assert torch.equal(plain, speculative)
    assert draft.last_speculation.declined is None


def test_parts_in_train_mode_are_read_in_eval_mode(target):
    """`target.model.train()` leaves the target's own flag alone."""
    target.eval()
    expected = target_states(target, (5, 6, 7), [1])
    target.model.train()
    before = modes(target)
    assert torch.equal(target_states(target, (5, 6, 7), [1]), expected)
    assert modes(target) == before
