"""Rounds of `tree="auto"` in simulated time: what a forward and a draft step cost is given, and no model runs."""

import random
import time
from types import SimpleNamespace

import torch

from transformers_prism.decoding.recurrent_target import MAX_CARRIED
from transformers_prism.decoding.round_values import Limits, Verified
from transformers_prism.decoding.tree import CandidatePool
from transformers_prism.policy import automatic
from transformers_prism.policy.costs import MEASURED_TOKENS, RoundCosts
from transformers_prism.policy.experience import Experience
from transformers_prism.policy.settings import TreeSettings

RIGHT, WRONG = 1, 0


class _Sequences:
    """What a policy asks of the sequences of a call: prompts of one token, and answers of `num_tokens`."""

    def __init__(self, num_sequences: int, num_tokens: int):
        self.lengths, self.end = [1] * num_sequences, 1 + num_tokens

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def active(self) -> list[int]:
        """Those that go on."""
        return [index for index, length in enumerate(self.lengths) if length < self.end]

    def is_done(self, index: int) -> bool:
        """Whether it has ended."""
        return self.lengths[index] >= self.end

    def last_tokens(self) -> list[int]:
        """The last token of those that go on."""
        return [RIGHT for _ in self.active]


class SimulatedRounds:
    """Calls whose experience is kept from call to call.

    Args:
        forward_seconds (`Callable[[int], float]`): of a target forward over that many tokens.
        step_seconds (`float`): of a draft step; reading a position costs a fiftieth of it.
        acceptance (`float`): probability that the first child of a node is right if the node is, and that of each further
            child if those before it are not.
        said (`float`, *optional*): what the draft says that probability is; by default the truth.
        believed_seconds (`Callable`, *optional*): what was measured of forwards; by default the truth.
        round_seconds (`float`): that a round takes outside its forward if it has a tree.
        top_k (`int`): children of a node; 1 for chains.
        num_sequences (`int`): in each call.
        is_recurrent (`bool`): whether the target has recurrent layers, of one sequence.
    """

    def __init__(
        self,
        forward_seconds,
        step_seconds,
        acceptance,
        said=None,
        believed_seconds=None,
        round_seconds=0.0,
        top_k=1,
        num_sequences=1,
        is_recurrent=False,
        seed=0,
    ):
        self.forward_seconds, self.step_seconds, self.acceptance = forward_seconds, step_seconds, acceptance
        self.said, self.round_seconds = acceptance if said is None else said, round_seconds
        self.top_k, self.num_sequences, self.is_recurrent = top_k, num_sequences, is_recurrent
        counts = [num_sequences * count for count in MEASURED_TOKENS]
        believed = [(believed_seconds or forward_seconds)(count) for count in counts]
        self.costs = RoundCosts(counts, believed, max(step_seconds, 1e-6))
        self.experience = Experience()
        self.random = random.Random(seed)
        self.now, self.num_carried, self.num_active = 0.0, 0, num_sequences
        self.unread: list[int] = []  # tokens of rounds that the draft has yet to read
        self.sizes: list[tuple[int, int]] = []  # carried tokens and nodes of each round

    def read(self):
        """As a draft's side: read what was committed; returns itself, to draw a tree."""
        self.now += self.step_seconds * (1 + 0.02 * sum(self.unread))
        self.unread.clear()
        return self

    @property
    def is_behind(self) -> bool:
        """Whether rounds went by without the draft."""
        return len(self.unread) > 1

    def draw(self, top_k, depth, choose_width=None, coupling=None) -> CandidatePool:
        """As a drafter: a tree, step by step."""
        child_said = torch.tensor([self.said * (1 - self.said) ** rank for rank in range(top_k)]).log()  # [top_k]
        frontiers = [[(-1, True)] for _ in range(self.num_active)]  # pool index, and whether all tokens so far are right
        log_probs = torch.zeros(self.num_active, 1)
        steps: list = []
        num_drawn = 0
        while True:
            all_log_probs = log_probs[..., None] + child_said
            tokens = [[token for _, is_right in nodes for token in self._children(is_right, top_k)] for nodes in frontiers]
            parents = [[index for index, _ in nodes for _ in range(top_k)] for nodes in frontiers]
            flat = all_log_probs.flatten(1)
            steps.append((torch.tensor(tokens), torch.tensor(parents), flat))
            width = top_k if len(steps) < depth else 0
            if width and choose_width is not None:
                width = choose_width(all_log_probs)
            if not width:
                return CandidatePool(steps)
            log_probs, chosen = flat.topk(min(width, flat.shape[1]))
            frontiers = [
                [(num_drawn + place, row[place] == RIGHT) for place in places]
                for row, places in zip(tokens, chosen.tolist(), strict=True)
            ]
            num_drawn += flat.shape[1]
            self.now += self.step_seconds

    def _children(self, is_right: bool, top_k: int) -> list[int]:
        """Tokens of a node's children, at most one of them right."""
        tokens = [WRONG] * top_k
        for rank in range(top_k if is_right else 0):
            if self.random.random() < self.acceptance:
                tokens[rank] = RIGHT
                break
        return tokens

    def call(self, monkeypatch, num_tokens: int, depth: int = 8, num_nodes: int | None = None) -> float:
        """Emit `num_tokens` in each sequence; returns the speed over that of plain decoding."""
        sequences = _Sequences(self.num_sequences, num_tokens)
        sampler = SimpleNamespace(do_sample=False, coupling=lambda *_: None)
        draft = SimpleNamespace(device=torch.device("cpu"))
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(automatic, "known_costs", lambda *_: self.costs)
        monkeypatch.setattr(automatic, "experience_of", lambda *_: self.experience)
        monkeypatch.setattr(automatic, "Texts", lambda *_: None)
        settings = TreeSettings("auto", self.top_k, depth, num_nodes or (depth if self.top_k == 1 else 63))
        policy = automatic.AutomaticTrees(settings, None, draft, sequences, sampler)
        start, self.num_carried = self.now, 0
        self.unread = [1]
        while active := sequences.active:
            self.num_active = len(active)
            left = sequences.end - min(sequences.lengths)
            limits = Limits(0 if self.num_carried >= MAX_CARRIED else left - 1, 99, self.num_carried)
            proposal = policy.propose(self, sequences, limits)
            num_nodes = proposal.tree.num_nodes
            seconds = self.forward_seconds(self.num_carried + len(active) * num_nodes)
            self.sizes.append((self.num_carried, num_nodes))
            self.now += seconds + (self.round_seconds if num_nodes > 1 else 0.0)
            rows = zip(proposal.tree.token_ids.tolist(), proposal.tree.parents.tolist(), active, strict=True)
            kept = [_accepted(*row)[: sequences.end - sequences.lengths[index]] for *row, index in rows]
            if self.is_recurrent:
                self.num_carried = 0 if len(kept[0]) == num_nodes else self.num_carried + len(kept[0])
            self.unread.append(max(map(len, kept)))
            for index, nodes in zip(active, kept, strict=True):
                sequences.lengths[index] += len(nodes)
            policy.learn(proposal, kept, Verified(None, [], [], seconds))
        return num_tokens * self.forward_seconds(self.num_sequences) / (self.now - start)


def _accepted(token_ids: list[int], parents: list[int]) -> list[int]:
    """Nodes of a tree on the path of right tokens, the root first."""
    path = [0]
    for node in range(1, len(token_ids)):
        if token_ids[node] == RIGHT and parents[node] == path[-1]:
            path.append(node)
    return path
