"""`tree="auto"` on accelerators, on CPU tensors: lossless, planned before the round, and learned from what came of it."""

import pytest
import torch
from test_automatic import ARGUMENTS, LENGTH, always_right, batch_trees
from tiny_models import generate_twice, prompts, scripted_pair, tiny_draft, varied_target

from transformers_prism.decoding.round_values import plain_step
from transformers_prism.policy.experience import PlanValues
from transformers_prism.policy.planners import AheadOfRound, Lesson, Outlook

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("device_walk")]


def scripted(num_rows, **settings):
    return scripted_pair(num_rows, ARGUMENTS, tree="auto", **settings)


def make_planner(**settings) -> AheadOfRound:
    """Planned trees, before their first round."""
    return batch_trees([9], **settings)[0].planner


def outlook_of(planner, num_sequences: int = 1) -> Outlook:
    """Sequences that are even, where drafting brings nothing yet."""
    return Outlook([1.0] * num_sequences, num_sequences / planner.known.costs.verify(num_sequences))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_planned_trees_are_lossless(num_rows, cheap_rounds):
    """In several calls, which share what was learnt, with trees of more than one size."""
    cheap_rounds.verify_seconds[1] = 6.0
    target, draft, input_ids, mask = scripted(num_rows, tree_depth=8, tree_num_nodes=63)
    sizes = set()
    for _ in range(3):
        plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **ARGUMENTS)
        assert torch.equal(plain, speculative)
        assert same_state
        sizes |= {(tree.num_steps, tree.num_nodes) for tree in draft.last_speculation.trees}
    assert len(sizes) > 1


def test_planned_a_draft_that_is_always_right_gets_deep_trees(cheap_rounds, monkeypatch):
    """After a few calls rounds commit nearly as many tokens as the largest tree allows."""
    target, draft, input_ids, mask = scripted(1, tree_depth=6)
    always_right(monkeypatch, draft)
    for _ in range(5):
        target.generate(input_ids, attention_mask=mask, assistant_model=draft, **ARGUMENTS)
    assert draft.last_speculation.acceptance_length > 4
    assert draft.last_speculation.estimates["advantage"] > 2


def test_planned_a_useless_draft_is_left_alone(cheap_rounds):
    """It is tried a few times, and later calls wait before they try it; copies of the text still join."""
    input_ids, mask = prompts(1)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto")
    cheap_rounds.step_seconds = 0.2
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    tried = []
    for _ in range(6):
        assert torch.equal(target.generate(input_ids, attention_mask=mask, assistant_model=draft, **ARGUMENTS), plain)
        tried.append(sum(tree.num_steps > 0 for tree in draft.last_speculation.trees))
    assert 1 <= tried[0] <= 25
    assert tried[2] <= 10
    assert 1 <= sum(tried[2:]) <= 30
    assert any(tree.num_copied for tree in draft.last_speculation.trees)


def test_planned_tokens_that_cost_much_get_small_trees(cheap_rounds):
    """And steps that cost much get shallow ones."""
    planner = make_planner(top_k=10, depth=8, num_nodes=63)
    usual = planner.plan(outlook_of(planner), 8, 63)
    assert usual.depth > 1
    assert usual.num_nodes > 1
    cheap_rounds.verify_seconds[1] = 64.0
    assert planner.plan(outlook_of(planner), 8, 63).num_nodes == 1
    cheap_rounds.verify_seconds[1] = 2.0
    cheap_rounds.step_seconds = 10.0
    assert planner.plan(outlook_of(planner), 8, 63).depth == 1


@pytest.mark.parametrize(("limit", "max_nodes", "top_k"), [(1, 63, 10), (8, 2, 10), (3, 63, 1), (8, 63, 2)])
def test_plans_keep_to_their_bounds(cheap_rounds, limit, max_nodes, top_k):
    """Depth, nodes, and what that many steps can draw."""
    planner = make_planner(top_k=top_k, depth=8, num_nodes=63)
    experience = planner.known.experience
    experience.plan.first, experience.step_gain = 1.0, 1.0
    experience.plan.ranks[:] = 0.9
    plan = planner.plan(outlook_of(planner, 2), limit, max_nodes)
    assert 1 <= plan.depth <= min(limit, max_nodes)
    assert 1 <= plan.num_nodes <= min(max_nodes, plan.pool_size(plan.depth), 63)


def test_planned_values_follow_rounds_and_drift_back(cheap_rounds):
    """Ranks that a small tree does not reach, and the gain of steps that it does not run, return to their beginning."""
    planner = make_planner()
    experience, prior = planner.known.experience, PlanValues()
    experience.plan.ranks[:] = 0.0
    experience.step_gain = 0.0
    for _ in range(300):
        experience.plan.observe(torch.tensor([[0.9, 0.05, 0.02]], dtype=torch.float64), torch.tensor([[1, 1, 1]]))
        experience.forget_step_gain()
    assert experience.plan.ranks[0] > 0.8
    assert experience.plan.ranks[2] < 0.1
    torch.testing.assert_close(experience.plan.ranks[3:], prior.ranks[3:], atol=1e-3, rtol=0.01)
    assert experience.step_gain == pytest.approx(0.7, abs=0.01)
    assert experience.plan.first == pytest.approx(0.97, abs=0.01)


def test_planned_proposals_are_completed_by_what_was_drawn(cheap_rounds):
    """Cells, and what was expected of the nodes by their chances; the proposal itself stays as it was."""
    planner = make_planner()
    drawn = torch.tensor([[[1.0, 1.0, 2.0]], [[-0.1, -3.0, -0.2]]])
    proposal = plain_step([5], depth=2, num_steps=2, lesson=Lesson([1.0], 0.0, [], [], drawn=drawn))
    completed = planner.completed(proposal)
    assert proposal.expected_tokens is None
    assert proposal.lesson.drafted_cells == []
    (cells,) = completed.lesson.drafted_cells
    chances = planner.known.experience.drafted.chances
    assert completed.expected_tokens == pytest.approx(1 + sum(chances[cell] for cell in cells))
    assert completed.lesson.copied_cells == [[-1, -1, -1]]
