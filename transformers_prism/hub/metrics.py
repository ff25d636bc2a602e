"""A draft's metrics.json: what was measured of it, gathered from what `bench generate`, `bench acceptance` and `verify` wrote.

    {"weights_sha256": "...", "generate": [record, ...], "acceptance": [record, ...], "verify": [record, ...]}

Each record is a measurement's file (`bench/record.py`) without the figures of single prompts: hardware, dtype, tree, batch,
baseline and command stay with every figure.
"""

from pathlib import Path

from transformers_prism.hub.files import KINDS, METRICS, weights_sha256
from transformers_prism.whole_files import read_json

_NEEDED = ("command", "target", "weights_sha256", "dtype", "device", "hardware", "num_threads", "versions", "settings")
_NEEDED_BY_KIND = {"generate": ("summary", "tasks"), "acceptance": ("rows",), "verify": ("holds", "checks", "num_near_ties")}
_NEEDED_SETTINGS = {
    "generate": ("tree", "tree_top_k", "tree_depth", "tree_num_nodes", "batch_size", "baseline", "generate", "packed"),
    "acceptance": ("prompts", "num_prompts", "max_new_tokens", "seed", "coupled", "packed"),
    "verify": ("num_prompts", "max_new_tokens", "seed"),
}
_MEASUREMENT = "a JSON object of a measurement"


def gather(folder: str | Path, files: list[Path]) -> dict:
    """What a draft's metrics.json holds, from the files of its measurements in the order of the card.

    Raises:
        ValueError: if a file is not such a measurement, lacks its settings or surroundings, or is of other weights.
    """
    metrics: dict = {"weights_sha256": weights_sha256(folder), **{kind: [] for kind in KINDS}}
    for file in files:
        record = _read(file)
        _check(record, metrics["weights_sha256"], str(file))
        metrics[record.pop("kind")].append(_without_prompts(record))
    return metrics


def _without_prompts(record: dict) -> dict:
    """A record without the figures of single prompts."""
    kept = {name: value for name, value in record.items() if name != "prompts"}
    if "rows" in kept:
        kept["rows"] = [{name: value for name, value in row.items() if name != "answers"} for row in kept["rows"]]
    return kept


def read_metrics(folder: str | Path) -> dict:
    """A draft's metrics.json.

    Raises:
        ValueError: if it is not there or damaged, or its figures are of other weights than those in the folder.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise ValueError(f"expected {METRICS} in {folder}, got none; name the files of its measurements")
    metrics = _read(path)
    found = weights_sha256(folder)
    if metrics.get("weights_sha256") != found:
        raise ValueError(
            f"{path}: expected figures of the weights in its folder ({found}), got figures of "
            f"{metrics.get('weights_sha256')}; measure again"
        )
    for kind in KINDS:
        if not isinstance(metrics.get(kind), list):
            raise ValueError(f"{path}: expected a list {kind!r}, got {metrics.get(kind)!r}")
        for record in metrics[kind]:
            if not isinstance(record, dict):
                raise ValueError(f"{path}: expected objects in {kind!r}, got {record!r}")
            _check({**record, "kind": kind}, found, str(path))
    return metrics


def _read(path: Path) -> dict:
    def refuse(constant: str):
        raise ValueError(f"expected finite numbers, got {constant}")

    if not path.exists():
        raise ValueError(f"{path}: expected {_MEASUREMENT}, got no such file")
    return read_json(path, _MEASUREMENT, refuse)


def _check(record: dict, weights: str, where: str) -> None:
    kind = record.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{where}: expected a file of bench generate, bench acceptance or verify, got kind {kind!r}")
    absent = [name for name in (*_NEEDED, *_NEEDED_BY_KIND[kind]) if name not in record]
    settings = record.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: expected an object 'settings', got {settings!r}")
    absent += [f"settings.{name}" for name in _NEEDED_SETTINGS[kind] if name not in settings]
    if absent:
        raise ValueError(f"{where}: expected all settings and surroundings of its figures, got none of {', '.join(absent)}; measure again")
    if record["weights_sha256"] != weights:
        raise ValueError(
            f"{where}: expected figures of the draft's weights ({weights}), got figures of {record['weights_sha256']}"
        )
