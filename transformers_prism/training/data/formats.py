"""Files, folders and data sets on the Hub as rows; rows that cannot be used are counted and left out.

JSON and CSV are read here, not by `datasets` or pandas. `datasets` gives each column one type: because of one number among
texts, or one `null` line, it refuses the whole file without naming the line. pandas takes the first column for an index if
rows are longer than the header. All other formats are read by pyarrow and `datasets`.
"""

import bz2
import codecs
import csv
import gzip
import json
import logging
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from transformers_prism.training.data.chats import COLUMNS, NoAnswer, RowError, is_messages, prompt_of, shown
from transformers_prism.training.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

# A source is refused if more than this share of its rows is unusable.
MAX_BAD_SHARE = 0.5
# Columns that say of each token whether it belongs to an answer, and the value of those that do not: as transformers' collators,
# chat templates and SpecForge write them.
MASKS = {"labels": -100, "assistant_masks": 0, "loss_mask": 0}
_PLACES_TOLD = 3  # of each reason
_ROWS_TRIED = 1000  # first rows of a data set on the Hub; if none of them is usable, it is given up
_LARGEST_CELL = 2**31 - 1  # characters of a table's cell
_OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# In a folder, only files of the first of these kinds are read; .json comes late, since it often holds settings.
_KINDS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".csv", ".tsv", ".json", ".txt")


class RowCounts:
    """How many rows of a source were used, and why others were not."""

    def __init__(self, source: str):
        self.source, self.num_rows, self.num_bad = source, 0, 0
        self.left_out: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def leave_out(self, where: str, error: RowError) -> None:
        """Count a row that cannot be used."""
        self.left_out[error.reason] += 1
        self.num_bad += not isinstance(error, NoAnswer)
        places = self.places.setdefault(error.reason, [])
        if len(places) < _PLACES_TOLD:
            places.append(f"{where}: {error}")

    def lines(self) -> list[str]:
        """Each reason with its count and the first rows that it was given for."""
        return [
            line
            for reason, count in self.left_out.most_common()
            for line in (f"{count:>8}  {reason}", *(f"          {place}" for place in self.places[reason]))
        ]

    def check(self, max_bad_share: float) -> None:
        """Raise a ValueError that names the first rows of each kind if too many cannot be used."""
        if self.num_bad > max_bad_share * self.num_rows:
            raise ValueError(
                f"data: expected at most {max_bad_share:.0%} of the rows in {self.source} to be unusable (max_bad_share), "
                f"got {self.num_bad} of {self.num_rows}:\n" + "\n".join(self.lines())
            )

    def warn(self) -> None:
        """Log what was left out, if anything was."""
        if self.left_out:
            count = self.left_out.total()
            logger.warning("%d of %d rows in %s are left out:\n%s", count, self.num_rows, self.source, "\n".join(self.lines()))


def usable_rows(
    source, convert: Callable, max_bad_share: float = MAX_BAD_SHARE, split: str = "train", counts: RowCounts | None = None
) -> Iterator:
    """What `convert` returns for the JSON value of each row of a source. Rows for which it raises [`RowError`] are left
    out and counted, in `counts` if given, else in a logged warning.

    Args:
        max_bad_share (`float`): share of the rows, 0 to 1, that may be left out.
        split (`str`): of a data set on the Hub.
    Raises:
        FileNotFoundError: if the source is not there.
        ValueError: if the source cannot be read, or if more rows are unusable.
    """
    told = counts is not None
    counts = RowCounts(Path(source).name) if counts is None else counts
    with ProgressBar(f"reading {counts.source}", None, "rows") as bar:
        for where, row in read_rows(source, split):
            counts.num_rows += 1
            bar.advance()
            try:
                if isinstance(row, RowError):
                    raise row
                converted = convert(row)
            except RowError as error:
                counts.leave_out(where, error)
                # A file is always read to its end; a data set on the Hub may have no end.
                if counts.num_rows == counts.num_bad == _ROWS_TRIED and not Path(source).exists():
                    counts.check(max_bad_share)
            except ValueError as error:  # a fault of the whole source
                raise ValueError(f"{where}: {error}") from error
            else:
                yield converted
    counts.check(max_bad_share)
    if not told:
        counts.warn()


def read_chats(source, max_bad_share: float = MAX_BAD_SHARE, split: str = "train") -> list[list[dict]]:
    """Prompts of a source: chats as messages ([`chat_of`]), each with at least one turn by the user. Raises what
    [`usable_rows`] raises, and a ValueError if there is no chat at all."""
    chats = list(usable_rows(source, prompt_of, max_bad_share, split))
    if not chats:
        raise ValueError(f"data: expected at least one chat in {Path(source).name}, got none")
    return chats


def is_token_ids(row) -> bool:
    """Whether a row is token ids: it has `input_ids`, and either says which are answers or has no column that a chat could
    be read from."""
    if not isinstance(row, dict) or row.get("input_ids") is None:
        return False
    has_answers = any(row.get(name) is not None for name in ("prompt_length", "assistant_spans"))
    has_answers |= any(isinstance(row.get(name), list) for name in MASKS)
    return has_answers or all(row.get(name) is None for name in COLUMNS)


def check_source(source) -> None:
    """Tell a missing file from the name of a data set on the Hub, without asking the Hub.

    Raises:
        FileNotFoundError: if the source is not there and cannot be the name of a data set.
    """
    if not str(source).strip():
        raise FileNotFoundError("data: expected a file, a folder or a data set on the Hub, got an empty name")
    path = Path(source)
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(source)) and _kind(path) not in _KINDS
    if not path.exists() and not is_name:
        raise FileNotFoundError(
            f"data: expected a file, a folder or a data set on the Hub, got {str(source)!r}, which is not there"
        )


def read_rows(source, split: str = "train") -> Iterator[tuple[str, object]]:
    """Each row of a source with its place, such as "chats.jsonl, line 3"; a [`RowError`] for a line that is no JSON.

    Args:
        source (`str` or path): a file of JSON lines, JSON, Parquet, CSV, Arrow or text (a prompt a line), which may be
            compressed; a folder of them; or the name of a data set on the Hub.
        split (`str`): of a data set on the Hub, and of a folder whose files are named by splits.
    Raises:
        FileNotFoundError: if the source is not there.
        ValueError: if a file cannot be read.
    """
    check_source(source)
    path = Path(source)
    if not path.exists():
        yield from _hub_rows(str(source), split)
        return
    for file in _files(path, split) if path.is_dir() else [path]:
        try:
            for number, row in _READERS.get(_kind(file), _json_rows)(file):
                yield f"{file.name}, {number}", row
        except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, UnicodeError, ValueError, KeyError) as error:
            raise ValueError(f"data: expected {_kind(file) or 'JSON'} in {file.name}, got: {error}") from error


def _kind(path: Path) -> str:
    """The suffix of a file, without that of its compression."""
    return (path.with_suffix("") if path.suffix.lower() in _OPENERS else path).suffix.lower()


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: str(path.relative_to(folder)) for path in found}
    for kind in _KINDS:
        files = [path for path in found if _kind(path) == kind and not re.search(r"(^|/)\.", names[path])]
        if files:
            return [path for path in files if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", names[path])] or files
    raise FileNotFoundError(f"data: expected files of {', '.join(_KINDS)} in {folder.name!r}, got none")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers. Bytes that are not UTF-8 become lone surrogates, so that the row that
    holds them is refused later."""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _opened(path: Path, **options) -> TextIO:
    """A text file, unpacked if need be, in UTF-8 or UTF-16."""
    opener: Callable = _OPENERS.get(path.suffix.lower(), open)
    with opener(path, "rb") as file:
        is_wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = {"encoding": "utf-16"} if is_wide else {"encoding": "utf-8-sig", "errors": "surrogateescape"}
    return opener(path, "rt", **encoding, **options)


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    """JSON lines, one array of rows, an object that holds such an array, or a single row."""
    _, first = next(_lines(path), (0, ""))
    head = _parsed(first)
    is_row = isinstance(head, dict) and any(name in head for name in (*COLUMNS, "input_ids"))
    if not is_row:
        whole = _parsed("".join(line for _, line in _lines(path)))
        if isinstance(whole, dict) and not any(name in whole for name in COLUMNS):
            inner = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
            whole = inner[0] if len(inner) == 1 else whole
        if isinstance(whole, list) or isinstance(head, RowError) and not isinstance(whole, RowError):
            rows = whole if isinstance(whole, list) and not is_messages(whole) else [whole]
            yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
            return
        if _kind(path) == ".json" and isinstance(head, RowError):
            raise whole
    for number, line in _lines(path):
        yield f"line {number}", _parsed(line)


def _parsed(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return RowError(f"expected JSON, got {shown(text.strip()[:50])} ({error})")


def _text_rows(path: Path) -> Iterator[tuple[str, dict]]:
    return ((f"line {number}", {"text": line.strip()}) for number, line in _lines(path))


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _table_rows(path: Path) -> Iterator[tuple[str, dict | RowError]]:
    """Rows of a table. Every cell is text, and an empty cell counts as absent. A row with more cells than the header cannot be
    used, unless the further cells are empty."""
    csv.field_size_limit(_LARGEST_CELL)
    with _opened(path, newline="") as file:
        rows = csv.reader(file, delimiter="\t" if _kind(path) == ".tsv" else ",")
        names = next(rows, None)
        if names is None:
            raise ValueError("No columns")
        for number, row in enumerate(filter(None, rows), start=1):
            while len(row) > len(names) and row[-1] == "":
                row.pop()
            if len(row) > len(names):
                yield f"row {number}", RowError(f"expected at most {len(names)} cells, as many as the first line has, got {len(row)}")
            else:
                yield f"row {number}", {name: value for name, value in zip(names, row, strict=False) if value != ""}


def _arrow_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import datasets

    return ((f"row {number}", row) for number, row in enumerate(datasets.Dataset.from_file(str(path)), start=1))


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"data: expected a file, a folder or a data set on the Hub, got {name!r}, which is none of them here: {error}"
        ) from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


_READERS: dict[str, Callable] = {
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _text_rows,
}
