"""Tiny targets, random drafts, and what transformers-prism makes of them, for the tests in this folder.

It runs where transformers-prism is installed, which vLLM's environment does not have:
`python integrations/vllm/tests/make_cases.py FOLDER`, from the root of the repository.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_models import VOCAB_SIZE, tiny_draft, tiny_target, word_tokenizer  # noqa: E402

from transformers_prism.policy import fixed  # noqa: E402

NUM_STEPS, NUM_TOKENS = 4, 32
_WIDE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
_TARGETS = {
    "llama": ("llama", {}),
    "granite": ("granite", {"attention_multiplier": 0.2}),
    "qwen3": ("qwen3", {"num_hidden_layers": 3}),
}
_ALL_LAYERS = [0, 1, 3, 4]
# Name of a draft: its target, and fields of its configuration. Layer 4 is the last state, after the final norm.
_DRAFTS = {
    "m1_l1": ("llama", {"num_processing_modules": 1, "target_layer_ids": [4], "normalize_target_hidden": False}),
    "m1_l4": ("llama", {"num_processing_modules": 1, "target_layer_ids": _ALL_LAYERS}),
    "m2_l1": ("llama", {"num_processing_modules": 2, "target_layer_ids": [2], "normalize_target_hidden": False}),
    "m2_l4": ("llama", {"num_processing_modules": 2, "target_layer_ids": _ALL_LAYERS}),
    "m4_l1": ("llama", {"num_processing_modules": 4, "target_layer_ids": [4], "normalize_target_hidden": False}),
    "m4_l4": ("llama", {"num_processing_modules": 4, "target_layer_ids": _ALL_LAYERS}),
    "m8_map": (
        "llama",
        {"num_processing_modules": 8, "draft_step_to_module": [7, 0, 5, 1, 2, 3, 4, 6], "target_layer_ids": [1, 4]},
    ),
    "reduced": ("llama", {"num_processing_modules": 2, "target_layer_ids": [1, 4], "draft_vocab_size": 40}),
    "own_layers": (
        "llama",
        {"target_layer_ids": [1, 3], "share_target_embedding": False, "share_target_head": False, "draft_vocab_size": 40},
    ),
    "two_layers": ("llama", {"target_layer_ids": [2, 4], "num_layers_per_module": 2}),
    "window": ("llama", {"target_layer_ids": [2, 4], "num_processing_modules": 2, "sliding_window": 8}),
    "norms": (
        "llama",
        {"target_layer_ids": [1, 2, 4], "target_norm": "each", "query_key_norm": True, "attention_bias": True, "mlp_bias": True},
    ),
    "scaled": ("llama", {"target_layer_ids": [1, 3], "embedding_scale": 2.0, "logit_scale": 0.5, "logit_softcap": 60.0}),
    "granite": ("granite", {"target_layer_ids": [1, 4], "num_processing_modules": 2}),
    "qwen3": ("qwen3", {"target_layer_ids": [0, 2, 3], "num_processing_modules": 2}),
}


def chain_rounds(target, draft, input_ids) -> tuple[list[int], list[list[int]]]:
    """Tokens that a chain of `NUM_STEPS` writes after a prompt, and what it drafted in each round."""
    rounds, propose = [], fixed.FixedTrees.propose

    def noting(self, *args):
        proposal = propose(self, *args)
        rounds.append(proposal.tree.token_ids[0, 1:].tolist())
        return proposal

    fixed.FixedTrees.propose = noting
    try:
        ids = target.generate(input_ids, assistant_model=draft, max_new_tokens=NUM_TOKENS, do_sample=False)
    finally:
        fixed.FixedTrees.propose = propose
    return ids[0, input_ids.shape[1] :].tolist(), rounds


def main(folder: Path) -> None:
    """Write targets, drafts and `cases.json` into a folder."""
    targets, cases = {}, {}
    for name, (architecture, settings) in _TARGETS.items():
        target = targets[name] = tiny_target(architecture, seed=5, **_WIDE, **settings)
        target.save_pretrained(folder / "targets" / name)
        word_tokenizer().save_pretrained(folder / "targets" / name)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in (5, 40, 23, 70)]
    for index, (name, (target_name, fields)) in enumerate(_DRAFTS.items()):
        target = targets[target_name]
        # Wider weights would grow the states from step to step, until rounding decides which key a query attends to.
        draft = tiny_draft(target, seed=index, initializer_range=0.1, **fields)
        if draft.draft_to_target is not None:
            draft.draft_to_target.copy_(torch.randperm(draft.config.vocab_size)[: draft.config.draft_vocab_size].sort().values)
        switches = dict.fromkeys(("tree_ngrams", "tree_coupled", "tree_text_tokens"), False)
        draft.generation_config.update(tree="chain", tree_depth=NUM_STEPS, tree_num_nodes=NUM_STEPS, **switches)
        written = [chain_rounds(target, draft, prompt[None]) for prompt in prompts]
        cases[name] = {"target": target_name, "tokens": [ids for ids, _ in written], "rounds": [rounds for _, rounds in written]}
        draft.save_pretrained(folder / "drafts" / name)
    about = {"prompts": [prompt.tolist() for prompt in prompts], "num_steps": NUM_STEPS, "num_tokens": NUM_TOKENS, "cases": cases}
    (folder / "cases.json").write_text(json.dumps(about), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
