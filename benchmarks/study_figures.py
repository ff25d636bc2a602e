"""What the records of a study say: tau of several seeds and its interval, and one recipe against another."""

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable

from transformers_prism.decoding.speculation import acceptance_length

# Recipes whose growth with the data is told.
GROWING = ("eagle2", "hass", "prism-m2")
_NUM_RESAMPLES = 1000


def pooled_tau(records: list[dict]) -> float:
    """Mean over records (seeds) of tau."""
    return mean_of(records, "tau")


def mean_of(records: list[dict], name: str) -> float:
    """Mean over records of one of their figures."""
    return sum(record[name] for record in records) / len(records)


def tau_interval(records: list[dict], seed: int = 0) -> tuple[float, float]:
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


def ratio_interval(records: list[dict], others: list[dict], seed: int = 0) -> tuple[float, float, float]:
    """tau of some records over that of others, and its 95 % interval by paired bootstrap.

    Seeds are drawn again, and prompts, the same ones for both sides, since what a prompt accepts with one draft says much
    about what it accepts with another.

    Args:
        records, others (`list[dict]`): of the same seeds, tree, temperature and prompts.
        seed (`int`): of the draws.
    """
    pairs = list(zip(_by_seed(records), _by_seed(others), strict=True))

    def draw(generator: random.Random) -> float:
        taus: tuple[list[float], list[float]] = ([], [])
        for pair in generator.choices(pairs, k=len(pairs)):
            places = generator.choices(range(len(pair[0]["answers"])), k=len(pair[0]["answers"]))
            for found, record in zip(taus, pair, strict=True):
                found.append(_tau([record["answers"][place] for place in places]))
        return sum(taus[0]) / sum(taus[1])

    return pooled_tau(records) / pooled_tau(others), *_bootstrap(draw, seed)


def of_common_seeds(records: list[dict], others: list[dict]) -> tuple[list[dict], list[dict]]:
    """Those of both sides whose seed the other side has, too."""
    seeds = {record["seed"] for record in records} & {record["seed"] for record in others}
    first, second = ([record for record in side if record["seed"] in seeds] for side in (records, others))
    return first, second


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


def grouped(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
    """Records by their entries of these names, in the order in which they first come."""
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[name] for name in names)].append(record)
    return dict(groups)


__all__ = [
    "GROWING",
    "at_common_volume",
    "grouped",
    "mean_of",
    "of_common_seeds",
    "pooled_tau",
    "ratio_interval",
    "tau_after",
    "tau_interval",
]
