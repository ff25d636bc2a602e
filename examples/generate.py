"""The same text twice: without a draft, then with one, and what the draft saved.

    python examples/generate.py
    python examples/generate.py --target FOLDER --draft FOLDER --max-new-tokens 16
"""

import argparse

import torch

from transformers_prism import PrismDraftModel
from transformers_prism.target import load_target


def main(argv=None):
    """Decode one prompt both ways; returns whether the outputs are the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="Hub id, folder or .gguf file; SmolLM2-135M-Instruct if absent")
    parser.add_argument("--draft", default="hub_cards/SmolLM2-135M-Instruct-PRISM", help="folder or Hub id")
    parser.add_argument("--prompt", default="Why is the sky blue?")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens")
    args = parser.parse_args(argv)

    target, tokenizer = load_target(args.target)
    draft = PrismDraftModel.from_pretrained(args.draft, dtype=target.dtype)
    prompt = args.prompt
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    plain = target.generate(**inputs, **settings)
    speculated = target.generate(**inputs, **settings, assistant_model=draft)

    new_tokens = slice(inputs.input_ids.shape[1], None)
    for name, output in (("plain:", plain), ("with the draft:", speculated)):
        print(name, tokenizer.decode(output[0, new_tokens], skip_special_tokens=True))
    speculation = draft.last_speculation
    print(f"{speculation.num_rounds[0]} rounds, acceptance length (tau) {speculation.acceptance_length:.2f}")
    return torch.equal(plain, speculated)


if __name__ == "__main__":
    main()
