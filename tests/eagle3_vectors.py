"""Makes tests/data/eagle3/*.npz: random EAGLE-3 drafts of the classes of speculators 0.9 and SpecForge 0.2, and what they
compute, step by step. By hand, in an environment that has both: `python tests/eagle3_vectors.py`.

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
    config, weights = saved(model)
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


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for make, cases in ((make_speculators, SPECULATORS), (make_specforge, SPECFORGE)):
        for name, settings in cases.items():
            torch.manual_seed(0)
            make(name, **settings)
