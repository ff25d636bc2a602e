"""Tiny random models of every architecture that transformers can generate text with.

A configuration is made small by name: each field that a class has and that stands in one of the tables below gets the
table's value, in the parts of a composite configuration too. Where that is not enough, `SETTINGS` has what a type needs.
Windows, top-k and chunk sizes are a few tokens, so that short runs go beyond them.
"""

import dataclasses

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, SiglipVisionConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB_SIZE = 97
PAD_ID, BOS_ID = 0, 2
NUM_POSITIONS = 128
ORIGINAL_NUM_POSITIONS = 24
WINDOW = 8

# Fields that mean the same in configurations of text, images and audio.
_SIZES = {
    "hidden_size n_embd d_model dim_model embed_dim emb_dim embedding_dim hidden_dim embedding_size": 64,
    "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff d_inner feed_forward_size": 96,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers layers depth": 4,
    "encoder_layers num_encoder_layers": 4,  # some count these as layers of the cache
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads": 4,
    "num_decoder_attention_heads num_encoder_attention_heads": 4,
    "num_key_value_heads kv_n_heads num_kv_heads": 2,
    "head_dim kv_channels dim_head d_kv d_head attention_head_size": 16,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions": NUM_POSITIONS,
}
_TEXT = {
    **_SIZES,
    "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size": VOCAB_SIZE,
    "initializer_range": 0.2,
    "sliding_window sliding_window_size window_size attention_chunk_size index_topk keep_window_size": WINDOW,
    "local_attention local_attention_window_len attention_window_size swa_window_size": WINDOW,
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size share_expert_dim": 32,
    "shared_experts_intermediate_size moe_hidden_size": 32,
    "intermediate_size_mlp dense_intermediate_size ffn_hidden_size": 96,
    "num_experts n_routed_experts num_local_experts moe_num_experts": 4,
    "num_experts_per_tok moe_topk moe_top_k moe_k top_k_experts": 2,
    "n_group topk_group": 1,
    "n_shared_experts num_shared_experts moe_num_shared_experts": 1,
    "first_k_dense_replace num_dense_layers": 1,
    "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank": 16,
    "qk_rope_head_dim rotary_dim swa_qk_rope_head_dim": 8,
    "qk_nope_head_dim v_head_dim swa_head_dim swa_v_head_dim index_head_dim linear_key_head_dim": 16,
    "linear_value_head_dim linear_head_dim global_head_dim": 16,
    "original_max_position_embeddings": ORIGINAL_NUM_POSITIONS,
    "qk_head_dim": 24,
    # Scores of a key are 0 where no head has a positive one, and which of several zeros is chosen is a matter of chance.
    "index_n_heads indexer_n_heads": 16,
    "linear_num_heads linear_num_value_heads swa_num_attention_heads num_sliding_attention_heads": 4,
    "linear_num_key_heads swa_num_key_value_heads num_global_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window_pattern global_attn_every_n_layers no_rope_layer_interval": 2,
    "hidden_size_per_layer_input laurel_rank": 16,
    "num_kv_shared_layers": 0,
    "mamba_d_state state_size": 16,
    "mamba_d_head mamba_head_dim": 16,
    "mamba_n_heads mamba_num_heads": 8,
    "mamba_n_groups n_groups mamba_ngroups": 1,
    "mamba_d_ssm": 128,
    "mamba_chunk_size chunk_size": 8,
    "max_window_layers": 2,
    "n_groups_per_layer o_groups": 2,
    "output_embedding_size input_embedding_size": 64,
}
_OTHER = {
    **_SIZES,
    "num_hidden_layers layers depth encoder_layers num_layers": 1,
    "num_key_value_heads": 4,
    "out_hidden_size projection_dim output_dim": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_query_tokens resampler_n_latents latent_query_num": 4,
    "base_channels latent_channels": 32,
    "channel_multiplier": [1, 1],
    "num_embeddings codebook_size": 64,
}
# Fields that are set even where a configuration's default is None, which for others means that a part is left out.
_ALWAYS = ("head_dim", "num_key_value_heads", "num_experts_per_tok")

# What a type needs beyond the tables: by type, a dictionary of fields; "text_config.x" is field x of that part.
_ATTENTION_AND_LINEAR = ["linear_attention", "full_attention"] * 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_TEXT_MROPE = {"text_config.rope_parameters": _MROPE}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# In place of an image encoder that needs another package; text alone does not reach it.
_SIGLIP = SiglipVisionConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    model_args={"embed_dim": 64},
)
_MLP_TYPES = ["dense", "sparse", "sparse", "sparse"]
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
}
_QWEN4 = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 101,
    "split_ngram_parts": 1,
}

# Two of four layers run twice.
_LOOP = {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2}
_INKLING_VISION = {"vision_config.patch_size": 40, "vision_config.num_hidden_layers": 4}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}


# Which the configuration leaves out unless it is given.
_GEMMA4_VISION = {
    "vision_config": {
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16},
        **{"num_key_value_heads": 4, "patch_size": 8, "pooling_kernel_size": 2, "position_embedding_size": 64},
    }
}


_GEMMA4_UNIFIED_VISION = {
    "vision_config": {"patch_size": 8, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64}
}
_MUSE_VISION = {"out_hidden_size": 256, "projector_hidden_size": 64}
# Tokens of the text that stand for codes of an image: those of code 12 are "BC" in Chameleon's vocabulary.
_CODES = range(64)
_CHAMELEON_CODES = {f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z": 8 + code for code in _CODES}
_EMU3_CODES = {f"<|visual token {code:06d}|>": 8 + code for code in _CODES}


def _of_text(settings: dict) -> dict:
    return {f"text_config.{name}": value for name, value in settings.items()}


SETTINGS: dict[str, dict] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert": {"is_decoder": True},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 90, **_CHAMELEON_CODES}},
    "cohere_compass": _of_text(_COMPASS),
    "cohere_compass_text": _COMPASS,
    "cosmos3_edge": _TEXT_MROPE,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config.mlp_layer_types": _MLP_TYPES, "vision_config.sam_config.downsample_channels": [32, 64]},
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.moe_intermediate_size": 32, "text_config.top_k_experts": 2},
    "dots3_note_text": _DOTS3,
    "roc_bert": {"shape_vocab_size": 97, "pronunciation_vocab_size": 97},
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32},
    "emu3": {"vq_config.hidden_size": 32, "vocabulary_map": {"<image>": 90, "<|extra_200|>": 94, **_EMU3_CODES}},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [32, 32], "text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 2, 4]}},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0, "text_config.num_kv_shared_layers": 4, "backbone_hidden_size": 64},
    "glm46v": _TEXT_MROPE,
    "glm4v": _TEXT_MROPE,
    "glm4v_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next": {"text_config.qk_rope_head_dim": 0, "text_config.index_kpool": 4},
    "glm_ocr": _TEXT_MROPE,
    "glmga": _TEXT_MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2", "spatial_target_layers": [1], "image_grid_pinpoints": [[32, 32]]},
    "granite_docling": {"vision_config.deepstack_visual_indexes": [0], "vision_config.scale_factor": 2},
    "granitemoehybrid": {"layer_types": _ATTENTION_AND_LINEAR},
    "hunyuan_vl": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]}},
    # With 16 heads two keys score the same by chance, and rounding chooses between them, in single steps too.
    "hy_v4_vl": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}, "text_config.index_n_heads": 64},
    "inkling2": {"vision_config.text_hidden_size": 64},
    "inkling2_loop": {"vision_config.text_hidden_size": 64, **{f"text_config.{name}": value for name, value in _LOOP.items()}},
    "inkling2_loop_text": _LOOP,
    "inkling_mm_model": {"vision_config.text_hidden_size": 64, **_INKLING_VISION},
    "mistral4": {"qk_nope_head_dim": 8},
    "apertus1p5": {"audio_config.codebook_dim": 64, "audio_config.codebook_size": 16, "vision_config.codebook_size": 64, "image_token_offset": 8, "audio_token_offset": 72},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_k25": {"projection_hidden_size": 64},
    "kimi_linear": {"layer_types": _ATTENTION_AND_LINEAR},
    "kosmos-2.5": {"latent_query_num": 4},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_vl": {"text_config.full_attn_idxs": [1, 3]},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"vision_config.intermediate_size": 256, **dict.fromkeys((f"vision_config.{name}" for name in ("projector_input_dim", "projector_output_dim", "vision_output_dim")), 64)},
    "longcat_flash": {"num_layers": 2, "head_dim": 8, "qk_rope_head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp": {**_QWEN4, **_of_text(_QWEN4)},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [32, 64]},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "time_step_min": 1e-30},
    "dots3_note": {**_of_text(_DOTS3), "vision_config.adapter_in_dim": 64, "vision_config.adapter_out_dim": 64, "vision_config.per_layer_config": {}, "audio_config.adapter_input_size": 64, "audio_config.adapter_out_dim": 64},
    "florence2": {"vision_config.patch_size": [7, 3, 3, 3], "vision_config.embed_dim": [16, 16, 16, 64], "vision_config.num_heads": [2, 2, 2, 2], "vision_config.num_groups": [2, 2, 2, 2], "vision_config.depths": [1, 1, 1, 1]},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 4, "backbone_hidden_size": 64},
    "molmo2": {"vision_config.image_size": [32, 32], "adapter_config.vision_feature_layer": [0], "adapter_config.text_hidden_size": 64},
    "muse_spark": {"audio_config.num_hidden_layers": 4, **_MUSE_VISION},
    "muse_glimmer": _MUSE_VISION,
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2, "text_config.time_step_min": 1e-30, "image_token_id": 90, "audio_token_id": 94, "vision_hidden_size": 64, "projector_hidden_size": 64},
    "paddleocr_vl": _TEXT_MROPE,
    "qwen2_vl": _TEXT_MROPE,
    "qwen2_5_vl": _TEXT_MROPE,
    "qwen2_5_omni_thinker": {**_TEXT_MROPE, "vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {**_TEXT_MROPE, "vision_start_token_id": 5},
    "step3p7": {"text_config.sliding_window": WINDOW},
    **{name: {"original_max_position_embeddings": ORIGINAL_NUM_POSITIONS} for name in ("phi3", "phi4_multimodal")},
    # As many patches as an image token of this encoder has features, whose places it exchanges.
    "fast_vlm": {"vision_config": SiglipVisionConfig(**{**_SIGLIP.to_dict(), "image_size": 64})},
    "perception_lm": {"vision_config": _SIGLIP},
    "zaya": {"num_experts_per_tok": 1},
    # Single steps of this and of zamba2 do not raise time steps to the least one, which several tokens do.
    "nemotron_h": {"time_step_min": 1e-30},
    # Images of few patches.
    **{name: {"mm_tokens_per_image": 4} for name in ("gemma3", "shieldgemma2")},
    **{name: {"image_grid_pinpoints": [[32, 32]]} for name in ("llava_next", "llava_onevision", "llava_next_video")},
    "paligemma": {"projection_dim": 64},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "gemma4": _GEMMA4_VISION,
    "gemma4_unified": _GEMMA4_UNIFIED_VISION,
    "mllama": {"vision_config.intermediate_layers_indices": [0], "vision_config.vision_output_dim": 128, "text_config.cross_attention_layers": [1, 3]},
    "vipllava": {"vision_feature_layers": [-1]},
}
# Models that the automatic classes do not make of their type's configuration, and the part of it that they take.
_BY_CLASS = {"evolla": None, "musicgen": "decoder", "musicgen_melody": "decoder"}
# Encoders that generate text when they are told to be decoders.
for _encoder in (
    "bert big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta roberta-prelayernorm roc_bert "
    "roformer xlm-roberta xlm-roberta-xl xmod bert-generation"
).split():
    SETTINGS.setdefault(_encoder, {})["is_decoder"] = True


def _by_name(table: dict) -> dict:
    return {name: value for names, value in table.items() for name in names.split()}


_TEXT_VALUES, _OTHER_VALUES = _by_name(_TEXT), _by_name(_OTHER)


def all_types() -> dict[str, str]:
    """Every case of a type: name of the case to the class that transformers maps it to. A type that stands in both
    mappings with different classes is two cases."""
    cases = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for name, model_class in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if name not in cases:
            cases[name] = model_class
        elif cases[name] != model_class:
            cases[f"{name} (image-text)"] = model_class
    return cases


def _field_names(config_class) -> set[str]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    return fields | set(getattr(config_class, "attribute_map", {}))


def _small_rope(rope: dict) -> dict:
    """Rotary parameters, of one kind of layer or of each, whose switches lie at few tokens."""
    small = {key: _small_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    if small.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = ORIGINAL_NUM_POSITIONS
    if small.get("mrope_section"):
        small["mrope_section"] = _MROPE["mrope_section"]
    return small


def small_config(config_class, settings: dict, is_text: bool = True) -> PreTrainedConfig:
    """A small configuration of a class; `settings` come last, those of a part by their name with a dot."""
    own = {name: value for name, value in settings.items() if "." not in name}
    values = _TEXT_VALUES if is_text else _OTHER_VALUES
    try:
        default = vars(config_class())
    except Exception:  # some cannot be made without arguments
        default = {}
    arguments = {}
    names = _field_names(config_class)
    renamed = getattr(config_class, "attribute_map", {})
    for name in names:
        if name in own or renamed.get(name) in own:
            continue
        part = default.get(name)
        if isinstance(part, PreTrainedConfig):
            of_part = {key[len(name) + 1 :]: value for key, value in settings.items() if key.startswith(name + ".")}
            is_text_part = is_text and not any(word in name for word in ("vision", "audio", "vq", "sam", "vit"))
            arguments[name] = small_config(type(part), of_part, is_text_part)
        elif name in values and not (name in renamed and renamed[name] in values):
            if name in _ALWAYS or default.get(renamed.get(name, name), 0) is not None:
                arguments[name] = values[name]
    rope = default.get("rope_parameters")
    if is_text and isinstance(rope, dict) and "rope_parameters" not in own:
        small_rope = _small_rope(rope)
        if small_rope != rope:
            arguments["rope_parameters"] = small_rope
    if "num_key_value_heads" in arguments and "kv_lora_rank" in names:
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    if is_text:
        arguments.update({"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": None})
        if "tie_word_embeddings" in names:
            arguments["tie_word_embeddings"] = False
    arguments.update(own)
    return config_class(**arguments)


def build(case: str, overrides: dict | None = None, seed: int = 0, attn_implementation: str | None = None):
    """A tiny random model of a case in float32, for evaluation; the global generator is left alone."""
    model_type, _, kind = case.partition(" ")
    config = small_config(CONFIG_MAPPING[model_type], {**SETTINGS.get(model_type, {}), **(overrides or {})})
    is_causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind != "(image-text)"
    auto_class = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model_type in _BY_CLASS:
            config = getattr(config, _BY_CLASS[model_type]) if _BY_CLASS[model_type] else config
            model = getattr(transformers, all_types()[case])(config)
        else:
            model = auto_class.from_config(config, attn_implementation=attn_implementation)
    return model.float().eval()
