"""Is decoding with this draft lossless on this machine? Compares every path that generate() can take with plain decoding, with
a negative control on each: a verifier that is broken on purpose must be caught, or the check would prove nothing.

    transformers-prism verify
    transformers-prism verify --target some/target --draft some/draft --json report.json

With the shipped draft it takes a few minutes on two cores: some 95 calls of 64 tokens.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple
from unittest import mock

import torch
from rich import box
from rich.table import Table
from transformers import DynamicCache

from transformers_prism.bench.methods import can_be_packed
from transformers_prism.bench.near_ties import TIE_FACTOR, Difference, find_differences, generator_state
from transformers_prism.bench.prompts import batch_rows
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.decoding import target_choice
from transformers_prism.decoding import walk as walk_module
from transformers_prism.decoding.sampler import Sampler, treating_cpus_as_accelerators
from transformers_prism.decoding.sequences import Sequences
from transformers_prism.decoding.speculation import Speculation, acceptance_length
from transformers_prism.policy import automatic
from transformers_prism.policy.experience import Experience
from transformers_prism.transformers_names import CACHE_KEYWORD

CONTROL = "negative control"
TREE = {"tree": "static", "tree_top_k": 4, "tree_depth": 4, "tree_num_nodes": 15}
CHAIN = {"tree": "chain", "tree_depth": 4}
AUTO = {"tree": "auto"}
# The penalty is set to 1 whatever the target's own is: a penalty is a logits processor, which rules some paths out.
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.0}
PENALIZED = {**SAMPLING, "repetition_penalty": 1.1}
STATIC_CACHE = {"cache_implementation": "static"}


class DecodingPath(NamedTuple):
    """A way through generate() that is checked.

    Args:
        name: of its checks.
        settings: of generate().
        tree: the draft's tree settings.
        over: "prompts": each of them; "prompt": the first; "batch": all in one; "chat": two turns on one cache.
        walks_on_device: choose tokens as on an accelerator.
        is_chain: verify on the target's own cache, as is done for targets that take no tree mask.
        is_prepared: with weights packed for a CPU.
        keeps_scores: ask for scores and logits, which the host's walk collects.
    """

    name: str
    settings: dict
    tree: dict
    over: str = "prompt"
    walks_on_device: bool = False
    is_chain: bool = False
    is_prepared: bool = False
    keeps_scores: bool = False


PATHS = (
    DecodingPath("greedy", GREEDY, TREE, "prompts"),
    DecodingPath("sampled", SAMPLING, TREE, "prompts"),
    DecodingPath("automatic trees", GREEDY, AUTO, "prompts"),
    DecodingPath("automatic trees, sampled", SAMPLING, AUTO),
    DecodingPath("automatic trees, no copies", GREEDY, {**AUTO, "tree_ngrams": False}),
    DecodingPath("automatic trees, device", SAMPLING, AUTO, walks_on_device=True),
    DecodingPath("own vocabulary only", GREEDY, {**TREE, "tree_text_tokens": False}),
    DecodingPath("sampled, not coupled", SAMPLING, {**TREE, "tree_coupled": False}),
    DecodingPath("sampled, processors", PENALIZED, TREE, keeps_scores=True),
    DecodingPath("greedy, device", GREEDY, TREE, walks_on_device=True),
    DecodingPath("sampled, device", SAMPLING, TREE, walks_on_device=True),
    DecodingPath("sampled, device, not coupled", SAMPLING, {**TREE, "tree_coupled": False}, walks_on_device=True),
    DecodingPath("chain", GREEDY, CHAIN),
    DecodingPath("chain, sampled", SAMPLING, CHAIN),
    DecodingPath("chain on the target's cache", GREEDY, CHAIN, is_chain=True),
    DecodingPath("chain on the target's cache, sampled", SAMPLING, CHAIN, is_chain=True),
    DecodingPath("static cache", {**GREEDY, **STATIC_CACHE}, TREE),
    DecodingPath("static cache, sampled", {**SAMPLING, **STATIC_CACHE}, TREE),
    DecodingPath("chat", GREEDY, TREE, "chat"),
    DecodingPath("chat, sampled", SAMPLING, TREE, "chat"),
    DecodingPath("chat, automatic trees", SAMPLING, AUTO, "chat"),
    DecodingPath("prefill in chunks", {**GREEDY, "prefill_chunk_size": 8}, TREE),
    DecodingPath("prepared", GREEDY, TREE, is_prepared=True),
    DecodingPath("prepared, sampled", SAMPLING, AUTO, is_prepared=True),
    DecodingPath("batched greedy", GREEDY, TREE, "batch"),
    DecodingPath("batched sampled", SAMPLING, TREE, "batch"),
    DecodingPath("batched, automatic trees", GREEDY, AUTO, "batch"),
    DecodingPath("batched, chain", SAMPLING, CHAIN, "batch"),
    DecodingPath("batched, processors", PENALIZED, TREE, "batch", keeps_scores=True),
    DecodingPath("batched, device", SAMPLING, TREE, "batch", walks_on_device=True),
    DecodingPath("batched, automatic trees, device", SAMPLING, AUTO, "batch", walks_on_device=True),
    DecodingPath("batched, static cache", {**SAMPLING, **STATIC_CACHE}, TREE, "batch"),
)


@dataclass
class Check:
    """One comparison with plain decoding.

    Args:
        name: of its path in `PATHS`, or "negative control".
        prompt: index of the prompt; None for a batch of all of them.
        num_tokens: tokens compared, all rows together.
        is_identical: whether every token is the same.
        num_near_ties: places of the drafted text where plain decoding, given the text before, chooses another token, and
            rounding decides between the two: see `near_ties.py`.
        num_errors: such places that rounding does not explain, or a text of another length; None if nothing was compared.
        row, position: the first place that rounding does not explain, in new tokens, else the near-tie with the widest
            gap; None if there is neither.
        gap, rounding: at that place, as in [`Difference`]: a near-tie's gap is below twice the rounding.
        has_same_generator: whether the random generator was left in the state that plain decoding leaves.
        acceptance_length: tau of the run with the draft, its last call where it has several; None without a round.
        path: what that call did, from its statistics: "target", "walk" and "coupled" of [`Speculation`], the kind of
            "tree", nodes "drafted", how many of them "copied", and why it "declined" or "stopped" drafting, if it did.
        control_of: for the negative control, the path that was broken.
    """

    name: str
    prompt: int | None
    num_tokens: int
    is_identical: bool
    has_same_generator: bool
    acceptance_length: float | None
    row: int | None = None
    position: int | None = None
    gap: float | None = None
    rounding: float | None = None
    num_near_ties: int = 0
    num_errors: int | None = None
    path: dict = field(default_factory=dict)
    control_of: str | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether the text differs, and rounding explains all of it."""
        return not self.is_identical and self.num_errors == 0

    @property
    def is_caught(self) -> bool:
        """Whether the text is not plain decoding's, and rounding is no excuse."""
        return not self.is_identical and not self.is_near_tie

    @property
    def holds(self) -> bool:
        """For the negative control: it was caught, or no node was drafted. Else: identical but for near-ties, and the random
        generator was left in the same state."""
        if self.name == CONTROL:
            return self.is_caught or self.path.get("drafted") == 0
        return self.has_same_generator and not self.is_caught


class _Run(NamedTuple):
    """One run of a path: the turns that are decoded, and how."""

    path: DecodingPath
    prompt: int | None
    turns: list[dict]
    settings: dict
    seed: int

    @property
    def plain_key(self) -> tuple:
        """Runs with the same key share one plain run."""
        return self.path.over, self.prompt, self.path.is_prepared, str(self.path.settings)


def verify(
    target, draft, prompts: list[dict], max_new_tokens: int = 64, seed: int = 0, report: Callable = lambda check: None
) -> list[Check]:
    """Compare decoding with and without a draft, on every path of generate() that this target and device have.

    Trees have one fixed size unless a path says otherwise, so that every round drafts.

    Args:
        target, draft: the models.
        prompts: inputs of generate(), one row each, without padding.
        max_new_tokens: of every run; of both turns of a chat together.
        seed: set before every run.
        report: called with each [`Check`] as it is done.
    Returns:
        `list[Check]`: the checks of all paths, then the negative control of each. All is well if every one of them
        `holds` and one control was caught: see [`as_json`].
    """
    checks: list[Check] = []
    controls: list[Check] = []
    plain_runs: dict = {}
    for path in PATHS:
        if path.is_prepared and not can_be_packed(target.device, target.dtype):
            continue
        # Weights that are packed for one path are unpacked after it.
        with prepare_for_cpu(target, draft) if path.is_prepared else contextlib.nullcontext():
            for run in _runs(path, target, prompts, max_new_tokens, seed):
                check = _compare(run, target, draft, plain_runs)
                checks.append(check)
                report(check)
            if check.path["declined"] is None:
                controls.append(_control(run, target, draft, plain_runs))
    for control in controls:
        report(control)
    return checks + controls


def _runs(path: DecodingPath, target, prompts: list[dict], max_new_tokens: int, seed: int) -> list[_Run]:
    """The runs of a path. The first prompt's run comes last, since the control repeats the last run."""
    settings = {**path.settings, "max_new_tokens": max_new_tokens, "pad_token_id": _pad_token_id(target)}
    if path.over == "batch":
        return [_Run(path, None, [batch_rows(prompts, settings["pad_token_id"])], settings, seed)]
    if path.over == "chat":
        settings["max_new_tokens"] = max(max_new_tokens // 2, 2)
        return [_Run(path, 0, [prompts[0], prompts[-1]], settings, seed)]
    chosen = range(len(prompts)) if path.over == "prompts" else (0,)
    return [_Run(path, index, [prompts[index]], settings, seed) for index in reversed(chosen)]


@contextlib.contextmanager
def _on_path(path: DecodingPath, draft) -> Iterator[None]:
    """A context in which calls with the draft take this path."""
    configured = draft.generation_config
    draft.generation_config = copy.deepcopy(configured)
    draft.generation_config.update(**path.tree)
    with contextlib.ExitStack() as stack:
        # Automatic trees begin as in a first call, and a draft does not learn from what a broken verifier accepts.
        fresh = {do_sample: Experience() for do_sample in (False, True)}
        stack.enter_context(mock.patch.object(automatic, "experience_of", lambda draft, do_sample: fresh[do_sample]))
        if path.walks_on_device:
            stack.enter_context(treating_cpus_as_accelerators())
        if path.is_chain:
            stack.enter_context(mock.patch.object(target_choice, "why_no_tree", return_value="it was asked for"))
        try:
            yield
        finally:
            draft.generation_config = configured


def _control(run: _Run, target, draft, plain_runs: dict) -> Check:
    """The same run with a verifier that accepts drafted tokens without asking the target, which has to be caught."""
    with (
        mock.patch.object(walk_module, "walk_on_host", careless_walk),
        mock.patch.object(walk_module, "walk_on_device", careless_walk_on_device),
    ):
        check = _compare(run, target, draft, plain_runs)
    check.name, check.control_of = CONTROL, run.path.name
    return check


def careless_walk(sequences: Sequences, sampler: Sampler, index: int, tree, place: int, logits) -> list[int]:
    """What a broken verifier does: it follows the tree without asking the target, as long as there are children."""
    parents, token_ids = tree.parents[place].tolist(), tree.token_ids[place].tolist()
    node, nodes = 0, [0]
    while True:
        children = [child for child in range(1, tree.num_nodes) if parents[child] == node]
        token = token_ids[children[-1]] if children else sampler.choose(sequences, index, logits[node])
        sequences.append(index, token)
        if sequences.is_done(index) or not children:
            return nodes
        node = children[-1]
        nodes.append(node)


def careless_walk_on_device(sequences: Sequences, sampler: Sampler, tree, logits, depth: int) -> list[list[int]]:
    """The same, in place of the walk on the device."""
    return [
        [] if sequences.is_done(index) else careless_walk(sequences, sampler, index, tree, place, logits[place])
        for place, index in enumerate(sequences.active)
    ]


def _pad_token_id(target) -> int:
    config = target.generation_config
    candidates = (config.pad_token_id, config.eos_token_id, 0)
    found = next(candidate for candidate in candidates if candidate is not None)
    return found[0] if isinstance(found, list) else found


def _compare(run: _Run, target, draft, plain_runs: dict) -> Check:
    """Decode with the draft, and plainly unless that was already done; compare turn by turn."""
    plain = _plain(run, target, plain_runs)
    if isinstance(plain, str):
        nothing = Speculation.empty(1)
        nothing.declined = plain
        return Check(run.path.name, run.prompt, 0, True, True, 1.0, path=_path_taken(nothing, run.path))
    with _on_path(run.path, draft):
        speculative = _decode(run, target, draft)
    pairs, speculation = list(zip(plain, speculative, strict=True)), draft.last_speculation
    check = Check(
        name=run.path.name,
        prompt=run.prompt,
        num_tokens=sum(turn.sequences[:, turn.start :].numel() for turn in plain),
        is_identical=all(torch.equal(one.sequences, other.sequences) for one, other in pairs),
        has_same_generator=all(torch.equal(one.state, other.state) for one, other in pairs),
        acceptance_length=acceptance_length(sum(speculation.num_committed), sum(speculation.num_rounds)),
        path=_path_taken(speculation, run.path),
    )
    if not check.is_identical:
        _explain(check, run, target, speculative)
    return check


def _explain(check: Check, run: _Run, target, turns: list["_Turn"]) -> None:
    """Note whether rounding explains each place where a drafted text differs from plain decoding, turn by turn."""
    found: list[Difference] = []
    check.has_same_generator = True
    for turn in turns:
        differences, state = find_differences(target, turn.inputs, run.settings, turn.sequences, run.seed)
        found += differences
        check.has_same_generator &= torch.equal(state, turn.state)
    check.num_near_ties = sum(difference.is_near_tie for difference in found)
    errors = [difference for difference in found if not difference.is_near_tie]
    check.num_errors = len(errors)
    if found:
        widest = max(found, key=lambda one: one.gap / max(one.rounding, sys.float_info.min))
        check.row, check.position, check.gap, check.rounding = errors[0] if errors else widest


def _plain(run: _Run, target, plain_runs: dict) -> list["_Turn"] | str:
    """The run without a draft, decoded once; or why the target's own generate() refuses it."""
    if run.plain_key not in plain_runs:
        try:
            plain_runs[run.plain_key] = _decode(run, target, None)
        except ValueError as error:
            # Not every target can use a static cache; the other settings suit all targets.
            if "cache_implementation" not in run.settings:
                raise
            plain_runs[run.plain_key] = f"generate() without a draft refuses, too: {error}"
    return plain_runs[run.plain_key]


class _Turn(NamedTuple):
    """One call of generate() that was made."""

    inputs: dict
    sequences: torch.Tensor
    state: torch.Tensor  # of the random generator after the call

    @property
    def start(self) -> int:
        """Tokens of the inputs."""
        return self.inputs["input_ids"].shape[1]


def _decode(run: _Run, target, draft) -> list[_Turn]:
    """The turns of a run, plainly if no draft is given."""
    settings = dict(run.settings)
    if draft is not None:
        settings.update(assistant_model=draft, return_dict_in_generate=run.path.keeps_scores)
        settings.update(output_logits=run.path.keeps_scores, output_scores=run.path.keeps_scores)
    if run.path.over == "chat":
        settings[CACHE_KEYWORD] = DynamicCache(config=target.config.get_text_config())
    turns: list[_Turn] = []
    for inputs in run.turns:
        if turns:
            input_ids = torch.cat((turns[-1].sequences, inputs["input_ids"]), dim=1)
            inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        torch.manual_seed(run.seed)
        output = target.generate(**inputs, **settings)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        turns.append(_Turn(inputs, sequences, generator_state(sequences.device)))
    return turns


def _path_taken(speculation, path: DecodingPath) -> dict:
    """See [`Check`]."""
    return {
        "target": speculation.target,
        "walk": speculation.walk,
        "coupled": speculation.coupled,
        "tree": path.tree["tree"],
        "drafted": sum(tree.num_nodes for tree in speculation.trees),
        "copied": sum(tree.num_copied for tree in speculation.trees),
        "declined": speculation.declined,
        "stopped": speculation.stopped_drafting,
    }


def as_json(checks: list[Check]) -> dict:
    """What the JSON file holds besides the run's settings."""
    return {
        "holds": all(check.holds for check in checks) and any(check.is_caught for check in checks if check.name == CONTROL),
        "num_near_ties": sum(check.num_near_ties for check in checks if check.name != CONTROL),
        "tie_factor": TIE_FACTOR,
        "checks": [
            {
                **asdict(check),
                "path_in_words": path_in_words(check.path),
                "is_near_tie": check.is_near_tie,
                "holds": check.holds,
            }
            for check in checks
        ],
    }


def check_table(checks: list[Check]) -> Table:
    """A row per check; controls that were caught share one."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("check", "prompt", "path", "tokens", "tau", "result"):
        table.add_column(name, justify="right" if name in ("prompt", "tokens", "tau") else "left")
    caught = [check for check in checks if check.name == CONTROL and check.is_caught]
    for check in checks:
        if check not in caught:
            name = check.name if check.control_of is None else f"{CONTROL}: {check.control_of}"
            prompt = "all" if check.prompt is None else str(check.prompt)
            tau = "" if check.acceptance_length is None else f"{check.acceptance_length:.2f}"
            table.add_row(name, prompt, path_in_words(check.path), str(check.num_tokens), tau, _result(check))
    num_controls = sum(check.name == CONTROL for check in checks)
    table.add_row(CONTROL, "", "", "", "", f"caught on {len(caught)} of {num_controls} paths")
    return table


def path_in_words(path: dict) -> str:
    """What a run did, as "tree, host's walk, coupled"; empty for reports of an earlier release."""
    if not path:
        return ""
    if path["declined"] is not None:
        return f"plain decoding: {path['declined']}"
    words = [path["target"], f"{path['walk']}'s walk"]
    words += ["coupled"] * path["coupled"] + ["copies"] * (path["copied"] > 0)
    words += [] if path["stopped"] is None else [f"then plain decoding: {path['stopped']}"]
    return ", ".join(words)


def _result(check: Check) -> str:
    if check.name == CONTROL:
        return "nothing was drafted" if check.holds else "NOT CAUGHT"
    draws = "" if check.has_same_generator else ", BUT THE GENERATOR'S STATE DIFFERS"
    if check.is_identical:
        return "identical" + draws
    if check.position is None:
        return f"a text of single steps{draws}"
    verdict = f"{check.num_near_ties} near-ties, the widest" if check.is_near_tie else "DIFFERS"
    place = f"at row {check.row}, token {check.position}: gap {check.gap:.1e}, rounding {check.rounding:.1e}"
    return f"{verdict} {place}{draws}"
