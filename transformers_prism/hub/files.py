"""What a saved draft needs besides weights and configuration, so that it loads where this package is not installed.

A draft's folder holds the code itself: every file of this package that `modeling_prism.py` reaches by relative imports,
and `custom_generate/generate.py`. transformers runs them with `trust_remote_code=True`. It follows relative imports
within one folder only, so `kernels/x.py` is published as `kernels_x.py`. The import lines that name it, such as
`from ..kernels.x import y`, are changed accordingly; nothing else is changed.

Licence, card, metrics and the target's tokenizer are saved with the code. A draft that was loaded without this package copies
them from where it was loaded.
"""

import contextlib
import functools
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, metadata_load
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..transformers_names import NO_ERROR_AT_ALL, NO_ERROR_IF_ABSENT
from ..whole_files import write_json

AUTO_MAP = {
    "AutoConfig": "configuration_prism.PrismConfig",
    "AutoModel": "modeling_prism.PrismDraftModel",
    "AutoModelForCausalLM": "modeling_prism.PrismDraftModel",
}
CARD, METRICS, TRAINING, ABOUT, LICENSE = "README.md", "metrics.json", "training.json", "about.json", "LICENSE"
KINDS = ("generate", "acceptance", "verify")  # of the measurements in metrics.json
DRAFT_VOCABULARY = "draft_to_target"  # token ids, the only tensor of a draft that is not a weight
# The final norm of the target that the draft was bound to when saved: vLLM hands a draft the last state before it.
FINAL_NORM = "target_final_norm.safetensors"
PLOT, CURVES = "conditional_acceptance.png", "curves.png"
# The folder of the code: the package, in which this file is one folder down, or a draft's own flat folder.
_CODE = next(folder for folder in Path(__file__).parents if (folder / "modeling_prism.py").is_file())
# Not reached by imports: copied from the package, or from where a draft was loaded.
_PACKAGE_FILES = (LICENSE, "custom_generate/generate.py", "custom_generate/requirements.txt")
# Files that describe one set of weights.
_WEIGHT_FILES = (CARD, METRICS, TRAINING, PLOT, CURVES)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)
# Licences that allow a target's tokenizer to be published with a draft.
OPEN_LICENSES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "isc", "unlicense")
# The user's name in a card until the draft is pushed.
PLACEHOLDER_USER = "user"
# Files of an earlier push that a later one removes. Files in other folders, and other weights, are the user's.
_REPLACED = (
    *(SAFE_WEIGHTS_NAME, "model-?????-of-?????.safetensors", SAFE_WEIGHTS_INDEX_NAME, FINAL_NORM),
    *("*.py", "custom_generate/*"),
)
_RELATIVE_IMPORT = re.compile(r"^([ \t]*from )(\.+)([\w.]+)( import )", flags=re.MULTILINE)


def published_files() -> list[Path]:
    """The code files of a draft, in the folder that this copy of the code lives in."""
    found, waiting = set(), [_CODE / "modeling_prism.py"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [_imported(path, line) for line in _RELATIVE_IMPORT.finditer(path.read_text(encoding="utf-8"))]
    return sorted(found)


def _imported(path: Path, line: re.Match) -> Path:
    """The file that a relative import in a file names: one dot is its own folder, two are the one above."""
    return path.parents[len(line[2]) - 1] / f"{line[3].replace('.', '/')}.py"


def published_name(path: Path) -> str:
    """What a code file is called in a draft's folder, where there are no subfolders: `kernels_x.py` for `kernels/x.py`."""
    return "_".join(path.relative_to(_CODE).parts)


def published_code(path: Path) -> str:
    """A code file as it is published: its own text, with the names of flattened files in its import lines."""

    def flattened(line: re.Match) -> str:
        return f"{line[1]}.{published_name(_imported(path, line)).removesuffix('.py')}{line[4]}"

    return _RELATIVE_IMPORT.sub(flattened, path.read_text(encoding="utf-8"))


def code_files() -> dict[str, bytes]:
    """The code of a draft's repository and its requirements, by file name; only the package has all of them.

    Raises:
        OSError: if this is the copy of the code that a draft carries.
    """
    files = {published_name(path): published_code(path).encode() for path in published_files()}
    return files | {name: (_CODE / name).read_bytes() for name in _PACKAGE_FILES if name != LICENSE}


def is_named_by(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file of a repository matches one of these patterns; `*` does not match into other folders."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def write_published_files(
    folder: str | Path, find: Callable[[str], Path | None], target_name: str | None,
    write_card: Callable[[Path], object] | None = None, about: dict | None = None
) -> None:
    """Add to a draft's weights and configurations what a repository needs; a warning names what is missing.

    Args:
        folder (`str` or `Path`): the draft's folder; files of the same name are replaced, except those that describe these
            very weights.
        find (`Callable`): returns a file by name from where the draft was loaded, None if it is not there.
        target_name (`str`, *optional*): folder or repository of the target, whose tokenizer is added if its card names
            a licence that allows it.
        write_card (`Callable`, *optional*): writes card and metrics into a folder whose weights are new, or raises
            ValueError; only the package has it.
        about (`dict`, *optional*): content of about.json for a draft that has none.
    """
    folder = Path(folder)
    for path in published_files():
        destination = folder / published_name(path)
        if path.resolve() != destination.resolve():
            destination.write_text(published_code(path), encoding="utf-8", newline="\n")
    absent = []
    for name in _PACKAGE_FILES:
        if not _copy(_package_file(name) or find(name), folder / name):
            absent.append(name)
    weights = weights_sha256(folder) if weight_files(folder) else None  # else saved as a variant, under other names
    here = _metrics_of(folder / METRICS)
    is_described = weights is not None and here.get("weights_sha256") == weights
    _copy(find(FINAL_NORM), folder / FINAL_NORM)
    if not (is_described and (folder / ABOUT).is_file()) and not _copy(find(ABOUT), folder / ABOUT) and about is not None:
        write_json(folder / ABOUT, about)
    if not _copy_tokenizer(find, folder) and target_name:
        _add_tokenizer_of(target_name, folder)
    if not (is_described and _has_figures(here) and (folder / CARD).is_file()):
        absent += [CARD, METRICS] if weights is None else _describe(folder, weights, find, write_card)
    if absent:
        warnings.warn(
            f"the saved draft lacks {', '.join(absent)}: where this draft was loaded from they are absent or describe "
            "other weights",
            stacklevel=3,
        )


def _describe(folder: Path, weights: str, find: Callable[[str], Path | None], write_card: Callable | None) -> list[str]:
    """Add card and metrics: those from where the draft was loaded if its weights are unchanged, else new ones, which only
    the package can write. Returns the names of those that are missing."""
    found = {name: find(name) for name in _WEIGHT_FILES}
    metrics = _metrics_of(found[METRICS])
    # A card without figures describes the weights in its own folder.
    described = metrics.get("weights_sha256") if found[METRICS] else _weights_beside(found[CARD])
    if described == weights:
        return [name for name in _WEIGHT_FILES if not _copy(found[name], folder / name) and name == CARD]
    if write_card is None:
        return [CARD, METRICS]
    try:
        write_card(folder)
    # Other files of the folder may be unusable in any way.
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return [f"{CARD} ({error})", METRICS]
    lost = [f"the measurements of {METRICS}"] if _has_figures(metrics) or (found[METRICS] and not metrics) else []
    return lost + [name for name in (TRAINING, CURVES) if found[name] and not (folder / name).is_file()]


def _metrics_of(path: Path | None) -> dict:
    """What a metrics.json holds; nothing if it is not there or damaged."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
        return content if isinstance(content, dict) else {}
    return {}


def _has_figures(metrics: dict) -> bool:
    return any(metrics.get(kind) for kind in KINDS)


def _weights_beside(card: Path | None) -> str | None:
    """The hash of the weights in a card's folder; None where there are none."""
    with contextlib.suppress(OSError, ValueError):
        return weights_sha256(card.parent) if card else None
    return None


def _package_file(name: str) -> Path | None:
    """A file of the package; its licence is one folder up in a clone, and with the metadata of an installed package."""
    candidates = [_CODE / name]
    if name == LICENSE and (_CODE / "hub").is_dir():
        candidates += [_CODE.parent / name, *_CODE.parent.glob(f"transformers_prism-*.dist-info/licenses/{name}")]
    return next((path for path in candidates if path.is_file()), None)


def find_file(source: str | Path, name: str, **where) -> Path | None:
    """A file of a folder or repository, downloaded if necessary; None if there is none. `where` are arguments of the
    download, such as `revision`."""
    if not str(source):
        return None
    try:
        found = cached_file(str(source), name, **NO_ERROR_AT_ALL, **where)
    except (OSError, ValueError):  # the folder or repository is gone
        return None
    return None if found is None else Path(found)


def _copy_tokenizer(find: Callable[[str], Path | None], folder: Path) -> bool:
    copied = [_copy(find(name), folder / name) for name in TOKENIZER_FILES]
    return any(copied)


def _add_tokenizer_of(target_name: str, folder: Path) -> None:
    """Copy the target's tokenizer if the target's card names a licence that allows it; else warn how to add it."""
    # A GGUF file has no card.
    name = None if target_name.endswith(".gguf") else card_license(find_file(target_name, CARD))
    if name not in OPEN_LICENSES:
        warnings.warn(
            f"left out the tokenizer of {target_name}: "
            + (f"its licence is {name}" if name else "no licence of it is known")
            + ". If you may publish it, add it to the draft with tokenizer.save_pretrained(FOLDER); later saves of a draft "
            "that is loaded from there include it",
            stacklevel=4,
        )
    elif not _copy_tokenizer(functools.partial(find_file, target_name), folder):
        warnings.warn(f"left out the tokenizer of {target_name}: no files of one were found there", stacklevel=4)


def card_license(card: Path | None) -> str | None:
    """The licence in a card's metadata; None without one, or without a readable card."""
    # The errors of YAML come from a package that need not be imported here.
    with contextlib.suppress(Exception):
        name = (metadata_load(card) or {}).get("license") if card else None
        return name if isinstance(name, str) else None
    return None


def upload(
    folder: str | Path, repo_id: str, tags: list[str] | None, private: bool | None, token, loaded_from: str = "",
    **commit
) -> CommitInfo:
    """Upload a draft's folder to the Hub in one commit; a missing repository is created.

    Args:
        folder (`str` or `Path`): of [`write_published_files`]; its card's code gets the repository's name.
        tags (`list[str]`, *optional*): added to those of the card.
        loaded_from (`str`): folder or repository that the draft was loaded from, whose name its card may contain.
        commit: `revision`, `create_pr`, `commit_message` and `commit_description` of the commit.
    Raises:
        HfHubHTTPError: if the Hub refuses; the repository then holds what it held before.
        OSError: if the weights cannot be uploaded, with the reason; the repository is unchanged then, too.
        ValueError: if the Hub does not take the card's metadata.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if commit.get("revision") and not commit["revision"].startswith("refs/pr"):
        api.create_branch(repo_id, branch=commit["revision"], exist_ok=True)
    path = Path(folder) / CARD
    if path.is_file():
        text = _renamed(path.read_text(encoding="utf-8"), loaded_from, repo_id)
        path.write_text(_with_tags(text, tags) if tags else text, encoding="utf-8", newline="\n")
    # One commit: whoever loads the repository meanwhile gets the old draft or the new one.
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    there = set(api.list_repo_files(repo_id, revision=commit.get("revision")))
    left_over = [name for name in sorted(there - set(files)) if is_named_by(name, _REPLACED)]
    operations = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    try:
        return api.create_commit(repo_id, [*operations, *map(CommitOperationDelete, left_over)], **commit)
    except RuntimeError as error:  # from the upload of a large file; its cause has the reason
        reason = " ".join(str(error.__cause__ or error).split())
        raise OSError(f"{repo_id} holds what it held before. {error} {reason}") from error


def _renamed(text: str, loaded_from: str, repo_id: str) -> str:
    """A card whose code loads the draft from `repo_id` instead of a placeholder or its former repository."""
    # Arguments only: prose may name a "user/assistant" pair, or the repository that the draft was made from.
    arguments = rf'(?<=[(=])"({PLACEHOLDER_USER}/[^"/]+|{re.escape(loaded_from or repo_id)})"'
    return re.sub(arguments, f'"{repo_id}"', text)


def _with_tags(text: str, tags: list[str]) -> str:
    """A card with more tags in its metadata."""
    try:
        card = ModelCard(text)
    except Exception as error:  # the errors of YAML come from a package that need not be imported here
        raise ValueError(f"expected a card with metadata in YAML, got {error}") from error
    card.data["tags"] = [*dict.fromkeys([*(card.data.get("tags") or []), *tags])]
    return str(card)


def weight_files(folder: str | Path) -> dict[str, tuple]:
    """Which forms of weights a folder has (one file, an index of shards), with inode, time and size to detect a later write."""
    found = {name: Path(folder) / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)}
    stats = {name: path.stat() for name, path in found.items() if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def remove_outdated_weights(folder: str | Path, before: dict[str, tuple]) -> None:
    """After saving, remove the other form of weights if it was there `before`; transformers leaves it next to the new one."""
    now = weight_files(folder)
    outdated = [name for name, file in now.items() if before.get(name) == file]
    if len(outdated) < len(now):  # else nothing was saved under these names
        for name in outdated:
            (Path(folder) / name).unlink()


def weights_sha256(source: str | Path, revision: str | None = None) -> str:
    """A hash of a draft's weights, in a folder or repository, that does not depend on how they are split into files:
    sha256 over the weights in the order of their names, each as its name, dtype, shape and bytes.

    Raises:
        OSError: if there are no safetensors weights.
        ValueError: if a file is damaged, or an index names files elsewhere.
    """

    def find(name: str, is_needed: bool = True) -> str | None:
        return cached_file(str(source), name, revision=revision, **({} if is_needed else NO_ERROR_IF_ABSENT))

    # As transformers looks for them.
    index = None if find(SAFE_WEIGHTS_NAME, is_needed=False) else find(SAFE_WEIGHTS_INDEX_NAME, is_needed=False)
    tensors: dict[str, torch.Tensor] = {}
    for name in [SAFE_WEIGHTS_NAME] if index is None else shard_names(index):
        file = find(name)
        try:
            tensors.update(load_state_dict(file))
        # The reader's errors come from a package that need not be imported here.
        except Exception as error:
            raise ValueError(f"{file}: expected a whole safetensors file, got {error}") from error
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def shard_names(index: str | Path) -> list[str]:
    """The files that an index of safetensors shards names, in order.

    Raises:
        ValueError: if it is not such an index, or names anything but safetensors files in its folder.
    """
    try:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        are_safe = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a weight_map that names files, got {error!r}") from error
    if not names or not are_safe:
        raise ValueError(f"{index}: expected names of safetensors files in its folder, got {sorted(names)}")
    return sorted(names)


def _copy(source: Path | None, destination: Path) -> bool:
    """Copy a file if there is one; returns whether there was."""
    if source is None:
        return False
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.resolve() != destination.resolve():
        shutil.copyfile(source, destination)
    return True
