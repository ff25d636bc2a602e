"""A pretended CUDA graph: it records operations on CPU tensors and repeats them on the same addresses, as a real one does.

While it captures, nothing stays computed: what operations write to is put back. A replay runs every operation again with
the arguments of the capture and writes the results where the capture's results lie. So whatever a function took from the
host, numbers, shapes and choices, is frozen, and a reading of values is refused.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a stream in capture cannot do.
_REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`; `made` lists all of them."""

    made: list["RecordedGraph"] = []

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_replays = 0
        RecordedGraph.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Record an operation."""
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        if name in _REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((value, value.clone()))
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    def end_capture(self) -> None:
        """Undo what was written."""
        for value, before in reversed(self.written):
            value.copy_(before)

    def replay(self) -> None:
        """Run everything again."""
        self.num_replays += 1
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def _capturing(graph: RecordedGraph, capture_error_mode: str):
    assert capture_error_mode in ("global", "thread_local", "relaxed")
    try:
        with graph:
            yield
    finally:
        graph.end_capture()


def pretend_graphs(monkeypatch) -> list[RecordedGraph]:
    """Let `torch.cuda` capture recorded graphs; returns the list that they will be in."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", _capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(RecordedGraph, "made", [])
    return RecordedGraph.made
