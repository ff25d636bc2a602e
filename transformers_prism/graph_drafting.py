"""The draft phase of a round as one CUDA graph: step 0 over what was committed, all later steps, the choice of nodes.

A graph repeats its launches on the same addresses and shapes. So nothing of the phase depends on how far the text is:

    keys and values   C positions, in which each row is dense from the left; behind them R positions of the round's own,
                      which step 0 and the tree use in turn
    committed         [B, C]: what takes part in attention
    inputs            A positions, A - 1 the deepest tree's steps; how many of them are real; how long each row is

The first round of a kind runs call by call, which makes whatever is made once. The second is captured, all others are
replayed. A kind is A and the tree's settings. Everything is captured anew where rows leave the batch, where the text
outgrows C, and in every generate() call, since weights may have moved in between.
Shape letters: B rows, A positions that step 0 reads, L fused target layers, D draft hidden size.
Source: CUDA graphs as in torch.cuda.graph.
"""

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from .cache import ReservedCache, round_up
from .drafting import Drafter
from .tree import Tree

# Capacities, rooms and long readings come in multiples of these, so that few different ones are met.
_CAPACITY_STEP, _ROOM_STEP = 256, 64


class _Inputs(NamedTuple):
    """What a round reads, at addresses that stay."""

    token_ids: torch.Tensor  # [B, A]
    target_hidden: torch.Tensor  # [B, A, L * target_hidden_size]
    position_ids: torch.Tensor  # [B, A]
    counts: torch.Tensor  # [2, B], positions that are real, and lengths of the rows before them


def capture_graph(phase: Callable, device: torch.device) -> Callable:
    """Capture the launches of a function without arguments, which are not run; not yet tried on a GPU.

    Returns:
        `Callable`: runs them, and returns what the function returned, with the new values.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = phase()

    def replay():
        graph.replay()
        return outputs

    return replay


class GraphDrafter(Drafter):
    """A [`Drafter`] that reads and grows in one graph; the prompt, and the tree behind it, are drafted call by call. Only
    the first prompt's tokens join the draft vocabulary.

    Args:
        draft (`PrismDraftModel`): bound to its target.
        capture (`Callable`): makes a captured function of a function and a device, as [`capture_graph`].
    """

    def __init__(self, draft, capture: Callable = capture_graph):
        super().__init__(draft)
        self.capture = capture
        self.reserved: ReservedCache | None = None  # the same as `cache` from the second round on
        self.deepest = 0
        self.unread: tuple | None = None  # arguments of `prefill`, until a tree grows
        self.inputs: dict[int, _Inputs] = {}  # by A
        self.kinds: dict[tuple, Callable | None] = {}  # None: has run once

    def prefill(self, token_ids, target_hidden, position_ids, num_new: list[int], padding_mask=None) -> None:
        """Step 0, of which only the first is run at once; the arguments are those of [`Drafter.prefill`]."""
        if self.cache is None:
            super().prefill(token_ids, target_hidden, position_ids, num_new, padding_mask)
            return
        self._read_unread()
        self.unread = (token_ids, target_hidden, position_ids, num_new)

    def grow(self, settings, coupling=None) -> Tree:
        """Read what there is to read and draw a tree; the arguments are those of [`Drafter.grow`].

        The tree's tensors hold it until the next one grows. A graph reads no random numbers, so that `coupling` changes
        nothing.
        """
        self.deepest = max(self.deepest, settings.depth)
        if self.unread is None:
            return super().grow(settings)
        inputs = self._fill_inputs(settings.top_k * max(settings.depth - 1, 0))
        kind = (inputs.token_ids.shape[1], settings)
        run = functools.partial(self._phase, inputs, settings)
        if kind not in self.kinds:
            self.kinds[kind] = None
        else:
            self.kinds[kind] = run = self.kinds[kind] or self._captured(run)
        tree, self.last_hidden, self.last_position, self.root_ids = run()
        return tree

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with these rows of the batch only."""
        self._read_unread()
        super().keep_rows(rows)
        self._forget_kinds()

    def _phase(self, inputs: _Inputs, settings) -> tuple:
        """A round's drafting on tensors that stay where they are; reads nothing back and brings nothing over."""
        self._read(inputs)
        tree = super().grow(settings)
        return tree, self.last_hidden, self.last_position, self.root_ids

    def _read_unread(self) -> None:
        """Read what no tree has grown from."""
        if self.unread is not None:
            self._read(self._fill_inputs(0))

    def _read(self, inputs: _Inputs) -> None:
        num_new, lengths = inputs.counts
        output = self._read_later(inputs.token_ids, inputs.target_hidden, inputs.position_ids)
        self.reserved.commit_first(num_new, lengths, inputs.token_ids.shape[1])
        self._remember_last(inputs.token_ids, output, inputs.position_ids, num_new)

    def _captured(self, phase: Callable) -> Callable:
        try:
            return self.capture(phase, self.draft.device)
        except RuntimeError as error:
            warnings.warn(f"tree_cuda_graph: drafting without a graph, since capturing failed: {error}", stacklevel=2)
            self.reserved.forget_appended()
            return phase

    def _fill_inputs(self, num_tree_keys: int) -> _Inputs:
        """Take what is unread into tensors that stay, and make room for it and for a tree of so many keys."""
        token_ids, target_hidden, position_ids, num_new = self.unread
        self.unread = None
        num_rows, length = token_ids.shape
        num_positions = self.deepest + 1 if length <= self.deepest + 1 else round_up(length, _ROOM_STEP)
        lengths = self.cache.lengths
        longer = [before + count for before, count in zip(lengths, num_new, strict=True)]
        self._reserve(max(longer), max(num_positions, num_tree_keys))
        self.cache.lengths = longer
        if num_positions not in self.inputs:
            shape, device = (num_rows, num_positions), self.draft.device
            self.inputs[num_positions] = _Inputs(
                torch.zeros(shape, dtype=torch.long, device=device),
                torch.zeros((*shape, target_hidden.shape[2]), dtype=target_hidden.dtype, device=device),
                torch.zeros(shape, dtype=torch.long, device=device),
                torch.zeros((2, num_rows), dtype=torch.long, device=device),
            )
        inputs = self.inputs[num_positions]
        inputs.token_ids[:, :length].copy_(token_ids)
        inputs.target_hidden[:, :length].copy_(target_hidden)
        inputs.position_ids[:, :length].copy_(position_ids)
        inputs.counts.copy_(torch.tensor([num_new, lengths]))
        return inputs

    def _reserve(self, longest: int, num_appended: int) -> None:
        """Give rows up to this length, and so many keys behind them, their place."""
        capacity, room = 0, 0
        if self.reserved is not None:
            capacity, room = self.reserved.width, self.reserved.room
            if longest <= capacity and num_appended <= room:
                return
        if longest > capacity:
            capacity = round_up(max(longest, capacity + capacity // 2), _CAPACITY_STEP)
        self.cache = self.reserved = ReservedCache(
            self.cache, capacity, max(room, round_up(num_appended, _ROOM_STEP))
        )
        self._forget_kinds()

    def _forget_kinds(self) -> None:
        self.inputs.clear()
        self.kinds.clear()
