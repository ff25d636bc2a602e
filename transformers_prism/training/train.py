"""Train a draft for a target: features, then the stages of a recipe, then a folder that generate() can use.

    transformers-prism train --data conversations.jsonl.gz --output draft-run --target some/target
    transformers-prism train --data conversations.jsonl.gz --output draft-run --recipe hass --plan
"""

import copy
import dataclasses
import json
import logging
import math
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from transformers_prism.command_line import command_line, versions
from transformers_prism.configuration_prism import num_target_layers
from transformers_prism.decoding.target_side import num_learned_positions
from transformers_prism.hub.files import CARD, CURVES, METRICS, TRAINING
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import load_target
from transformers_prism.training.acceptance import acceptance_metrics, check_prompts, measure_acceptance
from transformers_prism.training.aligned_training import AlignedTraining, label_width, reaches_all_weights
from transformers_prism.training.batches import ConversationDataset, LengthSampler, collate
from transformers_prism.training.data.conversations import Conversation, Part, read_parts, sha256_of
from transformers_prism.training.data.formats import check_source
from transformers_prism.training.features import FeatureStore, OnlineFeatures, check_states, compute_features
from transformers_prism.training.first_draft import first_draft, make_draft_config
from transformers_prism.training.progress import TrainingLog, UpdateClock, plot_curves
from transformers_prism.training.progress_bar import ProgressBar
from transformers_prism.training.recipes import Stage, TrainConfig, count_updates, plan_stages
from transformers_prism.training.warm_start import expand_modules, with_modules
from transformers_prism.whole_files import are_same_paths, read_json, write_json

logger = logging.getLogger(__name__)

# Settings that name files or folders.
_PATHS = ("data", "validation_data", "output", "features", "target", "init_from")


class AlignedTrainer(Trainer):
    """Transformers' Trainer with our own batch order, loss and evaluation. The order continues after the `updates_before`
    updates of earlier stages; acceptance is measured on `prompts`."""

    def __init__(self, *args, prompts: Sequence[Conversation] = (), updates_before: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.prompts, self.updates_before = list(prompts), updates_before
        self.sampler: LengthSampler | None = None
        self._parts: list[torch.Tensor] = []
        # FSDP will shard the model's own weights, so an unsharded copy is kept.
        self._whole_copy = copy.deepcopy(self.model).to(self.args.device) if self.is_fsdp_enabled else None

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        batches_per_update = args.gradient_accumulation_steps * args.world_size
        order = (args.train_batch_size, args.seed, batches_per_update, self.updates_before)
        self.sampler = LengthSampler(self.train_dataset.lengths, *order)
        return self.sampler

    def whole_model(self) -> AlignedTraining:
        """The model with all of its weights. Under FSDP they are gathered into a copy, so every process must call this."""
        if self._whole_copy is None:
            return self.accelerator.unwrap_model(self.model)
        self._whole_copy.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
        return self._whole_copy

    @property
    def tokens_seen(self) -> int:
        """Tokens of this stage so far: epochs times the tokens of the data."""
        return round(sum(self.train_dataset.lengths) * (self.state.epoch or 0))

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
            self._parts.append(outputs["parts"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, start_time=None):
        """Add the mean of each step's losses since the last line, over the batches of all processes."""
        if self._parts and "loss" in logs:
            means = self.accelerator.reduce(torch.stack(self._parts).mean(dim=0), reduction="mean")
            self._parts.clear()
            weights = self.accelerator.unwrap_model(self.model).stage.loss
            for name, values in zip(("token", "acceptance", "hidden"), means, strict=True):
                if getattr(weights, name):
                    logs.update({f"{name}_loss_{step}": round(float(value), 4) for step, value in enumerate(values)})
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Teacher-forced top-1 accuracy and acceptance of each draft step on held-out conversations, and tau of real rounds."""
        dataset = eval_dataset or self.eval_dataset
        training = self.whole_model()
        num_steps = max(4, training.stage.num_steps)
        counts = torch.zeros(num_steps, 3, dtype=torch.float64, device=self.args.device)
        order = sorted(range(len(dataset)), key=lambda item: dataset.lengths[item])
        own = order[self.args.process_index :: self.args.world_size]
        training.eval()
        batches = DataLoader(dataset, self.args.eval_batch_size, sampler=own, collate_fn=collate)
        with ProgressBar("validation", len(batches), "batches") as bar:
            for batch in batches:
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    inputs = self._prepare_inputs(batch)
                    counts += training.count_agreements(**inputs, num_steps=num_steps)
                # Free the states of this batch before those of the next are made.
                del batch, inputs
                bar.advance()
        training.train()
        counts = self.accelerator.reduce(counts)
        metrics = {}
        for step, (hits, accepted, rows) in enumerate(counts):
            metrics[f"{metric_key_prefix}_agreement_{step}"] = round(float(hits / rows), 4)
            metrics[f"{metric_key_prefix}_acceptance_{step}"] = round(float(accepted / rows), 4)
        metrics.update(self._measured_acceptance(training.draft, training.target(), metric_key_prefix))
        metrics[f"{metric_key_prefix}_tokens_seen"] = self.tokens_seen
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measured_acceptance(self, draft, target, prefix: str) -> dict[str, float]:
        if not self.prompts:
            return {}
        own = self.prompts[self.args.process_index :: self.args.world_size]
        counts = measure_acceptance(draft, target, own)
        return acceptance_metrics(self.accelerator.reduce(counts.to(self.args.device)).cpu(), prefix)


class _EpochOfOrder(TrainerCallback):
    """Tells the sampler the epoch: in a resumed run of several processes it is wrapped too deeply for the Trainer to reach."""

    def __init__(self, trainer: AlignedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Choose the order of the epoch that begins, or that the run resumes in."""
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


class _LastUpdateCounts(TrainerCallback):
    """Where the best tau decides which checkpoint is kept, the last update is evaluated and saved, too."""

    def on_step_end(self, args, state, control, **kwargs):
        """Evaluate and save at the end."""
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = True


@torch.inference_mode(False)
@torch.enable_grad()
def train(config: TrainConfig, argv: list[str] | None = None, models: tuple | None = None) -> PrismDraftModel:
    """Train a draft and save it in `<output>/draft`, with `training.json` next to its weights.

    Args:
        config (`TrainConfig`): the run.
        argv (`list[str]`, *optional*): the command line, recorded without the folders of its paths.
        models (`tuple`, *optional*): the target and its tokenizer, if they are already loaded.
    Returns:
        `PrismDraftModel`: trained, bound to its target, in eval mode and float32.
    Raises:
        FileNotFoundError, ValueError: for data, settings or features that cannot be used, saying expected and got.
    """
    _check_paths(config)
    state = PartialState(cpu=config.stays_on_cpu)
    if config.fsdp and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"fsdp: expected several processes with an accelerator each, as `accelerate launch --multi_gpu` starts them, got "
            f"{state.num_processes} on {state.device.type}"
        )
    # Every process checks the paths before the first one writes.
    state.wait_for_everyone()
    target, tokenizer = models or load_target(config.target, config.dtype)
    target.to(state.device)
    vocab_size = target.config.get_text_config().vocab_size
    parts = training_part, validation_part = read_parts(_within_positions(config, target), vocab_size, tokenizer)
    draft_config = make_draft_config(config, target, tokenizer)
    if config.chooses_by_tau:
        check_prompts(target, validation_part.chosen[: config.num_acceptance_prompts])
    _claim_output(config, parts)
    start = time.monotonic()
    training_store, validation_store = _features(config, target, parts, draft_config)
    report: dict = {
        "data": {"training": _describe_data(training_part), "validation": _describe_data(validation_part)},
        "features_seconds": round(time.monotonic() - start, 1),
    }
    draft = first_draft(config, draft_config, training_part.chosen, report)
    sets = [
        ConversationDataset(training_part.conversations, training_store, training_part.indices, config.learn_prompts),
        ConversationDataset(validation_part.conversations, validation_store, validation_part.indices),
    ]
    results = report["stages"] = []
    for stage in plan_stages(config, draft.config.num_processing_modules):
        if stage.num_modules > draft.config.num_processing_modules:
            draft = expand_modules(draft, with_modules(draft_config, stage.num_modules))
        draft.generation_config.tree_text_tokens = config.text_tokens
        draft.bind(target, tokenizer)
        draft, result = _run_stage(stage, config, draft, target, sets, sum(one["num_updates"] for one in results))
        draft.bind(target, tokenizer)
        results.append(result)
    if state.is_main_process:
        _save_run(draft, config, report, argv)
    return draft.eval()


def _check_paths(config: TrainConfig):
    """Checks that need nothing to be loaded."""
    if not config.output:
        raise ValueError("output: expected a folder, got none")
    for name in ("output", "features"):
        if Path(getattr(config, name) or "").is_file():
            raise ValueError(f"{name}: expected a folder, got the file {getattr(config, name)}")
    if config.push_to_hub:
        try:
            validate_repo_id(config.push_to_hub)
        except HFValidationError as error:
            raise ValueError(f"push_to_hub: expected a repository's name, user/name, got {config.push_to_hub!r}: {error}") from error
    for name in ("data", "validation_data") if config.validation_data else ("data",):
        for source in getattr(config, name).split(","):
            check_source(source)
    reports = ("none", "all", *get_available_reporting_integrations())
    if config.report_to not in reports:
        raise ValueError(f"report_to: expected one of {', '.join(reports)}, which are installed, got {config.report_to!r}")
    record = Path(config.output) / "config.json"
    if not (record.is_file() and _has_begun(record.parent)):
        return
    if not config.resume:
        raise ValueError(f"output: expected a new folder, got {record.parent.name!r} with a run in it; add --resume")
    # A setting that did not exist when the run began had its default.
    found = {**_settings(TrainConfig()), **read_json(record)}
    for name, expected in _settings(config).items():
        if not _is_same(name, found.get(name), expected):
            raise ValueError(f"resume: expected {name}={found.get(name)!r} as the run began, got {expected!r}")


def _is_same(name: str, before, now) -> bool:
    """Whether a setting is what it was when a run began. The folder may have moved; paths may be written in another way."""
    if name not in _PATHS or not before or not now:
        return before == now
    return name == "output" or are_same_paths(before, now)


def _has_begun(folder: Path) -> bool:
    """Whether a run has something to resume: a checkpoint or a finished stage. Before that, settings may still change."""
    return any(any(folder.glob(pattern)) for pattern in ("*/checkpoint-*", "*/result.json", "draft"))


def _within_positions(config: TrainConfig, target) -> TrainConfig:
    """The settings with a `max_length` that the target's learned positions allow."""
    most = num_learned_positions(target)
    if most is None or most >= config.max_length:
        return config
    logger.warning("Conversations are cut at the target's %d positions, since max_length is %d.", most, config.max_length)
    return dataclasses.replace(config, max_length=most)


def _claim_output(config: TrainConfig, parts: tuple[Part, Part]):
    """Record the settings, the data and the processes that a resumed run must repeat, once data and target are usable.

    Raises:
        ValueError: if the run began with other conversations, or with another number of processes.
    """
    folder, state = Path(config.output), PartialState()
    digest = sha256_of([place, one.input_ids, one.assistant_spans] for place, part in enumerate(parts) for one in part.chosen)
    record = folder / "config.json"
    if record.is_file() and _has_begun(folder):
        # A run of an earlier version has neither.
        before = read_json(record)
        found = before.get("data_sha256", digest)
        if found != digest:
            raise ValueError(
                f"resume: expected the conversations that the run began with (sha256 {found[:12]}), got others "
                f"({digest[:12]}); use a new output folder for other data"
            )
        num_processes = before.get("num_processes", state.num_processes)
        if num_processes != state.num_processes:
            raise ValueError(
                f"resume: expected {num_processes} processes as the run began, got {state.num_processes}: batches would be others"
            )
    state.wait_for_everyone()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, {**_settings(config), "data_sha256": digest, "num_processes": state.num_processes})
    state.wait_for_everyone()


def _settings(config: TrainConfig) -> dict:
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in ("resume", "plan", "teraflops", "push_to_hub")}


def _features(config, target, parts: tuple[Part, Part], draft_config) -> list[FeatureStore | OnlineFeatures]:
    """Features of both parts. Separate validation data has its own folder, since a folder belongs to one list of data."""
    last = num_target_layers(target.config.get_text_config())
    layer_ids = sorted({*draft_config.target_layer_ids, last})
    check_states(target, layer_ids, label_width(draft_config))
    if config.online_features:
        return [OnlineFeatures(target, part.conversations, layer_ids) for part in parts]
    folder = Path(config.features or Path(config.output) / "features")
    state = PartialState()
    share = (state.process_index, state.num_processes)
    training, validation = parts
    stores: list[FeatureStore | OnlineFeatures]
    if config.validation_data:
        stores = [
            compute_features(target, training.conversations, layer_ids, folder, training.indices, share),
            compute_features(target, validation.conversations, layer_ids, folder / "validation", validation.indices, share),
        ]
    else:
        needed = [*training.indices, *validation.indices]
        stores = [compute_features(target, training.conversations, layer_ids, folder, needed, share)] * 2
    state.wait_for_everyone()
    return stores


def _training_arguments(
    stage: Stage, config: TrainConfig, draft: PrismDraftModel, folder: Path, num_updates: int, is_begun: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_steps=num_updates,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=config.schedule,
        # The first warm-up update has a learning rate of 0, so a stage of a single update has no warm-up.
        warmup_steps=min(math.ceil(config.warm_up_share * num_updates), num_updates - 1),
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.compute_dtype == "bfloat16",
        use_cpu=config.stays_on_cpu,
        # All weights are gathered at once, since a training-time-test step calls the parts of a module, not its forward.
        fsdp=config.fsdp or None,
        fsdp_config={"auto_wrap_policy": "NO_WRAP"} if config.fsdp else None,
        logging_steps=config.logging_updates,
        logging_nan_inf_filter=False,
        # Each validated checkpoint may be the best.
        save_steps=config.validation_updates if config.chooses_by_tau else config.save_updates,
        save_total_limit=2,
        eval_strategy="steps" if config.validation_updates else "no",
        eval_steps=config.validation_updates or None,
        # Validate a fine-tuned draft before its first update, for comparison.
        eval_on_start=bool(config.init_from and config.validation_updates and not is_begun),
        load_best_model_at_end=config.chooses_by_tau,
        metric_for_best_model="tau" if config.chooses_by_tau else None,
        greater_is_better=True if config.chooses_by_tau else None,
        remove_unused_columns=False,
        report_to=config.report_to,
        run_name=f"{Path(config.output).name}-{stage.name}",
        # A resumed run continues to count patience and seconds.
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        # States that were computed online are on the device already.
        dataloader_pin_memory=not config.online_features,
        seed=config.seed,
        # Otherwise DDP would wait for gradients of weights that get none.
        ddp_find_unused_parameters=not reaches_all_weights(draft, stage),
        ddp_backend="gloo" if PartialState().num_processes > 1 and not torch.cuda.is_available() else None,
    )
    if arguments.n_gpu > 1:
        # In a single process the Trainer would use DataParallel, whose replicas have no parameters.
        logger.warning("One of %d devices is used; `accelerate launch` starts a process on each.", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def _run_stage(
    stage: Stage, config: TrainConfig, draft: PrismDraftModel, target, sets, updates_before: int
) -> tuple[PrismDraftModel, dict]:
    """Train one stage after the updates of earlier stages, or load its result if an earlier run finished it."""
    folder = Path(config.output) / stage.name
    finished = folder / "draft"
    if (folder / "result.json").is_file():
        return PrismDraftModel.from_pretrained(finished).train(), json.loads((folder / "result.json").read_text())
    train_set, validation_set = sets
    num_updates, _ = count_updates(stage, config, len(train_set), PartialState().num_processes)
    # Resumed from a checkpoint of the last update, the Trainer would make one more update.
    checkpoint = last_whole_checkpoint(folder, before=num_updates) if config.resume else None
    model = AlignedTraining(
        draft.train(),
        target,
        stage,
        text_tokens=config.text_tokens,
        checkpoint_activations=config.checkpoint_activations,
    )
    trainer = AlignedTrainer(
        model=model,
        args=_training_arguments(stage, config, draft, folder, num_updates, is_begun=checkpoint is not None),
        train_dataset=train_set,
        eval_dataset=validation_set,
        data_collator=collate,
        callbacks=_callbacks(stage, config),
        prompts=validation_set.chosen(config.num_acceptance_prompts),
        updates_before=updates_before,
    )
    trainer.add_callback(_EpochOfOrder(trainer))
    # PrinterCallback would print the figures of our table again, as a dict.
    trainer.remove_callback(PrinterCallback)
    logger.info("Stage %s: M=%d, S=%d, %d updates.", stage.name, stage.num_modules, stage.num_steps, num_updates)
    trainer.train(resume_from_checkpoint=checkpoint)
    draft = trainer.whole_model().draft
    result = _stage_result(stage, trainer)
    if PartialState().is_main_process:
        if any(type(callback).__name__ == "WandbCallback" for callback in trainer.callback_handler.callbacks):
            import wandb

            wandb.finish()  # the next stage is a run of its own, whose updates begin at 0
        draft.save_pretrained(finished)
        for name in (CARD, METRICS):  # they do not know of the run's record, and the finished draft's must
            (finished / name).unlink(missing_ok=True)
        write_json(folder / "result.json", result)
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    PartialState().wait_for_everyone()
    return draft, result


def _callbacks(stage: Stage, config: TrainConfig) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [TrainingLog(f"{stage.name}: M={stage.num_modules}, S={stage.num_steps}"), UpdateClock()]
    if config.chooses_by_tau:
        callbacks.append(_LastUpdateCounts())
    if config.patience:
        callbacks.append(EarlyStoppingCallback(config.patience))
    return callbacks


def _stage_result(stage: Stage, trainer: AlignedTrainer) -> dict:
    """The entry of a stage in the record of a run. In a resumed run the clock is the one restored from the checkpoint."""
    clock = next(one for one in trainer.callback_handler.callbacks if isinstance(one, UpdateClock))
    return {
        "stage": dataclasses.asdict(stage),
        "num_updates": trainer.state.global_step,
        "tokens_seen": trainer.tokens_seen,
        "seconds": round(clock.seconds, 1),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "validation": _last_validation(trainer),
        "history": trainer.state.log_history,
    }


def _last_validation(trainer: AlignedTrainer) -> dict:
    """The validation of the weights that a stage ends with: the logged one if their update was validated, else a new one."""
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    kept = best or state.global_step
    made = [entry for entry in state.log_history if "eval_tokens_seen" in entry and entry["step"] == kept]
    return {name: value for name, value in made[-1].items() if name not in ("step", "epoch")} if made else trainer.evaluate()


def last_whole_checkpoint(folder: Path, before: float = math.inf) -> str | None:
    """The newest complete checkpoint of a stage, of an update below `before`. The Trainer writes its state last, so a
    checkpoint with a readable state is complete."""
    whole = {int(path.parent.name.split("-")[1]): path for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)}
    updates = [update for update in whole if update < before]
    return str(whole[max(updates)].parent) if updates else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def _describe_data(part: Part) -> dict:
    chosen = part.chosen
    return {
        "num_conversations": len(chosen),
        "num_tokens": sum(len(conversation.input_ids) for conversation in chosen),
        "num_answer_tokens": sum(conversation.num_answer_tokens for conversation in chosen),
        "num_cut": sum(conversation.is_cut for conversation in chosen),
    }


def _without_history(stage: dict) -> dict:
    """A stage's result with only the validations of its log, each with the tokens seen by then."""
    validations = [entry for entry in stage["history"] if "eval_tokens_seen" in entry]
    return {**{name: value for name, value in stage.items() if name != "history"}, "validations": validations}


def _save_run(draft: PrismDraftModel, config: TrainConfig, report: dict, argv: list[str] | None):
    folder = Path(config.output) / "draft"
    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(config)
    for name in _PATHS:
        settings[name] = settings[name] and ",".join(Path(part).name for part in settings[name].split(","))
    record = {
        "command": None if argv is None else command_line(argv),
        "config": settings,
        "versions": {"python": platform.python_version(), **versions()},
        **report,
        "stages": [_without_history(stage) for stage in report["stages"]],
    }
    # Written first, since the card that is saved with the draft reads it.
    write_json(folder / TRAINING, record)
    plot_curves(report["stages"], folder / CURVES)
    draft.save_pretrained(folder)
    logger.info("Draft saved in %s.", folder.name)
    if config.push_to_hub:
        try:
            PrismDraftModel.from_pretrained(folder).push_to_hub(config.push_to_hub)
        except Exception as error:
            kept = f"the draft is saved in {folder}; push it with `transformers-prism push {folder} {config.push_to_hub}`"
            raise RuntimeError(f"push_to_hub: expected to push to {config.push_to_hub}, got {error}. Nothing is lost: {kept}") from error
        logger.info("Draft pushed to %s.", config.push_to_hub)
