"""The check that users run: it passes for a sound loop, and fails for broken ones."""

import json

import pytest
import torch
from tiny_models import prompts, tiny_draft, varied_target
from typer.testing import CliRunner

from transformers_prism import generation
from transformers_prism.benchmark.verify import Check, as_json, careless_walk, check_table, verify
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
        type(draft.make_drafter()), "grow", lambda self, settings: (torch.rand(1), grow(self, settings))[1]
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
