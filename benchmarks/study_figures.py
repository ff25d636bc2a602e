"""What the records of a study say: tau of several seeds and its interval, and one recipe against another."""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable

from transformers_prism.decoding.speculation import acceptance_length

# Records of one side of a comparison, one per seed; a value and the ends of its interval.
Sides = tuple[list[dict], ...]
Interval = tuple[float, float, float]
# Recipes whose growth with the data is told.
GROWING = ("eagle2", "hass", "eagle3", "stacked2", "prism-m2")
_NUM_RESAMPLES = 1000
_FEWEST_ROUNDS = 50  # of which a share is told


def pooled_tau(records: list[dict]) -> float:
    """Mean over records (seeds) of tau."""
    return mean_of(records, "tau")


def mean_of(records: list[dict], name: str) -> float:
    """Mean over records of one of their figures."""
    return sum(record[name] for record in records) / len(records)


def tau_interval(records: list[dict], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of [`pooled_tau`] by bootstrap: seeds are drawn again, and each seed's prompts.

    Args:
        records (`list[dict]`): of one recipe, volume, tree and temperature, one per seed.
        seed (`int`): of the draws.
    """

    def draw(generator: random.Random) -> float:
        drawn = [
            _tau(generator.choices(record["answers"], k=len(record["answers"])))
            for record in generator.choices(records, k=len(records))
        ]
        return sum(drawn) / len(drawn)

    return _bootstrap(draw, seed)


def ratio_interval(*ways: Sides, seed: int = 0) -> Interval:
    """tau of some records over that of others, and its 95 % interval by paired bootstrap; the geometric mean over ways of
    decoding.

    Seeds are drawn again, and prompts, the same ones for all sides and ways, since what a prompt accepts with one draft says
    much about what it accepts with another.

    Args:
        ways: of each tree and temperature some records and others, of the same seeds and prompts.
        seed (`int`): of the draws.
    """
    return _interval_of_products(ways, (1, -1), seed)


def growth_interval(*ways: Sides, seed: int = 0) -> Interval:
    """The factor by which more data raises a recipe's tau, over that of another recipe, and its 95 % interval; the
    geometric mean over ways of decoding.

    Args:
        ways: of each tree and temperature records of the recipe with the larger and with the smaller volume, and of the other
            recipe with the larger and with the smaller one, all of the same seeds and prompts.
        seed (`int`): of the draws.
    """
    return _interval_of_products(ways, (1, -1, -1, 1), seed)


def _interval_of_products(ways: tuple[Sides, ...], powers: tuple[int, ...], seed: int) -> Interval:
    """Of taus of sides, each to its power."""
    sorted_ways = [[_by_seed(side) for side in way] for way in ways]
    num_seeds, num_prompts = len(sorted_ways[0][0]), len(sorted_ways[0][0][0]["answers"])

    def product(taus: list[list[float]]) -> float:
        logs = [power * math.log(tau) for of_way in taus for power, tau in zip(powers, of_way, strict=True)]
        return math.exp(sum(logs) / len(taus))

    def draw(generator: random.Random) -> float:
        drawn = [
            (number, generator.choices(range(num_prompts), k=num_prompts))
            for number in generator.choices(range(num_seeds), k=num_seeds)
        ]
        return product(
            [
                [sum(_tau([side[number]["answers"][place] for place in places]) for number, places in drawn) for side in way]
                for way in sorted_ways
            ]
        )

    return product([[pooled_tau(side) for side in way] for way in sorted_ways]), *_bootstrap(draw, seed)


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
    """Records of the volume of data with which most recipes were trained, the larger one of two alike."""
    by_volume = grouped(records, "num_data_tokens")
    return by_volume[max(by_volume, key=lambda volume: (len(grouped(by_volume[volume], "recipe")), volume))]


def tau_after(seconds: float, records: list[dict]) -> float | None:
    """tau of a recipe after so many seconds of training: between two volumes of data on the line over their logarithm.

    Args:
        seconds (`float`): of training.
        records (`list[dict]`): of one recipe, tree and temperature, of some volumes and seeds.
    Returns:
        `float`, or None where no two volumes lie on both sides.
    """

    def place(seconds: float) -> float:
        return math.log(max(seconds, 0.1))  # records hold tenths

    by_volume = grouped(records, "num_data_tokens").values()
    points = sorted((place(mean_of(found, "train_seconds")), pooled_tau(found)) for found in by_volume)
    wanted = place(seconds)
    for (left, tau), (right, next_tau) in itertools.pairwise(points):
        if left <= wanted <= right:
            return tau + (next_tau - tau) * (wanted - left) / (right - left) if right > left else tau
    return None


def best_rates(records: list[dict]) -> dict[str, float]:
    """The learning rate of each recipe with which its drafts accepted most, over all that the records hold of it.

    Args:
        records (`list[dict]`): of a sweep, each recipe measured alike with each rate.
    """
    taus = {key: pooled_tau(found) for key, found in grouped(records, "recipe", "learning_rate").items()}
    return {
        recipe: max((tau, rate) for (name, rate), tau in taus.items() if name == recipe)[1]
        for recipe, _ in sorted(taus)
    }


def conditional_acceptance(records: list[dict]) -> list[float]:
    """Share of rounds with a token accepted from draft step s among those that had one accepted from step s - 1.

    Args:
        records (`list[dict]`): of one recipe, volume, tree and temperature.
    Returns:
        `list[float]`: for steps 0, 1, ..., as far as 50 rounds came to the step.
    """
    counts: Counter[int] = Counter()
    for record in records:
        for answer in record["answers"]:
            counts.update(dict(enumerate(answer["num_rounds_by_accepted"])))
    shares, reached = [], counts.total()
    for step in range(max(counts, default=0)):
        accepted = reached - counts[step]
        if reached < _FEWEST_ROUNDS:
            break
        shares.append(accepted / reached)
        reached = accepted
    return shares


def grouped(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Records by their entries of these names, in the order in which they first come."""
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
    "mean_of",
    "of_common_seeds",
    "pooled_tau",
    "ratio_interval",
    "tau_after",
    "tau_interval",
]
