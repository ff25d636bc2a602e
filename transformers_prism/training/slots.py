"""Decode many sequences at once, replacing each one as soon as it ends, in a cache of slots that is allocated once.

`generate` decodes a batch until its longest sequence ends, copies its cache for every token, and repeats the keys of each
group of query heads. Here each slot has its own length, keys and values are written in place, the query heads of a group
share their keys without copies, and only the last position goes through the vocabulary head.
Shape letters: B slots, W positions in use, H query heads, G key/value heads, R = H / G, E head dim, V vocabulary.
"""

import inspect

import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transformers_prism.decoding.attention import lent_sdpa
from transformers_prism.decoding.eval_mode import in_eval_mode
from transformers_prism.decoding.target_support import layer_windows, why_no_tree_mask
from transformers_prism.decoding.tree import attention_mask
from transformers_prism.transformers_names import attention_name, cache_argument, is_stateful

# A prompt that several conversations begin with is prefilled once; at most this many are remembered.
_MAX_REMEMBERED = 16


def slot_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention of one new token per slot: the R heads of a group become R queries of one head. Longer inputs go to SDPA."""
    num_groups = key.shape[1]
    if query.shape[2] != 1 or num_groups == query.shape[1]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.view(query.shape[0], num_groups, -1, query.shape[3])  # [B, G, R, E]
    output = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=kwargs.get("scaling"))
    return output.reshape(query.shape[0], 1, query.shape[1], value.shape[3]), None


class _SlotLayer(DynamicLayer):
    """Keys and values of all slots, written at each slot's own length."""

    def __init__(self, slots: "Slots"):
        super().__init__()
        self.slots = slots

    def reserve(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate buffers for all slots, of the dtype, device and sizes of these keys and values `(n, G, T, E)`."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            # One position more than a sequence can hold: an idle slot is written to after its end, and every mask hides that.
            shape = (self.slots.num_slots, keys.shape[1], self.slots.max_length + 1)
            # Zeros, since masked values must still be finite.
            self.keys = keys.new_zeros((*shape, keys.shape[3]))
            self.values = values.new_zeros((*shape, values.shape[3]))

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token per slot `(B, G, 1, E)`; returns all positions in use."""
        rows = torch.arange(key_states.shape[0], device=key_states.device)
        self.keys[rows, :, self.slots.positions] = key_states[:, :, 0]
        self.values[rows, :, self.slots.positions] = value_states[:, :, 0]
        return self.keys[:, :, : self.slots.width], self.values[:, :, : self.slots.width]

    def get_seq_length(self) -> int:
        """Positions in use by the longest slot, before the new token."""
        return self.slots.width - 1


class _SlotStates(LinearAttentionLayer):
    """Recurrent states of all slots. The layer of transformers updates them in place, each slot independently."""

    def __init__(self, slots: "Slots"):
        super().__init__()
        self.slots = slots

    def fill(self, slot: int, read: LinearAttentionLayer) -> None:
        """Copy the states of a sequence that was prefilled alone into a slot."""
        self.number_of_states, self.conv_kernel_size = read.number_of_states, read.conv_kernel_size
        self.has_previous_state = dict(read.has_previous_state)
        for name in ("conv_states", "recurrent_states"):
            mine = getattr(self, name)
            for index, state in getattr(read, name).items():
                if state is not None and mine.get(index) is None:
                    mine[index] = state.new_zeros((self.slots.num_slots, *state.shape[1:]))
                    getattr(self, f"is_{name}_initialized")[index] = True
                if state is not None:
                    mine[index][slot] = state[0]


class _SlotLayerAndStates(_SlotStates, _SlotLayer):
    """Keys and values, and recurrent states, for layers that have both."""

    lazy_initialization = LinearAttentionAndFullAttentionLayer.lazy_initialization

    def __init__(self, slots: "Slots"):
        _SlotLayer.__init__(self, slots)
        _SlotStates.__init__(self, slots)


# The replacement for each type of layer in a target's own cache.
_LAYERS = {
    DynamicLayer: _SlotLayer,
    LinearAttentionLayer: _SlotStates,
    LinearAttentionAndFullAttentionLayer: _SlotLayerAndStates,
    DummyLayer: lambda slots: DummyLayer(),
}


class Slots:
    """Decodes up to `num_slots` sequences (B) at once with a target, always in eval mode. `max_length` positions are
    allocated for each slot, once.

    Raises:
        ValueError: if the target accepts no attention mask of ours, and is not a model of recurrent and full-attention
            layers.
    """

    def __init__(self, target, num_slots: int, max_length: int):
        config = target.config.get_text_config()
        kinds = [type(layer) for layer in DynamicCache(config=config).layers] if is_stateful(target) else []
        is_recurrent = bool(kinds) and set(kinds) <= set(_LAYERS)
        if not is_recurrent and why_no_tree_mask(target) is not None:
            raise ValueError(
                f"target: expected one with eager or SDPA attention over full or sliding layers, or with recurrent layers "
                f"beside full attention, got {type(target).__name__} with {attention_name(target.config)}"
            )
        self.target, self.num_slots, self.max_length = target, num_slots, max_length
        self.config_of_cache = config if is_recurrent else None
        self.windows = {None: None} if is_recurrent else layer_windows(config)
        self.lengths = [0] * num_slots
        self.width = 1
        self.positions = torch.zeros(num_slots, dtype=torch.long, device=target.device)
        layers = kinds if is_recurrent else [DynamicLayer] * config.num_hidden_layers
        self.cache = Cache(layers=[_LAYERS[kind](self) for kind in layers])
        self.has_attention = any(isinstance(layer, _SlotLayer) for layer in self.cache.layers)
        self.takes_positions = "position_ids" in inspect.signature(target.forward).parameters
        self._read: dict[tuple[int, ...], tuple] = {}

    @torch.no_grad()
    def fill(self, slot: int, token_ids: list[int], is_shared: bool = False) -> torch.Tensor:
        """Put a new sequence of 1 to `max_length` - 1 tokens in a slot; returns the logits `(V,)` after them. `is_shared`
        says that other sequences will begin with exactly these tokens."""
        if not 0 < len(token_ids) < self.max_length:
            raise ValueError(f"token_ids: expected 1 to {self.max_length - 1} tokens, got {len(token_ids)}")
        read = self._read.get(tuple(token_ids))
        if read is None:
            cache = DynamicCache() if self.config_of_cache is None else DynamicCache(config=self.config_of_cache)
            ids = torch.tensor([token_ids], device=self.target.device)
            with in_eval_mode(self.target):
                logits = self.target(ids, **cache_argument(self.target, cache), use_cache=True, logits_to_keep=1).logits[0, -1]
            read = logits, cache.layers
            if is_shared and len(self._read) < _MAX_REMEMBERED:
                self._read[tuple(token_ids)] = read
        for layer, of_row in zip(self.cache.layers, read[1], strict=True):
            if isinstance(layer, _SlotStates):
                layer.fill(slot, of_row)
            if not isinstance(layer, _SlotLayer):
                continue
            keys, values = of_row.keys, of_row.values
            layer.reserve(keys, values)
            # A sliding-window layer keeps only the end of a long prompt; masks hide what it dropped.
            kept = keys.shape[2]
            layer.keys[slot, :, len(token_ids) - kept : len(token_ids)] = keys[0]
            layer.values[slot, :, len(token_ids) - kept : len(token_ids)] = values[0]
        self.lengths[slot] = len(token_ids)
        return read[0]

    @torch.no_grad()
    def step(self, token_ids: dict[int, int]) -> torch.Tensor:
        """Append a token to some slots; returns the logits `(B, V)` after it. The rows of all other slots are meaningless."""
        input_ids = torch.zeros((self.num_slots, 1), dtype=torch.long)
        for slot, token in token_ids.items():
            if self.lengths[slot] == self.max_length:
                raise ValueError(
                    f"token_ids: expected room for one more token, got a slot with {self.max_length} of {self.max_length}"
                )
            input_ids[slot, 0] = token
        device = self.target.device
        self.positions = torch.tensor(self.lengths, device=device)
        self.width = max(self.lengths[slot] for slot in token_ids) + 1
        resting = [slot for slot in range(self.num_slots) if slot not in token_ids and self.lengths[slot]]
        kept = [(state, state[resting]) for state in self._states()] if resting else []
        positions = {"position_ids": self.positions[:, None]} if self.takes_positions else {}
        with in_eval_mode(self.target), lent_sdpa(slot_attention):
            logits = self.target(
                input_ids.to(device),
                attention_mask=self._masks() if self.has_attention else None,
                **positions,
                **cache_argument(self.target, self.cache),
                use_cache=True,
            ).logits[:, -1]
        for state, rows in kept:
            state[resting] = rows
        for slot in token_ids:
            self.lengths[slot] += 1
        return logits

    def _states(self) -> list[torch.Tensor]:
        """Recurrent states `(B, ...)` of all layers."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, _SlotStates)]
        return [
            state
            for layer in layers
            for states in (layer.conv_states, layer.recurrent_states)
            for state in states.values()
            if state is not None
        ]

    def _masks(self):
        keys = torch.arange(self.width, device=self.positions.device)
        masks = {}
        for kind, window in self.windows.items():
            seen = keys[None] <= self.positions[:, None]  # [B, W]
            if window is not None:
                seen &= keys[None] > self.positions[:, None] - window
            implementation = attention_name(self.target.config)
            masks[kind] = attention_mask(seen[:, None], implementation, self.target.dtype)
        return masks[None] if None in masks else masks
