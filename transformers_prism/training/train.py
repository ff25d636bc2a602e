"""Train a draft for a target: features, then the stages of the recipe, then a folder that generate() can use.

Stages, each a run of transformers' `Trainer` with a schedule of its own:
  single_step  one module, step 0 alone: cheap, and most of what a draft knows is learnt here;
  warm_up      one module, S aligned forwards, hidden-state loss (HASS);
  split        the module copied into all M, S aligned forwards, token loss alone, gradients through all steps (PRISM).

    transformers-prism train --data conversations.jsonl.gz --output draft-run --target some/target
"""

import dataclasses
import json
import logging
import math
import platform
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments

import transformers_prism
from transformers_prism.configuration_prism import PrismConfig, target_fingerprint
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import load_target
from transformers_prism.training.alignment import aligned_forward, history_mask
from transformers_prism.training.batches import ConversationDataset, LengthSampler, collate
from transformers_prism.training.features import Conversation, FeatureStore, compute_features, read_conversations
from transformers_prism.training.losses import aligned_loss
from transformers_prism.training.warm_start import expand_modules, with_modules

logger = logging.getLogger(__name__)


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on besides the target and the data themselves."""

    data: str = _option("", "JSON lines with input_ids and prompt_length (token ids), gzipped if named .gz.")
    output: str = _option("", "Folder of the run: checkpoints, the draft in draft/, training.json.")
    target: str | None = _option(None, "Hub id, folder or .gguf file; the demo target if left out.")
    features: str | None = _option(None, "Folder for the target's hidden states; <output>/features if left out.")
    num_conversations: int = _option(0, "Use the first so many conversations of the training part; 0 is all.")
    max_length: int = _option(2048, "Tokens kept of a conversation.")
    validation_share: float = _option(0.05, "Share of the lines, at the file's end, that is held out.")
    num_modules: int = _option(2, "Processing modules M.")
    target_layer_ids: str = _option("", "Fused target layers, such as 3,16,28; three of them if left out.")
    draft_vocab_size: int = _option(8192, "Tokens the draft can propose; 0 is the whole vocabulary.")
    context_kv: str = _option("prefill_module", "prefill_module or own_module.")
    single_step_epochs: float = _option(1.0, "Epochs of stage single_step; 0 leaves it out.")
    warm_up_epochs: float = _option(2.0, "Epochs of stage warm_up; 0 leaves it out.")
    split_epochs: float = _option(1.0, "Epochs of stage split; 0 leaves it out.")
    warm_up_steps: int = _option(3, "Aligned forwards S in stage warm_up.")
    split_steps: int = _option(4, "Aligned forwards S in stage split.")
    learning_rate: float = _option(2e-3, "Peak learning rate of stages single_step and warm_up.")
    split_learning_rate: float = _option(5e-4, "Peak learning rate of stage split.")
    schedule: str = _option("cosine", "Learning-rate schedule of each stage, by its name in transformers.")
    warm_up_share: float = _option(0.03, "Share of a stage's updates in which the learning rate rises.")
    token_weight: float = _option(0.1, "Weight of the soft cross-entropy.")
    hidden_weight: float = _option(1.0, "Weight of the hidden-state loss in the first two stages.")
    is_detached: bool = _option(True, "Cut gradients between the forwards of stage warm_up.")
    batch_size: int = _option(8, "Conversations per process and update.")
    accumulation: int = _option(1, "Batches per update.")
    weight_decay: float = _option(0.01, "AdamW's weight decay.")
    max_grad_norm: float = _option(1.0, "Gradient norm above which gradients are scaled down.")
    compute_dtype: str = _option("float32", "float32 or bfloat16: of the target and, by autocast, of the draft.")
    use_cpu: bool = _option(False, "Stay on the CPU even if there is an accelerator.")
    logging_updates: int = _option(10, "Updates between two lines of the log.")
    save_updates: int = _option(200, "Updates between two checkpoints.")
    validation_updates: int = _option(0, "Updates between two validations; 0 is at the end of each stage.")
    num_validation: int = _option(0, "Use the first so many conversations for validation; 0 is all.")
    seed: int = _option(0, "Of weights and of the order of batches.")
    resume: bool = _option(False, "Go on from the last checkpoint in the output folder.")

    def __post_init__(self):
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share: expected a number between 0 and 1, got {self.validation_share}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype: expected float32 or bfloat16, got {self.compute_dtype!r}")
        for name in ("batch_size", "accumulation", "num_modules", "warm_up_steps", "split_steps", "save_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.single_step_epochs + self.warm_up_epochs + self.split_epochs > 0:
            raise ValueError("expected at least one stage with more than 0 epochs, got none")

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype` as torch knows it."""
        return getattr(torch, self.compute_dtype)


@dataclass(frozen=True)
class Stage:
    """One run of the Trainer: which modules, how many aligned forwards, which loss."""

    name: str
    num_modules: int
    num_steps: int
    num_epochs: float
    learning_rate: float
    hidden_weight: float
    is_detached: bool


def plan_stages(config: TrainConfig) -> list[Stage]:
    """The stages of a recipe in order, those of 0 epochs left out."""
    rate, hidden = config.learning_rate, config.hidden_weight
    stages = [
        Stage("single_step", 1, 1, config.single_step_epochs, rate, hidden, False),
        Stage("warm_up", 1, config.warm_up_steps, config.warm_up_epochs, rate, hidden, config.is_detached),
        Stage(
            "split",
            config.num_modules,
            config.split_steps,
            config.split_epochs,
            config.split_learning_rate,
            0.0,
            False,
        ),
    ]
    return [stage for stage in stages if stage.num_epochs > 0]


# --- the draft ---------------------------------------------------------------------------------------------------


def frequent_tokens(conversations: list[Conversation], size: int) -> tuple[torch.LongTensor, float]:
    """The `size` most frequent tokens of the answers and the share of answer tokens that they cover.

    Args:
        conversations (`list[Conversation]`): the training data.
        size (`int`): of the draft vocabulary; filled with the smallest unused ids where the data has fewer tokens.
    Returns:
        `tuple` of increasing token ids `(size,)` and the coverage in 0..1.
    """
    counts: Counter[int] = Counter()
    for conversation in conversations:
        counts.update(conversation.input_ids[conversation.prompt_length :])
    total = counts.total()
    # Tokens of the prompts come after all answer tokens, and ids that never occur last.
    for conversation in conversations:
        counts.update(dict.fromkeys(conversation.input_ids[: conversation.prompt_length], 0))
    chosen = dict(counts.most_common(size))
    covered = sum(chosen.values())
    unused = (token for token in range(size + len(chosen)) if token not in chosen)
    tokens = sorted([*chosen, *(next(unused) for _ in range(size - len(chosen)))])
    return torch.tensor(tokens), covered / total


def make_draft_config(config: TrainConfig, target, tokenizer) -> PrismConfig:
    """The architecture of the finished draft.

    Args:
        config (`TrainConfig`): of the run.
        target (`PreTrainedModel`): the model to be sped up.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer, for the fingerprint.
    Returns:
        `PrismConfig`: with the target's fingerprint.
    """
    overrides = {
        "num_processing_modules": config.num_modules,
        "context_kv": config.context_kv,
        "target_fingerprint": target_fingerprint(target.config, tokenizer),
    }
    if config.draft_vocab_size:
        overrides["draft_vocab_size"] = config.draft_vocab_size
    if config.target_layer_ids:
        overrides["target_layer_ids"] = [int(layer) for layer in config.target_layer_ids.split(",")]
    return PrismConfig.from_target(target, **overrides)


# --- the step ----------------------------------------------------------------------------------------------------


class AlignedTraining(nn.Module):
    """What the Trainer trains: the draft's aligned forwards with the loss of one stage on top.

    Args:
        draft (`PrismDraftModel`): bound to its target.
        target (`PreTrainedModel`): gives the vocabulary head for evaluation; not registered.
        stage (`Stage`): number of forwards and loss.
        token_weight (`float`): of the soft cross-entropy.
    """

    def __init__(self, draft: PrismDraftModel, target, stage: Stage, token_weight: float):
        super().__init__()
        self.draft, self.stage, self.token_weight = draft, stage, token_weight
        # Behind a function, the head is neither trained nor saved with the draft.
        self.target_head = lambda: target.get_output_embeddings()

    def forward(self, input_ids, features, label_features, mask):
        """Loss of a batch of [`collate`].

        Returns:
            `dict`: `loss`, and without gradients `token_loss` and `hidden_loss`, of shape `(S,)`.
        """
        predictions = self.predict(input_ids, features, self.stage.num_steps, self.stage.is_detached)
        history = history_mask(input_ids.shape[1], self.stage.num_steps, input_ids.device)
        loss = aligned_loss(
            self.draft,
            predictions,
            label_features[..., -self.draft.config.target_hidden_size :],
            mask[None] & history[:, None],
            self.token_weight,
            self.stage.hidden_weight,
        )
        return {"loss": loss.total, "token_loss": loss.token, "hidden_loss": loss.hidden}

    def predict(self, input_ids, features, num_steps: int, is_detached: bool = False):
        """The aligned forwards; features hold the fused layers first and the last, normed state last."""
        fused = features[..., : self.draft.config.fused_hidden_size]
        return aligned_forward(self.draft, input_ids, fused, num_steps, is_detached)

    @torch.no_grad()
    def count_agreements(self, input_ids, features, label_features, mask, num_steps: int) -> torch.Tensor:
        """How often each step's first choice is the target's, over the whole vocabulary: `(S, 2)` hits and rows."""
        predictions = self.predict(input_ids, features, num_steps)
        history = history_mask(input_ids.shape[1], num_steps, input_ids.device)
        counts = torch.zeros(num_steps, 2, dtype=torch.float64, device=input_ids.device)
        label = label_features[..., -self.draft.config.target_hidden_size :][mask]
        expected = torch.cat([self._target_choice(rows) for rows in label.split(256)])
        for step, prediction in enumerate(predictions):
            choice = self.draft.compute_logits(prediction[mask]).argmax(dim=-1)
            if self.draft.draft_to_target is not None:
                choice = self.draft.draft_to_target[choice]
            is_valid = history[step].expand_as(mask)[mask]
            counts[step, 0] = ((choice == expected) & is_valid).sum()
            counts[step, 1] = is_valid.sum()
        return counts

    def _target_choice(self, label: torch.Tensor) -> torch.Tensor:
        # Scaling and capping logits as the target does keeps their order.
        head = self.target_head()
        return head(label.to(head.weight.device, head.weight.dtype)).argmax(dim=-1).to(self.draft.device)


class AlignedTrainer(Trainer):
    """Transformers' Trainer with our order of batches, our loss, and agreement with the target as evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: list[torch.Tensor] = []

    def _get_train_sampler(self, train_dataset=None):
        return LengthSampler(self.train_dataset.lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch.

        Raises:
            ValueError: if it is not finite, saying at which update.
        """
        outputs = model(**inputs)
        if not bool(torch.isfinite(outputs["loss"])):
            raise ValueError(
                f"loss: expected a finite number, got {outputs['loss'].item()} at update {self.state.global_step}; "
                "the last checkpoint is kept. Lower the learning rate, or check the features"
            )
        if model.training:
            self._parts.append(torch.stack((outputs["token_loss"], outputs["hidden_loss"])))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, start_time=None):
        """Add the mean of each step's losses since the last line."""
        if self._parts and "loss" in logs:
            token, hidden = torch.stack(self._parts).mean(dim=0)
            self._parts.clear()
            logs.update({f"token_loss_{step}": round(float(value), 4) for step, value in enumerate(token)})
            logs.update({f"hidden_loss_{step}": round(float(value), 4) for step, value in enumerate(hidden)})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Agreement of each draft step with the target on held-out conversations, teacher-forced."""
        dataset = eval_dataset or self.eval_dataset
        training = self.accelerator.unwrap_model(self.model)
        num_steps = max(4, training.stage.num_steps)
        counts = torch.zeros(num_steps, 2, dtype=torch.float64, device=self.args.device)
        order = sorted(range(len(dataset)), key=lambda item: dataset.lengths[item])
        own = order[self.args.process_index :: self.args.world_size]
        training.eval()
        for batch in DataLoader([dataset[item] for item in own], self.args.eval_batch_size, collate_fn=collate):
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                inputs = self._prepare_inputs(batch)
                counts += training.count_agreements(**inputs, num_steps=num_steps)
        training.train()
        counts = self.accelerator.reduce(counts)
        metrics = {
            f"{metric_key_prefix}_agreement_{step}": round(float(hits / rows), 4)
            for step, (hits, rows) in enumerate(counts)
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


# --- the run -----------------------------------------------------------------------------------------------------


def train(config: TrainConfig, argv: list[str] | None = None) -> PrismDraftModel:
    """Train a draft and save it in `<output>/draft`, with `training.json` beside its weights.

    Args:
        config (`TrainConfig`): the run.
        argv (`list[str]`, *optional*): the command that asked for it, recorded without folders.
    Returns:
        `PrismDraftModel`: trained, bound to its target, in eval mode and float32.
    Raises:
        FileNotFoundError, ValueError: for data, settings or features that cannot be used, saying expected and got.
    """
    _check_paths(config)
    # Every process has looked before the first one writes.
    PartialState(cpu=config.use_cpu).wait_for_everyone()
    target, tokenizer = load_target(config.target, config.dtype)
    conversations = read_conversations(config.data, target.config.get_text_config().vocab_size, config.max_length)
    train_indices, validation_indices = split_conversations(len(conversations), config)
    draft_config = make_draft_config(config, target, tokenizer)
    _claim_output(config)
    store = _features(config, target, conversations, draft_config, [*train_indices, *validation_indices])
    report: dict = {"data": _describe_data(conversations, train_indices, validation_indices)}
    draft = _first_draft(config, draft_config, conversations, train_indices, report)
    sets = [ConversationDataset(conversations, store, indices) for indices in (train_indices, validation_indices)]
    results = report["stages"] = []
    for stage in plan_stages(config):
        if stage.num_modules != draft.config.num_processing_modules:
            draft = expand_modules(draft, with_modules(draft_config, stage.num_modules))
        draft.bind(target, tokenizer)
        draft, result = _run_stage(stage, config, draft, target, sets)
        draft.bind(target, tokenizer)
        results.append(result)
    if PartialState().is_main_process:
        _save_run(draft, config, report, argv)
    return draft.eval()


def split_conversations(num_conversations: int, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Indices for training and for validation, which is the end of the file.

    Raises:
        ValueError: if there are too few conversations for both.
    """
    num_validation = math.ceil(num_conversations * config.validation_share)
    num_training = num_conversations - num_validation
    if num_training < 1:
        raise ValueError(f"data: expected at least 2 conversations (training and validation), got {num_conversations}")
    validation = list(range(num_training, num_conversations))[: config.num_validation or None]
    return list(range(num_training))[: config.num_conversations or None], validation


def _check_paths(config: TrainConfig):
    """What can be said before anything is loaded."""
    if not config.output:
        raise ValueError("output: expected a folder, got none")
    if not Path(config.data).is_file():
        raise FileNotFoundError(f"data: expected a file of conversations, got {config.data!r}, which is not there")
    record = Path(config.output) / "config.json"
    if not record.is_file():
        return
    if not config.resume:
        raise ValueError(f"output: expected a new folder, got {record.parent.name!r} with a run in it; add --resume")
    found = json.loads(record.read_text())
    for name, expected in _settings(config).items():
        if found.get(name) != expected:
            raise ValueError(f"resume: expected {name}={found.get(name)!r} as the run began, got {expected!r}")


def _claim_output(config: TrainConfig):
    """Record the settings that a resumed run must repeat, once data and target have been found to be usable."""
    if PartialState().is_main_process:
        Path(config.output).mkdir(parents=True, exist_ok=True)
        (Path(config.output) / "config.json").write_text(json.dumps(_settings(config), indent=2) + "\n")
    PartialState().wait_for_everyone()


def _settings(config: TrainConfig) -> dict:
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "resume"}


def _features(config, target, conversations, draft_config, needed: list[int]) -> FeatureStore:
    last = target.config.get_text_config().num_hidden_layers
    layer_ids = sorted({*draft_config.target_layer_ids, last})
    folder = Path(config.features or Path(config.output) / "features")
    state = PartialState()
    part = (state.process_index, state.num_processes)
    store = compute_features(target, conversations, layer_ids, folder, needed=needed, part=part)
    state.wait_for_everyone()
    return store


def _first_draft(config, draft_config, conversations, train_indices, report) -> PrismDraftModel:
    torch.manual_seed(config.seed)
    draft = PrismDraftModel(with_modules(draft_config, 1))
    if draft_config.draft_vocab_size is not None:
        tokens, coverage = frequent_tokens([conversations[index] for index in train_indices], config.draft_vocab_size)
        draft.draft_to_target.copy_(tokens)
        report["draft_vocab_coverage"] = round(coverage, 5)
        logger.info("Draft vocabulary: %d tokens cover %.2f %% of the answers' tokens.", len(tokens), 100 * coverage)
    return draft


def _training_arguments(stage: Stage, config: TrainConfig, folder: Path, num_updates: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_steps=num_updates,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=math.ceil(config.warm_up_share * num_updates),
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.compute_dtype == "bfloat16",
        use_cpu=config.use_cpu,
        logging_steps=config.logging_updates,
        logging_nan_inf_filter=False,
        save_steps=config.save_updates,
        save_total_limit=2,
        eval_strategy="steps" if config.validation_updates else "no",
        eval_steps=config.validation_updates or None,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        seed=config.seed,
        # With more modules than forwards, the last ones are not reached.
        ddp_find_unused_parameters=stage.num_modules > stage.num_steps,
        ddp_backend="gloo" if PartialState().num_processes > 1 and not torch.cuda.is_available() else None,
    )


def _run_stage(
    stage: Stage, config: TrainConfig, draft: PrismDraftModel, target, sets
) -> tuple[PrismDraftModel, dict]:
    """Train one stage, or load what it made if an earlier run finished it."""
    folder = Path(config.output) / stage.name
    finished = folder / "draft"
    if (folder / "result.json").is_file():
        return PrismDraftModel.from_pretrained(finished).train(), json.loads((folder / "result.json").read_text())
    train_set, validation_set = sets
    per_update = config.batch_size * config.accumulation * PartialState().num_processes
    num_updates = max(1, math.ceil(stage.num_epochs * len(train_set) / per_update))
    trainer = AlignedTrainer(
        model=AlignedTraining(draft.train(), target, stage, config.token_weight),
        args=_training_arguments(stage, config, folder, num_updates),
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=collate,
    )
    logger.info("Stage %s: M=%d, S=%d, %d updates.", stage.name, stage.num_modules, stage.num_steps, num_updates)
    outcome = trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder) if config.resume else None)
    result = {
        "stage": dataclasses.asdict(stage),
        "num_updates": trainer.state.global_step,
        "tokens_seen": round(sum(train_set.lengths) * trainer.state.epoch),
        "seconds": round(outcome.metrics["train_runtime"], 1),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "validation": trainer.evaluate(),
    }
    if PartialState().is_main_process:
        draft.save_pretrained(finished)
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    PartialState().wait_for_everyone()
    return draft, result


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint of a stage that was written to its end; the Trainer writes its state last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _describe_data(conversations, train_indices, validation_indices) -> dict:
    def describe(indices):
        chosen = [conversations[index] for index in indices]
        return {
            "num_conversations": len(chosen),
            "num_tokens": sum(len(conversation.input_ids) for conversation in chosen),
            "num_answer_tokens": sum(len(c.input_ids) - c.prompt_length for c in chosen),
        }

    return {"training": describe(train_indices), "validation": describe(validation_indices)}


def _save_run(draft: PrismDraftModel, config: TrainConfig, report: dict, argv: list[str] | None):
    folder = Path(config.output) / "draft"
    draft.save_pretrained(folder)
    settings = dataclasses.asdict(config)
    for name in ("data", "output", "features", "target"):
        settings[name] = settings[name] and Path(settings[name]).name
    record = {
        "command": None if argv is None else " ".join(Path(word).name if "/" in word else word for word in argv),
        "config": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "transformers_prism": transformers_prism.__version__,
        },
        **report,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    logger.info("Draft saved in %s.", folder.name)


def main(argv: list[str]):
    """The `train` command: one option for each field of [`TrainConfig`].

    Args:
        argv (`list[str]`): the command line after the command's name.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = HfArgumentParser(TrainConfig, prog="transformers-prism train")
    (config,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    train(config, ["transformers-prism", "train", *argv])


__all__ = [
    "AlignedTrainer",
    "AlignedTraining",
    "TrainConfig",
    "frequent_tokens",
    "main",
    "plan_stages",
    "train",
]
