"""Layers that scale by a whole forward are found, and targets with them decoded plainly."""

import warnings

import pytest
import torch
from tiny_models import generate_twice, prompts, tiny_draft, tiny_target
from torch import nn

from transformers_prism.decoding.layer_check import has_plain_weight, is_plain_linear, reason_against_target

pytestmark = pytest.mark.quick


class Rounded(nn.Linear):
    """Inputs in 8 bits, scaled by the largest value of each token, or of the whole forward, or but for outliers."""

    scale_of = "token"
    num_calls = 0

    def forward(self, input):
        type(self).num_calls += 1
        scale = input.abs().amax(-1, keepdim=True) if self.scale_of == "token" else input.abs().max()
        rounded = (input * (127 / scale)).round() / 127 * scale
        if self.scale_of == "outliers":
            has_outlier = (input.abs() > 6).flatten(0, -2).any(0)
            rounded = torch.where(has_outlier, input, (input * 32).round() / 32)
        return super().forward(rounded)


def with_layers(target, scale_of):
    """The target, its MLPs rounded."""
    for layer in target.model.layers:
        layer.mlp.up_proj.__class__ = type("Rounded", (Rounded,), {"scale_of": scale_of})
    return target


@pytest.fixture
def target():
    return tiny_target("llama", seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale_of", "is_refused"), [("token", False), ("forward", True), ("outliers", True)])
def test_a_layer_that_depends_on_other_tokens_is_found(target, dtype, scale_of, is_refused):
    """In each dtype; scales of each token alone are fine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = reason_against_target(with_layers(target.to(dtype), scale_of))
    assert (reason is not None) == is_refused
    if is_refused:
        assert "Rounded gives a token another output when other tokens are in the same forward" in reason


def test_plain_targets_are_not_tried_and_others_once(target, monkeypatch):
    """No forward of a plain layer; four for each other layer, in the first call alone, which warns of rounded inputs."""
    for layer in target.modules():
        if isinstance(layer, nn.Linear):
            monkeypatch.setattr(layer, "forward", None)
    assert reason_against_target(target) is None
    monkeypatch.undo()
    with_layers(target, "token")
    kinds = {type(layer.mlp.up_proj) for layer in target.model.layers}
    with pytest.warns(UserWarning, match="Rounded round their inputs"):
        assert reason_against_target(target) is None
    assert [kind.num_calls for kind in kinds] == [4] * len(kinds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_against_target(target) is None
    assert [kind.num_calls for kind in kinds] == [4] * len(kinds)


def test_the_generator_stays_as_it_is(target):
    """What is tried draws from a generator of its own."""
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="round their inputs"):
        reason_against_target(with_layers(target, "token"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_dynamic_quantization_is_decoded_plainly(target, draft_vocab_size):
    """With the reason in a warning, although a draft could not borrow rows of such a head."""
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    small = torch.ao.quantization.quantize_dynamic(target, {nn.Linear}, dtype=torch.qint8)
    with pytest.warns(UserWarning, match="quantized.dynamic.* gives a token another output"):
        plain, drafted, _ = generate_twice(small, draft, prompts(1)[0], max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, drafted)


def test_layers_that_take_other_inputs_are_left_alone(target):
    """They are none of those that the check knows."""

    class Other(nn.Module):
        in_features = 32

        def forward(self, input, ids):
            return input

    target.other = Other()
    assert reason_against_target(target) is None


def test_what_a_plain_layer_is():
    """An nn.Linear with numbers as they are; neither a subclass that computes more, nor numbers of 8 bits."""
    layer = nn.Linear(4, 6)
    assert is_plain_linear(layer)
    layer.__class__ = Rounded
    assert has_plain_weight(layer)
    assert not is_plain_linear(layer)
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.zeros(6, 4).to(torch.float8_e4m3fn), requires_grad=False)
    assert not has_plain_weight(layer)
