"""The target's half of a round: prefill, verification of a tree in one forward, and committing the accepted path.

`TreeTarget` serves every cache whose layers can be lent (full and sliding attention, dynamic or static) for any batch.
Where the cache is static or the target is compiled, no shape changes from round to round: the layers are static, masks
as wide as they are, trees padded to one of a few sizes, and finished rows stay.
`ChainTarget` keeps the target's own cache and rolls it back: for one row and a chain it needs neither masks nor
positions, so it also serves convolution layers and attention implementations that take no tree mask.
Shape letters: B rows that still decode, T prompt positions, N tree nodes, L fused target layers.
"""

import inspect
import math
import sys
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.nn.functional import pad
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from ..kernels.grow_tree import ancestor_bits
from ..kernels.tree_attention import unpack_ancestors
from ..layer_check import input_device
from ..transformers_names import (
    CACHE_KEYWORD,
    CACHE_NAMES,
    attention_name,
    cache_argument,
    cache_of,
    compiled_forward,
    is_callers_cache,
    prefill,
    takes_logits_to_keep,
)
from .attention import PRISM_TREE, attach_tree
from .cache import AdoptedLayers, CacheSnapshot, CommittedCache, round_up
from .round_check import is_tried
from .target_support import (
    LOSES_TEXT,
    Declined,
    hidden_state,
    inputs_of_next_step,
    layer_windows,
    position_offset,
    reads_whole_text,
    reason_against_batch_positions,
    reason_against_inputs,
    reason_against_masks,
    reason_against_switch,
    reason_against_untried_chat,
    rotary_switches,
    why_no_chain,
    why_no_tree,
)
from .tree import Tree, ancestor_mask, attention_mask, root_tree, visible_keys, within_window

# Nodes, with the root, of the trees that a target of static shapes verifies; larger ones are multiples of the last.
_STATIC_SIZES = (1, 8, 16, 32, 64)
_CAPACITY_STEP = 256
# Positions of a batch's cache that may be left out: more cost attention, fewer are closed more often.
_MAX_HOLES = 32
# Positions of the layers lent to each target of static shapes: they only grow, so that calls share what is compiled.
_capacities: WeakKeyDictionary = WeakKeyDictionary()
_prepared: WeakSet = WeakSet()
# What generate() prepares and a verification forward replaces.
_REPLACED_INPUTS = (
    *CACHE_NAMES,
    *"attention_mask cache_position input_ids inputs_embeds logits_to_keep output_attentions".split(),
    *"output_hidden_states position_ids return_dict use_cache".split(),
)


class NewPositions(NamedTuple):
    """Positions that the draft has to read: see `Drafter.prefill`, whose arguments these are but for the last."""

    token_ids: torch.Tensor  # [B, A], on the host
    target_hidden: torch.Tensor  # [B, A, L * target_hidden_size]
    position_ids: torch.Tensor  # [B, A], on the host
    num_new: list[int]
    padding_mask: torch.Tensor | None = None  # [B, A]
    is_prompt: bool = False

    def select(self, rows: list[int]) -> "NewPositions":
        """These rows of the batch."""
        padding_mask = None if self.padding_mask is None else self.padding_mask[rows]
        num_new = [self.num_new[row] for row in rows]
        states = (self.token_ids[rows], self.target_hidden[rows], self.position_ids[rows])
        return NewPositions(*states, num_new, padding_mask, self.is_prompt)


def read_all(drafter, unread: list[NewPositions]) -> None:
    """Let the draft read everything that was committed since it read last, and empty the list."""
    while unread:
        if unread[0].is_prompt:
            drafter.prefill(*unread.pop(0)[:-1])
            continue
        drafter.prefill(*_joined(unread)[:-1])
        unread.clear()


def _joined(parts: list[NewPositions]) -> NewPositions:
    """Positions of several rounds as one, in order."""
    if len(parts) == 1:
        return parts[0]
    token_ids = torch.cat([part.token_ids for part in parts], dim=1)
    target_hidden = torch.cat([part.target_hidden for part in parts], dim=1)
    position_ids = torch.cat([part.position_ids for part in parts], dim=1)
    widths = [part.token_ids.shape[1] for part in parts]
    starts = [sum(widths[:index]) for index in range(len(widths))]
    real = [
        [start + offset for start, part in zip(starts, parts, strict=True) for offset in range(part.num_new[row])]
        for row in range(token_ids.shape[0])
    ]
    num_new = [len(indices) for indices in real]
    longest = max(num_new)
    index = torch.tensor([indices + [0] * (longest - len(indices)) for indices in real])  # [B, longest]
    states = index[..., None].expand(-1, -1, target_hidden.shape[-1]).to(target_hidden.device)
    return NewPositions(
        token_ids.gather(1, index),
        target_hidden.gather(1, states),
        position_ids.gather(1, index),
        num_new,
    )


def _fused(states: list[torch.Tensor]) -> torch.Tensor:
    """A copy of the states of several layers side by side, `(B, T, L * target_hidden_size)`."""
    return torch.cat([state.to(states[0].device) for state in states], dim=-1)


def _num_learned_positions(target) -> int | None:
    """How many positions a target without rotary embedding has; None where any position can be computed."""
    text_config = target.config.get_text_config()
    # Sinusoidal tables grow with the text: they have a method for it.
    grows = any(hasattr(module, "make_weights") for module in target.modules())
    is_rotary = getattr(text_config, "rope_parameters", None) is not None
    return None if is_rotary or grows else getattr(text_config, "max_position_embeddings", None)


def is_compiled(target) -> bool:
    """Whether torch.compile was applied to the target's forward or to one of its modules."""
    return any(
        module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in target.modules()
    )


def _prepare_compiled(target, layer_ids: list[int]) -> None:
    """Let a compiled target return hidden states: the first forward that does installs hooks, which breaks a graph."""
    if target in _prepared or not is_compiled(target):
        return
    token = torch.zeros((1, 1), dtype=torch.long, device=input_device(target))
    with torch.compiler.set_stance("force_eager"):
        target(token, use_cache=False, output_hidden_states=layer_ids)
    _prepared.add(target)


def static_size(num_nodes: int) -> int:
    """The size that a tree of so many nodes, root included, is padded to."""
    return next((size for size in _STATIC_SIZES if size >= num_nodes), round_up(num_nodes, _STATIC_SIZES[-1]))


def _static_size_within(room: int) -> int:
    """The largest of these sizes that is at most `room`, 1 or more."""
    largest = _STATIC_SIZES[-1]
    return max(size for size in (*_STATIC_SIZES, room // largest * largest) if size <= room)


class _Target:
    """What both roads share: the prefill, positions, and the states that the draft reads.

    Args:
        target (`PreTrainedModel`): the model to decode.
        layer_ids (`list[int]`): indices into its hidden states, which the draft reads.
        generation_config (`GenerationConfig`), model_kwargs (`dict`): as generate() prepared them.
        inputs (`dict`, *optional*): of a step behind the prompt, as plain decoding makes them.
    """

    def __init__(self, target, layer_ids: list[int], generation_config, model_kwargs: dict, inputs: dict | None = None):
        self.target, self.device = target, input_device(target)
        self.layer_ids = list(layer_ids)
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.cache = cache_of(model_kwargs)
        self.snapshot = CacheSnapshot(self.cache)
        self.num_cached_at_first = int(self.cache.get_seq_length())
        self.returns_cache = generation_config.return_dict_in_generate or is_callers_cache(self.cache)
        self.why_no_tree: str | None = None  # where a chain stands in for trees
        self.has_given_up = False
        self.rotary_switches = rotary_switches(target.config.get_text_config())
        self.keeps_rows = self.returns_cache  # finished rows stay in the batch
        self.model_forward = target
        self.takes_position_ids = "position_ids" in inspect.signature(target.forward).parameters
        # What belongs to the prompt alone, as images do, is not among the inputs of a later step.
        kept = model_kwargs if inputs is None else inputs
        self.forward_kwargs = {key: value for key, value in kept.items() if key not in _REPLACED_INPUTS}
        self.position_offset = position_offset(inputs, model_kwargs)
        if takes_logits_to_keep(target):
            self.forward_kwargs["logits_to_keep"] = 0

    def prefill(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Run the prompt; returns the logits `(B, V)` of its last position.

        Raises:
            ValueError: if the prompt has more tokens than the target has learned positions.
        """
        num_positions = _num_learned_positions(self.target)
        num_tokens = self._most_tokens(input_ids)
        if num_positions is not None and num_tokens > num_positions:
            raise ValueError(
                f"input_ids: expected at most {num_positions} tokens (the target's max_position_embeddings), "
                f"got {num_tokens}"
            )
        self.before_prefill()
        # A copy, since transformers' chunked prefill writes to it.
        model_kwargs = dict(self.model_kwargs, output_hidden_states=self.layer_ids)
        outputs = prefill(self.target, input_ids, self.generation_config, model_kwargs)
        made = cache_of(outputs)
        if not int(self.cache.get_seq_length()):
            self.take_over(made)
        elif made is not None and made is not self.cache:
            raise Declined("the model reads the whole text into another cache than the caller's, as behind a rotary switch")
        width = int(self.cache.get_seq_length())
        if width < input_ids.shape[1] and not self.num_cached_at_first:
            raise Declined(f"{type(self.target).__name__} keeps no cache of the prompt")
        self.prompt_hidden = _fused(self._states(outputs))
        self.num_cached_before = width - input_ids.shape[1]  # more than 0 where only new ids were given
        mask = self.model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones((input_ids.shape[0], width), dtype=torch.bool, device=self.prompt_hidden.device)
        self.prompt_mask = mask.bool()
        position_ids = self.model_kwargs.get("position_ids")
        if position_ids is None:
            position_ids = (self.prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.prompt_positions = position_ids.expand(input_ids.shape[0], -1) + self.position_offset
        self.next_position = [position + 1 for position in self.prompt_positions[:, -1].tolist()]
        num_new_tokens = self.generation_config.max_length - input_ids.shape[1]
        reason = None
        if len(self.next_position) > 1:
            reason = reason_against_batch_positions(self.rotary_switches, self.next_position, num_new_tokens)
        elif not self.can_read_anew:
            reason = reason_against_switch(self.rotary_switches, self.next_position[0], num_new_tokens)
        if reason is not None:
            raise Declined(reason)
        self.position_limit = [position + max(num_new_tokens - 2, 0) for position in self.next_position]
        if num_positions is not None:
            self.position_limit = [min(limit, num_positions - 1) for limit in self.position_limit]
        self.after_prefill()
        return outputs.logits[:, -1]

    def _most_tokens(self, input_ids: torch.LongTensor) -> int:
        """Tokens of the longest prompt, padding not counted."""
        position_ids, mask = self.model_kwargs.get("position_ids"), self.model_kwargs.get("attention_mask")
        if position_ids is not None or mask is None:
            return int(position_ids.max()) + 1 if position_ids is not None else input_ids.shape[1]
        return int(mask.bool().sum(dim=1).max())

    @property
    def can_read_anew(self) -> bool:
        """Whether the cache can be filled with the whole text once more."""
        return False

    def take_over(self, cache) -> None:
        """Take what the model has read into a cache of its own."""

    @property
    def max_nodes(self) -> int:
        """Drafted nodes that the next tree may have."""
        return sys.maxsize

    @property
    def max_depth(self) -> float:
        """Draft steps that the next tree may have, so that its forward computes what plain decoding would."""
        if self.has_given_up:
            return 0
        if len(self.next_position) > 1:
            return math.inf  # no switch is near
        depths = (switch.max_depth(self.next_position[0]) for switch in self.rotary_switches)
        return min(depths, default=math.inf)

    @property
    def is_padded(self) -> bool:
        """Whether a prompt was padded: generate() hands over no mask where nothing is."""
        return self.model_kwargs.get("attention_mask") is not None

    def give_up_drafting(self) -> None:
        """Forget what was appended since the last commit; the next rounds are plain steps."""
        self.has_given_up = True
        self.forget_appended()

    def forget_appended(self) -> None:
        """Drop the keys and values of nodes that are not committed."""

    def before_prefill(self) -> None:
        """Prepare the cache."""

    def after_prefill(self) -> None:
        """Take stock of the cache."""

    def _states(self, outputs) -> list[torch.Tensor]:
        """The states that the draft reads, `(B, T, target_hidden_size)` of each of L layers."""
        if outputs.hidden_states is None:
            raise ValueError(
                f"expected a target that returns hidden states {self.layer_ids}, got none from "
                f"{type(self.target).__name__}"
            )
        return [hidden_state(outputs, layer, self.target.config) for layer in self.layer_ids]

    def prompt_for_draft(self, rows) -> NewPositions:
        """The prompt as far as its hidden states are known: not what a cache already held, and of a chunked prefill
        only the last chunk."""
        self.rows = rows
        length = self.prompt_hidden.shape[1]
        last = rows.prompt_length + 1
        new = NewPositions(
            rows.ids[:, last - length : last].cpu(),
            self.prompt_hidden,
            self.prompt_positions[:, -length:].cpu(),
            [length] * rows.num_rows,
            # generate() hands over no mask where nothing is padded.
            None if self.model_kwargs.get("attention_mask") is None else self.prompt_mask[:, -length:],
            is_prompt=True,
        )
        del self.prompt_hidden, self.prompt_mask, self.prompt_positions
        return new

    def committed_for_draft(self, rows, active: list[int], kept: list[list[int]], states) -> NewPositions:
        """What the last round committed: the emitted tokens, each with the states of the node before it."""
        num_new = [len(nodes) for nodes in kept]
        longest = max(num_new)
        tokens, positions, index = [], [], []
        for row, nodes, end in zip(active, kept, self.next_position, strict=True):
            emitted, start, padding = rows.new_tokens[row], end - len(nodes), [0] * (longest - len(nodes))
            tokens.append(emitted[len(emitted) - len(nodes) :] + padding)
            positions.append(list(range(start, start + longest)))
            index.append(nodes + padding)
        token_ids = torch.tensor(tokens, dtype=rows.ids.dtype)
        if all(nodes == list(range(longest)) for nodes in kept):
            hidden = _fused([state[:, :longest] for state in states])
        else:
            hidden = _fused(states)
            of_nodes = torch.tensor(index, device=hidden.device)[..., None]  # [B, A, 1]
            hidden = hidden.gather(1, of_nodes.expand(-1, -1, hidden.shape[-1]))
        return NewPositions(token_ids, hidden, torch.tensor(positions), num_new)

    def _forward(self, tree: Tree, mask, position_ids):
        """One target forward over a tree; returns logits `(B, N, V)` and the states that the draft reads."""
        inputs = dict(self.forward_kwargs)
        if self.takes_position_ids:
            inputs["position_ids"] = position_ids.to(self.device)
        outputs = self.model_forward(
            input_ids=tree.token_ids.to(self.device),
            attention_mask=mask,
            **cache_argument(self.target, self.cache),
            use_cache=True,
            output_hidden_states=self.layer_ids,
            return_dict=True,
            **inputs,
        )
        return outputs.logits, self._states(outputs)

    def abandon(self) -> None:
        """Leave the cache as it was before the call."""
        self.snapshot.restore()

    def _advance(self, kept: list[list[int]]) -> None:
        self.next_position = [position + len(nodes) for position, nodes in zip(self.next_position, kept, strict=True)]


class TreeTarget(_Target):
    """A target that verifies trees for a batch, on layers lent to its cache while the loop runs."""

    def __init__(self, target, layer_ids: list[int], generation_config, model_kwargs: dict, inputs, num_rows: int):
        super().__init__(target, layer_ids, generation_config, model_kwargs, inputs)
        self.capacity = self._static_capacity(num_rows)  # None: layers and masks grow
        self.keeps_rows = self.returns_cache or self.capacity is not None
        # Layers of more positions may be lent to the caller's cache, which plain decoding could not go on with.
        is_callers = is_callers_cache(self.cache)
        whole = [layer.max_cache_len for layer in self.cache.layers if is_callers and type(layer) is StaticLayer]
        self.callers_capacity = min(whole, default=sys.maxsize)

    def _static_capacity(self, num_rows: int) -> int | None:
        """Positions of the layers, if they are to be static: those of the caller's own if they can be used as they are."""
        is_static = type(self.cache) is StaticCache
        if not is_static and not is_compiled(self.target):
            return None
        whole = [layer.max_cache_len for layer in self.cache.layers if type(layer) is StaticLayer]
        # Where the last row ends, the others may still need room behind it; one row needs none.
        if is_static and self.returns_cache and num_rows == 1 and whole:
            return min(whole)
        length = max(self.generation_config.max_length + int(self.cache.get_seq_length()), *whole, 0)
        wanted = round_up(length + _STATIC_SIZES[-1], _CAPACITY_STEP)
        _capacities[self.target] = max(wanted, _capacities.get(self.target, 0))
        return _capacities[self.target]

    @property
    def max_nodes(self) -> int:
        """Drafted nodes that the next tree may have: without static layers any number.

        Raises:
            ValueError: if a caller's static cache is full.
        """
        if self.capacity is None:
            return sys.maxsize
        if self.capacity <= self.committed.width:
            raise ValueError(
                f"past_key_values: expected a static cache with room for the next token, got one of {self.capacity} "
                "positions that is full"
            )
        return _static_size_within(self.capacity - self.committed.width) - 1

    def before_prefill(self) -> None:
        """Lend the cache layers whose rows can be moved."""
        if self.capacity is not None:
            _prepare_compiled(self.target, self.layer_ids)
        self.adopted = AdoptedLayers(self.cache, self.capacity)

    def after_prefill(self) -> None:
        """Note what is committed in each row, and which forward runs from here on."""
        config = self.target.config.get_text_config()
        self.windows = layer_windows(config)
        self.attn_implementation = attention_name(self.target.config)
        # Static layers have no room for holes, and the kernel takes a key's place for its index in a window.
        has_window = any(window is not None for window in self.windows.values())
        is_dense = self.capacity is not None or (has_window and self.attn_implementation == PRISM_TREE)
        self.committed = CommittedCache(self.cache, self.prompt_mask, 0 if is_dense else _MAX_HOLES)
        self.model_forward = compiled_forward(self.target, self.model_kwargs, self.generation_config) or self.target

    def verify(self, tree: Tree):
        """The target's logits `(B, N, V)` at each node of a tree, and the states that the draft reads."""
        num_nodes = tree.num_nodes
        if self.has_given_up and (step := self._plain_step(tree)) is not None:
            return step
        if self.can_read_anew and any(switch.length == self.next_position[0] for switch in self.rotary_switches):
            self.committed.close_holes()  # the model asks the cache how long it is
            inputs = inputs_of_next_step(self.target, self.rows.ids[:, : self.rows.lengths[0]], self._kwargs_so_far())
            if reads_whole_text(inputs):
                return self._read_anew(inputs)
        if self.capacity is not None:
            tree = _padded(tree, static_size(num_nodes))
        device = self.committed.committed.device
        depths = tree.depths.to(device)
        # Rows near their end cannot use the deepest nodes; the target may not even have positions for them.
        limits = [max(ends) for ends in zip(self.next_position, self.position_limit, strict=True)]
        first, limit = torch.tensor([self.next_position, limits], device=device)[..., None]  # [B, 1] each
        position_ids = (first + depths).minimum(limit)
        logits, states = self._forward(tree, self._masks(tree, depths), position_ids)
        return logits[:, :num_nodes], states

    @property
    def can_read_anew(self) -> bool:
        """Whether the cache can be filled with the whole text once more: one row's own, which grows."""
        is_own = self.capacity is None and len(self.next_position) == 1 and not is_callers_cache(self.cache)
        return is_own and self.target.config.get_text_config().model_type not in LOSES_TEXT

    def take_over(self, cache) -> None:
        """Take what the model has read into a cache of its own, as some do behind a rotary switch."""
        if cache is not None and cache is not self.cache and hasattr(cache, "layers"):
            self.adopted.fill(cache)

    def _kwargs_so_far(self) -> dict:
        """What generate() would hand on for the next step."""
        so_far = {name: value for name, value in self.model_kwargs.items() if name not in CACHE_NAMES}
        mask, position_ids = so_far.get("attention_mask"), so_far.get("position_ids")
        if mask is not None:
            so_far["attention_mask"] = pad(mask, (0, self.rows.lengths[0] - mask.shape[1]), value=1)
        if position_ids is not None:
            following = torch.arange(int(position_ids[0, -1]) + 1, self.next_position[0] + 1, device=position_ids.device)
            so_far["position_ids"] = torch.cat((position_ids, following[None]), dim=1)
        return {**so_far, CACHE_KEYWORD: self.cache}

    def _read_anew(self, inputs: dict):
        """Read the whole text into the cache, the root last, as plain decoding does where a rotary switch makes it."""
        self.committed.forget_all()
        own = {**cache_argument(self.target, self.cache), "output_hidden_states": self.layer_ids, "return_dict": True}
        outputs = self.target(**{**inputs, **own})
        assert int(self.cache.get_seq_length()) == self.committed.width + 1, "the text is what was committed, and the root"
        return outputs.logits[:, -1:], [state[:, -1:] for state in self._states(outputs)]

    def forget_appended(self) -> None:
        """Drop the keys and values of nodes that are not committed."""
        self.committed.forget_appended()

    def _plain_step(self, tree: Tree):
        """What [`~TreeTarget.verify`] returns, by the inputs of plain decoding; None where rows differ in length."""
        if min(self.committed.lengths) != self.committed.width or self.capacity is not None:
            return None
        mask = pad(self.committed.committed, (0, 1), value=True).long() if self.is_padded else None
        return self._forward(tree, mask, torch.tensor(self.next_position)[:, None])

    def plain_steps(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Logits `(B, A, V)` of single steps over tokens `(B, A)` behind what is committed, which stays as it is.

        Rows of one length take the inputs of plain decoding, so that no mask of ours is part of it.
        """
        self.committed.close_holes()
        state, position = vars(self.committed).copy(), list(self.next_position)
        steps = []
        for token in token_ids.split(1, dim=1):
            steps.append((self._plain_step(root_tree(token[:, 0])) or self.verify(root_tree(token[:, 0])))[0])
            self.commit([[0]] * len(position))
        vars(self.committed).update(state)
        self.next_position = position
        self.forget_appended()
        return torch.cat(steps, dim=1)

    def _masks(self, tree: Tree, depths: torch.Tensor):
        committed = self.committed.committed
        parents = tree.parents.to(committed.device)
        takes_bits = self.attn_implementation == PRISM_TREE and self.capacity is None
        bits = ancestor_bits(parents) if takes_bits else None
        ancestors = ancestor_mask(parents) if bits is None else unpack_ancestors(bits, tree.num_nodes)
        visible = visible_keys(committed, ancestors)  # [B, N, P + N]
        masks = {}
        for kind, window in self.windows.items():
            seen, node_index = visible, None
            if window is not None:
                lengths = torch.tensor(self.committed.lengths, device=committed.device)[:, None]
                node_index = lengths + depths
                places = torch.cat((self.committed.places(), node_index), dim=1)
                seen = visible & within_window(node_index, places, window)
            if self.capacity is not None:
                seen = pad(seen, (0, self.capacity - seen.shape[2]))
            masks[kind] = attention_mask(seen, self.attn_implementation, self.target.dtype)
            if bits is not None:
                masks[kind] = attach_tree(masks[kind], bits, committed, node_index, window)
        return masks[None] if None in masks else masks

    def commit(self, kept: list[list[int]]) -> None:
        """Keep the keys and values of these nodes in each row.

        Raises:
            ValueError: if a caller's static cache has no room for them.
        """
        lengths = [length + len(nodes) for length, nodes in zip(self.committed.lengths, kept, strict=True) if nodes]
        if max(lengths, default=0) > self.callers_capacity:
            raise ValueError(
                f"past_key_values: expected a static cache with room for the next token, got one of "
                f"{self.callers_capacity} positions that is full"
            )
        self.committed.commit(kept)
        self._advance(kept)

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with these rows of the batch only."""
        self.committed.keep_rows(rows)
        self.next_position = [self.next_position[row] for row in rows]
        self.position_limit = [self.position_limit[row] for row in rows]

    def finish(self, sequences: torch.LongTensor) -> None:
        """Give the cache its own layers back, holding what plain decoding would have left in them."""
        if not self.returns_cache:
            self.abandon()
            return
        self._even_out(sequences)
        self.adopted.put_back_with_new_states()

    def _even_out(self, sequences: torch.LongTensor) -> None:
        """Bring all rows to the length that plain decoding stops at; it runs padding through rows that have ended."""
        self.committed.close_holes()
        self.committed.max_holes = 0
        goal = sequences.shape[1] - 1 + self.num_cached_before
        while max(missing := [goal - length for length in self.committed.lengths]) > 0:
            longest = min(max(missing), self.max_nodes + 1)
            missing = [min(count, longest) for count in missing]
            token_ids = sequences.new_zeros((len(missing), longest))
            for row, (count, length) in enumerate(zip(missing, self.committed.lengths, strict=True)):
                if count > 0:
                    start = length - self.num_cached_before
                    token_ids[row, :count] = sequences[row, start : start + count]
            index = torch.arange(longest, device=sequences.device).expand(len(missing), -1)
            self.position_limit = [position + longest for position in self.next_position]
            self.verify(Tree(token_ids, (index - 1).clamp(min=0), index, torch.zeros(index.shape)))
            self.commit([list(range(max(count, 0))) for count in missing])
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.set_length(goal)



class ChainTarget(_Target):
    """A target that verifies a chain for one row on its own cache, rolled back by `crop`."""

    def after_prefill(self) -> None:
        """Let layers that forget keep enough to be rolled back."""
        if not self.cache.is_croppable:
            raise Declined(f"{type(self.target).__name__} keeps recurrent states, which cannot be rolled back")
        self.cache.activate_past_recording()

    def verify(self, tree: Tree):
        """The target's logits `(1, N, V)` along a chain, and the states that the draft reads."""
        self.num_nodes, self.num_committed = tree.num_nodes, int(self.cache.get_seq_length())
        mask = self.model_kwargs.get("attention_mask")
        if mask is not None:
            width = int(self.cache.get_seq_length()) + self.num_nodes
            mask = torch.cat((mask, mask.new_ones((1, width - mask.shape[1]))), dim=1)
        position_ids = self.next_position[0] + torch.arange(self.num_nodes)[None]
        return self._forward(tree, mask, position_ids)

    def forget_appended(self) -> None:
        """Drop the keys and values of nodes that are not committed."""
        for layer in self.cache.layers:
            # A forward that failed may have come to some layers only.
            if int(layer.get_seq_length()) > self.num_committed:
                layer.crop(self.num_committed - int(layer.get_seq_length()))

    def plain_steps(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Logits `(1, A, V)` of single steps over tokens `(1, A)` behind what is committed, which stays as it is."""
        steps, position = [], list(self.next_position)
        for token in token_ids.split(1, dim=1):
            steps.append(self.verify(root_tree(token[:, 0]))[0])
            self._advance([[0]])
        self.next_position = position
        self.cache.crop(-token_ids.shape[1])
        return torch.cat(steps, dim=1)

    def commit(self, kept: list[list[int]]) -> None:
        """Roll back what was not accepted; layers also forget here what they no longer need."""
        self.cache.crop(-(self.num_nodes - len(kept[0])))
        self._advance(kept)

    def keep_rows(self, rows: list[int]) -> None:
        """A chain has one row."""

    def finish(self, sequences: torch.LongTensor) -> None:
        """Let the cache forget again as plain decoding does."""
        recorded = {id(layer) for layer, state in zip(self.snapshot.layers, self.snapshot.states, strict=True) if state.get("record_past")}
        for layer in self.cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = id(layer) in recorded


def _padded(tree: Tree, num_nodes: int) -> Tree:
    """The tree with further children of the root, which nobody walks to, up to `num_nodes` nodes."""
    extra = (0, num_nodes - tree.num_nodes)
    return Tree(
        pad(tree.token_ids, extra),
        pad(tree.parents, extra),
        pad(tree.depths, extra, value=1),
        pad(tree.log_probs, extra),
    )


def make_target(target, layer_ids, generation_config, model_kwargs, input_ids):
    """The way to verify drafts with this target and cache: trees if it can be, else a chain.

    Raises:
        Declined: if it can be neither, with the reason.
    """
    cache = cache_of(model_kwargs)
    inputs = inputs_of_next_step(target, input_ids, model_kwargs)
    config = target.config.get_text_config()
    reason = reason_against_masks(config) or reason_against_inputs(inputs, rotary_switches(config))
    if reason is None and not is_tried(target):
        reason = reason_against_untried_chat(cache)
    if reason is not None:
        raise Declined(reason)
    why_chain = why_no_tree(target, cache, inputs)
    arguments = (target, layer_ids, generation_config, model_kwargs, inputs)
    if why_chain is None:
        return TreeTarget(*arguments, input_ids.shape[0])
    reason = why_no_chain(cache, input_ids.shape[0])
    if reason is not None:
        raise Declined(f"{why_chain}, and {reason}")
    chain = ChainTarget(*arguments)
    chain.why_no_tree = why_chain
    if inputs is not None and inputs.get("position_ids") is None:
        chain.takes_position_ids = False
    return chain
