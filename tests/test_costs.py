"""What rounds cost: measured, kept on disk, corrected by rounds."""

import errno
import itertools
import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from tiny_models import scripted_draft, tiny_draft, tiny_target

from transformers_prism.policy import costs as round_costs
from transformers_prism.policy.automatic import are_costs_known, known_costs
from transformers_prism.policy.costs import RoundCosts, load_or_measure, measure

pytestmark = pytest.mark.quick


@pytest.fixture
def pair():
    """A tiny target and a draft bound to it."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target)
    draft.bind(target)
    return target, draft


def test_round_costs_are_interpolated_and_go_on_beyond_the_last_point():
    """By straight lines."""
    costs = RoundCosts([1, 2, 4], [1.0, 2.0, 6.0], 0.1)
    assert [costs.verify(count) for count in (1, 2, 3, 4, 5)] == pytest.approx([1.0, 2.0, 4.0, 6.0, 8.0])


def test_round_costs_follow_what_rounds_measure():
    """The estimate nearby moves most, all others with it, and more tokens never become cheaper than fewer."""
    costs = RoundCosts([1, 2, 4, 8], [1.0, 1.0, 2.0, 4.0], 0.1)
    for _ in range(60):
        costs.observe_verify(4, 4.0)
    assert costs.verify(4) == pytest.approx(4.0, rel=0.05)
    assert costs.verify(1) > 1.1
    assert costs.verify_seconds == sorted(costs.verify_seconds)


def test_round_costs_one_interrupted_round_changes_little():
    """A round that took a hundred times as long counts like one that took twice as long."""
    costs = RoundCosts([1, 2], [1.0, 1.0], 0.1)
    costs.observe_verify(1, 100.0)
    assert costs.verify(1) < 1.1


def test_round_costs_measuring_leaves_models_and_generator_alone(pair):
    """And gives positive, rising costs for whole batches."""
    target, draft = pair
    weights = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    costs = measure(target, draft, num_rows=3)
    assert torch.equal(before, torch.get_rng_state())
    assert costs.num_tokens == [3 * count for count in round_costs.MEASURED_TOKENS[:-1]]
    assert 0 < costs.verify_seconds[0] <= costs.verify_seconds[-1]
    assert costs.verify_seconds == sorted(costs.verify_seconds)
    assert costs.step_seconds > 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in target.state_dict().items())


def test_round_costs_are_measured_once_and_read_again(pair, tmp_path, monkeypatch):
    """From the disk for the same models, anew for another batch, and anew if the file is broken."""
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(round_costs, "_time_target", lambda *arguments: 0.01 * arguments[3])
    calls = []
    monkeypatch.setattr(round_costs, "measure", lambda *pair_and_rows: calls.append(1) or measure(*pair_and_rows))
    first = load_or_measure(*pair, 1)
    assert load_or_measure(*pair, 1) == first
    assert len(calls) == 1
    load_or_measure(*pair, 2)
    assert len(calls) == 2
    for path in tmp_path.rglob("*.json"):
        path.write_text('{"num_tokens": [1, 2], "verify')
    load_or_measure(*pair, 1)
    assert len(calls) == 3
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 2
    assert all(set(json.loads(path.read_text())) == set(round_costs._KEPT) for path in files if path.stat().st_size > 60)


def test_round_costs_of_a_busy_machine_are_measured_again(pair, tmp_path, monkeypatch):
    """If a small tree costs another multiple of a plain step than was kept; a machine that is slower throughout is not."""
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path))
    busy = 3.0

    def seconds(target, draft, num_rows, num_tokens):
        return speed * (1.0 if num_tokens == 1 else busy)

    monkeypatch.setattr(round_costs, "_time_target", seconds)
    speed = 1.0
    assert load_or_measure(*pair, 1).verify(8) == pytest.approx(3.0)
    speed = 4.0
    assert load_or_measure(*pair, 1).verify(8) == pytest.approx(3.0)
    speed, busy = 1.0, 1.1
    assert load_or_measure(*pair, 1).verify(8) == pytest.approx(1.1)
    assert load_or_measure(*pair, 1).verify(1) == pytest.approx(1.0)


def test_round_costs_work_where_nothing_can_be_written(pair, tmp_path, monkeypatch):
    """A home that is a file costs a measurement, not an error."""
    (tmp_path / "home").write_text("")
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path / "home"))
    assert load_or_measure(*pair, 1).verify(1) > 0


def test_round_costs_of_fewer_rows_than_were_measured_stay_positive():
    """Rows end, and a forward over what is left costs less, but no less than its share."""
    costs = RoundCosts([8, 16], [1.0, 3.0], 0.1)
    assert costs.verify(7) == pytest.approx(7 / 8)
    assert costs.verify(1) == pytest.approx(1 / 8)
    flat = RoundCosts([8, 16], [1.0, 1.1], 0.1)
    assert flat.verify(4) == pytest.approx(0.95)


def test_round_costs_of_large_batches_are_measured_in_small_forwards(pair, monkeypatch):
    """Otherwise the first call of a batch of 32 rows would take longer than what it decides about."""
    sizes = []
    monkeypatch.setattr(round_costs, "_time_target", lambda *arguments: sizes.append(arguments[3]) or 1.0)
    assert measure(*pair, num_rows=32).num_tokens == [32, 64, 128]
    assert max(sizes) == 4
    assert measure(*pair, num_rows=200).num_tokens == [200, 400]


def test_round_costs_of_short_position_tables_are_measured_within_them():
    """gpt2 has no positions behind its table, where the forwards that are measured would end with an IndexError."""
    target = tiny_target("gpt2", 3, n_positions=24)
    draft = tiny_draft(target)
    draft.bind(target)
    assert measure(target, draft, 1).num_tokens == [1, 2, 4, 8, 16]


def test_round_costs_belong_to_what_they_depend_on(tmp_path, monkeypatch):
    """The rows of a draft's head are the target's, so no shape of its own tells how many there are."""
    target = tiny_target("llama", seed=3)
    drafts = [tiny_draft(target), tiny_draft(target, draft_vocab_size=20), tiny_draft(target, num_processing_modules=1)]
    assert len({round_costs.costs_path(target, draft, 1) for draft in drafts}) == 3
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(round_costs, "_time_target", lambda *_: 0.01)
    monkeypatch.setattr(round_costs, "_time_draft", lambda *_: 0.001)
    draft, found = drafts[0], []
    for change in (
        lambda: None,
        lambda: target.set_attn_implementation("eager"),
        lambda: target.to(torch.bfloat16),
        lambda: draft.to(torch.bfloat16),
    ):
        change()
        assert not are_costs_known(target, draft, 1)
        found.append(known_costs(target, draft, 1))
        assert are_costs_known(target, draft, 1)
        assert known_costs(target, draft, 1) is found[-1]
    assert len(set(map(id, found))) == 4


WRONG_CONTENTS = {
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "deep": "[" * 9000,
    "long": '{"num_tokens": [' + "1, " * 9000 + "1]}",
    "no text": b"\xff\xfe\x00",
    "strings": {"num_tokens": ["1"] * 7},
    "a string": {"verify_seconds": "1234567"},
    "nested": {"verify_seconds": [[1.0]] * 7},
    "nothing": {"verify_seconds": None},
    "one time": {"verify_seconds": 1.0},
    "no tokens": {"num_tokens": None},
    "zeros": {"verify_seconds": [0.0] * 7},
    "zero step": {"step_seconds": 0.0},
    "negative": {"verify_seconds": [-1.0] * 7},
    "NaN": {"verify_seconds": [float("nan")] * 7},
    "infinite step": {"step_seconds": float("inf")},
    "text step": {"step_seconds": "0.1"},
    "true": {"step_seconds": True},
    "large": {"num_tokens": [1, 2, 4, 100_000, 200_000, 400_000, 800_000]},
    "other tokens": {"num_tokens": [1, 2, 4, 8, 16, 32, 65]},
    "few": {"num_tokens": [1], "verify_seconds": [1.0]},
    "empty": {"num_tokens": [], "verify_seconds": []},
    "other length": {"verify_seconds": [1.0] * 6},
    "falling": {"verify_seconds": [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]},
    "unknown key": {"colour": 1},
}


@pytest.mark.parametrize("content", WRONG_CONTENTS.values(), ids=WRONG_CONTENTS)
def test_round_costs_of_wrong_content_are_measured_anew(pair, tmp_path, monkeypatch, content):
    """Nothing of the file is used, not even for a forward that tries it; the new costs take its place."""
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path))
    sizes = []
    monkeypatch.setattr(round_costs, "_time_target", lambda *arguments: sizes.append(arguments[3]) or 0.01)
    good = load_or_measure(*pair, 1)
    (path,) = tmp_path.rglob("*.json")
    if isinstance(content, dict):
        content = json.dumps({**{name: getattr(good, name) for name in round_costs._KEPT}, **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sizes.clear()
    assert load_or_measure(*pair, 1).num_tokens == list(round_costs.MEASURED_TOKENS)
    assert sizes == list(round_costs.MEASURED_TOKENS) * 4
    assert json.loads(path.read_text())["verify_seconds"] == [0.01] * 7


def test_round_costs_on_a_full_disk_leave_nothing_behind(pair, tmp_path, monkeypatch):
    """And are measured, as without a disk."""
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path))
    write = Path.write_text

    def write_half(self, text, *args, **kwargs):
        write(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", write_half)
    assert load_or_measure(*pair, 1).verify(1) > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


ROTARY = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 24,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("rope_type", ROTARY)
@pytest.mark.parametrize("length", [8, 30, 90])
def test_round_costs_measuring_leaves_rotary_frequencies_alone(rope_type, length):
    """They depend on the longest text or on the last one, so a target in the middle of its work must find its own again."""
    target = tiny_target("llama", seed=3, rope_parameters=ROTARY[rope_type], max_position_embeddings=24)
    draft = tiny_draft(target, rope_parameters=ROTARY["dynamic"], max_position_embeddings=24)
    draft.bind(target)
    with torch.no_grad():
        target(torch.arange(3, 3 + length)[None] % 90)
    rotary = target.model.rotary_emb
    state = {name: value for name, value in vars(rotary).items() if not name.startswith("_")}
    frequencies, buffer = rotary.inv_freq.clone(), rotary.inv_freq
    measure(target, draft, 1)
    assert rotary.inv_freq is buffer
    assert torch.equal(rotary.inv_freq, frequencies)
    assert {name: value for name, value in vars(rotary).items() if not name.startswith("_")} == state


def test_round_costs_measuring_leaves_training_alone(pair):
    """Timed without dropout and checkpointing; afterwards every module is in the mode that it was in."""
    target, draft = pair
    target.gradient_checkpointing_enable()
    target.train()
    target.model.layers[1].eval()
    draft.processing_modules[0].train()
    before = [module.training for model in pair for module in model.modules()]
    seen = set()
    handle = target.model.layers[0].register_forward_hook(lambda module, *_: seen.add(module.training))
    measure(target, draft, 1)
    handle.remove()
    assert seen == {False}
    assert [module.training for model in pair for module in model.modules()] == before


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Seconds of a forward over N tokens, for a test to set; costs are kept in an empty folder."""
    monkeypatch.setattr(round_costs.constants, "HF_HOME", str(tmp_path))
    times = {"of": lambda num_tokens: 1.0 + 0.01 * num_tokens}
    monkeypatch.setattr(round_costs, "_time_target", lambda target, draft, rows, count: times["of"](count))
    monkeypatch.setattr(round_costs, "_time_draft", lambda *arguments: 0.02)
    return times


def busy():
    """A machine on which every second forward waits for something else, and trees look dear."""
    waits = itertools.cycle((1.0, 2.0))
    return lambda num_tokens: num_tokens * next(waits)


def test_round_costs_of_a_busy_machine_are_said_and_not_kept(pair, machine, tmp_path, caplog):
    """One line says that it measures, one that it is busy; a call on the quiet machine measures again, and keeps that."""
    machine["of"] = busy()
    with caplog.at_level(logging.WARNING):
        first = load_or_measure(*pair, 1)
    measuring, told = caplog.messages
    assert re.match(r"measuring this machine: 28 target forwards, about [\d.]+ s; kept in .*round_costs.*json", measuring)
    assert "this machine is busy: the same forward took up to 2.0 times as long" in told
    assert list(tmp_path.rglob("*.json")) == []
    assert first.is_in_doubt
    machine["of"] = lambda num_tokens: 1.0
    second = load_or_measure(*pair, 1, first)
    assert second.verify(8) == 1.0
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert load_or_measure(*pair, 1, second) is second


def test_round_costs_are_not_measured_for_ever(pair, machine):
    """On a machine that never comes to rest."""
    machine["of"] = busy()
    costs = None
    for _ in range(round_costs._MOST_MEASUREMENTS):
        before, costs = costs, load_or_measure(*pair, 1, costs)
        assert costs is not before
    assert load_or_measure(*pair, 1, costs) is costs


def test_round_costs_that_rounds_contradict_are_measured_again(pair, machine, tmp_path):
    """Rounds that are faster; slower ones are those of longer contexts."""
    machine["of"] = lambda num_tokens: 3.0 * num_tokens
    costs = load_or_measure(*pair, 1)
    for _ in range(20):
        costs.observe_verify(1, 5.0)
    assert load_or_measure(*pair, 1, costs) is costs
    for _ in range(20):
        costs.observe_verify(1, 1.0)
    machine["of"] = lambda num_tokens: 1.0
    assert load_or_measure(*pair, 1, costs).verify(8) == 1.0
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["verify_seconds"] == [1.0] * 7


def test_after_a_busy_first_call_the_second_drafts_as_usual(machine, monkeypatch):
    """The first call finds that drafting does not pay, and what it found is forgotten with its costs."""
    for name in ("observe_verify", "observe_step"):  # what rounds really take does not count
        monkeypatch.setattr(RoundCosts, name, lambda self, *seconds: None)
    target = tiny_target("llama", seed=3)
    input_ids = torch.tensor([[5, 6, 7]])
    plain = target.generate(input_ids, max_new_tokens=40, do_sample=False)
    draft = scripted_draft(target, plain, prompt_length=3, tree="auto", tree_ngrams=False)
    settings = {"max_new_tokens": 40, "do_sample": False, "assistant_model": draft}
    waits = itertools.cycle((1.0, 2.0))
    machine["of"] = lambda num_tokens: num_tokens**1.2 * next(waits)
    target.generate(input_ids, **settings)
    busy_call = draft.last_speculation
    machine["of"] = lambda num_tokens: 1.0 + 0.01 * num_tokens
    target.generate(input_ids, **settings)
    assert busy_call.num_plain_steps > 0.8 * busy_call.num_rounds[0]
    assert draft.last_speculation.num_plain_steps < 0.2 * draft.last_speculation.num_rounds[0]
    assert draft.last_speculation.acceptance_length > 1.5
