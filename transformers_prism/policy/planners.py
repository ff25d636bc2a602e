"""Two ways to choose a tree: while the draft grows it, and before.

Within a round (on a CPU), each draft step is weighed by what the step before it proposed, and nodes by their own values:

    draft steps    one more while the values it should bring exceed rate * (its seconds + those of its nodes)
    nodes          as many as maximise  sum of values - rate * seconds of the verification

Ahead of it (on accelerators), so that drafting reads nothing back from the device, by averages over earlier rounds:

    draft steps    as many as maximise  sum of the steps' values - rate * their seconds
    nodes          as many as maximise  sum of the values of as many ranks - rate * seconds of the verification

Values and rate are those of `automatic.py`. Copies of the text are added to trees that are chosen within a round. Ahead of it
they only serve rounds without the draft, since comparing them with drafted nodes would read these back. What is learned from
a planned round comes from depths and log-probabilities that are copied to the host while the target verifies. How long its
parts took is not learned, since calls return before their work is done.
Shape letters: B active sequences, C candidates, n nodes of the tree without the root.
"""

import dataclasses
import operator
import time
from dataclasses import dataclass

import torch

from ..decoding.draft_side import DraftSide
from ..decoding.round_values import Limits, Proposal
from ..decoding.sampler import Sampler
from ..decoding.sequences import Sequences
from .candidates import Candidates, tree_of
from .costs import RoundCosts, TreeOverhead
from .experience import MAX_COPIED, MAX_PLANNED, Experience, cells_of_drafted, class_of, first_cell
from .ngrams import Texts
from .settings import TreeSettings

# Sizes of planned trees without the root: few, so that few shapes occur; with the root they fill tiles.
_PLANNED_SIZES = (1, 3, 7, 15, 31, 63, 127)


@dataclass(frozen=True)
class Knowledge:
    """What the choices of a call are based on; its rounds correct the parts."""

    settings: TreeSettings
    sampler: Sampler
    costs: RoundCosts
    overhead: TreeOverhead
    experience: Experience
    texts: Texts


@dataclass(frozen=True)
class Outlook:
    """What is known before a round.

    Args:
        weights: what a token counts in each active sequence; their sum is the number of sequences that are not done.
        rate: what a second is worth, in weighted tokens of all sequences together.
        is_first: whether the draft has yet to read the prompt.
        num_carried: committed tokens that the target's forward runs in addition to the tree.
    """

    weights: list[float]
    rate: float
    is_first: bool = False
    num_carried: int = 0


@dataclass(frozen=True)
class Lesson:
    """What a policy needs to know of its proposal to learn from the outcome.

    Args:
        weights: see [`Outlook`].
        made_at: when the proposal was made, in seconds of the clock.
        drafted_cells, copied_cells: of each sequence the nodes' cells, -1 where none applies.
        read_seconds: in which the draft read the prompt or caught up on earlier rounds.
        num_carried: see [`Outlook`].
        drawn: `(2, B, n)`, depths and log-probabilities of planned nodes, on their way to the host.
    """

    weights: list[float]
    made_at: float
    drafted_cells: list[list[int]]
    copied_cells: list[list[int]]
    read_seconds: float = 0.0
    num_carried: int = 0
    drawn: torch.Tensor | None = None


def best_tree(
    known: Knowledge, outlook: Outlook, sequences: Sequences, candidates: list[Candidates], limits: Limits, **fields
) -> Proposal:
    """The tree of those candidates and copies of the text that pay best. `fields` are for the [`Lesson`], but `num_steps` is
    for the [`Proposal`]. Copies are added to `candidates` in place."""
    num_steps = fields.pop("num_steps", 0)
    if known.settings.ngrams:
        longest = min(limits.depth, limits.nodes, MAX_COPIED, known.settings.num_nodes)
        for sequence, one in zip(sequences.active, candidates, strict=True):
            one.add_copy(*known.texts[sequence].continuation(longest), known.experience.copied.chances)
    num_nodes, expected = _best_size(known, outlook, [one.values for one in candidates], limits.nodes)
    chosen = [one.best(num_nodes) for one in candidates]
    if num_steps > 1:
        nodes = [node for one in chosen for node in zip(one.depths, one.values, strict=True)]
        known.experience.observe_step_gain(nodes, num_steps)
    tree = tree_of(sequences.last_tokens(), chosen)
    copied_cells = [one.copied_cells for one in chosen]
    return Proposal(
        tree,
        depth=max(max(one.depths, default=0) for one in chosen),
        num_steps=num_steps,
        num_copied=sum(cell >= 0 for cells in copied_cells for cell in cells) // len(chosen),
        expected_tokens=expected,
        lesson=Lesson(
            outlook.weights,
            time.perf_counter(),
            [one.drafted_cells for one in chosen],
            copied_cells,
            num_carried=outlook.num_carried,
            **fields,
        ),
    )


def _best_size(known: Knowledge, outlook: Outlook, values: list[list[float]], max_nodes: int) -> tuple[int, float]:
    """The number of nodes per sequence that pays best, and the weighted tokens that the round should then commit in all."""
    # At most as many as the sequence with the fewest has, since trees of a batch have one size.
    most = min(known.settings.num_nodes, max_nodes, *map(len, values))
    best_first = [sorted(one, reverse=True)[:most] for one in values]
    expected = [sum(outlook.weights)]  # with 0, 1, ... nodes
    for of_rank in zip(*best_first, strict=True):
        expected.append(expected[-1] + sum(map(operator.mul, outlook.weights, of_rank)))
    num_tokens = [len(values) * (count + 1) + outlook.num_carried for count in range(most + 1)]
    seconds = [known.costs.verify(num) + (known.overhead.seconds if count else 0.0) for count, num in enumerate(num_tokens)]
    rewards = [tokens - outlook.rate * took for tokens, took in zip(expected, seconds, strict=True)]
    count = rewards.index(max(rewards))
    return count, expected[count]


class WithinRound:
    """Chooses a tree while the draft grows it."""

    # Calls return when their work is done, so it can be timed, and a plain step now and then shows what one costs.
    observes_times = True

    def __init__(self, known: Knowledge):
        self.known = known

    def propose(
        self, outlook: Outlook, draft_side: DraftSide, sequences: Sequences, depth: int, limits: Limits
    ) -> Proposal:
        """The best tree of at most `depth` draft steps."""
        # The first round reads the prompt, and a draft that is behind reads the rounds that it missed: no usual step.
        known, reads_more, start = self.known, draft_side.is_behind or outlook.is_first, time.perf_counter()
        drafter = draft_side.read()
        read_seconds = time.perf_counter() - start if reads_more else 0.0
        steps = _StepChoice(known, outlook, depth)
        coupling = known.sampler.coupling(sequences, depth)
        pool = drafter.draw(known.settings.top_k, depth, steps.choose_width, coupling)
        chances, candidates = known.experience.drafted.chances, []
        for token_ids, parents, depths, log_probs in pool.rows():
            cells = cells_of_drafted(depths, log_probs)
            candidates.append(Candidates.drafted(token_ids, parents, depths, log_probs, cells, chances))
        proposal = best_tree(
            known, outlook, sequences, candidates, limits, num_steps=steps.num_steps, read_seconds=read_seconds
        )
        if not reads_more:
            known.costs.observe_step((time.perf_counter() - start) / steps.num_steps)
        return proposal

    def completed(self, proposal: Proposal) -> Proposal:
        """The proposal with all that can be learned from it."""
        return proposal


class _StepChoice:
    """Decides before each draft step of a round how many nodes it expands."""

    def __init__(self, known: Knowledge, outlook: Outlook, depth: int):
        self.experience, self.top_k, self.depth = known.experience, known.settings.top_k, depth
        self.weights, self.num_steps = outlook.weights, 1
        self.step_price = outlook.rate * known.costs.step_seconds
        # What one more node of one sequence costs in the verification, on average over a tree of usual size.
        num_active, verify = len(outlook.weights), known.costs.verify
        self.node_price = outlook.rate * ((verify(16 * num_active) - verify(num_active)) / 15) / num_active

    def choose_width(self, log_probs: torch.Tensor) -> int:
        """How many nodes the next step expands, given their cumulative log-probabilities `(B, K, top_k)`; 0 for no step."""
        chances, gain = self.experience.drafted.chances, self.experience.step_gain
        first = first_cell(self.num_steps)
        likeliest = [sorted(row, reverse=True)[: self.top_k] for row in log_probs.flatten(1).tolist()]
        rows = [
            [weight * chances[first + class_of(log_prob)] for log_prob in row]
            for weight, row in zip(self.weights, likeliest, strict=True)
        ]
        worth_it = [[value for value in row if value * gain > self.node_price] for row in rows]
        width = max(map(len, worth_it))
        value = sum(map(sum, worth_it))
        reward = best = 0.0
        for _ in range(self.depth - self.num_steps):
            value *= gain
            reward += value - self.step_price - self.node_price * width * len(rows)
            best = max(best, reward)
        if best <= 0.0:
            return 0
        self.num_steps += 1
        return width


class AheadOfRound:
    """Fixes a tree's draft steps and nodes before the round."""

    observes_times = False

    def __init__(self, known: Knowledge):
        self.known = known

    def propose(
        self, outlook: Outlook, draft_side: DraftSide, sequences: Sequences, depth: int, limits: Limits
    ) -> Proposal:
        """A tree of at most `depth` draft steps, planned before any of them."""
        plan = self.plan(outlook, depth, limits.nodes)
        tree = draft_side.read().grow(plan, self.known.sampler.coupling(sequences, plan.depth))
        # The copy is complete once the walk, which the same queue runs later, has been read.
        drawn = torch.stack((tree.depths.float(), tree.log_probs))[..., 1:].to("cpu", non_blocking=True)
        lesson = Lesson(outlook.weights, time.perf_counter(), [], [], num_carried=outlook.num_carried, drawn=drawn)
        return Proposal(tree, plan.depth, plan.depth, lesson=lesson)

    def plan(self, outlook: Outlook, max_depth: int, max_nodes: int) -> TreeSettings:
        """Draft steps and nodes, at least one of each, that should bring the most."""
        settings, costs, experience = self.known.settings, self.known.costs, self.known.experience
        num_active, rate = len(outlook.weights), outlook.rate
        value, reward, best, depth = experience.plan.first, 0.0, -torch.inf, 1
        for step in range(1, max_depth + 1):
            reward += num_active * value - rate * costs.step_seconds
            value *= experience.step_gain
            if reward > best:
                best, depth = reward, step
        plan = TreeSettings("static", settings.top_k, depth, 0)
        most = min(settings.num_nodes, plan.pool_size(depth), max_nodes, MAX_PLANNED)
        sizes = sorted({min(size, most) for size in _PLANNED_SIZES})
        # A rank is never worth more than the one before it.
        expected = experience.plan.ranks.cummin(dim=0).values.cumsum(dim=0).tolist()
        seconds = [costs.verify(num_active * (size + 1) + outlook.num_carried) for size in sizes]
        rewards = [num_active * expected[size - 1] - rate * took for size, took in zip(sizes, seconds, strict=True)]
        num_nodes = sizes[rewards.index(max(rewards))]
        return TreeSettings("static", settings.top_k, min(depth, num_nodes), num_nodes)

    def completed(self, proposal: Proposal) -> Proposal:
        """The proposal with the cells of its nodes and its expected tokens; also learns from the values of the nodes."""
        lesson, experience = proposal.lesson, self.known.experience
        if lesson.drawn is None:
            return proposal
        depths, log_probs = lesson.drawn[0].long(), lesson.drawn[1]
        rows = zip(depths.tolist(), log_probs.tolist(), strict=True)
        cells = [cells_of_drafted(*row) for row in rows]
        chances = experience.drafted.chances
        values = torch.tensor([[chances[cell] for cell in row] for row in cells], dtype=torch.float64, device="cpu")  # [B, n]
        experience.plan.observe(values, depths)
        if proposal.num_steps > 1:
            nodes = list(zip(depths.flatten().tolist(), values.flatten().tolist(), strict=True))
            experience.observe_step_gain(nodes, proposal.num_steps)
        else:
            experience.forget_step_gain()
        weights = lesson.weights
        expected = sum(weights) + sum(map(operator.mul, weights, values.sum(dim=1).tolist()))
        lesson = dataclasses.replace(lesson, drafted_cells=cells, copied_cells=[[-1] * len(row) for row in cells])
        return dataclasses.replace(proposal, expected_tokens=expected, lesson=lesson)
