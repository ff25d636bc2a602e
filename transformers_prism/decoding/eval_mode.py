"""Put models in eval mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Turn off dropout, and gradient checkpointing, which would keep no cache; afterwards every part is as it was.

    Args:
        models (`nn.Module`): any; parts of them may be in train mode where the model itself is not.
    """
    in_training = [module for model in models for module in model.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
