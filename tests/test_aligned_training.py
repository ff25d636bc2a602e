"""Which weights of a draft the loss of a stage reaches."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_draft, tiny_target

from transformers_prism.training.aligned_training import AlignedTraining, reaches_all_weights
from transformers_prism.training.recipes import TrainConfig, plan_stages

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize(
    ("step_to_module", "num_steps", "is_reached"),
    [([0], 1, True), ([0, 1], 1, False), ([0, 0, 1], 2, False), ([0, 0, 1], 3, True), ([1, 0], 1, False), ([2, 1, 0], 3, True)],
)
def test_weights_without_gradients_are_foreseen(step_to_module, num_steps, is_reached, context_kv):
    """DDP has to be told; by the numbers of modules and steps alone, [0, 0, 1] with two steps was taken for reached."""
    target = tiny_target("llama", seed=3)
    map_ = {"num_processing_modules": max(step_to_module) + 1, "draft_step_to_module": step_to_module}
    draft = tiny_draft(target, context_kv=context_kv, **map_).bind(target)
    assert_foreseen(draft, num_steps, is_reached)


@pytest.mark.parametrize(("weights", "is_reached"), [({}, True), ({"token_weight": 0.0, "acceptance_weight": 0.1}, True)])
def test_a_head_of_its_own_needs_a_loss_over_the_vocabulary(weights, is_reached):
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target, module_form="eagle3", share_target_head=False).bind(target)
    assert_foreseen(draft, 2, is_reached, **weights)
    assert_foreseen(draft, 2, False, token_weight=0.0)


def assert_foreseen(draft, num_steps: int, is_reached: bool, **weights):
    options = {"warm_up_steps": num_steps, "hidden_weight": 1.0, "single_step_epochs": 0.0, **weights}
    (stage,) = plan_stages(TrainConfig(recipe="hass", **options))
    assert reaches_all_weights(draft, stage) == is_reached
    draft.requires_grad_().zero_grad()
    torch.manual_seed(0)
    width = draft.config.fused_hidden_size + draft.config.target_hidden_size
    training = AlignedTraining(draft, draft._borrowed.target, stage)
    input_ids, mask = torch.randint(0, VOCAB_SIZE, (2, 8)), torch.ones(2, 8, dtype=torch.bool)
    training(input_ids, torch.randn(2, 9, width), mask)["loss"].backward()
    assert all(parameter.grad is not None for parameter in training.parameters()) == is_reached


@pytest.mark.parametrize("draft_vocab_size", [None, 40])
@pytest.mark.parametrize("made", ["bound", "decoded"])
def test_a_draft_that_was_used_in_inference_mode_trains(made, draft_vocab_size):
    """The head's rows that were gathered there could not be saved for a backward pass."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    with torch.inference_mode():
        draft.bind(target)
        if made == "decoded":
            target.generate(torch.tensor([[5, 6, 7]]), assistant_model=draft, max_new_tokens=8, do_sample=False)
    draft.bind(target)
    assert_foreseen(draft, 2, True)
