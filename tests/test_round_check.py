"""Targets that nobody has tried: their rounds are compared with single steps, and what differs is noticed before a token."""

import functools
import warnings

import pytest
import torch
from compatibility_models import build
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_target
from transformers import LlamaConfig

from transformers_prism.decoding import round_check
from transformers_prism.decoding.round_check import is_tried, lengths_named

LENGTH = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": PAD_ID}


@pytest.fixture
def untried(monkeypatch, tmp_path):
    """No type was tried, and nothing is known of earlier checks."""
    monkeypatch.setattr(round_check, "TRIED_TYPES", frozenset())
    monkeypatch.setattr(round_check, "_folder", lambda: tmp_path / "checked")
    return tmp_path / "checked"


def counted(monkeypatch, target):
    """How many tokens each forward of a target is over, as it runs."""
    widths: list[int] = []
    forward = target.forward

    @functools.wraps(forward)
    def count(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(target, "forward", count)
    return widths


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("tree", ["static", "chain"])
def test_checked_rounds_change_nothing(untried, architecture, num_rows, tree):
    """Text of plain decoding, and drafting goes on."""
    target = tiny_target(architecture, 3)
    input_ids, mask = prompts(num_rows)
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1], tree=tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
    assert torch.equal(found, plain)
    assert draft.last_speculation.stopped_drafting is None
    assert draft.last_speculation.acceptance_length > 1.3


def test_a_target_is_checked_at_doubled_lengths_once(untried, monkeypatch):
    """Two steps at the first tree, at twice the length, and behind the window; none in the next call."""
    target = tiny_target("mistral", 3, sliding_window=20)
    input_ids, _ = prompts(1)
    plain = target.generate(input_ids, **LENGTH)
    widths = counted(monkeypatch, target)
    numbers = []
    for _ in range(2):
        widths.clear()
        draft = scripted_draft(target, plain, input_ids.shape[1])
        target.generate(input_ids, assistant_model=draft, **LENGTH)
        numbers.append(widths[1:].count(1) - sum(tree.num_nodes == 0 for tree in draft.last_speculation.trees))
    # At 9 tokens, from 18 on, beyond 20, from 36 on.
    assert numbers == [8, 0]


def test_checks_hold_for_the_same_code_and_configuration(untried, monkeypatch):
    """A second model of the kind takes no single step for a check; one of another window does."""
    numbers = []
    for window in (20, 20, 24):
        target = tiny_target("mistral", 3, sliding_window=window)
        input_ids, _ = prompts(1)
        plain = target.generate(input_ids, **LENGTH)
        draft = scripted_draft(target, plain, input_ids.shape[1])
        widths = counted(monkeypatch, target)
        target.generate(input_ids, assistant_model=draft, **LENGTH)
        numbers.append(widths[1:].count(1) - sum(tree.num_nodes == 0 for tree in draft.last_speculation.trees))
        assert draft.last_speculation.acceptance_length > 1.3
    # At 9, 18 and beyond 20, 36; none; at 9, 18 and beyond 24.
    assert numbers == [8, 0, 6]
    assert len(list(untried.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"TreeTarget, one, whole": [9, "18"]}', '{"TreeTarget, one, whole": 5}', "\xff"])
def test_a_file_of_checks_that_is_none_is_not_believed(untried, monkeypatch, content):
    """Checked as if it were not there."""
    target = tiny_target("mistral", 3, sliding_window=20)
    untried.mkdir()
    (untried / f"{round_check._key(target)}.json").write_bytes(content.encode("latin-1"))
    input_ids, _ = prompts(1)
    plain = target.generate(input_ids, **LENGTH)
    widths = counted(monkeypatch, target)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    target.generate(input_ids, assistant_model=draft, **LENGTH)
    assert widths[1:].count(1) - sum(tree.num_nodes == 0 for tree in draft.last_speculation.trees) == 8


def test_checks_go_on_where_nothing_can_be_written(untried, monkeypatch):
    """A full or read-only disk costs later processes their check, and nothing else."""
    untried.write_text("a file in the folder's place")
    target = tiny_target("mistral", 3, sliding_window=20)
    input_ids, _ = prompts(1)
    plain = target.generate(input_ids, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **LENGTH), plain)
    assert draft.last_speculation.stopped_drafting is None


@pytest.mark.parametrize(("num_rows", "tree"), [(1, "static"), (1, "chain"), (3, "static")])
@pytest.mark.parametrize("from_length", [0, 20])
def test_a_target_that_computes_trees_otherwise_is_decoded_plainly(untried, monkeypatch, num_rows, tree, from_length):
    """From the first tree on, or once its text is longer than a length that the configuration names; told once."""
    target = tiny_target("llama", 3)
    target.config.some_window = 20
    input_ids, mask = prompts(num_rows)
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    forward = target.forward

    @functools.wraps(forward)
    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        positions = kwargs.get("position_ids")
        if kwargs["input_ids"].shape[1] > 1 and output.logits.shape[1] > 1 and int(positions.max()) >= from_length:
            output.logits[:, 1:] = output.logits[:, 1:].roll(1, dims=-1)
        return output

    monkeypatch.setattr(target, "forward", broken)
    draft = scripted_draft(target, plain, input_ids.shape[1], tree=tree, is_strict=False)
    with pytest.warns(UserWarning, match="LlamaForCausalLM over several tokens differ from single steps") as caught:
        found = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
    assert len([one for one in caught if "single steps" in str(one.message)]) == 1
    assert "single steps" in draft.last_speculation.stopped_drafting
    if not from_length:
        assert torch.equal(found, plain)
        assert {found.num_nodes for found in draft.last_speculation.trees} == {0}


def test_no_tree_spans_a_length_that_was_not_seen(untried, monkeypatch):
    """A target whose attention changes beyond 20 keys for several tokens at once never emits a token of such a tree."""
    target = tiny_target("llama", 3)
    target.config.some_window = 20
    input_ids, _ = prompts(1)
    plain = target.generate(input_ids, **LENGTH)
    forward = target.forward

    @functools.wraps(forward)
    def broken(*args, **kwargs):
        output = forward(*args, **kwargs)
        if output.logits.shape[1] > 1 and int(kwargs["position_ids"].max()) >= 20:
            output.logits[:] = output.logits.roll(1, dims=-1)
        return output

    monkeypatch.setattr(target, "forward", broken)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    with pytest.warns(UserWarning, match="single steps"):
        assert torch.equal(target.generate(input_ids, assistant_model=draft, **LENGTH), plain)
    assert draft.last_speculation.acceptance_length > 1


def test_a_batch_is_checked_with_the_masks_of_plain_decoding(untried, monkeypatch):
    """A target that reads a padding mask of its own, and a ready mask as it is, is noticed."""
    target = tiny_target("llama", 3)
    input_ids, mask = prompts(3)
    forward = target.forward

    @functools.wraps(forward)
    def own(*args, **kwargs):
        mask = kwargs["attention_mask"]
        if mask is not None and mask.dim() == 2:
            kwargs["attention_mask"] = torch.ones_like(mask)
        return forward(*args, **kwargs)

    monkeypatch.setattr(target, "forward", own)
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    with pytest.warns(UserWarning, match="single steps"):
        target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
    assert draft.last_speculation.stopped_drafting


def test_what_was_tried_is_not_checked(monkeypatch):
    """By the type, in transformers' own code only."""
    target = tiny_target("llama", 3)
    assert is_tried(target)

    class Remote(type(target)):
        pass

    target.__class__ = Remote
    assert not is_tried(target)


def test_lengths_that_a_configuration_names():
    """Nested ones, too; sizes of other things do not count."""
    config = LlamaConfig(
        max_position_embeddings=128,
        sliding_window=6,
        index_topk=17,
        hidden_size=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 48},
    )
    assert lengths_named(config) == [6, 17, 48, 128]


def test_plain_steps_of_a_window_that_only_the_cache_knows(untried):
    """Moshi masks as if it saw the whole text and leaves the window to its cache: single steps of a check, and what goes on
    after it, run on such windows."""
    target = build("moshi")
    input_ids = torch.arange(3, 8)[None]
    length = {**LENGTH, "max_new_tokens": 20}
    plain = target.generate(input_ids, **length)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **length), plain)
    assert draft.last_speculation.stopped_drafting is None
    assert draft.last_speculation.acceptance_length > 1.3


def test_a_draft_that_reads_more_states_than_there_are_is_declined(monkeypatch):
    """As of models that run some layers several times and return the states of the others alone."""
    target = tiny_target("llama", 3)
    input_ids, _ = prompts(1)
    plain = target.generate(input_ids, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    forward = target.forward

    @functools.wraps(forward)
    def with_two_states(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if outputs.hidden_states is not None:
            outputs.hidden_states = outputs.hidden_states[:2]
        return outputs

    monkeypatch.setattr(target, "forward", with_two_states)
    with pytest.warns(UserWarning, match="returns only the first 2"):
        found = target.generate(input_ids, assistant_model=draft, **LENGTH)
    assert torch.equal(found, plain)
