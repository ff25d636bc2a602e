"""What a generate() call with a draft did: rounds, accepted tokens, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from .memory import warn_once
from .round_values import Proposal

# A call brings a warning if it had at least this many rounds and committed fewer than this many tokens in each.
_MANY_ROUNDS, _HARDLY_ANY = 48, 1.1
# With fewer tokens per drafted round the reason is that the draft is hardly accepted; with more, it is what rounds cost.
_LOW_ACCEPTANCE = 1.2
_HIGH_TEMPERATURE = 1.0


def acceptance_length(num_committed: float, num_rounds: float) -> float | None:
    """tau: committed tokens per round, the bonus included; None without a round."""
    return num_committed / num_rounds if num_rounds else None


class RoundTree(NamedTuple):
    """The tree of one round: draft steps run (0: the draft was not used), drafted nodes that were verified in each
    sequence, how many of them were copied from the text, and tokens that the round was expected to commit per sequence,
    in a batch weighted by sequence (None: no estimate was made)."""

    num_steps: int
    num_nodes: int
    num_copied: int = 0
    expected_tokens: float | None = None


@dataclass(repr=False)
class Speculation:
    """Statistics of one generate() call; lists have one entry per sequence of the batch.

    Args:
        num_rounds: rounds (target forwards) that the sequence took part in; the prefill is not counted.
        num_committed: tokens emitted by those rounds, after cutting at the end; the prefill's token is not counted.
        accepted_per_round: accepted draft tokens of each round, the bonus token not counted. A token at which the
            sequence ended counts as the bonus.
        seconds: wall-clock seconds on the host, split into "draft", "check", "verify", "commit" and "other". On an
            accelerator a phase is charged for work that an earlier one queued.
        trees: the tree of each round, for the whole batch.
        estimates: with `tree="auto"`, the estimates behind its choices at the end: seconds of a round's parts,
            probability of acceptance by class of draft probability and depth; None otherwise.
        target: how the target verified: "tree", on layers lent to its cache, or "chain", on its own cache, rolled back;
            None if the draft was not used.
        coupled: whether the draft saw the random numbers that the target sampled with (see `sampling_noise.py`).
        walk: where next tokens were chosen: "device", with one read per round, or "host", node by node; None if the
            draft was not used.
        declined: why the draft was not used and plain decoding ran instead; None if it was used.
        why_no_tree: why a chain stood in for trees; None where trees were verified.
        stopped_drafting: what the check of an untried target found, after which only plain steps were made; None if it found
            nothing.
    """

    num_rounds: list[int]
    num_committed: list[int]
    accepted_per_round: list[list[int]]
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("draft", "check", "verify", "commit", "other"), 0.0)
    )
    trees: list[RoundTree] = field(default_factory=list)
    estimates: dict | None = None
    target: str | None = None
    coupled: bool = False
    walk: str | None = None
    declined: str | None = None
    why_no_tree: str | None = None
    stopped_drafting: str | None = None

    @classmethod
    def empty(cls, num_sequences: int) -> "Speculation":
        """Nothing done yet for `num_sequences` sequences."""
        return cls([0] * num_sequences, [0] * num_sequences, [[] for _ in range(num_sequences)])

    @property
    def acceptance_length(self) -> float:
        """tau, pooled: committed tokens per round over all sequences, the bonus included; NaN without a round."""
        tau = acceptance_length(sum(self.num_committed), sum(self.num_rounds))
        return float("nan") if tau is None else tau

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences, the one that the prompt's forward gives included."""
        return sum(self.num_committed) + len(self.num_committed)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all rounds over the seconds of all rounds; None where plain decoding ran, which is not timed."""
        seconds = sum(self.seconds.values())
        return sum(self.num_committed) / seconds if seconds else None

    @property
    def num_plain_steps(self) -> int:
        """Rounds without a drafted token, of the sequence with the most rounds."""
        return max(self.num_rounds, default=0) - sum(tree.num_nodes > 0 for tree in self.trees)

    @property
    def drafted_acceptance_length(self) -> float | None:
        """tau of the rounds with drafted tokens alone; None without one."""
        # A sequence takes part in the first rounds of a call, as many as it needs.
        accepted = [
            count
            for rounds in self.accepted_per_round
            for count, tree in zip(rounds, self.trees, strict=False)
            if tree.num_nodes > 0
        ]
        return acceptance_length(sum(accepted) + len(accepted), len(accepted))

    def why_plain_steps(self) -> str | None:
        """Why rounds had no drafted tokens; None if all had some, or nothing is known."""
        if self.declined or self.stopped_drafting:
            return self.declined or self.stopped_drafting
        if not self.num_plain_steps or not self.estimates:
            return None
        if self.estimates["advantage"] >= 1:
            return "earlier rounds lost too much time, plain steps were measured, or little text was left"
        return f"drafting does not pay here: {self._costs_in_words()}"

    def _costs_in_words(self) -> str:
        """What a round costs, and what it gives."""
        costs = self.estimates or {}
        counts, seconds = costs["num_tokens"], costs["verify_seconds"]
        small = min(3, len(counts) - 1)
        text = (
            f"a plain step takes {1e3 * seconds[0]:.1f} ms, a forward over {counts[small]} tokens "
            f"{1e3 * seconds[small]:.1f} ms, a draft step {1e3 * costs['step_seconds']:.1f} ms"
        )
        tau = self.drafted_acceptance_length
        return text if tau is None else f"{text}, and a drafted round gives {tau:.2f} tokens"

    def summary(self) -> str:
        """A few lines for a person: tokens, rounds, tau, tokens per second, seconds by part, plain steps and why."""
        rate = self.tokens_per_second
        lines = [
            f"{self.num_tokens} tokens in {sum(self.num_rounds)} rounds"
            + (f", acceptance length {self.acceptance_length:.2f}" if any(self.num_rounds) else "")
            + ("" if rate is None else f", {rate:.1f} tokens/s without the prompt")
        ]
        if rate is not None:
            lines.append("seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items()))
        if self.why_no_tree:
            lines.append(f"a chain instead of trees: {self.why_no_tree}")
        if self.num_plain_steps:
            reason = self.why_plain_steps()
            lines.append(f"plain steps: {self.num_plain_steps}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Everything as plain lists, dictionaries, numbers and text, which JSON can hold."""
        content = {one.name: getattr(self, one.name) for one in fields(self)}
        content["trees"] = [tree._asdict() for tree in self.trees]
        content["acceptance_length"] = acceptance_length(sum(self.num_committed), sum(self.num_rounds))
        return content

    def __repr__(self) -> str:
        rate = self.tokens_per_second
        parts = [f"{self.num_tokens} tokens", f"{sum(self.num_rounds)} rounds"]
        parts += [f"tau {self.acceptance_length:.2f}"] if any(self.num_rounds) else []
        parts += [] if rate is None else [f"{rate:.1f} tokens/s"]
        parts += ["plain decoding"] if self.declined else []
        return f"Speculation({', '.join(parts)})"

    @property
    def conditional_acceptance(self) -> list[float]:
        """For draft step i = 0, 1, ...: share of rounds that accepted more than i tokens among those that accepted i.

        Source: PRISM artifact, `draw_pos_6.py`.
        """
        accepted = [count for rounds in self.accepted_per_round for count in rounds]
        deepest = max(accepted, default=0)
        reached = [sum(count >= step for count in accepted) for step in range(deepest + 2)]
        return [reached[step + 1] / reached[step] for step in range(deepest + 1)] if accepted else []

    def add_round(self, index: int, num_emitted: int) -> None:
        """Count a round in which a sequence emitted `num_emitted` tokens, at least 1."""
        self.num_rounds[index] += 1
        self.num_committed[index] += num_emitted
        self.accepted_per_round[index].append(num_emitted - 1)

    def add_rounds(self, active: list[int], kept: list[list[int]], proposal: Proposal) -> None:
        """Count a round in which each of these sequences emitted as many tokens as nodes are kept; 0 where it was done."""
        for index, nodes in zip(active, kept, strict=True):
            if nodes:
                self.add_round(index, num_emitted=len(nodes))
        expected = proposal.expected_tokens
        expected = None if expected is None else expected / len(kept)
        self.trees.append(
            RoundTree(proposal.num_steps, proposal.tree.num_nodes - 1, proposal.num_copied, expected)
        )

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


def why_hardly_used(speculation: Speculation, differences: list[str], temperature: float | None, device: str) -> str | None:
    """Why the draft gained next to nothing in a long answer, and what to do; None if it gained, or the reason is known already.

    Args:
        speculation (`Speculation`): of the call.
        differences (`list[str]`): parts of the fingerprint in which the target differs from the draft's.
        temperature (`float`, *optional*): of sampling; None if greedy.
        device (`str`): type of the target's device.
    """
    is_told = speculation.declined is not None or speculation.stopped_drafting is not None
    num_rounds = max(speculation.num_rounds, default=0)
    if is_told or num_rounds < _MANY_ROUNDS or not speculation.acceptance_length < _HARDLY_ANY:
        return None
    tau = speculation.drafted_acceptance_length
    start = f"the draft hardly helped: {speculation.num_tokens} tokens in {sum(speculation.num_rounds)} rounds. "
    if speculation.estimates and (tau is None or tau >= _LOW_ACCEPTANCE):
        remedy = "A smaller draft or a larger target would gain more; costs measured on a busy machine are measured again"
        if device == "cpu":
            remedy = (
                "transformers_prism.prepare_for_cpu(target, draft) makes forwards over a few tokens cheaper, if it was not "
                "called; costs measured on a busy machine are measured again in later calls"
            )
        return f"{start}Drafting does not pay here: {speculation._costs_in_words()}. {remedy}"
    low = "Its tokens were not accepted" + ("" if tau is None else f" ({tau:.2f} tokens per drafted round)")
    if differences:
        return f"{start}{low}: the target is not the one it was made for ({'; '.join(differences)}). Use that target, or train a draft for this one"
    if temperature is not None and temperature > _HIGH_TEMPERATURE:
        return f"{start}{low}: at temperature {temperature:g} the text is hard to foresee. A lower temperature accepts more"
    return (
        f"{start}{low}: it may not have been trained on this kind of text. Continue its training with such text: "
        "transformers-prism train --init-from DRAFT"
    )


def warn_if_hardly_used(speculation: Speculation, draft, target, generation_config) -> None:
    """Warn, once for each reason, if the draft gained next to nothing in a long answer; see [`why_hardly_used`]."""
    _, differences = draft.config.target_differences(target.config)
    temperature = (generation_config.temperature or 1.0) if generation_config.do_sample else None
    reason = why_hardly_used(speculation, differences, temperature, target.device.type)
    if reason is not None:
        warn_once(draft, reason, stacklevel=9)
