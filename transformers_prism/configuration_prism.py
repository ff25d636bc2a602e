"""Architecture of a PRISM draft: every number that its weights depend on, checked when it is set."""

import contextlib
import dataclasses
import hashlib
import json
import math
from dataclasses import field
from pathlib import Path
from typing import Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .transformers_names import CACHE_NAMES, name_of, output_embeddings, revision_of

# The parts of a target that a draft can be checked against; a part that is None is unknown and is not compared.
FINGERPRINT_PARTS = ("name", "revision", "vocab_size", "hidden_size", "num_hidden_layers", "tokenizer_hash")
# Arguments that every configuration of transformers takes, besides those that it keeps under a name with an underscore.
_FIELDS_OF_ALL = {"rope_theta", "torch_dtype", "name_or_path", "attn_implementation", "experts_implementation"}
# No real draft is larger; files that claim more are refused.
_MOST_LAYERS = 1024
_MOST_WEIGHTS = 10**11


def default_target_layer_ids(num_hidden_layers: int) -> list[int]:
    """Low, middle and high indices into `hidden_states` of a target (0 is the embedding, `num_hidden_layers` the last
    state after the final norm).

    Source: PRISM artifact (3, 17 and 30 of 32), made relative to depth.
    """
    n = num_hidden_layers
    if n >= 8:
        return [3, n // 2 + 1, n - 2]
    return sorted({max(1, n // 4), n // 2, n - 1} - {0}) or [1]


# Fields by which targets multiply or divide logits, or the states that their head reads; and fields of soft-caps.
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
# Types that multiply by the fields by which others divide.
_MULTIPLIES_BY_DIVISOR = ("hyperclovax",)
# Composite models have a head of their own. Most of them ignore the text model's scale and soft-cap; these do not.
_SCALING_WRAPPERS = ("cohere_compass", "granite4_vision", "granite_docling", "hyperclovax_vision_v2", "inkling", "muse_")
_CAPPING_WRAPPERS = ("paligemma", "gemma3n", "gemma4", "inkling2", "mistral_large4", "muse_")


def target_numerics(target_config) -> dict:
    """The factors of a target's embedding (those outside the embedding module) and of its logits, and the soft-cap of its
    logits.

    Args:
        target_config (`PreTrainedConfig`): the whole one, since the type of a composite model may matter.
    Source: transformers' modeling files of the types that have the fields below; gemma scales inside its embedding module.
    """
    text = target_config.get_text_config()
    factors, divisors = list(_LOGIT_FACTORS), list(_LOGIT_DIVISORS)
    if text.model_type.startswith(_MULTIPLIES_BY_DIVISOR):
        factors, divisors = factors + divisors, []
    is_wrapped = text is not target_config
    if is_wrapped and not target_config.model_type.startswith(_SCALING_WRAPPERS):
        factors, divisors = [], []
    logit_scale = 1.0
    for name in (*factors, *divisors):
        found = _read(text, name)
        if isinstance(found, (int, float)) and found:
            logit_scale *= found if name in factors else 1.0 / found
    embedding_scale = _read(text, "embedding_multiplier")
    is_capped = not is_wrapped or target_config.model_type.startswith(_CAPPING_WRAPPERS)
    softcap = next(filter(None, (_read(text, name) for name in _SOFTCAPS)), None) if is_capped else None
    return {
        "embedding_scale": float(embedding_scale) if embedding_scale else 1.0,
        "logit_scale": float(logit_scale),
        "logit_softcap": float(softcap) if softcap else None,
    }


def num_target_layers(target_config) -> int:
    """Number of layers of a target, from its text configuration; `hidden_states` has one entry more, the embedding.

    Raises:
        ValueError: if the configuration does not give the number.
    """
    # In some models `num_hidden_layers` counts something else: attentions, two in each layer of longcat_flash; distinct
    # layers, some of which run several times; layers of an encoder that is not there.
    names = ["total_num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_hidden_layers"]
    if target_config.model_type == "longcat_flash":
        names.insert(0, "num_layers")
    found = next((_read(target_config, name) for name in names if _is_size(_read(target_config, name))), None)
    if found is None:
        raise ValueError(
            f"num_hidden_layers: expected the number of layers in the text configuration of the target, got "
            f"{_read(target_config, 'num_hidden_layers')!r} in {type(target_config).__name__}"
        )
    return found


def _read(target_config, name: str, default=None):
    """A value of a target's configuration; of its first layer where layers differ; the default where it is absent."""
    if name in (getattr(target_config, "per_layer_attributes", None) or ()):
        target_config = target_config.per_layer_config[0]
    return getattr(target_config, name, default)


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _read_size(target_config, name: str) -> int | None:
    """A positive whole number of a target's configuration; None where it is absent or stands for "none" or "any"."""
    value = _read(target_config, name)
    return value if _is_size(value) else None


def _plain_rope(target_config, head_dim: int) -> dict:
    """The target's rotary parameters in the flat form that a Llama layer with heads of `head_dim` takes. Of forms that it
    cannot take, only the base is kept."""
    rope = _read(target_config, "rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    if nested:
        rope = rope.get("full_attention") or nested[0]
    # longrope has one factor for each pair of a head's elements, which only fits heads of that size without partial rotary.
    fits = all(len(rope.get(name) or ()) == head_dim // 2 for name in ("short_factor", "long_factor"))
    if rope.get("rope_type") in ("llama3", "linear", "dynamic", "yarn") or (rope.get("rope_type") == "longrope" and fits):
        return {key: value for key, value in rope.items() if key not in ("partial_rotary_factor", "mrope_section")}
    return {"rope_type": "default", "rope_theta": float(rope.get("rope_theta") or 10000.0)}


def attention_heads(target_config, width: int) -> dict:
    """Head counts and head dimension of a draft layer of this width, taken from the target where they fit."""
    heads = _read_size(target_config, "num_attention_heads") or max(1, width // 64)
    head_dim = _read_size(target_config, "head_dim")
    if head_dim is None:
        heads = heads if width % heads == 0 else 1
        head_dim = width // heads
    groups = _read_size(target_config, "num_key_value_heads") or heads
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": groups if heads % groups == 0 else heads,
        "head_dim": head_dim + head_dim % 2,  # rotary embedding turns pairs
    }


def _widths(target_config, model=None) -> dict:
    """Sizes of a draft that can share the target's embedding and vocabulary head, and the target layers that it reads. In
    a few targets the embedding and head are narrower or wider than the hidden states."""
    hidden_size = target_config.hidden_size
    both = _read_size(target_config, "word_embed_proj_dim") or _read_size(target_config, "embedding_size") or hidden_size
    embedding_size = _read_size(target_config, "input_embedding_size") or both
    head_size = _read_size(target_config, "output_embedding_size") or both
    if model is not None:
        with contextlib.suppress(NotImplementedError):  # bind() says what such a target lacks
            embedding_size = _read_size(model.get_input_embeddings(), "embedding_dim") or embedding_size
            head_size = _read_size(output_embeddings(model), "in_features") or head_size
    layer_ids = default_target_layer_ids(num_target_layers(target_config))
    if head_size != hidden_size and len(layer_ids) == 1:
        layer_ids = [0, *layer_ids]  # with two layers there is a fusion layer, which changes the width
    return {
        "hidden_size": head_size,
        "intermediate_size": _read_size(target_config, "intermediate_size") or 4 * head_size,
        "target_embedding_size": None if head_size == hidden_size else head_size,
        "share_target_embedding": embedding_size == head_size,
        "target_layer_ids": layer_ids,
    }


@strict
class PrismConfig(PreTrainedConfig):
    """Configuration of a [`PrismDraftModel`].

    Args:
        vocab_size (`int`): tokens of the target's vocabulary, V.
        hidden_size (`int`): width of the draft, D.
        intermediate_size (`int`): width of the SwiGLU MLP.
        num_attention_heads, num_key_value_heads, head_dim (`int`): H, G and E; H is a multiple of G.
        hidden_act, rms_norm_eps (and others): as in `LlamaConfig`; also `rope_parameters`, `max_position_embeddings`,
            `attention_bias`, `mlp_bias` and `initializer_range`.
        num_processing_modules (`int`): parameter sets, M.
        draft_step_to_module (`list[int]` of length S): module that serves each draft step, a surjection onto
            range(M); later steps use the last entry.
        num_layers_per_module (`int`): decoder layers in a module.
        target_hidden_size (`int`): width of the target's hidden states.
        target_embedding_size (`int`, *optional*): width of the target's embedding and vocabulary head, whichever are
            shared, if it differs from `target_hidden_size`; the draft then has this width.
        target_layer_ids (`list[int]` of length L): indices into the target's `hidden_states` (0 is the embedding, the
            number of layers is the last state after the final norm). With L > 1 the draft has a fusion layer.
        projection_bias (`bool`): bias of the fusion layer and of each input projection.
        draft_vocab_size (`int`, *optional*): tokens that the draft can propose; None means all V.
        share_target_embedding, share_target_head (`bool`): borrow the target's matrices instead of owning them.
        embedding_scale, logit_scale (`float`), logit_softcap (`float`, *optional*): what the target multiplies its
            embeddings and logits by, and the soft-cap of its logits.
        context_kv (`str`): "prefill_module": committed positions carry the keys and values of step 0's module;
            "own_module": every step sees earlier positions through its own module.
        sliding_window (`int`, *optional*): positions that each attention of the draft sees, its own included; None: all.
        normalize_target_hidden (`bool`): divide each fused target state by its own root mean square.
        target_norm (`str`): RMSNorm with weights before the fusion layer: "none"; "joint", one over all L states
            (speculators' `norm_before_fc`); "each", one for each state (`fc_norm`).
        query_key_norm (`bool`): RMSNorm of each head's queries and keys, as in Qwen3.
        module_form (`str`): "prism": an input projection joins token embedding and hidden state for the first layer;
            "eagle3": its attention reads both, each normed, and a norm comes before the head. EAGLE-3 itself has one
            module, three target layers, no `projection_bias` and its own head (`share_target_head=False`).
        norm_before_residual, norm_output (`bool`): for "eagle3". The first makes the normed hidden state the residual of
            the first layer; the second passes the state after the norm before the head on to the next draft step.
        target_fingerprint (`dict`, *optional*): `name`, `revision`, `vocab_size`, `hidden_size`,
            `num_hidden_layers` and `tokenizer_hash` of the target that the draft was trained for; None is unknown.
    Raises:
        StrictDataclassClassValidationError: if fields contradict each other, saying what was expected and found.
    Source: PRISM (arXiv:2602.01762) and its artifact; EAGLE-3 (arXiv:2503.01840).
    """

    model_type = "prism"
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False
    initializer_range: float = 0.02

    num_processing_modules: int = 1
    draft_step_to_module: list[int] = field(default_factory=list)
    num_layers_per_module: int = 1
    target_hidden_size: int | None = None
    target_embedding_size: int | None = None
    target_layer_ids: list[int] = field(default_factory=lambda: [1])
    projection_bias: bool = True
    draft_vocab_size: int | None = None
    share_target_embedding: bool = True
    share_target_head: bool = True
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    context_kv: Literal["prefill_module", "own_module"] = "prefill_module"
    sliding_window: int | None = None
    normalize_target_hidden: bool = False
    target_norm: Literal["none", "joint", "each"] = "none"
    query_key_norm: bool = False
    module_form: Literal["prism", "eagle3"] = "prism"
    norm_before_residual: bool = False
    norm_output: bool = False

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    target_fingerprint: dict | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if not self.draft_step_to_module:
            # Bounded, so that a huge number does not make a huge list; validation refuses the number itself.
            self.draft_step_to_module = list(range(min(self.num_processing_modules, _MOST_LAYERS)))
        # As configurations of earlier releases of transformers have it.
        theta = kwargs.pop("rope_theta", None)
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if theta is not None:
            self.rope_parameters = {**self.rope_parameters, "rope_theta": float(theta)}
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read a config.json; as `PreTrainedConfig.get_config_dict`, but it must be a draft's.

        Raises:
            ValueError: if it is not, saying what was expected and found.
        """
        expected = f"{pretrained_model_name_or_path}: expected a config.json of model type {cls.model_type!r}"
        try:
            found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if not isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
                raise
            raise ValueError(f"{expected}, got no JSON: {error.__context__}") from error
        except (TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ValueError(f"{expected}, got content that is not a configuration ({error!r})") from error
        if not isinstance(found, dict):
            raise ValueError(f"{expected}, got a {type(found).__name__}")
        if found.get("model_type") != cls.model_type:
            raise ValueError(f"{expected}, got {found.get('model_type')!r}")
        return found, unused

    def validate_architecture(self):
        """Check the rules that join several fields; called by `@strict`.

        Raises:
            ValueError: naming the field, what was expected and what was found.
        """
        for name in (
            "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings num_processing_modules num_layers_per_module target_hidden_size"
        ).split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window: expected None (no window) or at least 1 position, got {self.sliding_window}"
            )
        for name in ("rms_norm_eps", "embedding_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: expected an activation that transformers knows, got {self.hidden_act!r}")
        self._validate_amounts()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads={self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number (rotary embedding turns pairs), got {self.head_dim}")
        if set(self.draft_step_to_module) != set(range(self.num_processing_modules)):
            raise ValueError(
                f"draft_step_to_module: expected each of 0..{self.num_processing_modules - 1} "
                f"(num_processing_modules={self.num_processing_modules}), got {self.draft_step_to_module}"
            )
        if not self.target_layer_ids or self.target_layer_ids != sorted(set(self.target_layer_ids)):
            raise ValueError(f"target_layer_ids: expected one or more increasing indices, got {self.target_layer_ids}")
        if self.target_layer_ids[0] < 0:
            raise ValueError(f"target_layer_ids: expected indices of at least 0, got {self.target_layer_ids}")
        self._validate_sizes_shared_with_target()
        self._validate_token_ids()

    def _validate_amounts(self):
        """Refuse sizes that no draft has, before anything is built with them."""
        num_layers = self.num_processing_modules * self.num_layers_per_module
        if num_layers > _MOST_LAYERS:
            raise ValueError(
                f"num_processing_modules * num_layers_per_module: expected at most {_MOST_LAYERS}, got {num_layers}"
            )
        if self.num_matrix_weights > _MOST_WEIGHTS:
            raise ValueError(
                f"expected sizes of a draft of at most {_MOST_WEIGHTS:.0e} weights, got {self.num_matrix_weights:.3g} from "
                f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
                f"num_attention_heads={self.num_attention_heads}, head_dim={self.head_dim}, vocab_size={self.vocab_size}, "
                f"target_hidden_size={self.target_hidden_size} and {num_layers} layer(s)"
            )

    def _validate_sizes_shared_with_target(self):
        shares = self.share_target_embedding or self.share_target_head
        shared_size = self.target_embedding_size or self.target_hidden_size
        if shares and self.hidden_size != shared_size:
            raise ValueError(
                f"hidden_size: expected {shared_size}, the width of the target's embedding and head, where one of them is "
                f"shared, got {self.hidden_size}"
            )
        if not self.has_fusion_layer and self.hidden_size != self.target_hidden_size:
            raise ValueError(
                "hidden_size: expected target_hidden_size when there is no fusion layer "
                f"({self.target_hidden_size}), got {self.hidden_size}"
            )
        if self.has_fusion_layer and self.hidden_size == self.fused_hidden_size:
            raise ValueError(
                "hidden_size: expected a value other than len(target_layer_ids) * target_hidden_size, so that fused and "
                f"unfused states can be told apart, got {self.hidden_size}"
            )
        for name, absent in (("normalize_target_hidden", False), ("target_norm", "none")):
            if getattr(self, name) != absent and not self.has_fusion_layer:
                raise ValueError(
                    f"{name}: expected {absent!r} with a single target layer (there is no fusion layer to normalise "
                    f"for), got {getattr(self, name)!r}"
                )
        for name in ("norm_before_residual", "norm_output"):
            if getattr(self, name) and self.module_form != "eagle3":
                raise ValueError(f"{name}: expected False with module_form={self.module_form!r}, got True")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size: expected None or 1..{self.vocab_size} (vocab_size), got {self.draft_vocab_size}"
            )
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap: expected None or a positive number, got {self.logit_softcap}")

    def _validate_token_ids(self):
        """Check the fingerprint's keys. Token ids are not checked, since some targets publish ids outside the vocabulary."""
        if self.target_fingerprint is not None:
            unknown = set(self.target_fingerprint) - set(FINGERPRINT_PARTS)
            if unknown:
                raise ValueError(f"target_fingerprint: expected the parts {FINGERPRINT_PARTS}, got {sorted(unknown)}")

    @property
    def has_fusion_layer(self) -> bool:
        """Whether several target states are joined into one draft input."""
        return len(self.target_layer_ids) > 1

    @property
    def fused_hidden_size(self) -> int:
        """Width of the concatenated target states, L * target_hidden_size."""
        return len(self.target_layer_ids) * cast(int, self.target_hidden_size)  # set by __post_init__

    @property
    def num_draft_tokens(self) -> int:
        """Number of distinct tokens that the draft can propose."""
        return self.draft_vocab_size or self.vocab_size

    @property
    def num_matrix_weights(self) -> int:
        """Numbers in all matrices of a draft, that is all but biases and norms; the ids of the draft vocabulary count, too."""
        width, modules = self.hidden_size, self.num_processing_modules
        head_dim, num_groups = cast(int, self.head_dim), cast(int, self.num_key_value_heads)  # set by __post_init__
        attention = 2 * width * head_dim * (self.num_attention_heads + num_groups)
        layers = modules * self.num_layers_per_module * (attention + 3 * width * self.intermediate_size)
        if self.module_form == "prism":
            inputs = 2 * width * width
        else:  # the first layer's queries, keys and values read twice the width
            inputs = width * head_dim * (self.num_attention_heads + 2 * num_groups)
        fusion = self.fused_hidden_size * width if self.has_fusion_layer else 0
        embedding = 0 if self.share_target_embedding else self.vocab_size * width
        head = 0 if self.share_target_head else self.num_draft_tokens * width
        return layers + modules * inputs + fusion + embedding + head + (self.draft_vocab_size or 0)

    def module_of_step(self, draft_step: int) -> int:
        """Index of the processing module that serves `draft_step` (0-based; steps beyond the list use its last entry)."""
        return self.draft_step_to_module[min(draft_step, len(self.draft_step_to_module) - 1)]

    def target_differences(self, target_config, tokenizer=None) -> tuple[list[str], list[str]]:
        """Compare a target, part by part of the fingerprint, with the one that this draft was made for; unknown parts count
        as equal.

        Returns:
            `tuple` of two lists of sentences: why the two cannot work together, and why fewer tokens may be accepted.
        """
        found = target_fingerprint(target_config, tokenizer)
        expected = {name: (self.target_fingerprint or {}).get(name) for name in FINGERPRINT_PARTS}
        expected.update(vocab_size=self.vocab_size, hidden_size=self.target_hidden_size)
        fatal: list[str] = []
        mild: list[str] = []
        for name in FINGERPRINT_PARTS:
            if expected[name] is None or found[name] is None or expected[name] == found[name]:
                continue
            line = f"{name}: expected {expected[name]!r} (draft), got {found[name]!r} (target)"
            # A tokenizer does not change what is generated, and one that differs may have just one token more.
            (mild if name in ("name", "revision", "tokenizer_hash") else fatal).append(line)
        return fatal + self._layers_beyond(found["num_hidden_layers"]), mild

    def _layers_beyond(self, num_layers: int) -> list[str]:
        """A line on `target_layer_ids` if a target of so many layers lacks any of them; else none."""
        if self.target_layer_ids[-1] <= num_layers:
            return []
        return [f"target_layer_ids: expected indices up to {num_layers} (target), got {self.target_layer_ids} (draft)"]

    @classmethod
    def from_target(cls, target, **overrides) -> "PrismConfig":
        """A sensible draft configuration for any decoder-only target.

        Args:
            target (`PreTrainedModel` or `PreTrainedConfig`): the target, or its configuration.
            overrides: fields of [`PrismConfig`] that replace the derived ones.
        Returns:
            `PrismConfig`: as wide as the target, two processing modules, low, middle and high target layers.
        Raises:
            ValueError: if the target is an encoder-decoder model or has no vocabulary, or for fields that are not known.
        """
        fields = {one.name for one in dataclasses.fields(cls)} | _FIELDS_OF_ALL
        unknown = sorted(name for name in overrides if name not in fields and not hasattr(cls, f"_{name}"))
        if unknown:
            raise ValueError(f"expected fields of {cls.__name__}, got {', '.join(unknown)}")
        model = None if isinstance(target, PreTrainedConfig) else target
        config = target if model is None else model.config
        if config.is_encoder_decoder:
            raise ValueError(
                f"expected a decoder-only target, got the encoder-decoder model type {config.model_type!r}"
            )
        config = config.get_text_config()
        for name in ("vocab_size", "hidden_size"):
            if not _is_size(_read(config, name)):
                raise ValueError(
                    f"{name}: expected a positive number in the text configuration of the target, got "
                    f"{_read(config, name)!r} in {type(config).__name__} (model type {config.model_type!r})"
                )
        derived = {
            "vocab_size": config.vocab_size,
            "target_hidden_size": config.hidden_size,
            "rms_norm_eps": _read(config, "rms_norm_eps") or 1e-6,
            "max_position_embeddings": _read_size(config, "max_position_embeddings") or 2048,
            "num_processing_modules": 2,
            "bos_token_id": _read(config, "bos_token_id"),
            "eos_token_id": _read(config, "eos_token_id"),
            "pad_token_id": _read(config, "pad_token_id"),
            "target_fingerprint": target_fingerprint(config),
            **_widths(config, model),
            **target_numerics(target if model is None else model.config),
        }
        derived.update(attention_heads(config, derived["hidden_size"]))
        derived["rope_parameters"] = _plain_rope(config, overrides.get("head_dim") or derived["head_dim"])
        derived.update(overrides)
        derived.setdefault("normalize_target_hidden", len(derived["target_layer_ids"]) > 1)
        made = cls(**derived)
        for problem in made._layers_beyond(num_target_layers(config)):
            raise ValueError(problem)
        return made


def target_fingerprint(target_config, tokenizer=None) -> dict:
    """What identifies a target, by the keys `FINGERPRINT_PARTS`; parts that are not known are None. The tokenizer's
    vocabulary is hashed. `name` is a Hub id, or None for a folder, whose path means nothing on another machine."""
    text = target_config.get_text_config()
    name = name_of(target_config) or None
    if name is not None and (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).is_dir()):
        name = None
    return {
        "name": name,
        "revision": revision_of(target_config),
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": num_target_layers(text),
        "tokenizer_hash": tokenizer_hash(tokenizer) if hasattr(tokenizer, "get_vocab") else None,
    }


def tokenizer_hash(tokenizer) -> str:
    """sha256 of a tokenizer's vocabulary, tokens and ids, in the order of ids; 64 hexadecimal digits."""
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


__all__ = ["PrismConfig"]
