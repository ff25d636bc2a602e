"""Rounds run outside of `torch.inference_mode`; the caller's own objects run in it if generate() was called in it.

A logits processor, stopping criterion or streamer may keep tensors that it made in this mode, and it can only write to them
in this mode.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_is_inference: ContextVar[bool] = ContextVar("is_inference", default=False)


@contextmanager
def remembering_inference_mode() -> Iterator[None]:
    """Remember for the block whether `torch.inference_mode` was on at its start."""
    token = _is_inference.set(torch.is_inference_mode_enabled())
    try:
        yield
    finally:
        _is_inference.reset(token)


def as_called() -> AbstractContextManager:
    """A context with the mode that the caller was in, to call the caller's objects in."""
    return torch.inference_mode() if _is_inference.get() else nullcontext()
