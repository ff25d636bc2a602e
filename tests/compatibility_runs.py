"""Runs of one tiny target with a scripted draft and without one, and what came of them.

A draft is scripted to be right most of the time, so that rounds commit 2 tokens and more. Targets are drawn until their
two best logits are further apart than rounding can move them, their text varies, and two deliberate errors of a round,
a mask that is off by one and keys that moved to a wrong place, show in the text: a target that would hide an error
proves nothing.
"""

import copy
import os
import traceback
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from compatibility_images import SPECIAL_IDS, further_turn, image_prompt, takes_images
from compatibility_models import PAD_ID, VOCAB_SIZE, build
from tiny_models import ScriptedDraft, ScriptedDrafter
from transformers import GenerationMixin

from transformers_prism import PrismConfig
from transformers_prism.decoding import attention, round_check, target_choice, tree_target, uneven_prompts
from transformers_prism.decoding.recurrent_target import RecurrentTarget
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

# Outcomes of a run or a case; others are "plain", which has a reason that was given in a warning, "refused", "fails" and
# "not built".
DRAFTED = ("tree", "chain")
BAD = ("different", "crash", "unproven")

# Logits of tiny models differ by about 1e-6 of the largest between one token at a time and several.
_MIN_GAP = 1e-4
_NUM_DISTINCT = 6
_NUM_NEW_OF_CONTROL = 14
_PLAIN_STEPS = 1.2  # tokens a round at which nearly all rounds are plain steps, where no error of a round can show
# How targets are drawn, in this order: as their class does it, or with matrices of this standard deviation.
_DRAWS = (None, None, None, 0.1, 0.2, 0.3, 0.15, 0.4, 0.2, 0.3, 0.6, 0.1, 0.2, 0.3, 0.15, 0.1, 0.4, 0.1, 0.05, 0.2, 0.05, 0.05, 0.05, 0.05)
# Sizes from which on a model computes something else than before.
_THRESHOLDS = (
    "sliding_window sliding_window_size window_size attention_chunk_size index_topk keep_window_size local_attention "
    "local_attention_window_len attention_window_size swa_window_size indexer_budget original_max_position_embeddings"
).split()


@dataclass
class Case:
    """A tiny target and how it is run.

    Args:
        name: of the row in the table.
        model: a name of [`all_types`].
        overrides: fields of its configuration.
        attn_implementation: as transformers takes it.
        prepare: called with each target that is drawn.
        runs: names of `RUNS`.
        prompt_length, num_new: tokens of the runs with one row.
        arguments: of generate(), for all runs.
        dtype: of the prompt's token ids.
        min_tokens_per_round: that count as drafted; fewer where plain steps belong to the case.
        passes_thresholds: whether the text has to go beyond all lengths that the configuration names.
    """

    name: str
    model: str
    overrides: dict = field(default_factory=dict)
    attn_implementation: str | None = None
    prepare: object = None
    runs: tuple = ("greedy", "padded", "sampled", "static", "chat")
    prompt_length: int = 5
    num_new: int = 28
    arguments: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.long
    min_tokens_per_round: float = 2.0
    passes_thresholds: bool = True

    def draw(self, seed: int):
        """A target; every number of `seed` gives another one."""
        target = build(self.model, self.overrides, seed, self.attn_implementation)
        if self.prepare is not None:
            self.prepare(target)
        scale = _DRAWS[seed % len(_DRAWS)]
        generator = torch.Generator().manual_seed(seed)
        for parameter in target.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                # What starts as zeros or ones would hide what it is for, most of all a closed gate.
                is_closed = parameter.numel() == 1 and not parameter.any()
                parameter.data += noise * (1.0 if is_closed else 0.1)
            elif scale is not None:
                parameter.data.copy_(noise * scale)
        return target


class _Drafter(ScriptedDrafter):
    draft = None  # nothing that it has read is used again in a later call


class _Draft(ScriptedDraft):
    def make_drafter(self):
        return _Drafter(self)


def scripted(target, sequences, prompt_length: int, seed: int = 0):
    """A draft that mostly proposes what these sequences, `(B, T)` with their prompts, say."""
    with torch.random.fork_rng():
        draft = _Draft(PrismConfig.from_target(target)).eval()
    draft.script = [row[prompt_length:].tolist() for row in sequences]
    draft.seed, draft.is_strict = seed, False
    draft.generation_config.update(tree="static", tree_top_k=4, tree_depth=4, tree_num_nodes=12)
    return draft


def prompt(num_rows: int, length: int, dtype=torch.long):
    """Random prompts `(input_ids, attention_mask)`, later rows with more left padding."""
    generator = torch.Generator().manual_seed(num_rows)
    input_ids = torch.randint(8, VOCAB_SIZE, (num_rows, length), generator=generator, dtype=dtype)
    mask = torch.ones_like(input_ids)
    for row in range(num_rows):
        mask[row, : 2 * row] = 0
        input_ids[row, : 2 * row] = PAD_ID
    return input_ids, mask


def _generate(target, input_ids, mask, draft=None, **arguments):
    torch.manual_seed(5)
    if draft is not None:
        arguments["assistant_model"] = draft
    return target.generate(input_ids=input_ids, attention_mask=mask, pad_token_id=PAD_ID, **arguments)


@dataclass
class _Texts:
    """What one way of decoding said: sequences `(B, T)` of each call, the lengths of their prompts."""

    sequences: list
    prompt_lengths: list


def _calls(target, case: Case, run: str, drafts):
    """The calls of a run, one after another; `drafts` gives the draft of each call, or None.

    Some modules keep something from call to call (rotary tables of the longest text so far), so each way of decoding gets
    a target that was never used: hand in a copy.

    Yields:
        the sequences of a call and the length of its prompt.
    """
    arguments = {"do_sample": False, "max_new_tokens": case.num_new, **case.arguments}
    num_rows, length = 1, case.prompt_length
    if run in IMAGE_RUNS:
        yield from _image_calls(target, arguments, run, drafts)
        return
    if run != "greedy":
        arguments["max_new_tokens"] = max(case.num_new // 2, 12)
    if run == "padded":
        num_rows, length = 3, case.prompt_length + 7
    elif run == "sampled":
        arguments.update(do_sample=True, temperature=0.9)
    elif run == "static":
        arguments["cache_implementation"] = "static"
    elif run == "chat":
        arguments.update(return_dict_in_generate=True, max_new_tokens=max(case.num_new // 3, 10))
    input_ids, mask = prompt(num_rows, length, case.dtype)
    if run != "chat":
        yield _generate(target, input_ids, mask, next(drafts), **arguments), length
        return
    first = _generate(target, input_ids, mask, next(drafts), **arguments)
    yield first.sequences, length
    question, _ = prompt(2, 4, case.dtype)
    input_ids = torch.cat((first.sequences, question[:1]), dim=1)
    arguments[CACHE_KEYWORD] = first[CACHE_KEYWORD]
    second = _generate(target, input_ids, torch.ones_like(input_ids), next(drafts), **arguments)
    yield second.sequences, input_ids.shape[1]


RUNS = ("greedy", "padded", "sampled", "static", "chat")
# Of models that take images: a chat that goes on behind one, two rows with one each, and sampling.
IMAGE_RUNS = ("image", "image rows", "image sampled")


def _image_calls(target, arguments: dict, run: str, drafts):
    """The calls of a run with images; see `_calls`."""
    arguments = {**arguments, "max_new_tokens": 14, "suppress_tokens": SPECIAL_IDS, "do_sample": run == "image sampled"}
    inputs = image_prompt(target, 2 if run == "image rows" else 1)
    input_ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    arguments["return_dict_in_generate"] = True
    first = _generate(target, input_ids, mask, next(drafts), **inputs, **arguments)
    output = first if arguments.get("output_logits") else first.sequences
    yield output, input_ids.shape[1]
    if run != "image":
        return
    question, _ = prompt(2, 4)
    input_ids = torch.cat((first.sequences, question[:1]), dim=1)
    arguments[CACHE_KEYWORD] = first[CACHE_KEYWORD]
    arguments |= further_turn(inputs, input_ids)
    second = _generate(target, input_ids, torch.ones_like(input_ids), next(drafts), **arguments)
    yield second.sequences, input_ids.shape[1]


def _plain(target, case: Case, run: str) -> _Texts:
    sequences, lengths = zip(*_calls(copy.deepcopy(target), case, run, iter([None, None])), strict=True)
    return _Texts(list(sequences), list(lengths))


def _drafts(target, plain: _Texts, used: list):
    for sequences, length in zip(plain.sequences, plain.prompt_lengths, strict=True):
        used.append(scripted(target, sequences, length))
        yield used[-1]


@contextmanager
def _rounds_checked(are_checked: bool):
    """Whether rounds are compared with single steps, as for types that nobody has tried. Prompts of a batch are read one by
    one, and each row attends by itself, as they would with more padding."""
    original, folder = round_check.is_tried, round_check._folder
    costs = uneven_prompts._WORTH_A_FORWARD, attention._WORTH_A_CALL
    uneven_prompts._WORTH_A_FORWARD = attention._WORTH_A_CALL = 0
    for module in (round_check, target_choice, tree_target):
        module.is_tried = lambda target: not are_checked
    round_check._folder = lambda: Path(os.devnull) / "nothing"  # no check is kept for later runs
    try:
        yield
    finally:
        round_check.is_tried = target_choice.is_tried = tree_target.is_tried = original
        uneven_prompts._WORTH_A_FORWARD, attention._WORTH_A_CALL = costs
        round_check._folder = folder


def compare(target, case: Case, run: str, plain: _Texts | None = None) -> dict:
    """Run with a draft and without one, rounds unchecked; returns the outcome, with "detail" and "tokens_per_round".

    Where the text differs, the check of rounds that untried types get has a go: if it stops the draft in time, the type is
    "plain", and stays off the list of tried types.
    """
    with _rounds_checked(False):
        result = compare_once(target, case, run, plain)
    if result["outcome"] in ("different", "crash"):
        with _rounds_checked(True):
            checked = compare_once(target, case, run, plain)
        result = checked if checked["outcome"] == "plain" else result
    return result


def compare_once(target, case: Case, run: str, plain: _Texts | None = None) -> dict:
    """As [`compare`], with rounds checked or not as the package does it."""
    with warnings.catch_warnings(record=True) as of_plain:
        warnings.simplefilter("always")
        try:
            plain = plain or _plain(target, case, run)
        except Exception as error:
            return {"outcome": "fails", "detail": _line(error)}
    used: list = []
    with warnings.catch_warnings(record=True) as of_draft:
        warnings.simplefilter("always")
        try:
            used_target = copy.deepcopy(target)
            texts = list(_calls(used_target, case, run, _drafts(used_target, plain, used)))
        except Exception as error:
            return _of_error(error)
    result = _of_texts(plain, [sequences for sequences, _ in texts], used)
    known = {str(warning.message) for warning in of_plain}
    new = [w for w in of_draft if issubclass(w.category, (FutureWarning, DeprecationWarning)) and str(w.message) not in known]
    if new:
        result["warning"] = str(new[0].message)[:200]
    return result


def _of_texts(plain: _Texts, sequences: list, drafts: list) -> dict:
    for index, (expected, got) in enumerate(zip(plain.sequences, sequences, strict=True)):
        if not torch.equal(expected, got):
            width = min(expected.shape[1], got.shape[1])
            places = (expected[:, :width] != got[:, :width]).any(dim=0).nonzero().flatten().tolist()
            place = places[0] if places else width
            return {"outcome": "different", "detail": f"call {index}, at position {place} of {expected.shape[1]}"}
    statistics = [draft.last_speculation for draft in drafts]
    reasons = [speculation.declined for speculation in statistics if speculation.declined is not None]
    if reasons:
        return {"outcome": "plain", "detail": reasons[0]}
    stopped = [speculation.stopped_drafting for speculation in statistics if speculation.stopped_drafting is not None]
    if stopped:
        return {"outcome": "plain", "detail": f"the check stopped the draft: {stopped[0]}"}
    rate = sum(sum(s.num_committed) for s in statistics) / max(sum(sum(s.num_rounds) for s in statistics), 1)
    result = {"outcome": statistics[0].target, "tokens_per_round": round(rate, 2)}
    if statistics[0].why_no_tree is not None:
        result["detail"] = statistics[0].why_no_tree
    return result


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:220]}"


def _of_error(error: Exception) -> dict:
    """Whether an error is a refusal by transformers, one of ours, or a crash."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/transformers_prism/" in frame.filename]
    last = frames[-1]
    if not ours:
        return {"outcome": "refused", "detail": "transformers: " + _line(error)}
    if last is ours[-1] and isinstance(error, ValueError) and "expected" in str(error):
        return {"outcome": "refused", "detail": "transformers_prism: " + _line(error)}
    place = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}"
    return {"outcome": "crash", "detail": f"{_line(error)} (at {last.filename.rpartition('/')[2]}:{last.lineno}, by {place})"}


@contextmanager
def broken(target, error: str):
    """Every verification of a round gets one error: "mask", whose keys are off by one, or "rows", keys in wrong places and
    half of every recurrent state."""

    def spoil(module, args, kwargs):
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        cache = cache_of(kwargs)
        if input_ids is None or input_ids.shape[1] < 2 or cache is None:
            return None
        mask = kwargs.get("attention_mask")
        if error == "mask":
            masks = mask if isinstance(mask, dict) else {None: mask}
            masks = {key: _off_by_one(part) for key, part in masks.items()}
            return args, {**kwargs, "attention_mask": masks if isinstance(mask, dict) else masks[None]}
        for layer in getattr(cache, "layers", ()):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.shape[2] > 4:
                length = min(int(layer.get_seq_length()), keys.shape[2])
                for states in (keys, layer.values):
                    states[:, :, length - 3 : length] = states[:, :, length - 4 : length - 3].clone()
            for name in ("conv_states", "recurrent_states"):
                for state in getattr(layer, name, {}).values():
                    if state is not None:
                        state.mul_(0.5)
        return None

    # Kosmos-2 decodes with a model of its own inside.
    parts = [module for module in target.modules() if isinstance(module, GenerationMixin)]
    handles = [part.register_forward_pre_hook(spoil, with_kwargs=True) for part in parts]
    check = RecurrentTarget._check
    # It would find the error.
    RecurrentTarget._check = lambda side, token_ids: None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        RecurrentTarget._check = check


def _off_by_one(mask):
    return mask.roll(1, dims=-1) if isinstance(mask, torch.Tensor) and mask.dim() == 4 else mask


def _controls_show(target, case: Case, plain: _Texts, outcome: str) -> str | None:
    """The deliberate error that did not show, or None."""
    num_new = min(case.num_new, _NUM_NEW_OF_CONTROL)
    short = replace(case, num_new=num_new)
    plain = _Texts([plain.sequences[0][:, : case.prompt_length + num_new]], plain.prompt_lengths)
    for error in ("mask", "rows") if outcome == "tree" else ("rows",):
        with broken(target, error), _rounds_checked(False):
            got = compare_once(target, short, "greedy", plain)["outcome"]
        if got not in ("different", "crash"):
            return error
    return None


def _hidden_by(target, case: Case, run: str) -> tuple[str | None, _Texts]:
    """Why the text of plain decoding would prove nothing, or None, and that text."""
    arguments = {**case.arguments, "output_logits": True, "return_dict_in_generate": True}
    output, length = next(_calls(copy.deepcopy(target), replace(case, arguments=arguments), run, iter([None])))
    sequences, logits = output.sequences, torch.stack(output.logits, dim=1)  # [B, T', V]
    best = logits.float().topk(2, dim=-1).values
    gap = ((best[..., 0] - best[..., 1]) / best.abs().amax().clamp(min=1e-6)).min().item()
    plain = _Texts([sequences], [length])
    distinct = max(len(set(row.tolist())) for row in sequences[:, length:])
    if not gap >= _MIN_GAP:  # NaN is none
        return f"logits only {gap:.1e} apart", plain
    return (f"{distinct} distinct tokens" if distinct < _NUM_DISTINCT else None), plain


def thresholds(config) -> dict[str, int]:
    """Sizes of a configuration from which on it computes something else, by name."""
    text = config.get_text_config()
    values = {**vars(text), **(getattr(text, "rope_parameters", None) or {})}
    return {name: values[name] for name in _THRESHOLDS if isinstance(values.get(name), int) and values[name] > 0}


def run_case(case: Case) -> dict:
    """Everything about a case: "outcome", "detail", "tokens_per_round", and "runs" with the same of each run."""
    try:
        case.draw(0)
    except Exception as error:
        return {"outcome": "not built", "detail": _line(error)}
    reason = None
    for seed in range(len(_DRAWS)):
        target = case.draw(seed)
        try:
            reason, plain = _hidden_by(target, case, "greedy")
        except Exception as error:
            return _of_images_alone(target, case, _line(error))
        if reason is not None:
            continue
        result = compare(target, case, "greedy", plain)
        if result["outcome"] in DRAFTED and result["tokens_per_round"] > _PLAIN_STEPS:
            error = _controls_show(target, case, plain, result["outcome"])
            reason = None if error is None else f"an error of the {error} did not show"
        padded = None
        # What plain decoding cannot do is said by the run itself.
        with suppress(Exception):
            if reason is None and result["outcome"] in DRAFTED and "padded" in case.runs:
                reason, padded = _hidden_by(target, case, "padded")
        with suppress(Exception):
            if reason is None and result["outcome"] in DRAFTED and takes_images(target):
                reason, _ = _hidden_by(target, case, "image")
        if reason is None:
            return _all_runs(target, case, {"greedy": plain, "padded": padded}, result, seed)
    # Where no draft is used there is nothing to prove.
    result = compare(target, case, "greedy", plain)
    if result["outcome"] in ("plain", "refused"):
        return _all_runs(target, case, {"greedy": plain}, result, seed)
    return {"outcome": "unproven", "detail": f"no target in {len(_DRAWS)} draws: {reason}"}


def _of_images_alone(target, case: Case, why_no_text: str) -> dict:
    """The result of a case whose plain decoding of text fails: its prompts with an image, if it takes those."""
    result: dict = {"outcome": "fails", "detail": why_no_text}
    if takes_images(target):
        result["runs"] = {run: compare(target, case, run) for run in IMAGE_RUNS}
        bad = [found for found in result["runs"].values() if found["outcome"] in BAD]
        result.update(bad[0] if bad else {})
    return result


def _leaves_target_alone(target, case: Case, plain: _Texts) -> bool:
    """Whether plain decoding says the same after decoding with a draft as after plain decoding."""
    texts = []
    for drafts in (iter([None]), _drafts(target, plain, [])):
        used = copy.deepcopy(target)
        list(_calls(used, case, "greedy", drafts))
        texts.extend(_calls(used, case, "greedy", iter([None])))
    return torch.equal(texts[0][0], texts[1][0])


def _all_runs(target, case: Case, plain: dict, greedy: dict, seed: int) -> dict:
    runs = {"greedy": greedy}
    if greedy["outcome"] not in ("refused", "crash"):
        for run in (*case.runs, *(IMAGE_RUNS if takes_images(target) else ())):
            if run not in runs:
                runs[run] = compare(target, case, run, plain.get(run))
        if not _leaves_target_alone(target, case, plain["greedy"]):
            runs["afterwards"] = {"outcome": "different", "detail": "plain decoding with the target that was drafted for"}
    bad = next((name for name, result in runs.items() if result["outcome"] in BAD), None)
    result = {
        **runs[bad or "greedy"],
        "model_types": sorted({target.config.model_type, target.config.get_text_config().model_type}),
        "seed": seed,
        "runs": runs,
        "thresholds": thresholds(target.config),
    }
    if bad is not None:
        result["detail"] = f"{bad}: {result.get('detail', '')}"
    elif result["outcome"] in DRAFTED:
        length = plain["greedy"].sequences[0].shape[1]
        not_passed = [name for name, value in result["thresholds"].items() if length <= value + 8]
        if case.passes_thresholds and not_passed:
            result.update(outcome="unproven", detail=f"{length} tokens are not beyond {not_passed[0]}")
        elif result["tokens_per_round"] < case.min_tokens_per_round:
            result.update(outcome="unproven", detail=f"{result['tokens_per_round']} tokens a round")
    return result
