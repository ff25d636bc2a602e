"""The offline replay of choices of trees: what is recorded, and optima that can be seen by eye."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import prompts, tiny_draft, tiny_target
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import replay
from transformers_prism.bench.record import record_head
from transformers_prism.policy.experience import Experience
from transformers_prism.policy.settings import TreeSettings

pytestmark = pytest.mark.quick
SETTINGS = {"tree": "auto", "top_k": 2, "depth": 2, "num_nodes": 6, "ngrams": False}


def chain_text(answer: list[int], right: list[int]) -> dict:
    """At each position the draft draws two tokens a step, the right one likelier, `right[position]` of two steps right."""
    num_positions = len(answer) - 1
    first, second = [], []
    for position in range(num_positions):
        wanted = [answer[position + step] if position + step < len(answer) else 0 for step in (1, 2)]
        first.append([wanted[0] if right[position] > 0 else 900, 901])
        second.append([wanted[1] if right[position] > 1 else 902, 903, 904, 905])
    steps = [
        (torch.tensor(first, dtype=torch.int32), torch.full((num_positions, 2), -1), torch.tensor([[-0.1, -3.0]] * num_positions)),
        (
            torch.tensor(second, dtype=torch.int32),
            torch.tensor([[0, 0, 1, 1]] * num_positions),
            torch.tensor([[-0.2, -4.0, -5.0, -6.0]] * num_positions),
        ),
    ]
    return {"task": "qa", "prompt": [1, 2], "answer": answer, "steps": steps}


def costs_of(step: float = 0.1) -> replay.Costs:
    """A node costs a tenth of a forward."""
    return replay.Costs(replay._FixedCosts([1, 11], [1.0, 2.0], step))


def test_best_nodes_are_those_that_are_accepted():
    """All drafts right: rounds of two nodes and three tokens, but none beyond the end."""
    answer = list(range(10, 17))  # six tokens after the first
    text = chain_text(answer, [2] * 6)
    sizes, nodes = replay.best_seconds(text, TreeSettings(**SETTINGS), costs_of(), Experience())
    assert nodes == pytest.approx(2 * (1.2 + 0.2))
    assert nodes <= sizes
    # Nothing is right: plain steps.
    text = chain_text(answer, [0] * 6)
    assert replay.best_seconds(text, TreeSettings(**SETTINGS), costs_of(), Experience()) == pytest.approx((6.0, 6.0))


def test_the_optimum_is_that_of_all_sequences_of_choices():
    """Dynamic programming against trying everything."""
    answer, right = list(range(10, 17)), [1, 2, 0, 2, 1, 0]
    text, settings, costs = chain_text(answer, right), TreeSettings(**SETTINGS), costs_of()
    least = []
    for choice in itertools.product(range(3), repeat=6):
        position, seconds = 0, 0.0
        while position < 6:
            # The last token is a bonus.
            num = min(choice[position], right[position], 6 - position - 1)
            seconds += costs.round(num, num)
            position += num + 1
        least.append(seconds)
    assert replay.best_seconds(text, settings, costs, Experience())[1] == pytest.approx(min(least))


def test_the_policy_replays_whole_texts():
    """Every token is committed, with costs that no round changes; hindsight is never slower."""
    texts = [chain_text(list(range(10, 41)), ([2, 1, 0, 2, 2] * 6)) for _ in range(2)]
    found = replay.compare({"settings": SETTINGS, "max_new_tokens": 31, "texts": texts}, costs_of())
    assert list(found) == ["plain", "auto", "auto, learned", "table", "network", "best sizes", "best nodes"]
    assert found["plain"]["seconds"] == pytest.approx(60.0)
    assert found["best nodes"]["seconds"] <= found["best sizes"]["seconds"] <= found["auto"]["seconds"]
    assert found["auto"]["tau"] > 1
    assert found["auto"]["over_auto"] == 1.0


def test_a_narrow_draw_is_a_part_of_the_recorded_one():
    """Nodes of later steps lie below those that were expanded."""
    drafter = replay._RecordedDrafter(chain_text(list(range(10, 17)), [2] * 6))
    whole = drafter.draw(2, 2)
    assert whole.token_ids.shape[1] == 6
    narrow = drafter.draw(2, 2, lambda log_probs: 1)
    assert narrow.parents.tolist() == [[-1, -1, 0, 0]]
    assert narrow.token_ids[0].tolist() == whole.token_ids[0, :4].tolist()
    assert drafter.draw(2, 2, lambda log_probs: 0).token_ids.shape[1] == 2


def test_record_and_compare(one_thread, tmp_path):
    """Of tiny models: the answer of plain decoding, and a pool of the whole tree at each position."""
    target = tiny_target("llama", seed=3)
    draft = tiny_draft(target)
    draft.generation_config.update(tree_top_k=3, tree_depth=3, tree_num_nodes=10)
    ids, _ = prompts(1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    recorded = replay.record(target, draft, [{"category": "qa"}], [inputs], max_new_tokens=12)
    plain = target.generate(**inputs, max_new_tokens=12, do_sample=False)
    (text,) = recorded["texts"]
    assert text["answer"] == plain[0, ids.shape[1] :].tolist()
    assert [tuple(part.shape) for part in text["steps"][1]] == [(11, 9)] * 3
    head = {**record_head("replay", target, {}), "command": "replay record"}
    torch.save({**recorded, "head": head}, tmp_path / "rounds.pt")
    costs = {"num_tokens": [1, 64], "verify_seconds": [1.0, 2.0], "step_seconds": 0.02, "overhead_seconds": 0.01}
    (tmp_path / "costs.json").write_text(str(costs).replace("'", '"'))
    arguments = ["compare", str(tmp_path / "rounds.pt"), str(tmp_path / "costs.json"), "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(replay.app, arguments)
    assert result.exit_code == 0, result.output
    assert "best nodes" in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["kind"], written["costs"]) == ("replay", costs)
    assert written["command"].startswith("replay record\npython -m benchmarks.replay costs costs.json\n")
