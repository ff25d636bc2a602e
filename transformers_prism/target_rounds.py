"""The target's half of a round: prefill, verification of a tree in one forward, and committing the accepted path.

`TreeTarget` serves every cache whose layers can be lent (full and sliding attention, dynamic or static) for any batch.
`ChainTarget` keeps the target's own cache and rolls it back: for one row and a chain it needs neither masks nor
positions, so it also serves convolution layers and attention implementations that take no tree mask.
Shape letters: B rows that still decode, T prompt positions, N tree nodes, L fused target layers.
"""

import inspect
from typing import NamedTuple

import torch
from transformers import DynamicCache

from .attention import PRISM_GROUPED, PRISM_TREE, attach_tree
from .cache import AdoptedLayers, CommittedCache, is_adoptable
from .kernels.grow_tree import ancestor_bits
from .kernels.tree_attention import unpack_ancestors
from .tree import Tree, attention_mask, visible_keys, within_window

_TREE_ATTENTION = ("sdpa", "eager", PRISM_TREE, PRISM_GROUPED)
# What generate() prepares and a verification forward replaces.
_REPLACED_INPUTS = (
    "attention_mask cache_position logits_to_keep output_attentions output_hidden_states past_key_values position_ids "
    "return_dict use_cache"
).split()


class NewPositions(NamedTuple):
    """Positions that the draft has to read: see `Drafter.prefill`, whose arguments these are but for the last."""

    token_ids: torch.Tensor  # [B, A]
    target_hidden: torch.Tensor  # [B, A, L * target_hidden_size]
    position_ids: torch.Tensor  # [B, A]
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
        token_ids.gather(1, index.to(token_ids.device)),
        target_hidden.gather(1, states),
        position_ids.gather(1, index.to(position_ids.device)),
        num_new,
    )


def layer_windows(text_config) -> dict[str | None, int | None] | None:
    """The sliding window (None: full attention) of each kind of layer, keyed as the target's forward takes its masks;
    a single key None where it takes one tensor. None if a kind of layer has no tree mask.

    Source: `create_masks_for_generate` of transformers, whose cases these are.
    """
    window = getattr(text_config, "sliding_window", None)
    if hasattr(text_config, "layer_types"):
        kinds = set(text_config.layer_types)
        if not kinds <= {"full_attention", "sliding_attention"}:
            return None
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}
    if window is None and getattr(text_config, "attention_chunk_size", None) is not None:
        return None
    return {None: window}


def takes_tree_mask(target) -> bool:
    """Whether the target's forward accepts a tree's mask and positions."""
    config = target.config.get_text_config()
    return (
        config._attn_implementation in _TREE_ATTENTION
        and layer_windows(config) is not None
        and "position_ids" in inspect.signature(target.forward).parameters
    )


def _num_learned_positions(text_config) -> int | None:
    """How many positions a target without rotary embedding has; None where any position can be computed."""
    is_rotary = getattr(text_config, "rope_parameters", None) is not None
    return None if is_rotary else getattr(text_config, "max_position_embeddings", None)


class _Target:
    """What both roads share: the prefill, positions, and the states that the draft reads.

    Args:
        target (`PreTrainedModel`): the model to decode.
        layer_ids (`list[int]`): indices into its hidden states, which the draft reads.
        generation_config (`GenerationConfig`), model_kwargs (`dict`): as generate() prepared them.
    """

    def __init__(self, target, layer_ids: list[int], generation_config, model_kwargs: dict):
        self.target = target
        self.layer_ids = list(layer_ids)
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.cache = model_kwargs["past_key_values"]
        self.returns_cache = generation_config.return_dict_in_generate or getattr(
            self.cache, "_is_user_defined", False
        )
        self.adopted: AdoptedLayers | None = None
        self.takes_position_ids = "position_ids" in inspect.signature(target.forward).parameters
        self.forward_kwargs = {key: value for key, value in model_kwargs.items() if key not in _REPLACED_INPUTS}
        if target._supports_logits_to_keep():
            self.forward_kwargs["logits_to_keep"] = 0

    def prefill(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Run the prompt; returns the logits `(B, V)` of its last position.

        Raises:
            ValueError: if the prompt has more tokens than the target has learned positions.
        """
        num_positions = _num_learned_positions(self.target.config.get_text_config())
        if num_positions is not None and input_ids.shape[1] > num_positions:
            raise ValueError(
                f"input_ids: expected at most {num_positions} tokens (the target's max_position_embeddings), "
                f"got {input_ids.shape[1]}"
            )
        self.before_prefill()
        # A copy, since transformers' chunked prefill writes to it.
        model_kwargs = dict(self.model_kwargs, output_hidden_states=self.layer_ids)
        outputs = self.target._prefill(input_ids, self.generation_config, model_kwargs)
        self.prompt_hidden = self._fused_states(outputs)
        width = int(self.cache.get_seq_length())
        self.num_cached_before = width - input_ids.shape[1]  # more than 0 where only new ids were given
        mask = self.model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones((input_ids.shape[0], width), dtype=torch.bool, device=self.prompt_hidden.device)
        self.prompt_mask = mask.bool()
        position_ids = self.model_kwargs.get("position_ids")
        if position_ids is None:
            position_ids = (self.prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
        self.prompt_positions = position_ids.expand(input_ids.shape[0], -1)
        self.next_position = [position + 1 for position in self.prompt_positions[:, -1].tolist()]
        num_new_tokens = self.generation_config.max_length - input_ids.shape[1]
        self.position_limit = [position + max(num_new_tokens - 2, 0) for position in self.next_position]
        if num_positions is not None:
            self.position_limit = [min(limit, num_positions - 1) for limit in self.position_limit]
        self.after_prefill()
        return outputs.logits[:, -1]

    def before_prefill(self) -> None:
        """Prepare the cache."""

    def after_prefill(self) -> None:
        """Take stock of the cache."""

    def _fused_states(self, outputs) -> torch.Tensor:
        """The states that the draft reads, side by side, `(B, T, L * target_hidden_size)`."""
        if outputs.hidden_states is None:
            raise ValueError(
                f"expected a target that returns hidden states {self.layer_ids}, got none from "
                f"{type(self.target).__name__}"
            )
        states = [outputs.hidden_states[layer] for layer in self.layer_ids]
        return states[0] if len(states) == 1 else torch.cat([state.to(states[0].device) for state in states], dim=-1)

    def prompt_for_draft(self, rows) -> NewPositions:
        """The prompt as far as its hidden states are known: not what a cache already held, and of a chunked prefill
        only the last chunk."""
        length = self.prompt_hidden.shape[1]
        last = rows.prompt_length + 1
        new = NewPositions(
            rows.ids[:, last - length : last],
            self.prompt_hidden,
            self.prompt_positions[:, -length:],
            [length] * rows.num_rows,
            # generate() hands over no mask where nothing is padded.
            None if self.model_kwargs.get("attention_mask") is None else self.prompt_mask[:, -length:],
            is_prompt=True,
        )
        del self.prompt_hidden, self.prompt_mask, self.prompt_positions
        return new

    def committed_for_draft(self, rows, active: list[int], kept: list[list[int]], hidden) -> NewPositions:
        """What the last round committed: the emitted tokens, each with the state of the node before it."""
        longest = max(len(nodes) for nodes in kept)
        padded = [nodes + [0] * (longest - len(nodes)) for nodes in kept]
        index = torch.tensor(padded, device=hidden.device)  # [B, A]
        ends = [rows.lengths[row] for row in active]
        tokens = rows.ids.new_zeros((len(active), longest))
        for i, (row, nodes, end) in enumerate(zip(active, kept, ends, strict=True)):
            tokens[i, : len(nodes)] = rows.ids[row, end - len(nodes) : end]
        first = [position - len(nodes) for position, nodes in zip(self.next_position, kept, strict=True)]
        position_ids = torch.tensor(first)[:, None] + torch.arange(longest)
        states = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        return NewPositions(tokens, states, position_ids, [len(nodes) for nodes in kept])

    def _forward(self, tree: Tree, mask, position_ids):
        """One target forward over a tree; returns logits `(B, N, V)` and the states that the draft reads."""
        inputs = dict(self.forward_kwargs)
        if self.takes_position_ids:
            inputs["position_ids"] = position_ids.to(self.target.device)
        outputs = self.target(
            input_ids=tree.token_ids.to(self.target.device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=self.layer_ids,
            return_dict=True,
            **inputs,
        )
        return outputs.logits, self._fused_states(outputs)

    def _advance(self, kept: list[list[int]]) -> None:
        self.next_position = [position + len(nodes) for position, nodes in zip(self.next_position, kept, strict=True)]


class TreeTarget(_Target):
    """A target that verifies trees for a batch, on layers lent to its cache while the loop runs."""

    def before_prefill(self) -> None:
        """Lend the cache layers whose rows can be moved."""
        self.adopted = AdoptedLayers(self.cache)

    def after_prefill(self) -> None:
        """Note what is committed in each row."""
        self.committed = CommittedCache(self.cache, self.prompt_mask)
        config = self.target.config.get_text_config()
        self.windows = layer_windows(config)
        self.attn_implementation = config._attn_implementation

    def verify(self, tree: Tree):
        """The target's logits `(B, N, V)` at each node of a tree, and the states that the draft reads."""
        device = self.committed.committed.device
        depths = tree.depths.to(device)
        position_ids = torch.tensor(self.next_position, device=device)[:, None] + depths
        limit = torch.tensor(self.position_limit, device=device)[:, None]
        # Rows near their end cannot use the deepest nodes; the target may not even have positions for them.
        position_ids = position_ids.minimum(limit.maximum(position_ids[:, :1]))
        return self._forward(tree, self._masks(tree, depths), position_ids)

    def _masks(self, tree: Tree, depths: torch.Tensor):
        committed = self.committed.committed
        ancestors = ancestor_bits(tree.parents.to(committed.device))
        visible = visible_keys(committed, unpack_ancestors(ancestors, tree.num_nodes))  # [B, N, P + N]
        masks = {}
        for kind, window in self.windows.items():
            seen, node_index = visible, None
            if window is not None:
                lengths = torch.tensor(self.committed.lengths, device=committed.device)[:, None]
                node_index = lengths + depths
                key_index = torch.arange(self.committed.width, device=committed.device).expand(len(lengths), -1)
                seen = visible & within_window(node_index, torch.cat((key_index, node_index), dim=1), window)
            masks[kind] = attention_mask(seen, self.attn_implementation, self.target.dtype)
            if self.attn_implementation == PRISM_TREE:
                masks[kind] = attach_tree(masks[kind], ancestors, committed, node_index, window)
        return masks[None] if None in masks else masks

    def commit(self, kept: list[list[int]]) -> None:
        """Keep the keys and values of these nodes in each row."""
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
            self.adopted.put_back()
            return
        self._even_out(sequences)
        self.adopted.put_back_with_new_states()

    def _even_out(self, sequences: torch.LongTensor) -> None:
        """Bring all rows to the length that plain decoding stops at; it runs padding through rows that have ended."""
        goal = sequences.shape[1] - 1 + self.num_cached_before
        missing = [goal - length for length in self.committed.lengths]
        if max(missing) > 0:
            longest = max(missing)
            token_ids = sequences.new_zeros((len(missing), longest))
            for row, count in enumerate(missing):
                if count > 0:
                    token_ids[row, :count] = sequences[row, sequences.shape[1] - 1 - count : -1]
            index = torch.arange(longest, device=sequences.device).expand(len(missing), -1)
            self.position_limit = [position + longest for position in self.next_position]
            self.verify(Tree(token_ids, (index - 1).clamp(min=0), index, torch.zeros(index.shape)))
            self.committed.commit([list(range(max(count, 0))) for count in missing])
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.set_length(goal)

    def abandon(self) -> None:
        """Leave the cache as it was before the call."""
        if self.adopted is not None:
            self.adopted.put_back()


class ChainTarget(_Target):
    """A target that verifies a chain for one row on its own cache, rolled back by `crop`."""

    def before_prefill(self) -> None:
        """Remember how long the cache was."""
        self.length_before = int(self.cache.get_seq_length())

    def after_prefill(self) -> None:
        """Let layers that forget keep enough to be rolled back.

        Raises:
            ValueError: before any token, if a layer cannot be rolled back at all.
        """
        if not self.cache.is_croppable:
            raise ValueError(
                f"expected a target whose cache can be rolled back, got {type(self.target).__name__} with recurrent "
                "states; decode it without a draft"
            )
        self.cache.activate_past_recording()

    def verify(self, tree: Tree):
        """The target's logits `(1, N, V)` along a chain, and the states that the draft reads."""
        self.num_nodes = tree.num_nodes
        mask = self.model_kwargs.get("attention_mask")
        if mask is not None:
            width = int(self.cache.get_seq_length()) + self.num_nodes
            mask = torch.cat((mask, mask.new_ones((1, width - mask.shape[1]))), dim=1)
        position_ids = self.next_position[0] + torch.arange(self.num_nodes)[None]
        return self._forward(tree, mask, position_ids)

    def commit(self, kept: list[list[int]]) -> None:
        """Roll back what was not accepted; layers also forget here what they no longer need."""
        self.cache.crop(-(self.num_nodes - len(kept[0])))
        self._advance(kept)

    def keep_rows(self, rows: list[int]) -> None:
        """A chain has one row."""

    def finish(self, sequences: torch.LongTensor) -> None:
        """Let the cache forget again as plain decoding does."""
        for layer in self.cache.layers:
            layer.record_past = False

    def abandon(self) -> None:
        """Roll the cache back to what it held before the call."""
        num_new = int(self.cache.get_seq_length()) - self.length_before
        if num_new > 0 and self.cache.is_croppable:
            self.cache.activate_past_recording()
            self.cache.crop(-num_new)


def chain_cache_is_served(cache, num_rows: int) -> bool:
    """Whether [`ChainTarget`] can serve this cache: one row, kept in memory, and every layer can be rolled back, which
    some layers only tell once they hold something."""
    is_plain = num_rows == 1 and type(cache) is DynamicCache and not cache.offloading
    return is_plain and (cache.is_croppable or cache.get_seq_length() == 0)


def make_target(target, layer_ids, generation_config, model_kwargs, num_rows: int):
    """The road that can decode this target and cache, or None if neither can."""
    cache = model_kwargs["past_key_values"]
    if is_adoptable(cache) and takes_tree_mask(target):
        return TreeTarget(target, layer_ids, generation_config, model_kwargs)
    if chain_cache_is_served(cache, num_rows):
        return ChainTarget(target, layer_ids, generation_config, model_kwargs)
    return None
