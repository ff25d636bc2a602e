"""What rounds cost: measured, kept on disk, corrected by rounds."""

import json

import pytest
import torch
from tiny_models import tiny_draft, tiny_target

from transformers_prism import round_costs
from transformers_prism.round_costs import RoundCosts, load_or_measure, measure

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
    assert costs.verify(1) > 1.3
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
    assert all(set(json.loads(path.read_text())) == set(vars(first)) for path in files if path.stat().st_size > 60)


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
