"""A model in eval mode for as long as something is read from it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout and, since it keeps no cache, without gradient checkpointing; then every part is as it was.

    Args:
        model (`nn.Module`): nothing is done to one that is in eval mode itself.
    """
    if not model.training:
        yield
        return
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


__all__ = ["in_eval_mode"]
