"""Train a draft for a tiny random target, from text that the target writes itself; about half a minute on a CPU.

python examples/train_tiny_cpu.py
python examples/train_tiny_cpu.py --output runs/tiny --num-conversations 200
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.training.train import TrainConfig, train

VOCAB_SIZE = 64


def make_target(folder: Path) -> LlamaForCausalLM:
    """A random target with a tokenizer, saved where the train command can find it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, num_hidden_layers=2, initializer_range=0.1, pad_token_id=0, eos_token_id=None, **sizes
    )
    target = LlamaForCausalLM(config).eval()
    target.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return target


def write_conversations(target, path: Path, num_conversations: int) -> None:
    """Random prompts of 4 tokens, each with an answer of 28 that the target writes."""
    prompts = torch.randint(1, VOCAB_SIZE, (num_conversations, 4))
    answers = target.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=28)
    lines = (json.dumps({"input_ids": row, "prompt_length": 4}) for row in answers.tolist())
    path.write_text("\n".join(lines) + "\n")


def acceptance_length(target, draft, num_prompts: int = 16) -> float:
    """tau over prompts that no draft has seen, with chains of 4 tokens."""
    torch.manual_seed(1)
    prompts = torch.randint(1, VOCAB_SIZE, (num_prompts, 4))
    draft.generation_config.update(tree="chain", tree_depth=4, tree_num_nodes=4)
    target.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=28, assistant_model=draft
    )
    return draft.last_speculation.acceptance_length


def main(argv=None):
    """Train, compare with an untrained draft, and return both acceptance lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="folder of the run; a temporary one if absent")
    parser.add_argument("--num-conversations", type=int, default=400, help="that the target writes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        target = make_target(folder / "target")
        write_conversations(target, folder / "data.jsonl", args.num_conversations)
        settings = {"draft_vocab_size": 0, "batch_size": 16, "learning_rate": 1e-2, "token_weight": 1.0}
        config = TrainConfig(
            data=str(folder / "data.jsonl"),
            output=args.output or str(folder / "run"),
            target=str(folder / "target"),
            single_step_epochs=6.0,
            use_cpu=True,
            **settings,
        )
        trained = train(config)
    untrained = PrismDraftModel(PrismConfig.from_target(target)).eval()
    before, after = acceptance_length(target, untrained), acceptance_length(target, trained)
    print(f"acceptance length (tau): untrained {before:.2f}, trained {after:.2f}")
    return before, after


if __name__ == "__main__":
    main()
