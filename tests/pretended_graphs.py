"""What torch.compile with `mode="reduce-overhead"` does to outputs, without compiling: a graph's next run overwrites them.

`monkeypatch.setattr(torch, "compile", PretendedGraphs().compile)` counts the graphs that torch would make, one for each function,
shape, stride and cache address, and fills what the latest run of any of them returned before the next one.
"""

import functools

import torch
from torch.utils._pytree import tree_flatten, tree_map


def _fill(tensor: torch.Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -(10**6))


class PretendedGraphs:
    """Stands in for torch.compile; `graphs` holds a key of each graph, by the name of its function."""

    def __init__(self):
        self.graphs: dict[str, set] = {}
        self.num_runs = 0
        self.configs: list[dict] = []
        self._latest: list[torch.Tensor] = []

    def compile(self, function, **config):
        """A function that runs as a CUDA graph would."""
        self.configs.append(config)

        @functools.wraps(function)
        def run(*args, **kwargs):
            if torch._dynamo.eval_frame._stance.stance == "force_eager":
                return function(*args, **kwargs)
            self.num_runs += 1
            flat = tree_flatten((args, kwargs))[0]
            keys = [(tuple(one.shape), one.stride(), one.dtype) for one in flat if isinstance(one, torch.Tensor)]
            keys += [one for one in flat if isinstance(one, (int, bool, str, type(None)))]
            layers = [layer for one in flat for layer in getattr(one, "layers", ()) if hasattr(layer, "key_buffer")]
            keys += [layer.key_buffer.data_ptr() for layer in layers]
            self.graphs.setdefault(function.__name__, set()).add(tuple(keys))
            for tensor in self._latest:
                _fill(tensor)
            output = tree_map(lambda one: one.clone() if isinstance(one, torch.Tensor) else one, function(*args, **kwargs))
            self._latest = [one for one in tree_flatten(output)[0] if isinstance(one, torch.Tensor)]
            return output

        return run
