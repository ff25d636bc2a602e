"""The bound of batches, at a size that says nothing about time."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import prompts, tiny_draft, tiny_target

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import batch_bound
from transformers_prism.decoding.speculation import RoundTree, Speculation
from transformers_prism.policy.costs import RoundCosts


@pytest.mark.quick
def test_bound_by_hand():
    """Two sequences: one ends after two rounds, and the third round is over the nodes of the other alone."""
    speculation = Speculation([2, 3], [4, 6], [[1, 1], [1, 1, 1]], trees=[RoundTree(2, 3), RoundTree(1, 1), RoundTree(0, 0)])
    costs = RoundCosts([2, 4, 8, 16], [2.0, 3.0, 4.0, 8.0], step_seconds=0.5)
    assert batch_bound.active_by_round(speculation) == [2, 2, 1]
    found = batch_bound.bound_of(speculation, costs, num_sequences=2, num_steps=6)
    assert found["plain"] == 12.0
    # 2 * 4 and 2 * 2 tokens, and one token, which costs at least its share of two.
    assert found["verify"] == pytest.approx(4.0 + 3.0 + costs.verify(1))
    assert found["draft"] == pytest.approx(1.5)
    assert found["bound"] == pytest.approx(12.0 / (8.5 + costs.verify(1)))
    assert found["even_bound"] == pytest.approx(found["bound"] * 6 / 5)


def test_batches_are_measured(one_thread, cheap_rounds):
    """Every batch with its bound, the same text, and parts that add up."""
    target = tiny_target("llama", seed=3)
    ids, _ = prompts(4)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    records = [{"question_id": index, "category": "qa"} for index in range(4)]
    figures = batch_bound.measure(target, tiny_draft(target), records, rows, batch_size=2, max_new_tokens=8, pad_id=0)
    assert len(figures) == 2
    assert all(one["is_identical"] for one in figures)
    assert all(one["share"] == pytest.approx(one["ratio"] / one["bound"]) for one in figures)
    heading, table = batch_bound.rows_of({2: figures})
    assert len(table) == 1
    assert len(table[0]) == len(heading)
    assert float(table[0][3]) > 0
