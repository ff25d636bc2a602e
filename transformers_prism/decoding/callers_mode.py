"""Whether the caller of generate() decodes in `torch.inference_mode`, which rounds leave, for the caller's own objects.

A logits processor, stopping criterion or streamer may keep tensors that it made in this mode, and only there may it write to
them.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_is_inference: ContextVar[bool] = ContextVar("is_inference", default=False)


@contextmanager
def remembering_inference_mode() -> Iterator[None]:
    """For the calls below, remember whether this one came in `torch.inference_mode`."""
    token = _is_inference.set(torch.is_inference_mode_enabled())
    try:
        yield
    finally:
        _is_inference.reset(token)


def as_called() -> AbstractContextManager:
    """The mode that the caller was in, for objects of the caller."""
    return torch.inference_mode() if _is_inference.get() else nullcontext()
