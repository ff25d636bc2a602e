"""What drafts gain for a target with recurrent layers: a random qwen3_5_text of a real size, and a scripted draft.

    python -m benchmarks.hybrid --json hybrid.json   the width and depth of a model of 0.8 billion parameters: some minutes on
                                                     two cores, 8 GB of memory
    python -m benchmarks.hybrid --width 64 --layers 4 --vocab-size 512 --new-tokens 24      a trial of a few seconds

It measures the cost of forwards over 1, 4, 8 and 16 tokens after a state, then tokens per second of plain decoding, of chains
of one length and of `tree="auto"`, in turn, and the share of the time spent on carried tokens (accepted tokens that a forward
reads again). A drafted token is plain decoding's token with the probability `--acceptance`. Drafting takes next to no
time, and `auto` is told so: only the target's side is measured.
"""

import random
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.decoding.cache import CacheSnapshot
from transformers_prism.decoding.tree import CandidatePool, Tree
from transformers_prism.policy.automatic import known_costs
from transformers_prism.transformers_names import cache_argument
from transformers_prism.whole_files import write_json

COUNTS = (1, 4, 8, 16)
_SECONDS_OF_SCRIPT = 1e-4  # of a draft step


def random_target(width: int, num_layers: int, vocab_size: int, dtype: torch.dtype):
    """A random qwen3_5_text whose other sizes follow from its width as those of the published models do."""
    config = Qwen3_5TextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=max(width // 4, 16),
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=max(width // 8, 8),
        linear_value_head_dim=max(width // 8, 8),
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class ScriptedDraft(PrismDraftModel):
    """Proposes each token of `script` with a probability, and another otherwise."""

    script: list[int]
    acceptance: float

    def make_drafter(self):
        """Reads the script."""
        return _ScriptedDrafter(self)


class _ScriptedDrafter:
    draft = None  # nothing that it has read is used again in a later call

    def __init__(self, draft: ScriptedDraft):
        self.script, self.acceptance = draft.script, draft.acceptance
        self.num_emitted = 0
        self.root_ids: torch.Tensor | None = None
        self.random = random.Random(0)

    def prefill(self, token_ids, target_hidden, position_ids, num_new, padding_mask=None):
        """Count what was committed; the prompt brings one token."""
        self.num_emitted += 1 if self.root_ids is None else num_new[0]
        self.root_ids = token_ids[:, num_new[0] - 1]

    def keep_sequences(self, places):
        """There is one."""

    def use_shapes(self, shapes):
        """Nothing is compiled."""

    def use_text_tokens(self, is_wanted):
        """It proposes nothing else than the script."""

    def _chain(self, depth: int) -> list[int]:
        right = self.script[self.num_emitted : self.num_emitted + depth]
        right += [0] * (depth - len(right))
        return [token if self.random.random() < self.acceptance else token - 1 if token else 1 for token in right]

    def grow(self, settings, coupling=None) -> Tree:
        """A chain as long as the settings say."""
        assert self.root_ids is not None, "the prompt was read"
        tokens = torch.tensor([[int(self.root_ids[0]), *self._chain(settings.depth)]])
        index = torch.arange(tokens.shape[1])[None]
        return Tree(tokens, (index - 1).clamp(min=0), index, -index.float())

    def draw(self, top_k, depth, choose_width=None, coupling=None) -> CandidatePool:
        """The chain step by step; each token has the probability `acceptance`."""
        steps: list = []
        for step, token in enumerate(self._chain(depth)):
            log_prob = torch.tensor([[self.acceptance]]).log() * (step + 1)
            if step and choose_width is not None and not choose_width(steps[-1][2][:, None]):
                break
            steps.append((torch.tensor([[token]]), torch.full((1, 1), step - 1), log_prob))
        return CandidatePool(steps)


@torch.no_grad()
def forward_seconds(target, prompt, repeats: int) -> dict[int, float]:
    """Median seconds of a forward over each number of tokens after the prompt's state."""
    cache = DynamicCache(config=target.config)
    target(prompt, **cache_argument(target, cache), use_cache=True)
    snapshot, seconds = CacheSnapshot(cache), {}
    for count in COUNTS:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            target(prompt[:, :count], **cache_argument(target, cache), use_cache=True)
            times.append(time.perf_counter() - start)
            snapshot.restore()
        seconds[count] = statistics.median(times[1:])
    return seconds


def _seconds_of(counts: dict[int, float], num_tokens: int) -> float:
    """Seconds of a forward over a number of tokens: interpolated between those measured, extrapolated beyond the last."""
    points = sorted(counts)
    right = next((index for index, point in enumerate(points) if index and point >= num_tokens), len(points) - 1)
    low, high = points[right - 1], points[right]
    return counts[low] + (num_tokens - low) / (high - low) * (counts[high] - counts[low])


def _decode(target, prompt, num_new: int, draft=None, **settings) -> dict:
    """One call: its tokens, its seconds, and for each round's forward the carried tokens and all tokens in it."""
    sizes: list[int] = []
    handle = target.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append((args or (kwargs["input_ids"],))[0].shape[1]), with_kwargs=True
    )
    if draft is not None:
        draft.generation_config.update(**settings)
    try:
        start = time.perf_counter()
        tokens = target.generate(prompt, assistant_model=draft, do_sample=False, max_new_tokens=num_new, pad_token_id=0)
        seconds = time.perf_counter() - start
    finally:
        handle.remove()
    found = {"tokens": tokens[0, prompt.shape[1] :].tolist(), "seconds": seconds, "carried": []}
    if draft is not None:
        trees = draft.last_speculation.trees
        in_rounds = sizes[len(sizes) - len(trees) :]
        found["carried"] = [(size - tree.num_nodes - 1, size) for size, tree in zip(in_rounds, trees, strict=True)]
        found["tau"] = draft.last_speculation.acceptance_length
        found["nodes"] = statistics.mean(tree.num_nodes for tree in trees)
    return found


def measure(target, prompt_length: int, num_new: int, acceptance: float, depth: int, repeats: int) -> dict:
    """All figures of this script, as a dictionary."""
    prompt = torch.randint(1, target.config.vocab_size - 1, (1, prompt_length), generator=torch.Generator().manual_seed(1))
    say("forwards over " + ", ".join(map(str, COUNTS)) + " tokens")
    counts = forward_seconds(target, prompt, repeats)
    say("the text of plain decoding, which the draft will know")
    plain = _decode(target, prompt, num_new)
    draft = ScriptedDraft(PrismConfig.from_target(target, draft_vocab_size=None)).eval().to(target.dtype)
    draft.script, draft.acceptance = plain["tokens"], acceptance
    say("costs that auto goes by")
    draft.bind(target)
    known_costs(target, draft, 1).step_seconds = _SECONDS_OF_SCRIPT
    ways: dict[str, tuple] = {
        "plain": (None, {}),
        "chain": (draft, {"tree": "chain", "tree_depth": depth, "tree_num_nodes": depth}),
        "auto": (draft, {"tree": "auto", "tree_depth": 8, "tree_num_nodes": 8, "tree_ngrams": False}),
    }
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):  # the first of each pays for what is made once
        for name, (assistant, settings) in ways.items():
            run = _decode(target, prompt, num_new, assistant, **settings)
            say(f"repetition {repeat} of {repeats}, {name}: {num_new / run['seconds']:.2f} tokens/s")
            if run["tokens"] != plain["tokens"] and target.dtype == torch.float32:
                raise AssertionError(f"{name}: expected the text of plain decoding")
            if repeat:
                runs[name].append(run)
    result: dict = {"forward_seconds": counts, "ways": {}}
    speed = {name: statistics.median(num_new / run["seconds"] for run in runs[name]) for name in ways}
    for name in ways:
        cost = sum(
            _seconds_of(counts, size) - _seconds_of(counts, size - carried) for run in runs[name] for carried, size in run["carried"]
        )
        result["ways"][name] = {
            "tokens_per_second": speed[name],
            "over_plain": speed[name] / speed["plain"],
            "tau": runs[name][-1].get("tau", 1.0),
            "nodes_per_round": runs[name][-1].get("nodes", 0.0),
            "share_of_carried": cost / sum(run["seconds"] for run in runs[name]),
        }
    return result


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(
    width: Annotated[int, typer.Option(help="hidden size")] = 1024,
    layers: Annotated[int, typer.Option(help="layers, every fourth with full attention")] = 24,
    vocab_size: Annotated[int, typer.Option(help="tokens of the vocabulary")] = 248320,
    prompt: Annotated[int, typer.Option(help="tokens of the prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(help="tokens of each answer")] = 64,
    acceptance: Annotated[float, typer.Option(help="probability that a drafted token is right")] = 0.7,
    depth: Annotated[int, typer.Option(help="drafted tokens of the chain of one length")] = 4,
    repeats: Annotated[int, typer.Option(help="measured repetitions, of which the median is told")] = 3,
    dtype: Annotated[str, typer.Option(help="of the target's weights")] = "float32",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure and print."""
    say("making a random target")
    target = random_target(width, layers, vocab_size, getattr(torch, dtype))
    result = measure(target, prompt, new_tokens, acceptance, depth, repeats)
    lines = [
        f"qwen3_5_text, {sum(p.numel() for p in target.parameters()) / 1e9:.2f} billion parameters, {dtype}, "
        f"{torch.get_num_threads()} threads, median of {repeats}"
    ]
    one = result["forward_seconds"][1]
    for count, seconds in result["forward_seconds"].items():
        lines.append(f"forward over {count:2d} tokens: {1e3 * seconds:8.1f} ms, {seconds / one:.2f} times one token")
    for name, way in result["ways"].items():
        lines.append(
            f"{name:6s} {way['tokens_per_second']:8.2f} tokens/s, {way['over_plain']:.2f} times plain, tau {way['tau']:.2f}, "
            f"carried tokens {way['share_of_carried']:.1%} of the time"
        )
    say("\n".join(lines))
    result["settings"] = {"width": width, "layers": layers, "vocab_size": vocab_size, "prompt": prompt, "new_tokens": new_tokens}
    result["settings"] |= {"acceptance": acceptance, "depth": depth, "dtype": dtype, "threads": torch.get_num_threads()}
    if json_file is not None:
        write_json(json_file, result)


if __name__ == "__main__":
    typer.run(main)
