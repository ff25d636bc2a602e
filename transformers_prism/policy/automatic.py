"""`tree="auto"`: every round the tree that is expected to bring the most tokens per second.

What is known: the costs of a round's parts (`costs.py`), and from the rounds so far how often a node was accepted, by the
draft's cumulative probability and depth, or, for continuations copied from the text (`ngrams.py`), by the length of the match
(`experience.py`). With these

    value of a node   P(it is accepted), never above its parent's
    rate              tokens per second of the best way known: plain decoding, or rounds with the draft as they went
    draft steps and nodes   those that bring more tokens than their time is worth at this rate (`planners.py`)

which is the rule for the highest average reward per unit of time. Where drafting does not pay, rounds are plain steps,
which the draft does not even read. Drafting is tried again once a try only costs a small share of the time (`payoff.py`).
Where it hardly pays, a round is a plain step now and then, to measure what one costs.

A batch takes as long as its slowest sequence. So a token counts half in a sequence that is a few tokens ahead of the slowest,
and hardly at all in one that is far ahead.
Source: the marginal value theorem (Charnov 1976) for the rule; trees as in EAGLE-2 (arXiv:2406.16858).
"""

import math
import time
from dataclasses import asdict
from weakref import WeakKeyDictionary

import torch

from ..decoding.draft_side import DraftSide
from ..decoding.memory import kept_with
from ..decoding.round_values import Limits, Proposal, Verified, plain_step
from ..decoding.sampler import Sampler, is_treated_as_accelerator
from ..decoding.sequences import Sequences
from ..transformers_names import attention_name
from .candidates import Candidates
from .costs import RoundCosts, TreeOverhead, load_or_measure
from .experience import EDGES, Experience
from .ngrams import NgramIndex, Texts
from .payoff import Payoff
from .planners import AheadOfRound, Knowledge, Lesson, Outlook, WithinRound, best_tree
from .settings import TreeSettings

# Tokens ahead of the slowest sequence by which one counts half.
_HALF_LEAD = 4.0


def known_costs(target, draft, num_sequences: int) -> RoundCosts:
    """Costs from earlier calls in this process, corrected by them, or from the disk, or measured."""
    known, key = _costs_of_process(target, draft, num_sequences)
    before = known.get(key)
    known[key] = load_or_measure(target, draft, num_sequences, before)
    if before is not None and known[key] is not before:
        # Whether drafting pays was judged by the old costs, which were wrong.
        for do_sample in (False, True):
            experience_of(draft, do_sample).payoff = Payoff()
    return known[key]


def are_costs_known(target, draft, num_sequences: int) -> bool:
    """Whether [`known_costs`] would neither measure nor read anything."""
    known, key = _costs_of_process(target, draft, num_sequences)
    return key in known and not known[key].is_in_doubt


def _costs_of_process(target, draft, num_sequences: int) -> tuple[dict, tuple]:
    """The known costs of a target with a draft, by a key of what they depend on, and this call's key."""
    known = kept_with(target, "round costs", WeakKeyDictionary).setdefault(draft, {})
    # Preparing or compiling a model changes the classes of its layers.
    layers = frozenset(type(module) for model in (target, draft) for module in model.modules())
    places = [(model.device, model.dtype, attention_name(model.config)) for model in (target, draft)]
    return known, (num_sequences, torch.get_num_threads(), layers, *places)


def experience_of(draft, do_sample: bool) -> Experience:
    """What earlier calls in this process have taught about a draft, in sampling or in greedy decoding."""
    return kept_with(draft, f"experience, do_sample={do_sample}", Experience)


class AutomaticTrees:
    """Proposes a tree per round, at most as large as `settings` say, and learns from the outcome. `text` is an
    earlier call's index of the beginning of a single sequence."""

    def __init__(
        self, settings: TreeSettings, target, draft, sequences: Sequences, sampler: Sampler, text: NgramIndex | None = None
    ):
        self.known = Knowledge(
            settings,
            sampler,
            known_costs(target, draft, len(sequences)),
            TreeOverhead(),
            experience_of(draft, sampler.do_sample),
            Texts(sequences, text),
        )
        self.payoff, self.is_first = self.known.experience.payoff, True
        # Choosing within a round needs tensors that can be looked at without waiting.
        is_host = draft.device.type == "cpu" and not is_treated_as_accelerator(draft.device)
        self.planner = WithinRound(self.known) if is_host else AheadOfRound(self.known)

    def propose(self, draft_side: DraftSide, sequences: Sequences, limits: Limits) -> Proposal:
        """The tree of the next round."""
        outlook = self.begin_round(sequences, limits.num_carried)
        depth = min(self.payoff.most_steps(self.known.settings.depth), limits.depth, limits.nodes)
        # With several sequences the target advances its state by itself.
        is_one, carried = len(sequences) == 1, self.known.experience.carried
        if is_one and carried.should_move_on(limits.num_carried, outlook.rate, self.known.costs):
            depth = 0
        is_check = self.planner.observes_times and self.payoff.is_check_due
        # Carried tokens will run at least once more.
        num_active, verify = len(sequences.active), self.known.costs.verify
        owed = verify(num_active + limits.num_carried) / verify(num_active) - 1.0
        if depth > 0 and self.payoff.is_draft_due(owed) and not is_check:
            proposal = self.planner.propose(outlook, draft_side, sequences, depth, limits)
        elif depth > 0 and not is_check and self.known.settings.ngrams and self.known.texts.all_repeat():
            nothing_drafted = [Candidates() for _ in sequences.active]
            proposal = best_tree(self.known, outlook, sequences, nothing_drafted, limits)
        else:
            none: list[list[int]] = [[] for _ in sequences.active]
            lesson = Lesson(outlook.weights, time.perf_counter(), none, none, num_carried=limits.num_carried)
            proposal = plain_step(sequences.last_tokens(), expected_tokens=sum(outlook.weights), lesson=lesson)
        has_tree = proposal.tree.num_nodes > 1
        self.payoff.num_unchecked = self.payoff.num_unchecked + 1 if has_tree else 0
        return proposal

    def begin_round(self, sequences: Sequences, num_carried: int = 0) -> Outlook:
        """Note which sequences are active, and what a token is worth in each."""
        self.payoff.begin_round(len(sequences.active))
        is_first, self.is_first = self.is_first, False
        lengths = [0 if sequences.is_done(one) else sequences.lengths[one] for one in sequences.active]
        slowest = min((length for length in lengths if length), default=0)
        weights = [2.0 ** ((slowest - length) / _HALF_LEAD) if length else 0.0 for length in lengths]
        scale = sum(length > 0 for length in lengths) / max(sum(weights), 1.0)
        weights = [scale * weight for weight in weights]
        rate = sum(weights) / self.known.costs.verify(len(weights)) * self.payoff.speedup
        return Outlook(weights, rate, is_first, num_carried)

    def learn(self, proposal: Proposal, kept: list[list[int]], verified: Verified) -> Proposal:
        """Learn from a round.

        Args:
            kept (`list[list[int]]`): of each active sequence the nodes that a token was emitted at, the root first; []
                if it is done.
        Returns:
            `Proposal`: with its expected tokens, which for a planned tree are only known now.
        """
        tree, experience = proposal.tree, self.known.experience
        if self.planner.observes_times:
            num_tokens = len(kept) * tree.num_nodes + proposal.lesson.num_carried
            self.known.costs.observe_verify(num_tokens, verified.seconds)
            since = time.perf_counter() - proposal.lesson.made_at
            self.known.overhead.observe(tree.num_nodes > 1, since - verified.seconds)
        proposal = self.planner.completed(proposal)
        experience.carried.observe(tree.num_nodes, len(kept[0]))
        going = [place for place, nodes in enumerate(kept) if nodes]
        is_accepted = [node in kept[place] for place in going for node in range(1, tree.num_nodes)]
        for cells, table in (
            (proposal.lesson.drafted_cells, experience.drafted),
            (proposal.lesson.copied_cells, experience.copied),
        ):
            table.observe([cell for place in going for cell in cells[place]], is_accepted)
        self.observe_payoff(proposal, kept, verified.seconds)
        return proposal

    def observe_payoff(self, proposal: Proposal, kept: list[list[int]], verify_seconds: float) -> None:
        """Learn whether rounds with the draft pay; a plain step that runs carried tokens is part of their cost."""
        costs, lesson, num_active = self.known.costs, proposal.lesson, len(kept)
        num_weighed = max(sum(lesson.weights), 1.0)
        counts = [(weight, len(nodes)) for weight, nodes in zip(lesson.weights, kept, strict=True)]
        emitted = sum(weight * count for weight, count in counts) / num_weighed
        # How far the slowest sequence is now, from where the slowest was before: a weight is halved by each _HALF_LEAD of lead.
        most = max(lesson.weights)
        leads = [_HALF_LEAD * math.log2(most / weight) + count for weight, count in counts if weight > 0.0]
        tokens = min(leads, default=0.0)
        if not (proposal.num_steps or lesson.num_carried):
            self.payoff.observe_tokens(tokens)
            return
        # The expected tokens are less noisy than those of a few sequences, which in turn reflect the current text.
        expected = (proposal.expected_tokens / num_weighed + num_active * emitted) / (1 + num_active)
        plain_seconds, num_nodes = costs.verify(num_active), proposal.tree.num_nodes
        seconds = costs.verify(num_active * num_nodes + lesson.num_carried)
        if self.planner.observes_times:
            # The geometric mean with what it took, if that was longer: costs measured too low are corrected slowly, while the
            # machine may only have been busy for this round.
            seconds = max(seconds, math.sqrt(seconds * verify_seconds))
        seconds += costs.step_seconds * proposal.num_steps
        seconds += self.known.overhead.seconds if num_nodes > 1 else 0.0
        self.payoff.observe(tokens, expected, seconds / plain_seconds, lesson.read_seconds / plain_seconds)

    def estimates(self) -> dict:
        """The estimates behind the choices, for a person to read."""
        experience = self.known.experience
        return {
            **asdict(self.known.costs),
            "advantage": self.payoff.recent.advantage,
            "step_gain": experience.step_gain,
            "probability_edges": list(EDGES),
            "accepted_by_depth_and_probability": experience.drafted.rows(),
            "accepted_by_match_and_depth": experience.copied.rows(),
        }

    def text(self) -> NgramIndex | None:
        """The first sequence's text as far as it was indexed."""
        return self.known.texts.indexes[0]
