"""What a draft is, without running it: its target, modules, sizes, and the bytes that a draft step reads.

Bytes count each weight that a draft step or a target forward reads, in the dtype that both run in. Keys, values and single
rows of embeddings are not counted.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.hub.files import METRICS
from transformers_prism.hub.loading import check_shapes
from transformers_prism.hub.metrics import read_metrics
from transformers_prism.hub.weight_headers import WeightHeaders, read_weight_headers
from transformers_prism.kernels.dispatch import dtype_name
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.policy.settings import fill_in_tree_settings
from transformers_prism.target import auto_class, naming, read_target_config
from transformers_prism.transformers_names import output_embeddings
from transformers_prism.whole_files import read_json


@dataclass(frozen=True)
class Inspection:
    """A draft, and its target if that is on this machine.

    Attributes:
        name (`str`): folder or repository.
        folder (`Path`): its files on this machine.
        config (`PrismConfig`): its architecture.
        generation_config (`GenerationConfig`): its trees.
        headers (`WeightHeaders`): its weights.
        target_config (`PreTrainedConfig`, *optional*): the target's, if it is on this machine.
        fatal (`list[str]`): why this target cannot be used with it.
        mild (`list[str]`): why fewer tokens may be accepted.
        dtype (`torch.dtype`): that bytes are counted in: the target's, or the draft's own if the target is not here.
    """

    name: str
    folder: Path
    config: PrismConfig
    generation_config: GenerationConfig
    headers: WeightHeaders
    target_config: PreTrainedConfig | None
    fatal: list[str]
    mild: list[str]
    dtype: torch.dtype

    def step_bytes(self, draft_step: int) -> int:
        """Bytes of weights that a draft step reads: its module, the head's rows, and in step 0 the fusion layer."""
        count = self.headers.num_parameters(f"processing_modules.{self.config.module_of_step(draft_step)}.", "norm.")
        count += self.config.num_draft_tokens * self.config.hidden_size
        if draft_step == 0:
            count += self.headers.num_parameters("fusion_layer.")
        return count * self.dtype.itemsize

    def target_bytes(self) -> int | None:
        """Bytes of weights that a forward of the target reads: all but an embedding that is not also the head; None if
        the target is not known, or is no text-generation model."""
        if self.target_config is None:
            return None
        try:
            with torch.device("meta"):
                target = auto_class(self.target_config).from_config(self.target_config)
        except ValueError:
            return None
        count = sum(parameter.numel() for parameter in target.parameters())
        embedding, head = target.get_input_embeddings(), output_embeddings(target)
        if head is not None and head.weight is not embedding.weight:
            count -= embedding.weight.numel()
        return count * self.dtype.itemsize

    def rows(self) -> list[tuple[str, str]]:
        """Name and text of each line that a terminal shows."""
        config, tree = self.config, self.generation_config
        steps = [f"step {step}: {_megabytes(self.step_bytes(step))}" for step in range(len(config.draft_step_to_module))]
        forward = self.target_bytes()
        if forward is not None:
            share = 100 * self.step_bytes(len(steps) - 1) / forward
            steps.append(f"the last {share:.1f} % of a target forward")
        vocabulary = f"{config.num_draft_tokens} of {config.vocab_size} tokens"
        return [
            ("draft", f"{self.name}, form {config.module_form}, context_kv {config.context_kv}"),
            ("target", self._target_name()),
            ("target here", self._target_here()),
            (
                "modules",
                f"M = {config.num_processing_modules} of {config.num_layers_per_module} layer(s), width "
                f"{config.hidden_size}; draft steps use {_joined(config.draft_step_to_module)}",
            ),
            ("reads", f"hidden states {_joined(config.target_layer_ids)} of the target; {_seen(config)}"),
            ("proposes", vocabulary),
            (
                "weights",
                f"{self.headers.num_parameters() / 1e6:.2f} million parameters, {_megabytes(self.headers.num_bytes)} in "
                f"{len(self.headers.file_bytes)} file(s), {dtype_name(config.dtype)}",
            ),
            ("tree", f"{tree.tree}, at most {tree.tree_num_nodes} nodes, top-k {tree.tree_top_k}, depth {tree.tree_depth}"),
            (f"bytes of a draft step, {dtype_name(self.dtype)}", "; ".join(steps)),
            (f"bytes of a target forward, {dtype_name(self.dtype)}", "not known" if forward is None else _megabytes(forward)),
            ("code", self._code()),
        ]

    def _code(self) -> str:
        """Where the code is that `trust_remote_code=True` would run."""
        names = set((self.config.auto_map or {}).values())
        if elsewhere := sorted({name.split("--")[0] for name in names if "--" in name}):
            return f"auto_map points elsewhere: {_joined(elsewhere)}"
        files = {f"{name.split('.')[0]}.py" for name in names}
        if names and all((self.folder / file).is_file() for file in files):
            return "in its folder; loads without this package with trust_remote_code=True"
        return "none in its folder; load it with this package installed (`push` and `save_pretrained` add the code)"

    def _target_name(self) -> str:
        fingerprint = self.config.target_fingerprint or {}
        parts = [fingerprint.get("name") or "not named"]
        parts += [f"revision {fingerprint['revision']}"] if fingerprint.get("revision") else []
        layers = fingerprint.get("num_hidden_layers")
        parts += [f"{layers} layers"] if layers else []
        return ", ".join([*parts, f"width {self.config.target_hidden_size}", f"vocabulary of {self.config.vocab_size}"])

    def _target_here(self) -> str:
        if self.target_config is None:
            return "not on this machine; name one with --target"
        if self.fatal:
            return "does NOT match: " + "; ".join(self.fatal)
        return "matches" if not self.mild else "works, but may accept less: " + "; ".join(self.mild)


def inspect_draft(source: str | Path, target_name: str | None = None, revision: str | None = None) -> Inspection:
    """Read what a draft is, and compare it with its target on this machine.

    Args:
        source (`str` or `Path`): folder or repository of the draft; a repository is downloaded.
        target_name (`str`, *optional*): folder, or name on the Hub, of a target on this machine; the one that the draft
            was made for if absent. Its weights are not needed.
        revision (`str`, *optional*): of the draft's repository.
    Returns:
        `Inspection`: of both.
    Raises:
        OSError: if there is no such draft.
        ValueError: if it is no PRISM draft, is damaged, or the named target is not here.
    """
    folder = draft_folder(source, revision)
    config = _read_config(folder)
    headers = read_weight_headers(folder)
    check_shapes(PrismDraftModel, config, headers.shapes)
    name = target_name or (config.target_fingerprint or {}).get("name")
    found = read_target_config(name) if name else None
    if found is None and target_name is not None:
        raise ValueError(f"target: expected a folder, or a name on the Hub, of a model on this machine, got {target_name}")
    target_config, tokenizer = found or (None, None)
    fatal, mild = config.target_differences(target_config, tokenizer) if found else ([], [])
    dtype = (config if target_config is None else target_config).dtype or torch.float32
    generation_config = GenerationConfig.from_pretrained(folder)
    fill_in_tree_settings(generation_config)  # as loading the draft does
    return Inspection(str(source), folder, config, generation_config, headers, target_config, fatal, mild, dtype)


def draft_folder(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a draft, downloaded if it is a repository and not here.

    Raises:
        OSError: if there is no such folder or repository.
        ValueError: if it is no PRISM draft; nothing but its config.json is downloaded then.
    """
    file = Path(source) / "config.json"
    if not Path(source).is_dir():
        with naming("draft", str(source)):
            file = Path(cached_file(str(source), "config.json", revision=revision))
    kind = read_json(file).get("model_type")
    if kind != PrismConfig.model_type:
        raise ValueError(f"{source}: expected a draft of model type {PrismConfig.model_type!r}, got {kind!r}")
    return Path(source) if Path(source).is_dir() else Path(snapshot_download(str(source), revision=revision))


def verify_files(source: str | Path, revision: str | None = None) -> str:
    """Check every byte of a draft: a repository's files against the Hub's hashes, and weights against the hash in
    metrics.json.

    Args:
        source (`str` or `Path`): folder or repository.
        revision (`str`, *optional*): of the repository.
    Returns:
        `str`: what was compared.
    Raises:
        OSError: if the Hub does not answer.
        ValueError: naming the files whose bytes differ, or if there is nothing to compare with.
    """
    folder = draft_folder(source, revision)
    compared = []
    if not Path(source).is_dir():
        result = HfApi().verify_repo_checksums(str(source), revision=folder.name)
        wrong = [f"{one['path']} ({one['algorithm']} {one['actual']}, not {one['expected']})" for one in result.mismatches]
        if wrong or result.missing_paths:
            raise ValueError(
                f"{source}: expected the bytes that the repository records, got others in {_joined(wrong) or 'none'}; "
                f"missing: {_joined(result.missing_paths) or 'none'}. Load again with force_download=True"
            )
        compared.append(f"{result.checked_count} files have the bytes that the repository records at {folder.name}")
    if (folder / METRICS).is_file():
        compared.append(f"the weights are those that {METRICS} names, {read_metrics(folder)['weights_sha256']}")
    if not compared:
        raise ValueError(f"expected {METRICS} in {folder} to compare the weights with, got none")
    return "; ".join(compared)


def _read_config(folder: Path) -> PrismConfig:
    try:
        return PrismConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"


def _seen(config) -> str:
    """How far the draft's attention reaches."""
    return "all positions" if config.sliding_window is None else f"the last {config.sliding_window} positions"


def _joined(values) -> str:
    return ", ".join(map(str, values))


__all__ = ["Inspection", "draft_folder", "inspect_draft", "verify_files"]
