"""Acceptance by length and window: rounds that are run on a known text are those of generate(), and a run resumes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import chat_tokenizer, prompts, tiny_draft, tiny_target, word_tokenizer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import long_texts
from benchmarks.known_texts import rounds_of
from benchmarks.page import write_page
from transformers_prism.bench.acceptance import tree_settings

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


def tiny_pair(**settings):
    """A target, and a draft for it that proposes what it says now and then."""
    target = tiny_target("llama", seed=3)
    return target, tiny_draft(target, **settings).bind(target)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("tree", ["12/4/3", "60/3/30", "3/3/1"])
def test_rounds_of_a_known_text_are_those_of_generate(tree, window):
    """Of trees that are often right, since they hold most tokens, and of a chain."""
    target, draft = tiny_pair(sliding_window=window)
    input_ids, _ = prompts(1, length=11)
    text = long_texts.read_text(target, draft, input_ids, 24)
    draft.generation_config.update(**tree_settings(tree))
    output = target.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), assistant_model=draft, max_new_tokens=24, do_sample=False
    )
    assert torch.equal(text.token_ids, output)
    assert len(text.probabilities) == output.shape[1] - 11 == text.states_of(draft.config.target_layer_ids).shape[1] - 10
    assert rounds_of(draft, [text], tree) == draft.last_speculation.accepted_per_round


def test_first_choices_are_counted_by_position():
    """Each position has the choice of step 0 after the tokens before it, by hand; later steps have as many positions less."""
    target, draft = tiny_pair()
    input_ids, _ = prompts(1, length=150)
    input_ids[input_ids == 0] = 5
    text = long_texts.read_text(target, draft, input_ids, 2)
    found = long_texts.first_choices(draft, text, long_texts.target_choices(target, text), 2)
    assert [[num for _, num in step] for step in found] == [[127, 22, *[0] * 5], [126, 22, *[0] * 5]]
    hits = [0, 0]
    with torch.no_grad():
        logits = target(input_ids).logits.argmax(-1)
        chosen, _ = draft.propose(draft(input_ids[:, 1:], text.states_of(draft.config.target_layer_ids)[:, :149]).last_hidden_state, 1)
    for position in range(1, 150):
        hits[position >= 128] += int(chosen[0, position - 1, 0] == logits[0, position])
    assert [hit for hit, _ in found[0]][:2] == hits


def test_documents_share_nothing_and_are_cut_from_the_front():
    """Prompts of the two tasks, in order; the question is at the end of each length."""
    tokenizer = word_tokenizer()
    records = [
        {"category": task, "turns": [" ".join(f"w{40 + 10 * number + word}" for word in range(6))]}
        for number, task in enumerate(["summarization", "qa", "rag", "rag", "summarization"])
    ]
    first, second = long_texts.documents(records, tokenizer, 2, 10)
    assert first == [*range(40, 46), *range(60, 66)]
    assert second == [*range(70, 76), *range(80, 86)]
    with pytest.raises(ValueError, match=r"num_documents: expected at most 2, the texts of 10 tokens .* got 3"):
        long_texts.documents(records, tokenizer, 3, 10)
    short = long_texts.question_about(tokenizer, first, 8)
    whole = long_texts.question_about(tokenizer, first, 16)
    assert (short.shape, whole.shape) == ((1, 8), (1, 16))
    assert torch.equal(whole[:, -8:], short)
    with pytest.raises(ValueError, match="lengths: expected room for a text beside the question, got 2 tokens"):
        long_texts.question_about(chat_tokenizer(), first, 2)


def test_a_run_resumes_and_is_shown(tmp_path, monkeypatch):
    """Nothing is decoded twice; tables and pictures of what is there."""
    target, draft = tiny_pair()
    tokenizer = word_tokenizer()
    monkeypatch.setattr(long_texts, "load_target", lambda name: (target, tokenizer))
    monkeypatch.setattr(long_texts, "load_draft", lambda name, target: draft)
    records = [{"category": "rag", "turns": [" ".join(f"w{(7 * word + number) % 90 + 3}" for word in range(90))]} for number in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["measure", str(tmp_path / "prompts.jsonl"), str(tmp_path / "out.json"), "--max-new-tokens", "6"]
    arguments += ["--length", "64", "--length", "80", "--window", "20", "--window", "200", "--tree", "4/2/2", "--num-steps", "2"]
    calls, read_text = [], long_texts.read_text
    monkeypatch.setattr(long_texts, "read_text", lambda *args: calls.append(args[2].shape[1]) or read_text(*args))
    for num_documents, expected in (("2", [64, 80] * 2), ("3", [64, 80]), ("3", [])):
        result = CliRunner().invoke(long_texts.app, [*arguments, "--num-documents", num_documents])
        assert result.exit_code == 0, result.output
        assert calls == expected
        calls.clear()
    assert draft.config.sliding_window is None
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["document"], row["length"]) for row in found["rows"]] == [(d, n) for d in range(3) for n in (64, 80)]
    by_window = found["rows"][0]["rounds"]["4/2/2"]
    assert by_window["none"] == by_window["200"]
    assert [one["document"] for one in found["positions"]] == [0, 1, 2]
    taus = long_texts.taus(found, "4/2/2")
    assert list(taus) == ["none", "20", "200"]
    assert list(taus["none"]) == [64, 80]
    show = ["show", str(tmp_path / "out.json")]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        show += ["--plots", str(tmp_path / "plots")]
        page, *pictures = write_page([tmp_path / "out.json"], tmp_path / "page.md")
        assert "| tau, tree 4/2/2 | 64 | 80 |" in page.read_text()
        assert [picture.name for picture in pictures] == ["out_0.png", "out_1.png"]
    result = CliRunner().invoke(long_texts.app, show)
    assert result.exit_code == 0, result.output
    assert "| tau, tree 4/2/2 | 64 | 80 |" in result.output
    assert "first choices of draft step 1, up to position" in result.output
