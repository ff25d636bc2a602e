"""The JSON file of a measurement: its figures, and the command, machine and weights that they belong to.

`transformers-prism card` gathers such files into a draft's metrics.json.
"""

import datetime
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from transformers_prism.command_line import this_command, versions
from transformers_prism.configuration_prism import target_fingerprint
from transformers_prism.target import weights_digest
from transformers_prism.training.data.conversations import sha256_of
from transformers_prism.transformers_names import name_of
from transformers_prism.whole_files import write_json

# For an untrained draft: its name in commands, and the value in place of its weights' hash.
UNTRAINED = "random"
# Files of earlier versions have no such entries, and are resumed all the same.
_LATER_NAMES = ("target_sha256", "prompts_sha256")


def record_head(kind: str, target, settings: dict, weights: str | None = None) -> dict:
    """The head of a measurement's file: what its figures belong to.

    Args:
        kind (`str`): which measurement: "generate", "verify", "modules" and so on.
        settings (`dict`): how it was measured: tree, batch, baseline and whatever else decides the figures.
        weights (`str`, *optional*): [`weights_sha256`] of the draft, or `UNTRAINED`.
    """
    return {
        "kind": kind,
        "command": this_command(),
        "date": datetime.date.today().isoformat(),
        "target": _name_elsewhere(target.config),
        "target_sha256": weights_digest(target),
        "weights_sha256": weights,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
        "hardware": hardware(target.device),
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": settings,
    }


def _name_elsewhere(config) -> str:
    """A target's name for files that others read: its Hub id, or the last part of a path, whose folders are private."""
    name = name_of(config)
    return name if target_fingerprint(config)["name"] else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def write_record(
    path: Path | None, kind: str, target, settings: dict, figures: dict, weights: str | None = None
) -> None:
    """Write a measurement, its head (see [`record_head`]) and its figures; nothing without a path."""
    if path is not None:
        write_json(path, {**record_head(kind, target, settings, weights), **figures})


def read_record(path: Path) -> dict:
    """A measurement's file.

    Raises:
        ValueError: if it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the JSON file of a measurement, got {error}") from error
    if not isinstance(record, dict) or "kind" not in record or "settings" not in record:
        raise ValueError(f"{path}: expected the JSON file of a measurement, got one without kind and settings")
    return record


def finished_part(path: Path, head: dict) -> dict | None:
    """What an interrupted measurement left, if it is of the same [`record_head`]; None if there is no such file.

    Raises:
        ValueError: if the file's figures were measured in another way, saying what differs.
    """
    if not path.is_file():
        return None
    found = read_record(path)
    anything = {"command": None, "date": None}
    _check_same({**head, **anything}, {**found, **anything}, str(path))
    return found


def _check_same(expected: dict, found: dict, where: str) -> None:
    """Compare the heads of two measurements, as JSON values."""
    for name, value in json.loads(json.dumps(expected)).items():
        if name == "settings":
            _check_same(value, found[name], f"{where}, settings")
        elif name in _LATER_NAMES and name not in found:
            continue
        elif found.get(name) != value:
            raise ValueError(f"{where}: expected {name} {value!r} to resume, got {found.get(name)!r}")


def prompts_sha256(prompts: Iterable[dict]) -> str:
    """Hash of prompts as they are decoded, given as inputs of generate()."""
    return sha256_of(inputs["input_ids"].tolist() for inputs in prompts)


def hardware(device: torch.device) -> str:
    """What a device is, such as "AMD EPYC, 2 cores" or "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
