"""The check that users run: it passes for a sound loop, and fails for broken ones."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny_models import prompts, tiny_draft, varied_target
from typer.testing import CliRunner

from transformers_prism.bench import verify as verify_module
from transformers_prism.bench.verify import (
    CONTROL,
    PATHS,
    Check,
    as_json,
    careless_walk,
    careless_walk_on_device,
    check_table,
    path_in_words,
    verify,
)
from transformers_prism.cli.main import app
from transformers_prism.decoding import target_choice, tree_target
from transformers_prism.decoding import walk as walk_module
from transformers_prism.decoding.round_check import RoundCheck
from transformers_prism.hub.card import verify_rows
from transformers_prism.policy import automatic
from transformers_prism.policy.costs import RoundCosts

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


@pytest.fixture(scope="module")
def checks(pair):
    """All checks of a sound loop; every round drafts, whatever it costs here."""
    target, draft, inputs = pair
    draft = tiny_draft(target, draft_vocab_size=60).bind(target)
    with pytest.MonkeyPatch.context() as patch:
        costs = RoundCosts([1, 64], [1.0, 2.0], 0.02)
        patch.setattr(automatic, "known_costs", lambda target, draft, num_rows: costs)
        for name in ("observe_verify", "observe_step"):
            patch.setattr(RoundCosts, name, lambda self, *observed: None)
        return verify(target, draft, inputs, max_new_tokens=20)


def test_a_sound_loop_passes_on_every_path(checks):
    """Every kind of run is there, and the report can be written and printed."""
    names = [check.name for check in checks if check.name != CONTROL]
    assert list(dict.fromkeys(names)) == [path.name for path in PATHS]
    assert names[:6] == ["greedy", "greedy", "sampled", "sampled", "automatic trees", "automatic trees"]
    assert all(check.is_identical and check.has_same_generator for check in checks if check.name != CONTROL)
    report = json.loads(json.dumps(as_json(checks)))
    assert report["holds"]
    assert report["num_near_ties"] == 0
    assert check_table(checks).row_count == len(names) + 1
    assert walk_module.walk_on_host is not careless_walk


def test_the_control_is_caught_on_every_path(checks):
    """Where one is not, the command fails."""
    controls = [check for check in checks if check.name == CONTROL]
    assert [check.control_of for check in controls] == [path.name for path in PATHS]
    assert all(check.is_caught for check in controls)
    for broken in controls:
        others = [check for check in checks if check is not broken]
        assert not as_json([*others, dataclasses.replace(broken, is_identical=True)])["holds"]
    assert not as_json([check for check in checks if check not in controls])["holds"]


def test_the_report_says_which_path_each_run_took(checks):
    """All that generate() can take: as the names promise, and every combination that matters."""
    taken = {check.name: check.path for check in checks if check.name != CONTROL}
    assert all(path["declined"] is None for path in taken.values())
    assert all(path["drafted"] > 0 for path in taken.values())
    for name, path in taken.items():
        is_penalized, is_sampled = "processors" in name, PATHS[list(taken).index(name)].settings["do_sample"]
        assert path["target"] == ("chain" if "target's cache" in name else "tree"), name
        assert path["walk"] == ("device" if "device" in name else "host"), name
        assert path["coupled"] == (is_sampled and not is_penalized and "not coupled" not in name), name
        assert path["tree"] == PATHS[list(taken).index(name)].tree["tree"]
    assert {path["tree"] for path in taken.values()} == {"static", "chain", "auto"}
    assert path_in_words(taken["sampled"]) == "tree, host's walk, coupled"
    assert path_in_words(taken["chain on the target's cache"]) == "chain, host's walk"
    assert path_in_words({**taken["greedy"], "copied": 3}) == "tree, host's walk, copies"
    assert path_in_words({**taken["greedy"], "declined": "no cache"}) == "plain decoding: no cache"


def test_reports_of_earlier_drafts_can_still_be_read():
    """They tell of no path and have one control."""
    old = {"prompt": 0, "num_tokens": 9, "is_identical": True, "is_near_tie": False, "position": None}
    record = {"checks": [{**old, "name": "greedy"}, {**old, "name": CONTROL, "is_identical": False, "position": 3}]}
    greedy, control = verify_rows(record)
    assert (greedy["path"], greedy["runs"]) == ("", 1)
    assert (control["position"], control["identical"], control["runs"]) == (3, 0, 1)


FEW_PATHS = [path for path in PATHS if path.name in ("greedy", "sampled, device", "batched sampled")]


def test_a_broken_loop_fails(pair, monkeypatch):
    """With the control's own fault in every run."""
    monkeypatch.setattr(verify_module, "PATHS", FEW_PATHS)
    monkeypatch.setattr(walk_module, "walk_on_host", careless_walk)
    monkeypatch.setattr(walk_module, "walk_on_device", careless_walk_on_device)
    target, draft, inputs = pair
    checks = verify(target, draft, inputs, max_new_tokens=20)
    assert not as_json(checks)["holds"]
    assert all(not check.is_identical for check in checks)


@pytest.mark.parametrize("path", [path for path in PATHS if path.over in ("prompt", "chat")][::3], ids=lambda path: path.name)
def test_a_fault_of_one_path_is_found(path, pair, monkeypatch):
    """The walk of that path alone is broken."""
    monkeypatch.setattr(verify_module, "PATHS", [path])
    name = "walk_on_device" if path.walks_on_device else "walk_on_host"
    monkeypatch.setattr(walk_module, name, {"walk_on_host": careless_walk, "walk_on_device": careless_walk_on_device}[name])
    target, draft, inputs = pair
    (check, _) = verify(target, draft, inputs, max_new_tokens=20)
    assert not check.holds or check.path["drafted"] == 0


def test_a_lost_draw_fails(pair, monkeypatch):
    """Text that happens to agree does not excuse a generator left in another state."""
    monkeypatch.setattr(verify_module, "PATHS", FEW_PATHS)
    target, draft, inputs = pair
    grow = type(draft.make_drafter()).grow
    monkeypatch.setattr(
        type(draft.make_drafter()), "grow", lambda self, settings, coupling: (torch.rand(1), grow(self, settings, coupling))[1]
    )
    checks = verify(target, draft, inputs, max_new_tokens=20)
    assert not as_json(checks)["holds"]


def test_a_target_that_no_path_fits_does_not_pass(pair, monkeypatch):
    """Plain decoding on every path proves nothing, and what generate() itself refuses is said."""
    monkeypatch.setattr(verify_module, "PATHS", [path for path in PATHS if path.name in ("greedy", "static cache")])
    monkeypatch.setattr(target_choice, "why_no_tree", lambda *args: "no tree")
    monkeypatch.setattr(target_choice, "why_no_chain", lambda *args: "no chain")
    target, draft, inputs = pair
    generate = type(target).generate

    def refuse(self, *args, **kwargs):
        if "cache_implementation" in kwargs:
            raise ValueError("no static cache")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(target), "generate", refuse)
    with pytest.warns(UserWarning, match="decoding without the draft: no tree, and no chain"):
        checks = verify(target, draft, inputs, max_new_tokens=8)
    assert [check.name for check in checks] == ["greedy", "greedy", "static cache"]
    assert checks[0].path["declined"] == "no tree, and no chain"
    assert checks[-1].path["declined"] == "generate() without a draft refuses, too: no static cache"
    assert all(check.holds for check in checks)
    assert not as_json(checks)["holds"]
    assert check_table(checks).row_count == 4


def test_the_draft_is_left_as_it_was(pair, monkeypatch):
    """Its settings, and the layers of both; after an error, too."""
    target, draft, inputs = pair
    settings, kinds = draft.generation_config, [type(module) for module in target.modules()]
    experience = copy.deepcopy(automatic.experience_of(draft, do_sample=True))
    monkeypatch.setattr(verify_module, "PATHS", [path for path in PATHS if path.is_prepared])
    verify(target, draft, inputs, max_new_tokens=6)
    monkeypatch.setattr(walk_module, "walk_on_host", None)
    with pytest.raises(TypeError):
        verify(target, draft, inputs, max_new_tokens=6)
    assert draft.generation_config is settings
    assert vars(automatic.experience_of(draft, do_sample=True).drafted) == vars(experience.drafted)
    assert [type(module) for module in target.modules()] == kinds


def test_rounding_excuses_near_ties_alone():
    """They are counted and hold; an error, a lost draw, or a text that was not compared does not."""
    different = {
        "prompt": 0,
        "num_tokens": 9,
        "is_identical": False,
        "has_same_generator": True,
        "acceptance_length": 1.0,
    }
    tie = Check("greedy", **different, row=0, position=3, gap=1e-6, rounding=2e-6, num_near_ties=2, num_errors=0)
    assert tie.is_near_tie
    assert tie.holds
    assert as_json([tie])["num_near_ties"] == 2
    assert not dataclasses.replace(tie, has_same_generator=False).holds
    assert not dataclasses.replace(tie, num_errors=1).holds
    assert not Check("greedy", **different).holds
    control = Check("negative control", **{**different, "is_identical": True}, path={"drafted": 5})
    assert not control.holds
    control.path = {"drafted": 0}
    assert control.holds
    assert not control.is_caught


@pytest.fixture
def short_float_pair(pair, monkeypatch):
    """Both models in bfloat16, and two paths."""
    monkeypatch.setattr(verify_module, "PATHS", [path for path in PATHS if path.name in ("greedy", "sampled, not coupled")])
    target, draft, inputs = pair
    return copy.deepcopy(target).bfloat16(), tiny_draft(target).bfloat16(), inputs


def test_near_ties_of_short_floats_are_counted(short_float_pair):
    """The texts part, and every place is one where rounding decides."""
    checks = verify(*short_float_pair, max_new_tokens=20)
    report = as_json(checks)
    assert report["holds"]
    assert report["num_near_ties"] > 0
    assert any(check.is_near_tie and check.gap < 2 * check.rounding for check in checks)
    assert all(check.is_caught for check in checks if check.name == CONTROL)


@pytest.mark.parametrize("fault", ["mask", "positions"])
def test_a_wrong_forward_is_no_rounding(short_float_pair, monkeypatch, fault):
    """Trees whose nodes see other branches, or stand elsewhere, fail in bfloat16, too: their own logits are no measure."""
    real_mask, real_forward = tree_target.ancestor_mask, tree_target.TreeTarget._forward
    monkeypatch.setattr(RoundCheck, "differs", lambda self, *args: False)
    if fault == "mask":
        monkeypatch.setattr(tree_target, "ancestor_mask", lambda parents: torch.ones_like(real_mask(parents)))
    else:
        monkeypatch.setattr(
            tree_target.TreeTarget, "_forward", lambda self, tree, masks, ids: real_forward(self, tree, masks, ids + 3)
        )
    checks = verify(*short_float_pair, max_new_tokens=20)
    assert not as_json(checks)["holds"]
    assert any(check.num_errors and check.gap >= 2 * check.rounding for check in checks if check.name != CONTROL)


def test_an_answer_of_one_token_has_no_tau(pair, monkeypatch, tmp_path):
    """There is no round; a report with NaN in it was refused as a measurement."""
    target, draft, inputs = pair
    monkeypatch.setattr(verify_module, "PATHS", FEW_PATHS)
    checks = verify_module.verify(target, draft, inputs, max_new_tokens=1)
    compared = [check for check in checks if check.name != CONTROL]
    assert {check.acceptance_length for check in compared} == {None}
    json.dumps(verify_module.as_json(checks), allow_nan=False)
    verify_module.check_table(checks)


def test_the_command_exits_with_its_verdict(pair, tmp_path, monkeypatch):
    """0 and a report, or 1."""
    target, draft, inputs = pair
    monkeypatch.setattr(verify_module, "PATHS", FEW_PATHS)
    monkeypatch.setattr("transformers_prism.cli.demo.load_pair", lambda *names, **places: (target, None, draft))
    monkeypatch.setattr("transformers_prism.cli.demo.chat_inputs", lambda tokenizer, question, device: inputs[0])
    arguments = ["verify", "--max-new-tokens", "12", "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["holds"]
    monkeypatch.setattr(walk_module, "walk_on_host", careless_walk)
    assert CliRunner().invoke(app, arguments).exit_code == 1
