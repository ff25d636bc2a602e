"""The aligned forwards: what a draft computes while it trains is what it computes while it decodes.

Forward k stands for draft step k. Its query at row i plays the node that k draft steps below the last committed row
i - k: it sees the committed rows j <= i - k through the keys and values of step 0, and the k nodes of its own path at
rows i - k + s, for s = 1..k, through the keys and values of step s. Those k extra keys are diagonals, since every
query has one of each, so a forward holds one score matrix of T x (T + k) and reuses all earlier keys and values.
With `context_kv="own_module"` each module keeps keys and values of its own for every step.

Shape letters: B batch, T rows, D hidden, H query heads, G key/value heads, R = H / G, E head dim, S draft steps.
Source: context alignment of HASS (arXiv:2408.15766) and PRISM (arXiv:2602.01762), made equal to decoding.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def aligned_forward(
    draft,
    input_ids: torch.LongTensor,
    target_hidden: torch.Tensor,
    num_steps: int,
    is_detached: bool = False,
    checkpoint_activations: bool = False,
    unmasked_softmax: bool = False,
) -> list[torch.Tensor]:
    """Run `num_steps` draft steps over all rows at once, each fed the predictions of the one before.

    Args:
        draft (`PrismDraftModel`): bound to its target.
        input_ids (`torch.LongTensor` of shape `(B, T)`): at row t the token after the one of `target_hidden[:, t]`;
            rows are padded on the right.
        target_hidden (`torch.Tensor` of shape `(B, T, L * target_hidden_size)`): the target's states.
        num_steps (`int`): forwards S, step 0 included.
        is_detached (`bool`): stop gradients between one step's prediction and the next step's input, as HASS does.
        checkpoint_activations (`bool`): keep no scores and no MLP activations, and compute them again in the backward
            pass.
        unmasked_softmax (`bool`): repeat a mistake of the authors' training code, for comparisons: later rows and
            padding count in every softmax with a score of 0, though decoding never sees them.
    Returns:
        `list` of S predicted hidden states of shape `(B, T, D)`; rows 0..k-1 of entry k have no valid history.
    Raises:
        ValueError: if `num_steps` is below 1 or shapes disagree, saying expected and got.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    width = draft.config.fused_hidden_size
    if target_hidden.shape != (*input_ids.shape, width):
        raise ValueError(
            f"target_hidden: expected shape {(*input_ids.shape, width)}, got {tuple(target_hidden.shape)}"
        )
    passes = AlignedPasses(draft, input_ids, checkpoint_activations, unmasked_softmax)
    stream = draft.fuse(target_hidden)
    predictions: list[torch.Tensor] = []
    for _ in range(num_steps):
        predictions.append(passes.predict(stream))
        prediction = predictions[-1].detach() if is_detached else predictions[-1]
        # A node's input is its parent's output; row 0 has no parent and keeps what it had.
        stream = torch.cat((stream[:, :1], prediction[:, :-1]), dim=1)
    return predictions


class AlignedPasses:
    """The keys and values that aligned forwards leave behind for later ones.

    A view holds, for each draft step and layer, keys and values `(B, G, T, E)`. There is one view that all modules
    write to, or one for each module.

    Args:
        draft (`PrismDraftModel`): its weights are used, not its forward.
        input_ids (`torch.LongTensor` of shape `(B, T)`): tokens, the same for every step.
        checkpoint_activations, unmasked_softmax (`bool`): see [`aligned_forward`].
    """

    def __init__(
        self,
        draft,
        input_ids: torch.LongTensor,
        checkpoint_activations: bool = False,
        unmasked_softmax: bool = False,
    ):
        self.draft = draft
        self.checkpoint_activations, self.unmasked_softmax = checkpoint_activations, unmasked_softmax
        self.embeddings = draft.embed(input_ids)
        position_ids = torch.arange(input_ids.shape[1], device=self.embeddings.device)[None]
        self.position_embeddings = draft.rotary_emb(self.embeddings, position_ids)
        self.streams: list[torch.Tensor] = []
        self.has_own_views = draft.config.context_kv == "own_module"
        num_views = draft.config.num_processing_modules if self.has_own_views else 1
        self.views: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = [[] for _ in range(num_views)]

    def predict(self, stream: torch.Tensor) -> torch.Tensor:
        """The next draft step over its input `stream`: predicted hidden states, both of shape `(B, T, D)`."""
        self.streams.append(stream)
        step = len(self.streams) - 1
        module = self.draft.config.module_of_step(step)
        view = self.views[module if self.has_own_views else 0]
        # Steps of other modules that this one has not seen yet: only their keys and values are needed.
        while len(view) < step:
            self._run(self.draft.processing_modules[module], view, len(view), needs_output=False)
        return self._run(self.draft.processing_modules[module], view, step, needs_output=True)

    def _run(self, module, view, step: int, needs_output: bool):
        hidden_states = module.project(self.embeddings, self.streams[step])
        view.append([])
        for index, layer in enumerate(module.layers):
            is_last = index == len(module.layers) - 1
            attention_input = layer.attention_input(hidden_states, self.embeddings)
            view[step].append(self._keys_values(layer.self_attn, attention_input))
            if is_last and not needs_output:
                return None
            keys_values = [written[index] for written in view]
            output = self._attend(layer.self_attn, attention_input, keys_values)
            attended = layer.self_attn.o_proj(output)
            hidden_states = self._maybe_again(layer.after_attention, hidden_states, attended)
        return hidden_states

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.draft.config.head_dim)).transpose(1, 2)  # [B, heads, T, E]

    def _keys_values(self, attention, attention_input):
        keys = self._rotate(self._heads(attention.k_proj(attention_input)))
        return keys, self._heads(attention.v_proj(attention_input))

    def _rotate(self, states: torch.Tensor) -> torch.Tensor:
        cos, sin = self.position_embeddings
        rotated, _ = apply_rotary_pos_emb(states, states[:, :0], cos.to(states.dtype), sin.to(states.dtype))
        return rotated

    def _attend(self, attention, attention_input, keys_values) -> torch.Tensor:
        """Attention of step k = len(keys_values) - 1, of shape `(B, T, H * E)`."""
        queries = self._rotate(self._heads(attention.q_proj(attention_input)))  # [B, H, T, E]
        if len(keys_values) == 1 and not self.unmasked_softmax:
            keys, values = keys_values[0]
            output = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True
            )
        else:
            output = self._attend_by_group(queries * attention.scaling, keys_values)
        return output.transpose(1, 2).flatten(2)  # [B, T, H * E]


    def _attend_by_group(self, queries: torch.Tensor, keys_values) -> torch.Tensor:
        """[`aligned_attention`] a head group at a time, so that one group's scores are the most that is in the making."""
        parts = []
        num_groups = keys_values[0][0].shape[1]
        for group, group_queries in enumerate(queries.chunk(num_groups, dim=1)):
            own = [tuple(states[:, group : group + 1] for states in pair) for pair in keys_values]
            parts.append(self._maybe_again(aligned_attention, group_queries, own, self.unmasked_softmax))
        return torch.cat(parts, dim=1)

    def _maybe_again(self, function, *args):
        """Call a function, and once more in the backward pass if activations are not to be kept."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


def aligned_attention(queries: torch.Tensor, keys_values, unmasked_softmax: bool = False) -> torch.Tensor:
    """Attention of draft step k over the committed rows and over its own path.

    Args:
        queries (`torch.Tensor` of shape `(B, H, T, E)`): scaled.
        keys_values (`list` of k + 1 pairs of shape `(B, G, T, E)`): of steps 0..k.
        unmasked_softmax (`bool`): see [`aligned_forward`].
    Returns:
        `torch.Tensor` of shape `(B, H, T, E)`.
    """
    step = len(keys_values) - 1
    keys, values = keys_values[0]
    num_groups, num_rows = keys.shape[1], queries.shape[2]
    grouped = queries.unflatten(1, (num_groups, -1))  # [B, G, R, T, E]
    # The heads of a group share its keys: one product for all of them, without repeating any key.
    scores = (grouped.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (-1, num_rows))  # [B, G, R, T, T]
    rows = torch.arange(num_rows, device=queries.device)
    scores = scores.masked_fill(rows[None, :] > rows[:, None] - step, -torch.inf)
    if unmasked_softmax:
        is_later = rows[None, :] > rows[:, None]
        scores = scores.masked_fill(is_later, 0.0)
    path = [_shift_down(keys_values[s], step - s) for s in range(1, step + 1)]
    path_scores = scores.new_empty(*scores.shape[:-1], 0)  # [B, G, R, T, k]
    if step:
        path_scores = torch.stack([(grouped * path_keys[:, :, None]).sum(-1) for path_keys, _ in path], dim=-1)
    is_before_start = rows[:, None] - step + torch.arange(1, step + 1, device=queries.device) < 0
    path_scores = path_scores.masked_fill(is_before_start, -torch.inf)
    weights = torch.softmax(torch.cat((scores, path_scores), dim=-1), dim=-1, dtype=_softmax_dtype(scores))
    weights = weights.to(values.dtype)
    if unmasked_softmax:
        weights = torch.cat((weights[..., :num_rows].masked_fill(is_later, 0.0), weights[..., num_rows:]), dim=-1)
    output = (weights[..., :num_rows].flatten(2, 3) @ values).unflatten(2, (-1, num_rows))  # [B, G, R, T, E]
    for s, (_, path_values) in enumerate(path):
        output = output + weights[..., num_rows + s, None] * path_values[:, :, None]
    return output.flatten(1, 2)


def _shift_down(keys_values, count: int):
    """Keys and values moved `count` rows towards later rows, so that row i holds what row i - count held."""
    if count == 0:
        return keys_values
    return tuple(F.pad(states, (0, 0, count, 0))[:, :, : states.shape[2]] for states in keys_values)


def _softmax_dtype(scores: torch.Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


def history_mask(num_rows: int, num_steps: int, device=None) -> torch.BoolTensor:
    """Rows of each aligned forward that have a valid history: `(S, T)`, False at rows 0..k-1 of forward k."""
    steps = torch.arange(num_steps, device=device)[:, None]
    return torch.arange(num_rows, device=device)[None] >= steps


__all__ = ["AlignedPasses", "aligned_attention", "aligned_forward", "history_mask"]
