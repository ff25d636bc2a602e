"""Prompts of different lengths are read in groups, and everything is as if they had been read at once."""

import pytest
import torch
from compatibility_models import build
from tiny_models import (
    PAD_ID,
    generate_twice,
    observer,
    prompts,
    scripted_draft,
    tiny_draft,
    tiny_target,
    varied_target,
)
from transformers import DynamicCache

from transformers_prism.decoding import uneven_prompts
from transformers_prism.decoding.cache import TreeLayer
from transformers_prism.decoding.drafter import Drafter
from transformers_prism.decoding.uneven_prompts import groups_of_like_length, side_by_side
from transformers_prism.transformers_names import CACHE_KEYWORD

pytestmark = pytest.mark.quick
ARCHITECTURES = ["llama", "qwen2_mixed_windows", "mistral", "gemma2", "gpt2", "gpt_neox", "mixtral"]
LENGTH = {"max_new_tokens": 30, "pad_token_id": PAD_ID}


def mask_of(*lengths: int) -> torch.Tensor:
    """Prompts of these lengths, padded on the left to the longest."""
    longest = max(lengths)
    return torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])


@pytest.fixture
def reads_apart(monkeypatch):
    """A forward costs nothing, so that no padding is read."""
    monkeypatch.setattr(uneven_prompts, "_WORTH_A_FORWARD", 0)


@pytest.fixture
def tokens_read(monkeypatch):
    """Rows and positions of each forward of the targets that it was given."""
    shapes = []

    def watch(target):
        def note(module, args, kwargs):
            shapes.append(tuple(kwargs["input_ids"].shape))

        target.register_forward_pre_hook(observer(note), with_kwargs=True)
        return shapes

    return watch


def test_groups_hold_little_padding():
    """The longest first; a row opens a group where the padding of the one before it would cost more than a forward."""
    assert groups_of_like_length(mask_of(40, 200, 190, 41)) == [([1, 2], 0), ([3, 0], 159)]
    # All of about one length, in which padding is cheaper than another forward.
    assert groups_of_like_length(mask_of(200, 190, 180)) == []
    # 10 + 20 + 30 is more than 32.
    assert groups_of_like_length(mask_of(200, 190, 180, 170, 160)) == [([0, 1, 2], 0), ([3, 4], 30)]
    # Long ones one by one.
    assert groups_of_like_length(mask_of(40, 300, 299)) == [([1], 0), ([2], 1), ([0], 260)]
    # Padded to more than the longest, as by padding="max_length".
    assert groups_of_like_length(torch.nn.functional.pad(mask_of(8, 8), (50, 0))) == [([0, 1], 50)]


@pytest.mark.parametrize("what", ["no mask", "one row", "right padding", "a hole", "an empty row", "elsewhere"])
def test_what_cannot_be_grouped_is_read_together(what):
    """Padding anywhere but on the left, and masks whose values cannot be looked at for free."""
    mask = mask_of(10, 300)
    if what == "no mask":
        mask = None
    elif what == "one row":
        mask = torch.nn.functional.pad(mask[:1], (300, 0))
    elif what == "right padding":
        mask = mask.flip(1)
    elif what == "a hole":
        mask[1, 100] = 0
    elif what == "an empty row":
        mask[0] = 0
    elif what == "elsewhere":
        mask = mask.to("meta")
    assert groups_of_like_length(mask) == []


def test_caches_side_by_side():
    """Each row where it was in the batch, at the end; layers that hold nothing stay empty."""
    caches = []
    for rows, length in ((2, 3), (1, 5)):
        layer = TreeLayer()
        keys = torch.randn(rows, 2, length, 4)
        layer.update(keys, -keys)
        caches.append([layer, TreeLayer()])
    full, empty = side_by_side([[0, 2], [1]], caches, 6)
    assert full.get_seq_length() == 6
    assert torch.equal(full.keys[[0, 2], :, 3:], caches[0][0].keys)
    assert torch.equal(full.values[[1], :, 1:], caches[1][0].values)
    assert not full.keys[1, :, 0].any()
    assert not empty.is_initialized


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_is_that_of_plain_decoding(architecture, do_sample, reads_apart, tokens_read):
    """Windows, learned positions, experts; greedy and with the same seed; and only tokens of the text are read."""
    input_ids, mask = prompts(4)
    target = varied_target(architecture, input_ids, mask, **LENGTH)
    arguments = {**LENGTH, "do_sample": do_sample}
    torch.manual_seed(5)
    plain_ids = target.generate(input_ids, attention_mask=mask, **arguments)
    draft = scripted_draft(target, plain_ids, input_ids.shape[1])
    shapes = tokens_read(target)
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, seed=5, **arguments)
    assert torch.equal(plain, speculative)
    assert same_state
    start = shapes.index((1, 9))
    assert shapes[start : start + 4] == [(1, 9), (1, 7), (1, 5), (1, 3)]


@pytest.mark.parametrize("what", ["returned cache", "caller's cache", "chunks", "dynamic frequencies"])
def test_what_others_go_on_with_is_read_at_once(what, reads_apart, tokens_read):
    """Caches that a caller gets back hold padding as plain decoding's do; some frequencies follow the longest text."""
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    target = tiny_target("llama", 3, **(rope if what == "dynamic frequencies" else {}))
    input_ids, mask = prompts(3)
    arguments = {"returned cache": {"return_dict_in_generate": True}, "chunks": {"prefill_chunk_size": 4}}.get(what, {})
    if what == "caller's cache":
        arguments = {CACHE_KEYWORD: DynamicCache(config=target.config)}
    shapes = tokens_read(target)
    target.generate(input_ids, attention_mask=mask, assistant_model=tiny_draft(target), do_sample=False, **arguments, **LENGTH)
    assert shapes[0] == ((3, 4) if what == "chunks" else (3, 9))


def test_what_sees_its_padding_is_read_at_once(reads_apart, tokens_read):
    """In PaliGemma a padded row has another text than the row alone, and with a draft it has the same."""
    target = build("paligemma")
    input_ids, mask = prompts(3)
    plain_ids = target.generate(input_ids, attention_mask=mask, do_sample=False, **LENGTH)
    draft = scripted_draft(target, plain_ids, input_ids.shape[1])
    shapes = tokens_read(target)
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, seed=5, do_sample=False, **LENGTH)
    assert torch.equal(plain, speculative)
    assert (1, 9) not in shapes


@pytest.mark.parametrize("num_layers_per_module", [1, 2])
@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@torch.no_grad()
def test_a_draft_reads_groups_as_the_whole(context_kv, num_layers_per_module, monkeypatch):
    """The same trees of the same probabilities; in float64, since random layers make much of a rounding error."""
    target = tiny_target("llama", 3).double()
    draft = tiny_draft(target, context_kv=context_kv, num_layers_per_module=num_layers_per_module, num_processing_modules=2)
    draft.double().bind(target)
    input_ids, mask = prompts(3)
    hidden = torch.randn(3, 9, draft.config.target_hidden_size * len(draft.config.target_layer_ids), dtype=torch.float64)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    trees = []
    for worth in (64, 0):
        monkeypatch.setattr(uneven_prompts, "_WORTH_A_FORWARD", worth)
        drafter = Drafter(draft)
        drafter.prefill(input_ids, hidden, positions, [9] * 3, mask)
        trees.append(drafter.grow(_Settings()))
    assert torch.equal(trees[0].token_ids, trees[1].token_ids)
    torch.testing.assert_close(trees[0].log_probs, trees[1].log_probs, atol=1e-4, rtol=1e-5)


class _Settings:
    """Of a static tree."""

    top_k, depth, num_nodes = 3, 3, 12
