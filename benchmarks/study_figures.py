"""What the records of a study say: tau of several seeds and its interval, and one recipe against another."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable

from transformers_prism.decoding.speculation import acceptance_length

# Records of one side of a comparison, one per seed; a value and the ends of its interval.
Sides = tuple[list[dict], ...]
Interval = tuple[float, float, float]
# Recipes for which the study says how tau grows with the data.
GROWING = ("eagle2", "hass", "eagle3", "stacked2", "prism-m2")
_NUM_RESAMPLES = 1000
_FEWEST_ROUNDS = 50  # a share of fewer rounds is not shown


def pooled_tau(records: list[dict]) -> float:
    """Mean over records (seeds) of tau."""
    return mean_of(records, "tau")


def mean_of(records: list[dict], name: str) -> float:
    """Mean over records of one of their figures."""
    return sum(record[name] for record in records) / len(records)


def tau_interval(records: list[dict], *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of [`pooled_tau`]: seeds are resampled, and prompts, the same ones for all seeds.

    Of S seeds S - 1 are drawn, so that their mean varies as between studies. One seed shows no variation between seeds.

    Args:
        records (`list[dict]`): of one recipe, volume, tree and temperature, one per seed.
        seed (`int`): of the draws.
    """

    answered = _answered(records)

    def draw(generator: random.Random) -> float:
        chosen, places = _resample(generator, records, answered)
        taus = [_tau([record["answers"][place] for place in places]) for record in chosen]
        return sum(taus) / len(taus)

    return _bootstrap(draw, seed)


def _answered(records: list[dict]) -> list[int]:
    """Places of the prompts whose answer took rounds in every record; an answer that ends at once says nothing of a draft."""
    answers = zip(*(record["answers"] for record in records), strict=True)
    return [place for place, of_records in enumerate(answers) if all(one["num_rounds"] for one in of_records)]


def _resample(generator: random.Random, of_seeds: list, answered: list[int]) -> tuple[list, list[int]]:
    """Resampled entries of seeds, as many as [`tau_interval`] says, and resampled places of prompts."""
    chosen = generator.choices(of_seeds, k=max(1, len(of_seeds) - 1))
    return chosen, generator.choices(answered, k=len(answered))


def ratio_interval(*ways: Sides, seed: int = 0) -> Interval:
    """The ratio of tau of one side's records to the other's, and its 95 % interval by paired bootstrap; the geometric mean
    over ways of decoding.

    Seeds and prompts are resampled, the same ones for all sides and ways, since acceptance on a prompt is correlated between
    drafts.

    Args:
        ways: for each tree and temperature the records of both sides, of the same seeds and prompts.
        seed (`int`): of the draws.
    """
    return _interval_of_products(ways, (1, -1), seed)


def growth_interval(*ways: Sides, seed: int = 0) -> Interval:
    """The factor by which more data raises a recipe's tau, over that of another recipe, and its 95 % interval; the
    geometric mean over ways of decoding.

    Args:
        ways: for each tree and temperature records of the recipe with the larger and with the smaller volume, then of the
            other recipe with the larger and with the smaller one, all of the same seeds and prompts.
        seed (`int`): of the draws.
    """
    return _interval_of_products(ways, (1, -1, -1, 1), seed)


def _interval_of_products(ways: tuple[Sides, ...], powers: tuple[int, ...], seed: int) -> Interval:
    """The product of the sides' taus, each raised to its power, and its interval."""
    seeds = [sorted(record["seed"] for record in side) for way in ways for side in way]
    if any(one != seeds[0] for one in seeds):
        raise ValueError(f"expected records of the same seeds on all sides, got {seeds}")
    answered = _answered([record for way in ways for side in way for record in side])
    # For each seed its records, by way and side.
    by_seed = list(zip(*(zip(*map(_by_seed, way), strict=True) for way in ways), strict=True))

    def product(taus: list[list[float]]) -> float:
        logs = [power * math.log(tau) for of_way in taus for power, tau in zip(powers, of_way, strict=True)]
        return math.exp(sum(logs) / len(taus))

    def draw(generator: random.Random) -> float:
        chosen, places = _resample(generator, by_seed, answered)
        return product(
            [
                [
                    sum(_tau([one[way][side]["answers"][place] for place in places]) for one in chosen)
                    for side in range(len(powers))
                ]
                for way in range(len(ways))
            ]
        )

    return product([[pooled_tau(side) for side in way] for way in ways]), *_bootstrap(draw, seed)


def of_common_seeds(*sides: list[dict]) -> list[list[dict]]:
    """Those records of each side whose seed all other sides have, too."""
    seeds = set.intersection(*({record["seed"] for record in side} for side in sides)) if sides else set()
    return [[record for record in side if record["seed"] in seeds] for side in sides]


def _bootstrap(draw: Callable[[random.Random], float], seed: int) -> tuple[float, float]:
    """95 % interval of what is drawn."""
    generator = random.Random(seed)
    drawn = sorted(draw(generator) for _ in range(_NUM_RESAMPLES))
    return drawn[int(0.025 * _NUM_RESAMPLES)], drawn[int(0.975 * _NUM_RESAMPLES) - 1]


def _tau(answers: list[dict]) -> float:
    counts = (sum(one[name] for one in answers) for name in ("num_committed", "num_rounds"))
    return acceptance_length(*counts) or 0.0


def _by_seed(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: record["seed"])


def at_common_volume(records: list[dict]) -> list[dict]:
    """Records of the volume of data with which most recipes were trained, the larger one in a tie."""
    by_volume = grouped(records, "num_data_tokens")
    return by_volume[max(by_volume, key=lambda volume: (len(grouped(by_volume[volume], "recipe")), volume))]


def tau_after(seconds: float, records: list[dict]) -> float | None:
    """tau of a recipe after `seconds` of training, interpolated between two volumes of data over the logarithm of seconds.

    Args:
        seconds (`float`): of training.
        records (`list[dict]`): of one recipe, tree and temperature, of some volumes and seeds.
    Returns:
        `float`, or None if `seconds` does not lie between two volumes.
    """

    def place(seconds: float) -> float:
        return math.log(max(seconds, 0.1))  # records hold tenths

    by_volume = grouped(records, "num_data_tokens").values()
    points = sorted((place(mean_of(found, "train_seconds")), pooled_tau(found)) for found in by_volume)
    wanted = place(seconds)
    for (left, tau), (right, next_tau) in itertools.pairwise(points):
        # Means of the same seconds may differ in the last bit.
        if left - 1e-9 <= wanted <= right + 1e-9:
            return tau + (next_tau - tau) * (wanted - left) / (right - left) if right > left else tau
    return None


def is_sweep(records: list[dict]) -> bool:
    """Whether a recipe was trained with several learning rates, which its figures must not be pooled over."""
    by_run = grouped(records, "recipe", "num_data_tokens", "seed", "tree", "temperature")
    return any(len(found) > 1 for found in by_run.values())


def best_rates(records: list[dict]) -> dict[str, float]:
    """For each recipe the learning rate with the highest tau, over all of its records.

    Args:
        records (`list[dict]`): of a sweep.
    Raises:
        ValueError: if a recipe was not trained and measured alike with all of its rates.
    """
    taus = {}
    alike = ("tree", "temperature", "seed", "num_data_tokens", "epochs", "num_prompts", "compute_dtype")
    for (recipe,), members in grouped(records, "recipe").items():
        ways = None
        for (rate,), found in grouped(members, "learning_rate").items():
            measured = sorted([record.get(name) for name in alike] for record in found)
            if ways is not None and measured != ways:
                raise ValueError(f"rates_from: expected {recipe} trained and measured alike with each rate, got {ways} and {measured}")
            ways, taus[recipe, rate] = measured, pooled_tau(found)
    return {
        recipe: max((tau, rate) for (name, rate), tau in taus.items() if name == recipe)[1]
        for recipe, _ in sorted(taus)
    }


def conditional_acceptance(records: list[dict]) -> list[float]:
    """Share of rounds with a token accepted from draft step s among those that had one accepted from step s - 1, in trees that
    are deep enough. A round that the end of its text cut short counts as one that rejected.

    Args:
        records (`list[dict]`): of one recipe and volume.
    Returns:
        `list[float]`: for steps 0, 1, ..., up to the last step that 50 rounds reached.
    """
    depths = [int(record["tree"].split("/")[1]) for record in records]
    counts = [[sum(column) for column in _columns(record["answers"], depth)] for record, depth in zip(records, depths, strict=True)]
    shares = []
    for step in range(max(depths, default=0)):
        deep = [of_record for of_record, depth in zip(counts, depths, strict=True) if depth > step]
        reached, accepted = (sum(sum(of_record[first:]) for of_record in deep) for first in (step, step + 1))
        if reached < _FEWEST_ROUNDS:
            break
        shares.append(accepted / reached)
    return shares


def _columns(answers: list[dict], depth: int) -> list[tuple[int, ...]]:
    """For each number of accepted tokens, 0 to `depth`, the rounds of each answer."""
    rows = [answer["num_rounds_by_accepted"] for answer in answers]
    return list(zip(*([*row, *[0] * (depth + 1 - len(row))] for row in rows), strict=True))


def grouped(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Records grouped by these entries, in the order in which the groups first occur."""
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return dict(groups)


__all__ = [
    "GROWING",
    "at_common_volume",
    "best_rates",
    "conditional_acceptance",
    "grouped",
    "growth_interval",
    "is_sweep",
    "mean_of",
    "of_common_seeds",
    "pooled_tau",
    "ratio_interval",
    "tau_after",
    "tau_interval",
]
