"""What a draft borrows: it follows its target's layers, takes rows of them, or says why it cannot."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB_SIZE, tiny_draft, tiny_target
from torch import nn

from transformers_prism import PrismDraftModel
from transformers_prism.borrowed_layers import ChosenLogits, final_norm_of, float_weight, place_of, tokens_outside
from transformers_prism.hub.files import FINAL_NORM

pytestmark = pytest.mark.quick


def bound_draft(target, **overrides) -> PrismDraftModel:
    """A random draft of a target, bound to it."""
    return tiny_draft(target, **overrides).bind(target)


def logits_of(draft) -> torch.Tensor:
    """The draft's logits at some states."""
    states = torch.linspace(-1, 1, 3 * draft.config.hidden_size).view(3, -1)
    return draft.compute_logits(states).detach()


def quantized(target):
    """The target with all of its linear layers quantised, whose activations are scaled in every forward."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(target), {nn.Linear}, dtype=torch.qint8)


@pytest.fixture
def target():
    return tiny_target("llama", seed=3)


@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_another_head_or_embedding_is_followed(target, draft_vocab_size):
    """At the next bind, as every call of generate() makes one, whether the module, its weight or its numbers are new."""
    draft = bound_draft(target, draft_vocab_size=draft_vocab_size)
    seen = [logits_of(draft)]

    def changes():
        yield lambda: target.set_output_embeddings(nn.Linear(32, VOCAB_SIZE, bias=False))
        yield lambda: setattr(target.lm_head, "weight", nn.Parameter(torch.randn(VOCAB_SIZE, 32)))
        yield lambda: target.lm_head.weight.data.mul_(1.5)
        yield lambda: setattr(target.lm_head.weight, "data", torch.randn(VOCAB_SIZE, 32))
        yield lambda: nn.init.ones_(target.lm_head.weight)

    for change in changes():
        change()
        found = logits_of(draft.bind(target))
        fresh = bound_draft(target, draft_vocab_size=draft_vocab_size)
        torch.testing.assert_close(found, logits_of(fresh))
        assert all(not torch.equal(found, earlier) for earlier in seen)
        seen.append(found)
    ids = torch.arange(5)[None]
    before = draft.embed(ids)
    target.set_input_embeddings(nn.Embedding(VOCAB_SIZE, 32))
    assert not torch.equal(draft.bind(target).embed(ids), before)
    assert torch.equal(draft.embed(ids), target.get_input_embeddings()(ids))


def test_rows_are_gathered_once(target):
    """Not at every bind."""
    draft = bound_draft(target, draft_vocab_size=50)
    rows = draft._borrowed.head_rows
    assert draft.bind(target)._borrowed.head_rows is rows
    target.lm_head.weight.data[60, 7] += 1e-3  # of a token that the draft does not propose
    assert draft.bind(target)._borrowed.head_rows is rows
    target.lm_head.weight.data[7, 7] += 1e-3
    assert torch.equal(draft.bind(target)._borrowed.head_rows.weight, target.lm_head.weight[:50])


@pytest.mark.parametrize("new_size", [VOCAB_SIZE - 7, VOCAB_SIZE + 7])
def test_a_resized_target_is_another_target(target, new_size):
    """Although target, embedding and head are the same objects."""
    draft = bound_draft(target, draft_vocab_size=50)
    target.resize_token_embeddings(new_size)
    with pytest.raises(ValueError, match=f"vocab_size: expected {VOCAB_SIZE} .* got {new_size}"):
        draft.bind(target)


def test_layers_of_other_widths_are_refused(target):
    """Both widths in the message, before a product fails."""
    draft = tiny_draft(target)
    target.set_output_embeddings(nn.Linear(16, VOCAB_SIZE, bias=False))
    with pytest.raises(ValueError, match="vocabulary head is as wide as the draft, hidden_size=32, got 16"):
        draft.bind(target)
    target.set_input_embeddings(nn.Embedding(VOCAB_SIZE, 24))
    with pytest.raises(ValueError, match="embedding is as wide as the draft, hidden_size=32, got 24"):
        draft.bind(target)


@pytest.mark.parametrize("missing", ["embedding", "head"])
def test_targets_without_a_layer_are_refused(target, missing, monkeypatch):
    """By what they lack."""

    def absent(self):
        if missing == "embedding":
            raise NotImplementedError

    monkeypatch.setattr(type(target), f"get_{'in' if missing == 'embedding' else 'out'}put_embeddings", absent)
    with pytest.raises(ValueError, match=f"expected a target with a .*{missing}, got LlamaForCausalLM without one"):
        tiny_draft(target).bind(target)


@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_a_head_whose_rows_cannot_be_read_is_used_as_it_is(target, draft_vocab_size):
    """Its weight is behind a method: the draft's logits are some of its own; a draft with a head of its own takes that."""
    small = quantized(target)
    draft = bound_draft(small, draft_vocab_size=draft_vocab_size)
    states = torch.linspace(-1, 1, 3 * 32).view(3, -1)
    assert torch.equal(logits_of(draft), small.lm_head(states)[:, :draft_vocab_size])
    assert not draft.takes_text_rows
    own = bound_draft(small, share_target_head=False, draft_vocab_size=50)
    assert logits_of(own).shape == (3, 50)


def test_a_head_that_computes_more_than_its_weight_is_followed(target):
    """As with an adapter on it, switched on and off between calls."""

    class Adapted(nn.Linear):
        factor = 1.0

        def forward(self, input):
            return self.factor * super().forward(input).sin()

    target.lm_head.__class__ = Adapted
    draft = bound_draft(target, draft_vocab_size=50)
    assert isinstance(draft._borrowed.head_rows, ChosenLogits)
    seen = logits_of(draft)
    target.lm_head.factor = 2.0
    assert torch.equal(logits_of(draft.bind(target)), 2 * seen)


def test_the_rows_of_a_quantised_head_are_gathered_where_they_can_be_read(target):
    """Once, as plain numbers; again when the head has another weight."""

    class Quantised(nn.Module):
        in_features, out_features, bias = 32, VOCAB_SIZE, None

        def __init__(self, weight):
            super().__init__()
            self.scale = weight.abs().max() / 127
            self.codes = (weight / self.scale).round().to(torch.int8)

        def dequantize(self):
            return self.codes * self.scale

        def forward(self, input):
            return nn.functional.linear(input, self.dequantize())

    target.lm_head = Quantised(target.lm_head.weight.detach())
    draft = bound_draft(target, draft_vocab_size=50)
    rows = draft._borrowed.head_rows
    assert type(rows) is nn.Linear
    assert torch.equal(rows.weight, target.lm_head.dequantize()[:50])
    assert draft.bind(target)._borrowed.head_rows is rows
    target.lm_head = Quantised(torch.randn(VOCAB_SIZE, 32))
    assert torch.equal(draft.bind(target)._borrowed.head_rows.weight, target.lm_head.dequantize()[:50])
    target.lm_head.out_features = 40
    with pytest.raises(ValueError, match="tokens of the target's vocabulary head, which has 40, got 49"):
        bound_draft(target, draft_vocab_size=50)


def test_heads_of_eight_bits_are_no_plain_numbers():
    """Neither integers nor scaled floating point numbers, whose scales lie elsewhere."""
    layer = nn.Linear(4, 6)
    assert float_weight(layer) is layer.weight
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        layer.weight = nn.Parameter(torch.zeros(6, 4).to(dtype), requires_grad=False)
        assert float_weight(layer) is None
        assert place_of(layer, None, torch.bfloat16) == (torch.device("cpu"), torch.bfloat16)


def test_rows_from_inference_mode_serve_training(target):
    """A call of generate() in inference mode, then a training step outside."""
    draft = tiny_draft(target, draft_vocab_size=50)
    with torch.inference_mode():
        draft.bind(target)
        draft.text_rows(torch.arange(60))
    draft.train()
    states = torch.randn(2, 5, 32)
    ids = torch.randint(0, 50, (2, 5))
    text = draft.bind(target).text_rows(torch.arange(60))
    output = draft(ids, states, draft_step=1).last_hidden_state
    draft.compute_logits(output, text).logsumexp(-1).sum().backward()
    assert draft.processing_modules[1].input_projection.weight.grad.abs().sum() > 0


def test_a_target_made_in_inference_mode_is_bound():
    """Its weights count no writes."""
    with torch.inference_mode():
        target = tiny_target("llama", seed=3)
        draft = tiny_draft(target, draft_vocab_size=50).bind(target)
        rows = draft._borrowed.head_rows
        assert draft.bind(target)._borrowed.head_rows is rows
        target.lm_head.weight.mul_(2)
        assert draft.bind(target)._borrowed.head_rows is not rows


def test_a_head_of_fewer_rows_than_the_vocabulary(target):
    """As of targets whose vocabulary is padded: its tokens alone join or make a draft vocabulary."""
    draft = tiny_draft(target, draft_vocab_size=50)
    target.set_output_embeddings(nn.Linear(32, 80, bias=False))
    draft.bind(target)
    assert draft.text_rows(torch.tensor([3, 70, 90])).text_ids.tolist() == [70]
    assert draft.own_tokens().nonzero()[:, 0].tolist() == [*range(50), *range(80, VOCAB_SIZE)]
    with pytest.raises(ValueError, match="draft_to_target: expected tokens of the target's vocabulary head, .* 80, got 89"):
        tiny_draft(target, draft_vocab_size=90).bind(target)


def test_tokens_outside_a_draft_vocabulary():
    """Each once, in rising order."""
    found = tokens_outside(torch.tensor([[9, 3, 9], [5, 8, 0]]), torch.tensor([0, 5]), 10)
    assert found.tolist() == [3, 8, 9]
    assert tokens_outside(torch.tensor([9, 3]), torch.tensor([0, 5]), 10, num_head_rows=9).tolist() == [3]


@pytest.mark.parametrize(("architecture", "added"), [("llama", 0.0), ("gemma2", 1.0), ("granite", 0.0)])
def test_borrowed_layers_final_norm(architecture, added):
    """What the final norm multiplies by, its weight or one plus its weight."""
    target = tiny_target(architecture)
    with torch.no_grad():
        target.model.norm.weight.copy_(torch.linspace(-1, 2, 32))
    torch.testing.assert_close(final_norm_of(target), torch.linspace(-1, 2, 32) + added)


def test_borrowed_layers_no_final_norm():
    """A LayerNorm subtracts the mean, which a multiplier alone does not tell; a model on no device tells nothing."""
    assert final_norm_of(tiny_target("gpt2")) is None
    assert final_norm_of(tiny_target().to("meta")) is None


def test_borrowed_layers_saved_final_norm(tmp_path):
    """A draft that is bound when it is saved, and reads the last state, carries the norm in a file of its own, which loading
    leaves alone and a later save keeps."""
    target = tiny_target()
    draft = tiny_draft(target, target_layer_ids=[1, 4])
    draft.save_pretrained(tmp_path / "unbound")
    assert not (tmp_path / "unbound" / FINAL_NORM).exists()
    draft.bind(target).save_pretrained(tmp_path / "bound")
    loaded = PrismDraftModel.from_pretrained(tmp_path / "bound")
    assert loaded.state_dict().keys() == draft.state_dict().keys()
    loaded.save_pretrained(tmp_path / "again")
    for name in ("bound", "again"):
        assert torch.equal(load_file(tmp_path / name / FINAL_NORM)["target_final_norm"], target.model.norm.weight)
    tiny_draft(target, target_layer_ids=[1, 3]).bind(target).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / FINAL_NORM).exists()
