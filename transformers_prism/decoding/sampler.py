"""Which token plain decoding chooses next: processors, sampling with plain decoding's random numbers, and what is kept.

One random draw per emitted token, in order, makes sampled text equal to plain `generate` with the same seed. Draws can be made
a little ahead, so that the draft sees them, too (`sampling_noise.py`).
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from transformers.generation import (
    EosTokenCriteria,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from ..kernels.dispatch import TRITON_DEVICES
from ..kernels.verify_tree import WARPERS
from ..transformers_names import allowed_tokens_of
from .callers_mode import as_called
from .sampling_noise import Coupling, StepNoise
from .sequences import Sequences, flattened
from .transfer import on_device

# Criteria that look at nothing but the ids, which the device's walk keeps on the host.
_CRITERIA_OF_IDS = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, StopStringCriteria)

# Processors that treat a row of scores the same at every place of a batch.
_ROW_PROCESSORS = (
    *WARPERS.values(),
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

# Devices that calls treat as accelerators, although they are none.
_treated_as_accelerators: ContextVar[tuple[str, ...]] = ContextVar("treated_as_accelerators", default=())


@contextlib.contextmanager
def treating_cpus_as_accelerators() -> Iterator[None]:
    """Let generate() calls on a CPU do what those on accelerators do: walk trees on the device where processors, criteria
    and outputs allow it, and plan automatic trees ahead of their rounds."""
    token = _treated_as_accelerators.set(("cpu",))
    try:
        yield
    finally:
        _treated_as_accelerators.reset(token)


def is_treated_as_accelerator(device: torch.device) -> bool:
    """Whether a device is treated as an accelerator by [`treating_cpus_as_accelerators`]."""
    return device.type in _treated_as_accelerators.get()


def warper_settings(logits_processor: LogitsProcessorList) -> dict | None:
    """Arguments by which `verify_tree` does what these processors do; None if it cannot.

    It can if they are stock warpers in transformers' order, each at most once and with its default options.
    """
    settings: dict = {}
    for processor in logits_processor:
        name = next((name for name, warper in WARPERS.items() if type(processor) is warper), None)
        if name is None or any(list(WARPERS).index(earlier) >= list(WARPERS).index(name) for earlier in settings):
            return None
        value = vars(processor)["mass" if name == "typical_p" else name]
        if vars(WARPERS[name](value)) != vars(processor):
            return None
        settings[name] = value
    return settings


class Sampler:
    """Chooses next tokens as plain decoding does.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): the prompts.
        logits_processor (`LogitsProcessorList`): called once per emitted token, in order, with the ids so far.
        stopping_criteria (`StoppingCriteriaList`): only checked for whether they could draw random numbers.
        generation_config (`GenerationConfig`): prepared by generate().
        is_coupled (`bool`): whether the draft may see the random numbers of sampling; it only does with stock warpers and
            criteria, so that nothing else can draw in between.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
        is_coupled: bool = False,
    ):
        self.num_sequences, self.device = len(input_ids), input_ids.device
        self.logits_processor = logits_processor
        self.do_sample = generation_config.do_sample
        returns = generation_config.return_dict_in_generate
        # For each sequence what every emitted token was chosen from, where that was asked for.
        self.scores = self._lists() if returns and generation_config.output_scores else None
        self.logits = self._lists() if returns and generation_config.output_logits else None
        self.warpers = warper_settings(logits_processor)
        has_stock_criteria = all(type(one) in _CRITERIA_OF_IDS for one in flattened(stopping_criteria))
        self.is_coupled = is_coupled and self.do_sample and self.warpers is not None and has_stock_criteria
        # On the device no processor is called, and no scores or logits are kept.
        is_there = self.device.type in TRITON_DEVICES or is_treated_as_accelerator(self.device)
        chooses = self.warpers is not None if self.do_sample else not len(logits_processor)
        self.walks_on_device = is_there and chooses and has_stock_criteria and self.scores is None and self.logits is None
        needs_noise = self.do_sample and (self.num_sequences > 1 or self.walks_on_device or self.is_coupled)
        self.noise = StepNoise(self.device) if needs_noise else None

    def _lists(self) -> list[list[torch.Tensor]]:
        return [[] for _ in range(self.num_sequences)]

    def new_sequences(self, input_ids, stopping_criteria, generation_config, streamer=None) -> Sequences:
        """The sequences that tokens are chosen for; arguments as for [`Sequences`]."""
        # Criteria that look at ids on the host read nothing from the device.
        device = torch.device("cpu") if self.walks_on_device else self.device
        scores = self.scores[0] if self.scores is not None and self.num_sequences == 1 else None
        return Sequences(input_ids, stopping_criteria, generation_config, device, scores, streamer)

    def choose(self, sequences: Sequences, index: int, logits: torch.Tensor) -> int:
        """The token that plain decoding emits next in a sequence, given the target's logits `(V,)` there.

        Raises:
            ValueError: if the processed logits hold NaN.
        """
        # Copied if processors may write to it, or if it is kept: a view would keep the logits of the whole tree in memory.
        copies = len(self.logits_processor) > 0 or self.scores is not None or self.logits is not None
        raw = logits.to(copy=copies, dtype=torch.float32, device=sequences.ids.device)[None]  # [1, V]
        scores = self._process(sequences, index, raw)
        if self.scores is not None:
            self.scores[index].append(scores)
        if self.logits is not None:
            self.logits[index].append(raw)
        if not self.do_sample:
            token, score = _largest(scores)
            # NaN counts as the largest.
            if math.isnan(score):
                refuse_nan(sequences, index)
            return token
        probs = torch.nn.functional.softmax(scores, dim=-1)
        if self.noise is None:
            if torch.isnan(probs).any():
                refuse_nan(sequences, index)
            return int(torch.multinomial(probs, num_samples=1))
        # Equal to torch.multinomial of the whole batch, bit for bit, whichever sequence comes to this step first.
        noise = self.noise.of_step(index, sequences.num_new(index), (self.num_sequences, probs.shape[-1]))
        token, value = _largest(probs / noise)
        if math.isnan(value):
            refuse_nan(sequences, index)
        return token

    def _process(self, sequences: Sequences, index: int, raw: torch.Tensor) -> torch.Tensor:
        if not self.logits_processor:
            return raw
        ids = sequences.ids[index : index + 1, : sequences.lengths[index]]
        may_write = self.warpers is None  # stock warpers write to nothing but scores
        before = int(ids[0, -1]) if may_write else None
        with as_called():
            scores = self._processed(ids, index, raw)
        if may_write and int(ids[0, -1]) != before:
            raise ValueError("logits_processor: expected processors that leave input_ids as they are, got one that wrote to them")
        return scores

    def _processed(self, ids: torch.Tensor, index: int, raw: torch.Tensor) -> torch.Tensor:
        # Stock warpers look at nothing but the sequence's own scores.
        if self.num_sequences == 1 or self.warpers is not None:
            return self.logits_processor(ids, raw)
        # Other processors may keep something for each sequence, so they see a whole batch with this one at its own place.
        scores = raw
        for processor in self.logits_processor:
            of_row = _of_row(processor, index)
            if of_row is not None:
                scores = of_row(ids, scores)
                continue
            whole = [one.repeat(self.num_sequences, 1) for one in (ids, scores)]
            scores = processor(*whole)[index : index + 1].clone()  # a view would keep the scores of all
        return scores

    def coupling(self, sequences: Sequences, num_steps: int) -> Coupling | None:
        """The draws of the next `num_steps` tokens of the active sequences, for the draft to see; None if it shall not."""
        if self.noise is None or not self.is_coupled or num_steps == 0:
            return None
        noise, steps, rows = self.noise_of_next(sequences, num_steps, self.noise.buffer.shape[2])
        return Coupling(noise, steps, rows, self.logits_processor)

    def noise_of_next(self, sequences: Sequences, num_steps: int, vocab_size: int):
        """A buffer with the noise of each active sequence's next steps, and each one's next step and row in it."""
        assert self.noise is not None, "expected sampling with noise"
        active = sequences.active
        steps = [None if sequences.is_done(index) else sequences.num_new(index) for index in active]
        ends = {index: step + num_steps for index, step in zip(active, steps, strict=True) if step is not None}
        noise = self.noise.fill(ends, (self.num_sequences, vocab_size))
        starts = self.noise.starts
        places = [0 if step is None else step - starts[index] for index, step in zip(active, steps, strict=True)]
        return noise, on_device(places, self.device), on_device(active, self.device)

    def forget_passed_noise(self, sequences: Sequences) -> None:
        """Free the sampling noise of steps that sequences have passed, and of those that have ended."""
        if self.noise is not None:
            needed: list[int | None] = [None] * self.num_sequences
            for index in sequences.active:
                needed[index] = None if sequences.is_done(index) else sequences.num_new(index)
            self.noise.forget_before(needed)

    def finish(self, num_steps: int) -> None:
        """Leave the random generator as plain decoding of `num_steps` tokens does."""
        if self.noise is not None:
            self.noise.rewind_to(num_steps)

    def outputs(self, num_steps: int) -> dict[str, tuple[torch.Tensor, ...] | None]:
        """Scores and logits as plain decoding returns them: for each emitted token `(B, V)`. After the end of a sequence they
        are zeros, where plain decoding returns those of padding."""

        def stacked(kept):
            if kept is None:
                return None
            zeros = torch.zeros_like(kept[0][0])
            return tuple(torch.cat([one[step] if step < len(one) else zeros for one in kept]) for step in range(num_steps))

        return {"scores": stacked(self.scores), "logits": stacked(self.logits)}


def _of_row(processor, index: int) -> LogitsProcessor | None:
    """A processor that treats a row alone as `processor` treats row `index` of a batch; None if there is none."""
    if type(processor) is PrefixConstrainedLogitsProcessor:
        # It calls the function for every row of a batch, and would show it this row's text for the others.
        return PrefixConstrainedLogitsProcessor(functools.partial(_allowed_in, allowed_tokens_of(processor), index), num_beams=1)
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(processor.prompt_ignore_length, torch.Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, processor.prompt_ignore_length[index : index + 1])
    return processor if type(processor) in _ROW_PROCESSORS else None


def _allowed_in(allowed, index: int, _, ids: torch.LongTensor) -> list[int]:
    """Tokens that a caller's function allows row `index` of a batch, whatever row the processor asks for."""
    return allowed(index, ids)


def _largest(values: torch.Tensor) -> tuple[int, float]:
    """Index of the largest of values `(1, V)`, the first of equal ones, and the value."""
    if values.device.type == "cpu" and values.dtype == torch.float32:
        array = values.numpy()  # whose argmax takes a tenth of torch's time
        token = int(array.argmax())
        return token, float(array[0, token])
    value, index = torch.cat([one.double() for one in values.max(dim=-1)]).tolist()  # one wait for the device
    return int(index), value


def refuse_nan(sequences: Sequences, index: int):
    """Stop before a token is chosen from NaN."""
    raise ValueError(
        f"expected finite logits from the target, got NaN for token {sequences.lengths[index]} of row {index}"
    )
