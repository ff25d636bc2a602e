"""Training-time-test steps, called aligned forwards here: in training a draft computes what it computes in decoding.

Forward k is draft step k. Its query at row i plays the node k draft steps below the last committed row i - k. It sees the
committed rows j <= i - k through the keys and values of step 0, and the k nodes of its own path, rows i - k + s for
s = 1..k, through the keys and values of step s. Each query has one key of each of these steps (a diagonal of the scores), so
a forward reuses all earlier keys and values. It makes no score matrix on a GPU (Triton) or a CPU (`flash_alignment.py`);
elsewhere it makes one of T x (T + k) per head group.
With `context_kv="own_module"` each module keeps keys and values of its own for every step. A sliding window is one more
bound on what a query sees, like the first row of a packed sequence.

Shape letters: B batch, T rows, D hidden, H query heads, G key/value heads, R = H / G, E head dim, S draft steps.
Source: context alignment of HASS (arXiv:2408.15766) and PRISM (arXiv:2602.01762), made equal to decoding.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from transformers_prism.kernels.context_alignment_attention import (
    context_alignment_attention,
    context_alignment_attention_reference,
)
from transformers_prism.kernels.dispatch import use_triton
from transformers_prism.training.flash_alignment import flash_alignment_attention


def aligned_forward(
    draft, input_ids: torch.LongTensor, target_hidden: torch.Tensor, num_steps: int, is_detached: bool = False,
    checkpoint_activations: bool = False, implementation: str = "auto"
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
        implementation (`str`): of the attention: "auto", "triton" or "torch"; see [`context_alignment_attention`].
    Returns:
        `list` of S predicted hidden states of shape `(B, T, D)`; rows 0..k-1 of each sequence have no valid history in
        entry k, as [`history_mask`] says.
    Raises:
        ValueError: if `num_steps` is below 1, shapes disagree, or options exclude each other, saying expected and got.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    width = draft.config.fused_hidden_size
    if target_hidden.shape != (*input_ids.shape, width):
        raise ValueError(
            f"target_hidden: expected shape {(*input_ids.shape, width)}, got {tuple(target_hidden.shape)}"
        )
    passes = AlignedPasses(draft, input_ids, checkpoint_activations, implementation)
    stream = draft.fuse(target_hidden)
    predictions: list[torch.Tensor] = []
    for _ in range(num_steps):
        predictions.append(passes.predict(stream))
        prediction = predictions[-1].detach() if is_detached else predictions[-1]
        # A node's input is its parent's output; row 0 has no parent and keeps what it had.
        stream = torch.cat((stream[:, :1], prediction[:, :-1]), dim=1)
    return predictions


class AlignedPasses:
    """The keys and values that each training-time-test step keeps for later steps.

    A view holds, for each draft step and layer, keys and values `(B, G, T, E)`. There is one view that all modules
    write to, or one for each module. Arguments are those of [`aligned_forward`].
    """

    def __init__(
        self, draft, input_ids: torch.LongTensor, checkpoint_activations: bool = False, implementation: str = "auto"
    ):
        self.draft, self.implementation = draft, implementation
        self.checkpoint_activations = checkpoint_activations
        self.embeddings = draft.embed(input_ids)
        position_ids = torch.arange(input_ids.shape[1], device=self.embeddings.device)[None]
        self.position_embeddings = draft.rotary_emb(self.embeddings, position_ids)
        self.first_seen = _first_seen(input_ids.shape, draft.config.sliding_window, self.embeddings.device)
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
        # Earlier steps of other modules, which this view lacks: only their keys and values are needed.
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
        return self.draft.output_states(hidden_states)

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
        if len(keys_values) == 1 and self.first_seen is None:
            keys, values = keys_values[0]
            output = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=attention.scaling, enable_gqa=True
            ).transpose(1, 2)
        elif self._has_kernel(queries):
            keys, values = ([pair[one] for pair in keys_values] for one in range(2))
            output = context_alignment_attention(
                queries, keys, values, self.first_seen, attention.scaling, self.implementation
            )
        elif queries.device.type == "cpu":
            keys, values = ([pair[one] for pair in keys_values] for one in range(2))
            window = self.draft.config.sliding_window
            output = flash_alignment_attention(queries, keys, values, attention.scaling, window)
        else:
            output = self._attend_by_group(queries, keys_values, attention.scaling)
        return output.flatten(2)  # [B, T, H * E]

    def _has_kernel(self, queries: torch.Tensor) -> bool:
        return queries.dtype != torch.float64 and use_triton(self.implementation, queries.device)

    def _attend_by_group(self, queries: torch.Tensor, keys_values, scale: float) -> torch.Tensor:
        """One head group at a time, `(B, T, H, E)`, so that only one group's scores are in memory."""
        parts = []
        num_groups = keys_values[0][0].shape[1]
        for group, group_queries in enumerate(queries.chunk(num_groups, dim=1)):
            keys, values = ([pair[one][:, group : group + 1] for pair in keys_values] for one in range(2))
            parts.append(self._maybe_again(self._define, group_queries, keys, values, self.first_seen, scale))
        return torch.cat(parts, dim=2)

    def _define(self, queries, keys, values, starts, scale: float) -> torch.Tensor:
        return context_alignment_attention_reference(queries, keys, values, starts, scale)

    def _maybe_again(self, function, *args):
        """Call a function; with activation checkpointing it is called again in the backward pass."""
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)


def _first_seen(shape: torch.Size, sliding_window: int | None, device) -> torch.Tensor | None:
    """The first row that each row sees through a window, `(B, T)`; None: all from row 0 on."""
    if sliding_window is None or shape[1] <= sliding_window:
        return None
    return (torch.arange(shape[1], device=device) - sliding_window + 1).clamp(min=0).expand(shape).contiguous()


def history_mask(num_rows: int, num_steps: int, device=None) -> torch.Tensor:
    """Rows of each aligned forward that have a valid history, False at rows 0..k-1 in forward k: `(S, T)`."""
    return torch.arange(num_rows, device=device) >= torch.arange(num_steps, device=device)[:, None]
