"""The draft that training begins with: its architecture, its draft vocabulary and its initial weights."""

import json
import logging
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from transformers_prism.configuration_prism import PrismConfig, target_fingerprint
from transformers_prism.hub.files import TRAINING, find_file
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import naming
from transformers_prism.training.data.conversations import Conversation
from transformers_prism.training.recipes import TrainConfig, has_own_num_modules, plan_stages
from transformers_prism.training.warm_start import warm_start, with_modules

logger = logging.getLogger(__name__)
_DRAFT_VOCAB_SIZE = 8192  # of a new draft
# What a draft that training starts from passes on, and no option sets.
_INHERITED = (
    "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim hidden_act rms_norm_eps rope_parameters "
    "attention_bias mlp_bias projection_bias share_target_embedding share_target_head embedding_scale normalize_target_hidden "
    "target_norm query_key_norm norm_before_residual norm_output"
).split()


def frequent_tokens(conversations: list[Conversation], size: int) -> tuple[torch.Tensor, float]:
    """The `size` most frequent tokens of the answers, in increasing order, and the share of answer tokens that they cover,
    in 0..1. If the data has fewer tokens, the smallest unused ids fill the rest."""
    counts = _answer_tokens(conversations)
    total = counts.total()
    # Tokens of the prompts rank after all answer tokens, and ids that never occur rank last.
    for conversation in conversations:
        counts.update(dict.fromkeys(conversation.input_ids, 0))
    chosen = dict(counts.most_common(size))
    covered = sum(chosen.values())
    unused = (token for token in range(size + len(chosen)) if token not in chosen)
    tokens = sorted([*chosen, *(next(unused) for _ in range(size - len(chosen)))])
    return torch.tensor(tokens), covered / total


def token_coverage(conversations: list[Conversation], tokens: torch.Tensor) -> float:
    """Share of the answers' tokens that are among `tokens` `(n,)`, in 0..1."""
    counts = _answer_tokens(conversations)
    return sum(counts[token] for token in tokens.tolist()) / counts.total()


def _answer_tokens(conversations: list[Conversation]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for conversation in conversations:
        for start, end in conversation.assistant_spans:
            counts.update(conversation.input_ids[start:end])
    return counts


def source_config(config: TrainConfig) -> PrismConfig | None:
    """The architecture of the draft that a run starts from, if there is one; reads no weights."""
    if not config.init_from:
        return None
    with naming("draft", config.init_from):
        return PrismConfig.from_pretrained(config.init_from)


def make_draft_config(config: TrainConfig, target, tokenizer) -> PrismConfig:
    """The architecture of the finished draft, for a target or its configuration; the tokenizer is for the fingerprint.

    Without stage split a draft keeps its initial number of modules, whatever number the recipe names.

    Raises:
        ValueError: if the draft to start from has more modules than the finished one, if the run asks for more modules
            than its stages make, or other layers than it has, or for an architecture that contradicts itself.
    """
    source = source_config(config)
    num_modules = _num_modules(config, source)
    if source is not None and source.num_layers_per_module != config.num_layers_per_module:
        raise ValueError(
            f"num_layers_per_module: expected the {source.num_layers_per_module} of the draft to start from, got {config.num_layers_per_module}"
        )
    # EAGLE-3 trains its own head.
    inherited = {"share_target_head": config.module_form != "eagle3"} if source is None else {name: getattr(source, name) for name in _INHERITED}
    overrides: dict = {
        **inherited,
        "module_form": config.module_form,
        "num_processing_modules": num_modules,
        "num_layers_per_module": config.num_layers_per_module,
        "context_kv": config.context_kv or (source.context_kv if source else "prefill_module"),
        "target_fingerprint": target_fingerprint(getattr(target, "config", target), tokenizer),
    }
    if config.vocab_sample < 1 and not overrides["share_target_head"]:
        raise ValueError(f"vocab_sample: expected 1 for a draft with a head of its own (module_form eagle3), got {config.vocab_sample}")
    if config.plain_fusion:
        overrides |= {"projection_bias": False, "normalize_target_hidden": False}
    vocab_size = getattr(target, "config", target).get_text_config().vocab_size
    draft_vocab_size = config.draft_vocab_size
    if draft_vocab_size is None:
        draft_vocab_size = source.draft_vocab_size or 0 if source else _DRAFT_VOCAB_SIZE
    if 0 < draft_vocab_size < vocab_size:
        overrides["draft_vocab_size"] = draft_vocab_size
    if config.sliding_window:
        overrides["sliding_window"] = config.sliding_window
    if source is not None and source.sliding_window is not None:
        overrides.setdefault("sliding_window", source.sliding_window)
    if source is not None:
        overrides["target_layer_ids"] = source.target_layer_ids
    for name in ("target_layer_ids", "draft_step_to_module"):
        if getattr(config, name):
            overrides[name] = config.numbers(name)
    if source is not None and source.num_processing_modules == num_modules and not config.draft_step_to_module:
        overrides["draft_step_to_module"] = list(source.draft_step_to_module)
    try:
        return PrismConfig.from_target(target, **overrides)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def _num_modules(config: TrainConfig, source: PrismConfig | None) -> int:
    """Modules of the finished draft."""
    first, wanted = 1 if source is None else source.num_processing_modules, config.num_modules
    assert wanted is not None  # the recipe has filled it in
    if first > wanted:
        raise ValueError(f"num_modules: expected at least the {first} of {Path(config.init_from or '').name}, got {wanted}")
    made = plan_stages(config, first)[-1].num_modules
    if made < wanted and has_own_num_modules(config):
        raise ValueError(
            f"num_modules: expected {made}, since only stage split makes more and its split_epochs are 0, got {wanted}"
        )
    return made


def first_draft(
    config: TrainConfig, draft_config: PrismConfig, training: list[Conversation], report: dict
) -> PrismDraftModel:
    """A new draft: with one random module, or with the weights and the number of modules of the draft to start from.

    Args:
        draft_config (`PrismConfig`): of the finished draft.
        training (`list[Conversation]`): their answers choose the draft vocabulary.
        report (`dict`): gets the draft vocabulary's coverage, and the name and training record of the draft to start from.
    Raises:
        ValueError: if the weights of the draft to start from do not fit.
    """
    torch.manual_seed(config.seed)
    source = None
    if config.init_from:
        source = PrismDraftModel.from_pretrained(config.init_from, dtype=torch.float32)
    num_modules = 1 if source is None else source.config.num_processing_modules
    own_config = with_modules(draft_config, num_modules)
    if source is not None and num_modules < draft_config.num_processing_modules:
        # Modules are paired by the draft steps that they serve.
        own_config.draft_step_to_module = list(source.config.draft_step_to_module)
    draft = PrismDraftModel(own_config)
    if draft_config.draft_vocab_size is not None:
        tokens, coverage = frequent_tokens(training, draft_config.draft_vocab_size)
        if source is not None and source.config.draft_vocab_size == draft_config.draft_vocab_size:
            tokens = source.draft_to_target
            coverage = token_coverage(training, tokens)
        draft.draft_to_target.copy_(tokens)
        num_answer_tokens = sum(conversation.num_answer_tokens for conversation in training)
        report["draft_vocab_coverage"] = round(coverage, 5)
        report["num_answer_tokens_outside_draft_vocab"] = round((1 - coverage) * num_answer_tokens)
        logger.info(
            "Draft vocabulary: %d tokens cover %.2f %% of the answers' tokens; the other %d are outside it.",
            len(tokens),
            100 * coverage,
            report["num_answer_tokens_outside_draft_vocab"],
        )
    if source is not None and config.init_from:
        name, earlier = Path(config.init_from).name, find_file(config.init_from, TRAINING)
        record = json.loads(earlier.read_text(encoding="utf-8")) if earlier else None
        report["init_from"] = {"name": name, "training": record}
        logger.info("Started from %s: %s", name, warm_start(draft, source))
    return draft
