"""Draft steps: read what was committed (step 0), then grow a tree (steps 1 and later).

Step 0 runs its module over every newly committed position with the target's true hidden states. Step k >= 1 runs its
module over the frontier: the token embedding of each node and, as hidden state, the output of the node's parent; it
attends to the committed positions and to the node's own ancestors. With `context_kv="own_module"` a module first
catches up on the nodes that other modules processed, so that it sees all of them through its own keys and values.
With a `sliding_window` every position and node sees only that far back; the masks enforce it, and the cache keeps everything.
Shape letters: B batch, D draft hidden size, K frontier nodes, R tree nodes processed so far.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.functional import pad

from ..kernels.grow_tree import grow_tree
from ..kernels.tree_attention import pack_ancestors, unpack_ancestors
from ..transformers_names import attention_name
from .attention import PRISM_TREE, attach_starts, attach_tree
from .cache import CommittedCache, new_tree_cache, relaid
from .sampling_noise import NUM_COMPETING, Coupling
from .static_shapes import StaticShapes
from .transfer import on_device
from .tree import CandidatePool, Tree, attention_mask, root_tree, select_nodes, visible_keys, within_window
from .uneven_prompts import groups_of_like_length, right_aligned, side_by_side

# Except for a prompt, more positions are seldom read at once.
_MANY_POSITIONS = 32


def _causal_mask(length: int, device) -> torch.Tensor:
    """Each position and those before it, `(A, A)` bool."""
    return torch.ones((length, length), dtype=torch.bool, device=device).tril()


class Drafter:
    """Runs the draft steps of a batch of sequences.

    Args:
        draft (`PrismDraftModel`): bound to its target.
    """

    def __init__(self, draft):
        self.text = None  # what the text so far adds to the draft vocabulary
        self.can_propose: bytearray | None = None  # [V], 1 for tokens that a text has added or cannot add
        self.text_tokens = draft.takes_text_rows
        # Kept here, since transformers searches all modules or parts of the configuration at each call.
        self.draft, self.device, self.attn_implementation = draft, draft.device, attention_name(draft.config)
        config = draft.config
        # One step for each module that keeps keys and values of committed positions. Step 0 is last: its output is needed.
        self.prefill_steps = [0]
        if config.context_kv == "own_module":
            steps = (config.draft_step_to_module.index(module) for module in range(config.num_processing_modules))
            self.prefill_steps = sorted(steps, reverse=True)
        self.shapes: StaticShapes | None = None  # those of a compiled draft
        self._cache: CommittedCache | None = None  # once a prompt was read
        self.causal: torch.Tensor | None = None  # of _MANY_POSITIONS, made when first needed
        # The state that the next tree starts from; empty until a prompt was read.
        self.last_hidden = torch.empty((0, 0), device="cpu")  # [B, D], step 0's output at the last committed position
        self.last_position = torch.empty(0, dtype=torch.long, device="cpu")  # [B]
        self.root_ids = torch.empty(0, dtype=torch.long, device="cpu")  # [B]

    @property
    def cache(self) -> CommittedCache:
        """Keys and values of what is committed, from the prompt on.

        Raises:
            RuntimeError: if no prompt was read yet.
        """
        if self._cache is None:
            raise RuntimeError("expected `prefill` to read a prompt first, got none")
        return self._cache

    def prefill(self, token_ids, target_hidden, position_ids, num_new: list[int], padding_mask=None) -> None:
        """Step 0: read newly committed positions and keep their keys and values.

        Args:
            token_ids (`torch.LongTensor` of shape `(B, A)`): the token after each position, preferably on the host.
            target_hidden (`torch.Tensor` of shape `(B, A, L * target_hidden_size)`): the target's states there.
            position_ids (`torch.LongTensor` of shape `(B, A)`): positions of those states.
            num_new: how many of the A positions of each sequence are real; the others, at the end, are padding. In the first
                call all are real.
            padding_mask (`torch.BoolTensor` of shape `(B, A)`, *optional*): for the first call, False at left padding.
        """
        if self.text_tokens:
            self._join_vocabulary(token_ids)
        token_ids, position_ids = on_device(token_ids, self.device), on_device(position_ids, self.device)
        token_ids = self.draft.known_tokens(token_ids)
        if self._cache is None:
            output = self._read_prompt(token_ids, target_hidden, position_ids, padding_mask)
            self._remember_last(token_ids[:, -1:], output, position_ids[:, -1:], 1)
            return
        output = self._read_later(token_ids, target_hidden, position_ids)
        self.cache.commit([list(range(count)) for count in num_new])
        are_alike = len(set(num_new)) == 1
        self._remember_last(
            token_ids, output, position_ids, num_new[0] if are_alike else on_device(num_new, self.device)
        )

    def use_text_tokens(self, is_wanted: bool) -> None:
        """Set whether tokens of the text that are missing from the draft vocabulary are added to it; if not, remove them."""
        self.text_tokens = is_wanted and self.draft.takes_text_rows
        if not self.text_tokens:
            self.text = self.can_propose = None

    def use_shapes(self, shapes: StaticShapes | None) -> None:
        """From now on pad to these shapes, for compiled steps; None: do not pad."""
        before, self.shapes, self.attn_implementation = self.shapes, shapes, attention_name(self.draft.config)
        if self._cache is not None and (before and before.capacity) != (shapes and shapes.capacity):
            self._cache.cache = relaid(self._cache.cache, shapes and shapes.capacity)

    def _uncompiled(self) -> AbstractContextManager:
        """A context without compilation, for forwards that are rare and whose shapes differ each time."""
        return torch.compiler.set_stance("force_eager") if self.shapes else nullcontext()

    def _run(self, step: int, token_ids, hidden, mask, position_ids, cache, num_outputs: int | None = None) -> torch.Tensor:
        """Outputs of the module that serves a draft step."""
        index = self.draft.config.module_of_step(step)
        if self.shapes and self._cache is not None:  # after the prompt, which is read without fixed shapes
            states = (token_ids, hidden, mask, position_ids)
            token_ids, hidden, mask, position_ids = map(_with_usual_strides, states)
            if self.shapes.run_module:
                module = self.draft.processing_modules[index]
                return self.shapes.run_module(
                    self.draft, module, token_ids, hidden, mask, position_ids, cache, num_outputs
                )
        step = self.draft.config.draft_step_to_module.index(index)  # steps of one module share a compiled graph
        return self.draft(token_ids, hidden, step, mask, position_ids, cache, num_outputs=num_outputs).last_hidden_state

    def _join_vocabulary(self, token_ids) -> None:
        """From now on, also propose those tokens `(B, A)` of the text that are missing from the draft vocabulary."""
        if self.can_propose is None:
            self.can_propose = bytearray(self.draft.own_tokens().numpy())
        # Ids beyond the vocabulary stand for images; no head has logits for them.
        known = len(self.can_propose)
        new = sorted({token for token in token_ids.flatten().tolist() if 0 <= token < known and not self.can_propose[token]})
        if new:
            for token in new:
                self.can_propose[token] = 1
            self.text = self.draft.rows_beside(torch.tensor(new, device="cpu"), self.text)

    def _read_prompt(self, token_ids, target_hidden, position_ids, padding_mask) -> torch.Tensor:
        """Step 0 over the first positions; returns its output at the last of them, `(B, 1, D)`."""
        padding_mask = None if padding_mask is None else padding_mask.to(self.device).bool()
        groups = [] if self.shapes else groups_of_like_length(padding_mask)
        states, cache = (token_ids, target_hidden, position_ids), new_tree_cache()
        if padding_mask is not None and groups:
            rows, caches = [of_group for of_group, _ in groups], [new_tree_cache() for _ in groups]
            outputs = [
                self._read_together([state[of_group, start:] for state in states], padding_mask[of_group, start:], one)
                for (of_group, start), one in zip(groups, caches, strict=True)
            ]
            cache.layers = side_by_side(rows, [one.layers for one in caches], token_ids.shape[1])
            output = right_aligned(rows, outputs, len(token_ids), 1, dim=1)
        else:
            output = self._read_together(states, padding_mask, cache)
        committed = torch.ones_like(token_ids, dtype=torch.bool) if padding_mask is None else padding_mask
        self._cache = CommittedCache(relaid(cache, self.shapes.capacity) if self.shapes else cache, committed)
        return output

    def _read_together(self, states, padding_mask, cache) -> torch.Tensor:
        """Step 0 over prompts, into an empty cache; returns its output at the last position, `(B, 1, D)`.

        Args:
            states: token ids, target's states and positions, as for [`~Drafter.prefill`].
        """
        token_ids, target_hidden, position_ids = states
        hidden, mask = self.draft.fuse(target_hidden), None
        committed = torch.ones_like(token_ids, dtype=torch.bool) if padding_mask is None else padding_mask
        if padding_mask is not None or self._hides(token_ids.shape[1]):
            # A mask of two dimensions would do, but transformers would read its values from the device.
            mask = attention_mask(self._seen_in_prompt(committed), self.attn_implementation, hidden.dtype)
        with self._uncompiled():
            return self._step_0(token_ids, hidden, position_ids, mask, cache, num_outputs=1)

    def _hides(self, num_keys: int) -> bool:
        """Whether a sliding window hides any of so many keys from the last of them."""
        window = self.draft.config.sliding_window
        return window is not None and num_keys > window

    def _seen_in_prompt(self, committed: torch.Tensor) -> torch.Tensor:
        """What each position of a prompt sees, `(B, T, T)` bool, or `(B, 1, T)` where only the last position attends."""
        length = committed.shape[1]
        key_index = torch.arange(length, device=committed.device)[None]
        query_index, visible = key_index[:, -1:], committed[:, None]
        if self.draft.config.num_layers_per_module > 1:
            # Padding sees itself, since a query that sees nothing may come out as NaN.
            itself = torch.eye(length, dtype=torch.bool, device=committed.device)
            query_index, visible = key_index, self._causal(committed) & visible | itself
        if self._hides(length):
            visible = visible & within_window(query_index, key_index, self.draft.config.sliding_window)
        return visible

    def _read_later(self, token_ids, target_hidden, position_ids) -> torch.Tensor:
        """Step 0 over positions after the committed ones; returns its output `(B, A, D)`."""
        hidden, length = self.draft.fuse(target_hidden), token_ids.shape[1]
        shapes = self.shapes if self.shapes is not None and length <= self.shapes.num_read else None
        if shapes is not None:
            # Padding comes after all real positions, and its keys are not committed.
            token_ids, hidden, position_ids = _padded(shapes.num_read, token_ids, hidden, position_ids)
        mask = self._mask(self._causal(token_ids), range(token_ids.shape[1]), hidden.dtype)
        with self._uncompiled() if shapes is None else nullcontext():
            return self._step_0(token_ids, hidden, position_ids, mask, self.cache.cache)[:, :length]

    def _causal(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Each position and those before it, `(B, A, A)` bool."""
        num_rows, length = token_ids.shape
        if length > _MANY_POSITIONS:
            return _causal_mask(length, token_ids.device).expand(num_rows, -1, -1)
        if self.causal is None:
            self.causal = _causal_mask(_MANY_POSITIONS, token_ids.device)
        return self.causal[:length, :length].expand(num_rows, -1, -1)

    def _step_0(self, token_ids, hidden, position_ids, mask, cache, num_outputs: int | None = None) -> torch.Tensor:
        """Step 0's output; the modules of other steps only keep their keys and values."""
        for step in self.prefill_steps[:-1]:
            self._run(step, token_ids, hidden, mask, position_ids, cache, num_outputs=0)
        return self._run(self.prefill_steps[-1], token_ids, hidden, mask, position_ids, cache, num_outputs)

    def _remember_last(self, token_ids, output, position_ids, num_new: torch.Tensor | int) -> None:
        """Keep the state that the next tree starts from; `num_new` has a number for each sequence `(B,)`, or is one for all."""
        places = slice(None) if isinstance(num_new, int) else torch.arange(len(num_new), device=output.device)
        last = (places, num_new - 1)
        # A copy, since a view would keep the whole output in memory.
        self.last_hidden = output[last].clone()
        self.last_position = position_ids[last]
        self.root_ids = token_ids[last]

    def grow(self, settings, coupling: Coupling | None = None) -> Tree:
        """Steps 0 to `settings.depth - 1`: draw a tree below each sequence's last committed token.

        Args:
            settings (`TreeSettings`): `depth` 0 gives the root alone.
            coupling (`Coupling`, *optional*): see [`~Drafter.draw`].
        Returns:
            `Tree` with `settings.num_nodes` drafted nodes in every sequence.
        """
        if settings.depth == 0:
            return root_tree(self.root_ids)
        pool = self.draw(settings.top_k, settings.depth, coupling=coupling)
        return select_nodes(self.root_ids, pool, settings.num_nodes)

    def draw(
        self,
        top_k: int,
        depth: int,
        choose_width: Callable[[torch.Tensor], int] | None = None,
        coupling: Coupling | None = None,
    ) -> CandidatePool:
        """Run draft steps 0 to `depth - 1` and return everything that they propose.

        Args:
            top_k (`int`): children of every node, and nodes that a step expands at most.
            depth (`int`): steps at most, 1 or more.
            choose_width (`Callable`, *optional*): called before each later step with the cumulative log-probabilities
                `(B, K, top_k)` of the nodes that the step before has drawn; returns how many of them, the best, the step
                expands; 0 for no more steps. Without it, `top_k`.
            coupling (`Coupling`, *optional*): the random numbers that the target will sample with. Nodes are then
                proposed by how likely they are to be chosen with these.
        """
        num_rows, device = self.root_ids.shape[0], self.root_ids.device
        frontier, steps = _Frontier(self), []
        # The root's children are proposed by the output at the last committed position.
        output = self.last_hidden[:, None]
        log_probs = torch.zeros((num_rows, 1), dtype=torch.float32, device=device)
        candidates = torch.full((num_rows, 1), -1, dtype=torch.long, device=device)  # pool index of each node, -1 the root
        ancestors = torch.zeros((num_rows, 1, -(-top_k * depth // 64)), dtype=torch.long, device=device)  # no bits
        num_drawn = 0
        for next_step in range(1, depth + 1):
            child_ids, child_log_probs = self._propose(output, top_k, next_step - 1, coupling)  # [B, K, top_k]
            width = top_k if next_step < depth else 0
            if width > 0 and choose_width is not None:
                width = choose_width(log_probs[..., None] + child_log_probs)
            if width == 0:
                steps.append((child_ids.flatten(1), candidates, (log_probs[..., None] + child_log_probs).flatten(1)))
                break
            grown = grow_tree(child_ids, child_log_probs, log_probs, ancestors, width, frontier.num_nodes)
            steps.append((child_ids.flatten(1), candidates, grown.all_log_probs))
            candidates, log_probs, ancestors = grown.chosen + num_drawn, grown.log_probs, grown.ancestors
            num_drawn += grown.all_log_probs.shape[1]
            hidden = output.gather(1, grown.parents[..., None].expand(-1, -1, output.shape[-1]))
            output = frontier.step(next_step, grown.token_ids, hidden, ancestors)  # [B, K, D]
        self.cache.forget_appended()
        return CandidatePool(steps)

    def _propose(self, output, top_k: int, depth: int, coupling: Coupling | None):
        """Children of nodes at a depth: the draft's likeliest tokens, or those likeliest to be chosen with the known draws."""
        if coupling is None:
            return self.draft.propose(output, top_k, self.text)
        num_competing = min(max(NUM_COMPETING, top_k), self.draft.config.num_draft_tokens)
        token_ids, log_probs = self.draft.propose(output, num_competing, self.text)
        return coupling.likeliest(depth, token_ids, log_probs, top_k)

    def _mask(
        self, ancestors: torch.Tensor, places: Sequence[int], dtype: torch.dtype, bits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mask of new nodes, from their ancestors `(B, N, R)` among the R new keys, the places of these keys after the
        committed ones, and the ancestors as bits where these were made."""
        visible, node_index, window = visible_keys(self.cache.committed, ancestors), None, None
        if self._hides(visible.shape[2]):
            window = self.draft.config.sliding_window
            index = [[length + place for place in places] for length in self.cache.lengths]
            node_index = on_device(index, visible.device)  # [B, R]
            key_index = torch.cat((self.cache.places(), node_index), dim=1)  # [B, P + R]
            visible = visible & within_window(node_index[:, -ancestors.shape[1] :], key_index, window)
        if self.shapes is not None:
            visible = pad(visible, (0, self.shapes.capacity - visible.shape[2]))
            return attention_mask(visible, self.attn_implementation, dtype)
        mask = attention_mask(visible, self.attn_implementation, dtype)
        attach_starts(mask, self.cache.starts)
        if self.attn_implementation != PRISM_TREE:
            return mask
        bits = pack_ancestors(ancestors) if bits is None else bits
        return attach_tree(mask, bits, self.cache.committed, node_index, window)

    def keep_sequences(self, places: list[int]) -> None:
        """Keep only the sequences at these places of the batch."""
        if self._cache is None:
            return
        self._cache.keep_sequences(places)
        index = on_device(places, self.root_ids.device)
        self.last_hidden = self.last_hidden[index]
        self.last_position = self.last_position[index]
        self.root_ids = self.root_ids[index]


class _Frontier:
    """Runs the modules over a growing tree, each over the nodes that its cache does not hold yet."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        # How many steps' nodes each cache holds: all modules share one cache, or each has its own.
        self.num_held = [0] * len(drafter.prefill_steps)
        self.num_nodes = 0  # R
        self.places: list[int] = []  # of each node, counted from the first position that is not committed
        # Of each step's nodes: token ids, hidden states, positions, and ancestor bits over all nodes.
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def step(self, step: int, token_ids, hidden, ancestors) -> torch.Tensor:
        """Outputs `(B, K, D)` of a draft step over the frontier, given the ancestor bits `(B, K, words)` of its nodes."""
        drafter, width = self.drafter, token_ids.shape[1]
        if drafter.shapes is not None:
            # No node descends from padding, so none sees it.
            token_ids, hidden, ancestors = _padded(drafter.shapes.width, token_ids, hidden, ancestors)
        num_new = token_ids.shape[1]
        position_ids = (drafter.last_position[:, None] + step).expand(-1, num_new)
        self.steps.append((token_ids, hidden, position_ids, ancestors))
        self.num_nodes += num_new
        self.places += [step - 1] * num_new
        cache_index = drafter.draft.config.module_of_step(step) if len(self.num_held) > 1 else 0
        missing = self.steps[self.num_held[cache_index] :]
        self.num_held[cache_index] = len(self.steps)
        if len(missing) > 1:
            token_ids, hidden, position_ids, ancestors = (torch.cat(parts, dim=1) for parts in zip(*missing, strict=True))
        mask = drafter._mask(unpack_ancestors(ancestors, self.num_nodes), self.places, hidden.dtype, ancestors)
        output = drafter._run(step, token_ids, hidden, mask, position_ids, drafter.cache.cache)
        first = output.shape[1] - num_new
        return output[:, first : first + width]


def _padded(length: int, *states: torch.Tensor) -> list[torch.Tensor]:
    """Tensors `(B, n, ...)` padded with zeros at the end, `(B, length, ...)`."""
    return [pad(one, (0, 0) * (one.dim() - 2) + (0, length - one.shape[1])) for one in states]


def _with_usual_strides(states: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a contiguous copy of a slice. Graphs are compiled for certain strides, even for a batch of one
    sequence, where any stride counts as contiguous."""
    is_slice = states.storage_offset() > 0 or not states.is_contiguous()
    return states.clone(memory_format=torch.contiguous_format) if is_slice else states
