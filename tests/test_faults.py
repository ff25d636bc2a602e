"""A part of the faults, and that they see what is not put back."""

import fault_lines
import faults
import pytest
import torch
from fault_lines import SCENARIOS, Call, Tracer, check_lines, lines_of

from transformers_prism.decoding.cache import CacheSnapshot
from transformers_prism.decoding.chain_target import ChainTarget

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
BY_NAME = {one.name: one for one in SCENARIOS}
TRIED = ("chat", "static chat", "chain")


@pytest.fixture(scope="module")
def pairs():
    """Pairs of the scenarios tried here, by architecture."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = fault_lines.pairs_for([BY_NAME[name] for name in TRIED], num_updates=40)
    torch.set_num_threads(num_threads)
    return pairs


@pytest.mark.parametrize("name", TRIED)
def test_state_is_as_before_wherever_a_call_fails(name, pairs):
    """A sample of lines; the next call is right, too."""
    scenario = BY_NAME[name]
    found = check_lines(scenario, pairs[scenario.architecture], every=53)
    assert found["failed"] == {}
    assert found["raised"] >= 15


def test_lines_of_a_call_are_those_of_the_package_and_of_models_below_it(pairs):
    call = Call(BY_NAME["chat"], pairs["mistral"])
    files = {place[0].rsplit("/", 1)[-1] for place in lines_of(call)}
    assert {"generation.py", "target_side.py", "draft_side.py", "modeling_mistral.py", "cache_utils.py"} <= files
    assert "test_faults.py" not in files


@pytest.mark.parametrize(("name", "owner", "method"), [("chat", CacheSnapshot, "restore"), ("chain", ChainTarget, "abandon")])
def test_what_is_not_put_back_is_seen(name, owner, method, pairs, monkeypatch):
    monkeypatch.setattr(owner, method, lambda self: None)
    scenario = BY_NAME[name]
    found = check_lines(scenario, pairs[scenario.architecture], every=50)
    assert any("cache" in text for text in found["failed"])


def test_an_error_that_is_swallowed_must_leave_the_output_right(pairs, monkeypatch):
    """A call that goes well although a line raised is compared with plain decoding."""
    call = Call(BY_NAME["chat"], pairs["mistral"])
    place = next(place for place in lines_of(call) if place[0].endswith("draft_side.py"))
    monkeypatch.setattr(call, "run", lambda draft: _run_to_the_end(call, place))
    assert fault_lines.raise_at(call, place, RuntimeError)[0] == ["was swallowed, and the output is wrong"]


def _run_to_the_end(call, place):
    try:
        return Call.run(call, call.pair.draft)
    except RuntimeError:
        return torch.zeros_like(call.expected)


def test_lines_in_finally_are_told_apart(pairs):
    lines = fault_lines.cleanup_lines(fault_lines.PACKAGE + "/decoding/eval_mode.py")
    source = (faults.Path(fault_lines.PACKAGE) / "decoding" / "eval_mode.py").read_text().splitlines()
    assert any("module.training = True" in source[line - 1] for line in lines)
    assert not any("module.training = False" in source[line - 1] for line in lines)
    assert not Tracer().was_cleanup


@pytest.mark.parametrize("name", faults.OTHERS)
def test_other_faults(name, pairs):
    """Threads, forks, copies, full disks."""
    assert faults.OTHERS[name](pairs["mistral"]) == []
