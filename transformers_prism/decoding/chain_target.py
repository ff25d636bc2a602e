"""A target that verifies a chain for one sequence on its own cache, which is rolled back to what was accepted.

A chain needs neither a mask nor positions of its own, so this also serves convolution layers and attention implementations
that take no tree mask.
"""

import torch

from .target_side import TargetSide
from .target_support import Declined
from .tree import Tree, chain_tree, root_tree


class ChainTarget(TargetSide):
    """Verifies chains; arguments as for [`TargetSide`]."""

    kind = "chain"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_committed = 0  # tokens in the cache that stay
        self.widths: list[int] = []  # inputs that each layer's convolutions hold at that length
        # Layers that recorded past positions before the call; they go on doing so after it.
        self.recording = [layer for layer in self.cache.layers if getattr(layer, "record_past", False)]

    def _after_prefill(self, mask: torch.Tensor) -> None:
        """Let layers that drop old positions keep enough of them to be rolled back."""
        if not self.cache.is_croppable:
            raise Declined(f"{type(self.target).__name__} keeps recurrent states, which cannot be rolled back")
        self.cache.activate_past_recording()
        self.num_committed = int(self.cache.get_seq_length())
        self._note_widths()

    def _note_widths(self) -> None:
        """Note how many inputs the convolutions hold, which do not say how long their text is."""
        self.widths = [_width(layer) for layer in self.cache.layers]

    def _verify(self, tree: Tree):
        if self.skipped_token is not None:
            # What follows it in one forward would get other positions than in single steps.
            token_ids = tree.token_ids[0].tolist()
            if self.skipped_token in token_ids:
                tree = chain_tree(tree.token_ids[:, : token_ids.index(self.skipped_token) + 1])
        mask = self._mask_over(self.num_committed + tree.num_nodes)
        return self._forward(tree, mask, self.next_position[0] + torch.arange(tree.num_nodes, device="cpu")[None])

    def forget_appended(self) -> None:
        """Drop what was appended since the last commit."""
        for layer, width in zip(self.cache.layers, self.widths, strict=True):
            # A forward that failed may have reached only some of the layers.
            has_length = hasattr(layer, "get_seq_length")
            num_appended = int(layer.get_seq_length()) - self.num_committed if has_length else _width(layer) - width
            if num_appended > 0:
                layer.crop(-num_appended)

    def plain_steps(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Logits `(1, A, V)` of single steps over tokens `(1, A)` after the committed ones; these tokens are not committed."""
        before, steps = (self.num_committed, self.next_position), []
        for token in token_ids.split(1, dim=1):
            steps.append(self.verify(root_tree(token[:, 0])).logits)
            # Not a commit, which would let layers drop what the rollback below needs.
            self.num_committed, self.next_position = self.num_committed + 1, [self.next_position[0] + 1]
        self.num_committed, self.next_position = before
        self.cache.crop(-token_ids.shape[1])
        self._note_widths()
        return torch.cat(steps, dim=1)

    def commit(self, kept: list[list[int]]) -> None:
        """Roll back what was not accepted; layers also forget here what they no longer need."""
        num_appended = int(self.cache.get_seq_length()) - self.num_committed
        self.cache.crop(len(kept[0]) - num_appended)
        self.num_committed += len(kept[0])
        self._note_widths()
        super().commit(kept)

    def finish(self, sequences: torch.Tensor) -> None:
        """Let the cache drop old positions again, as in plain decoding."""
        for layer in self.cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = any(layer is one for one in self.recording)


def _width(layer) -> int:
    """Inputs that a layer's convolutions hold; 0 if it has none."""
    states = getattr(layer, "conv_states", None) or {}
    return max((state.shape[-1] for state in states.values() if state is not None), default=0)
