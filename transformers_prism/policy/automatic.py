"""`tree="auto"`: every round the tree that is expected to bring the most tokens per second.

What is known: the costs of a round's parts (`costs.py`), and from the rounds so far how often a node was
accepted, by the draft's cumulative probability and depth, or, for continuations copied from the text (`ngrams.py`),
by the length of the match. With these

    value of a node   P(it is accepted), never above its parent's
    rate              tokens per second of the best way known: plain decoding, or rounds with the draft as they went
    nodes             as many as maximise  sum of values - rate * seconds of the verification
    draft steps       one more while the values it should bring exceed rate * (its seconds + those of its nodes)

which is the rule for the highest average reward per unit of time. Where drafting does not pay, rounds are plain steps,
which the draft does not even read, and one round now and then tries again. Where it hardly pays, one round now and then
is a plain step, so that its cost is known.

Several rows take as long as the slowest, so a token counts half in a row that is a few tokens ahead of that, and hardly in
one that is far ahead. Drafting has to gain more there than estimates may be wrong by, and a try that did not pay is not
repeated before it has cost no more than a hundredth of the time since. Where rows have ended, the rest is judged anew.
Shape letters: B rows that still decode, C candidates, n nodes of the tree without the root.
Source: the marginal value theorem (Charnov 1976) for the rule; trees as in EAGLE-2 (arXiv:2406.16858).
"""

import math
import operator
import time
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..decoding.speculation import RoundTree
from ..decoding.target_side import read_all
from ..decoding.tree import Tree, root_tree
from .costs import RoundCosts, load_or_measure
from .ngrams import MAX_MATCH, NgramIndex
from .settings import TreeSettings

# Edges of the classes of cumulative draft probability, finer where most accepted nodes are.
_EDGES = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.11, 0.16, 0.23, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
_LOG_EDGES = [math.log(edge) for edge in _EDGES]
_MAX_DEPTH = 8  # deeper nodes share its statistics
_MAX_COPIED = 10  # tokens of a copied continuation
# A cell's observations count half after 140 more of its own rounds, so that estimates follow the text.
_FADE = 0.995
# A new draft is believed as if so many nodes of each kind had been accepted as often as it says, less a bit.
_PRIOR_WEIGHT = 8.0
_PRIOR_TRUST = 0.8
# Rounds until drafting is tried again: at first, and at most; doubled whenever a try did not pay. The next call waits for
# a quarter of the last pause, since its text may be another.
_FIRST_PAUSE, _LONGEST_PAUSE = 4, 64
_SHARE_OF_PAUSE = 4
# Rounds with a tree until the next plain step, where drafting gains less than this.
_CHECK_EVERY, _CLEAR_ADVANTAGE = 16, 1.25
# How fast the rate of rounds with the draft, the time beside their forwards and the gain of a step follow the latest round.
_RATE_FADE = 0.85
_REST_RATE = 0.1
_GAIN_RATE = 0.1
# Of several rows: tokens ahead of the slowest by which a row counts half, what drafting has to gain, and the share of the
# time that tries may cost.
_HALF_LEAD = 4.0
_LEAST_ADVANTAGE = 1.03
_SHARE_OF_TRIES = 0.01
STEP_GAIN = 0.7  # the gain that is expected at first


class _Table:
    """How often something was accepted, by cell.

    Args:
        prior (`torch.DoubleTensor`): probability that each cell starts from, `(rows, columns)`.
    """

    def __init__(self, prior: torch.Tensor):
        self.num_columns = prior.shape[1]
        self.chances: list[float] = prior.flatten().tolist()  # of acceptance
        self.num_seen = [_PRIOR_WEIGHT] * len(self.chances)
        self.num_accepted = [chance * _PRIOR_WEIGHT for chance in self.chances]

    def observe(self, cells: list[int], is_accepted: list[bool]) -> None:
        """Add observations: flat indices of cells, negative ones to be ignored, and what became of each."""
        counts: dict[int, tuple[int, int]] = {}
        for cell, accepted in zip(cells, is_accepted, strict=True):
            if cell >= 0:
                num_new, num_good = counts.get(cell, (0, 0))
                counts[cell] = (num_new + 1, num_good + accepted)
        for cell, (num_new, num_good) in counts.items():
            self.num_seen[cell] = self.num_seen[cell] * _FADE + num_new
            self.num_accepted[cell] = self.num_accepted[cell] * _FADE + num_good
            self.chances[cell] = self.num_accepted[cell] / self.num_seen[cell]

    def rows(self) -> list[list[float]]:
        """Chances of acceptance in the shape of the prior."""
        width = self.num_columns
        return [self.chances[start : start + width] for start in range(0, len(self.chances), width)]


def _drafted_prior() -> torch.Tensor:
    """By depth and class of probability: a bit less than the middle of the class."""
    edges = torch.tensor([0.0, *_EDGES, 1.0], dtype=torch.float64)
    return _PRIOR_TRUST * ((edges[1:] + edges[:-1]) / 2).expand(_MAX_DEPTH, -1)


def _copied_prior() -> torch.Tensor:
    """By length of the match and depth: longer matches are right more often, and each further token as often again."""
    chance = torch.linspace(0.2, 0.6, MAX_MATCH + 1, dtype=torch.float64)[:, None]
    return chance ** torch.arange(1, _MAX_COPIED + 1)


@dataclass
class Payoff:
    """Whether rounds with the draft pay for so many rows at work.

    Args:
        advantage: tokens per second of rounds with the draft over plain decoding, as last seen.
        pause: plain rounds after the next try that does not pay.
    """

    advantage: float = 1.0
    pause: int = _FIRST_PAUSE


@dataclass
class Experience:
    """What rounds have taught about a draft, kept from one generate() call to the next.

    Args:
        drafted, copied: acceptance of the draft's nodes and of copied ones.
        step_gain: value that one more draft step brings, over the value of the nodes that it goes on with.
        payoffs: by the bits of the number of rows at work less one: of 1, 2, up to 4, up to 8 rows and so on.
        first_value, rank_values: for `planned.py`, which sets them.
    """

    drafted: _Table = field(default_factory=lambda: _Table(_drafted_prior()))
    copied: _Table = field(default_factory=lambda: _Table(_copied_prior()))
    step_gain: float = STEP_GAIN
    payoffs: dict[int, Payoff] = field(default_factory=dict)
    first_value: float = 0.0
    rank_values: torch.Tensor | None = None


class Proposal(NamedTuple):
    """What was proposed in a round, to learn from what becomes of it; of each row the nodes' cells, -1 where none applies."""

    drafted_cells: list[list[int]]
    copied_cells: list[list[int]]
    num_steps: int
    expected_tokens: float  # of all rows together, by their weights


@dataclass
class _Candidates:
    """What the tree of a row can be made of, parents before children; each list has an entry per candidate.

    Args:
        token_ids, parents, depths, log_probs: as in [`CandidatePool`].
        drafted_cells, copied_cells: in the tables of drafted and of copied nodes, -1 where none applies.
        values: probability of acceptance, never above the parent's.
    """

    token_ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    drafted_cells: list[int] = field(default_factory=list)
    copied_cells: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @classmethod
    def drafted(cls, token_ids, parents, depths, log_probs, cells, chances: list[float]) -> "_Candidates":
        """A row of what was drafted; `chances` by cell."""
        values: list[float] = []
        for cell, parent in zip(cells, parents, strict=True):
            values.append(min(chances[cell], values[parent]) if parent >= 0 else chances[cell])
        return cls(token_ids, parents, depths, log_probs, cells, [-1] * len(cells), values)

    def add_copy(self, match: int, tokens: list[int], chances: list[float]) -> None:
        """Let a copied continuation join: as further candidates, or in candidates that say the same."""
        node_of = {pair: node for node, pair in enumerate(zip(self.parents, self.token_ids, strict=True))}
        node, chance = -1, 1.0
        for depth, token in enumerate(tokens):
            cell, parent = match * _MAX_COPIED + depth, node
            chance = min(chance, chances[cell])
            node = node_of.get((parent, token), len(self.values))
            if node == len(self.values):
                new = (token, parent, depth + 1, math.log(max(chance, 1e-9)), -1, cell, chance)
                for column, entry in zip(vars(self).values(), new, strict=True):
                    column.append(entry)
            else:
                self.copied_cells[node] = cell
                self.values[node] = max(self.values[node], chance)

    def best(self, num_nodes: int) -> "_Candidates":
        """The best of them as nodes of a tree, ties to the first; a parent is a node of the tree, 0 its root.

        Each node is followed by all that lies below it, better children first: where the likeliest path is accepted, its
        keys and values need not be moved.
        """
        ranked = sorted(range(len(self.values)), key=self.values.__getitem__, reverse=True)[:num_nodes]
        children: dict[int, list[int]] = {one: [] for one in (-1, *ranked)}
        for one in reversed(ranked):
            children[self.parents[one]].append(one)
        chosen, stack = [], children[-1]
        while stack:
            chosen.append(stack.pop())
            stack += children[chosen[-1]]
        best = _Candidates(*([column[one] for one in chosen] for column in vars(self).values()))
        node_of = {one: node for node, one in enumerate([-1, *chosen])}
        best.parents = [node_of[parent] for parent in best.parents]
        return best


def _tree_of(root_ids: list[int], rows: list[_Candidates]) -> Tree:
    """The tree of each row's nodes below its last token."""
    token_ids = [[root, *row.token_ids] for root, row in zip(root_ids, rows, strict=True)]
    parents, depths = [[0, *row.parents] for row in rows], [[0, *row.depths] for row in rows]
    log_probs = torch.tensor([[0.0, *row.log_probs] for row in rows], dtype=torch.float32)
    ids, parents_of_ids, depths_of_ids = torch.tensor([token_ids, parents, depths])
    return Tree(ids, parents_of_ids, depths_of_ids, log_probs)


_experiences: WeakKeyDictionary = WeakKeyDictionary()
_costs: WeakKeyDictionary = WeakKeyDictionary()


def _known_costs(target, draft, num_rows: int) -> RoundCosts:
    """Costs from earlier calls in this process, corrected by them, or from the disk, or measured."""
    known = _costs.setdefault(target, WeakKeyDictionary()).setdefault(draft, {})
    # Preparing or compiling a model changes the classes of its layers.
    key = (num_rows, torch.get_num_threads(), frozenset(type(module) for module in target.modules()))
    before = known.get(key)
    known[key] = load_or_measure(target, draft, num_rows, before)
    if before is not None and known[key] is not before:
        # Whether drafting pays was judged by costs that did not hold.
        for experience in _experiences.get(draft, {}).values():
            experience.payoffs.clear()
    return known[key]


class AutoTrees:
    """Proposes a tree per round, and learns from what becomes of it.

    Args:
        settings (`TreeSettings`): the largest tree that may be chosen.
        target (`PreTrainedModel`), draft (`PrismDraftModel`): bound to each other.
        rows (`OutputRows`): the sequences.
        text (`NgramIndex`, *optional*): the beginning of a single sequence, indexed by an earlier call.
    """

    def __init__(self, settings: TreeSettings, target, draft, rows, text: NgramIndex | None = None):
        self.settings, self.rows = settings, rows
        self.costs = _known_costs(target, draft, rows.num_rows)
        self.experience = _experiences.setdefault(draft, {}).setdefault(rows.do_sample, Experience())
        self.num_rounds = 0
        self.texts: list[NgramIndex | None] = [text] + [None] * (rows.num_rows - 1)
        self.num_indexed: list[int | None] = [None] * rows.num_rows  # new tokens of each row that its text holds
        self.num_unchecked = 0  # rounds with a tree since the last plain step
        self.active: list[int] = []  # of the latest round
        # Of a token of each of these; in sum, how many of them go on.
        self.weights = [1.0] * rows.num_rows
        self.read_seconds = 0.0  # of what plain steps had left the draft to read
        self.rest_seconds: list[float | None] = [None, None]  # of rounds without and with a tree, beside their forwards
        self._judge(rows.num_rows)

    def _judge(self, num_rows: int) -> None:
        """Go by what is known of so many rows at work."""
        self.payoff = self.experience.payoffs.setdefault((num_rows - 1).bit_length(), Payoff())
        # Tokens of recent rounds with the draft, per row and by weight, and their time in plain steps; both fade.
        self.tokens = self.plain_steps = 1.0
        self.tokens *= max(self.payoff.advantage, 1.0)
        self.lost = 0.0  # plain steps' time that rounds with the draft have cost since they were tried again
        wait = 0 if self.payoff.pause == _FIRST_PAUSE else self.payoff.pause // _SHARE_OF_PAUSE
        self.next_try = self.num_rounds + wait

    def propose(self, drafter, unread: list, active: list[int], max_depth: int, max_nodes: int) -> Tree:
        """The tree of the next round.

        Args:
            drafter (`Drafter`): for the rows that are active.
            unread (`list[NewPositions]`): what it has not read yet; emptied if it is read now.
            active (`list[int]`): rows of the sequences.
            max_depth (`int`): tokens of the longest path at most, 0 or more.
            max_nodes (`int`): drafted nodes at most, 0 or more.
        """
        self._begin_round(active)
        return self._propose(drafter, unread, max_depth, max_nodes)

    def _propose(self, drafter, unread: list, max_depth: int, max_nodes: int) -> Tree:
        start, active = time.perf_counter(), self.active
        has_backlog = len(unread) > 1 or self.num_rounds == 1
        max_depth = 0 if self._is_check() else min(max_depth, max_nodes)
        depth = min(self.settings.depth, max_depth)
        candidates, num_steps = [_Candidates() for _ in active], 0
        if depth > 0 and self.num_rounds > self.next_try:
            candidates, num_steps = self._draw(drafter, unread, len(active), depth)
        elif not self._all_have_copies(max_depth):
            return self._plain_step()
        if self.settings.ngrams and max_depth > 0:
            longest = min(max_depth, _MAX_COPIED, self.settings.num_nodes)
            for row, one in zip(active, candidates, strict=True):
                one.add_copy(*self._text(row).continuation(longest), self.experience.copied.chances)
        num_nodes, expected = self._best_size([one.values for one in candidates], max_nodes)
        self.num_unchecked = self.num_unchecked + 1 if num_nodes else 0
        chosen = [one.best(num_nodes) for one in candidates]
        tree = _tree_of(self._root_ids(), chosen)
        if num_steps > 1:
            nodes = [node for one in chosen for node in zip(one.depths, one.values, strict=True)]
            self._note_step_gain(nodes, num_steps)
        if num_steps and not has_backlog:
            self.costs.observe_step((time.perf_counter() - start) / num_steps)
        cells = [one.drafted_cells for one in chosen], [one.copied_cells for one in chosen]
        self.proposal = Proposal(*cells, num_steps, expected)
        self.depth = max(max(one.depths, default=0) for one in chosen)
        self.proposed_at = time.perf_counter()
        return tree

    def _begin_round(self, active: list[int]) -> None:
        """Note which rows are at work, and what a token is worth in each."""
        if self.active and (len(active) - 1).bit_length() != (len(self.active) - 1).bit_length():
            self._judge(len(active))
        self.num_rounds += 1
        self.active = active
        lengths = [0 if self.rows.is_done(row) else self.rows.lengths[row] for row in active]
        slowest = min((length for length in lengths if length), default=0)
        weights = [2.0 ** ((slowest - length) / _HALF_LEAD) if length else 0.0 for length in lengths]
        scale = sum(length > 0 for length in lengths) / max(sum(weights), 1.0)
        self.weights = [scale * weight for weight in weights]

    def _all_have_copies(self, max_depth: int) -> bool:
        """Whether the text of every row says how it may go on; trees are as large as the smallest."""
        return self.settings.ngrams and max_depth > 0 and all(self._text(row).continuation(1)[1] for row in self.active)

    def _plain_step(self) -> Tree:
        """A tree of the roots alone."""
        self.num_unchecked, self.depth = 0, 0
        none: list[list[int]] = [[] for _ in self.active]
        self.proposal = Proposal(none, none, 0, sum(self.weights))
        self.proposed_at = time.perf_counter()
        return root_tree(torch.tensor(self._root_ids()))

    def _root_ids(self) -> list[int]:
        """The last token of each row at work."""
        return [self.rows.new_tokens[row][-1] for row in self.active]

    def observe(self, tree: Tree, kept: list[list[int]], verify_seconds: float) -> RoundTree:
        """Learn from a round, and say what it was.

        Args:
            tree (`Tree`): as proposed.
            kept (`list[list[int]]`): per row the nodes that a token was emitted at, the root first; [] if it is done.
            verify_seconds (`float`): of the target's forward.
        """
        self.costs.observe_verify(len(kept) * tree.num_nodes, verify_seconds)
        seconds, has_tree = time.perf_counter() - self.proposed_at - verify_seconds, tree.num_nodes > 1
        known = self.rest_seconds[has_tree]
        self.rest_seconds[has_tree] = seconds if known is None else known + _REST_RATE * (seconds - known)
        return self._learn(tree, kept)

    def _learn(self, tree: Tree, kept: list[list[int]]) -> RoundTree:
        """What `observe` does, but for the time that the verification took."""
        proposal, num_rows = self.proposal, len(kept)
        going = [row for row, nodes in enumerate(kept) if nodes]
        is_accepted = [node in kept[row] for row in going for node in range(1, tree.num_nodes)]
        for cells, table in (
            (proposal.drafted_cells, self.experience.drafted),
            (proposal.copied_cells, self.experience.copied),
        ):
            table.observe([cell for row in going for cell in cells[row]], is_accepted)
        if proposal.num_steps:
            self._note_rate(proposal, kept, tree.num_nodes)
        num_copied = sum(cell >= 0 for row in proposal.copied_cells for cell in row) // num_rows
        return RoundTree(proposal.num_steps, tree.num_nodes - 1, num_copied, proposal.expected_tokens / num_rows)

    def estimates(self) -> dict:
        """What the choices rest on, for a person to read."""
        return {
            **asdict(self.costs),
            "advantage": self.payoff.advantage,
            "step_gain": self.experience.step_gain,
            "probability_edges": list(_EDGES),
            "accepted_by_depth_and_probability": self.experience.drafted.rows(),
            "accepted_by_match_and_depth": self.experience.copied.rows(),
        }

    # --- drafting ------------------------------------------------------------------------------------------------

    def _rate(self, num_rows: int) -> float:
        """Tokens per second, all rows together and by weight, that time is worth."""
        return sum(self.weights) / self.costs.verify(num_rows) * max(1.0, self.tokens / self.plain_steps)

    def _tree_seconds(self) -> float:
        """What a round with a tree takes longer beside its forwards than a plain step."""
        plain, with_tree = self.rest_seconds
        return max(with_tree - plain, 0.0) if plain is not None and with_tree is not None else 0.0

    def _draw(self, drafter, unread: list, num_rows: int, depth: int) -> tuple[list[_Candidates], int]:
        """Let the draft read and propose; returns what it proposed in each row, and the draft steps that it ran."""
        is_late, start = len(unread) > 1, time.perf_counter()
        read_all(drafter, unread)
        self.read_seconds = time.perf_counter() - start if is_late else 0.0
        steps = _StepChoice(self, num_rows, depth)
        coupling = self.rows.coupling(self.active, depth)
        pool = drafter.draw(self.settings.top_k, depth, steps.choose_width, coupling)
        chances = self.experience.drafted.chances
        candidates = []
        for token_ids, parents, depths, log_probs in pool.rows():
            cells = cells_of_drafted(depths, log_probs)
            candidates.append(_Candidates.drafted(token_ids, parents, depths, log_probs, cells, chances))
        return candidates, steps.num_steps

    def text_of(self, row: int) -> NgramIndex | None:
        """The row's text as far as it was indexed."""
        return self.texts[row]

    def _text(self, row: int) -> NgramIndex:
        """The row's text so far, indexed."""
        text, num_indexed = self.texts[row], self.num_indexed[row]
        if num_indexed is None:
            prompt, num_indexed = self.rows.ids[row, : self.rows.prompt_length].tolist(), 0
            if text is None or prompt[: len(text.token_ids)] != text.token_ids:
                text = self.texts[row] = NgramIndex([])
            text.extend(prompt[len(text.token_ids) :])
        text.extend(self.rows.new_tokens[row][num_indexed:])
        self.num_indexed[row] = len(self.rows.new_tokens[row])
        return text

    def _best_size(self, values: list[list[float]], max_nodes: int) -> tuple[int, float]:
        """Nodes of every row that pay best, and the tokens, by weight, that the round should then commit in all rows."""
        num_rows, limit = len(values), min(self.settings.num_nodes, max_nodes)
        best_first = [sorted(row, reverse=True)[:limit] for row in values]
        rate, verify, tree_seconds = self._rate(num_rows), self.costs.verify, self._tree_seconds()
        expected = best = sum(self.weights)
        best_reward, best_count = expected - rate * verify(num_rows), 0
        # As many as the row with the fewest has.
        for count, gains in enumerate(zip(*best_first, strict=False), start=1):
            expected += sum(map(operator.mul, self.weights, gains))
            reward = expected - rate * (verify(num_rows * (count + 1)) + tree_seconds)
            if reward > best_reward:
                best, best_reward, best_count = expected, reward, count
        return best_count, best

    # --- learning ------------------------------------------------------------------------------------------------

    def _note_step_gain(self, nodes: list[tuple[int, float]], num_steps: int) -> None:
        """How much of the value of nodes that a step went on with, their children brought; depths and values."""
        before = sum(value for depth, value in nodes if depth < num_steps)
        after = sum(value for depth, value in nodes if 1 < depth <= num_steps)
        if before > 0:
            self.experience.step_gain += _GAIN_RATE * (min(after / before, 1.0) - self.experience.step_gain)

    def _note_rate(self, proposal: Proposal, kept: list[list[int]], num_nodes: int) -> None:
        """Whether rounds with the draft pay; if not, leave it alone for a while."""
        num_rows = len(kept)
        emitted = sum(weight * len(nodes) for weight, nodes in zip(self.weights, kept, strict=True))
        # What was expected is less noisy than what came of it in few rows, which in turn knows the text at hand.
        tokens = (proposal.expected_tokens + num_rows * emitted) / (1 + num_rows) / max(sum(self.weights), 1.0)
        plain_seconds = self.costs.verify(num_rows)
        seconds = self.costs.step_seconds * proposal.num_steps + self.costs.verify(num_rows * num_nodes)
        seconds += self._tree_seconds() if num_nodes > 1 else 0.0
        self.tokens = _RATE_FADE * self.tokens + tokens
        self.plain_steps = _RATE_FADE * self.plain_steps + seconds / plain_seconds
        self.payoff.advantage = self.tokens / self.plain_steps
        self.lost += (seconds + self.read_seconds) / plain_seconds - tokens
        if self.payoff.advantage >= (_LEAST_ADVANTAGE if num_rows > 1 else 1.0):
            self.payoff.pause = _FIRST_PAUSE
            return
        pause = max(self.payoff.pause, round(self.lost / _SHARE_OF_TRIES)) if num_rows > 1 else self.payoff.pause
        self.next_try, self.lost = self.num_rounds + pause, 0.0
        self.payoff.pause = min(2 * self.payoff.pause, _LONGEST_PAUSE)

    def _is_check(self) -> bool:
        """Whether this round is to be a plain step, to see what one costs."""
        return self.num_unchecked >= _CHECK_EVERY and self.payoff.advantage < _CLEAR_ADVANTAGE


class _StepChoice:
    """Decides before each draft step of a round how many nodes it goes on with."""

    def __init__(self, trees: AutoTrees, num_rows: int, depth: int):
        self.experience, self.top_k, self.num_rows, self.depth = trees.experience, trees.settings.top_k, num_rows, depth
        self.weights = trees.weights
        self.num_steps = 1
        rate, verify = trees._rate(num_rows), trees.costs.verify
        self.step_price = rate * trees.costs.step_seconds
        # What one more node of every row costs in the verification, on average over a tree of usual size, for one row.
        self.node_price = rate * ((verify(16 * num_rows) - verify(num_rows)) / 15) / num_rows

    def choose_width(self, log_probs: torch.Tensor) -> int:
        """Nodes for the next step, given the cumulative log-probabilities `(B, K, top_k)` of those to choose from; 0 ends."""
        chances, gain = self.experience.drafted.chances, self.experience.step_gain
        first_cell = _first_cell(self.num_steps)
        likeliest = [sorted(row, reverse=True)[: self.top_k] for row in log_probs.flatten(1).tolist()]
        rows = [
            [weight * chances[first_cell + _class_of(log_prob)] for log_prob in row]
            for weight, row in zip(self.weights, likeliest, strict=True)
        ]
        worth_it = [[value for value in row if value * gain > self.node_price] for row in rows]
        width = max(map(len, worth_it))
        value = sum(map(sum, worth_it))
        reward = best = 0.0
        for _ in range(self.depth - self.num_steps):
            value *= gain
            reward += value - self.step_price - self.node_price * width * self.num_rows
            best = max(best, reward)
        if best <= 0.0:
            return 0
        self.num_steps += 1
        return width


def _class_of(log_prob: float) -> int:
    """Class of a cumulative log-probability, 0 for the smallest."""
    return bisect_left(_LOG_EDGES, log_prob)


def _first_cell(depth: int) -> int:
    """Flat index into the table of drafted nodes of the smallest class at a depth."""
    return (min(depth, _MAX_DEPTH) - 1) * (len(_EDGES) + 1)


def cells_of_drafted(depths: list[int], log_probs: list[float]) -> list[int]:
    """Flat index into the table of drafted nodes for each candidate of a row."""
    return [_first_cell(depth) + _class_of(log_prob) for depth, log_prob in zip(depths, log_probs, strict=True)]
