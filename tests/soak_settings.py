"""Random settings of generate() for the soak: processors, stops, caches, trees, and what a call returns.

Everything is drawn from a `random.Random`, so that the seed of a case gives the case again. Objects that keep a state are
handed out as factories: plain decoding and drafting each get their own.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from fitted_pairs import FIRST_WORD
from tiny_models import VOCAB_SIZE, word_tokenizer
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

TOKENIZER = word_tokenizer()


@dataclass
class Settings:
    """A call of generate(), without its inputs.

    Args:
        values: arguments as they are.
        factories: arguments that are made anew for each call.
        draws_noise: whether something but the sampling draws from the global generator.
        margin_scale: by how much processors enlarge differences of logits.
    """

    values: dict = field(default_factory=dict)
    factories: dict[str, Callable[[], object]] = field(default_factory=dict)
    draws_noise: bool = False
    margin_scale: float = 1.0

    def arguments(self) -> dict:
        """For one call."""
        return {**self.values, **{name: make() for name, make in self.factories.items()}}


class Bias(LogitsProcessor):
    """A processor of somebody's own, without a state: the parity of the last token decides."""

    def __call__(self, input_ids, scores):
        scores[:, ::2] += (input_ids[:, -1:] % 2) * 0.5
        return scores


class Counting(LogitsProcessor):
    """One with a state: what it does depends on how often it was called."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        scores = scores.clone()
        scores[:, FIRST_WORD + self.num_calls % 90] += 3.0
        return scores


class Drawing(LogitsProcessor):
    """One that draws from the generator which sampling draws from."""

    def __call__(self, input_ids, scores):
        return scores + 0.1 * torch.rand_like(scores)


class NotFinite(LogitsProcessor):
    """One that yields NaN where the text has a certain length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, float("nan")) if input_ids.shape[1] == self.length else scores


class SumStops(StoppingCriteria):
    """Stops rows whose sum of tokens is divisible."""

    def __init__(self, divisor: int):
        self.divisor = divisor

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(-1) % self.divisor == 0


class CallsStop(StoppingCriteria):
    """Stops everything at the so-manieth call."""

    def __init__(self, num_calls: int):
        self.num_left = num_calls

    def __call__(self, input_ids, scores, **kwargs):
        self.num_left -= 1
        return torch.full((input_ids.shape[0],), self.num_left <= 0)


def _word(rng: random.Random) -> int:
    return rng.randrange(FIRST_WORD, VOCAB_SIZE)


def _words(rng: random.Random, least: int, most: int) -> list[int]:
    return sorted({_word(rng) for _ in range(rng.randint(least, most))})


def _bad_words(rng: random.Random) -> list[list[int]]:
    return [[_word(rng) for _ in range(rng.randint(1, 2))] for _ in range(rng.randint(1, 4))]


def _allowed(rng: random.Random) -> Callable:
    step = rng.randint(2, 4)
    every = list(range(FIRST_WORD, VOCAB_SIZE))
    return lambda row, ids: [token for token in every if (token + int(ids[-1]) + row) % step]


# Each may join a call; of prompts of `length` tokens.
_WARPERS: dict[str, Callable] = {
    "temperature": lambda rng, length: rng.choice((0.3, 0.7, 1.0, 1.3, 1.8)),
    "top_k": lambda rng, length: rng.choice((0, 1, 5, 30, 200)),
    "top_p": lambda rng, length: rng.choice((0.3, 0.8, 0.95, 1.0)),
    "min_p": lambda rng, length: rng.choice((0.01, 0.1, 0.4)),
    "typical_p": lambda rng, length: rng.choice((0.3, 0.8, 0.95)),
    "epsilon_cutoff": lambda rng, length: rng.choice((1e-3, 0.02)),
    "eta_cutoff": lambda rng, length: rng.choice((1e-3, 0.02)),
    "top_h": lambda rng, length: rng.choice((0.3, 0.7)),
}
_PROCESSORS: dict[str, Callable] = {
    "renormalize_logits": lambda rng, length: True,
    "repetition_penalty": lambda rng, length: rng.choice((0.9, 1.1, 1.5)),
    "encoder_repetition_penalty": lambda rng, length: rng.choice((0.8, 1.3)),
    "no_repeat_ngram_size": lambda rng, length: rng.randint(1, 4),
    "encoder_no_repeat_ngram_size": lambda rng, length: rng.randint(1, 3),
    "min_new_tokens": lambda rng, length: rng.randint(1, 20),
    "min_length": lambda rng, length: length + rng.randint(0, 20),
    "exponential_decay_length_penalty": lambda rng, length: (rng.randint(1, 8), rng.choice((1.05, 1.5))),
    "bad_words_ids": lambda rng, length: _bad_words(rng),
    "sequence_bias": lambda rng, length: [[words, rng.choice((-4.0, -0.5, 2.0))] for words in _bad_words(rng)],
    "suppress_tokens": lambda rng, length: _words(rng, 1, 20),
    "begin_suppress_tokens": lambda rng, length: _words(rng, 1, 40),
    "forced_eos_token_id": lambda rng, length: _word(rng),
    "remove_invalid_values": lambda rng, length: True,
    "guidance_scale": lambda rng, length: rng.choice((1.5, 3.0)),
    "prefix_allowed_tokens_fn": lambda rng, length: _allowed(rng),
    "watermarking_config": lambda rng, length: WatermarkingConfig(bias=2.0, seeding_scheme=rng.choice(("lefthash", "selfhash"))),
}  # fmt: skip
_SYNTH_ID_KEYS = [654, 400, 836, 123, 340]


def draw_settings(rng: random.Random, num_rows: int, length: int) -> Settings:
    """Settings for a call with prompts of `length` tokens."""
    settings = Settings()
    values = settings.values
    values["do_sample"] = rng.random() < 0.6
    values["max_new_tokens"] = rng.choice((1, 2, rng.randint(3, 20), rng.randint(15, 40), rng.randint(25, 40)))
    values["pad_token_id"] = 0
    if rng.random() < 0.7:
        _draw_processors(rng, settings, num_rows, length)
    _draw_stops(rng, settings, num_rows, length)
    if rng.random() < 0.4:
        values["return_dict_in_generate"] = True
        values["output_scores"], values["output_logits"] = rng.random() < 0.6, rng.random() < 0.6
        if rng.random() < 0.05:
            values["output_hidden_states"] = True
    if rng.random() < 0.15:
        values["prefill_chunk_size"] = rng.randint(1, 8)
    return settings


def _draw_processors(rng: random.Random, settings: Settings, num_rows: int, length: int) -> None:
    values = settings.values
    is_sampled = values["do_sample"]
    # Rare settings on purpose: of many at once, each makes the text less like what the draft has learnt.
    chance = rng.choice((0.02, 0.05, 0.1))
    for name, draw in (_WARPERS if is_sampled else {}).items():
        if rng.random() < 2 * chance:
            values[name] = draw(rng, length)
    for name, draw in _PROCESSORS.items():
        if rng.random() < chance:
            values[name] = draw(rng, length)
    if is_sampled and rng.random() < chance:
        values["watermarking_config"] = SynthIDTextWatermarkingConfig(
            ngram_len=rng.randint(2, 5), keys=_SYNTH_ID_KEYS, context_history_size=rng.choice((8, 1024))
        )
    settings.margin_scale = max(1.0, 1 / values.get("temperature", 1.0)) * values.get("guidance_scale", 1.0)
    if rng.random() < 1.5 * chance:
        last = length + rng.randint(1, values["max_new_tokens"])
        kinds = [Bias, Counting, Drawing]
        # Greedy decoding takes NaN for the largest; that is refused with a draft and needs no plain twin.
        kinds += [lambda: NotFinite(last)] if is_sampled or values.get("remove_invalid_values") else []
        kind = rng.choice(kinds)
        settings.draws_noise = kind is Drawing
        settings.factories["logits_processor"] = lambda: LogitsProcessorList([kind()])


def _draw_stops(rng: random.Random, settings: Settings, num_rows: int, length: int) -> None:
    values = settings.values
    if rng.random() < 0.5 or "exponential_decay_length_penalty" in values:
        values["eos_token_id"] = _words(rng, 1, 4)
        if rng.random() < 0.1:
            values["pad_token_id"] = values["eos_token_id"][0]
    if rng.random() < 0.2:
        values["stop_strings"] = [f"w{word}" for word in _words(rng, 1, 3)]
        values["tokenizer"] = TOKENIZER
    if rng.random() < 0.05:
        values["max_time"] = rng.choice((0.0, 1e6))
    if rng.random() < 0.1:
        number = rng.randint(2, 30)
        kind = rng.choice((SumStops, CallsStop) if num_rows == 1 else (SumStops,))
        settings.factories["stopping_criteria"] = lambda: StoppingCriteriaList([kind(number)])


def draw_cache(rng: random.Random, target, is_chat: bool, total: int) -> tuple[str, Callable[[], object] | None, dict]:
    """A kind of cache for the texts of up to `total` tokens: its name, what makes the caller's own, other arguments."""
    config = target.config
    kinds = ["dynamic with windows", "dynamic"]
    try:
        StaticCache(config, max_cache_len=8)
        kinds += ["static"]
    except (ValueError, KeyError, NotImplementedError):
        pass
    own = {
        "dynamic": DynamicCache,
        "dynamic with windows": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config, max_cache_len=total),
    }
    if config.model_type == "lfm2":  # whose convolutions need layers of their own
        kinds.remove("dynamic")
    if is_chat or rng.random() < 0.3:
        kind = rng.choice(kinds)
        total += rng.choice((0, 1, 7, 100))
        return f"own {kind}", own[kind], {}
    kind = rng.choice((None, None, None, None, "static" if "static" in kinds else None, "no cache"))
    if kind is None:
        return "default", None, {}
    return kind, None, {"use_cache": False} if kind == "no cache" else {"cache_implementation": kind}


def draw_tree(rng: random.Random, num_draft_tokens: int) -> dict:
    """Tree settings for `draft.generation_config`."""
    tree = rng.choice(("auto", "auto", "static", "static", "chain"))
    top_k, depth = min(rng.randint(1, 10), num_draft_tokens), rng.randint(1, 8)
    num_nodes = rng.randint(1, 40)
    if tree == "static":
        num_nodes = min(num_nodes, top_k + (depth - 1) * top_k**2)
    switches = {f"tree_{name}": rng.random() < 0.7 for name in ("ngrams", "coupled", "text_tokens")}
    return {"tree": tree, "tree_top_k": top_k, "tree_depth": depth, "tree_num_nodes": num_nodes, **switches}
