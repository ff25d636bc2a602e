"""Makes tests/data/eagle3/*.npz: random EAGLE-3 drafts of the classes of speculators 0.9, SpecForge 0.2 and vLLM 0.32, and
what they compute, step by step. By hand, in environments that have them: `python tests/eagle3_vectors.py speculators`,
`... specforge` and `... vllm`.

Of each draft the file holds `config` (its config.json), `w.*` (its weights under its own names), `tokens` (T + S), `states`
(T, L * D) and, for each of S steps, `hidden` and `logits`: outputs of the step at the last of T positions, the chain behind
which reads the tokens T, T + 1, ...
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

if __name__ == "__main__":  # the tests import this file, and compile
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "data" / "eagle3"
NUM_POSITIONS, NUM_STEPS, VOCAB_SIZE, WIDTH = 7, 4, 97, 16
LAYER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SPECULATORS = {
    "speculators_plain": {},
    "speculators_norm_before_residual": {"norm_before_residual": True},
    "speculators_norm_before_fc": {"norm_before_fc": True, "norm_before_residual": True},
    "speculators_fc_norm": {"fc_norm": True},
    "speculators_norm_output": {"norm_output": True, "norm_before_fc": True, "norm_before_residual": True},
    "speculators_whole_vocabulary": {"draft_vocab_size": VOCAB_SIZE},
    "speculators_two_states": {"eagle_aux_hidden_state_layer_ids": [1, 5]},
    "speculators_llama3": {"layer": {"rope_parameters": LLAMA3}},
    "speculators_yarn": {"layer": {"rope_parameters": YARN}},
    "speculators_biases": {"layer": {"attention_bias": True, "mlp_bias": True}},
    "speculators_two_layers": {"layer": {"num_hidden_layers": 2}, "norm_before_residual": True},
    "speculators_qwen3": {"layer": {"model_type": "qwen3"}, "norm_before_residual": True},
}
SPECFORGE = {
    "specforge_plain": {},
    "specforge_fc_norm": {"fc_norm": True},
    "specforge_wide_target": {"target_hidden_size": 24},
    "specforge_llama3": {"rope_parameters": LLAMA3},
    "specforge_yarn": {
        "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    },
}
VLLM = {
    "vllm_plain": {},
    "vllm_norm_before_residual": {"norm_before_residual": True},
    "vllm_norm_before_fc": {"eagle_config": {"norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]}},
    "vllm_fc_norm": {"fc_norm": True},
    "vllm_norm_output": {"norm_output": True},
    "vllm_logit_scale": {"logit_scale": 0.5},
    "vllm_wide_target": {"target_hidden_size": 24},
    "vllm_whole_vocabulary": {"draft_vocab_size": None},
    "vllm_llama3": {"rope_parameters": LLAMA3},
    "vllm_biases": {"attention_bias": True, "mlp_bias": True},
    "vllm_two_layers": {"num_hidden_layers": 2},
    "vllm_qwen3": {"model_type": "qwen3"},
}


def tables(draft_vocab_size):
    """d2t and t2d of a random draft vocabulary."""
    ids = torch.randperm(VOCAB_SIZE)[:draft_vocab_size].sort().values
    t2d = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    t2d[ids] = True
    return {"d2t": ids - torch.arange(draft_vocab_size), "t2d": t2d}


def scramble(model):
    """Random weights, norms about 1."""
    for name, parameter in model.named_parameters():
        spread = torch.randn_like(parameter)
        parameter.data = 1 + 0.3 * spread if "norm" in name and name.endswith("weight") else 0.3 * spread


def saved(model):
    """config.json and weights as the model's own save_pretrained() writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def write(name, model, tokens, states, hidden, logits):
    """One file of vectors."""
    write_arrays(name, *saved(model), tokens, states, hidden, logits)


def write_arrays(name, config, weights, tokens, states, hidden, logits):
    """The same of `config.json` and weights."""
    arrays = {f"w.{key}": tensor.numpy() for key, tensor in weights.items()}
    config = np.frombuffer(json.dumps(config).encode(), dtype=np.uint8)
    outputs = {"hidden": torch.stack(hidden).numpy(), "logits": torch.stack(logits).numpy()}
    np.savez_compressed(
        FOLDER / f"{name}.npz", config=config, tokens=tokens.numpy(), states=states.numpy(), **outputs, **arrays
    )


def inputs(width):
    """Tokens of the text and of the chain behind it, and states of the text."""
    return torch.randint(3, VOCAB_SIZE, (NUM_POSITIONS + NUM_STEPS,)), torch.randn(NUM_POSITIONS, width)


def stub_what_training_imports():
    """Packages that speculators imports for its training alone."""
    types = ("openai.types", "openai.types.chat", "openai.types.completion")
    for absent in ("openai", *types, "hs_connectors"):
        sys.modules.setdefault(absent, MagicMock())


def make_speculators(name, layer=None, **settings):
    """One draft of speculators' class, played by its own forward of training with the next tokens given."""
    stub_what_training_imports()
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import AutoConfig

    layer_config = AutoConfig.for_model(**{"model_type": "llama", **LAYER, **(layer or {})})
    layer_config._attn_implementation = "eager"
    settings = {"draft_vocab_size": 40, "eagle_aux_hidden_state_layer_ids": [2, 4, 5], **settings}
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer_config,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="org/target", architectures=["LlamaForCausalLM"]),
        ),
        **settings,
    )
    model = Eagle3DraftModel(config).float().eval()
    scramble(model)
    if settings["draft_vocab_size"] != VOCAB_SIZE:
        model.load_vocab_mappings(**tables(settings["draft_vocab_size"]))
    tokens, states = inputs(len(settings["eagle_aux_hidden_state_layer_ids"]) * WIDTH)
    hidden, logits = [], []
    before_norm = []
    model.layers[-1].register_forward_hook(lambda module, args, output: before_norm.append(output))
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append((args[0], output)))
    # At step k its column t reads token t + k: the last column's chain reads the tokens behind the text.
    padded = torch.cat((states, torch.zeros(NUM_STEPS, states.shape[1])))
    documents = torch.zeros(1, len(tokens), dtype=torch.long)
    with torch.no_grad():
        model(padded[None], tokens[None], documents, ttt_steps=NUM_STEPS)
    column = NUM_POSITIONS - 1
    passed_on = [normed for normed, _ in logits] if settings.get("norm_output") else before_norm
    hidden = [output[0, column] for output in passed_on]
    write(name, model, tokens, states, hidden, [output[0, column] for _, output in logits])


def make_specforge(name, **settings):
    """One draft of SpecForge's class, its backbone called as its training does."""
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from transformers import LlamaConfig

    config = LlamaConfig(**{**LAYER, "draft_vocab_size": 40, "pad_token_id": 0, **settings})
    model = LlamaForCausalLMEagle3(config).float().eval()
    scramble(model)
    for table, values in tables(40).items():
        getattr(model, table).copy_(values)
    tokens, states = inputs(3 * settings.get("target_hidden_size", WIDTH))
    cache, hidden, logits = [[], []], [], []
    position_ids = torch.arange(NUM_POSITIONS)[None]
    mask = torch.full((NUM_POSITIONS, NUM_POSITIONS), torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        stream = model.project_hidden_states(states[None])
        for step in range(NUM_STEPS):
            embeddings = model.embed_input_ids(tokens[None, step : step + NUM_POSITIONS])
            stream = model.backbone(embeddings, stream, cache, mask, position_ids)
            hidden.append(stream[0, -1])
            logits.append(model.compute_logits(stream)[0, -1])
    write(name, model, tokens, states, hidden, logits)


def published_weights(config, is_qwen3):
    """Random weights under the names that drafts are published with."""
    width, head_dim = config.hidden_size, config.head_dim
    num_heads, num_groups = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    of_target = 3 * getattr(config, "target_hidden_size", width)
    shapes = {"embed_tokens.weight": (VOCAB_SIZE, width), "fc.weight": (width, of_target), "norm.weight": (width,)}
    shapes["lm_head.weight"] = (config.draft_vocab_size or VOCAB_SIZE, width)
    shapes |= {"input_norm.weight": (of_target,)} if getattr(config, "eagle_config", None) else {}
    shapes |= {f"fc_norm.{i}.weight": (of_target // 3,) for i in range(3) if getattr(config, "fc_norm", False)}
    for layer in range(config.num_hidden_layers):
        name = "midlayer" if config.num_hidden_layers == 1 else f"layers.{layer}"
        read = 2 * width if layer == 0 else width
        sizes = {"q": (num_heads, read), "k": (num_groups, read), "v": (num_groups, read), "o": (width, num_heads)}
        matrices = {f"self_attn.{part}_proj": size for part, size in sizes.items()}
        inner = config.intermediate_size
        matrices |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        shapes |= {f"{name}.{part}.weight": size for part, size in matrices.items()}
        biased = [part for part in matrices if config.attention_bias and ("self" in part or config.mlp_bias)]
        shapes |= {f"{name}.{part}.bias": matrices[part][:1] for part in biased}
        norms = ["input_layernorm", "post_attention_layernorm"] + ["hidden_norm"] * (layer == 0)
        shapes |= {f"{name}.{norm}.weight": (width,) for norm in norms}
        shapes |= {f"{name}.self_attn.{part}_norm.weight": (head_dim,) for part in "qk" if is_qwen3}
    weights = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    weights = {name: weight + 1 if "norm" in name else weight for name, weight in weights.items()}
    return weights | ({} if config.draft_vocab_size is None else tables(config.draft_vocab_size))


class PlainAttention(torch.nn.Module):
    """In the place of vLLM's attention over its paged cache: causal, over keys and values that are kept."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads, **kwargs):
        super().__init__()
        self.shape, self.scale, self.keys, self.values = (num_heads, num_kv_heads, head_size), scale, [], []

    def forward(self, query, key, value):
        """Rows are positions, which follow those of earlier calls."""
        num_heads, num_groups, size = self.shape
        self.keys.append(key.view(-1, num_groups, size))
        self.values.append(value.view(-1, num_groups, size))
        keys, values = (torch.cat(parts).transpose(0, 1) for parts in (self.keys, self.values))
        query = query.view(-1, num_heads, size).transpose(0, 1)
        mask = torch.ones(query.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - query.shape[1])
        arguments = {"attn_mask": mask, "scale": self.scale, "enable_gqa": True}
        output = torch.nn.functional.scaled_dot_product_attention(query[None], keys[None], values[None], **arguments)
        return output[0].transpose(0, 1).flatten(1)


def make_vllm(name, model_type="llama", **settings):
    """One draft of vLLM's class, which loads random weights under the names of published drafts."""
    from types import SimpleNamespace
    from unittest import mock

    from transformers import AutoConfig
    from vllm import config as vllm_config
    from vllm import distributed
    from vllm.model_executor.models import llama, llama_eagle3, qwen3, qwen3_eagle3

    config = AutoConfig.for_model(model_type, **{**LAYER, "draft_vocab_size": 40, **settings})
    config.mlp_bias = getattr(config, "mlp_bias", False)
    weights = published_weights(config, model_type == "qwen3")
    whole = vllm_config.VllmConfig(compilation_config=vllm_config.CompilationConfig(mode=0))
    model_config = SimpleNamespace(
        hf_config=config,
        dtype=torch.float32,
        head_dtype=torch.float32,
        get_total_num_hidden_layers=lambda: 8,
        get_vocab_size=lambda: VOCAB_SIZE,
        quantization=None,
    )
    kind = llama_eagle3.Eagle3LlamaForCausalLM if model_type == "llama" else qwen3_eagle3.Eagle3Qwen3ForCausalLM
    with vllm_config.set_current_vllm_config(whole), mock.patch.object(llama, "Attention", PlainAttention):
        if not distributed.model_parallel_is_initialized():
            distributed.init_distributed_environment(1, 0, "tcp://127.0.0.1:29555", 0, backend="gloo")
            distributed.initialize_model_parallel()
        object.__setattr__(whole, "model_config", model_config)
        speculation = SimpleNamespace(draft_model_config=model_config, parallel_drafting=False, quantization=None)
        object.__setattr__(whole, "speculative_config", speculation)
        with mock.patch.object(qwen3, "Attention", PlainAttention):
            model = kind(vllm_config=whole).float().eval()
        model.load_weights(weights.items())
        for module in model.modules():
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        tokens, states = inputs(weights["fc.weight"].shape[1])
        hidden, logits = [], []
        with torch.no_grad():
            stream = model.combine_hidden_states(states)
            for step in range(NUM_STEPS):
                places = torch.arange(NUM_POSITIONS) if step == 0 else torch.tensor([NUM_POSITIONS - 1 + step])
                normed, stream = model(tokens[places], places, stream)
                stream = stream[-1:]
                hidden.append(stream[0])
                chosen = model.compute_logits(normed[-1:])[0]
                logits.append(chosen[chosen.isfinite().nonzero()[:, 0]])
    settings = {name: value for name, value in config.to_diff_dict().items() if "target_layer_count" not in name}
    write_arrays(name, {**LAYER, **settings}, weights, tokens, states, hidden, logits)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    makers = {"speculators": (make_speculators, SPECULATORS), "specforge": (make_specforge, SPECFORGE), "vllm": (make_vllm, VLLM)}
    make, cases = makers[sys.argv[1]]
    for name, settings in cases.items():
        torch.manual_seed(0)
        make(name, **settings)
