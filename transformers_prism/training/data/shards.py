"""Shards of conversations that the target wrote: which conversations are kept, in numerical order, and where a run stopped."""

import json
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

from transformers_prism.whole_files import read_json, whole_file, write_json

CONVERSATIONS_PER_SHARD = 64
_FRUITLESS = 256  # a run stops if none of this many conversations can be kept


@dataclass
class WrittenRow:
    """A conversation being written.

    `forced` holds tokens that come next regardless of the target's logits: what the template writes between turns, and
    given user turns.
    """

    index: int
    tokens: list[int]
    temperature: float
    num_turns: int
    given_turns: deque[list[int]]
    generator: torch.Generator
    is_user: bool
    forced: deque[int] = field(default_factory=deque)
    spans: list[tuple[int, int]] = field(default_factory=list)
    user_start: int = 0
    start: int = 0  # of the turn that is being written
    first_user: tuple[int, ...] = ()
    refusal: str | None = None


def claim_folder(folder: Path, provenance: dict) -> None:
    """Record the provenance of a new folder, or compare with that of an existing one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "provenance.json"
    if not path.is_file():
        write_json(path, provenance)
        return
    found = read_json(path)
    names = "target weights_sha256 compute_dtype chat_template_sha256 source config num_processes chats_sha256 exclude_sha256"
    for name in names.split():
        # A folder of an earlier release lacks some of these entries.
        if name in found and found[name] != provenance[name]:
            raise ValueError(
                f"{folder.name}: expected a run with {name}={found.get(name)!r} as it began, got {provenance[name]!r}; "
                "use another folder"
            )


class ShardWriter:
    """Decides in numerical order which conversations are kept, and writes them, one shard at a time."""

    def __init__(self, folder: Path, provenance: dict, num_tokens: int, contamination, part: tuple[int, int]):
        self.folder, self.provenance, self.contamination, self.part = folder, provenance, contamination, part
        self.goal = -(-num_tokens // part[1])
        self.waiting: dict[int, WrittenRow] = {}  # ended, but wait for a smaller number
        self.kept: list[WrittenRow] = []
        self.refused: Counter[str] = Counter()
        self.seen: set[tuple[int, ...]] = set()
        self.num_tokens = self.num_waiting_tokens = 0
        self.num_decided = self.num_written = self.num_shards = self.num_kept = 0
        self.is_full = False
        self._read_back()

    @property
    def num_ended_tokens(self) -> int:
        """Tokens of all conversations that have ended, including those that wait for one with a smaller number."""
        return self.num_tokens + self.num_waiting_tokens

    @property
    def has_enough(self) -> bool:
        """Whether enough tokens are written, so that no new conversation needs to begin."""
        return self.num_ended_tokens >= self.goal

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{self.part[0]:03d}-{number:05d}.parquet"

    def _read_back(self) -> None:
        """Restore the counts from the shards that an earlier run wrote."""
        import pyarrow.parquet

        while self._path(self.num_shards).is_file():
            table = pyarrow.parquet.read_table(self._path(self.num_shards))
            state = json.loads(table.schema.metadata[b"prism_state"])
            self.num_decided = self.num_written = state["num_decided"]
            self.is_full = state["is_full"]
            self.refused = Counter(state["refused"])
            self.seen.update(map(tuple, table["first_user_turn"].to_pylist()))
            self.num_tokens += sum(map(len, table["input_ids"].to_pylist()))
            self.num_kept += table.num_rows
            self.num_shards += 1

    def add(self, row: WrittenRow) -> None:
        """Take in a conversation that has ended."""
        self.waiting[(row.index - self.part[0]) // self.part[1]] = row
        self.num_waiting_tokens += 0 if row.refusal else len(row.tokens)
        while self.num_decided in self.waiting and not self.is_full:
            self._decide(self.waiting.pop(self.num_decided))

    def _decide(self, row: WrittenRow) -> None:
        num_tokens = 0 if row.refusal else len(row.tokens)
        if row.refusal is None and row.first_user in self.seen:
            row.refusal = "duplicate"
        elif row.refusal is None and self.contamination is not None:
            if self.contamination.holds(row.tokens, row.first_user):
                row.refusal = "holds a benchmark's prompt"
        if row.refusal is not None:
            self.refused[row.refusal] += 1
        else:
            self.seen.add(row.first_user)
            self.kept.append(row)
            self.num_tokens += len(row.tokens)
        self.num_waiting_tokens -= num_tokens
        self.num_decided += 1  # last: an interruption before it leaves the conversation to the next run
        self.is_full = self.num_tokens >= self.goal
        if self.num_decided % CONVERSATIONS_PER_SHARD == 0 or self.is_full:
            self._write()

    def check_progress(self) -> None:
        """Stop if none of the first conversations could be kept, since more would not help.

        Raises:
            ValueError: with the reasons.
        """
        if self.num_decided >= _FRUITLESS and not self.num_tokens:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.refused.most_common())
            raise ValueError(f"expected conversations that can be kept, got none among the first {self.num_decided} ({reasons})")

    def finish(self) -> None:
        """Write what is left when the prompts or the time have run out."""
        if not self.is_full:
            self.is_full = True
            self._write()

    def keep(self) -> None:
        """Write what was decided since the last shard, when a run is interrupted."""
        if self.num_decided > self.num_written:
            self._write()

    def _write(self) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = {
            "index": [row.index for row in self.kept],
            "input_ids": [row.tokens for row in self.kept],
            "assistant_spans": [[list(span) for span in row.spans] for row in self.kept],
            "first_user_turn": [list(row.first_user) for row in self.kept],
            "temperature": [row.temperature for row in self.kept],
        }
        types = pyarrow.schema(
            [
                ("index", pyarrow.int64()),
                ("input_ids", pyarrow.list_(pyarrow.int32())),
                ("assistant_spans", pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
                ("first_user_turn", pyarrow.list_(pyarrow.int32())),
                ("temperature", pyarrow.float32()),
            ]
        )
        state = {"num_decided": self.num_decided, "is_full": self.is_full, "refused": dict(self.refused)}
        metadata = {"prism": json.dumps(self.provenance), "prism_state": json.dumps(state)}
        table = pyarrow.table(columns, schema=types.with_metadata(metadata))
        with whole_file(self._path(self.num_shards)) as unfinished:
            pyarrow.parquet.write_table(table, unfinished, compression="zstd")
        self.num_kept += len(self.kept)
        self.num_written = self.num_decided
        self.num_shards += 1
        self.kept = []

    def summary(self) -> dict:
        """Counts over all shards."""
        return {
            "num_conversations": self.num_kept,
            "num_tokens": self.num_tokens,
            "left_out": dict(self.refused.most_common()),
            "num_shards": self.num_shards,
        }
