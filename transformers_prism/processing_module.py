"""A processing module: the parameters of one group of draft steps, an input projection and decoder layers.

Shape letters: B batch, T positions, D draft hidden size, E head dimension.
Source: PRISM (arXiv:2602.01762) and its artifact; EAGLE (arXiv:2401.15077) for the form of the decoder layer, EAGLE-3
(arXiv:2503.01840) for the form "eagle3".
"""

import torch
from torch import nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, rotate_half

from .configuration_prism import PrismConfig
from .transformers_names import CACHE_KEYWORD


class HeadNormLinear(nn.Linear):
    """A projection to queries or keys with an RMSNorm of each head, as in Qwen3.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        head_dim (`int`): E.
        eps (`float`): of the norm.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, head_dim: int, eps: float):
        super().__init__(in_features, out_features, bias=bias)
        self.norm = LlamaRMSNorm(head_dim, eps)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normed projection, `(..., heads * E)`."""
        heads = super().forward(input).unflatten(-1, (-1, self.norm.weight.shape[0]))
        return self.norm(heads).flatten(-2)


class PrismDecoderLayer(nn.Module):
    """A Llama decoder layer, except for the attention input of a module's first layer.

    In the form "prism" this is the output of the module's input projection, without a norm, which would only undo its
    scale. In the form "eagle3" it is [normed token embedding ; normed hidden state], twice as wide; the hidden state is
    the residual, and there is no input projection.
    """

    def __init__(self, config: PrismConfig, layer: int, cache_layer: int):
        super().__init__()
        reads_embeddings = layer == 0 and config.module_form == "eagle3"
        self.input_layernorm = self.hidden_norm = None
        if layer > 0 or reads_embeddings:
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_before_residual = reads_embeddings and config.norm_before_residual
        self.self_attn = LlamaAttention(config, layer_idx=cache_layer)
        width = config.hidden_size
        if reads_embeddings:
            self.hidden_norm = LlamaRMSNorm(width, config.rms_norm_eps)
            width *= 2
        for name in ("q_proj", "k_proj", "v_proj"):
            features, bias = (width, getattr(self.self_attn, name).out_features), config.attention_bias
            if config.query_key_norm and name != "v_proj":
                head_norm = (self.self_attn.head_dim, config.rms_norm_eps)
                setattr(self.self_attn, name, HeadNormLinear(*features, bias, *head_norm))
            elif reads_embeddings:
                setattr(self.self_attn, name, nn.Linear(*features, bias=bias))
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def attention_input(self, hidden_states: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """What the attention of this layer reads, of shape `(B, T, D)` or, with the embeddings, `(B, T, 2 * D)`."""
        if self.hidden_norm is not None and self.input_layernorm is not None:
            return torch.cat((self.input_layernorm(embeddings), self.hidden_norm(hidden_states)), dim=-1)
        return hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)

    def after_attention(self, residual: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Add the residual, then the MLP; all of shape `(B, T, D)`. `residual` is the input of the layer."""
        if self.norm_before_residual and self.hidden_norm is not None:
            residual = self.hidden_norm(residual)
        hidden_states = residual + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def forward(
        self,
        hidden_states,
        embeddings,
        position_embeddings,
        attention_mask=None,
        cache=None,
        num_outputs: int | None = None,
    ) -> torch.Tensor:
        """One layer over `(B, T, D)`; writes T keys and values to `cache`. Returns the outputs of all
        positions, or of the last `num_outputs` (0 or 1); only their rows of the mask are read."""
        attention_input = self.attention_input(hidden_states, embeddings)
        if num_outputs is not None and num_outputs < hidden_states.shape[1]:
            num_silent = hidden_states.shape[1] - num_outputs
            silent, attention_input = attention_input[:, :num_silent], attention_input[:, num_silent:]
            self._write_keys(silent, [part[:, :num_silent] for part in position_embeddings], cache)
            hidden_states = hidden_states[:, num_silent:]
            if num_outputs == 0:
                return hidden_states
            position_embeddings = [part[:, num_silent:] for part in position_embeddings]
            attention_mask = None if attention_mask is None else attention_mask[:, :, -num_outputs:]
        attention_output, _ = self.self_attn(
            attention_input,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **{CACHE_KEYWORD: cache},
        )
        return self.after_attention(hidden_states, attention_output)

    def _write_keys(self, attention_input: torch.Tensor, position_embeddings, cache: Cache) -> None:
        """Write keys and values of positions `(B, T, D)` that need no output, as the attention would."""
        attention = self.self_attn
        shape = (*attention_input.shape[:2], -1, attention.head_dim)
        keys, values = (
            projection(attention_input).view(shape).transpose(1, 2)
            for projection in (attention.k_proj, attention.v_proj)
        )
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)  # [B, 1, T, E]
        cache.update(keys * cos + rotate_half(keys) * sin, values, attention.layer_idx)


class PrismProcessingModule(nn.Module):
    """The parameters of one group of draft steps: an input projection and its decoder layers. There is no
    final norm: the output is trained to resemble the target's last, normed hidden state, so the head reads it as it is.
    In the form "eagle3" there is no input projection, and the draft applies a norm before the head, and before the next
    step only with `norm_output`."""

    def __init__(self, config: PrismConfig, module: int):
        super().__init__()
        self.input_projection = None
        if config.module_form == "prism":
            self.input_projection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.projection_bias)
        # Modules share one cache unless each keeps its own view of the committed positions.
        first = module * config.num_layers_per_module if config.context_kv == "own_module" else 0
        self.layers = nn.ModuleList(
            PrismDecoderLayer(config, layer, first + layer) for layer in range(config.num_layers_per_module)
        )

    def project(self, embeddings: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The residual stream that enters the layers, of shape `(B, T, D)`: token embeddings and hidden states joined
        in this order, or the hidden states alone where the first layer reads the embeddings itself."""
        if self.input_projection is None:
            return hidden_states
        return self.input_projection(torch.cat((embeddings, hidden_states), dim=-1))

    def forward(
        self, embeddings, hidden_states, position_embeddings, attention_mask=None, cache=None, num_outputs=None
    ):
        """The layers over the residual stream of T positions, as [`~PrismProcessingModule.project`] returns it; returns
        the predicted hidden states of shape `(B, T, D)`, or of the last `num_outputs` positions. Only the form "eagle3"
        needs the embeddings."""
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                embeddings,
                position_embeddings,
                attention_mask,
                cache,
                num_outputs if layer is self.layers[-1] else None,
            )
        return hidden_states
