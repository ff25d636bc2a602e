"""Shards of written conversations: kept in the order of their numbers, each once, and read back by a run that resumes."""

from collections import deque

import pytest
import torch

from transformers_prism.training.data.shards import CONVERSATIONS_PER_SHARD, ShardWriter, WrittenRow, claim_folder

pytestmark = pytest.mark.quick


def row_of(index, refusal=None, first_user=None):
    row = WrittenRow(index, [4, 10, 1, 5, 20, 1], 0.0, 1, deque(), torch.Generator(), is_user=False)
    row.spans, row.first_user, row.refusal = [(4, 6)], (10 + index if first_user is None else first_user,), refusal
    return row


def written(folder):
    import pyarrow.parquet

    return [index for path in sorted(folder.glob("*.parquet")) for index in pyarrow.parquet.read_table(path)["index"].to_pylist()]


def test_conversations_are_decided_in_order(tmp_path):
    """Number 1 ends first and says what number 0 says: it is the duplicate."""
    writer = ShardWriter(tmp_path, {}, 18, None, (0, 1))
    writer.add(row_of(1, first_user=10))
    assert (writer.num_decided, writer.num_waiting_tokens, writer.has_enough) == (0, 6, False)
    for row in (row_of(0), row_of(2, "empty answer"), row_of(3)):
        writer.add(row)
    assert not writer.is_full
    writer.add(row_of(4))
    assert writer.is_full
    assert written(tmp_path) == [0, 3, 4]
    assert writer.summary() == {
        "num_conversations": 3,
        "num_tokens": 18,
        "left_out": {"duplicate": 1, "empty answer": 1},
        "num_shards": 1,
    }


def test_shards_are_read_back(tmp_path):
    writer = ShardWriter(tmp_path, {}, 10**6, None, (1, 2))
    for turn in range(CONVERSATIONS_PER_SHARD + 3):
        writer.add(row_of(1 + 2 * turn, "empty answer" if turn == 5 else None))
    again = ShardWriter(tmp_path, {}, 10**6, None, (1, 2))
    # What was not in a whole shard is written anew.
    assert (again.num_decided, again.num_shards, again.num_kept) == (CONVERSATIONS_PER_SHARD, 1, CONVERSATIONS_PER_SHARD - 1)
    assert again.refused == {"empty answer": 1}
    again.add(row_of(1 + 2 * CONVERSATIONS_PER_SHARD, first_user=11))
    assert again.refused["duplicate"] == 1
    again.finish()
    assert ShardWriter(tmp_path, {}, 10**6, None, (1, 2)).is_full


def test_a_folder_belongs_to_one_run(tmp_path):
    provenance = {"target": {"name": "a"}, "chat_template_sha256": "1", "source": "2 given prompts", "config": {}, "num_processes": 1}
    claim_folder(tmp_path / "data", provenance)
    claim_folder(tmp_path / "data", provenance)
    with pytest.raises(ValueError, match="data: expected a run with num_processes=1 as it began, got 2; use another folder"):
        claim_folder(tmp_path / "data", {**provenance, "num_processes": 2})
