"""What we promise: with a draft, generate() returns what it returns without one."""

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    PAD_ID,
    generate_twice,
    prompts,
    scripted_draft,
    tiny_draft,
    tiny_target,
    varied_target,
)

NUM_NEW_TOKENS = 40
SAMPLING = {
    "plain sampling": {},
    "warpers": {"temperature": 0.8, "top_p": 0.95, "top_k": 30},
    "processors": {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


def largest_difference_and_smallest_gap(plain, speculative) -> tuple[float, float]:
    """Largest difference of the logits that both chose tokens from, and the smallest gap between the best two."""
    a, b = torch.stack(plain.logits), torch.stack(speculative.logits)
    best = a.topk(2, dim=-1).values
    return float((a - b).abs().max()), float((best[..., 0] - best[..., 1]).min())


@pytest.mark.quick
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_plain(architecture, num_rows):
    """Every architecture, batch 1 and a left-padded batch, with 0 to `tree_depth` tokens accepted per round."""
    input_ids, mask = prompts(num_rows)
    arguments = {"max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": PAD_ID}
    target = varied_target(architecture, input_ids, mask, least_gap=1e-3, **arguments)
    plain_ids = target.generate(input_ids, attention_mask=mask, do_sample=False, **arguments)
    draft = scripted_draft(target, plain_ids, input_ids.shape[1])
    plain, speculative, same_state = generate_twice(
        target, draft, input_ids, mask, do_sample=False, return_dict_in_generate=True, output_logits=True, **arguments
    )
    difference, gap = largest_difference_and_smallest_gap(plain, speculative)
    assert gap > 10 * difference, "redraw the target: a near-tie says nothing about losslessness"
    assert torch.equal(plain.sequences, speculative.sequences)
    assert same_state
    accepted = [count for row in speculative.speculation.accepted_per_round for count in row]
    assert sum(accepted) / len(accepted) >= 1
    assert {0, 4} <= set(accepted)


@pytest.mark.quick
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attn_implementation", ["default", "eager"])
def test_sampling_with_equal_seed_equals_plain(architecture, attn_implementation):
    """Warpers and processors, batch 1 and a left-padded batch: same tokens, and the generator left in plain's state."""
    for num_rows in (1, 3):
        input_ids, mask = prompts(num_rows)
        target = varied_target(architecture, input_ids, mask, max_new_tokens=NUM_NEW_TOKENS, pad_token_id=PAD_ID)
        if attn_implementation != "default":
            target.set_attn_implementation(attn_implementation)
        for settings in SAMPLING.values():
            arguments = {"do_sample": True, "max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": PAD_ID, **settings}
            torch.manual_seed(5)
            plain_ids = target.generate(input_ids, attention_mask=mask, **arguments)
            draft = scripted_draft(target, plain_ids, input_ids.shape[1])
            plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, seed=5, **arguments)
            assert torch.equal(plain, speculative)
            assert same_state
            assert draft.last_speculation.acceptance_length >= 2


@pytest.mark.quick
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_automatic_trees_equal_plain(architecture, num_rows, do_sample, cheap_rounds):
    """Trees of every size, plain steps in between, and copied continuations, wherever the rule wants them."""
    input_ids, mask = prompts(num_rows)
    length = {"max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": PAD_ID}
    arguments = {**length, "do_sample": do_sample}
    target = varied_target(architecture, input_ids, mask, **length)
    torch.manual_seed(5)
    plain_ids = target.generate(input_ids, attention_mask=mask, **arguments)
    draft = scripted_draft(target, plain_ids, input_ids.shape[1], tree="auto", tree_depth=5, tree_num_nodes=16)
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, seed=5, **arguments)
    assert torch.equal(plain, speculative)
    assert same_state
    assert draft.last_speculation.acceptance_length >= 1.5
    assert len({tree.num_nodes for tree in draft.last_speculation.trees}) > 1


@pytest.mark.quick
@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize(("draft_vocab_size", "sliding_window"), [(None, None), (40, None), (None, 5)])
def test_a_real_draft_changes_nothing(context_kv, draft_vocab_size, sliding_window):
    """The whole package, with a random draft: greedy and sampled, batch 1 and 3."""
    for num_rows in (1, 3):
        input_ids, mask = prompts(num_rows)
        target = varied_target("llama", input_ids, mask, max_new_tokens=NUM_NEW_TOKENS, pad_token_id=PAD_ID)
        sizes = {"draft_vocab_size": draft_vocab_size, "sliding_window": sliding_window}
        draft = tiny_draft(target, context_kv=context_kv, **sizes)
        for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.9}):
            plain, speculative, same_state = generate_twice(
                target, draft, input_ids, mask, max_new_tokens=NUM_NEW_TOKENS, pad_token_id=PAD_ID, **settings
            )
            assert torch.equal(plain, speculative)
            assert same_state


@pytest.mark.quick
@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize(("module_form", "num_layers_per_module"), [("eagle3", 1), ("eagle3", 2), ("prism", 2)])
def test_every_form_of_module_changes_nothing(context_kv, module_form, num_layers_per_module):
    """EAGLE-3's form with its own head over a draft vocabulary, and stacked layers: greedy and sampled, batched."""
    input_ids, mask = prompts(3)
    arguments = {"max_new_tokens": NUM_NEW_TOKENS, "pad_token_id": PAD_ID}
    target = varied_target("llama", input_ids, mask, **arguments)
    own_head = {"share_target_head": False, "draft_vocab_size": 40} if module_form == "eagle3" else {}
    draft = tiny_draft(
        target,
        context_kv=context_kv,
        module_form=module_form,
        num_layers_per_module=num_layers_per_module,
        **own_head,
    )
    for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 0.9}):
        plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **settings, **arguments)
        assert torch.equal(plain, speculative)
        assert same_state


@pytest.mark.quick
def test_each_row_of_a_greedy_batch_equals_the_row_alone():
    """Without processors that read padding, a row does not notice its neighbours."""
    input_ids, mask = prompts(3)
    target = varied_target("llama", input_ids, mask, max_new_tokens=NUM_NEW_TOKENS, pad_token_id=PAD_ID)
    plain_ids = target.generate(
        input_ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_NEW_TOKENS, pad_token_id=PAD_ID
    )
    draft = scripted_draft(target, plain_ids, input_ids.shape[1])
    batch = target.generate(
        input_ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        pad_token_id=PAD_ID,
        assistant_model=draft,
    )
    for row in range(3):
        alone = input_ids[row : row + 1, 2 * row :]
        single = target.generate(alone, do_sample=False, max_new_tokens=NUM_NEW_TOKENS, pad_token_id=PAD_ID)
        assert torch.equal(single[0, alone.shape[1] :], batch[row, input_ids.shape[1] :])


@pytest.mark.quick
def test_sampled_tokens_follow_the_target_distribution():
    """Total variation between 4 000 sampled second tokens and their exact distribution over 8 tokens.

    With 4 000 draws over 8 tokens the expected distance is below 0.018, and by McDiarmid's inequality the chance of
    0.06 or more is under exp(-2 * 4000 * 0.042 ** 2) = 7e-7.
    """
    torch.manual_seed(0)
    input_ids = torch.tensor([[3, 5, 4, 7]])
    target = tiny_target("llama", seed=3, vocab_size=8)
    draft = tiny_draft(target, draft_vocab_size=None)
    with torch.no_grad():
        first = target(input_ids).logits[0, -1].softmax(-1)
        exact = torch.zeros(8)
        for token in range(8):
            following = target(torch.cat((input_ids, torch.tensor([[token]])), 1)).logits[0, -1].softmax(-1)
            exact += first[token] * following
    num_draws = 4000
    batch = input_ids.repeat(500, 1)
    counts = torch.zeros(8)
    for _ in range(num_draws // 500):
        sampled = target.generate(
            batch, do_sample=True, top_k=0, max_new_tokens=3, assistant_model=draft, pad_token_id=PAD_ID
        )
        counts += torch.bincount(sampled[:, 5], minlength=8)
    assert float((counts / num_draws - exact).abs().sum() / 2) < 0.06
