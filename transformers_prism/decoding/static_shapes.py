"""Shapes that a draft keeps from round to round, so that its steps are compiled once.

Where a draft is compiled, the keys of committed positions lie in layers of a fixed length, masks are as wide as these, and
the inputs of a step are padded: to a fixed number of committed positions in step 0, to `tree_top_k` nodes in later steps.
Prompts, and the rare rounds that commit more positions, are read uncompiled.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from .cache import round_up
from .memory import keep_with, kept_with
from .tree_target import is_compiled, most_positions

_CAPACITY_STEP = 256
_READ_STEP = 8
# Drafts with `context_kv="own_module"` have some graphs per module; torch's own limit is 8 per function and process.
_LIMITS = {"recompile_limit": 64, "isolate_recompiles": True}


class StaticShapes(NamedTuple):
    """How a draft's steps are padded.

    Args:
        capacity: positions of cache layers and masks.
        num_read: committed positions that step 0 reads at once.
        width: nodes of a later step.
        run_module: [`~PrismDraftModel.run_module`], compiled, the draft as its first argument; None where the user has
            compiled the draft.
    """

    capacity: int
    num_read: int
    width: int
    run_module: Callable | None


def static_shapes(
    draft, settings, generation_config, is_target_compiled: bool, num_cached: int = 0
) -> StaticShapes | None:
    """The shapes of a generate() call; None if nothing asks for a compiled draft.

    It is compiled by the `compile_config` of its generation configuration, else by that of a call in which generate()
    compiles the target, or by the user, as with `draft.compile()`. `disable_compile=True` of either turns the first two off.

    Args:
        draft (`PrismDraftModel`), settings (`TreeSettings`): of the call.
        generation_config (`GenerationConfig`): the call's.
        is_target_compiled (`bool`): whether generate() compiles the target's forward in this call.
        num_cached (`int`): tokens that are in the cache when the call begins; they may not be among its input_ids.
    """
    own, run_module = draft.generation_config or GenerationConfig(), None
    compile_config = own.compile_config or (generation_config.compile_config if is_target_compiled else None)
    if compile_config is not None and not (own.disable_compile or generation_config.disable_compile):
        run_module = _compiled(draft, compile_config)
    elif not is_compiled(draft):
        return None
    num_read = round_up(settings.depth + 1, _READ_STEP)
    length = generation_config.max_length + num_cached
    room, most = max(num_read, settings.top_k * (settings.depth - 1)), most_positions(draft.config)
    if max(length, room) > most:
        warnings.warn(
            f"the draft is not compiled in this call: expected texts and trees of at most {most} tokens, "
            f"got max_length={length} and trees of {room}",
            stacklevel=6,
        )
        return None
    capacity = round_up(length + room, _CAPACITY_STEP)
    # It only grows, so that calls share what is compiled.
    capacity = max(capacity, kept_with(draft, "capacity", int))
    keep_with(draft, "capacity", capacity)
    return StaticShapes(capacity, num_read, settings.top_k, run_module)


def _compiled(draft, compile_config) -> Callable:
    """The draft's `run_module`, compiled lazily and once for equal configurations."""
    supported = inspect.signature(torch.compile).parameters
    limits = {name: value for name, value in _LIMITS.items() if name in supported}
    arguments: dict[str, Any] = {**compile_config.to_dict(), **limits}
    known, run_module = kept_with(draft, "compiled", lambda: (None, None))
    if known != arguments:
        # Not a bound method, which would keep the draft alive.
        run_module = torch.compile(type(draft).run_module, **arguments)
        keep_with(draft, "compiled", (arguments, run_module))
    return run_module
