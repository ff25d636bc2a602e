"""What a saved draft needs besides weights and configuration, so that it loads where this package is not installed.

A draft's folder holds the code itself: every file of this package that `modeling_prism.py` reaches by relative imports,
byte for byte, and `custom_generate/generate.py`. transformers runs them with `trust_remote_code=True`.
"""

import shutil
import warnings
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import cached_file

AUTO_MAP = {
    "AutoConfig": "configuration_prism.PrismConfig",
    "AutoModel": "modeling_prism.PrismDraftModel",
    "AutoModelForCausalLM": "modeling_prism.PrismDraftModel",
}
# Not reached by imports: they travel from the package, or from where a draft was loaded.
_OTHER_FILES = ("custom_generate/generate.py",)


def published_files() -> list[Path]:
    """The code files of a draft, in the folder that this copy of the code lives in."""
    modeling = Path(__file__).with_name("modeling_prism.py")
    return sorted({modeling, *map(Path, get_relative_import_files(modeling))})


def write_published_files(folder: str | Path, loaded_from: str, revision: str | None) -> None:
    """Write a draft's code to a folder.

    Args:
        folder (`str` or `Path`): the draft's folder; files of the same name are replaced.
        loaded_from (`str`): folder or repository that the draft was loaded from, for what this copy of the code does
            not have; may be empty.
        revision (`str`, *optional*): of that repository.
    """
    for path in published_files():
        _copy(path, Path(folder) / path.name)
    for name in _OTHER_FILES:
        source = Path(__file__).parent / name
        if not source.is_file() and loaded_from:
            found = cached_file(loaded_from, name, revision=revision, _raise_exceptions_for_missing_entries=False)
            source = Path(found) if found else source
        if source.is_file():
            _copy(source, Path(folder) / name)
        else:
            warnings.warn(f"{name} is not where this draft was loaded from; the saved draft lacks it", stacklevel=3)


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve() != destination.resolve():
        shutil.copyfile(source, destination)
