"""A soak: thousands of calls of generate() with random settings, each compared with plain decoding.

python -m tests.soak --generations 3000 --seed 0 --json runs/soak.json
python -m tests.soak --only 1234

A case is a seed: a call, or a chat of some calls that goes on with the caller's cache. Sequences, scores, logits, what a
streamer got, the caches and the end state of the generator must be those of plain decoding with the same seed, or both
must raise; a draft may refuse NaN with ValueError where sampling raises RuntimeError. Where the best two of a choice are so
near to each other that rounding decides, the case is counted and not compared. With `--json` a run that was cut off goes
on. The exit status is 1 if anything differed, or if memory grew by more than 1 %.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from fitted_pairs import chain_of, fitted_draft, fitted_target, text_of
from soak_settings import Settings, draw_cache, draw_settings, draw_tree
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from transformers_prism.decoding import round_check, target_side
from transformers_prism.decoding.memory import take_from
from transformers_prism.decoding.sampler import treating_cpus_as_accelerators
from transformers_prism.policy import automatic, planners
from transformers_prism.policy.costs import RoundCosts
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

# Targets, and what their drafts are; between them every form of draft.
PAIRS = {
    "llama": {},
    "qwen2_mixed_windows": {"draft_vocab_size": 70},
    "qwen3": {"context_kv": "own_module", "num_processing_modules": 2, "draft_step_to_module": [0, 1]},
    "mistral": {"module_form": "eagle3", "num_layers_per_module": 2},
    "gemma3_text": {},
    "gpt2": {"module_form": "eagle3", "share_target_head": False, "draft_vocab_size": 80},
    "gpt_neox": {"context_kv": "own_module"},
    "mixtral": {"num_layers_per_module": 2},
    "lfm2": {},
}
# Rounding moves logits of these models by 1e-5; a choice that hangs by less than this is not compared.
_MARGIN = 1e-4
_TOLERANCE = 2e-3  # of logits, scores and cached states
_SETTLED, _WINDOW = 500, 500  # generations until memory counts, and over which its median is taken


class Pair(NamedTuple):
    """A target, its draft, and the chain that both have learnt."""

    target: object
    draft: object
    chain: torch.Tensor


def fit_pair(architecture: str, seed: int = 0, num_updates: int = 120, folder: Path | None = None) -> Pair:
    """A target and draft of `PAIRS`; with a folder their weights are kept there, and read from there."""
    chain, path = chain_of(seed), None if folder is None else folder / f"{architecture}-{seed}-{num_updates}.pt"
    is_kept = path is not None and path.exists()
    num_updates = 0 if is_kept else num_updates
    target = fitted_target(architecture, chain, seed, num_updates)
    draft = fitted_draft(target, chain, seed, num_updates, **PAIRS[architecture])
    if is_kept:
        for model, weights in zip((target, draft), torch.load(path), strict=True):
            model.load_state_dict(weights)
    elif path is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((target.state_dict(), draft.state_dict()), path)
    return Pair(target, draft, chain)


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.puts: list = []

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.puts.append("end")


class Outcome(NamedTuple):
    """What came of a call: its output or error, the caller's cache, what the streamer got, and the generator's state."""

    output: object
    error: Exception | None
    cache: object
    puts: list
    state: torch.Tensor


class Difference(Exception):
    """A call with a draft did something else than plain decoding."""


class NearTie(Exception):
    """Rounding decides what plain decoding does."""


def run_call(pair: Pair, inputs: dict, settings: Settings, seed: int, draft=None, cache=None, **extra) -> Outcome:
    """One call of generate(), with the draft or without."""
    streamer = Recorder() if extra.pop("is_streamed") else None
    in_inference_mode = extra.pop("in_inference_mode")
    arguments = {**inputs, **settings.arguments(), **extra}
    if streamer is not None:
        arguments["streamer"] = streamer
    if cache is not None:
        arguments[CACHE_KEYWORD] = cache
    if draft is not None:
        arguments["assistant_model"] = draft
    torch.manual_seed(seed)
    output = error = None
    try:
        with torch.inference_mode(in_inference_mode):
            output = pair.target.generate(**arguments)
    except Exception as raised:
        error = raised
    return Outcome(output, error, cache, [] if streamer is None else streamer.puts, torch.get_rng_state())


def lengths_of_rows(new_tokens: torch.Tensor, pad_token_id: int) -> list[int]:
    """Tokens of each row until padding, at least."""
    lengths = []
    for row in new_tokens.tolist():
        while len(row) > 1 and row[-1] == pad_token_id:
            row.pop()
        lengths.append(len(row))
    return lengths


def check_margins(plain, lengths: list[int], settings: Settings, seed: int) -> None:
    """Raise `NearTie` if a choice of plain decoding hangs by less than rounding."""
    if settings.draws_noise:
        return
    generator = torch.Generator().manual_seed(seed)
    for step, scores in enumerate(plain.scores):
        chances = scores.float()
        if settings.values["do_sample"]:
            chances = chances.softmax(-1)
            noise = torch.empty_like(chances).exponential_(1, generator=generator)
            chances = (chances / noise).log()
        best = chances.topk(2, dim=-1).values
        gaps = (best[:, 0] - best[:, 1]).nan_to_num(nan=0.0, posinf=1e9)
        for row, length in enumerate(lengths):
            if step < length and float(gaps[row]) < _MARGIN * settings.margin_scale:
                raise NearTie(f"row {row} step {step}: {float(gaps[row]):.1e}")


def expect(holds: bool, text: str) -> None:
    """Raise `Difference` unless something holds."""
    if not holds:
        raise Difference(text)


def compare_errors(plain: Outcome, ours: Outcome) -> None:
    """Both raise the same, or the draft's loop refuses NaN in its own words."""
    texts = [repr(one.error)[:300] for one in (plain, ours)]
    expect(None not in (plain.error, ours.error), f"plain: {texts[0]}, with the draft: {texts[1]}")
    is_refusal = type(plain.error) is RuntimeError and type(ours.error) is ValueError and "finite" in texts[1]
    expect(is_refusal or texts[0] == texts[1], f"plain raised {texts[0]}, with the draft {texts[1]}")


def compare_steps(name: str, plain, ours, lengths: list[int]) -> None:
    """Scores or logits of each step, as far as each row goes."""
    expect(ours is not None and len(ours) == len(plain), f"{name} of another number of steps")
    for step, (one, other) in enumerate(zip(plain, ours, strict=True)):
        rows = [row for row, length in enumerate(lengths) if step < length]
        is_equal = torch.allclose(one[rows], other[rows], rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
        expect(is_equal, f"{name} at step {step}")


def compare_caches(plain, ours, mask: torch.Tensor) -> None:
    """Lengths, kinds, and keys and values where `mask` `(B, T)` says that there are real tokens."""
    expect(type(plain) is type(ours), f"caches: {type(plain).__name__} and {type(ours).__name__}")
    expect(plain.get_seq_length() == ours.get_seq_length(), f"cache lengths {plain.get_seq_length()}, {ours.get_seq_length()}")  # fmt: skip
    expect(len(plain.layers) == len(ours.layers), "number of cache layers")
    mask = mask[:, : plain.get_seq_length()]
    for index, (one, other) in enumerate(zip(plain.layers, ours.layers, strict=True)):
        expect(type(one) is type(other), f"cache layer {index}: {type(one).__name__}, {type(other).__name__}")
        expect(not getattr(other, "record_past", False), f"cache layer {index} goes on recording")
        for name in ("keys", "values"):
            first, second = getattr(one, name, None), getattr(other, name, None)
            if first is None:
                continue
            expect(first.shape == second.shape, f"cache layer {index}: {tuple(first.shape)}, {tuple(second.shape)}")
            width = min(first.shape[2], mask.shape[1])
            seen = mask[:, mask.shape[1] - width :].bool()
            parts = [part[:, :, :width].transpose(1, 2)[seen] for part in (first, second)]
            expect(torch.allclose(*parts, rtol=_TOLERANCE, atol=_TOLERANCE), f"{name} of cache layer {index}")


def compare(plain: Outcome, ours: Outcome, settings: Settings, mask: torch.Tensor, seed: int) -> torch.Tensor:
    """Raise `Difference` or `NearTie`; the mask of the sequences."""
    num_prompt = plain.output.sequences.shape[1] - len(plain.output.scores)
    new = plain.output.sequences[:, num_prompt:]
    lengths = lengths_of_rows(new, settings.values["pad_token_id"])
    check_margins(plain.output, lengths, settings, seed)
    returns_dict = settings.values.get("return_dict_in_generate", False)
    sequences = ours.output.sequences if returns_dict else ours.output
    is_equal = torch.equal(plain.output.sequences, sequences)
    expect(is_equal, f"sequences {new.tolist()} became {sequences[:, num_prompt:].tolist()}")
    expect(torch.equal(plain.state, ours.state), "the generator's end state")
    for name in ("scores", "logits"):
        if returns_dict and settings.values.get(f"output_{name}"):
            compare_steps(name, plain.output[name], ours.output[name], lengths)
    is_real = torch.arange(new.shape[1]) < torch.tensor(lengths)[:, None]
    mask = torch.cat((mask, is_real.to(mask.dtype)), dim=1)
    if plain.cache is not None:
        compare_caches(plain.cache, ours.cache, mask)
    elif returns_dict and cache_of(plain.output) is not None:
        compare_caches(cache_of(plain.output), cache_of(ours.output), mask)
    expect(plain.puts == ours.puts, f"streamer {plain.puts[1:]} became {ours.puts[1:]}")
    return mask


def left_padded(texts: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts, ids and mask `(B, T)`, some with padding on the left."""
    mask = torch.ones_like(texts)
    for row in range(texts.shape[0] if texts.shape[0] > 1 or rng.random() < 0.2 else 0):
        mask[row, : rng.randint(0, texts.shape[1] - 1)] = 0
    return texts * mask, mask


@contextmanager
def made_reproducible(rng: random.Random, pair: Pair):
    """Trees that depend on the seed alone: costs and clocks are drawn; now and then the paths of accelerators run."""
    clock = types.SimpleNamespace(now=0.0)

    def tick() -> float:
        clock.now += rng.expovariate(1000)
        return clock.now

    costs = RoundCosts([1, 64], [1e-3, 1e-3 * rng.choice((1.2, 2, 8))], 1e-3 * rng.choice((0.02, 0.3)))
    fake_time = types.SimpleNamespace(perf_counter=tick)
    places = {(automatic, "known_costs"): lambda *arguments: costs}
    places |= {(module, "time"): fake_time for module in (automatic, planners, target_side)}
    as_accelerators = treating_cpus_as_accelerators() if rng.random() < 0.25 else nullcontext()
    if rng.random() < 0.25:  # rounds are compared with single steps, as of models that nobody has tried
        places[round_check, "TRIED_TYPES"] = frozenset()
    places[round_check, "_folder"] = lambda: Path(os.devnull) / "nothing"  # no check is kept for later cases
    before = {place: getattr(*place) for place in places}
    for do_sample in (False, True):
        take_from(pair.draft, f"experience, do_sample={do_sample}")
    take_from(pair.target, "checked lengths")
    try:
        for place, value in places.items():
            setattr(*place, value)
        with as_accelerators:
            yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


class Tally:
    """What a soak has seen; `counts` by name, tokens and rounds of drafted calls, and resident bytes of generations."""

    def __init__(self, state: dict | None = None):
        state = state or {}
        self.next_seed = state.get("next_seed")
        self.num_generations = state.get("num_generations", 0)
        self.counts = Counter(state.get("counts", {}))
        self.declined = Counter(state.get("declined", {}))
        self.differences = state.get("differences", [])
        self.resident: list[list[int]] = [*state.get("resident", []), []]  # of each process that took part

    @property
    def tokens_per_round(self) -> float:
        """Mean over the rounds of all calls that drafted."""
        return self.counts["tokens"] / max(self.counts["rounds"], 1)

    def add_speculation(self, speculation) -> None:
        """Count a call that went well."""
        if speculation.declined is not None:
            self.declined[speculation.declined] += 1
            return
        self.counts["drafted"] += 1
        self.counts[f"walk on the {speculation.walk}"] += 1
        self.counts["rounds"] += sum(speculation.num_rounds)
        self.counts["tokens"] += sum(speculation.num_committed)

    def add_difference(self, seed: int, architecture: str, text: str) -> None:
        """Note what went wrong, at a length that can be read."""
        self.differences.append(f"--only {seed} ({architecture}): {text[:400]}")

    def growth(self) -> float | None:
        """Resident memory of the last generations over that after settling, of the process that lived longest."""
        longest = max(self.resident, key=len)
        if len(longest) < _SETTLED + 2 * _WINDOW:
            return None
        settled = statistics.median(longest[_SETTLED : _SETTLED + _WINDOW])
        return statistics.median(longest[-_WINDOW:]) / settled

    def state(self) -> dict:
        """For JSON."""
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        return {**vars(self), "tokens_per_round": self.tokens_per_round, "growth": self.growth(), **versions}


def run_case(pair: Pair, seed: int, tally: Tally, is_told: bool = False) -> None:
    """A seed's call or chat; raises `Difference` where it differs from plain decoding."""
    rng = random.Random(seed)
    num_rows = rng.choice((1, 1, 1, 2, 3, 5))
    num_turns = rng.choice((1, 1, 1, 2, 3))
    is_chat = num_turns > 1
    generator = torch.Generator().manual_seed(seed)
    input_ids, mask = left_padded(text_of(pair.chain, num_rows, rng.randint(1, 14), generator), rng)
    pair.target.set_attn_implementation("eager" if rng.random() < 0.2 else "sdpa")
    cache_name, make_cache, extra = draw_cache(rng, pair.target, is_chat, total=140)
    caches = [None if make_cache is None else make_cache() for _ in range(2)]
    with made_reproducible(rng, pair):
        for turn in range(num_turns):
            pair.draft.generation_config.update(**draw_tree(rng, pair.draft.config.num_draft_tokens))
            settings = draw_settings(rng, num_rows, input_ids.shape[1])
            if is_chat:
                settings.values["max_new_tokens"] = min(settings.values["max_new_tokens"], 25)
                settings.values.pop("guidance_scale", None)  # its own cache would be that of the first turn
            inputs = {"input_ids": input_ids}
            if turn > 0 and rng.random() < 0.3:
                inputs["input_ids"] = input_ids[:, int(caches[0].get_seq_length()) :]
            if rng.random() < 0.1:
                inputs["input_ids"] = inputs["input_ids"].int()
            if num_rows > 1 or turn > 0 or not mask.all() or rng.random() < 0.5:
                inputs["attention_mask"] = mask
            extra["is_streamed"] = rng.random() < 0.3
            # A static cache can be written to only in the mode that it was made in, and so can recurrent states: there
            # plain decoding itself fails.
            in_inference_mode = rng.random() < 0.1 and cache_name != "own static"
            keeps_mode = turn > 0 and is_written_in_place(caches[0])
            extra["in_inference_mode"] = extra["in_inference_mode"] if keeps_mode else in_inference_mode
            if is_told:
                shown = (pair.draft.generation_config.to_diff_dict(), settings, cache_name, extra, inputs)
                print(f"turn {turn}:", *shown, sep="\n  ")
            mask, new = run_turn(pair, inputs, settings, caches, extra, mask, seed + turn, tally)
            if mask is None:
                return
            input_ids = torch.cat((input_ids, new), dim=1)
            said = text_of(pair.chain, num_rows, rng.randint(1, 5), generator)
            input_ids, mask = torch.cat((input_ids, said), dim=1), torch.cat((mask, torch.ones_like(said)), dim=1)


def is_written_in_place(cache) -> bool:
    """Whether a cache keeps tensors that a step writes to, and not only some that it joins others to."""
    return any(not isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", ()))


def run_turn(pair, inputs, settings, caches, extra, mask, seed, tally):
    """A call without and with the draft, compared; the sequences' mask and what is new, None where a chat cannot go on."""
    tally.num_generations += 1
    everything = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = run_call(pair, inputs, settings, seed, cache=caches[0], **extra, **everything)
    ours = run_call(pair, inputs, settings, seed, pair.draft, caches[1], **extra)
    expect(not pair.draft.training, "the draft's mode")
    expect(pair.target.config._attn_implementation in ("sdpa", "eager"), "the target's attention")
    if plain.error is not None or ours.error is not None:
        compare_errors(plain, ours)
        tally.counts["both raised"] += 1
        return None, None
    tally.add_speculation(pair.draft.last_speculation)
    finding = pair.draft.last_speculation.stopped_drafting
    expect(finding is None, f"a check of a round that is right: {finding}")
    try:
        mask = compare(plain, ours, settings, mask, seed)
    except NearTie:
        tally.counts["near ties, not compared"] += 1
        return None, None
    tally.counts["compared"] += 1
    return mask, plain.output.sequences[:, -len(plain.output.scores) :]


def resident_bytes() -> int:
    """Memory of this process, now; where only the peak is known, that."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * os.sysconf("SC_PAGE_SIZE")


def soak(pairs: dict[str, Pair], num_generations: int, seed: int, tally: Tally, note=lambda tally: None) -> Tally:
    """Run cases from `seed` on, or from where the tally stopped, until there are so many generations."""
    names = sorted(pairs)
    tally.next_seed = seed if tally.next_seed is None else tally.next_seed
    while tally.num_generations < num_generations:
        case, before = tally.next_seed, tally.num_generations
        architecture = names[case % len(names)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                run_case(pairs[architecture], case, tally)
            except Difference as difference:
                tally.add_difference(case, architecture, str(difference))
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                tally.add_difference(case, architecture, f"{error!r} at {where.name}:{where.lineno}")
        tally.next_seed += 1
        tally.resident[-1] += [resident_bytes()] * (tally.num_generations - before)
        note(tally)
    return tally


class Progress:
    """Prints differences at once and a line with the time left now and then, and saves the tally."""

    def __init__(self, num_generations: int, path: Path | None, tally: Tally):
        self.num_generations, self.path = num_generations, path
        self.start, self.first = time.monotonic(), tally.num_generations
        self.told, self.num_told = self.start, len(tally.differences)

    def __call__(self, tally: Tally) -> None:
        """After a case."""
        for difference in tally.differences[self.num_told :]:
            print("DIFFERENT", difference, flush=True)
        self.num_told = len(tally.differences)
        now, is_done = time.monotonic(), tally.num_generations >= self.num_generations
        if now - self.told < 15 and not is_done:
            return
        self.told = now
        left = (now - self.start) / max(tally.num_generations - self.first, 1)
        left *= max(self.num_generations - tally.num_generations, 0)
        print(
            f"{tally.num_generations}/{self.num_generations} generations, {tally.tokens_per_round:.2f} tokens a round, "
            f"{len(tally.differences)} different, {tally.resident[-1][-1] / 2**20:.0f} MiB, {left / 60:.0f} min left",
            flush=True,
        )
        if self.path is not None:
            unfinished = self.path.with_suffix(".part")
            unfinished.write_text(json.dumps(tally.state()) + "\n")
            unfinished.replace(self.path)


def report(tally: Tally) -> int:
    """Print what was seen; the exit status."""
    print(f"transformers {transformers.__version__}, {tally.num_generations} generations")
    for name, count in sorted(tally.counts.items()):
        print(f"  {name}: {count}")
    for reason, count in tally.declined.most_common():
        print(f"  decoded plainly, {reason}: {count}")
    growth = tally.growth()
    told = "too few generations to tell" if growth is None else f"{growth:.4f} of what it was after settling"
    print(f"tokens a round: {tally.tokens_per_round:.2f}\nresident memory: {told}")
    print(f"differences: {len(tally.differences)}", *tally.differences, sep="\n  ")
    return int(bool(tally.differences) or (growth is not None and growth > 1.01))


def main(argv=None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--json", type=Path, help="where the tally is kept, and read from where it exists")
    parser.add_argument("--pairs", type=Path, help="a folder that keeps the fitted models from one run to the next")
    parser.add_argument("--only", type=int, help="run the case of this seed, and print what it is")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = sorted(PAIRS)
    if args.only is not None:
        architecture = names[args.only % len(names)]
        tally = Tally()
        run_case(fit_pair(architecture, folder=args.pairs), args.only, tally, is_told=True)
        return report(tally)
    state = json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else None
    tally = Tally(state)
    pairs = {}
    for name in names:
        print(f"fitting {name}", flush=True)
        pairs[name] = fit_pair(name, folder=args.pairs)
    soak(pairs, args.generations, args.seed, tally, Progress(args.generations, args.json, tally))
    return report(tally)


if __name__ == "__main__":
    sys.exit(main())
