"""Trees of the same size in every round, and rounds without trees."""

from ..decoding.draft_side import DraftSide
from ..decoding.round_values import Limits, Proposal, Verified, plain_step
from ..decoding.sampler import Sampler
from ..decoding.sequences import Sequences
from .settings import TreeSettings


class PlainSteps:
    """Proposes no trees: for a target whose trees turned out to differ from single steps."""

    def propose(self, draft_side: DraftSide, sequences: Sequences, limits: Limits) -> Proposal:
        """The last token of each sequence."""
        return plain_step(sequences.last_tokens())

    def learn(self, proposal: Proposal, kept: list[list[int]], verified: Verified) -> Proposal:
        """Learn nothing; returns the proposal."""
        return proposal

    def estimates(self) -> None:
        """None are made."""

    def text(self) -> None:
        """None is indexed."""


class FixedTrees(PlainSteps):
    """Proposes trees of the same settings in every round."""

    def __init__(self, settings: TreeSettings, sampler: Sampler):
        self.settings, self.sampler = settings, sampler

    def propose(self, draft_side: DraftSide, sequences: Sequences, limits: Limits) -> Proposal:
        """The tree of the next round."""
        settings = self.settings.clipped(limits.depth, limits.nodes)
        drafter = draft_side.read()
        tree = drafter.grow(settings, self.sampler.coupling(sequences, settings.depth))
        return Proposal(tree, settings.depth, settings.depth)
