"""A paper model of rounds on GPUs, from bytes and operations alone. Nothing in it was measured.

    t(forward)   the longer of: bytes read over the memory's bandwidth, operations over the dense bfloat16 peak
    cost         (t(verify) + draft steps * t(draft step)) / t(one token), a round in plain steps
    gain         tau / cost, for a tau that is assumed

Weights are read once per forward, keys and values of the context once per row. Where a model does not fit into one GPU,
several share it evenly. Left out: launches, communication, caches, selection and walk, that no kernel reaches the peak.
Source: data sheets of NVIDIA (A100 80GB SXM, H100 SXM, H200 SXM); shapes from the config.json of meta-llama/Meta-Llama-3-8B
and -70B; the model after Williams et al. 2009, "Roofline".
"""

import math
from dataclasses import dataclass

_BYTES = 2  # bfloat16
# The tree and the draft of the model: one processing module a step, on the target's width.
NUM_NODES, NUM_STEPS, TOP_K, DRAFT_VOCAB = 59, 6, 10, 32000
TAUS = (3.0, 4.0, 5.0)
# Of a GPU's memory, the part that weights may fill.
_WEIGHTS_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """A GPU: bytes per second of its memory, dense bfloat16 operations per second, bytes of memory."""

    name: str
    bandwidth: float
    operations: float
    memory: float


@dataclass(frozen=True)
class Model:
    """A Llama's shape."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Parameters of a decoder layer, without its norms."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Parameters that a forward reads: layers and head."""
        return self.layers * self.layer_weights + self.hidden * self.vocab


GPUS = (
    Gpu("A100 80GB", 2.039e12, 312e12, 80e9),
    Gpu("H100", 3.35e12, 989e12, 80e9),
    Gpu("H200", 4.8e12, 989e12, 141e9),
)
MODELS = (
    Model("LLaMA-3-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    Model("LLaMA-3-70B", 8192, 28672, 80, 64, 8, 128, 128256),
)


def num_gpus(model: Model, gpu: Gpu) -> int:
    """GPUs that hold the weights, a power of two."""
    return 2 ** math.ceil(math.log2(max(model.weights * _BYTES / (gpu.memory * _WEIGHTS_SHARE), 1.0)))


def _seconds(gpu: Gpu, count: int, weights: int, layers: int, model: Model, tokens: int, context: int, rows: int):
    kept = 2 * layers * model.kv_heads * model.head_dim * context * rows  # numbers in keys and values
    num_bytes = _BYTES * (weights + kept)
    attention = 4 * layers * model.heads * model.head_dim * context
    operations = tokens * rows * (2 * weights + attention)
    return max(num_bytes / (count * gpu.bandwidth), operations / (count * gpu.operations))


def forward_seconds(model: Model, gpu: Gpu, tokens: int, context: int = 2048, rows: int = 1) -> float:
    """Seconds of a target forward over `tokens` tokens of each row."""
    return _seconds(gpu, num_gpus(model, gpu), model.weights, model.layers, model, tokens, context, rows)


def draft_step_seconds(model: Model, gpu: Gpu, context: int = 2048, rows: int = 1) -> float:
    """Seconds of a draft step over `TOP_K` nodes of each row."""
    weights = model.layer_weights + 2 * model.hidden**2 + DRAFT_VOCAB * model.hidden
    return _seconds(gpu, num_gpus(model, gpu), weights, 1, model, TOP_K, context, rows)


def round_cost(model: Model, gpu: Gpu, context: int = 2048, rows: int = 1) -> float:
    """A round in plain steps."""
    verify = forward_seconds(model, gpu, NUM_NODES + 1, context, rows)
    draft = NUM_STEPS * draft_step_seconds(model, gpu, context, rows)
    return (verify + draft) / forward_seconds(model, gpu, 1, context, rows)


def free_nodes(model: Model, gpu: Gpu, context: int = 2048, rows: int = 1) -> int:
    """Drafted nodes of each row that a forward verifies in the time of a plain step."""
    step, nodes = forward_seconds(model, gpu, 1, context, rows), 0
    while forward_seconds(model, gpu, nodes + 2, context, rows) <= step:
        nodes += 1
    return nodes


def model_rows(context: int = 2048, batches: tuple[int, ...] = (1, 8, 32)) -> tuple[list[str], list[list[str]]]:
    """A heading and a row per model, GPU and batch, as text."""
    heading = [
        "model",
        "GPUs",
        "batch",
        "plain step ms",
        "verify ms",
        "draft step ms",
        "free nodes",
        "round in plain steps",
    ]
    heading += [f"gain at tau {tau:g}" for tau in TAUS]
    rows = []
    for model in MODELS:
        for gpu in GPUS:
            for batch in batches:
                cost = round_cost(model, gpu, context, batch)
                times = (
                    forward_seconds(model, gpu, 1, context, batch),
                    forward_seconds(model, gpu, NUM_NODES + 1, context, batch),
                    draft_step_seconds(model, gpu, context, batch),
                )
                rows.append(
                    [
                        model.name,
                        f"{num_gpus(model, gpu)} x {gpu.name}",
                        str(batch),
                        *(f"{1000 * seconds:.2f}" for seconds in times),
                        str(free_nodes(model, gpu, context, batch)),
                        f"{cost:.2f}",
                        *(f"{tau / cost:.2f}" for tau in TAUS),
                    ]
                )
    return heading, rows
