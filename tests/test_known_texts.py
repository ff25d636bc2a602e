"""Drafts led along known texts accept what they accept while decoding; a file of texts is used for what it was made of."""

import pytest
import torch
from fitted_pairs import chain_of, fitted_draft, fitted_target, text_of

from benchmarks.known_texts import follow_texts, keep_texts, write_texts
from transformers_prism.bench.acceptance import acceptance_figures, decode_prompts

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_NEW_TOKENS = 24


@pytest.fixture(scope="module")
def pair():
    """A target and a draft that foresees some of what it writes."""
    chain = chain_of(0)
    target = fitted_target("llama", chain)
    return target, fitted_draft(target, chain, num_processing_modules=2)


@pytest.fixture(scope="module")
def questions():
    """Prompts of several lengths."""
    text = text_of(chain_of(0), 6, 20, torch.Generator().manual_seed(1))
    lengths = (7, 20, 12, 3, 12, 16)
    return [("qa", {"input_ids": row[None, :length]}) for row, length in zip(text, lengths, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("tree", ["15/4/4", "30/6/6", "4/4/1"])
def test_following_a_text_accepts_what_decoding_does(pair, questions, tree, temperature):
    """One text at a time and side by side each answer's rounds are those of decoding, to the end."""
    target, draft = pair
    decoded = decode_prompts(target, draft, questions, tree, temperature, MAX_NEW_TOKENS, seed=3, is_coupled=False)
    texts = write_texts(target, questions, temperature, MAX_NEW_TOKENS, 3, draft.config.target_layer_ids)
    assert acceptance_figures(decoded)["tau"] > 1.3
    assert follow_texts(target, draft, texts, tree, batch_size=1) == decoded
    for batch_size in (4, 6):
        assert follow_texts(target, draft, texts, tree, batch_size) == decoded


@pytest.mark.parametrize(
    "form",
    [
        {"context_kv": "own_module", "num_processing_modules": 3},
        {"sliding_window": 6},
        {"num_layers_per_module": 2, "num_processing_modules": 1},
        {"module_form": "eagle3", "share_target_head": False, "num_processing_modules": 1},
        {"draft_vocab_size": 40},
    ],
    ids=lambda form: next(iter(form)),
)
def test_following_a_text_with_every_form_of_draft(pair, questions, form):
    """Side by side, too; tokens of the text join a draft vocabulary for their own text alone."""
    target, _ = pair
    draft = fitted_draft(target, chain_of(0), num_updates=30, **form)
    texts = write_texts(target, questions, 0.0, MAX_NEW_TOKENS, 0, draft.config.target_layer_ids)
    for text_tokens in (True, False):
        draft.generation_config.tree_text_tokens = text_tokens
        decoded = decode_prompts(target, draft, questions, "15/4/4", 0.0, MAX_NEW_TOKENS, seed=0, is_coupled=False)
        assert follow_texts(target, draft, texts, "15/4/4", batch_size=6) == decoded


def test_following_a_text_that_ends_early(pair, questions):
    """An answer of one token has no round, and those beside it lose nothing."""
    target, draft = pair
    texts = write_texts(target, questions, 0.0, MAX_NEW_TOKENS, 0, draft.config.target_layer_ids)
    whole = follow_texts(target, draft, texts, "15/4/4")
    texts[0].answer = texts[0].answer[:1]
    texts[1].answer = texts[1].answer[:9]
    found = follow_texts(target, draft, texts, "15/4/4")
    assert found[0] == {"task": "qa", "num_rounds": 0, "num_committed": 0, "num_rounds_by_accepted": [], "ends_in_a_loop": False}
    assert found[1]["num_committed"] == 8
    assert found[2:] == whole[2:]


def test_texts_are_kept_for_what_they_were_made_of(pair, questions, tmp_path):
    target, _ = pair
    calls = []

    def write():
        calls.append(1)
        return write_texts(target, questions[:2], 0.0, 4, 0, [1, 2])

    path = tmp_path / "runs" / "texts.pt"
    first, again = (keep_texts(path, {"seed": 0}, write) for _ in range(2))
    assert len(calls) == 1
    for one, other in zip(first, again, strict=True):
        assert (one.task, one.answer, one.max_new_tokens) == (other.task, other.answer, other.max_new_tokens)
        assert torch.equal(one.prompt, other.prompt)
        assert all(torch.equal(one.states[layer], other.states[layer]) for layer in (1, 2))
    keep_texts(path, {"seed": 1}, write)
    assert len(calls) == 2
