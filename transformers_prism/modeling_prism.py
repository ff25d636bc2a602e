"""The PRISM draft: a fusion layer, one processing module per group of draft steps, and the target's own head.

Shape letters: B batch, T positions, D draft hidden size, L fused target layers, V vocabulary, M processing modules.
Source: PRISM (arXiv:2602.01762) and its artifact.
"""

import warnings
from typing import cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from .borrowed_layers import (
    BorrowedLayers,
    TextRows,
    final_norm_of,
    place_of,
    rows_of_head,
    scale_and_cap,
    target_logits,
    tokens_outside,
)
from .configuration_prism import PrismConfig, num_target_layers, target_numerics
from .decoding.drafter import Drafter
from .decoding.speculation import Speculation
from .generation import install, speculative_generate
from .hub.loading import check_memory
from .hub.pretrained import PrismPreTrainedModel, default_generation_config
from .kernels.dispatch import use_triton
from .kernels.fused_input_projection import fused_input_projection
from .kernels.top_k_log_prob import top_k_log_prob, top_k_of_logits
from .packed_layers import refresh_packed_weights
from .processing_module import PrismProcessingModule
from .transformers_names import CACHE_KEYWORD, cache_of
from .tried_releases import errors_tell_of_untried_release


class PrismDraftModel(PrismPreTrainedModel, GenerationMixin):
    """A draft for one target: `target.generate(**inputs, assistant_model=draft)` gives the same output, faster.

    Args:
        config ([`PrismConfig`]): the architecture.
    """

    def __init__(self, config: PrismConfig):
        config.validate_architecture()  # fields may have been set since it was made, as by from_pretrained(field=value)
        check_memory(config)
        super().__init__(config)
        self.fusion_layer = None
        if config.has_fusion_layer:
            self.fusion_layer = nn.Linear(config.fused_hidden_size, config.hidden_size, bias=config.projection_bias)
        self.target_norm = None
        if config.target_norm != "none":
            num_norms = 1 if config.target_norm == "joint" else len(config.target_layer_ids)
            width = config.fused_hidden_size // num_norms
            self.target_norm = nn.ModuleList(LlamaRMSNorm(width, config.rms_norm_eps) for _ in range(num_norms))
        self.processing_modules = nn.ModuleList(
            PrismProcessingModule(config, module) for module in range(config.num_processing_modules)
        )
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.embed_tokens = None
        if not config.share_target_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = None
        if config.module_form == "eagle3":
            self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.share_target_head:
            self.lm_head = nn.Linear(config.hidden_size, config.num_draft_tokens, bias=False)
        draft_to_target = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_to_target", draft_to_target)
        self.generation_config = default_generation_config(config)
        self.last_speculation: Speculation | None = None
        self._borrowed: BorrowedLayers | None = None
        self.post_init()
        install()

    def _apply(self, fn, recurse=True):
        """Keep the rotary frequencies in float32 when the draft is cast to 16 bits, as loading in that dtype does: positions
        of long texts need that precision."""
        super()._apply(fn, recurse)
        frequencies = self.rotary_emb.inv_freq
        if frequencies.dtype.itemsize < torch.float32.itemsize:
            self.rotary_emb = LlamaRotaryEmbedding(self.config).to(frequencies.device)
        return self

    def bind(self, target: PreTrainedModel, tokenizer=None) -> "PrismDraftModel":
        """Borrow the target's embedding and vocabulary head. Nothing is registered, copied, moved or saved, except that the
        head's rows for a draft vocabulary are copied once. The hook into generate() is installed if it is missing.

        Args:
            target (`PreTrainedModel`): the model that this draft speeds up.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the target's; compared with the fingerprint.
        Returns:
            `PrismDraftModel`: itself.
        Raises:
            ValueError: if the two cannot work together, naming both sides.
        """
        install()
        if self.device.type == "meta":
            raise ValueError("expected a draft with weights, got one on the meta device; load it with from_pretrained")
        found, borrowed = BorrowedLayers.of(target), self._borrowed
        # A target may have been given another embedding or head, or other sizes, since the last call.
        is_known = borrowed is not None and borrowed.is_same_as(found)
        if not is_known:
            self._check_target(target, tokenizer)
            found.check_widths(self.config)
            self._borrowed = found
        refresh_packed_weights(self)
        if self.config.share_target_head:
            self._gather_head_rows(looks_closely=True)
        return self

    def _gather_head_rows(self, looks_closely: bool = False) -> None:
        """Keep the head's rows of the draft vocabulary; see [`~BorrowedLayers.gather_rows`]."""
        if self.draft_to_target is not None:
            self._require_target().gather_rows(self.draft_to_target, self._speaking_layer, looks_closely)

    @property
    def _speaking_layer(self) -> nn.Linear:
        """A layer whose class shows how the draft is packed, for [`~BorrowedLayers.kind_of_rows`]."""
        return self._first_attention(0).o_proj

    def _first_attention(self, module: int) -> LlamaAttention:
        """The attention of a processing module's first layer."""
        return cast(PrismProcessingModule, self.processing_modules[module]).layers[0].self_attn

    @property
    def takes_text_rows(self) -> bool:
        """Whether tokens outside the draft vocabulary can be added to it, with rows of the target's head."""
        is_part = self.draft_to_target is not None and self.config.share_target_head
        return is_part and self._require_target().has_plain_head

    def text_rows(self, text_ids: torch.LongTensor) -> TextRows | None:
        """The tokens of a text that extend the draft vocabulary, with their rows of the target's head.

        Args:
            text_ids (`torch.LongTensor` of any shape): the text, in the target's vocabulary.
        Returns:
            `TextRows`: for [`~PrismDraftModel.propose`] and [`~PrismDraftModel.compute_logits`]. None where the draft
            vocabulary has all of them, or cannot be extended (`takes_text_rows`).
        """
        if not self.takes_text_rows:
            return None
        num_head_rows = self._require_target().num_head_rows
        outside = tokens_outside(text_ids, self.draft_to_target, self.config.vocab_size, num_head_rows)
        return self.rows_beside(outside) if len(outside) else None

    def rows_beside(self, token_ids: torch.Tensor, text: TextRows | None = None) -> TextRows:
        """[`~PrismDraftModel.text_rows`] of tokens that are known to be outside the draft vocabulary; never waits for a device.

        Args:
            token_ids (`torch.LongTensor` of shape `(K,)`): such tokens, each once.
            text (`TextRows`, *optional*): rows of other tokens, to which these are added in place; else new rows are made.
        """
        borrowed = self._require_target()
        self._gather_head_rows()
        rows = rows_of_head(borrowed.head, token_ids, borrowed.kind_of_rows(self._speaking_layer))
        if text is None:
            return TextRows(self.draft_to_target, borrowed.draft_head, token_ids, rows)
        text.add(token_ids, rows)
        return text

    def own_tokens(self) -> torch.Tensor:
        """Tokens of the target's vocabulary that a text cannot add: those of the draft vocabulary, and those without logits
        in the head; `(V,)` bool on the host."""
        own = torch.zeros(self.config.vocab_size, dtype=torch.bool, device="cpu")
        own[self.draft_to_target.cpu()] = True
        own[self._require_target().num_head_rows :] = True
        return own

    @property
    def target_head(self) -> object:
        """The target's head, or the copy of its rows for the draft vocabulary; another object once the head has changed."""
        borrowed = self._require_target()
        return borrowed.head if borrowed.head_rows is None else borrowed.head_rows

    def _check_target(self, target, tokenizer):
        """Compare sizes and fingerprint: raise if the two cannot work together, warn if fewer tokens may be accepted."""
        fatal, mild = self.config.target_differences(target.config, tokenizer)
        if fatal:
            raise ValueError("this draft was made for another target. " + "; ".join(fatal))
        if mild:
            warnings.warn(
                "this draft was trained for other weights; the output stays that of the target, but fewer tokens may "
                "be accepted. " + "; ".join(mild),
                stacklevel=4,
            )

    def target_final_norm(self) -> torch.Tensor | None:
        """The factors of the target's final norm, `(target_hidden_size,)`, for engines that hand a draft the last state
        before that norm. None if the draft is not bound or does not read that state, or the norm is no RMSNorm."""
        target = None if self._borrowed is None else self._borrowed.target
        if target is None or self.config.target_layer_ids[-1] != num_target_layers(target.config.get_text_config()):
            return None
        return final_norm_of(target)

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Token embeddings `(B, T, D)` in the draft's dtype and on its device, from its own table or else the target's."""
        if self.embed_tokens is not None:
            return self.embed_tokens(input_ids) * self.config.embedding_scale
        borrowed = self._require_target()
        device, _ = place_of(borrowed.embedding, borrowed.target, self.dtype)
        with torch.no_grad():  # the table is not trained, and its gradient would be as large as the table
            embeddings = borrowed.embedding(input_ids.to(device)) * self.config.embedding_scale
        return embeddings.to(device=self.device, dtype=self.dtype)

    def known_tokens(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Token ids `(B, T)` of a prompt, those without an embedding replaced: placeholders of images may have such ids."""
        table = self.embed_tokens if self.embed_tokens is not None else self._require_target().embedding
        num_rows = getattr(table, "num_embeddings", None)
        return input_ids if num_rows is None else cast(torch.LongTensor, input_ids.clamp(0, num_rows - 1))

    def compute_logits(self, hidden_states: torch.Tensor, text: TextRows | None = None) -> torch.Tensor:
        """Logits over the draft vocabulary, scaled and capped as the target's own.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`): outputs of [`~PrismDraftModel.forward`].
            text (`TextRows`, *optional*): K further tokens.
        Returns:
            `torch.Tensor` of shape `(..., draft_vocab_size or V)` in the head's dtype; a draft token's id in the target's
            vocabulary is `draft_to_target[token]`. With `text` it is K wider, and the id is `text.token_ids[token]`.
        """
        hidden_states = self._head_input(hidden_states)
        logits = self._borrowed_logits(hidden_states, text) if self.lm_head is None else self.lm_head(hidden_states)
        return scale_and_cap(logits, self.config.logit_scale, self.config.logit_softcap)

    def propose(
        self, hidden_states: torch.Tensor, top_k: int, text: TextRows | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The most probable next tokens after each output, best first.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., D)`): outputs of [`~PrismDraftModel.forward`].
            top_k (`int`): tokens to propose.
            text (`TextRows`, *optional*): tokens that it can propose besides the draft vocabulary.
        Returns:
            `tuple`: ids in the target's vocabulary, a `torch.LongTensor` of shape `(..., top_k)`, and their
            log-probabilities in nats, a `torch.FloatTensor` of the same shape; minus infinity in place of NaN.
        """
        head = self.lm_head
        if head is None:
            head = self._require_target().draft_head
        # Subclasses, such as quantised layers or adapters, compute something else.
        device = hidden_states.device
        if type(head) is nn.Linear and use_triton("auto", device) and head.weight.device == device:
            states = self._head_input(hidden_states).to(head.weight.dtype)
            numerics = (self.config.logit_scale, self.config.logit_softcap)
            if text is not None:
                return top_k_log_prob(states, text.weight, top_k, text.bias, text.token_ids, *numerics)
            return top_k_log_prob(states, head.weight, top_k, head.bias, self.draft_to_target, *numerics)
        token_ids, log_probs = top_k_of_logits(self.compute_logits(hidden_states, text), top_k)
        names = self.draft_to_target if text is None else text.token_ids
        return token_ids if names is None else names.take(token_ids), log_probs

    def compute_target_logits(self, hidden_states: torch.Tensor, text: TextRows | None = None) -> torch.Tensor:
        """The target's own logits over the draft vocabulary, which the draft is trained to match.

        Args:
            hidden_states (`torch.Tensor` of shape `(..., target_hidden_size)`): the target's last, normed states.
            text (`TextRows`, *optional*): K further tokens.
        Returns:
            `torch.Tensor` of shape `(..., draft_vocab_size or V)`, K wider with `text`; also if the draft has its own head.
        """
        borrowed = self._require_target()
        self._gather_head_rows()
        return target_logits(borrowed.target, self._borrowed_logits(hidden_states, text))

    def shared_head(self, text: TextRows | None = None) -> tuple[torch.Tensor, dict] | None:
        """The head that both the draft's logits and [`~PrismDraftModel.compute_target_logits`] are made with, for kernels.

        Args:
            text (`TextRows`, *optional*): K further tokens.
        Returns:
            The frozen weight `(draft_vocab_size or V, D)`, K longer with `text`, and `student_scale`, `student_softcap`,
            `teacher_scale` and `teacher_softcap` of the logits. None where the draft has a norm or head of its own, or where
            the target's head is not just a plain matrix on the draft's device.
        """
        borrowed = self._require_target()
        self._gather_head_rows()
        head = borrowed.draft_head
        if self.norm is not None or self.lm_head is not None or type(head) is not nn.Linear or head.bias is not None:
            return None
        if not head.weight.is_floating_point() or head.weight.device != self.device or not head.weight.is_contiguous():
            return None
        numerics = target_numerics(borrowed.target.config)
        return head.weight.detach() if text is None else text.weight, {
            "student_scale": self.config.logit_scale,
            "student_softcap": self.config.logit_softcap,
            "teacher_scale": numerics["logit_scale"],
            "teacher_softcap": numerics["logit_softcap"],
        }

    def head_parameters(self) -> list[nn.Parameter]:
        """The draft's own parameters between a step's output and its logits: a norm and a head, as far as it has them."""
        own = (None if self.config.norm_output else self.norm, self.lm_head)
        return [parameter for module in own if module is not None for parameter in module.parameters()]

    def output_states(self, layer_outputs: torch.Tensor) -> torch.Tensor:
        """A draft step's output, which the next step reads, from the output of its last layer; both `(B, T, D)`."""
        return layer_outputs if self.norm is None or not self.config.norm_output else self.norm(layer_outputs)

    def _head_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The head's input, from a draft step's output; both `(..., D)`."""
        return hidden_states if self.norm is None or self.config.norm_output else self.norm(hidden_states)

    def _borrowed_logits(self, hidden_states: torch.Tensor, text: TextRows | None) -> torch.Tensor:
        """The target's head, or its rows for the draft vocabulary and a text, applied to `(..., D)`; on the draft's device."""
        borrowed = self._require_target()
        head = borrowed.draft_head
        hidden_states = hidden_states.to(*place_of(head, borrowed.target, hidden_states.dtype))
        logits = head(hidden_states)
        return (logits if text is None else torch.cat((logits, *text.logits(hidden_states)), dim=-1)).to(self.device)

    def _require_target(self) -> BorrowedLayers:
        if self._borrowed is None:
            raise ValueError(
                "expected a draft that is bound to its target, got an unbound one; pass it to generate() as "
                "assistant_model, or call draft.bind(target) first"
            )
        return self._borrowed

    def fuse(self, target_hidden: torch.Tensor) -> torch.Tensor:
        """Join the target's L hidden states into one draft input.

        Args:
            target_hidden (`torch.Tensor` of shape `(B, T, L * target_hidden_size)`): states in the order of
                `target_layer_ids`.
        Returns:
            `torch.Tensor` of shape `(B, T, D)`.
        """
        if self.fusion_layer is None:
            return target_hidden.to(self.device, self.dtype)
        if self.config.normalize_target_hidden:
            states = target_hidden.unflatten(-1, (-1, self.config.target_hidden_size)).float()  # [B, T, L, Dt]
            mean_square = states.pow(2).mean(-1, keepdim=True)
            target_hidden = (states * torch.rsqrt(mean_square + self.config.rms_norm_eps)).flatten(-2)
        target_hidden = target_hidden.to(self.device, self.dtype)
        if self.target_norm is not None:
            parts = target_hidden.chunk(len(self.target_norm), dim=-1)
            target_hidden = torch.cat([norm(part) for norm, part in zip(self.target_norm, parts, strict=True)], dim=-1)
        return self.fusion_layer(target_hidden)

    def forward(
        self,
        input_ids: torch.LongTensor,
        hidden_states: torch.Tensor,
        draft_step: int = 0,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        num_outputs: int | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the processing module of one draft step.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): at index t the token **after** the one whose hidden
                state is `hidden_states[:, t]`.
            hidden_states (`torch.Tensor` of shape `(B, T, D)` or `(B, T, L * target_hidden_size)`): outputs of the
                previous draft step, or the target's states, which go through the fusion layer first.
            draft_step (`int`): 0 for committed positions, k >= 1 for tree nodes at depth k.
            attention_mask (`torch.Tensor`, *optional*): `(B, past + T)` with 0 at padding, or in the attention
                implementation's own form: `(B, 1, T, past + T)`, or `(B, 1, 1, past + T)` where one layer gives one
                output. The latter must apply the sliding window itself. If absent: causal, within the sliding window.
            position_ids (`torch.LongTensor` of shape `(B, T)`, *optional*): positions of the hidden states' tokens.
            cache (`Cache`, *optional*): keys and values of earlier positions; T more are written to it. Its
                earlier names, such as `past_key_values`, are also accepted.
            use_cache (`bool`, *optional*): make a cache where none is given.
            num_outputs (`int`, *optional*): 1 for the output of the last position alone, 0 for none. For the other
                positions the last layer then computes only keys and values, which needs a cache to store them.
        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` of shape `(B, T, D)`, or `(B, num_outputs, D)`, the predicted
            hidden states of the tokens in `input_ids`; [`~PrismDraftModel.compute_logits`] of them predicts the tokens
            that follow.
        Raises:
            ValueError: if shapes disagree, saying what was expected.
        """
        hidden_states = self._as_draft_hidden(input_ids, hidden_states, draft_step)
        cache = cache_of(kwargs) if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if num_outputs is not None and (num_outputs not in (0, 1) or cache is None):
            raise ValueError(
                f"num_outputs: expected 0 or 1 and a cache, got {num_outputs} and {type(cache).__name__}"
            )
        index = self.config.module_of_step(draft_step)
        cache_layer = self._first_attention(index).layer_idx
        if position_ids is None:
            past = cache.get_seq_length(cache_layer) if cache is not None else 0
            position_ids = torch.arange(past, past + input_ids.shape[1], device=self.device)[None]  # type: ignore[assignment]
        if attention_mask is None or attention_mask.dim() == 2:
            make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
            attention_mask = make_mask(self.config, hidden_states, attention_mask, cache, layer_idx=cache_layer)
        module = self.processing_modules[index]
        output = self.run_module(module, input_ids, hidden_states, attention_mask, position_ids, cache, num_outputs)
        return BaseModelOutputWithPast(last_hidden_state=output, **{CACHE_KEYWORD: cache})

    def run_module(
        self, module, input_ids, hidden_states, attention_mask, position_ids, cache, num_outputs: int | None = None
    ) -> torch.Tensor:
        """The part of [`~PrismDraftModel.forward`] after its inputs are checked, which is the part that gets compiled. It takes
        the module itself, not its index, so that one graph serves all modules that share a cache layer."""
        embeddings, stream = self._enter(module, input_ids, hidden_states)
        rotary = self.rotary_emb(hidden_states, position_ids)
        return self.output_states(module(embeddings, stream, rotary, attention_mask, cache, num_outputs))

    def _enter(self, module, input_ids, hidden_states):
        """Token embeddings, and the residual stream that enters the module's layers. The embeddings are None where the fused
        kernel has projected them and nothing else reads them."""
        table = self.embed_tokens if self.embed_tokens is not None else self._require_target().embedding
        projection = module.input_projection
        # Subclasses, such as scaled embeddings or adapters, compute something else.
        is_plain = type(table) is nn.Embedding and type(projection) is nn.Linear
        if is_plain and use_triton("auto", self.device):
            if (table.weight.device, table.weight.dtype) == (self.device, self.dtype):
                parts = (table.weight, projection.weight, projection.bias)
                return None, fused_input_projection(input_ids, hidden_states, *parts, self.config.embedding_scale)
        embeddings = self.embed(input_ids)
        return embeddings, module.project(embeddings, hidden_states)

    def _as_draft_hidden(self, input_ids, hidden_states, draft_step) -> torch.Tensor:
        config = self.config
        widths = (config.hidden_size, config.fused_hidden_size)
        if (
            hidden_states.dim() != 3
            or hidden_states.shape[:2] != input_ids.shape
            or hidden_states.shape[2] not in widths
        ):
            raise ValueError(
                f"hidden_states: expected shape {(*input_ids.shape, widths[0])} or {(*input_ids.shape, widths[1])}, "
                f"got {tuple(hidden_states.shape)}"
            )
        if draft_step < 0:
            raise ValueError(f"draft_step: expected at least 0, got {draft_step}")
        if config.has_fusion_layer and hidden_states.shape[2] == config.fused_hidden_size:
            return self.fuse(hidden_states)
        return hidden_states.to(self.device, self.dtype)

    def make_drafter(self) -> Drafter:
        """The object that drafts trees for one generate() call; see [`Drafter`]."""
        return Drafter(self)

    def assist(self, target: PreTrainedModel, *args, **kwargs):
        """Decode `target` with this draft; what `target.generate(assistant_model=draft)` reaches through the hook."""
        # Nothing may follow the call: an error after it would leave a cache that has advanced.
        with errors_tell_of_untried_release():
            return speculative_generate(target, self, *args, **kwargs)

    def generate(self, *args, **kwargs):
        """A draft does not generate by itself.

        Raises:
            TypeError: always, saying how a draft is used.
        """
        raise TypeError(
            "expected a draft to be passed to its target, target.generate(**inputs, assistant_model=draft), "
            "got a call of draft.generate()"
        )


__all__ = ["PrismDraftModel", "PrismPreTrainedModel"]
