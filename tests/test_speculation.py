"""Statistics."""

import json
import math
import re
import warnings

import pytest
import torch
from tiny_models import tiny_draft, tiny_target

from transformers_prism.decoding.memory import warn_once
from transformers_prism.decoding.speculation import RoundTree, Speculation, why_hardly_used

pytestmark = pytest.mark.quick


def test_acceptance_is_pooled_over_rows():
    """tau counts the bonus; the conditional rates are those of rounds that got so far."""
    speculation = Speculation.empty(2)
    for row, emitted in ((0, 4), (0, 1), (1, 2), (1, 1)):
        speculation.add_round(row, emitted)
    assert speculation.num_rounds == [2, 2]
    assert speculation.num_committed == [5, 3]
    assert speculation.accepted_per_round == [[3, 0], [1, 0]]
    assert speculation.acceptance_length == 2.0
    assert speculation.conditional_acceptance == [0.5, 0.5, 1.0, 0.0]


def test_nothing_done_is_not_a_number():
    """No round, no acceptance length."""
    speculation = Speculation.empty(1)
    assert math.isnan(speculation.acceptance_length)
    assert speculation.conditional_acceptance == []


def test_time_is_counted_also_where_a_phase_fails():
    """And lands in its phase."""
    speculation = Speculation.empty(1)
    with pytest.raises(KeyError), speculation.timed("draft"):
        raise KeyError
    assert speculation.seconds["draft"] > 0
    assert speculation.seconds["verify"] == 0


ESTIMATES = {"num_tokens": [1, 2, 4, 8], "verify_seconds": [0.01, 0.012, 0.02, 0.04], "step_seconds": 0.002, "advantage": 0.6}


def made(accepted: list[int], nodes: list[int], **fields) -> Speculation:
    """Statistics of one sequence: drafted tokens that each round accepted, and nodes of its tree."""
    speculation = Speculation.empty(1)
    for count in accepted:
        speculation.add_round(0, count + 1)
    speculation.trees = [RoundTree(int(count > 0), count) for count in nodes]
    for name, value in fields.items():
        setattr(speculation, name, value)
    return speculation


def test_summary_tells_tokens_rounds_tau_seconds_and_plain_steps():
    """In a few lines; the repr in one; to_dict() as JSON that holds all of it."""
    speculation = made([2, 0, 0, 1], [5, 0, 0, 5], estimates=ESTIMATES)
    speculation.seconds.update(draft=0.5, verify=1.5)
    lines = speculation.summary().split("\n")
    assert lines[0] == "8 tokens in 4 rounds, acceptance length 1.75, 3.5 tokens/s without the prompt"
    assert lines[1] == "seconds: draft 0.50, check 0.00, verify 1.50, commit 0.00, other 0.00"
    assert lines[2] == (
        "plain steps: 2 (drafting does not pay here: a plain step takes 10.0 ms, a forward over 8 tokens 40.0 ms, a draft "
        "step 2.0 ms, and a drafted round gives 2.50 tokens)"
    )
    assert repr(speculation) == "Speculation(8 tokens, 4 rounds, tau 1.75, 3.5 tokens/s)"
    content = json.loads(json.dumps(speculation.to_dict()))
    assert content["acceptance_length"] == 1.75
    assert content["trees"][0] == {"num_steps": 1, "num_nodes": 5, "num_copied": 0, "expected_tokens": None}
    assert content.keys() >= set(vars(speculation))


def test_summary_where_nothing_was_drafted():
    """Plain decoding says why and has no rate; nothing at all has no tau, which JSON holds as null."""
    declined = made([0] * 9, [], declined="no cache")
    assert declined.summary() == "10 tokens in 9 rounds, acceptance length 1.00\nplain steps: 9 (no cache)"
    assert repr(declined) == "Speculation(10 tokens, 9 rounds, tau 1.00, plain decoding)"
    assert Speculation.empty(1).to_dict()["acceptance_length"] is None


HARDLY = {
    "costs": ({"nodes": [0] * 63, "estimates": ESTIMATES}, {}, r"does not pay here: a plain step takes.*prepare_for_cpu"),
    "costs on cuda": ({"nodes": [0] * 63, "estimates": ESTIMATES}, {"device": "cuda"}, "A smaller draft"),
    "another target": ({"nodes": [5] * 63}, {"differences": ["name: expected 'a', got 'b'"]}, "not the one.*expected 'a'"),
    "temperature": ({"nodes": [5] * 63}, {"temperature": 1.5}, "at temperature 1.5 the text is hard to foresee"),
    "kind of text": ({"nodes": [5] * 63, "estimates": ESTIMATES}, {"temperature": 0.7}, "this kind of text"),
}


@pytest.mark.parametrize("case", HARDLY)
def test_a_long_answer_with_next_to_nothing_drafted_has_a_reason(case):
    """And what to do about it."""
    fields, call, expected = HARDLY[case]
    call = {"differences": [], "temperature": None, "device": "cpu", **call}
    assert re.search(expected, why_hardly_used(made([0] * 63, **fields), **call))


def test_other_answers_need_no_reason():
    """Short ones, those that accepted some tokens, and those whose reason was told."""
    call = {"differences": [], "temperature": None, "device": "cpu"}
    for speculation in (
        made([0] * 20, [5] * 20),
        made([1] * 10 + [0] * 50, [5] * 60),
        made([0] * 63, [], declined="no cache"),
        made([0] * 63, [0] * 63, stopped_drafting="differs"),
    ):
        assert why_hardly_used(speculation, **call) is None


def test_generate_warns_once_of_a_draft_that_hardly_helps():
    """An untrained draft, in one call of 60 tokens; not in a short one."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target)
    settings = {"do_sample": False, "assistant_model": draft}
    with pytest.warns(UserWarning, match="the draft hardly helped: 60 tokens in .* rounds. Its tokens were not acc") as told:
        target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=60, **settings)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, **settings)


def test_a_warning_that_differs_in_numbers_alone_comes_once():
    """For each object that it is about; other warnings, and the same one, come as Python's filters say."""

    class Owner:
        pass

    first, second = Owner(), Owner()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for message in ("3 of 4 tokens by 1.5e-3", "5 of 9 tokens by 2e+4", "another: 3", "3 of 4 tokens by 1.5e-3"):
            warn_once(first, message, stacklevel=1)
        warn_once(second, "5 of 9 tokens by 2e+4", stacklevel=1)
    told = [str(one.message) for one in caught]
    assert told == ["3 of 4 tokens by 1.5e-3", "another: 3", "3 of 4 tokens by 1.5e-3", "5 of 9 tokens by 2e+4"]
    assert {one.filename for one in caught} == {__file__}
