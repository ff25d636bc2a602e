"""The PRISM draft as a model of vLLM, which it runs as the drafter of its method "eagle3".

vLLM calls `combine_hidden_states` once at the start of a round and then `forward` once for each draft step, so a count of
the calls is the draft step, and picks the processing module. All modules share the attention layers, and with them one set
of keys and values: what a draft with `context_kv="prefill_module"` was trained for.
Shape letters: N tokens of a batch, L fused target layers, D draft hidden size, E head dimension, W draft vocabulary,
V vocabulary.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import maybe_prefix
from vllm.tokenizers import get_tokenizer

from transformers_prism_vllm.cpu_sampling import mend_cpu_sampling
from transformers_prism_vllm.final_norm import SAVED_NAME, read_final_norm
from transformers_prism_vllm.half_linear import draft_linear, takes_half
from transformers_prism_vllm.target_checks import check_engine, check_target, embedding_scale

logger = init_logger("vllm.transformers_prism_vllm")


class PrismDecoderLayer(nn.Module):
    """The parameters of one decoder layer; the attention, which holds keys and values, is shared between modules.

    Args:
        config (`PrismConfig`): of the draft.
        has_input_norm (`bool`): the first layer of a module has none.
    """

    def __init__(self, config, has_input_norm: bool):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.sizes = [heads * config.head_dim for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        self.input_layernorm = RMSNorm(width, eps=eps) if has_input_norm else None
        self.qkv_proj = draft_linear(width, sum(self.sizes), config.attention_bias)
        self.head_norms = None
        if config.query_key_norm:
            self.head_norms = nn.ModuleList(RMSNorm(config.head_dim, eps=eps) for _ in "qk")
        self.o_proj = draft_linear(self.sizes[0], width, config.attention_bias)
        self.post_attention_layernorm = RMSNorm(width, eps=eps)
        self.gate_up_proj = draft_linear(width, 2 * config.intermediate_size, config.mlp_bias)
        self.down_proj = draft_linear(config.intermediate_size, width, config.mlp_bias)
        self.activation = SiluAndMul()

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, rotary: nn.Module, attention: Attention):
        """One layer over `(N, D)` at positions `(N,)`."""
        attention_input = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)
        queries, keys, values = self.qkv_proj(attention_input).split(self.sizes, dim=-1)
        if self.head_norms is not None:
            queries, keys = (_norm_heads(norm, states) for norm, states in zip(self.head_norms, (queries, keys), strict=True))
        queries, keys = rotary(positions, queries, keys)
        hidden_states = hidden_states + self.o_proj(attention(queries, keys, values))
        gated = self.activation(self.gate_up_proj(self.post_attention_layernorm(hidden_states)))
        return hidden_states + self.down_proj(gated)


def _norm_heads(norm: RMSNorm, states: torch.Tensor) -> torch.Tensor:
    """The norm of each head, over `(N, heads * E)`."""
    return norm(states.unflatten(-1, (-1, norm.weight.shape[0])).contiguous()).flatten(-2)


class PrismProcessingModule(nn.Module):
    """The parameters of one group of draft steps: input projection and decoder layers."""

    def __init__(self, config):
        super().__init__()
        self.input_projection = draft_linear(2 * config.hidden_size, config.hidden_size, config.projection_bias)
        self.layers = nn.ModuleList(PrismDecoderLayer(config, index > 0) for index in range(config.num_layers_per_module))


class PrismModel(nn.Module):
    """All that a draft computes before its head.

    Args:
        config (`PrismConfig`): of the draft.
        vllm_config (`VllmConfig`): of the engine.
        prefix (`str`): of names in the engine.
    """

    def __init__(self, config, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config, target = config, vllm_config.model_config.hf_text_config
        width, eps, num_states = config.hidden_size, config.rms_norm_eps, len(config.target_layer_ids)
        # vLLM puts the target's in its place; until then it wants one of the same width.
        self.embed_tokens = nn.Embedding(1 if config.share_target_embedding else config.vocab_size, width)
        self.embedding_scale = embedding_scale(config, target)
        self.fusion_layer: nn.Module | None = None
        self.target_norm: nn.ModuleList | None = None
        self.final_norm: nn.Parameter | None = None
        if num_states > 1:
            self.fusion_layer = draft_linear(num_states * config.target_hidden_size, width, config.projection_bias)
        if config.target_norm != "none":
            num_norms = 1 if config.target_norm == "joint" else num_states
            norm_width = num_states * config.target_hidden_size // num_norms
            self.target_norm = nn.ModuleList(RMSNorm(norm_width, eps=eps) for _ in range(num_norms))
        if config.target_layer_ids[-1] == target.num_hidden_layers:
            self.final_norm = nn.Parameter(torch.empty(config.target_hidden_size, dtype=torch.float32), requires_grad=False)
            self.final_norm_eps = target.rms_norm_eps
        self.processing_modules = nn.ModuleList(PrismProcessingModule(config) for _ in range(config.num_processing_modules))
        self.rotary_emb = get_rope(
            config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        cache_config = copy.copy(vllm_config.cache_config)
        # The draft's own window, or none, whatever the target's.
        cache_config.sliding_window = config.sliding_window
        first = vllm_config.model_config.get_total_num_hidden_layers()  # layers are numbered on from the target's
        self.attentions = nn.ModuleList(
            Attention(
                config.num_attention_heads,
                config.head_dim,
                config.head_dim**-0.5,
                num_kv_heads=config.num_key_value_heads,
                cache_config=cache_config,
                prefix=f"{prefix}.layers.{first + index}.self_attn.attn",
            )
            for index in range(config.num_layers_per_module)
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(N, D)` as the layer gives them."""
        return self.embed_tokens(input_ids)

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """Join the target's states `(N, L * target_hidden_size)`, the last one before the final norm, to `(N, D)`."""
        dtype, layers = states.dtype, states.unflatten(-1, (len(self.config.target_layer_ids), -1))
        if self.final_norm is not None:
            normed = _rms_norm(layers[:, -1], self.final_norm_eps) * self.final_norm
            layers = torch.cat((layers[:, :-1], normed.to(dtype)[:, None]), dim=1)
        if self.fusion_layer is None:
            return layers[:, 0]
        if self.config.normalize_target_hidden:
            layers = _rms_norm(layers, self.config.rms_norm_eps).to(dtype)
        states = layers.flatten(-2)
        if self.target_norm is not None:
            parts = states.chunk(len(self.target_norm), dim=-1)
            states = torch.cat([norm(part.contiguous()) for norm, part in zip(self.target_norm, parts, strict=True)], dim=-1)
        return self.fusion_layer(states)

    def forward(self, module: int, positions: torch.Tensor, embeddings: torch.Tensor, hidden_states: torch.Tensor):
        """Run one processing module over embeddings and states `(N, D)` at positions `(N,)`."""
        processing_module: Any = self.processing_modules[module]
        if self.embedding_scale != 1.0:
            embeddings = embeddings * self.embedding_scale
        hidden_states = processing_module.input_projection(torch.cat((embeddings, hidden_states), dim=-1))
        for layer, attention in zip(processing_module.layers, self.attentions, strict=True):
            hidden_states = layer(positions, hidden_states, self.rotary_emb, attention)
        return hidden_states


def _rms_norm(states: torch.Tensor, eps: float) -> torch.Tensor:
    """States divided by their root mean square, in float32."""
    states = states.float()
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps)


class PrismDraftModel(Eagle3LlamaForCausalLM):
    """A PRISM draft. vLLM's proposer asks for this parent class; nothing of it is used but its type.

    Args:
        vllm_config (`VllmConfig`): of the engine.
        prefix (`str`): of names in the engine.
    Raises:
        ValueError: if draft, target and engine cannot work together.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        check_engine(vllm_config)
        speculative, target = vllm_config.speculative_config, vllm_config.model_config
        self.config = config = speculative.draft_model_config.hf_config
        tokenizer = None if target.skip_tokenizer_init else _tokenizer_of(target)
        if (warning := check_target(config, target.hf_text_config, target.model, tokenizer)) is not None:
            logger.warning(warning)
        if vllm_config.device_config.device_type == "cpu" and mend_cpu_sampling():
            logger.info("Mended how this release of vLLM verifies sampled draft tokens on a CPU.")
        self.target_config = target
        self.num_draft_steps = speculative.num_speculative_tokens
        self.is_dynamic = speculative.uses_dynamic_speculative_decoding()
        self.draft_step = self.num_rounds = 0
        self.model = PrismModel(config, vllm_config, maybe_prefix(prefix, "model"))
        # Read by vLLM's proposer, which then lends the target's layers.
        self.has_own_embed_tokens = not config.share_target_embedding
        self.has_own_lm_head = not config.share_target_head
        if self.has_own_lm_head:
            self.lm_head = draft_linear(config.hidden_size, config.draft_vocab_size, bias=False)
        draft_to_target = None
        if config.has_draft_to_target:
            draft_to_target = torch.empty(config.draft_vocab_size, dtype=torch.long)
        self.register_buffer("draft_to_target", draft_to_target)
        self.head: Any = None  # over the draft vocabulary, once the target's is there

    def combine_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Begin a round: join the target's states `(N, L * target_hidden_size)` to `(N, D)`."""
        self._check_round()
        self.draft_step = 0
        return self.model.fuse(hidden_states)

    def _check_round(self) -> None:
        """Say so once if draft steps of the round before did not reach [`forward`], as when a graph replays them."""
        self.num_rounds += 1
        expected = 1 if self.is_dynamic else self.num_draft_steps
        if self.num_rounds > 1 and self.draft_step < expected:
            logger.error_once(
                "A PRISM draft expected %d draft steps in each round, got %d: its steps ran without a call of its forward, "
                "so they did not change the processing module. The output is right, but fewer tokens are accepted. Set "
                "enforce_eager=True, or the environment variable VLLM_USE_V2_MODEL_RUNNER=0.",
                expected,
                self.draft_step,
            )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the next draft step over tokens `(N,)` and states `(N, D)`; returns its outputs, twice: what the head reads
        and what the next step does."""
        if self.head is None:
            self._take_head()
        steps = self.config.draft_step_to_module
        module = steps[min(self.draft_step, len(steps) - 1)]
        self.draft_step += 1
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        output = self.model(module, positions, embeddings, hidden_states)
        return output, output

    def _take_head(self) -> None:
        """Make the head over the draft vocabulary: the draft's own, the target's, or a copy of rows of the target's.

        vLLM lends the target's layers after the draft is loaded, and runs the draft once before any request.
        """
        head, config = self.lm_head, self.config
        for name, layer in (("embedding", self.model.embed_tokens), ("vocabulary head", head)):
            weight, is_lent = layer.weight, not getattr(self, f"has_own_{'lm_head' if layer is head else 'embed_tokens'}")
            is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.shape[-1:] == (config.hidden_size,)
            if is_lent and not is_plain:
                raise ValueError(
                    f"expected a target whose {name} is a matrix of plain numbers, {config.hidden_size} wide, got "
                    f"{tuple(weight.shape)} in {weight.dtype}; serve a target whose {name} is not quantised"
                )
        if self.has_own_lm_head or (self.draft_to_target is None and not takes_half(head.weight)):
            self.head = head
            return
        kept = slice(config.vocab_size) if self.draft_to_target is None else self.draft_to_target
        bias, weight = getattr(head, "bias", None), head.weight
        rows = draft_linear(config.hidden_size, config.draft_vocab_size, bias=bias is not None).to(weight.device, weight.dtype)
        rows.weight.data.copy_(weight[kept])
        if bias is not None:
            rows.bias.data.copy_(bias[kept])
        rows.quant_method.process_weights_after_loading(rows)
        self.head = rows

    def _draft_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(N, W)` over the draft vocabulary, scaled and capped as the target's own."""
        bias = getattr(self.head, "bias", None)
        logits = self.head.quant_method.apply(self.head, hidden_states, bias)[..., : self.config.draft_vocab_size]
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if (cap := self.config.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(N, V)`, minus infinity for tokens that the draft cannot propose."""
        logits = self._draft_logits(hidden_states)
        if self.draft_to_target is None:
            return logits
        full = logits.new_full((len(logits), self.config.vocab_size), float("-inf"))
        return full.index_copy_(1, self.draft_to_target, logits)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The most probable tokens `(N,)`; what vLLM calls with `use_local_argmax_reduction`."""
        tokens = self._draft_logits(hidden_states).argmax(dim=-1)
        return tokens if self.draft_to_target is None else self.draft_to_target[tokens]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a draft's safetensors file; returns the names of all parameters.

        Raises:
            ValueError: listing weights that are missing, unknown or of another shape.
        """
        found = dict(weights)
        wanted = self._places()
        if self.model.final_norm is not None and SAVED_NAME not in found:
            target = self.target_config
            found[SAVED_NAME] = read_final_norm(target.model, target.revision, target.hf_text_config)
        if self.model.final_norm is None:
            found.pop(SAVED_NAME, None)
        wrong = [f"{name} is missing" for name in sorted(wanted.keys() - found.keys())]
        wrong += [f"{name} is unknown" for name in sorted(found.keys() - wanted.keys())]
        for name in wanted.keys() & found.keys():
            if wanted[name].shape != found[name].shape:
                wrong.append(f"{name} has shape {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}")
        if wrong:
            raise ValueError(f"expected exactly the weights that the draft's configuration describes, got: {'; '.join(wrong)}")
        for name, place in wanted.items():
            place.copy_(found[name])
        self._check_values()
        return {name for name, _ in self.named_parameters()}

    def _places(self) -> dict[str, torch.Tensor]:
        """Where each weight of a draft's file goes, under its name there; several join to one product here."""
        places: dict[str, torch.Tensor] = {}
        model, modules = self.model, list[Any](self.model.processing_modules)

        def add(name: str, layer: nn.Module | None, rows: slice = slice(None)) -> None:
            if layer is not None:
                for kind, parameter in layer.named_parameters(recurse=False):
                    places[f"{name}.{kind}"] = parameter.data[rows]

        add("fusion_layer", model.fusion_layer)
        for index, norm in enumerate(model.target_norm or ()):
            add(f"target_norm.{index}", norm)
        if model.final_norm is not None:
            places[SAVED_NAME] = model.final_norm.data
        if self.has_own_embed_tokens:
            add("embed_tokens", model.embed_tokens)
        if self.has_own_lm_head:
            add("lm_head", self.lm_head)
        if self.draft_to_target is not None:
            places["draft_to_target"] = self.draft_to_target
        for index, module in enumerate(modules):
            name = f"processing_modules.{index}"
            add(f"{name}.input_projection", module.input_projection)
            for depth, layer in enumerate(module.layers):
                _add_layer(add, f"{name}.layers.{depth}", layer, self.config.intermediate_size)
        return places

    def _check_values(self) -> None:
        """Refuse a draft vocabulary with tokens that the target does not have."""
        ids = self.draft_to_target
        if ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"draft_to_target: expected token ids of 0..{self.config.vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}"
            )


def _add_layer(add, name: str, layer: PrismDecoderLayer, intermediate_size: int) -> None:
    """Call `add(name, layer, rows)` for each weight of a decoder layer."""
    add(f"{name}.input_layernorm", layer.input_layernorm)
    add(f"{name}.post_attention_layernorm", layer.post_attention_layernorm)
    start = 0
    for kind, size in zip("qkv", layer.sizes, strict=True):
        add(f"{name}.self_attn.{kind}_proj", layer.qkv_proj, slice(start, start + size))
        start += size
    for kind, norm in zip("qk", layer.head_norms or (), strict=False):
        add(f"{name}.self_attn.{kind}_proj.norm", norm)
    add(f"{name}.self_attn.o_proj", layer.o_proj)
    add(f"{name}.mlp.gate_proj", layer.gate_up_proj, slice(None, intermediate_size))
    add(f"{name}.mlp.up_proj", layer.gate_up_proj, slice(intermediate_size, None))
    add(f"{name}.mlp.down_proj", layer.down_proj)


def _tokenizer_of(target):
    return get_tokenizer(
        target.tokenizer,
        tokenizer_mode=target.tokenizer_mode,
        revision=target.tokenizer_revision,
        trust_remote_code=target.trust_remote_code,
    )
