"""Acceptance measured while a draft trains: real rounds on held-out prompts, in addition to what teacher forcing says."""

import torch

from transformers_prism.decoding.eval_mode import in_eval_mode
from transformers_prism.decoding.speculation import Speculation, acceptance_length
from transformers_prism.decoding.target_side import num_learned_positions
from transformers_prism.decoding.transfer import clock
from transformers_prism.training.data.conversations import Conversation, loop_period
from transformers_prism.training.progress_bar import ProgressBar
from transformers_prism.transformers_names import cache_argument, cache_of

# The tree that rounds are measured with: small enough for any machine, deep enough to tell drafts apart.
DEPTH = 4
TREE = {"tree": "static", "tree_top_k": 4, "tree_depth": DEPTH, "tree_num_nodes": 15}
NUM_NEW_TOKENS = 48


@torch.no_grad()
def check_prompts(target, conversations: list[Conversation]) -> None:
    """See that acceptance can be measured on the first prompts of some conversations, before a run depends on it.

    Raises:
        ValueError: if none fits the target's positions with its answer and is answered with more than one token, so that
            there would be no round.
    """
    with in_eval_mode(target):
        if any(_decode(target, None, prompt, 2).numel() > 1 for prompt in _prompts(target, conversations, NUM_NEW_TOKENS)):
            return
    raise ValueError(
        f"num_acceptance_prompts: expected a prompt among the first {len(conversations)} held-out ones that the target answers "
        "with more than one token, got none; without rounds there is no tau to choose a checkpoint by"
    )


def _prompts(target, conversations: list[Conversation], num_new_tokens: int) -> list[torch.Tensor]:
    """The first prompts `(1, T)` of conversations, those left out that the target has no positions for with an answer."""
    most = num_learned_positions(target)
    prompts = [list(one.input_ids[: one.prompt_length]) for one in conversations]
    return [
        torch.tensor([prompt], device=target.device)
        for prompt in prompts
        if most is None or len(prompt) + num_new_tokens <= most
    ]


@torch.no_grad()
def measure_acceptance(
    draft, target, conversations: list[Conversation], num_new_tokens: int = NUM_NEW_TOKENS
) -> torch.Tensor:
    """Answer the first prompt of each conversation greedily, with a draft that is bound to the target, in at most
    `num_new_tokens` tokens.

    Both models decode in eval mode and are left in the mode that they were in.

    Returns:
        `torch.Tensor` of shape `(8 + depth,)`, float64, to be summed over processes: rounds, committed tokens, seconds
        of all rounds, seconds of plain steps, their number, answers, answers that end in a loop, then how many rounds
        accepted at least 0, 1, ... tokens.
    """
    settings = {name: getattr(draft.generation_config, name, None) for name in TREE}
    counts = torch.zeros(8 + DEPTH, dtype=torch.float64)
    draft.generation_config.update(**TREE)
    try:
        prompts = _prompts(target, conversations, num_new_tokens)
        bar = ProgressBar("decoding", len(prompts), "prompts")
        with in_eval_mode(target, draft), bar:
            for prompt in prompts:
                answer = _decode(target, draft, prompt, num_new_tokens).tolist()
                counts += _counts(draft.last_speculation)
                counts[5:7] += torch.tensor([1.0, float(loop_period(answer) is not None)])
                bar.advance()
            if prompts:
                counts[3:5] += torch.tensor(_plain_steps(target, prompts[-1]), dtype=torch.float64)
    finally:
        draft.generation_config.update(**settings)
    return counts


def acceptance_metrics(counts: torch.Tensor, prefix: str) -> dict[str, float]:
    """Figures of [`measure_acceptance`]'s counts, none without rounds: `tau`, pooled over rounds, the bonus included;
    `conditional_<i>`, the share of rounds with more than i accepted tokens among those with at least i;
    `speedup_estimate`, tau times the seconds of a plain step over those of a round; `loop_share`, the share of
    answers that end in a loop, which raises tau.
    """
    rounds, committed, round_seconds, plain_seconds, num_plain, num_answers, num_loops = counts[:7].tolist()
    tau = acceptance_length(committed, rounds)
    if tau is None:
        return {}
    reached = counts[7:].tolist()
    metrics = {f"{prefix}_tau": round(tau, 4)}
    for step, (here, next_one) in enumerate(zip(reached, reached[1:], strict=False)):
        if here:
            metrics[f"{prefix}_conditional_{step}"] = round(next_one / here, 4)
    metrics[f"{prefix}_speedup_estimate"] = round(committed / round_seconds * plain_seconds / num_plain, 3)
    metrics[f"{prefix}_loop_share"] = round(num_loops / num_answers, 4)
    return metrics


def _decode(target, draft, prompt: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """The answer's token ids `(N,)`, with a draft or, if None, without."""
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=draft,
        do_sample=False,
        num_beams=1,
        max_new_tokens=num_new_tokens,
        pad_token_id=target.generation_config.pad_token_id or 0,
    )
    return output[0, prompt.shape[1] :]


def _counts(speculation: Speculation) -> torch.Tensor:
    accepted = [count for row in speculation.accepted_per_round for count in row]
    reached = [sum(count >= step for count in accepted) for step in range(DEPTH + 1)]
    sums = [sum(speculation.num_rounds), sum(speculation.num_committed), sum(speculation.seconds.values()), 0, 0, 0, 0]
    return torch.tensor([*sums, *reached], dtype=torch.float64)


def _plain_steps(target, prompt: torch.Tensor, count: int = 8) -> tuple[float, int]:
    """Seconds of `count` forwards over one token after a prompt, in total, and their number."""
    cache = cache_of(target(prompt, use_cache=True, logits_to_keep=1))
    token = prompt[:, -1:]
    target(token, **cache_argument(target, cache), use_cache=True)
    start = clock(target.device)
    for _ in range(count):
        target(token, **cache_argument(target, cache), use_cache=True)
    return clock(target.device) - start, count
