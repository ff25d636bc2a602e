"""The check that users run: it passes for a sound loop, and fails for broken ones."""

import copy
import json

import pytest
import torch
from tiny_models import prompts, tiny_draft, varied_target
from typer.testing import CliRunner

from transformers_prism import generation
from transformers_prism.benchmark.verify import (
    Check,
    _explain,
    _noise,
    as_json,
    careless_walk,
    check_table,
    left_padded,
    verify,
)
from transformers_prism.cli import app

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def pair():
    """A target, a draft, and two prompts of different lengths."""
    input_ids, _ = prompts(1, length=12)
    target = varied_target("llama", input_ids, max_new_tokens=24, pad_token_id=0)
    inputs = [{"input_ids": input_ids}, {"input_ids": input_ids[:, 4:]}]
    for one in inputs:
        one["attention_mask"] = torch.ones_like(one["input_ids"])
    return target, tiny_draft(target), inputs


def test_a_sound_loop_passes_and_its_control_is_caught(pair):
    """Every kind of run is there, and the report can be written and printed."""
    target, draft, inputs = pair
    checks = verify(target, draft, inputs, max_new_tokens=20)
    assert [check.name for check in checks] == [
        *["greedy", "sampled"] * 2,
        *["batched greedy", "batched sampled", "automatic trees", "automatic trees", "negative control"],
    ]
    assert all(check.is_identical and check.has_same_generator for check in checks[:-1])
    assert not checks[-1].is_identical
    report = json.loads(json.dumps(as_json(checks)))
    assert report["holds"]
    assert report["num_near_ties"] == 0
    assert check_table(checks).row_count == 9
    assert generation.walk is not careless_walk


def test_a_broken_loop_fails(pair, monkeypatch):
    """With the control's own fault in every run."""
    monkeypatch.setattr(generation, "walk", careless_walk)
    target, draft, inputs = pair
    checks = verify(target, draft, inputs, max_new_tokens=20)
    assert not as_json(checks)["holds"]
    assert all(not check.is_identical for check in checks)


def test_a_lost_draw_fails(pair, monkeypatch):
    """Text that happens to agree does not excuse a generator left in another state."""
    target, draft, inputs = pair
    grow = type(draft.make_drafter()).grow
    monkeypatch.setattr(
        type(draft.make_drafter()), "grow", lambda self, settings, coupling: (torch.rand(1), grow(self, settings, coupling))[1]
    )
    checks = verify(target, draft, inputs, max_new_tokens=20)
    assert not as_json(checks)["holds"]


def test_rounding_excuses_only_a_gap_that_small():
    """A near-tie is reported and holds; a clear difference, or one in length, does not."""
    different = {
        "prompt": 0,
        "num_tokens": 9,
        "is_identical": False,
        "has_same_generator": True,
        "acceptance_length": 1.0,
    }
    tie = Check("greedy", **different, row=0, position=3, gap=1e-5, rounding=2e-6)
    assert tie.is_near_tie
    assert tie.holds
    assert not Check("greedy", **different, row=0, position=3, gap=1e-3, rounding=2e-6).holds
    assert not Check("greedy", **different).holds
    assert not Check("negative control", **{**different, "is_identical": True}).holds


def test_a_near_tie_in_one_row_does_not_excuse_another_row(pair):
    """Rows are looked at until one is not excused; in sampled runs what ties is the draw, not the scores."""
    target, _, inputs = pair
    batch = left_padded([inputs[0], inputs[0]], 0)
    settings = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, "max_new_tokens": 8}
    plain = target.generate(**batch, **settings, do_sample=False, pad_token_id=0)
    other = copy.deepcopy(plain)
    other.sequences[:, -1] += 1
    # Without a processor they are the logits themselves.
    plain.scores = tuple(scores.clone() for scores in plain.scores)
    found = {"prompt": None, "num_tokens": 16, "is_identical": False, "has_same_generator": True, "acceptance_length": 1.0}
    plain.scores[-1][0, :2] = plain.scores[-1][0].max() + 1
    check = Check("batched greedy", **found)
    _explain(check, target, batch, plain, other, None)
    assert (check.row, check.position, check.is_near_tie, check.holds) == (1, 7, False, False)
    plain.scores[-1][1, :2] = plain.scores[-1][1].max() + 1
    check = Check("batched greedy", **found)
    plain.logits[-1].add_(1e-5)
    _explain(check, target, batch, plain, other, None)
    assert (check.is_near_tie, check.gap) == (True, 0.0)
    check = Check("batched sampled", **found)
    _explain(check, target, batch, plain, other, 0)
    assert check.gap > 1e-3
    assert not check.is_near_tie


def test_the_noise_is_what_sampling_draws(pair):
    """The best of the scores with it is the token that plain decoding samples, at every step and in every row."""
    target, _, inputs = pair
    batch = left_padded(inputs, 0)
    torch.manual_seed(3)
    settings = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "pad_token_id": 0}
    plain = target.generate(**batch, **settings, do_sample=True, temperature=2.0)
    for step, scores in enumerate(plain.scores):
        best = (scores.log_softmax(dim=-1) - _noise(scores, step, seed=3).log()).argmax(dim=-1)
        assert torch.equal(best, plain.sequences[:, batch["input_ids"].shape[1] + step])


def test_the_command_exits_with_its_verdict(pair, tmp_path, monkeypatch):
    """0 and a report, or 1."""
    target, draft, inputs = pair
    monkeypatch.setattr("transformers_prism.demo.load_pair", lambda *names: (target, None, draft))
    monkeypatch.setattr("transformers_prism.demo.chat_inputs", lambda tokenizer, question, device: inputs[0])
    arguments = ["verify", "--max-new-tokens", "12", "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["holds"]
    monkeypatch.setattr(generation, "walk", careless_walk)
    assert CliRunner().invoke(app, arguments).exit_code == 1
