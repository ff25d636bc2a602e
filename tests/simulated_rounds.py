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


class _OneSequence:
    """What a policy asks of the sequences of a call."""

    active = (0,)

    def __init__(self):
        self.lengths = [0]

    def __len__(self) -> int:
        return 1

    def is_done(self, index: int) -> bool:
        """It goes on."""
        return False

    def last_tokens(self) -> list[int]:
        """The last token."""
        return [RIGHT]


class SimulatedRounds:
    """Calls of a recurrent target with one sequence, whose experience is kept from call to call.

    Args:
        forward_seconds (`Callable[[int], float]`): of a target forward over that many tokens.
        step_seconds (`float`): of a draft step; reading a position costs a fiftieth of it.
        acceptance (`float`): probability that a drafted token is right if those before it are.
        said (`float`, *optional*): what the draft says that probability is; by default the truth.
        believed_seconds (`Callable`, *optional*): what was measured of forwards; by default the truth.
        round_seconds (`float`): that a round takes outside its forward if it has a tree.
    """

    def __init__(
        self, forward_seconds, step_seconds, acceptance, said=None, believed_seconds=None, round_seconds=0.0, seed=0
    ):
        self.forward_seconds, self.step_seconds, self.acceptance = forward_seconds, step_seconds, acceptance
        self.said, self.round_seconds = said or acceptance, round_seconds
        believed = [(believed_seconds or forward_seconds)(count) for count in MEASURED_TOKENS]
        self.costs = RoundCosts(list(MEASURED_TOKENS), believed, max(step_seconds, 1e-6))
        self.experience = Experience()
        self.random = random.Random(seed)
        self.now, self.num_carried = 0.0, 0
        self.unread: list[int] = []  # tokens of rounds that the draft has yet to read
        self.sizes: list[tuple[int, int]] = []  # carried tokens and nodes of each round

    def read(self):
        """As a draft's side: read what was committed; returns itself, to draw a chain."""
        self.now += self.step_seconds * (1 + 0.02 * sum(self.unread))
        self.unread.clear()
        return self

    @property
    def is_behind(self) -> bool:
        """Whether rounds went by without the draft."""
        return len(self.unread) > 1

    def draw(self, top_k, depth, choose_width=None, coupling=None) -> CandidatePool:
        """As a drafter: a chain, step by step."""
        steps: list = []
        for step in range(depth):
            token = RIGHT if self.random.random() < self.acceptance else WRONG
            log_prob = torch.tensor([[self.said]]).log() * (step + 1)
            if step and choose_width is not None and not choose_width(steps[-1][2][:, None]):
                break
            self.now += self.step_seconds if step else 0.0
            steps.append((torch.tensor([[token]]), torch.full((1, 1), step - 1), log_prob))
        return CandidatePool(steps)

    def call(self, monkeypatch, num_tokens: int, depth: int = 8) -> float:
        """Emit `num_tokens`; returns its speed over that of plain decoding."""
        sequences = _OneSequence()
        sampler = SimpleNamespace(do_sample=False, coupling=lambda *_: None)
        draft = SimpleNamespace(device=torch.device("cpu"))
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(automatic, "known_costs", lambda *_: self.costs)
        monkeypatch.setattr(automatic, "experience_of", lambda *_: self.experience)
        monkeypatch.setattr(automatic, "Texts", lambda *_: None)
        policy = automatic.AutomaticTrees(TreeSettings("auto", 1, depth, depth), None, draft, sequences, sampler)
        start, self.num_carried = self.now, 0
        self.unread = [1]
        while sequences.lengths[0] < num_tokens:
            left = num_tokens - sequences.lengths[0]
            limits = Limits(0 if self.num_carried >= MAX_CARRIED else left - 1, 99, self.num_carried)
            proposal = policy.propose(self, sequences, limits)
            tokens = proposal.tree.token_ids[0].tolist()
            seconds = self.forward_seconds(self.num_carried + len(tokens))
            self.sizes.append((self.num_carried, len(tokens)))
            self.now += seconds + (self.round_seconds if len(tokens) > 1 else 0.0)
            num_kept = ([*tokens[1:], WRONG].index(WRONG) + 1)
            self.num_carried = 0 if num_kept == len(tokens) else self.num_carried + num_kept
            self.unread.append(num_kept)
            sequences.lengths[0] += num_kept
            policy.learn(proposal, [list(range(num_kept))], Verified(None, [], [], seconds))
        return num_tokens * self.forward_seconds(1) / (self.now - start)
