"""Recipes: what is trained, in which stages, with which losses. A recipe sets the options that the user leaves out.

A stage is a run of transformers' `Trainer` with a schedule of its own:
  single_step  one module, draft step 0 alone: cheap, and most of the accuracy comes from here (EAGLE-2);
  warm_up      one module, S training-time-test steps, each fed the predictions of the one before (HASS, EAGLE-3);
  split        the module copied into all M, S training-time-test steps, gradients through all steps (PRISM).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from transformers_prism.training.losses import LossWeights

# Options that differ between recipes, with the values of each.
RECIPES: MappingProxyType[str, dict] = MappingProxyType(
    {
        # Source: PRISM (arXiv:2602.01762), preceded by a single-step stage that is ours.
        "prism": {"num_modules": 2, "single_step_epochs": 1.0, "warm_up_epochs": 2.0, "split_epochs": 1.0},
        # Source: HASS (arXiv:2408.15766).
        "hass": {"single_step_epochs": 1.0, "warm_up_epochs": 3.0},
        # Source: EAGLE-2 (arXiv:2406.16858), whose module is EAGLE's.
        "eagle2": {"single_step_epochs": 4.0},
        # Source: EAGLE-3 (arXiv:2503.01840): no hidden-state loss, gradients through all steps of its training-time test.
        "eagle3": {"module_form": "eagle3", "warm_up_epochs": 4.0, "is_detached": False, "hidden_weight": 0.0},
        # The baseline of the PRISM paper: more layers in every step instead of more modules.
        "stacked": {"num_layers_per_module": 2, "single_step_epochs": 1.0, "warm_up_epochs": 3.0},
    }
)
_PLAIN = MappingProxyType(
    {
        "module_form": "prism",
        "num_modules": 1,
        "num_layers_per_module": 1,
        "single_step_epochs": 0.0,
        "warm_up_epochs": 0.0,
        "split_epochs": 0.0,
        "is_detached": True,
        "hidden_weight": 1.0,
    }
)
# Options that a recipe sets where the user leaves them out.
BY_RECIPE = tuple(_PLAIN)
_AT_LEAST_ONE = (
    "batch_size accumulation max_length num_modules num_layers_per_module warm_up_steps split_steps save_updates logging_updates"
).split()
_NOT_NEGATIVE = (
    "teraflops num_conversations draft_vocab_size single_step_epochs warm_up_epochs split_epochs learning_rate "
    "split_learning_rate token_weight acceptance_weight hidden_weight weight_decay max_grad_norm validation_updates "
    "num_validation num_acceptance_prompts patience"
).split()
# Those of transformers that need no further settings.
_SCHEDULES = (
    "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt"
).split()


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


def _by_recipe(text: str):
    return _option(None, f"{text} The recipe's if left out.")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on."""

    data: str = _option("", "Chats or token ids: files, folders, or data sets on the Hub (docs/data-formats.md), separated by commas.")
    output: str = _option("", "Folder of the run: checkpoints, the draft in draft/, training.json.")
    recipe: str = _option("prism", f"One of {', '.join(RECIPES)}: sets what is left out below.")
    plan: bool = _option(False, "Say what would be trained, with its size and cost, and stop.")
    teraflops: float = _option(0.0, "With --plan: 1e12 operations a second that the machine sustains, to estimate hours.")
    target: str | None = _option(None, "Hub id, folder or .gguf file; the demo target if left out.")
    features: str | None = _option(None, "Folder for the target's hidden states; <output>/features if left out.")
    online_features: bool = _option(False, "Compute hidden states whenever they are needed and keep none on disk.")
    init_from: str | None = _option(None, "Folder or Hub id of a draft to start from: its weights, and its architecture where an option is left out; --num-layers-per-module is always its own.")
    num_conversations: int = _option(0, "Use the first N conversations of the training part; 0 is all.")
    max_length: int = _option(2048, "Tokens kept of a conversation.")
    max_bad_share: float = _option(0.5, "Share of a source's rows that may be unusable; they are left out.")
    validation_data: str = _option("", "Conversations to validate on instead of a share of --data; none of them is trained on.")
    validation_share: float = _option(0.05, "Share of the conversations held out; the same ones whatever is added.")
    module_form: str | None = _by_recipe("prism or eagle3.")
    num_modules: int | None = _by_recipe("Processing modules M.")
    num_layers_per_module: int | None = _by_recipe("Decoder layers of a module.")
    draft_step_to_module: str = _option(
        "", "Module of each draft step, such as 0,1,1; if left out, that of --init-from with as many modules, or 0,1,...,M-1."
    )
    target_layer_ids: str = _option("", "Fused target layers, such as 3,16,28; if left out, those of --init-from, or three of them.")
    plain_fusion: bool = _option(
        False,
        "Read the target's states by a product alone, without norms and bias: what the files of other servers hold "
        "(docs/convert.md).",
    )
    draft_vocab_size: int | None = _option(
        None, "Tokens the draft can propose in any text; 0, or as many as the target has, is all. If left out, those of --init-from, or 8192."
    )
    text_tokens: bool = _option(True, "Let the draft also propose the tokens of the text that it is given.")
    learn_prompts: bool = _option(False, "Train on the tokens of prompts, too: validations count answers in any case.")
    context_kv: str | None = _option(
        None,
        "prefill_module: all draft steps see the text by the first module's keys and values; own_module: each by its own. If left out, "
        "that of --init-from, or prefill_module.",
    )
    sliding_window: int = _option(0, "Positions that the draft's attention sees; 0 is all, or what --init-from has.")
    single_step_epochs: float | None = _by_recipe("Epochs of stage single_step; 0 leaves it out.")
    warm_up_epochs: float | None = _by_recipe("Epochs of stage warm_up; 0 leaves it out.")
    split_epochs: float | None = _by_recipe("Epochs of stage split; 0 leaves it out.")
    warm_up_steps: int = _option(3, "Training-time-test steps S in stage warm_up.")
    split_steps: int = _option(4, "Training-time-test steps S in stage split.")
    learning_rate: float = _option(2e-3, "Peak learning rate of stages single_step and warm_up.")
    split_learning_rate: float = _option(5e-4, "Peak learning rate of stage split.")
    schedule: str = _option("cosine", "Learning-rate schedule of each stage, by its name in transformers.")
    warm_up_share: float = _option(0.03, "Share of a stage's updates in which the learning rate rises.")
    token_weight: float = _option(0.1, "Weight of the soft cross-entropy.")
    acceptance_weight: float = _option(0.0, "Weight of the negative log of the acceptance probability.")
    hidden_weight: float | None = _by_recipe("Weight of the hidden-state loss before stage split, which has none.")
    step_weights: str = _option("1", "Weight of each draft step's loss, such as 1,0.8; the last applies to later steps.")
    vocab_sample: float = _option(
        1.0,
        "Share of the draft vocabulary that the loss is computed over: half of it the target's most probable tokens, half drawn "
        "at random for the rest, anew for every 256 tokens.",
    )
    is_detached: bool | None = _by_recipe("Cut gradients between the steps of stage warm_up.")
    batch_size: int = _option(8, "Conversations per process and update.")
    accumulation: int = _option(1, "Batches per update.")
    weight_decay: float = _option(0.01, "AdamW's weight decay.")
    max_grad_norm: float = _option(1.0, "Gradient norm above which gradients are scaled down.")
    compute_dtype: str = _option("float32", "float32 or bfloat16: of the target and, by autocast, of the draft.")
    checkpoint_activations: bool = _option(False, "Compute activations again in the backward pass: less memory.")
    use_cpu: bool = _option(False, "Stay on the CPU even if there is an accelerator.")
    fsdp: bool = _option(False, "Shard weights, gradients and AdamW's state among the accelerators (FSDP) that share a run.")
    logging_updates: int = _option(10, "Updates between two lines of the log.")
    push_to_hub: str = _option("", "user/name on the Hub that the finished draft is pushed to.")
    report_to: str = _option("none", "Where the Trainer logs to, a run a stage: tensorboard, wandb, or all that is installed.")
    save_updates: int = _option(200, "Updates between two checkpoints; where a measured tau chooses the checkpoint, validation_updates counts instead.")
    validation_updates: int = _option(0, "Updates between two validations; 0 is at the end of each stage.")
    num_validation: int = _option(0, "Use the first N conversations for validation; 0 is all.")
    num_acceptance_prompts: int = _option(0, "Decode N held-out prompts at each validation, for a measured tau.")
    patience: int = _option(0, "Stop a stage after N validations without a better tau; 0 never does.")
    seed: int = _option(0, "Seed of the weights and of the order of batches.")
    resume: bool = _option(False, "Resume from the last checkpoint in the output folder.")

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {self.recipe!r}")
        for name, value in {**_PLAIN, **RECIPES[self.recipe]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share: expected a number between 0 and 1, got {self.validation_share}")
        for name in ("max_bad_share", "warm_up_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype: expected float32 or bfloat16, got {self.compute_dtype!r}")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(_SCHEDULES)}, got {self.schedule!r}")
        for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
            for name in names:
                value = getattr(self, name)
                if value is None:  # of the draft to start from
                    continue
                if not value >= least:
                    raise ValueError(f"{name}: expected at least {least}, got {value}")
                if value == math.inf:
                    raise ValueError(f"{name}: expected a finite number, got inf")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {self.seed}")
        weights = self.numbers("step_weights", float)
        if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(f"step_weights: expected finite numbers of at least 0, one of them above, got {self.step_weights!r}")
        stages = plan_stages(self)
        if not stages:
            raise ValueError("expected at least one stage with more than 0 epochs, got none")
        for stage in stages:
            if not (stage.loss.of_vocabulary or stage.loss.hidden):
                raise ValueError(
                    f"token_weight: expected a loss with a weight above 0 in stage {stage.name}, got none (hidden_weight "
                    "counts before stage split only)"
                )
        if self.patience and not (self.num_acceptance_prompts and self.validation_updates):
            raise ValueError("patience: expected num_acceptance_prompts and validation_updates with it, got 0")

    @property
    def dtype(self) -> torch.dtype:
        """`compute_dtype` as a torch dtype."""
        return getattr(torch, self.compute_dtype)

    @property
    def stays_on_cpu(self) -> bool:
        """Whether training runs on the CPU. accelerate must be told, or it finds no other processes there."""
        return self.use_cpu or not torch.accelerator.is_available()

    @property
    def chooses_by_tau(self) -> bool:
        """Whether a stage ends with the checkpoint that has the best measured tau."""
        return bool(self.num_acceptance_prompts and self.validation_updates)

    def numbers(self, name: str, kind: type = int) -> list:
        """An option that holds numbers separated by commas.

        Raises:
            ValueError: if it holds anything else.
        """
        value = getattr(self, name)
        try:
            return [kind(part) for part in value.split(",")] if value else []
        except ValueError:
            raise ValueError(f"{name}: expected numbers separated by commas, got {value!r}") from None


@dataclass(frozen=True)
class Stage:
    """One run of the Trainer: which modules, how many training-time-test steps, which loss."""

    name: str
    num_modules: int
    num_steps: int
    num_epochs: float
    learning_rate: float
    loss: LossWeights
    is_detached: bool


def plan_stages(config: TrainConfig, num_modules: int = 1) -> list[Stage]:
    """The stages of a recipe in order, those of 0 epochs left out, for a run that starts from a draft of
    `num_modules`."""
    run: Any = config  # the recipe has filled in options that were None
    rate, num_split = run.learning_rate, max(num_modules, run.num_modules)
    step_weights = tuple(run.numbers("step_weights", float))
    parts = (run.token_weight, run.acceptance_weight, run.hidden_weight)
    loss = LossWeights(*parts, step_weights, run.vocab_sample)
    split_loss = dataclasses.replace(loss, hidden=0.0)
    stages = [
        Stage("single_step", num_modules, 1, run.single_step_epochs, rate, loss, False),
        Stage("warm_up", num_modules, run.warm_up_steps, run.warm_up_epochs, rate, loss, run.is_detached),
        Stage("split", num_split, run.split_steps, run.split_epochs, run.split_learning_rate, split_loss, False),
    ]
    return [stage for stage in stages if stage.num_epochs > 0]


def has_own_num_modules(config: TrainConfig) -> bool:
    """Whether the run sets another number of modules than its recipe does, or its own `draft_step_to_module`."""
    by_recipe = {**_PLAIN, **RECIPES[config.recipe]}["num_modules"]
    return config.num_modules != by_recipe or bool(config.draft_step_to_module)


def count_updates(stage: Stage, config: TrainConfig, num_conversations: int, num_processes: int) -> tuple[int, float]:
    """Updates of a stage, and the epochs that they make, as the Trainer counts them: a last batch may be smaller, and the
    last update of an epoch may have fewer batches."""
    num_batches = math.ceil(num_conversations / (config.batch_size * num_processes))
    per_epoch = math.ceil(num_batches / config.accumulation)
    num_updates = max(1, math.ceil(stage.num_epochs * per_epoch))
    whole_epochs, rest = divmod(num_updates, per_epoch)
    return num_updates, whole_epochs + rest * config.accumulation / num_batches
