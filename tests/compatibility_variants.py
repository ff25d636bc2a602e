"""Cases beside the plain sweep over types: settings under which a model computes something else."""

import torch
from compatibility_models import WINDOW
from compatibility_runs import Case
from torch import nn

ROPE = {"rope_theta": 10000.0}
_DYNAMIC = {
    "max_position_embeddings": 48,
    "rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 4.0},
}
def _longrope(rotary_dim: int) -> dict:
    num_frequencies = rotary_dim // 2
    return {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 24,
        "rope_parameters": {
            **ROPE,
            "rope_type": "longrope",
            "short_factor": [1.0] * num_frequencies,
            "long_factor": [1.0 + index for index in range(num_frequencies)],
            "original_max_position_embeddings": 24,
            "factor": 4.0,
        },
    }


_YARN = {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}}
_LLAMA3 = {
    "rope_parameters": {
        **ROPE,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    }
}
_LINEAR = {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}
_MIXED_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def _train(target) -> None:
    target.train()
    target.gradient_checkpointing_enable()


def _quantize(target) -> None:
    """Linear layers become modules whose `weight` is a method."""
    import torch.ao.quantization as quantization

    quantization.quantize_dynamic(target, {nn.Linear}, dtype=torch.qint8, inplace=True)


def _case(name: str, model: str, overrides: dict | None = None, **settings) -> Case:
    return Case(f"{model}: {name}", model, overrides or {}, **settings)


def variants() -> list[Case]:
    """All of them."""
    cases = []
    for model in ("llama", "qwen2", "gemma", "phi", "gpt_neox"):
        for name, length, num_new in (
            ("below its length", 5, 30),
            ("across its length", 9, 60),
            ("beyond its length", 60, 40),
        ):
            cases.append(
                _case(
                    f"dynamic rotary table {name}",
                    model,
                    _DYNAMIC,
                    prompt_length=length,
                    num_new=num_new,
                    # Frequencies change with every token beyond, so that only plain steps are right there.
                    min_tokens_per_round=2.0 if name == "below its length" else 1.0,
                )
            )
    for model, rotary_dim in (("phi3", 16), ("llama", 16), ("minicpm3", 8)):
        longrope = _longrope(rotary_dim)
        if model == "llama":
            del longrope["original_max_position_embeddings"]
        for name, length, num_new in (
            ("below its switch", 5, 14),
            ("across its switch", 9, 50),
            ("beyond its switch", 40, 40),
        ):
            cases.append(
                _case(
                    f"longrope {name}",
                    model,
                    longrope,
                    prompt_length=length,
                    num_new=num_new,
                    passes_thresholds=name != "below its switch",
                )
            )
    for name, rope in (("yarn", _YARN), ("llama3", _LLAMA3), ("linear", _LINEAR)):
        cases.append(_case(f"{name} rotary table", "llama", rope))
    cases += [
        _case("alibi", "falcon", {"alibi": True}),
        _case("alibi, new decoder", "falcon", {"alibi": True, "new_decoder_architecture": True}),
        _case("multi-query", "falcon", {"multi_query": True, "alibi": False}),
        _case("narrow embeddings", "opt", {"word_embed_proj_dim": 32}),
        _case("narrow embeddings, norm after", "opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
        _case("mixed windows", "qwen2", _MIXED_WINDOWS),
        _case("no window", "mistral", {"sliding_window": None}),
        _case("window of 3", "mistral", {"sliding_window": 3}),
        _case("default window", "gpt_neo", {"window_size": 16, "max_position_embeddings": 512}, prompt_length=300),
        _case("parallel residual off", "gpt_neox", {"use_parallel_residual": False}),
        _case("tied embeddings", "llama", {"tie_word_embeddings": True}),
        # Several tokens raise time steps to the least one, and single steps do not: the check finds that.
        _case("time steps that single steps leave as they are", "nemotron_h", {"time_step_min": 0.05}),
        _case("int32 input ids", "llama", dtype=torch.int32),
        _case("int32 input ids", "gpt2", dtype=torch.int32),
        _case("train mode, gradient checkpointing", "llama", prepare=_train),
        _case("train mode, gradient checkpointing", "gemma2", prepare=_train),
        _case("train mode", "qwen3", prepare=lambda target: target.train()),
        _case("dynamic quantization", "llama", prepare=_quantize),
        _case("use_cache=False", "llama", arguments={"use_cache": False}, runs=("greedy", "padded")),
        _case("prefill in chunks", "llama", arguments={"prefill_chunk_size": 4}, prompt_length=13, runs=("greedy",)),
    ]
    long = {"prompt_length": 60, "num_new": 60}
    cases += [_case("long", model, **long) for model in ("deepseek_v32", "mistral", "gemma3_text", "gpt_oss", "llama4_text")]
    cases += [
        _case("eager attention", model, attn_implementation="eager")
        for model in (
            "llama qwen3 mistral gemma2 gemma3_text gpt2 gpt_neo gpt_neox falcon bloom mpt opt phi3 mixtral deepseek_v3 "
            "deepseek_v32 llama4_text gpt_oss cohere2 olmo2 granite lfm2 codegen gptj xglm"
        ).split()
    ]
    cases.append(_case("alibi, eager attention", "falcon", {"alibi": True}, attn_implementation="eager"))
    return cases
