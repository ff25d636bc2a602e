"""Read weights written by other packages: safetensors or `weights_only`, in one file or in shards. No code is run."""

import pickle
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from transformers_prism.transformers_names import NO_ERROR_IF_ABSENT
from transformers_prism.whole_files import read_json

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def checkpoint_folder(source: str | Path) -> Path:
    """Where a checkpoint lies on this machine.

    Args:
        source (`str` or `Path`): a folder, or a name on the Hub, of which configuration, card and weights are
            downloaded to the Hub's cache.
    Returns:
        `Path`: the folder.
    Raises:
        ValueError: if it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    wanted = ["config.json", "README.md", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise _no_source(source, error) from error


def read_config(source: str | Path) -> dict:
    """The `config.json` of a checkpoint; of a name on the Hub, that file alone is downloaded.

    Args:
        source (`str` or `Path`): a folder, or a name on the Hub.
    Returns:
        `dict`: what it holds.
    Raises:
        ValueError: if it is neither, or has no such file.
    """
    if Path(source).is_dir():
        return read_json(Path(source) / "config.json")
    try:
        found = cached_file(str(source), "config.json")
    except (OSError, ValueError) as error:
        raise _no_source(source, error) from error
    return read_json(Path(str(found)))


def _no_source(source: str | Path, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n", 1)[0]
    return ValueError(f"source: expected a folder or a name on the Hub, got {source}: {reason}")


def read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """All weights of a checkpoint folder, in the dtype that they have there, on the CPU.

    Args:
        folder (`Path`): holds one of `WEIGHT_FILES`; the first of them is read where there are several.
    Returns:
        `tuple`: the tensors by name, and the names of the files that were read.
    Raises:
        ValueError: if there is none, a file is damaged or holds anything but tensors, or an index and its shards
            disagree.
    """
    for name in WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            if name.endswith(".index.json"):
                return _read_shards(path)
            return _read_tensors(path), [name]
    raise ValueError(f"expected one of {', '.join(WEIGHT_FILES)}, got none in {folder}")


def read_weight_ending_with(target: str, ending: str) -> torch.Tensor | None:
    """One weight of a model on disk or on the Hub, without reading the others where the format allows it.

    Args:
        target (`str`): folder, or name on the Hub.
        ending (`str`): the end of the weight's name.
    Returns:
        `torch.Tensor`: the only weight whose name ends so, or None if there is none or more than one.
    Raises:
        ValueError: if the file that should hold it is damaged.
    """
    for name in WEIGHT_FILES:
        found = cached_file(target, name, **NO_ERROR_IF_ABSENT)
        if found is None:
            continue
        path = Path(found)
        if name.endswith(".index.json"):
            shards = {weight: shard for weight, shard in shards_of(path).items() if weight.endswith(ending)}
            if len(shards) != 1:
                return None
            path = Path(str(cached_file(target, next(iter(shards.values())))))
        matching = _read_tensors(path, ending)
        return next(iter(matching.values())) if len(matching) == 1 else None
    return None


def shards_of(index: Path) -> dict[str, str]:
    """Which file holds which weight.

    Args:
        index (`Path`): an index file as transformers writes it.
    Returns:
        `dict`: file name by weight name.
    Raises:
        ValueError: if the index has no such map, or names a file outside its own folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: expected a weight_map that names files, got {weight_map!r}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or shard.endswith(".json"):
            raise ValueError(f"{index}: expected the names of files in its own folder, got {shard!r}")
    return weight_map


def _read_shards(index: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    weight_map = shards_of(index)
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise ValueError(f"{index}: expected the shards {files}, got none named {absent}")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = _read_tensors(index.parent / file)
        expected = {name for name, shard in weight_map.items() if shard == file}
        if set(tensors) != expected:
            raise ValueError(
                f"{index.parent / file}: expected the weights that {index.name} lists, got none named "
                f"{sorted(expected - set(tensors))} and, not listed, {sorted(set(tensors) - expected)}"
            )
        weights.update(tensors)
    return weights, [index.name, *files]


def _read_tensors(path: Path, ending: str = "") -> dict[str, torch.Tensor]:
    """The tensors of one file by name, those whose name ends with `ending`."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ending)}
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch.load raises this for a damaged file, too; the reason is in its first line.
        reason = str(error).split("\n", 1)[0]
        raise ValueError(
            f"{path}: expected a file of nothing but tensors, got one that was refused: {reason}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a whole file of tensors, got one that cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: expected tensors by name, got {_describe(tensors)}")
    return {name: tensor for name, tensor in tensors.items() if name.endswith(ending)}


def _describe(content) -> str:
    if not isinstance(content, dict):
        return type(content).__name__
    odd = [f"{name}: {type(value).__name__}" for name, value in content.items() if not isinstance(value, torch.Tensor)]
    return "a dictionary with " + ", ".join(odd[:8])
