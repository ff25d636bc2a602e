"""Values of the host on their way to a device, without a stop; and a clock that does stop for it."""

import time

import torch

# Whose drivers take a copy of pageable memory before a call returns, so that it may be freed; ROCm is called "cuda", too.
ASYNCHRONOUS_DEVICES = ("cuda",)


def on_device(values, device: torch.device) -> torch.Tensor:
    """A tensor, or numbers in lists, on a device.

    Copies from the host wait by default until everything that is queued on the device is done, so that a round would stop
    before its target's forward until the draft's steps have run. Here the host goes on; the device keeps the order. Copies
    to the host wait as always.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, device="cpu")
    return tensor.to(device, non_blocking=device.type in ASYNCHRONOUS_DEVICES)


def clock(device: torch.device) -> float:
    """Seconds from some point on, once the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()
