"""Checks when a draft is loaded: its files fit each other and its sizes fit the memory, before memory is allocated."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..policy.settings import fill_in_tree_settings
from ..transformers_names import NO_ERROR_AT_ALL, commit_of, is_made_up
from .files import shard_names

# Arguments of from_pretrained() that say where to download from.
_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Weights listed in one error.
_MOST_NAMED = 100


def check_memory(config) -> None:
    """Refuse to create a draft, on torch's default device, whose weights exceed this machine's memory.

    Raises:
        ValueError: if they do, with the sizes.
    """
    if torch.get_default_device().type != "cpu":
        return
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # unknown on this system
        return
    needed = config.num_matrix_weights * torch.get_default_dtype().itemsize
    if needed > memory:
        raise ValueError(
            f"expected a configuration whose weights fit this machine's memory of {memory / 1e9:.0f} GB, got one of "
            f"{needed / 1e9:.0f} GB: num_processing_modules={config.num_processing_modules}, "
            f"num_layers_per_module={config.num_layers_per_module}, hidden_size={config.hidden_size}, "
            f"intermediate_size={config.intermediate_size}, vocab_size={config.vocab_size}"
        )


def check_headers(draft_class, source: str | os.PathLike, ignores_sizes: bool, **kwargs) -> None:
    """Compare the shapes in safetensors files with the configuration before weights are allocated.

    Args:
        draft_class (`type`): the class that is about to be loaded.
        ignores_sizes (`bool`): accept other shapes.
        kwargs: further arguments of `from_pretrained`.
    Raises:
        ValueError: as [`check_names_and_shapes`]; also if an index of shards names files elsewhere.
    """
    if str(source) and (index := Path(source, kwargs.get("subfolder") or "", SAFE_WEIGHTS_INDEX_NAME)).is_file():
        shard_names(index)  # transformers would follow it out of the folder
    if any(kwargs.get(name) for name in ("state_dict", "force_download", "variant", "gguf_file", "quantization_config")):
        return
    where = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if kwargs.get(name) is not None}
    config = kwargs.get("config")
    # isinstance() with our class would fail for a configuration of another copy of it.
    if config is None or isinstance(config, (str, os.PathLike)):
        config = draft_class.config_class.from_pretrained(source if config is None else config, **where)
    if getattr(config, "quantization_config", None) is not None:
        return
    found = _shapes_of(source, where)
    if found is None:  # weights of another form, or none: the loader has a message for that
        return
    check_shapes(draft_class, config, found, ignores_sizes)


def check_shapes(draft_class, config, found: dict[str, tuple[int, ...]], ignores_sizes: bool = False) -> None:
    """Compare the shapes of weights with a configuration.

    Args:
        draft_class (`type`): built on the meta device.
        config (`PrismConfig`): what it is built from.
        found (`dict`): shapes by name.
        ignores_sizes (`bool`): accept other shapes.
    Raises:
        ValueError: as [`check_names_and_shapes`].
    """
    modules = {name.split(".")[1] for name in found if name.startswith("processing_modules.")}
    # Compared before the modules are built.
    if len(modules) != config.num_processing_modules:
        raise ValueError(f"expected weights of {config.num_processing_modules} processing modules, got {len(modules)}")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in draft_class(config).state_dict().items()}
    same = expected.keys() & found.keys()
    check_names_and_shapes(
        expected.keys() - same,
        found.keys() - same,
        [] if ignores_sizes else [(name, found[name], expected[name]) for name in same if found[name] != expected[name]],
    )


def check_names_and_shapes(missing, unknown, other_shapes) -> None:
    """Refuse weights other than those which the configuration describes: a module with random weights would show only
    as low acceptance. `other_shapes` holds tuples of name, found shape and expected shape.

    Raises:
        ValueError: listing all of them.
    """
    wrong = [f"{name} is missing" for name in sorted(missing)]
    wrong += [f"{name} is unknown" for name in sorted(unknown)]
    wrong += [
        f"{name} has shape {tuple(found)} instead of {tuple(expected)}" for name, found, expected in sorted(other_shapes)
    ]
    if wrong:
        more = f"; and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
        raise ValueError(
            f"expected exactly the weights that the configuration describes, got: {'; '.join(wrong[:_MOST_NAMED])}{more}"
        )


def check_values(draft, source: str | os.PathLike) -> None:
    """Refuse NaN and infinity in the weights of a draft that was just loaded, and a draft vocabulary with ids outside
    the target's.

    Raises:
        ValueError: naming the first such tensor.
    """
    for name, tensor in draft.state_dict().items():
        if tensor.device.type == "meta" or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            continue
        # A sum is one pass without extra memory; a sum that overflows is checked again.
        if not tensor.sum(dtype=torch.float32).isfinite() and not (is_finite := tensor.isfinite()).all():
            raise ValueError(
                f"{name}: expected finite numbers, got NaN or infinity in {int((~is_finite).sum())} of {tensor.numel()} "
                f"(loaded from {source} in {tensor.dtype})"
            )
    ids = draft.draft_to_target
    if ids is not None and ids.device.type != "meta":
        size = draft.config.vocab_size
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise ValueError(
                f"draft_to_target: expected token ids of 0..{size - 1} (vocab_size={size}), got {int(ids.min())}.."
                f"{int(ids.max())} (loaded from {source})"
            )


def found_at(source: str | os.PathLike, **kwargs) -> tuple[str, dict]:
    """Where a draft's files are: the absolute path of its folder, or its repository; with those arguments of
    from_pretrained() that are needed to read them again, the exact commit as `revision`."""
    if not str(source):
        return "", {}
    if Path(source).is_dir():
        return str(Path(source).absolute()), {"subfolder": kwargs.get("subfolder") or ""}
    where = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if kwargs.get(name) is not None and name != "force_download"}
    config = cached_file(str(source), "config.json", **NO_ERROR_AT_ALL, **where)
    commit = commit_of(config) if config else None
    return str(source), where if commit is None else {**where, "revision": commit}


def complete_tree_settings(draft, source: str | os.PathLike, **kwargs) -> None:
    """Give a loaded draft the tree settings of its generation_config.json, and defaults for newer settings.

    Raises:
        OSError: if that file is missing or cannot be downloaded.
    """
    if is_made_up(draft.generation_config) and "generation_config" not in kwargs:
        # transformers makes one up if the file is missing or its download fails; loading it again raises the reason.
        where = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if name in kwargs}
        draft.generation_config = GenerationConfig.from_pretrained(source, **where)
    fill_in_tree_settings(draft.generation_config)


def _shapes_of(source, where: dict) -> dict[str, tuple[int, ...]] | None:
    """Shapes of weights by name from the headers of a draft's safetensors files; None if there are none, or damaged ones."""

    def find(name: str) -> str | None:
        try:
            return cached_file(str(source), name, **NO_ERROR_AT_ALL, **where)
        except OSError:
            raise
        except Exception as error:  # an interrupted download
            raise OSError(f"Can't load the model from {source}: expected the whole of {name}, got {error!r}") from error

    single = find(SAFE_WEIGHTS_NAME)
    index = find(SAFE_WEIGHTS_INDEX_NAME) if single is None else None
    files = [single] if index is None else [find(name) for name in shard_names(index)]
    found = [file for file in files if file is not None]
    try:
        return {name: shape for file in found for name, shape in header_shapes(file).items()} if found == files else None
    except (OSError, SafetensorError):
        return None


def header_shapes(file: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes of weights by name from the header of one safetensors file."""
    with safe_open(file, framework="pt") as stream:
        return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}
