"""What a training run will do and cost, estimated before anything runs."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_prism.configuration_prism import num_target_layers
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import config_and_tokenizer, num_parameters
from transformers_prism.training.aligned_training import label_width
from transformers_prism.training.data.conversations import Part, describe, read_parts
from transformers_prism.training.features import BYTES_PER_VALUE, computed_with
from transformers_prism.training.first_draft import make_draft_config, source_config
from transformers_prism.training.recipes import Stage, TrainConfig, count_updates, plan_stages
from transformers_prism.training.warm_start import with_modules

# Float32 weights, their gradients, and AdamW's two moments.
_BYTES_PER_TRAINED_VALUE = 16
_GIB = 2**30


@dataclass(frozen=True)
class StageCost:
    """Estimates for one stage: optimizer updates; tokens seen, over all epochs; 1e15 floating-point operations (PFLOP) of
    the draft, forward and backward; peak bytes of draft, gradients, optimizer and activations in one process, without the
    target."""

    stage: Stage
    num_updates: int
    num_tokens: int
    petaflops: float
    peak_bytes: int


def stage_costs(config: TrainConfig, draft_config, lengths: list[int]) -> list[StageCost]:
    """Estimate the stages of a run of one process over conversations of these lengths in tokens."""
    source = source_config(config)
    stages = plan_stages(config, 1 if source is None else source.num_processing_modules)
    return [_stage_cost(stage, config, draft_config, lengths) for stage in stages]


def _stage_cost(stage: Stage, config: TrainConfig, draft_config, lengths: list[int]) -> StageCost:
    num_updates, num_epochs = count_updates(stage, config, len(lengths), num_processes=1)
    num_tokens = round(sum(lengths) * num_epochs)
    module = _num_parameters(draft_config, 1)
    vocabulary = (draft_config.draft_vocab_size or draft_config.vocab_size) * draft_config.hidden_size
    # A trained weight costs three multiply-adds per token and step: forward, gradient of the states, gradient of the weight.
    # A borrowed head is not trained and costs two, over the sampled share of the vocabulary; the target's logits cost one
    # more per token, once for all steps. Attention is counted at the mean length.
    mean_length = sum(lengths) / max(len(lengths), 1)
    attention = 2 * mean_length * draft_config.num_attention_heads * draft_config.head_dim
    borrowed = 4 * draft_config.share_target_head * stage.num_steps * config.vocab_sample
    flops = num_tokens * (6 * stage.num_steps * (module + attention) + (2 + borrowed) * vocabulary)
    trained = _num_parameters(draft_config, stage.num_modules)
    peak = _BYTES_PER_TRAINED_VALUE * trained + _activation_bytes(stage, config, draft_config, max(lengths, default=0))
    return StageCost(stage, num_updates, num_tokens, flops / 1e15, peak)


def _num_parameters(draft_config, num_modules: int) -> int:
    with torch.device("meta"):
        draft = PrismDraftModel(with_modules(draft_config, num_modules))
    return sum(parameter.numel() for parameter in draft.parameters() if parameter.requires_grad)


def _activation_bytes(stage: Stage, config: TrainConfig, draft_config, length: int) -> int:
    """Bytes kept for the backward pass, for a batch of the longest conversations."""
    value = 2 if config.compute_dtype == "bfloat16" else 4
    rows = config.batch_size * length
    heads, width = draft_config.num_attention_heads, draft_config.hidden_size
    attention = 2 * heads * draft_config.head_dim + 2 * draft_config.num_key_value_heads * draft_config.head_dim
    # With checkpointing no MLP activations are kept.
    if config.checkpoint_activations:
        per_row = 6 * width + attention
    else:
        per_row = 10 * width + attention + 4 * draft_config.intermediate_size
    return rows * stage.num_steps * draft_config.num_layers_per_module * per_row * value


def describe_plan(config: TrainConfig) -> str:
    """What a run would do: the draft, the data, each stage, memory and disk. Nothing is written, and no weights are loaded
    if the target's configuration can be read without them.

    Raises:
        FileNotFoundError, ValueError: for data and settings that cannot be used, as the run itself would say.
    """
    target_config, tokenizer = config_and_tokenizer(config.target)
    text_config = target_config.get_text_config()
    training, validation = read_parts(config, text_config.vocab_size, tokenizer)
    draft_config = make_draft_config(config, target_config, tokenizer)
    used = training.chosen
    data = describe(used)
    layers = sorted({*draft_config.target_layer_ids, num_target_layers(text_config)})
    num_tokens = sum(map(_num_tokens_to_compute, _parts_of_features(config, training, validation)))
    width = (len(layers) - 1) * text_config.hidden_size + label_width(draft_config)
    feature_bytes = num_tokens * width * BYTES_PER_VALUE
    folder = Path(config.features or config.output or ".")
    free = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    target_size = num_parameters(target_config)
    target_flops = 2e-15 * target_size * num_tokens
    costs = stage_costs(config, draft_config, [len(one.input_ids) for one in used])
    if config.online_features:
        # Every stage runs the target again.
        target_flops = 2e-15 * target_size * sum(cost.num_tokens for cost in costs)
        where = "computed whenever they are needed, none on disk"
    else:
        where = f"{feature_bytes / _GIB:.2f} GiB in bfloat16; {free / _GIB:.1f} GiB of disk free"
    lines = [
        f"recipe      {config.recipe}: {_num_parameters(draft_config, draft_config.num_processing_modules) / 1e6:.1f} "
        f"million parameters in {draft_config.num_processing_modules} modules of {draft_config.num_layers_per_module} "
        f"layers ({draft_config.module_form}), steps on modules {draft_config.draft_step_to_module}",
        f"target      {(draft_config.target_fingerprint or {}).get('name') or config.target}, states {draft_config.target_layer_ids}, "
        f"draft vocabulary {draft_config.draft_vocab_size or draft_config.vocab_size}; {target_size / 1e6:.0f} million "
        f"parameters, {target_size * config.dtype.itemsize / _GIB:.2f} GiB in {config.compute_dtype}",
        f"data        {data['num_conversations']} conversations, {data['num_tokens']} tokens, "
        f"{data['num_answer_tokens']} in answers; {len(validation.indices)} conversations held out",
        f"features    states {layers}: {where}; about {target_flops:.3g} PFLOP" + _hours(target_flops, config),
    ]
    for cost in costs:
        stage = cost.stage
        lines.append(
            f"{stage.name:<11} M={stage.num_modules}, S={stage.num_steps}: {cost.num_updates} updates, {cost.num_tokens} "
            f"tokens seen, learning rate {stage.learning_rate:g}; about {cost.petaflops:.3g} PFLOP"
            f"{_hours(cost.petaflops, config)} and {cost.peak_bytes / _GIB:.2f} GiB at the peak"
        )
    lines.append("PFLOP, hours and memory are estimates for one process; the target's memory comes on top.")
    return "\n".join(lines)


def _parts_of_features(config: TrainConfig, training: Part, validation: Part) -> list[Part]:
    """The lists of conversations that features are computed for: one, or two if the validation data is separate."""
    if config.validation_data:
        return [training, validation]
    return [dataclasses.replace(training, indices=[*training.indices, *validation.indices])]


def _num_tokens_to_compute(part: Part) -> int:
    """Tokens of the conversations whose features are computed for a part."""
    return sum(len(part.conversations[index].input_ids) for index in computed_with(part.indices, len(part.conversations)))


def _hours(petaflops: float, config: TrainConfig) -> str:
    return f", {petaflops / config.teraflops / 3.6:.2g} hours" if config.teraflops else ""
