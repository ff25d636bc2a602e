"""A target that verifies trees for a batch, on layers lent to its cache while the loop runs.

It serves every cache whose layers can be lent (full and sliding attention, dynamic or static). Where the cache is static or
the target is compiled, no shape changes from round to round: the layers are static, masks as wide as they are, trees padded
to one of a few sizes, and sequences that have ended stay.
Shape letters: B sequences that still decode, P committed positions, N tree nodes.
"""

import sys

import torch
from torch.nn.functional import pad
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ..kernels.grow_tree import ancestor_bits
from ..kernels.tree_attention import unpack_ancestors
from ..transformers_names import (
    CACHE_KEYWORD,
    CACHE_NAMES,
    attention_name,
    cache_argument,
    compiled_forward,
    is_callers_cache,
)
from .attention import PRISM_TREE, attach_starts, attach_tail, attach_tree
from .cache import AdoptedLayers, CommittedCache, round_up, stored_length
from .layer_check import input_device
from .memory import keep_with, kept_with
from .round_check import is_tried
from .target_side import TargetSide
from .target_support import (
    LOSES_TEXT,
    SEES_PADDING,
    inputs_of_next_step,
    layer_windows,
    reads_whole_text,
    states_to_ask_for,
)
from .transfer import on_device
from .tree import Tree, ancestor_mask, attention_mask, chain_tree, root_tree, visible_keys, within_window
from .uneven_prompts import groups_of_like_length, side_by_side

# Sizes, root included, to which a target of static shapes pads its trees; larger ones are multiples of the last.
_STATIC_SIZES = (1, 8, 16, 32, 64)
_CAPACITY_STEP = 256
# Positions for which static layers may be allocated in any case, and those where a model names no limit.
_FEWEST_POSITIONS, _MOST_POSITIONS = 2**12, 2**17
# Holes that a cache may have: with more, attention costs more; with fewer, they are closed more often.
_MAX_HOLES = 32
# Inputs of a prompt of text alone.
_OF_TEXT = {"attention_mask", "position_ids"}


class TreeTarget(TargetSide):
    """Verifies trees; arguments as for [`TargetSide`]."""

    leaves_image_layers = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.capacity = self._static_capacity(len(self.sequences))  # None: layers and masks grow
        self.keeps_finished = self.keeps_finished or self.capacity is not None
        # Lent layers may have more positions than the caller's own, which plain decoding has to continue with.
        is_callers = is_callers_cache(self.cache)
        self.callers_capacity = min(self._static_lengths(), default=sys.maxsize) if is_callers else sys.maxsize
        config = self.target.config.get_text_config()
        self.windows = layer_windows(config)
        self.attn_implementation = attention_name(self.target.config)
        # Static layers have no room for holes, and the kernel uses a key's place in the cache as its index in a window.
        has_window = any(window is not None for window in self.windows.values())
        is_dense = self.capacity is not None or (has_window and self.attn_implementation == PRISM_TREE)
        self.adopted = AdoptedLayers(self.cache, self.capacity, self.image_layers)
        nothing = torch.zeros((len(self.sequences), 0), dtype=torch.bool, device="cpu")
        self.committed = CommittedCache(self.cache, nothing, 0 if is_dense else _MAX_HOLES)

    def _static_lengths(self) -> list[int]:
        """Positions of the static layers that hold the whole text."""
        layers = enumerate(self.cache.layers)
        return [one.max_cache_len for index, one in layers if type(one) is StaticLayer and index not in self.image_layers]

    def _static_capacity(self, num_sequences: int) -> int | None:
        """Positions of static layers, those of the caller's own if they can be used as they are; None if layers grow."""
        is_static = type(self.cache) is StaticCache
        if not is_static and not is_compiled(self.target):
            return None
        whole = self._static_lengths()
        # Where the last sequence ends, others may still need room beyond it; a single sequence does not.
        if is_static and self.returns_cache and num_sequences == 1 and whole:
            return min(whole)
        length = max(self.generation_config.max_length + int(self.cache.get_seq_length()), *whole, 0)
        if not is_static and length > most_positions(self.target.config.get_text_config()):
            return None  # a limit that no text reaches: layers grow, as in plain decoding
        wanted = round_up(length + _STATIC_SIZES[-1], _CAPACITY_STEP)
        # It only grows, so that calls share what is compiled.
        capacity = max(wanted, kept_with(self.target, "capacity", int))
        keep_with(self.target, "capacity", capacity)
        return capacity

    @property
    def max_nodes(self) -> int:
        """Drafted nodes that the next tree may have: without static layers any number.

        Raises:
            ValueError: if a caller's static cache is full.
        """
        if self.capacity is None:
            return sys.maxsize
        if self.capacity <= self.committed.width:
            raise _full(self.capacity)
        return _static_size_within(self.capacity - self.committed.width) - 1

    def _before_prefill(self) -> None:
        """Lend the cache layers whose sequences can be moved."""
        if self.capacity is not None:
            _prepare_compiled(self.target, self.layer_ids)
        self.adopted.lend()

    def _read_prompts(self, input_ids: torch.LongTensor) -> tuple[list[list[int]], list]:
        given = {name: value for name, value in self.model_kwargs.items() if isinstance(value, torch.Tensor)}
        is_text = given.keys() <= _OF_TEXT and all(value.shape == input_ids.shape for value in given.values())
        # Read as in plain decoding if others may continue with the cache, or if frequencies depend on the longest text.
        is_own = is_text and not (self.keeps_finished or self.rotary_switches or stored_length(self.cache))
        is_whole = given.get("attention_mask") is None or self.generation_config.prefill_chunk_size is not None
        # Last, since it looks at every module.
        if is_whole or not is_own or self.target.config.model_type in SEES_PADDING or not is_tried(self.target):
            return super()._read_prompts(input_ids)
        rows, outputs, caches = [], [], []
        for of_group, start in groups_of_like_length(given.get("attention_mask")):
            self.adopted.lend()
            parts = {name: value[of_group, start:] for name, value in given.items()}
            rows.append(of_group)
            outputs.append(self._read_together(input_ids[of_group, start:], **parts))
            caches.append(self.cache.layers)
        if not rows:
            return super()._read_prompts(input_ids)
        self.cache.layers = side_by_side(rows, caches, input_ids.shape[1])
        return rows, outputs

    def _after_prefill(self, mask: torch.Tensor) -> None:
        """Note what is committed in each sequence, and which forward runs from here on."""
        self.committed = CommittedCache(self.cache, mask, self.committed.max_holes)
        self.model_forward = compiled_forward(self.target, self.model_kwargs, self.generation_config) or self.target

    def _verify(self, tree: Tree):
        if self.has_given_up and (step := self._plain_step(tree)) is not None:
            return step
        if any(switch.length == self.next_position[0] for switch in self.rotary_switches) and self.can_read_anew:
            self.committed.close_holes()  # the model asks the cache how long it is
            ids = self.sequences.ids[:, : self.sequences.lengths[0]]
            inputs = inputs_of_next_step(self.target, ids, self._kwargs_so_far())
            if reads_whole_text(inputs):
                return self._read_anew(inputs)
        num_nodes = tree.num_nodes
        if self.capacity is not None:
            tree = _padded(tree, static_size(num_nodes))
        device = self.committed.committed.device
        depths = on_device(tree.depths, device)
        # Sequences near their end cannot use the deepest nodes; the target may not even have positions for them.
        limits = [max(ends) for ends in zip(self.next_position, self.position_limit, strict=True)]
        first, limit = on_device([self.next_position, limits], device)[..., None]  # [B, 1] each
        position_ids = (first + depths).minimum(limit)
        logits, states = self._forward(tree, self._masks(tree, depths), position_ids)
        return logits[:, :num_nodes], states

    def _masks(self, tree: Tree, depths: torch.Tensor):
        """The nodes' mask as the target's forward takes it, or a dict with one mask for each kind of layer."""
        committed = self.committed.committed
        parents = on_device(tree.parents, committed.device)
        takes_bits = self.attn_implementation == PRISM_TREE and self.capacity is None
        bits = ancestor_bits(parents) if takes_bits else None
        ancestors = ancestor_mask(parents) if bits is None else unpack_ancestors(bits, tree.num_nodes)
        visible = visible_keys(committed, ancestors)  # [B, N, P + N]
        masks = {}
        for kind, window in self.windows.items():
            seen, node_index = visible, None
            if window is not None:
                # A window counts positions of the text, so holes and nodes off the path do not use it up.
                lengths = on_device(self.committed.lengths, committed.device)[:, None]
                node_index = lengths + depths
                places = torch.cat((self.committed.places(), node_index), dim=1)
                seen = visible & within_window(node_index, places, window)
            if self.capacity is not None:
                seen = pad(seen, (0, self.capacity - seen.shape[2]))
            masks[kind] = attention_mask(seen, self.attn_implementation, self.target.dtype)
            if self.capacity is None:
                attach_starts(masks[kind], self.committed.starts)
            if len(committed) == 1 and committed.device.type == "cpu" and masks[kind].dtype is torch.bool:
                attach_tail(masks[kind], self.committed, depths)
            if bits is not None:
                masks[kind] = attach_tree(masks[kind], bits, committed, node_index, window)
        return masks[None] if None in masks else masks

    @property
    def can_read_anew(self) -> bool:
        """Whether the cache can be filled with the whole text again: if it grows, has one sequence and is not the caller's."""
        is_own = self.capacity is None and len(self.next_position) == 1 and not is_callers_cache(self.cache)
        return is_own and self.target.config.get_text_config().model_type not in LOSES_TEXT

    def _fill_cache(self, made) -> None:
        if made is not None and made is not self.cache and hasattr(made, "layers"):
            self.adopted.fill(made)

    def _kwargs_so_far(self) -> dict:
        """The keyword arguments that generate() would have for the next step."""
        so_far = {name: value for name, value in self.model_kwargs.items() if name not in CACHE_NAMES}
        position_ids = so_far.get("position_ids")
        if self.is_padded:
            so_far["attention_mask"] = self._mask_over(self.sequences.lengths[0])
        if position_ids is not None:
            num_new = self.sequences.lengths[0] - self.sequences.prompt_length
            following = position_ids[..., -1:] + torch.arange(1, num_new + 1, device=position_ids.device)
            so_far["position_ids"] = torch.cat((position_ids, following), dim=-1)
        return {**so_far, CACHE_KEYWORD: self.cache}

    def _read_anew(self, inputs: dict):
        """Read the whole text, the root last, into the cache again, as plain decoding does at some rotary switches."""
        self.committed.forget_all()
        own = {**cache_argument(self.target, self.cache), "output_hidden_states": self.asked_states, "return_dict": True}
        outputs = self.target(**{**inputs, **own})
        assert int(self.cache.get_seq_length()) == self.committed.width + 1, "the text is what was committed, and the root"
        return outputs.logits[:, -1:], [state[:, -1:] for state in self._states(outputs)]

    def forget_appended(self) -> None:
        """Drop the keys and values of nodes that are not committed."""
        self.committed.forget_appended()

    def _plain_step(self, tree: Tree):
        """[`_verify`] with the inputs of plain decoding; None where sequences differ in length or shapes are static."""
        if min(self.committed.lengths) != self.committed.width or self.capacity is not None:
            return None
        mask = pad(self.committed.committed, (0, 1), value=True).long() if self.is_padded else None
        with self.adopted.rolling_windows():
            return self._forward(tree, mask, torch.tensor(self.next_position, device="cpu")[:, None])

    def plain_steps(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Logits `(B, A, V)` of single steps over tokens `(B, A)` after the committed ones; these tokens are not committed.

        Sequences of one length get the inputs of plain decoding, so that our masks play no part.
        """
        self.committed.close_holes()
        state, position = vars(self.committed).copy(), self.next_position
        steps = []
        for token in token_ids.split(1, dim=1):
            root = root_tree(token[:, 0])
            # A copy: the next run of a CUDA graph overwrites what this one returned.
            steps.append((self._plain_step(root) or self.verify(root))[0].clone())
            self.commit([[0]] * len(position))
        vars(self.committed).update(state)
        self.next_position = position
        self.forget_appended()
        return torch.cat(steps, dim=1)

    def commit(self, kept: list[list[int]]) -> None:
        """Keep the keys and values of these nodes.

        Raises:
            ValueError: if a caller's static cache has no room for them.
        """
        lengths = [length + len(nodes) for length, nodes in zip(self.committed.lengths, kept, strict=True) if nodes]
        if max(lengths, default=0) > self.callers_capacity:
            raise _full(self.callers_capacity)
        self.committed.commit(kept)
        super().commit(kept)

    def keep_sequences(self, places: list[int]) -> None:
        """Keep only the sequences at these places of the batch."""
        self.committed.keep_sequences(places)
        super().keep_sequences(places)

    def finish(self, sequences: torch.Tensor) -> None:
        """Give the cache its own layers back, holding what plain decoding would have left in them."""
        if not self.returns_cache:
            self.abandon()
            return
        self._even_out(sequences)
        self.adopted.put_back()

    def _even_out(self, sequences: torch.Tensor) -> None:
        """Bring all sequences to the length at which plain decoding stops; it runs padding through those that have ended."""
        self.committed.close_holes()
        self.committed.max_holes = 0
        goal = sequences.shape[1] - 1 + self.num_cached_before
        while max(missing := [goal - length for length in self.committed.lengths]) > 0:
            longest = 1 if self.has_given_up else min(max(missing), self.max_nodes + 1)
            missing = [min(count, longest) for count in missing]
            token_ids = sequences.new_zeros((len(missing), longest))
            for row, (count, length) in enumerate(zip(missing, self.committed.lengths, strict=True)):
                if count > 0:
                    start = length - self.num_cached_before
                    token_ids[row, :count] = sequences[row, start : start + count]
            self.position_limit = [position + longest for position in self.next_position]
            self.verify(chain_tree(token_ids))
            self.commit([list(range(max(count, 0))) for count in missing])
        self.committed.set_length(goal)


def most_positions(config) -> int:
    """Positions up to which static layers are allocated for a model of this configuration."""
    return max(getattr(config, "max_position_embeddings", None) or _MOST_POSITIONS, _FEWEST_POSITIONS)


def is_compiled(target) -> bool:
    """Whether torch.compile was applied to the target's forward or to one of its modules."""
    return any(
        module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in target.modules()
    )


def _prepare_compiled(target, layer_ids: list[int]) -> None:
    """Run a compiled target once uncompiled, for hidden states: the first such forward installs hooks, which breaks a graph."""
    if not is_compiled(target):
        return

    def run() -> bool:
        token = torch.zeros((1, 1), dtype=torch.long, device=input_device(target))
        with torch.compiler.set_stance("force_eager"):
            target(token, use_cache=False, output_hidden_states=states_to_ask_for(layer_ids, target.config))
        return True

    kept_with(target, "returns hidden states", run)


def _full(capacity: int) -> ValueError:
    return ValueError(
        f"past_key_values: expected a static cache with room for the next token, got one of {capacity} positions that is full"
    )


def static_size(num_nodes: int) -> int:
    """The size that a tree of `num_nodes` nodes, root included, is padded to."""
    return next((size for size in _STATIC_SIZES if size >= num_nodes), round_up(num_nodes, _STATIC_SIZES[-1]))


def _static_size_within(room: int) -> int:
    """The largest of these sizes that is at most `room`, 1 or more."""
    largest = _STATIC_SIZES[-1]
    return max(size for size in (*_STATIC_SIZES, room // largest * largest) if size <= room)


def _padded(tree: Tree, num_nodes: int) -> Tree:
    """The tree padded to `num_nodes` nodes by children of the root, whose outputs are dropped."""
    extra = (0, num_nodes - tree.num_nodes)
    return Tree(
        pad(tree.token_ids, extra),
        pad(tree.parents, extra),
        pad(tree.depths, extra, value=1),
        pad(tree.log_probs, extra),
    )
