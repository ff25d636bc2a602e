"""Where a drafted text differs from plain decoding, tell whether the cause is rounding or an error.

In 16-bit floats the text may differ from plain decoding wherever the best tokens are nearly tied, several times in one
answer. So plain decoding chooses a token at every position of the drafted text, given the text before it. A different
choice is a near-tie only if the gap between the two tokens is below twice the noise. The noise is measured at that position:
the largest difference between the target's logits in a single step and in forwards over several tokens. The draft's trees
take no part in that: a wrong mask or position would give a large difference, and so excuse its own error.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from transformers_prism.transformers_names import CACHE_KEYWORD

# Two tokens' logits may each be off by the noise.
TIE_FACTOR = 2.0
# Tokens of the text in one forward (None: the whole text, else its last tokens on top of a cache), and tokens after them.
# The text does not see those, as a node does not see the nodes of other branches.
_FORWARDS = ((None, 31), (1, 15), (2, 0), (8, 15))
_ONE_TOKEN = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}


class Difference(NamedTuple):
    """A token of a text that plain decoding would not have chosen there.

    Args:
        row: of the batch.
        position: in new tokens.
        gap: by how much plain decoding's choice is better: their scores, or in sampled runs their log probabilities
            with the noise that was drawn; infinite if the text is too long or too short.
        rounding: the noise there: the largest difference between the logits of a single step and of forwards over several
            tokens, scaled by temperature and penalties.
    """

    row: int
    position: int
    gap: float
    rounding: float

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding decides, so that plain decoding could choose either token."""
        return math.isfinite(self.rounding) and self.gap < TIE_FACTOR * self.rounding


class _Step(NamedTuple):
    """One token for each row by plain decoding, and what it was chosen from."""

    token_ids: torch.Tensor  # [B]
    logits: torch.Tensor  # [B, V]
    scores: torch.Tensor  # [B, V]
    cache: object


@torch.no_grad()
def find_differences(
    target: PreTrainedModel, inputs: dict, settings: dict, sequences: torch.Tensor, seed: int = 0
) -> tuple[list[Difference], torch.Tensor]:
    """Compare a text with plain decoding's choices, each given the text before it.

    Args:
        target (`PreTrainedModel`): the model.
        inputs (`dict`): of generate(), padded on the left.
        settings (`dict`): of the generate() that wrote the text: `do_sample`, `max_new_tokens`, `pad_token_id` and others.
        sequences (`torch.LongTensor` of shape `(B, T)`): the prompts and the text.
        seed (`int`): with which it was sampled.
    Returns:
        `tuple`: the differences, up to and including the first one that rounding does not explain, and the state of the
            random generator after plain decoding.
    """
    found: list[Difference] = []
    torch.manual_seed(seed)
    for difference in _differences(target, inputs, settings, sequences):
        found.append(difference)
        if not difference.is_near_tie:
            break
    return found, generator_state(sequences.device)


def _differences(target, inputs: dict, settings: dict, sequences: torch.Tensor) -> Iterator[Difference]:
    """All of them, place by place."""
    start, num_tokens = inputs["input_ids"].shape[1], settings["max_new_tokens"]
    end_ids = settings.get("eos_token_id", target.generation_config.eos_token_id)
    end_ids = torch.tensor([] if end_ids is None else end_ids, device=sequences.device).flatten()
    # Without the settings that single steps set themselves; they use a growing cache.
    own = (*_ONE_TOKEN, "cache_implementation", "prefill_chunk_size", "attention_mask")
    settings = {name: value for name, value in settings.items() if name not in own}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, sequences.shape[1] - start), value=1)
    has_ended = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
    cache = None
    for place in range(start, sequences.shape[1]):
        if place - start == num_tokens or has_ended.all():
            yield Difference(0, place - start, math.inf, 0.0)  # plain decoding stops before
        state = generator_state(sequences.device)
        step = _one_step(target, sequences[:, :place], mask[:, :place], settings, cache)
        cache, written = step.cache, sequences[:, place]
        expected = step.token_ids.where(~has_ended, settings["pad_token_id"])
        for row in (written != expected).nonzero().flatten().tolist():
            if has_ended[row]:
                yield Difference(row, place - start, math.inf, 0.0)
                continue
            noise = _noise(step.scores, state)[row] if settings["do_sample"] else None
            prefix = sequences[row : row + 1, :place][:, mask[row, :place].bool()]
            yield _explain(target, prefix, settings, step, row, place - start, int(written[row]), noise)
        has_ended |= torch.isin(written, end_ids)
    if sequences.shape[1] - start < num_tokens and not has_ended.all():
        yield Difference(int(has_ended.int().argmin()), sequences.shape[1] - start, math.inf, 0.0)  # it goes on


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of the generator that sampling on this device draws from."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _one_step(target, input_ids: torch.Tensor, mask: torch.Tensor, settings: dict, cache=None) -> _Step:
    """The next token; the generator moves on as by one step of plain decoding."""
    kept = {} if cache is None else {CACHE_KEYWORD: cache}
    output = target.generate(input_ids=input_ids, attention_mask=mask, **settings, **_ONE_TOKEN, **kept)
    return _Step(output.sequences[:, -1], output.logits[0].float(), output.scores[0], output[CACHE_KEYWORD])


def _noise(scores: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """What plain decoding drew from a generator in this state: `multinomial(p, 1)` is the argmax of p / noise."""
    generator = torch.Generator(scores.device)
    generator.set_state(state)
    return torch.empty_like(scores).exponential_(1, generator=generator)


def _explain(target, prefix, settings: dict, step: _Step, row: int, position: int, written: int, noise) -> Difference:
    """How much better plain decoding's choice is than what was written, and the noise there."""
    logits, scores = step.logits[row], step.scores[row]
    # The steps below may sample, and must not advance the caller's generator.
    accelerators = [] if prefix.device.type == "cpu" else [prefix.device]
    with torch.random.fork_rng(accelerators, device_type=prefix.device.type):
        noise_of_logits = _measure_noise(target, prefix, settings, logits)
    # Temperature and penalties scale a difference.
    rounding = noise_of_logits * settings.get("repetition_penalty", 1.0) / settings.get("temperature", 1.0)
    kept = scores.isfinite()
    lowest = logits[kept].min()
    # Top-p and top-k drop tokens by their logits. Near the lowest logit that they keep, rounding decides which are dropped.
    is_certain = kept & ((logits - lowest > TIE_FACTOR * noise_of_logits) | kept.all())
    below = float((lowest - logits[written]).clamp(min=0)) if not kept[written] else 0.0
    choices = scores.where(kept, scores[kept].min() - below)
    if noise is not None:
        choices = choices.log_softmax(dim=-1) - noise.log()
    best = float(choices[is_certain].max()) if is_certain.any() else -math.inf
    return Difference(row, position, max(best - float(choices[written]), below, 0.0), rounding)


def _measure_noise(target, prefix: torch.Tensor, settings: dict, logits: torch.Tensor) -> float:
    """The largest difference of logits from those of forwards over several tokens."""
    found = 0.0
    for number, num_behind in _FORWARDS:
        if number is not None and number >= prefix.shape[1]:
            continue
        number, kept = number or prefix.shape[1], {}
        if number < prefix.shape[1]:
            begun = prefix[:, :-number]
            kept[CACHE_KEYWORD] = _one_step(target, begun, torch.ones_like(begun), settings).cache
        # Any tokens will do; the text's own have ids that the model knows.
        behind = prefix[:, torch.arange(num_behind, device=prefix.device) % prefix.shape[1]]
        output = target(torch.cat((prefix[:, -number:], behind), dim=1), **kept)
        found = max(found, float((output.logits[0, number - 1].float() - logits).abs().max()))
    return found
