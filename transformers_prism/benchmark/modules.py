"""Does a round of a draft with many processing modules take longer than with one? PRISM's claim is that it does not.

    transformers-prism bench modules --json result.json
    transformers-prism bench modules --num-rounds 10 --context-length 16

Two random drafts on one target, the same tree, and rounds in turn: each measurement is one generate() call from the
same prompt, whose first round is left out because it reads the prompt, and whose second is timed.
"""

import statistics
import time
from dataclasses import asdict, dataclass

import torch
from transformers import StoppingCriteria
from transformers.generation import BaseStreamer

from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.modeling_prism import PrismDraftModel

# A difference of more than 3 % would be a cost that the method says it does not have.
MAX_RATIO = 1.03


class RoundClock(BaseStreamer, StoppingCriteria):
    """Notes when rounds end, as the loop's streamer, and stops after two, as its stopping criterion."""

    def __init__(self):
        self.ends: list[float] = []

    def put_round(self, num_accepted: int) -> None:
        """Called at the end of each round."""
        self.ends.append(time.perf_counter())

    def put(self, value) -> None:
        """Tokens are not looked at."""

    def end(self) -> None:
        """Nothing to close."""

    def __call__(self, input_ids, scores, **kwargs):
        """Stop within the second round; a round is always timed to its end."""
        return torch.full((input_ids.shape[0],), len(self.ends) >= 1, device=input_ids.device)


@dataclass
class ModulesResult:
    """Round latencies in milliseconds, index by index measured one right after the other.

    `median_ratio` is the median over these pairs of the second draft's time over the first's, and `interval` its 95 %
    bootstrap interval.
    """

    num_modules: tuple[int, int]
    context_length: int
    round_ms: tuple[list[float], list[float]]
    median_ratio: float
    interval: tuple[float, float]
    ratio_of_medians: float

    @property
    def is_within_bar(self) -> bool:
        """Whether the upper end of the interval is at most `MAX_RATIO`."""
        return self.interval[1] <= MAX_RATIO

    def as_json(self) -> dict:
        """What the JSON file holds beside the run's settings."""
        medians = [statistics.median(rounds) for rounds in self.round_ms]
        return {**asdict(self), "median_ms": medians, "max_ratio": MAX_RATIO, "is_within_bar": self.is_within_bar}


def random_draft(target, num_modules: int, tree_settings: dict, seed: int = 0) -> PrismDraftModel:
    """An untrained draft of the target's width whose step k is served by module k; what it proposes does not matter."""
    config = PrismConfig.from_target(
        target,
        num_processing_modules=num_modules,
        draft_step_to_module=list(range(num_modules)),
        context_kv="prefill_module",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = PrismDraftModel(config).to(device=target.device, dtype=target.dtype).eval()
    draft.generation_config.update(tree="static", **tree_settings)
    return draft


def bench_modules(
    target,
    tree_settings: dict,
    num_modules=(1, 8),
    num_rounds: int = 200,
    context_length: int = 64,
    use_packed_weights: bool = False,
) -> ModulesResult:
    """Time `num_rounds` rounds of each of two drafts, in turn.

    Args:
        target: the model whose sizes count.
        tree_settings: `tree_top_k`, `tree_depth` and `tree_num_nodes`, the same for both drafts.
        num_modules: M of the two drafts; the ratio is that of the second over the first.
        num_rounds: rounds of each draft.
        context_length: tokens of the prompt.
        use_packed_weights: prepare the models with [`prepare_for_cpu`].
    """
    drafts = [random_draft(target, count, tree_settings) for count in num_modules]
    if use_packed_weights:
        prepare_for_cpu(target, *drafts)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, target.config.get_text_config().vocab_size, (1, context_length), generator=generator)
    prompt = prompt.to(target.device)
    for draft in drafts * 2:
        _time_round(target, draft, prompt, tree_settings["tree_depth"])
    round_ms: tuple[list[float], list[float]] = ([], [])
    for index in range(num_rounds):
        # Whoever comes second finds warmer caches, so that they change places.
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            round_ms[which].append(_time_round(target, drafts[which], prompt, tree_settings["tree_depth"]))
    ratios = [second / first for first, second in zip(*round_ms, strict=True)]
    ratio_of_medians = statistics.median(round_ms[1]) / statistics.median(round_ms[0])
    return ModulesResult(
        tuple(num_modules),
        context_length,
        round_ms,
        statistics.median(ratios),
        bootstrap_median(ratios),
        ratio_of_medians,
    )


def _time_round(target, draft, prompt, tree_depth: int) -> float:
    """Milliseconds of the second round after `prompt`."""
    clock = RoundClock()
    # Room for two rounds, so that the tree of the second is not cut short at the end of the text.
    length = 2 * tree_depth + 4
    target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=draft,
        streamer=clock,
        stopping_criteria=[clock],
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
    )
    return 1000.0 * (clock.ends[1] - clock.ends[0])


def bootstrap_median(values: list[float], num_resamples: int = 5000, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of a median.

    Here of the ratios within pairs of rounds, which were timed one right after the other: a machine that slows down
    for a second slows both, so that the ratio keeps less of its noise than either time does.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    sample = torch.tensor(values, dtype=torch.float64)  # [n]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(values), (num_resamples, len(values)), generator=generator)
    medians = sample[drawn].quantile(0.5, dim=-1)  # [num_resamples]
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = medians.quantile(tails).tolist()
    return low, high
