"""What docs/targets.md says of the demo target: `python -m tests.real_quantised [CASE ...]` prints, for each way to quantise
or adapt it, whether the shipped draft leaves its greedy text as it is, and tau. Speed is measured by `bench generate`."""

import copy
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from transformers_prism import load_draft
from transformers_prism.target import load_target

DRAFT = Path(__file__).parent.parent / "hub_cards" / "SmolLM2-135M-Instruct-PRISM"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a string.",
)
NUM_TOKENS = 32


def torchao(config_name, **settings):
    """All linear layers but the head."""

    def change(target):
        import torchao.quantization as quantization

        values = {name: value(quantization) if callable(value) else value for name, value in settings.items()}
        config = getattr(quantization, config_name)(**values)
        quantization.quantize_(target.model, config)
        return target

    return change


def quanto(bits):
    """All linear layers but the head."""

    def change(target):
        import optimum.quanto

        optimum.quanto.quantize(target.model, weights=getattr(optimum.quanto, bits))
        optimum.quanto.freeze(target.model)
        return target

    return change


def replaced(make):
    """All linear layers but the head, one by one."""

    def change(target):
        for parent in list(target.model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, make(child))
        return target

    return change


def bitsandbytes_8_bits(linear):
    """Without outliers apart."""
    import bitsandbytes

    settings = {"bias": False, "has_fp16_weights": False, "threshold": 0.0}
    layer = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, **settings)
    layer.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def bitsandbytes_4_bits(linear):
    """NF4, computed in float32."""
    import bitsandbytes

    settings = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, **settings)
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def hqq(linear):
    """4 bits in groups of 64."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")


def lora(is_merged):
    """A small random adapter on attention and MLP."""

    def change(target):
        import peft

        torch.manual_seed(0)
        modules = ["q_proj", "v_proj", "up_proj"]
        settings = peft.LoraConfig(r=8, lora_alpha=1, target_modules=modules, init_lora_weights=False)
        model = peft.get_peft_model(target, settings)
        if is_merged:
            model.merge_adapter()
        return model.base_model.model

    return change


CASES = {
    "float32": lambda target: target,
    "bfloat16": lambda target: target.to(torch.bfloat16),
    "float16": lambda target: target.half(),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8, inputs by token": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int8, inputs by forward": torchao(
        "Int8DynamicActivationInt8WeightConfig", granularity=lambda quantization: quantization.PerTensor()
    ),
    "torchao int4": torchao(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda quantization: quantization.PerGroup(64)
    ),
    "quanto int8": quanto("qint8"),
    "quanto int4": quanto("qint4"),
    "bitsandbytes 8 bits, no outliers": replaced(bitsandbytes_8_bits),
    "bitsandbytes 4 bits": replaced(bitsandbytes_4_bits),
    "hqq int4": replaced(hqq),
    "LoRA": lora(is_merged=False),
    "LoRA merged": lora(is_merged=True),
}


def compare(target, tokenizer):
    """One line: prompts whose text is plain decoding's, near-ties, other differences, tau."""
    draft = load_draft(DRAFT, target)
    draft.generation_config.update(tree="static", tree_top_k=4, tree_depth=5, tree_num_nodes=15)
    num_equal = num_ties = num_others = num_tokens = num_rounds = 0
    arguments = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        plain = target.generate(**inputs, **arguments)
        found = target.generate(**inputs, assistant_model=draft, **arguments)
        if draft.last_speculation.declined:
            return f"plain: {draft.last_speculation.declined[:150]}"
        num_tokens += sum(draft.last_speculation.num_committed)
        num_rounds += sum(draft.last_speculation.num_rounds)
        length = min(plain.sequences.shape[1], found.sequences.shape[1])
        differs = (plain.sequences[0, :length] != found.sequences[0, :length]).nonzero()
        if not len(differs):
            num_equal += 1
            continue
        place = int(differs[0]) - inputs["input_ids"].shape[1]
        logits, of_tree = plain.logits[place][0].float(), found.logits[place][0].float()
        best, second = logits.topk(2).values
        is_tie = best - second < 2 * (logits - of_tree).abs().max()
        num_ties, num_others = num_ties + bool(is_tie), num_others + (not is_tie)
    return f"{num_equal} of {len(PROMPTS)} equal, {num_ties} part at a near-tie, {num_others} otherwise; tau {num_tokens / num_rounds:.2f}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    base, tokenizer = load_target()
    for name in sys.argv[1:] or CASES:
        sys.stdout.write(f"{name}: {compare(CASES[name](copy.deepcopy(base)).eval(), tokenizer)}\n")
        sys.stdout.flush()
