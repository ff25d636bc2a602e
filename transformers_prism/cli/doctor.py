"""What `doctor` finds: whether drafts work on this machine with this target, and what they can be expected to gain."""

import importlib.metadata
import itertools
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from rich.table import Table
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from transformers_prism.bench.methods import can_be_packed, random_draft
from transformers_prism.cli.demo import PROMPTS, SHIPPED_DRAFT, chat_inputs, compare, leave_beams, load_draft
from transformers_prism.cli.options import EXTRAS
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.kernels.packed_linear import why_no_packed_linear
from transformers_prism.policy.costs import costs_path
from transformers_prism.target import (
    HUB_TIMEOUT_SECONDS,
    check_folder,
    find_device,
    hub_answers,
    load_target,
    num_parameters,
    read_target_config,
)
from transformers_prism.training.data.templates import between_turns
from transformers_prism.transformers_names import name_of
from transformers_prism.tried_releases import TRIED_TRANSFORMERS, untried_release

_GIB = 2**30
_STYLES = {"ok": "green", "note": "yellow", "fails": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the table; `state` is "ok", "note" (works, but see the text) or "fails"."""

    name: str
    state: str
    text: str


def examine(
    target: str | None, draft: str | None, max_new_tokens: int, packed: bool, device: str = "auto", dtype: str = "float32"
) -> Iterator[Finding]:
    """All that `doctor` finds, one after the other; models are loaded only if no earlier check failed.

    Args:
        target (`str`, *optional*), draft (`str`, *optional*): names; for a target without a draft an untrained one is tried.
        max_new_tokens (`int`): of the trial.
        packed (`bool`), device (`str`), dtype (`str`): as for [`load_pair`].
    """
    place, found = find_device(device), []
    for one in itertools.chain(machine_findings(), target_findings(target)):
        found.append(one)
        yield one
    if not has_failed(found):
        yield from trial_findings(target, draft, max_new_tokens, packed, place, getattr(torch, dtype))


def has_failed(findings: list[Finding]) -> bool:
    """Whether any finding failed."""
    return any(one.state == "fails" for one in findings)


def findings_table(findings: list[Finding]) -> Table:
    """Findings as a table, whose columns are as wide for one finding as for all."""
    table = Table.grid(padding=(0, 2))
    for width in (13, 5, None):
        table.add_column(width=width, overflow="fold")
    for one in findings:
        table.add_row(one.name, f"[{_STYLES[one.state]}]{one.state}[/]", one.text.replace("[", r"\["))
    return table


def machine_findings() -> Iterator[Finding]:
    """Versions, threads, disk, and whether the Hub answers."""
    names = ("transformers_prism", "torch", "transformers", "huggingface_hub")
    untried = untried_release()
    tried = untried or f"tried with transformers {TRIED_TRANSFORMERS[0]} to {TRIED_TRANSFORMERS[1]}"
    yield Finding("versions", "note" if untried else "ok", ", ".join(f"{name} {_version(name)}" for name in names) + f"; {tried}")
    missing = [extra for extra, packages in EXTRAS.items() if not all(map(_version, packages))]
    extras = f"without {', '.join(missing)}; in a clone: pip install -e '.[{','.join(missing)}]'" if missing else "all installed"
    yield Finding("extras", "note" if "train" in missing else "ok", extras)
    yield _threads()
    yield _few_rows()
    home = next(path for path in (Path(constants.HF_HOME), *Path(constants.HF_HOME).parents) if path.exists())
    free = shutil.disk_usage(home).free / _GIB
    yield Finding("disk", "ok" if free > 2 else "note", f"{free:.1f} GiB free at {home}")
    without_hub = "only models on this machine can be loaded"
    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "note", f"offline by HF_HUB_OFFLINE: {without_hub}")
    elif hub_answers():
        yield Finding("Hub", "ok", "answers")
    else:
        yield Finding("Hub", "note", f"does not answer within {HUB_TIMEOUT_SECONDS:g} s: {without_hub}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    device = find_device()
    text = f"{threads} threads on {cores} cores; " + ("no accelerator" if device.type == "cpu" else f"accelerator {device}")
    if threads > cores:
        return Finding("threads", "note", f"{text}. More threads than cores wait for each other: set OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", text)


def _few_rows() -> Finding:
    """Whether forwards over a few tokens can be as fast on this CPU as they get."""
    reason = why_no_packed_linear()
    if reason is None:
        return Finding("CPU kernel", "ok", "compiled: prepare_for_cpu makes forwards over a few tokens cost little more than one")
    return Finding("CPU kernel", "note", f"prepare_for_cpu takes torch's products, which cost more for a few tokens: {reason}")


def target_findings(name: str | None, chat_template: str | None = None) -> list[Finding]:
    """What can be said of a target before its weights are loaded: configuration, memory, tokenizer, chat template.

    Args:
        name (`str`, *optional*): as for [`load_target`]; for the demo target and for GGUF files nothing is known yet.
        chat_template (`str`, *optional*): to use in place of the tokenizer's own.
    """
    if name is None or str(name).endswith(".gguf"):
        return [Finding("target", "ok", f"{name or 'the demo target'}, whose tokenizer is read with its weights")]
    try:
        check_folder(name)
        found = read_target_config(name)
        config, tokenizer = found if found and found[1] else (AutoConfig.from_pretrained(name), _load_tokenizer(name))
        memory = _memory(config)
    except (OSError, ValueError) as error:
        return [Finding("target", "fails", " ".join(str(error).split()))]
    findings = [Finding("target", "ok", f"{name}, {config.model_type}"), memory]
    if tokenizer is None:
        findings.append(Finding("tokenizer", "fails", f"expected the files of a tokenizer in {name}, got none"))
        return findings
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return [*findings, *tokenizer_findings(tokenizer, config.get_text_config().vocab_size)]


def _load_tokenizer(name: str):
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        return None


def _memory(config: PreTrainedConfig) -> Finding:
    needed = 4 * num_parameters(config) / _GIB
    text = f"the target's weights take {needed:.1f} GiB in float32, half of that in bfloat16, twice as much packed for the CPU"
    free = _free_memory()
    if free is None:
        return Finding("memory", "ok", text)
    return Finding("memory", "ok" if 2 * needed < free else "note", f"{text}; {free:.1f} GiB free")


def _free_memory() -> float | None:
    """GiB of available memory; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / _GIB
    except (OSError, StopIteration):
        return None


def tokenizer_findings(tokenizer, vocab_size: int) -> list[Finding]:
    """Whether the vocabularies fit, and whether the chat template can be taken apart, as training data needs it."""
    added = tokenizer.get_added_vocab()
    # Tokens such as those that stand for images may have no row where the model was published without their part.
    fits = all(index < vocab_size for token, index in tokenizer.get_vocab().items() if token not in added)
    num_over = sum(index >= vocab_size for index in added.values())
    text = f"{len(tokenizer)} tokens, the model has {vocab_size}" + ("" if fits else "; expected no more than that")
    text += f", none for {num_over} special tokens" if fits and num_over else ""
    findings = [Finding("tokenizer", "ok" if fits else "fails", text)]
    try:
        between_turns(tokenizer)
    # A template is a program and may fail in any way.
    except Exception as error:
        remedy = "decoding works; `make-draft` needs --chat-template FILE, or --format text for a base model"
        return [*findings, Finding("chat template", "note", f"{' '.join(str(error).split())}; {remedy}")]
    return [*findings, Finding("chat template", "ok", "writes user and assistant turns once each")]


def trial_findings(
    target_name: str | None, draft_name: str | None, max_new_tokens: int, packed: bool, device: torch.device, dtype: torch.dtype
) -> Iterator[Finding]:
    """Load both models, decode one prompt with and without the draft, and report what generate() recorded."""
    try:
        target, tokenizer = load_target(target_name, dtype)
        target.to(device)
    except (ImportError, OSError, ValueError) as error:
        yield Finding("target", "fails", " ".join(str(error).split()))
        return
    if note := leave_beams(target):
        yield Finding("settings", "note", note)
    if target_name is None or str(target_name).endswith(".gguf"):
        yield from tokenizer_findings(tokenizer, target.config.get_text_config().vocab_size)
    if target_name is None and draft_name is None and (SHIPPED_DRAFT / "config.json").is_file():
        draft_name = str(SHIPPED_DRAFT)
    try:
        draft = load_draft(draft_name, target) if draft_name else random_draft(target, 2, {"tree": "auto"}).bind(target)
    except (OSError, ValueError) as error:
        yield Finding("draft", "fails", " ".join(str(error).split()))
        return
    yield _fingerprint(draft, draft_name, target, tokenizer)
    if packed and can_be_packed(device, dtype):
        prepare_for_cpu(target, draft)
    inputs = chat_inputs(tokenizer, PROMPTS[0], target.device)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    with warnings.catch_warnings():
        if draft_name is None:
            warnings.filterwarnings("ignore", "the draft hardly helped")  # an untrained draft is not expected to help
        compare(target, draft, inputs, {**settings, "max_new_tokens": 8})  # warm-up, and the calibration
        result = compare(target, draft, inputs, settings)
    speculation = draft.last_speculation
    assert speculation is not None, "generate() leaves what it did"
    yield _way_of_verifying(speculation)
    yield _calibration(speculation, costs_path(target, draft, 1))
    if result.is_identical:
        yield Finding("same output", "ok", f"{result.num_tokens} tokens")
    else:
        text = "the text differs with the draft; in float32 this is an error: run `transformers-prism verify`"
        yield Finding("same output", "fails" if target.dtype == torch.float32 else "note", text)
    if draft_name is None:
        return
    plain, drafted = result.num_tokens / result.plain_seconds, result.num_tokens / result.draft_seconds
    text = f"{drafted / plain:.2f} times plain decoding ({plain:.1f} to {drafted:.1f} tokens/s), one prompt"
    text += f", tau {speculation.acceptance_length:.2f}" if any(speculation.num_rounds) else ", answered without a round"
    reason = speculation.why_plain_steps()
    yield Finding("expected gain", "ok" if drafted > plain else "note", text + (f"; {reason}" if reason else ""))


def _fingerprint(draft, draft_name: str | None, target, tokenizer) -> Finding:
    if draft_name is None:
        return Finding("draft", "note", f"none named: an untrained one is tried with {name_of(target.config) or 'the target'}")
    fatal, mild = draft.config.target_differences(target.config, tokenizer)
    text = "; ".join([*fatal, *mild]) or "was made for this target"
    return Finding("draft", "fails" if fatal else "note" if mild else "ok", text)


def _way_of_verifying(speculation) -> Finding:
    """How the target verified, from the statistics of the call."""
    if speculation.declined:
        return Finding("verifies", "fails", f"no drafts, decoding is plain: {speculation.declined}")
    if speculation.stopped_drafting:
        return Finding("verifies", "fails", f"no drafts after a failed check: {speculation.stopped_drafting}")
    if speculation.why_no_tree:
        return Finding("verifies", "note", f"chains, no trees: {speculation.why_no_tree}")
    return Finding("verifies", "ok", f"{speculation.target}s")


def _calibration(speculation, path: Path) -> Finding:
    if not speculation.estimates:
        return Finding("calibration", "ok", "not needed: the draft's trees are fixed")
    costs = speculation.estimates
    small = min(3, len(costs["num_tokens"]) - 1)
    ratio = costs["verify_seconds"][small] / costs["verify_seconds"][0]
    step = costs["step_seconds"] / costs["verify_seconds"][0]
    text = f"a forward over {costs['num_tokens'][small]} tokens costs {ratio:.2f} plain steps, a draft step {step:.2f}"
    if path.is_file():
        return Finding("calibration", "ok", f"{text}; kept in {path}")
    return Finding("calibration", "note", f"{text}; not kept, since the machine was busy. Run this again when it is not")
