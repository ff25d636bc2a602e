"""Copies to a device that the host does not wait for."""

import pytest
import torch
from pretend_accelerator import DEVICE, OnDevice, PretendedAccelerator

from transformers_prism.decoding import transfer
from transformers_prism.decoding.transfer import on_device

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("values", [[[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])])
def test_numbers_and_tensors_arrive_without_a_stop(values, monkeypatch):
    """On CUDA; other devices, whose drivers are less sure, wait."""
    for devices, num_waits in (((DEVICE.type,), 0), ((), 1)):
        monkeypatch.setattr(transfer, "ASYNCHRONOUS_DEVICES", devices)
        with PretendedAccelerator() as accelerator:
            there = on_device(values, DEVICE)
        assert there.host.tolist() == [[1, 2], [3, 4]]
        assert len(accelerator.uploads) == num_waits


def test_what_is_there_stays_and_what_comes_back_is_waited_for(monkeypatch):
    """The host may read it at once."""
    monkeypatch.setattr(transfer, "ASYNCHRONOUS_DEVICES", (DEVICE.type,))
    there = OnDevice(torch.arange(3))
    with PretendedAccelerator() as accelerator:
        assert on_device(there, DEVICE) is there
        assert on_device(there, torch.device("cpu")).tolist() == [0, 1, 2]
    assert accelerator.uploads == []
    assert len(accelerator.reads) == 1
