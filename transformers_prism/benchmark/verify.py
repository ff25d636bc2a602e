"""Is decoding with this draft lossless on this machine? Greedy, sampled and batched runs against plain decoding, and a
negative control: a verifier that is broken on purpose must be caught, or the check would prove nothing.

    transformers-prism verify
    transformers-prism verify --target some/target --draft some/draft --json report.json
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest import mock

import torch
from rich import box
from rich.table import Table

from transformers_prism import generation
from transformers_prism.verification import OutputRows

# Two ways of computing the same logits differ by rounding; a gap within ten times that difference is a near-tie.
TIE_FACTOR = 10.0
TREE = {"tree": "static", "tree_top_k": 4, "tree_depth": 4, "tree_num_nodes": 15}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1}


@dataclass
class Check:
    """One comparison with plain decoding.

    Args:
        name: "greedy", "sampled", "batched greedy", "batched sampled", "automatic trees" or "negative control".
        prompt: index of the prompt; None for a batch of all of them.
        num_tokens: tokens compared, all rows together.
        is_identical: whether every token is the same.
        row, position: where a row that differs does so first, in new tokens: the first row that rounding does not excuse,
            else the last one; None if none differs.
        gap: there, what separates the two best choices of plain decoding: their scores, or in sampled runs their log
            probabilities with the noise that was drawn.
        rounding: there, the largest difference between its logits and those of one forward over all tokens: what two
            sound ways of computing them differ by, the draft not asked.
        has_same_generator: whether the random generator was left in the state that plain decoding leaves.
        acceptance_length: tau of the run with the draft.
    """

    name: str
    prompt: int | None
    num_tokens: int
    is_identical: bool
    has_same_generator: bool
    acceptance_length: float
    row: int | None = None
    position: int | None = None
    gap: float | None = None
    rounding: float | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding decides at the first difference, so that either token is plain decoding's."""
        return not self.is_identical and self.gap is not None and self.gap <= TIE_FACTOR * self.rounding

    @property
    def holds(self) -> bool:
        """For the negative control: it was caught. Else: identical, or parted at a near-tie."""
        if self.name == "negative control":
            return not self.is_identical and not self.is_near_tie
        return (self.is_identical and self.has_same_generator) or self.is_near_tie


def verify(
    target, draft, prompts: list[dict], max_new_tokens: int = 64, seed: int = 0, report: Callable = lambda check: None
) -> list[Check]:
    """Compare decoding with and without a draft.

    Trees are of one fixed size, so that every round drafts; prompts are decoded greedily with automatic trees as well.

    Args:
        target, draft: the models.
        prompts: inputs of generate(), one row each, without padding.
        max_new_tokens: of every run.
        seed: set before every run.
        report: called with each [`Check`] as it is done.
    Returns:
        `list[Check]`, the negative control last. All is well if every one of them `holds`.
    """
    checks = []

    def run(name, prompt, inputs, settings):
        check = _compare(name, prompt, target, draft, inputs, {"max_new_tokens": max_new_tokens, **settings}, seed)
        checks.append(check)
        report(check)

    greedy = {"do_sample": False}
    batch = left_padded(prompts, _pad_token_id(target))
    configured = draft.generation_config
    draft.generation_config = copy.deepcopy(configured)
    draft.generation_config.update(**TREE)
    try:
        for index, inputs in enumerate(prompts):
            run("greedy", index, inputs, greedy)
            run("sampled", index, inputs, SAMPLING)
        run("batched greedy", None, batch, greedy)
        run("batched sampled", None, batch, SAMPLING)
        draft.generation_config.update(tree="auto")
        for index, inputs in enumerate(prompts):
            run("automatic trees", index, inputs, greedy)
        draft.generation_config.update(**TREE)
        with mock.patch.object(generation, "walk", careless_walk):
            run("negative control", 0, prompts[0], greedy)
    finally:
        draft.generation_config = configured
    return checks


def careless_walk(rows: OutputRows, row: int, tree, tree_row: int, logits) -> list[int]:
    """What a broken verifier does: it follows the tree without asking the target, as long as there are children."""
    node, nodes = 0, [0]
    while True:
        children = [child for child in range(1, tree.num_nodes) if int(tree.parents[tree_row, child]) == node]
        token = int(tree.token_ids[tree_row, children[-1]]) if children else rows.choose(row, logits[node])
        rows.append(row, token)
        if rows.is_done(row) or not children:
            return nodes
        node = children[-1]
        nodes.append(node)


def left_padded(prompts: list[dict], pad_token_id: int) -> dict:
    """Prompts of one row each as one batch with padding on the left."""
    longest = max(inputs["input_ids"].shape[1] for inputs in prompts)
    device = prompts[0]["input_ids"].device
    input_ids = torch.full((len(prompts), longest), pad_token_id, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, inputs in enumerate(prompts):
        length = inputs["input_ids"].shape[1]
        input_ids[row, longest - length :] = inputs["input_ids"][0]
        attention_mask[row, longest - length :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _pad_token_id(target) -> int:
    config = target.generation_config
    candidates = (config.pad_token_id, config.eos_token_id, 0)
    found = next(candidate for candidate in candidates if candidate is not None)
    return found[0] if isinstance(found, list) else found


def _compare(name: str, prompt: int | None, target, draft, inputs: dict, settings: dict, seed: int) -> Check:
    outputs, states = [], []
    device = inputs["input_ids"].device
    for assistant in ({}, {"assistant_model": draft}):
        torch.manual_seed(seed)
        outputs.append(
            target.generate(
                **inputs,
                **settings,
                **assistant,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
                pad_token_id=_pad_token_id(target),
            )
        )
        states.append(_generator_state(device))
    plain, speculative = outputs
    check = Check(
        name=name,
        prompt=prompt,
        num_tokens=plain.sequences[:, inputs["input_ids"].shape[1] :].numel(),
        is_identical=torch.equal(plain.sequences, speculative.sequences),
        has_same_generator=torch.equal(*states),
        acceptance_length=draft.last_speculation.acceptance_length,
    )
    if not check.is_identical:
        noise_seed = seed if settings["do_sample"] else None
        _explain(check, target, inputs, plain, speculative, noise_seed)
    return check


def _generator_state(device: torch.device) -> torch.Tensor:
    """Of the generator that sampling on this device draws from."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


@torch.no_grad()
def _explain(check: Check, target, inputs: dict, plain, speculative, noise_seed: int | None) -> None:
    """Where rows differ first, and whether rounding can have decided there; stops at the first row that it cannot excuse."""
    start = inputs["input_ids"].shape[1]
    shared = min(plain.sequences.shape[1], speculative.sequences.shape[1])
    differs = plain.sequences[:, start:shared] != speculative.sequences[:, start:shared]
    # Where none does, one is the other's beginning: no near-tie.
    for row in differs.any(dim=1).nonzero().flatten().tolist():
        step = int(differs[row].nonzero()[0])
        choices = plain.scores[step]
        if noise_seed is not None:
            choices = choices.log_softmax(dim=-1) - _noise(choices, step, noise_seed).log()
        best = choices[row].topk(2).values
        check.row, check.position = row, step
        check.gap = float(best[0] - best[1])
        first = int(inputs["attention_mask"][row].argmax())  # behind the padding
        logits = target(plain.sequences[row : row + 1, first : start + step]).logits[0, -1]
        check.rounding = float((plain.logits[step][row] - logits.float()).abs().max())
        if not check.is_near_tie:
            return


def _noise(scores: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """What plain decoding drew at a step: `multinomial(p, 1)` is the argmax of p / noise, drawn once for every token."""
    torch.manual_seed(seed)
    for _ in range(step + 1):
        noise = torch.empty_like(scores).exponential_(1)
    return noise


def as_json(checks: list[Check]) -> dict:
    """What the JSON file holds beside the run's settings."""
    return {
        "holds": all(check.holds for check in checks),
        "num_near_ties": sum(check.is_near_tie for check in checks),
        "tie_factor": TIE_FACTOR,
        "checks": [{**asdict(check), "is_near_tie": check.is_near_tie, "holds": check.holds} for check in checks],
    }


def check_table(checks: list[Check]) -> Table:
    """A row per check."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("check", "prompt", "tokens", "tau", "result"):
        table.add_column(name, justify="left" if name in ("check", "result") else "right")
    for check in checks:
        table.add_row(
            check.name,
            "all" if check.prompt is None else str(check.prompt),
            str(check.num_tokens),
            f"{check.acceptance_length:.2f}",
            _result(check),
        )
    return table


def _result(check: Check) -> str:
    if check.name == "negative control":
        return f"caught at token {check.position}" if check.holds else "NOT CAUGHT"
    if check.is_identical:
        return "identical" if check.has_same_generator else "identical, BUT THE GENERATOR'S STATE DIFFERS"
    if check.position is None:
        return "DIFFERS in length"
    verdict = "near-tie" if check.is_near_tie else "DIFFERS"
    return f"{verdict} at row {check.row}, token {check.position}: gap {check.gap:.1e}, rounding {check.rounding:.1e}"
