"""Where the time of a round goes: forwards of target and draft, selection, masks, walk, commit, and everything else.

    transformers-prism bench rounds --prompts spec_bench.jsonl --json rounds.json
    transformers-prism bench rounds --prompts spec_bench.jsonl --context 128 --num-rounds 10

The loop itself is not changed: while it runs, a stopwatch wraps the functions of each part. The time of a part leaves out
other parts that run inside it.
"""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from transformers_prism.bench.generate import TokenClock
from transformers_prism.decoding.cache import CommittedCache
from transformers_prism.decoding.chain_target import ChainTarget
from transformers_prism.decoding.drafter import Drafter
from transformers_prism.decoding.recurrent_target import RecurrentTarget
from transformers_prism.decoding.speculation import acceptance_length
from transformers_prism.decoding.transfer import clock
from transformers_prism.decoding.tree_target import TreeTarget
from transformers_prism.policy.automatic import AutomaticTrees

CPU = torch.device("cpu")
PARTS = ("target forward", "draft forwards", "selection", "masks", "walk", "commit", "other")
# Everything else is the round's own cost.
FORWARDS = PARTS[:2]
# Functions by name, wrapped in each of our files that calls them, and methods.
_FUNCTIONS = {
    "masks": ("attention_mask", "visible_keys", "within_window", "attach_tree"),
    "selection": ("select_nodes", "root_tree"),
    "walk": ("walk",),
}
_METHODS = {
    "masks": ((Drafter, "_mask"), (TreeTarget, "_masks")),
    "selection": (
        *((Drafter, "grow"), (Drafter, "draw"), (AutomaticTrees, "propose"), (AutomaticTrees, "learn")),
    ),
    "commit": ((CommittedCache, "commit"), (TreeTarget, "commit"), (ChainTarget, "commit"), (RecurrentTarget, "commit")),
}
_DRAFT_FUNCTIONS = ("compute_logits", "fuse")
_CALLING_FILES = ("generation", "decoding.drafter", "decoding.round_values", "decoding.tree_target")


class Stopwatch:
    """Seconds of each part, each without the parts that run inside it; and when rounds and steps end.

    It is a streamer, which the loop tells of the end of each round.

    Args:
        device (`torch.device`): each part waits for an accelerator, so that its work counts for that part.
    """

    def __init__(self, device: torch.device = CPU):
        self.device = device
        self.running: list[str] = []
        self.since = 0.0
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.rounds: list[dict[str, float]] = []
        self.last_end: float | None = None

    def begin(self, part: str) -> None:
        """From here on, time counts for this part."""
        self._charge()
        self.running.append(part)

    def end_part(self) -> None:
        """From here on, time counts for the enclosing part again."""
        self._charge()
        self.running.pop()

    def _charge(self) -> None:
        now = clock(self.device)
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function: Callable) -> Callable:
        """The function with its time charged to a part."""

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end_part()

        return wrapper

    def put_round(self, num_accepted: int) -> None:
        """A round has ended; the first one, which reads the prompt, is not kept."""
        now = time.perf_counter()
        if self.last_end is not None:
            spent = dict(self.seconds)
            spent["other"] = now - self.last_end - sum(spent.values())
            self.rounds.append(spent)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.last_end = now

    def put(self, value) -> None:
        """Tokens are not looked at."""

    def end(self) -> None:
        """The next round is the first of another text."""
        self.last_end = None


@contextmanager
def watched(target, draft) -> Iterator[Stopwatch]:
    """A stopwatch on every part of the rounds of these models, for as long as the block runs."""
    watch = Stopwatch(target.device)
    with ExitStack() as stack:
        for part, names in _FUNCTIONS.items():
            for file in _CALLING_FILES:
                module = sys.modules[f"transformers_prism.{file}"]
                for name in set(names) & set(vars(module)):
                    stack.enter_context(mock.patch.object(module, name, watch.timed(part, vars(module)[name])))
        for part, methods in _METHODS.items():
            for owner, name in methods:
                stack.enter_context(mock.patch.object(owner, name, watch.timed(part, vars(owner)[name])))
        for name in _DRAFT_FUNCTIONS:
            stack.enter_context(mock.patch.object(draft, name, watch.timed("draft forwards", getattr(draft, name))))
        for model, part in ((target, "target forward"), (draft, "draft forwards")):
            before = model.register_forward_pre_hook(lambda module, args, part=part: watch.begin(part))
            after = model.register_forward_hook(lambda module, args, output: watch.end_part(), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield watch


def profile_rounds(target, draft, items: list[dict], num_rounds: int, max_new_tokens: int = 64) -> dict:
    """Where the time goes, on average over at least `num_rounds` rounds, if `items` (inputs of generate()) give that
    many.

    Returns:
        `dict`: milliseconds of a round, of its parts, of a plain step and of a draft step, tau, the share of time
            outside forwards.
    Raises:
        ValueError: if the items give no round at all.
    """
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    target.generate(**items[0], **{**settings, "max_new_tokens": 12}, assistant_model=draft)
    num_committed = num_steps = num_seen = 0
    plain: list[float] = []
    with watched(target, draft) as watch:
        for inputs in items:
            target.generate(**inputs, **settings, assistant_model=draft, streamer=watch)
            speculation = draft.last_speculation
            num_seen += sum(speculation.num_rounds)
            num_committed += sum(speculation.num_committed)
            num_steps += sum(tree.num_steps for tree in speculation.trees[1:])
            plain += _plain_steps(target, inputs)
            if len(watch.rounds) >= num_rounds:
                break
    if not watch.rounds:
        raise ValueError(f"expected rounds to profile, got none from {len(items)} prompts")
    parts = {part: 1000.0 * sum(one[part] for one in watch.rounds) / len(watch.rounds) for part in PARTS}
    round_ms = sum(parts.values())
    return {
        "num_rounds": len(watch.rounds),
        "acceptance_length": acceptance_length(num_committed, num_seen),
        "round_ms": round_ms,
        "parts_ms": parts,
        "rest_share": 1.0 - sum(parts[part] for part in FORWARDS) / round_ms,
        "step_ms": 1000.0 * sum(plain) / len(plain),
        "draft_steps_per_round": num_steps / len(watch.rounds),
        "draft_step_ms": parts["draft forwards"] * len(watch.rounds) / num_steps if num_steps else None,
    }


def _plain_steps(target, inputs: dict, num_steps: int = 8) -> list[float]:
    """Seconds of plain steps, with the same hooks on the target, so that both ways bear their cost."""
    clock = TokenClock()
    target.generate(
        **inputs, max_new_tokens=num_steps + 1, min_new_tokens=num_steps + 1, do_sample=False, streamer=clock
    )
    return [end - start for start, end in zip(clock.times[1:], clock.times[2:], strict=False)]


def weight_bytes(target, draft) -> dict:
    """Bytes of weights that a forward of the target, and on average a draft step, read.

    The target's input embedding counts only if it is also the head. A draft step reads a module and its rows of the head.
    """
    embedding = target.get_input_embeddings()
    is_head = target.get_output_embeddings() is not None and target.get_output_embeddings().weight is embedding.weight
    target_bytes = sum(weight.numel() * weight.element_size() for weight in target.parameters())
    if not is_head:
        target_bytes -= embedding.weight.numel() * embedding.weight.element_size()
    config = draft.config
    element = next(draft.parameters()).element_size()
    modules = [sum(weight.numel() for weight in module.parameters()) for module in draft.processing_modules]
    steps = [modules[module] for module in config.draft_step_to_module]
    head = (config.draft_vocab_size or config.vocab_size) * config.hidden_size
    return {"target": target_bytes, "draft_step": int((sum(steps) / len(steps) + head) * element)}


def profile_rows(profiles: list[dict]) -> tuple[list[str], list[list[str]]]:
    """A heading and a row per profile, as text: milliseconds of each part."""
    heading = ["context", "rounds", "tau", "round\nms", *(part.replace(" ", "\n") for part in PARTS), "no forward\n%"]
    rows = [
        [
            str(one["context"]),
            str(one["num_rounds"]),
            f"{one['acceptance_length']:.2f}",
            f"{one['round_ms']:.1f}",
            *(f"{one['parts_ms'][part]:.2f}" for part in PARTS),
            f"{100 * one['rest_share']:.1f}",
        ]
        for one in profiles
    ]
    return heading, rows
