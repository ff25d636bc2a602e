"""`tree="auto"`: every round the tree that is expected to bring the most tokens per second.

What is known: the costs of a round's parts (`round_costs.py`), and from the rounds so far how often a node was
accepted, by the draft's cumulative probability and depth, or, for continuations copied from the text (`ngrams.py`),
by the length of the match. With these

    value of a node   P(it is accepted), never above its parent's
    rate              tokens per second of the best way known: plain decoding, or rounds with the draft as they went
    nodes             as many as maximise  sum of values - rate * seconds of the verification
    draft steps       one more while the values it should bring exceed rate * (its seconds + those of its nodes)

which is the rule for the highest average reward per unit of time. Where drafting does not pay, rounds are plain steps,
which the draft does not even read, and one round now and then tries again. Where it hardly pays, one round now and then
is a plain step, so that its cost is known. A batch takes as long as its slowest row, and drafting pays if it pays there.
Shape letters: B rows that still decode, C candidates, n nodes of the tree without the root.
Source: the marginal value theorem (Charnov 1976) for the rule; trees as in EAGLE-2 (arXiv:2406.16858).
"""

import time
from dataclasses import asdict, dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from .ngrams import MAX_MATCH, NgramIndex
from .round_costs import RoundCosts, load_or_measure
from .speculation import RoundTree
from .target_rounds import read_all
from .tree import CandidatePool, Tree, best_nodes, root_tree, tree_of_nodes
from .tree_policy import TreeSettings

# Edges of the classes of cumulative draft probability, finer where most accepted nodes are.
_EDGES = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.11, 0.16, 0.23, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
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
# How fast the rate of rounds with the draft, the pace of a row and the gain of a step follow the latest round; and rounds
# until a row's own pace counts as much as that of all rows.
_RATE_FADE = 0.85
_PACE_FADE, _PACE_WEIGHT = 0.97, 4.0
_GAIN_RATE = 0.1
STEP_GAIN = 0.7  # the gain that is expected at first


class _Table:
    """How often something was accepted, by cell.

    Args:
        prior (`torch.DoubleTensor`): probability that each cell starts from.
    """

    def __init__(self, prior: torch.Tensor):
        self.num_seen = torch.full_like(prior, _PRIOR_WEIGHT)
        self.num_accepted = prior * _PRIOR_WEIGHT

    def probabilities(self) -> torch.Tensor:
        """Of acceptance, in the shape of the prior."""
        return self.num_accepted / self.num_seen

    def observe(self, cells: torch.Tensor, is_accepted: torch.Tensor) -> None:
        """Add observations: flat indices of cells `(n,)`, negative ones to be ignored, and what became of each."""
        is_accepted, cells = is_accepted[cells >= 0].double(), cells[cells >= 0]
        new = torch.bincount(cells, minlength=self.num_seen.numel()).view_as(self.num_seen)
        fade = torch.where(new > 0, _FADE, 1.0)
        self.num_seen = self.num_seen * fade + new
        accepted = torch.bincount(cells, weights=is_accepted, minlength=self.num_seen.numel())
        self.num_accepted = self.num_accepted * fade + accepted.view_as(self.num_seen)


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
    """Whether rounds with the draft pay in batches of one size.

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
        payoffs: by number of rows.
        first_value, rank_values: for `planned_trees.py`, which sets them.
    """

    drafted: _Table = field(default_factory=lambda: _Table(_drafted_prior()))
    copied: _Table = field(default_factory=lambda: _Table(_copied_prior()))
    step_gain: float = STEP_GAIN
    payoffs: dict[int, Payoff] = field(default_factory=dict)
    first_value: float = 0.0
    rank_values: torch.Tensor | None = None


class Proposal(NamedTuple):
    """What was proposed in a round, to learn from what becomes of it; cells are `(B, n)`, -1 where none applies."""

    drafted_cells: torch.Tensor
    copied_cells: torch.Tensor
    num_steps: int
    expected_tokens: float  # of all rows together


_experiences: WeakKeyDictionary = WeakKeyDictionary()
_costs: WeakKeyDictionary = WeakKeyDictionary()


def _known_costs(target, draft, num_rows: int) -> RoundCosts:
    """Costs from earlier calls in this process, corrected by them, or from the disk, or measured."""
    known = _costs.setdefault(target, WeakKeyDictionary()).setdefault(draft, {})
    # Preparing or compiling a model changes the classes of its layers.
    key = (num_rows, torch.get_num_threads(), frozenset(type(module) for module in target.modules()))
    if key not in known:
        known[key] = load_or_measure(target, draft, num_rows)
    return known[key]


class AutoTrees:
    """Proposes a tree per round, and learns from what becomes of it.

    Args:
        settings (`TreeSettings`): the largest tree that may be chosen.
        target (`PreTrainedModel`), draft (`PrismDraftModel`): bound to each other.
        rows (`OutputRows`): the sequences.
    """

    def __init__(self, settings: TreeSettings, target, draft, rows):
        self.settings, self.rows = settings, rows
        self.costs = _known_costs(target, draft, rows.num_rows)
        self.experience = _experiences.setdefault(draft, {}).setdefault(rows.do_sample, Experience())
        self.payoff = self.experience.payoffs.setdefault(rows.num_rows, Payoff())
        # Expected tokens of recent rounds with the draft, per row, and their time in plain steps; both fade.
        self.tokens = self.plain_steps = 1.0
        self.tokens *= max(self.payoff.advantage, 1.0)
        self.num_rounds = 0
        self.next_try = 0 if self.payoff.pause == _FIRST_PAUSE else self.payoff.pause // _SHARE_OF_PAUSE
        self.texts: list[NgramIndex | None] = [None] * rows.num_rows
        self.num_unchecked = 0  # rounds with a tree since the last plain step
        self.active: list[int] = []  # of the latest round
        # Tokens and rounds of each row, where the draft was at work; both fade.
        self.row_tokens, self.row_rounds = [0.0] * rows.num_rows, [0.0] * rows.num_rows

    def propose(self, drafter, unread: list, active: list[int], max_depth: int, max_nodes: int) -> Tree:
        """The tree of the next round.

        Args:
            drafter (`Drafter`): for the rows that are active.
            unread (`list[NewPositions]`): what it has not read yet; emptied if it is read now.
            active (`list[int]`): rows of the sequences.
            max_depth (`int`): tokens of the longest path at most, 0 or more.
            max_nodes (`int`): drafted nodes at most, 0 or more.
        """
        start = time.perf_counter()
        has_backlog = len(unread) > 1 or self.num_rounds == 0
        self.num_rounds += 1
        self.active, num_rows = active, len(active)
        ends = torch.tensor([self.rows.lengths[row] for row in active], device=self.rows.ids.device)
        root_ids = self.rows.ids[torch.tensor(active, device=ends.device), ends - 1]
        max_depth = 0 if self._is_check() else min(max_depth, max_nodes)
        depth = min(self.settings.depth, max_depth)
        pool, num_steps = CandidatePool.empty(num_rows, torch.device("cpu")), 0
        if depth > 0 and self.num_rounds > self.next_try:
            pool, num_steps = self._draw(drafter, unread, num_rows, depth)
        drafted_cells = cells_of_drafted(pool)
        values = self._values(pool, drafted_cells)
        copied_cells = torch.full_like(drafted_cells, -1)
        if self.settings.ngrams and max_depth > 0:
            pool, values, drafted_cells, copied_cells = self._join_copies(
                pool, values, drafted_cells, copied_cells, active, max_depth
            )
        num_nodes, expected = self._best_size(values, num_rows, max_nodes)
        chosen = best_nodes(values, num_nodes)
        self.num_unchecked = self.num_unchecked + 1 if num_nodes else 0
        if num_nodes == 0:
            tree = root_tree(root_ids)
        else:
            tree = tree_of_nodes(root_ids.cpu(), pool, chosen)
        if num_steps > 1:
            self._note_step_gain(pool.depths.gather(1, chosen), values.gather(1, chosen), num_steps)
        drafted_cells, copied_cells = drafted_cells.gather(1, chosen), copied_cells.gather(1, chosen)
        if num_steps and not has_backlog:
            self.costs.observe_step((time.perf_counter() - start) / num_steps)
        self.proposal = Proposal(drafted_cells, copied_cells, num_steps, expected)
        self.depth = int(tree.depths.max()) if num_nodes else 0
        return tree

    def observe(self, tree: Tree, kept: list[list[int]], verify_seconds: float) -> RoundTree:
        """Learn from a round, and say what it was.

        Args:
            tree (`Tree`): as proposed.
            kept (`list[list[int]]`): per row the nodes that a token was emitted at, the root first; [] if it is done.
            verify_seconds (`float`): of the target's forward.
        """
        self.costs.observe_verify(len(kept) * tree.num_nodes, verify_seconds)
        return self._learn(tree, kept)

    def _learn(self, tree: Tree, kept: list[list[int]]) -> RoundTree:
        """What `observe` does, but for the time that the verification took."""
        proposal, num_rows = self.proposal, len(kept)
        is_going = [row for row, nodes in enumerate(kept) if nodes]
        is_accepted = torch.zeros((num_rows, tree.num_nodes), dtype=torch.bool)
        for row in is_going:
            is_accepted[row, kept[row]] = True
        is_accepted = is_accepted[is_going, 1:].flatten()
        if tree.num_nodes > 1:
            self.experience.drafted.observe(proposal.drafted_cells[is_going].flatten(), is_accepted)
            self.experience.copied.observe(proposal.copied_cells[is_going].flatten(), is_accepted)
        if proposal.num_steps:
            self._note_rate(proposal, kept, tree.num_nodes)
        num_copied = int((proposal.copied_cells >= 0).sum()) // num_rows
        return RoundTree(proposal.num_steps, tree.num_nodes - 1, num_copied, proposal.expected_tokens / num_rows)

    def estimates(self) -> dict:
        """What the choices rest on, for a person to read."""
        return {
            **asdict(self.costs),
            "advantage": self.payoff.advantage,
            "step_gain": self.experience.step_gain,
            "probability_edges": list(_EDGES),
            "accepted_by_depth_and_probability": self.experience.drafted.probabilities().tolist(),
            "accepted_by_match_and_depth": self.experience.copied.probabilities().tolist(),
        }

    # --- drafting ------------------------------------------------------------------------------------------------

    def _rate(self, num_rows: int) -> float:
        """Tokens per second, all rows together, that time is worth."""
        return num_rows / self.costs.verify(num_rows) * max(1.0, self.tokens / self.plain_steps)

    def _node_seconds(self, num_rows: int) -> float:
        """What one more node of every row costs in the verification, on average over a tree of usual size."""
        return (self.costs.verify(16 * num_rows) - self.costs.verify(num_rows)) / 15

    def _draw(self, drafter, unread: list, num_rows: int, depth: int) -> tuple[CandidatePool, int]:
        """Let the draft read and propose; returns what it proposed and the draft steps that it ran."""
        read_all(drafter, unread)
        steps = _StepChoice(self, num_rows, depth)
        pool = drafter.draw(self.settings.top_k, depth, steps.choose_width)
        return CandidatePool(*(part.cpu() for part in vars(pool).values())), steps.num_steps

    def _values(self, pool: CandidatePool, cells: torch.Tensor) -> torch.Tensor:
        """Probability `(B, C)` that each node is accepted."""
        values = self.experience.drafted.probabilities().flatten()[cells]
        starts = [0, *pool.depths[0].diff().nonzero().flatten().add(1).tolist(), pool.depths.shape[1]]
        for start, end in zip(starts[1:], starts[2:], strict=False):
            values[:, start:end] = values[:, start:end].minimum(values.gather(1, pool.parents[:, start:end]))
        return values

    def _join_copies(self, pool, values, drafted_cells, copied_cells, active: list[int], max_depth: int):
        """Let copied continuations join the pool: as further candidates, or in candidates that say the same."""
        chances = self.experience.copied.probabilities().cummin(dim=1).values
        added: list[list[tuple[int, int, int, float, int]]] = []
        for i, row in enumerate(active):
            added.append([])
            match, tokens = self._text(row).continuation(min(max_depth, _MAX_COPIED, self.settings.num_nodes))
            if not tokens:
                continue
            pairs = zip(pool.parents[i].tolist(), pool.token_ids[i].tolist(), strict=True)
            node_of = {pair: node for node, pair in enumerate(pairs)}
            node = -1
            for depth, token in enumerate(tokens):
                chance, cell = float(chances[match, depth]), match * _MAX_COPIED + depth
                known = node_of.get((node, token))
                if known is None:
                    added[i].append((token, node, depth + 1, chance, cell))
                    node = pool.token_ids.shape[1] + len(added[i]) - 1
                else:
                    values[i, known] = max(float(values[i, known]), chance)
                    copied_cells[i, known] = cell
                    node = known
        longest = max(map(len, added))
        # Rows without so many copies are filled up with candidates of no value.
        padded = [nodes + [(0, -1, 1, -1.0, -1)] * (longest - len(nodes)) for nodes in added]
        token_ids, parents, depths, chances_added, cells = (
            torch.tensor(padded, dtype=torch.float64).view(len(active), longest, 5).unbind(dim=-1)
        )
        joined = CandidatePool(
            torch.cat((pool.token_ids, token_ids.long()), dim=1),
            torch.cat((pool.parents, parents.long()), dim=1),
            torch.cat((pool.depths, depths.long()), dim=1),
            torch.cat((pool.log_probs, chances_added.clamp(min=1e-9).log().float()), dim=1),
        )
        values = torch.cat((values, chances_added), dim=1)
        drafted_cells = torch.cat((drafted_cells, torch.full_like(cells, -1).long()), dim=1)
        return joined, values, drafted_cells, torch.cat((copied_cells, cells.long()), dim=1)

    def _text(self, row: int) -> NgramIndex:
        """The row's text so far, indexed."""
        end = self.rows.lengths[row]
        text = self.texts[row]
        if text is None:
            text = self.texts[row] = NgramIndex(self.rows.ids[row, :end].tolist())
        else:
            text.extend(self.rows.ids[row, len(text.token_ids) : end].tolist())
        return text

    def _best_size(self, values: torch.Tensor, num_rows: int, max_nodes: int) -> tuple[int, float]:
        """Nodes of every row that pay best, and the tokens that the round should then commit in all rows."""
        usable = int((values > 0).sum(dim=1).min()) if values.numel() else 0
        limit = min(self.settings.num_nodes, max_nodes, usable)
        best_first = values.sort(dim=1, descending=True).values[:, :limit].sum(dim=0)  # [limit]
        rate, verify = self._rate(num_rows), self.costs.verify
        expected = best = float(num_rows)
        best_reward, best_count = expected - rate * verify(num_rows), 0
        for count, gain in enumerate(best_first.tolist(), start=1):
            expected += gain
            reward = expected - rate * verify(num_rows * (count + 1))
            if reward > best_reward:
                best, best_reward, best_count = expected, reward, count
        return best_count, best

    # --- learning ------------------------------------------------------------------------------------------------

    def _note_step_gain(self, depths: torch.Tensor, values: torch.Tensor, num_steps: int) -> None:
        """How much of the value of nodes that a step went on with, their children brought."""
        before = float(values[depths < num_steps].sum())
        after = float(values[(depths > 1) & (depths <= num_steps)].sum())
        if before > 0:
            self.experience.step_gain += _GAIN_RATE * (min(after / before, 1.0) - self.experience.step_gain)

    def _note_rate(self, proposal: Proposal, kept: list[list[int]], num_nodes: int) -> None:
        """Whether rounds with the draft pay; if not, leave it alone for a while."""
        num_rows = len(kept)
        # What was expected is less noisy than what came of it, which in turn knows the text at hand.
        tokens = (proposal.expected_tokens + sum(map(len, kept))) / 2 / num_rows * self._slowest_pace(kept)
        seconds = self.costs.step_seconds * proposal.num_steps + self.costs.verify(num_rows * num_nodes)
        self.tokens = _RATE_FADE * self.tokens + tokens
        self.plain_steps = _RATE_FADE * self.plain_steps + seconds / self.costs.verify(num_rows)
        self.payoff.advantage = self.tokens / self.plain_steps
        if self.payoff.advantage >= 1.0:
            self.payoff.pause = _FIRST_PAUSE
            return
        self.next_try = self.num_rounds + self.payoff.pause
        self.payoff.pause = min(2 * self.payoff.pause, _LONGEST_PAUSE)

    def _slowest_pace(self, kept: list[list[int]]) -> float:
        """Tokens per round of the slowest row that goes on, over those of the average one: 1 or less."""
        going = [row for row, nodes in zip(self.active, kept, strict=True) if nodes]
        for row, nodes in zip(self.active, kept, strict=True):
            self.row_tokens[row] = _PACE_FADE * self.row_tokens[row] + len(nodes)
            self.row_rounds[row] = _PACE_FADE * self.row_rounds[row] + 1
        if not going:
            return 1.0
        average = sum(self.row_tokens[row] for row in going) / sum(self.row_rounds[row] for row in going)
        paces = [
            (self.row_tokens[row] + _PACE_WEIGHT * average) / (self.row_rounds[row] + _PACE_WEIGHT) for row in going
        ]
        return min(paces) * len(paces) / sum(paces)

    def _is_check(self) -> bool:
        """Whether this round is to be a plain step, to see what one costs."""
        return self.num_unchecked >= _CHECK_EVERY and self.payoff.advantage < _CLEAR_ADVANTAGE


class _StepChoice:
    """Decides before each draft step of a round how many nodes it goes on with."""

    def __init__(self, trees: AutoTrees, num_rows: int, depth: int):
        self.trees, self.num_rows, self.depth = trees, num_rows, depth
        self.num_steps = 1

    def choose_width(self, log_probs: torch.Tensor) -> int:
        """Nodes for the next step, given the cumulative log-probabilities `(B, K)` of those to choose from; 0 ends."""
        trees, costs = self.trees, self.trees.costs
        rate, gain = trees._rate(self.num_rows), trees.experience.step_gain
        node_price = rate * trees._node_seconds(self.num_rows) / self.num_rows
        table = trees.experience.drafted.probabilities()[min(self.num_steps, _MAX_DEPTH) - 1]
        values = table[_classes(log_probs.cpu())]  # [B, K]
        is_worth_it = values * gain > node_price
        width = int(is_worth_it.sum(dim=1).max())
        value = float(values[is_worth_it].sum())
        reward = best = 0.0
        for _ in range(self.depth - self.num_steps):
            value *= gain
            reward += value - rate * costs.step_seconds - node_price * width * self.num_rows
            best = max(best, reward)
        if best <= 0.0:
            return 0
        self.num_steps += 1
        return width


def _classes(log_probs: torch.Tensor) -> torch.Tensor:
    """Class of each cumulative probability, 0 for the smallest."""
    return torch.bucketize(log_probs.exp(), torch.tensor(_EDGES))


def cells_of_drafted(pool: CandidatePool) -> torch.Tensor:
    """Flat index into the table of drafted nodes for each candidate, `(B, C)`."""
    depths = pool.depths.clamp(max=_MAX_DEPTH) - 1
    return depths * (len(_EDGES) + 1) + _classes(pool.log_probs)
