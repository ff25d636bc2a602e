"""What a saved draft needs besides weights and configuration, so that it loads where this package is not installed.

A draft's folder holds the code itself: every file of this package that `modeling_prism.py` reaches by relative imports,
and `custom_generate/generate.py`. transformers runs them with `trust_remote_code=True`. It follows relative imports
within one folder only, so that `kernels/x.py` is published as `kernels_x.py`; the import lines that name it change with
it, and nothing else does.
"""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

AUTO_MAP = {
    "AutoConfig": "configuration_prism.PrismConfig",
    "AutoModel": "modeling_prism.PrismDraftModel",
    "AutoModelForCausalLM": "modeling_prism.PrismDraftModel",
}
# Not reached by imports: they travel from the package, or from where a draft was loaded.
_OTHER_FILES = ("custom_generate/generate.py",)
_RELATIVE_IMPORT = re.compile(r"^([ \t]*from \.)([\w.]+)( import )", flags=re.MULTILINE)


def published_files() -> list[Path]:
    """The code files of a draft, in the folder that this copy of the code lives in."""
    found, waiting = set(), [Path(__file__).with_name("modeling_prism.py")]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            modules = _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8"))
            waiting += [path.parent / f"{module.replace('.', '/')}.py" for _, module, _ in modules]
    return sorted(found)


def published_name(path: Path) -> str:
    """What a code file is called in a draft's folder, where there are no subfolders: `kernels_x.py` for `kernels/x.py`."""
    return "_".join(path.relative_to(Path(__file__).parent).parts)


def published_code(path: Path) -> str:
    """A code file as it is published: its own text, with the names of flattened files in its import lines."""
    folders = "".join(f"{part}_" for part in path.relative_to(Path(__file__).parent).parts[:-1])

    def flattened(line: re.Match) -> str:
        return f"{line[1]}{folders}{line[2].replace('.', '_')}{line[3]}"

    return _RELATIVE_IMPORT.sub(flattened, path.read_text(encoding="utf-8"))


def write_published_files(folder: str | Path, loaded_from: str, revision: str | None) -> None:
    """Write a draft's code to a folder.

    Args:
        folder (`str` or `Path`): the draft's folder; files of the same name are replaced.
        loaded_from (`str`): folder or repository that the draft was loaded from, for what this copy of the code does
            not have; may be empty.
        revision (`str`, *optional*): of that repository.
    """
    for path in published_files():
        destination = Path(folder) / published_name(path)
        if path.resolve() != destination.resolve():
            destination.write_text(published_code(path), encoding="utf-8", newline="\n")
    for name in _OTHER_FILES:
        source = Path(__file__).parent / name
        if not source.is_file() and loaded_from:
            found = cached_file(loaded_from, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            source = Path(found) if found else source
        if source.is_file():
            _copy(source, Path(folder) / name)
        else:
            warnings.warn(f"{name} is not where this draft was loaded from; the saved draft lacks it", stacklevel=3)


def weights_sha256(source: str | Path, revision: str | None = None) -> str:
    """What a draft's weights are, bit for bit, in however many files they lie.

    Args:
        source (`str` or `Path`): the draft's folder or repository.
        revision (`str`, *optional*): of the repository.
    Returns:
        `str`: sha256 over the weights in the order of their names, each as its name, dtype, shape and bytes.
    Raises:
        OSError: if there are no safetensors weights.
    """

    def find(name: str, is_needed: bool = True) -> str | None:
        return cached_file(str(source), name, revision=revision, _raise_exceptions_for_missing_entries=is_needed)

    index = find(SAFE_WEIGHTS_INDEX_NAME, is_needed=False)
    if index is None:
        files = {"all": SAFE_WEIGHTS_NAME}
    else:
        files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(files.values())):
        tensors.update(load_state_dict(find(file)))
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve() != destination.resolve():
        shutil.copyfile(source, destination)
