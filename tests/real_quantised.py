"""What docs/targets.md says of the demo target: `python -m tests.real_quantised [CASE ...] --json FILE` measures, for each way
to quantise or adapt it, whether the shipped draft leaves its greedy text as it is, tau, and tokens per second. Run again, it
goes on with the cases that FILE lacks. On a machine that does nothing else."""

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from transformers_prism import load_draft
from transformers_prism.bench.near_ties import find_differences
from transformers_prism.target import load_target
from transformers_prism.whole_files import write_json

DRAFT = Path(__file__).parent.parent / "hub_cards" / "SmolLM2-135M-Instruct-PRISM"
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a string.",
)


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


def compare(target, tokenizer, num_tokens):
    """What one row of the table says: prompts whose text is plain decoding's, near-ties, errors, tau, and tokens per second of
    plain and drafted decoding, prompt by prompt in turn."""
    draft = load_draft(DRAFT, target)
    draft.generation_config.update(tree="static", tree_top_k=4, tree_depth=5, tree_num_nodes=15)
    found = dict.fromkeys(("prompts", "equal", "near_ties", "errors", "tokens", "rounds"), 0)
    seconds = {"plain": 0.0, "drafted": 0.0}
    settings = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 2, "repetition_penalty": 1.0}
    num_plain = num_drafted = 0

    def timed(kind, inputs, **assistant):
        start = time.perf_counter()
        output = target.generate(**inputs, **settings, **assistant)
        seconds[kind] += time.perf_counter() - start
        return output

    for number, prompt in enumerate((PROMPTS[0], *PROMPTS)):
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        plain = timed("plain", inputs)
        drafted = timed("drafted", inputs, assistant_model=draft)
        if draft.last_speculation.declined:
            return {"declined": draft.last_speculation.declined}
        if number == 0:  # layers are checked and memory is taken
            seconds = {"plain": 0.0, "drafted": 0.0}
            continue
        length = inputs["input_ids"].shape[1]
        num_plain, num_drafted = num_plain + plain.shape[1] - length, num_drafted + drafted.shape[1] - length
        found["prompts"] += 1
        found["tokens"] += sum(draft.last_speculation.num_committed)
        found["rounds"] += sum(draft.last_speculation.num_rounds)
        found["equal"] += torch.equal(plain, drafted)
        if not torch.equal(plain, drafted):
            differences, _ = find_differences(target, inputs, settings, drafted)
            found["near_ties"] += sum(one.is_near_tie for one in differences)
            found["errors"] += sum(not one.is_near_tie for one in differences)
    speeds = {"plain_per_second": num_plain / seconds["plain"], "drafted_per_second": num_drafted / seconds["drafted"]}
    return {**found, **speeds, "tau": found["tokens"] / found["rounds"]}


def table(results):
    """Rows for docs/targets.md."""
    lines = [
        "| target | prompts with plain decoding's text | near-ties | errors | tau | tokens/s plain | tokens/s drafted |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        cells = ["decoded plainly", *[""] * 5]
        if "declined" not in one:
            speeds = (f"{one[kind]:.1f}" for kind in ("plain_per_second", "drafted_per_second"))
            cells = [f"{one['equal']} of {one['prompts']}", one["near_ties"], one["errors"], f"{one['tau']:.2f}", *speeds]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments=None):
    """Run what the file of results lacks, write it after each case, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"all of them if absent: {', '.join(CASES)}")
    parser.add_argument("--num-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("real_quantised.json"), help="results; cases that it has are kept")
    parsed = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    kept = json.loads(parsed.json.read_text()) if parsed.json.is_file() else {}
    results = kept["results"] if kept.get("num_tokens") == parsed.num_tokens else {}
    base, tokenizer = load_target()
    for name in parsed.cases or CASES:
        if name in results:
            continue
        results[name] = compare(CASES[name](copy.deepcopy(base)).eval(), tokenizer, parsed.num_tokens)
        write_json(parsed.json, {"num_tokens": parsed.num_tokens, "num_threads": torch.get_num_threads(), "results": results})
        sys.stdout.write(f"{name}: {results[name]}\n")
        sys.stdout.flush()
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
