"""Copies from the host to a device that do not wait for it, and a clock that does."""

import time

import torch

# Devices whose drivers copy pageable memory before a call returns, so that it may be freed; ROCm is called "cuda", too.
ASYNCHRONOUS_DEVICES = ("cuda",)


def on_device(values, device: torch.device) -> torch.Tensor:
    """A tensor, or numbers in lists, on a device.

    By default a copy from the host waits until everything that is queued on the device is done. A round would then wait for
    the draft's steps before it queues the target's forward. Here the host goes on; the device keeps the order. Copies to the
    host wait as always.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, device="cpu")
    return tensor.to(device, non_blocking=device.type in ASYNCHRONOUS_DEVICES)


def clock(device: torch.device) -> float:
    """The time in seconds, read once the device has done everything that was queued."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
    return time.perf_counter()
