"""Exceptions raised at every line of a call of generate(), one after the other; see `faults.py`, whose part this is.

A first call tells which lines of the package, and of the caches and models of transformers below it, run at all. Then the
call is made again for each of them, and the line raises. Afterwards models, caches and settings must be as they were
before the call, and the call, made once more, must give the right output. Lines that run in `finally` or `except` are
counted apart: what is raised there cuts the cleaning up short.
"""

import ast
import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from fitted_pairs import text_of
from soak import Pair, fit_pair
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import transformers_prism
from transformers_prism.decoding.sampler import treating_cpus_as_accelerators
from transformers_prism.policy import automatic
from transformers_prism.policy.costs import RoundCosts
from transformers_prism.transformers_names import ASSISTED_DECODING, CACHE_KEYWORD

PACKAGE = str(Path(transformers_prism.__file__).parent)
_TRANSFORMERS = str(Path(transformers.__file__).parent)
# Of transformers: what runs inside a forward and changes a cache.
_BELOW = (_TRANSFORMERS + "/models/", _TRANSFORMERS + "/cache_utils.py")
EXCEPTIONS = (RuntimeError, KeyboardInterrupt, MemoryError)
LENGTH = {"max_new_tokens": 12, "pad_token_id": 0}
_STATIC = {"tree": "static", "tree_top_k": 3, "tree_depth": 3, "tree_num_nodes": 8}


@dataclass(frozen=True)
class Scenario:
    """A call of generate() that faults are raised in; with a cache of the caller's it is the second turn of a chat."""

    name: str
    architecture: str
    num_rows: int = 1
    arguments: dict = field(default_factory=lambda: {"do_sample": False})
    tree: dict = field(default_factory=lambda: _STATIC)
    make_cache: Callable | None = None
    on_device: bool = False  # the walk and the trees of accelerators


_SAMPLED = {"do_sample": True, "temperature": 0.9}
_KEPT = {**_SAMPLED, "return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.1}
SCENARIOS = (
    Scenario("tree", "mistral"),
    Scenario("sampled batch", "mistral", 3, {**_SAMPLED, "eos_token_id": [39]}, {"tree": "auto"}),
    Scenario("chat", "mistral", 1, _KEPT, {"tree": "auto"}, lambda config: DynamicCache(config=config)),
    Scenario("batch's chat", "mistral", 2, make_cache=lambda config: DynamicCache(config=config)),
    Scenario("static", "llama", 2, {"do_sample": False, "cache_implementation": "static"}),
    Scenario("static chat", "llama", 1, make_cache=lambda config: StaticCache(config, max_cache_len=60)),
    Scenario("static windows", "mistral", 1, make_cache=lambda config: StaticCache(config, max_cache_len=60)),
    Scenario("device", "llama", 2, _SAMPLED, {"tree": "auto"}, on_device=True),
    Scenario("chain", "lfm2", 1, make_cache=lambda config: DynamicCache(config=config)),
)


def pairs_for(scenarios, num_updates: int = 60) -> dict[str, Pair]:
    """Fitted pairs by the names of their architectures."""
    return {name: fit_pair(name, num_updates=num_updates) for name in {one.architecture for one in scenarios}}


class Call:
    """The call of a scenario, ready to be made as often as wanted: each time from the same state of the chat."""

    def __init__(self, scenario: Scenario, pair: Pair):
        self.scenario, self.pair = scenario, pair
        generator = torch.Generator().manual_seed(3)
        self.prompts = text_of(pair.chain, scenario.num_rows, 7, generator)
        self.said = text_of(pair.chain, scenario.num_rows, 2, generator)
        pair.draft.generation_config.update(**{"tree_top_k": 3, "tree_depth": 4, "tree_num_nodes": 12, **scenario.tree})
        self.prepare(None)
        self.expected = self.run(None)

    def prepare(self, draft) -> None:
        """Hold the first turn of a chat."""
        self.inputs, self.cache = {"input_ids": self.prompts}, None
        if self.scenario.make_cache is not None:
            self.cache = self.scenario.make_cache(self.pair.target.config)
            self.inputs[CACHE_KEYWORD] = self.cache
            texts = self._generate(draft, {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0})
            self.inputs["input_ids"] = torch.cat((texts, self.said), dim=1)
        mask = torch.ones_like(self.inputs["input_ids"])
        mask[1:2, :2] = 0
        self.inputs["attention_mask"] = mask if self.cache is None else torch.ones_like(mask)

    def _generate(self, draft, arguments: dict):
        assistant = {} if draft is None else {"assistant_model": draft}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.pair.target.generate(**self.inputs, **assistant, **arguments)

    def run(self, draft) -> torch.Tensor:
        """The sequences."""
        torch.manual_seed(7)
        output = self._generate(draft, {**LENGTH, **self.scenario.arguments})
        return output if isinstance(output, torch.Tensor) else output.sequences

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Costs of rounds that do not depend on the machine, and the paths that the scenario wants."""
        costs = RoundCosts([1, 64], [1.0, 2.0], 0.02)
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, automatic, "known_costs", automatic.known_costs)
            automatic.known_costs = lambda *arguments: costs
            if self.scenario.on_device:
                stack.enter_context(treating_cpus_as_accelerators())
            yield


def state_of(pair: Pair, cache) -> dict:
    """What a call must leave as it was, by name."""
    state: dict = {"grad mode": torch.is_grad_enabled(), "hook": getattr(GenerationMixin, ASSISTED_DECODING)}
    state["lent attention"] = dict(vars(ALL_ATTENTION_FUNCTIONS["sdpa"].prism_lent))
    for owner, model in (("target", pair.target), ("draft", pair.draft)):
        state[f"{owner} generation_config"] = str(model.generation_config)
        for name, module in model.named_modules():
            state[f"{owner} {name} training"] = module.training
            state[f"{owner} {name} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
            state[f"{owner} {name} type"] = (type(module), sorted(vars(module)))
            config = getattr(module, "config", None)
            if config is not None:
                state[f"{owner} {name} attention"] = config._attn_implementation
        for name, parameter in model.named_parameters():
            state[f"{owner} {name}"] = (parameter.data_ptr(), parameter._version, parameter.requires_grad)
    if cache is not None:
        state["cache layers"] = [id(layer) for layer in cache.layers]
        state["cache kind"] = (type(cache), cache.layer_class_to_replicate, int(cache.get_seq_length()))
        for index, layer in enumerate(cache.layers):
            values = dict(vars(layer))
            if isinstance(layer, StaticLayer) and layer.is_initialized:
                # Behind what is stored anything may stand.
                end = int(layer.cumulative_length)
                values |= {name: values[name][:, :, :end] for name in ("keys", "values")}
            state |= {f"cache layer {index} {name}": _kept(value) for name, value in values.items()}
            state[f"cache layer {index} type"] = type(layer)
    return state


def _kept(value):
    """A copy of what a later call could write to."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return {key: _kept(one) for key, one in value.items()} if isinstance(value, dict) else value


def _is_same(one, other) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def changes(before: dict, after: dict) -> list[str]:
    """Names of what is not as it was."""
    names = [name for name in before if name not in after or not _is_same(before[name], after[name])]
    return names + [f"{name} is new" for name in after if name not in before]


@functools.cache
def cleanup_lines(filename: str) -> frozenset[int]:
    """Lines of a file that stand in `finally` or `except`."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(Path(filename).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try):
            for part in [*node.finalbody, *(one for handler in node.handlers for one in handler.body)]:
                lines.update(range(part.lineno, part.end_lineno + 1))
    return frozenset(lines)


class Tracer:
    """Sees each line that runs below [`PrismDraftModel.assist`], and may raise at one of them.

    Args:
        place: file, line, and at which of its runs, from 1, to raise.
        error: what to raise.
    """

    def __init__(self, place: tuple[str, int, int] | None = None, error: type[BaseException] | None = None):
        self.place, self.error = place, error
        self.counts: Counter = Counter()  # of (file, line)
        self.is_inside = self.has_raised = self.was_cleanup = False

    def __enter__(self):
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def _on_call(self, frame, event, value):
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            self.is_inside = True
            return self._on_line
        return self._on_line if self.is_inside and code.co_filename.startswith(_BELOW) else None

    def _on_line(self, frame, event, value):
        if event != "line" or self.has_raised:
            return self._on_line
        key = (frame.f_code.co_filename, frame.f_lineno)
        self.counts[key] += 1
        if self.place == (*key, self.counts[key]):
            self.has_raised, self.was_cleanup = True, self._is_cleanup(frame)
            raise self.error("raised on purpose")
        return self._on_line

    @staticmethod
    def _is_cleanup(frame) -> bool:
        """Whether this frame, or one of ours that waits for it, stands in `finally` or `except`."""
        while frame is not None:
            filename = frame.f_code.co_filename
            if filename.startswith(PACKAGE) and frame.f_lineno in cleanup_lines(filename):
                return True
            frame = frame.f_back
        return False


def lines_of(call: Call) -> list[tuple[str, int, int]]:
    """Places to raise at: each line of a call at its first run, and in the middle of its runs where there are several."""
    call.prepare(call.pair.draft)
    with call.settings(), Tracer() as tracer:
        call.run(call.pair.draft)
    places = [(*key, run) for key, count in tracer.counts.items() for run in sorted({1, (count + 1) // 2})]
    return sorted(places)


def raise_at(call: Call, place: tuple[str, int, int], error: type[BaseException]) -> tuple[list[str], bool]:
    """Raise at a place of a call; what went wrong, and whether that line cleans up."""
    pair = call.pair
    with call.settings():
        call.prepare(pair.draft)
        before = state_of(pair, call.cache)
        problems = []
        tracer = Tracer(place, error)
        try:
            with tracer:
                output = call.run(pair.draft)
        except error as raised:
            if not tracer.has_raised:
                raise
            if "on purpose" not in str(raised):
                problems.append(f"surfaced as {raised!r}")
        except Exception as raised:
            problems.append(f"surfaced as {raised!r}")
        else:
            # Swallowed, or the place was not reached in this run: then the call must have gone as if nothing had been.
            if not torch.equal(output, call.expected):
                problems.append("was swallowed, and the output is wrong")
            return problems, tracer.was_cleanup
        problems += changes(before, state_of(pair, call.cache))
        try:
            if not torch.equal(call.run(pair.draft), call.expected):
                problems.insert(0, "the next call is wrong")
        except Exception as raised:
            problems.insert(0, f"the next call fails: {raised!r}")
        return problems, tracer.was_cleanup


def repair(pair: Pair) -> None:
    """Put models back by hand, so that one fault does not show up in the next."""
    pair.target.eval()
    pair.draft.eval()
    for model in (pair.target, pair.draft):
        model.set_attn_implementation("sdpa")


def check_lines(scenario: Scenario, pair: Pair, every: int = 1, errors=EXCEPTIONS, note=lambda text: None) -> dict:
    """Raise at every so-manieth place of a scenario's call.

    Returns:
        `dict`: "places", "raised" (how often), and "failed" and "in cleanup": where what went wrong, by what it was.
    """
    call = Call(scenario, pair)
    places = lines_of(call)
    chosen = places[::every]
    found: dict = {"places": len(places), "raised": 0, "failed": {}, "in cleanup": {}}
    for number, place in enumerate(chosen):
        # Where not every line is tried, each takes one of the errors in turn.
        for error in errors if every == 1 else [errors[number % len(errors)]]:
            problems, is_cleanup = raise_at(call, place, error)
            found["raised"] += 1
            if problems:
                short = place[0].removeprefix(PACKAGE).removeprefix(_TRANSFORMERS).strip("/")
                kind = found["in cleanup" if is_cleanup else "failed"]
                kind.setdefault("; ".join(problems[:5]), []).append(f"{error.__name__} at {short}:{place[1]}#{place[2]}")
                repair(pair)
        note(f"{scenario.name}: {number + 1} of {len(chosen)} places, {len(found['failed'])} kinds of failures")
    return found
