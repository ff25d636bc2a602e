"""What the parts of a round cost here: a target forward over N tokens, and a draft step.

Measured once for a target, a draft, a device, a number of threads and a batch size, kept on disk, and corrected by
every round that runs, since contexts grow and machines slow down. On a busy machine trees look more expensive than they are,
so costs are checked:
  while measuring    if repetitions of a forward take very different times, the costs are used but not kept, and the next
                     call measures again;
  in a new process   a few forwards are compared with the costs that were kept;
  in rounds          if they are clearly faster than was measured, the next call measures again.
"""

import contextlib
import json
import logging
import math
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from huggingface_hub import constants
from torch import nn

from ..cpu import trusting_packed_weights
from ..decoding.drafter import Drafter
from ..decoding.eval_mode import in_eval_mode
from ..decoding.layer_check import input_device
from ..decoding.round_check import foreign_code
from ..decoding.target_side import num_learned_positions
from ..decoding.target_support import Declined
from ..decoding.transfer import clock
from ..decoding.tree_target import is_compiled
from ..kernels.few_queries import few_queries_is_available
from ..transformers_names import attention_name, cache_argument, cache_of, experts_of_step, is_stateful
from ..whole_files import name_of_parts, write_json_if_possible

logger = logging.getLogger(__name__)

# Tokens of one sequence in a target forward that are measured; between them costs are interpolated.
MEASURED_TOKENS = (1, 2, 4, 8, 16, 32, 64)
# Most tokens in a measured forward, all sequences together; beyond it costs are extrapolated.
_MAX_TOKENS = 128
_NUM_REPEATS = 3
# A round moves the estimate a tenth of the way to what it measured, and those of other sizes a fiftieth.
_RATE = 0.1
_SPREAD = 0.2
_OVERHEAD_RATE = 0.1
# A single round, which may have been interrupted, counts as off by this factor at most.
_MAX_SURPRISE = 2.0
# Factor by which the cost of a small tree, relative to a plain step, may differ from what was kept.
_MAX_DRIFT = 1.3
# A machine is busy if repetitions of the usual forward take this many times as long as the fastest.
_MAX_SPREAD = 1.5
# The costs are in doubt once rounds that were clearly faster than measured outnumber the others by this many.
_MOST_FASTER = 8
# A machine that never comes to rest is not measured more often than this in a process.
_MOST_MEASUREMENTS = 3
_FORMAT = 2
_KEPT = ("num_tokens", "verify_seconds", "step_seconds")
# A longer file is not one of ours.
_MOST_BYTES = 10_000


@dataclass
class RoundCosts:
    """Seconds of the parts of a round for a batch.

    Args:
        num_tokens, verify_seconds: tokens in a target forward, all sequences together, increasing, and its seconds.
        step_seconds: of one draft step with its proposals and its share of choosing nodes.
        spread: slowest over fastest repetition when they were measured, for the median forward.
        num_measured: how often they were measured in this process.
    """

    num_tokens: list[int]
    verify_seconds: list[float]
    step_seconds: float
    spread: float = field(default=1.0, compare=False)
    num_measured: int = field(default=0, compare=False)

    def __post_init__(self):
        self._measured = list(self.verify_seconds)  # before rounds corrected them
        self._num_faster = 0

    @property
    def is_busy(self) -> bool:
        """Whether the machine had something else to do when they were measured."""
        return self.spread > _MAX_SPREAD

    @property
    def is_in_doubt(self) -> bool:
        """Whether they should be measured again, since the machine was busy or rounds are faster."""
        return self.num_measured < _MOST_MEASUREMENTS and (self.is_busy or self._num_faster >= _MOST_FASTER)

    def verify(self, num_tokens: int) -> float:
        """Seconds of a target forward over `num_tokens` tokens, all sequences together."""
        return _interpolated(self.num_tokens, self.verify_seconds, num_tokens)

    def observe_verify(self, num_tokens: int, seconds: float) -> None:
        """Correct the estimates by a forward that took `seconds`: near its number of tokens more than far from it."""
        # Long contexts make rounds slower. If rounds are faster than measured, the machine was busy when it was measured.
        is_faster = seconds * _MAX_DRIFT < _interpolated(self.num_tokens, self._measured, num_tokens)
        self._num_faster = max(self._num_faster + (1 if is_faster else -1), 0)
        surprise = _bounded(seconds / self.verify(num_tokens))
        left, share = _between(self.num_tokens, num_tokens)
        for index in range(len(self.num_tokens)):
            nearness = {left: 1 - share, left + 1: share}.get(index, 0.0)
            weight = _SPREAD + (1 - _SPREAD) * min(max(nearness, 0.0), 1.0)
            self.verify_seconds[index] *= surprise ** (_RATE * weight)
        # More tokens never cost less, so that noise does not make a tree look cheaper than plain decoding.
        for index in range(1, len(self.num_tokens)):
            self.verify_seconds[index] = max(self.verify_seconds[index], self.verify_seconds[index - 1])

    def observe_step(self, seconds: float) -> None:
        """Correct the cost of a draft step."""
        self.step_seconds *= _bounded(seconds / self.step_seconds) ** _RATE


class TreeOverhead:
    """How much longer rounds with a tree take outside of their forwards than plain steps do: masks, walk and commit."""

    def __init__(self):
        self.plain: float | None = None  # seconds of rounds without a tree, and with one
        self.with_tree: float | None = None

    def observe(self, has_tree: bool, seconds: float) -> None:
        """Follow the latest round."""
        name = "with_tree" if has_tree else "plain"
        known = getattr(self, name)
        setattr(self, name, seconds if known is None else known + _OVERHEAD_RATE * (seconds - known))

    @property
    def seconds(self) -> float:
        """The difference, 0 until both were seen."""
        if self.plain is None or self.with_tree is None:
            return 0.0
        return max(self.with_tree - self.plain, 0.0)


def _between(points: list[int], num_tokens: int) -> tuple[int, float]:
    """The measured point to the left, and how far towards the next one this number lies."""
    left = min(max(bisect_right(points, num_tokens) - 1, 0), len(points) - 2)
    return left, (num_tokens - points[left]) / (points[left + 1] - points[left])


def _interpolated(points: list[int], seconds: list[float], num_tokens: int) -> float:
    """Seconds at `num_tokens` on the line through the measured points."""
    left, share = _between(points, num_tokens)
    low, high = seconds[left], seconds[left + 1]
    # Beyond the last point its line is extended. Below the first, where sequences have ended, fewer tokens cost at least their
    # share of it, since a steep line would end below zero.
    return max(low + share * (high - low), low * min(num_tokens / points[left], 1.0))


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / _MAX_SURPRISE), _MAX_SURPRISE)


def load_or_measure(target, draft, num_rows: int, known: RoundCosts | None = None) -> RoundCosts:
    """The costs of rounds with `num_rows` sequences: those known, from the disk, or measured, which takes a few dozen
    target forwards and is logged. Models and random generators are left as they are.

    Args:
        known (`RoundCosts`, *optional*): of earlier calls in this process.
    Returns:
        `RoundCosts`: `known` itself if it is not in doubt, else new, for the caller to correct.
    """
    # Rounds of a compiled target are always faster than what was measured without compiling it.
    if known is not None and (not known.is_in_doubt or is_compiled(target)):
        return known
    path = costs_path(target, draft, num_rows)
    num_tokens = [count * num_rows for count in _counts_of_one_row(target, num_rows)]
    kept = _read(path, num_tokens) if known is None else None
    if kept is not None and _still_holds(kept, target, draft, num_rows):
        return kept
    if known is not None:
        logger.warning("measuring this machine again: it was busy when the costs of drafting were measured")
    announcement = "measuring this machine: %d target forwards, about %.1f s; kept in %s"
    costs = measure(target, draft, num_rows, lambda count, seconds: logger.warning(announcement, count, seconds, path))
    costs.num_measured = 1 if known is None else known.num_measured + 1
    if costs.is_busy:
        logger.warning(
            "this machine is busy: the same forward took up to %.1f times as long. These costs of drafting are not kept; the "
            "next call measures again",
            costs.spread,
        )
        return costs
    # A folder that cannot be written to costs a measurement in every process, nothing else.
    write_json_if_possible(path, {name: getattr(costs, name) for name in _KEPT})
    return costs


def costs_path(target, draft, num_rows: int) -> Path:
    """The file in which the costs of this target, draft and number of sequences are kept on this machine."""
    return Path(constants.HF_HOME) / "prism" / "round_costs" / f"{_key(target, draft, num_rows)}.json"


def _read(path: Path, num_tokens: list[int]) -> RoundCosts | None:
    """The costs in a file, or None if it is not one that [`load_or_measure`] wrote for forwards over so many tokens."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or set(found) != set(_KEPT):
        return None
    seconds = found["verify_seconds"]
    if found["num_tokens"] != num_tokens or not isinstance(seconds, list) or len(seconds) != len(num_tokens):
        return None
    are_times = all(type(one) is float and 0 < one < math.inf for one in (*seconds, found["step_seconds"]))
    return RoundCosts(**found) if are_times and seconds == sorted(seconds) else None


def _counts_of_one_row(target, num_rows: int) -> list[int]:
    """Tokens of one sequence in the forwards that are measured, at least two counts, none longer than the target reads."""
    longest = num_learned_positions(target) or _MAX_TOKENS
    counts = [count for count in MEASURED_TOKENS if count * num_rows <= _MAX_TOKENS and count <= longest]
    return counts if len(counts) > 1 else [1, 2]


@torch.no_grad()
def _still_holds(costs: RoundCosts, target, draft, num_rows: int) -> bool:
    """Whether a forward over a small tree, relative to a plain step, still costs about what was kept."""
    index = min(3, len(costs.num_tokens) - 1)
    counts = [costs.num_tokens[one] // num_rows for one in (0, index)]
    with _undisturbed(target, draft):
        now = [min(_time_target(target, draft, num_rows, count) for _ in range(3)) for count in counts]
    drift = now[1] / now[0] / (costs.verify_seconds[index] / costs.verify_seconds[0])
    return 1 / _MAX_DRIFT <= drift <= _MAX_DRIFT


@contextlib.contextmanager
def _undisturbed(target, draft) -> Iterator[None]:
    """Run without compilation and dropout, and leave random generators and models as they are. Models that draw nothing outside
    of training leave the generators to other threads meanwhile."""
    devices = [target.device] if target.device.type == "cuda" else []
    are_compiled = is_compiled(target) or is_compiled(draft)
    uncompiled = torch.compiler.set_stance("force_eager") if are_compiled else contextlib.nullcontext()
    may_draw = bool(foreign_code(target))
    with torch.random.fork_rng(devices=devices, enabled=may_draw), uncompiled, trusting_packed_weights():
        with in_eval_mode(target, draft), kept_frequencies(target, draft):
            yield


@contextlib.contextmanager
def kept_frequencies(*models: nn.Module) -> Iterator[None]:
    """Leave rotary embeddings as they are: those of the types "dynamic" and "longrope" keep frequencies of the longest text,
    or of the last one, and use them for the next."""
    modules = {module for model in models for module in model.modules()}
    found = [one for one in modules if hasattr(one, "rope_type") or any(name.endswith("inv_freq") for name in one._buffers)]
    kept = [(module, _public_state(module), dict(module._buffers), _copies(module._buffers)) for module in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, state, buffers, copies in kept:
                for name in _public_state(module).keys() - state.keys():
                    del module.__dict__[name]
                module.__dict__.update(state)
                for name in module._buffers.keys() - buffers.keys():
                    del module._buffers[name]
                module._buffers.update(buffers)
                for buffer, copy in copies:
                    if not torch.equal(buffer, copy):  # written to in place
                        buffer.copy_(copy)


def _public_state(module: nn.Module) -> dict:
    """Attributes of a module itself, without its parts and hooks."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


def _copies(buffers: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Buffers, each with a copy of what it holds."""
    return [(buffer, buffer.clone()) for buffer in buffers.values() if buffer is not None and not buffer.is_meta]


def _key(target, draft, num_rows: int) -> str:
    """A file name derived from what the costs depend on."""
    layers = Counter(type(module).__name__ for module in target.modules())
    layers.update(type(module).__name__ for module in draft.modules())
    device = input_device(target)
    parts = [
        _FORMAT,
        type(target).__name__,
        sorted(layers.items()),  # packed and quantised layers have classes of their own
        [list(parameter.shape) for parameter in target.parameters()],
        [list(parameter.shape) for parameter in draft.parameters()],
        # The head may be the target's, so its rows do not show in the draft's parameters.
        [draft.config.num_draft_tokens, draft.config.num_attention_heads, list(draft.config.draft_step_to_module)],
        [str(target.dtype), str(draft.dtype)],
        device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
        [torch.get_num_threads(), torch.__version__, torch.backends.cpu.get_cpu_capability(), os.cpu_count()],
        device.type == "cpu" and target.dtype is torch.float32 and few_queries_is_available(),
        attention_name(target.config),
        is_compiled(target),
        num_rows,
    ]
    return name_of_parts(parts)


@torch.no_grad()
def measure(target, draft, num_rows: int, announce: Callable[[int, float], None] = lambda count, seconds: None) -> RoundCosts:
    """Time target forwards and draft steps in the order in which rounds run them, and take the shortest time of each.

    A compiled target is timed uncompiled, since inputs here do not have the shapes that it is compiled for; rounds correct
    that. `announce` is called once, after the first repetition: with the target forwards in all, and their estimated seconds.
    """
    per_row = _counts_of_one_row(target, num_rows)
    times: dict[int, list[float]] = {count: [] for count in per_row}
    step = float("inf")
    started = time.perf_counter()
    with _undisturbed(target, draft):
        for repeat in range(1 + _NUM_REPEATS):
            for count in per_row:
                seconds = _time_target(target, draft, num_rows, count)
                step_seconds = _time_draft(target, draft, num_rows)
                if repeat > 0:  # the first time includes work that is only done once
                    times[count].append(seconds)
                    step = min(step, step_seconds)
            if repeat == 0:
                announce(len(per_row) * (1 + _NUM_REPEATS), (time.perf_counter() - started) * (1 + _NUM_REPEATS))
    measured = [min(one) for one in times.values()]
    for index in range(1, len(measured)):
        measured[index] = max(measured[index], measured[index - 1])
    # One millisecond is added, since the times of shorter forwards vary by the clock and the interpreter alone.
    spread = median((max(one) + 1e-3) / (min(one) + 1e-3) for one in times.values())
    return RoundCosts([count * num_rows for count in per_row], measured, step, spread)


def _time_target(target, draft, num_rows: int, num_tokens: int) -> float:
    input_ids = torch.zeros((num_rows, num_tokens), dtype=torch.long, device=input_device(target))
    arguments = {"use_cache": False}
    if is_stateful(target):  # which run a single token differently after a state
        first = target(input_ids[:, :1], use_cache=True)
        arguments = {"use_cache": True, **cache_argument(target, cache_of(first))}
    start = clock(input_device(target))
    try:
        with experts_of_step(target, num_tokens):
            target(input_ids, output_hidden_states=draft.config.target_layer_ids, **arguments)
    # A model's own code may fail in any way if an input of the call is missing.
    except Exception as error:
        what = f'tree="auto" times forwards over text alone, which {type(target).__name__} refuses'
        raise Declined(f'{what} ({type(error).__name__}: {error}); set tree="static"') from error
    return clock(input_device(target)) - start


def _time_draft(target, draft, num_rows: int) -> float:
    """Seconds of a draft step over a frontier of four, after step 0 over two new positions."""
    drafter = Drafter(draft)
    config = draft.config
    width = len(config.target_layer_ids) * config.target_hidden_size
    ids = torch.zeros((num_rows, 2), dtype=torch.long, device=draft.device)
    hidden = torch.ones((num_rows, 2, width), dtype=target.dtype, device=input_device(target))
    positions = torch.arange(2, device=draft.device).expand(num_rows, -1)
    top_k = min(4, config.num_draft_tokens)
    times = []

    def note(log_probs) -> int:
        times.append(clock(draft.device))
        return top_k

    drafter.prefill(ids, hidden, positions, [2] * num_rows)
    drafter.draw(top_k, 3, note)
    return (clock(draft.device) - times[0]) / 2
