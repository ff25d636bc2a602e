"""The JSON file of a measurement: its figures, and the command, machine and weights that they belong to.

`transformers-prism card` gathers such files into a draft's metrics.json.
"""

import json
import os
import platform
import sys
from pathlib import Path

import torch
import transformers

import transformers_prism


def write_record(
    path: Path | None, kind: str, target, settings: dict, figures: dict, weights: str | None = None
) -> None:
    """Write a measurement; nothing without a path.

    Args:
        path (`Path`, *optional*): the file.
        kind (`str`): which measurement: "generate", "verify" or "modules".
        target (`PreTrainedModel`): what was sped up.
        settings (`dict`): how it was measured: tree, batch, baseline and whatever else decides the figures.
        figures (`dict`): what was found.
        weights (`str`, *optional*): [`weights_sha256`] of the draft.
    """
    if path is None:
        return
    record = {
        "kind": kind,
        "command": _command(sys.argv),
        "target": target.config._name_or_path,
        "weights_sha256": weights,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": target.device.type,
        "hardware": hardware(target.device),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "transformers_prism": transformers_prism.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": settings,
        **figures,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


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


def _command(argv: list[str]) -> str:
    """The command line without the folders of this machine."""
    return " ".join(Path(word).name if "/" in word else word for word in argv)
