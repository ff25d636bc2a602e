"""What a training step costs: against the authors' way of aligning, over the number of steps S, with other losses, and in memory.

    python -m benchmarks.training --json result.json
    python -m benchmarks.training --repeat 2 --length 64 --batch-size 1 --no-memory

Random weights and random data of the target's sizes; forward, loss and backward, without the optimizer.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated

import torch
import typer
from transformers.utils import logging

from benchmarks.scaling import bootstrap_median
from transformers_prism.bench.record import write_record
from transformers_prism.cli.options import JsonOption, TargetOption, report_file, user_errors
from transformers_prism.configuration_prism import PrismConfig
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.target import load_target
from transformers_prism.training.alignment import AlignedPasses, aligned_forward, history_mask
from transformers_prism.training.losses import LossWeights, aligned_loss

# Losses that are timed in addition to the usual one, by the suffix of the study's recipes after prism-m2.
LOSSES: Mapping[str, LossWeights] = MappingProxyType(
    {
        "vocab-sample": LossWeights(vocab_sample=0.25),
        "vocab-sample-0.1": LossWeights(vocab_sample=0.1),
    }
)
_PLAIN_LOSS = LossWeights()
# Of (draft, input_ids, target_hidden, num_steps).
Forward = Callable[..., list[torch.Tensor]]


def authors_forward(draft, input_ids: torch.LongTensor, target_hidden: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """The same predictions as [`aligned_forward`] with `context_kv="own_module"`, computed as the authors do.

    Every forward projects all earlier streams to keys and values again, with its own module, and makes a full `(T, T)`
    matrix of scores for each of them, of which it uses some diagonals. The mask that their code lacks is added.
    Source: `cnets_hass.py` of the PRISM artifact, rewritten from its description.
    """
    passes = AlignedPasses(draft, input_ids)
    num_rows = input_ids.shape[1]
    rows = torch.arange(num_rows, device=input_ids.device)
    offset = rows[:, None] - rows[None, :]
    streams, predictions = [draft.fuse(target_hidden)], []
    for step in range(num_steps):
        module = draft.processing_modules[draft.config.module_of_step(step)]
        (layer,) = module.layers
        attention = layer.self_attn
        inputs = [module.project(passes.embeddings, stream) for stream in streams]
        keys_values = [passes._keys_values(attention, layer.attention_input(one, passes.embeddings)) for one in inputs]
        queries = passes._rotate(passes._heads(attention.q_proj(layer.attention_input(inputs[-1], passes.embeddings))))
        groups = queries.shape[1] // keys_values[0][0].shape[1]
        # Query row i reads key row j from the stream of step - (i - j), or from the first stream if that is negative.
        source = (step - offset).clamp(min=0)
        scores = queries.new_full((*queries.shape[:3], num_rows), -torch.inf)
        for index, (keys, _) in enumerate(keys_values):
            product = queries @ keys.repeat_interleave(groups, dim=1).transpose(-1, -2) * attention.scaling
            scores = torch.where((source == index) & (offset >= 0), product, scores)
        weights = scores.softmax(dim=-1)
        output = torch.zeros_like(queries)
        for index, (_, values) in enumerate(keys_values):
            output = output + (weights * (source == index)) @ values.repeat_interleave(groups, dim=1)
        attended = attention.o_proj(output.transpose(1, 2).flatten(2))
        predictions.append(layer.after_attention(inputs[-1], attended))
        streams.append(torch.cat((streams[-1][:, :1], predictions[-1][:, :-1]), dim=1))
    return predictions


class TrainingStep:
    """A draft with random data, ready for timed steps.

    Args:
        target (`PreTrainedModel`): the model whose sizes are used.
        num_modules, draft_vocab_size (`int`): of the draft.
        batch_size, length (`int`): conversations, and tokens of each.
        forward (`Callable`): the aligned forwards.
    """

    def __init__(
        self,
        target,
        num_modules: int = 2,
        draft_vocab_size: int = 8192,
        batch_size: int = 4,
        length: int = 512,
        forward: Forward = aligned_forward,
    ):
        config = PrismConfig.from_target(
            target, num_processing_modules=num_modules, draft_vocab_size=min(draft_vocab_size, target.config.vocab_size)
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.draft = PrismDraftModel(config).to(device=target.device, dtype=target.dtype).train()
            # States as large as normed ones, so that nothing overflows.
            shape = batch_size, length, config.fused_hidden_size
            self.states = torch.randn(shape, device=target.device, dtype=target.dtype)
            self.input_ids = torch.randint(0, config.vocab_size, shape[:2], device=target.device)
        self.draft.bind(target)
        self.forward = forward
        self.label = self.states[..., -target.config.hidden_size :]

    def __call__(self, num_steps: int, weights: LossWeights = _PLAIN_LOSS) -> float:
        """Seconds of forward, loss and backward."""
        self.draft.zero_grad(set_to_none=True)
        seen = history_mask(self.input_ids.shape[1], num_steps, self.input_ids.device)
        mask = seen[:, None].expand(-1, self.input_ids.shape[0], -1)
        _wait(self.states.device)
        start = time.perf_counter()
        predictions = self.forward(self.draft, self.input_ids, self.states, num_steps)
        aligned_loss(self.draft, predictions, self.label, mask, weights).total.backward()
        _wait(self.states.device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bench_training(
    target, num_steps: int = 3, most_steps: int = 6, repeat: int = 10, batch_size: int = 1, length: int = 2048
) -> dict:
    """Time training steps, in turn in one process.

    Args:
        target: whose sizes count.
        num_steps: S of the comparison with the authors' way.
        most_steps: S is timed from 1 to this.
        repeat: steps of each kind; medians count.
        batch_size, length: conversations in a step, and tokens of each.
    Returns:
        `dict`: `ratio`, the authors' seconds over ours (median of pairs) with its 95 % bootstrap `interval`;
        `tokens_per_second` of both; `seconds_by_steps` for S = 1, 2, ...; `growth`, the seconds that one more step adds
        over those of S = 1; `over_plain_loss`, the seconds with each of [`LOSSES`] over those without (median of pairs).
    """
    ours = TrainingStep(target, batch_size=batch_size, length=length)
    authors = TrainingStep(target, batch_size=batch_size, length=length, forward=authors_forward)
    for way in (ours, authors):
        way(num_steps)
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(repeat):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            seconds[which].append((ours, authors)[which](num_steps))
    ratios = [theirs / own for own, theirs in zip(*seconds, strict=True)]
    by_steps: list[list[float]] = [[] for _ in range(most_steps)]
    for _ in range(repeat):
        for count in range(1, most_steps + 1):
            by_steps[count - 1].append(ours(count))
    medians = [statistics.median(times) for times in by_steps]
    by_loss: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(repeat):
        plain = ours(num_steps)
        for name, weights in LOSSES.items():
            by_loss[name].append(ours(num_steps, weights) / plain)
    num_tokens = batch_size * length
    return {
        "num_tokens": num_tokens,
        "num_steps": num_steps,
        "ratio": statistics.median(ratios),
        "interval": bootstrap_median(ratios),
        "tokens_per_second": {
            name: num_tokens / statistics.median(times) for name, times in zip(("ours", "authors"), seconds, strict=True)
        },
        "seconds_by_steps": medians,
        "growth": [(later - earlier) / medians[0] for earlier, later in zip(medians, medians[1:], strict=False)],
        "over_plain_loss": {name: statistics.median(ratios) for name, ratios in by_loss.items()},
    }


def peak_memory(target, length: int = 2048, num_steps: int = 5, checkpoint_activations: bool = False) -> int:
    """Bytes that one training step holds at its peak, in addition to weights, gradients and data.

    Args:
        target: whose sizes count.
        length, num_steps (`int`): tokens of the one conversation, and S.
        checkpoint_activations (`bool`): compute activations again in the backward pass.
    """
    forward = functools.partial(aligned_forward, checkpoint_activations=checkpoint_activations)
    step = TrainingStep(target, batch_size=1, length=length, forward=forward)
    if target.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target.device)
        before = torch.cuda.memory_allocated(target.device)
        step(num_steps)
        return torch.cuda.max_memory_allocated(target.device) - before
    # The process's peak would include memory that its allocator keeps; the profiler sees every tensor come and go.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(num_steps)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: TargetOption = None,
    num_steps: Annotated[int, typer.Option(min=1, help="Aligned forwards S of the comparison.")] = 3,
    most_steps: Annotated[int, typer.Option(min=2, help="S is timed from 1 to this.")] = 6,
    repeat: Annotated[int, typer.Option(min=2, help="Steps of each kind; medians count.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations in a step.")] = 1,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a conversation.")] = 2048,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of a step with 2048 tokens and S = 5.")] = True,
    json_file: JsonOption = None,
):
    """Training steps, ours and with the authors' way of aligning, in turn; how they grow with S; peak memory."""
    logging.disable_progress_bar()
    with user_errors():
        model, _ = load_target(target)
        figures = bench_training(model, num_steps, most_steps, repeat, batch_size, length)
    speeds, (low, high) = figures["tokens_per_second"], figures["interval"]
    typer.echo(
        f"S = {num_steps}: {speeds['ours']:.0f} tokens/s, the authors' way {speeds['authors']:.0f} tokens/s\n"
        f"median ratio of pairs {figures['ratio']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    )
    seconds = figures["seconds_by_steps"]
    relative = ", ".join(f"{value / seconds[0]:.2f}" for value in seconds)
    typer.echo(f"seconds for S = 1 to {most_steps}, over those of S = 1: {relative}")
    losses = ", ".join(f"{name} {ratio:.2f}" for name, ratio in figures["over_plain_loss"].items())
    typer.echo(f"seconds with other losses, over those with the usual one:\n{losses}")
    if memory:
        figures["peak_bytes"] = {
            name: peak_memory(model, checkpoint_activations=name == "checkpointed")
            for name in ("kept", "checkpointed")
        }
        gib = {name: f"{value / 2**30:.2f} GiB" for name, value in figures["peak_bytes"].items()}
        typer.echo(
            f"peak memory of a step, 2048 tokens, S = 5: {gib['kept']}; with checkpointing {gib['checkpointed']}"
        )
    settings = {"num_steps": num_steps, "batch_size": batch_size, "length": length, "repeat": repeat}
    write_record(json_file, "training", model, settings, figures)
    report_file(json_file)


if __name__ == "__main__":
    app()
