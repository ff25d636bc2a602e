"""Targets in 8 and 4 bits, in short floats, with adapters, offloaded: the text is their own, or they are decoded plainly.

A text may part from plain decoding only at near-ties (`bench/near_ties.py`).
"""

import contextlib
import copy
import importlib.util
import warnings

import pytest
import torch
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_draft, tiny_target
from torch import nn
from transformers import AutoModelForCausalLM

from transformers_prism import load_draft, prepare_for_cpu
from transformers_prism.bench.near_ties import find_differences
from transformers_prism.decoding.layer_check import is_plain_linear, reason_against_target
from transformers_prism.packed_layers import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 128}
LENGTH = 24


def make_target(seed=3, dtype=torch.float32):
    """A target whose widths all libraries take."""
    return tiny_target("llama", seed, **SIZES).to(dtype)


def replaced(target, make):
    """The target, each linear layer another module."""
    for parent in list(target.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
    return target


def loaded(tmp_path, make_config):
    """A target that transformers quantises as it is loaded."""
    make_target().save_pretrained(tmp_path / "target")
    arguments = {"quantization_config": make_config(), "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(tmp_path / "target", **arguments).eval()


def torchao(config_name, **settings):
    """torchao by transformers' configuration, the head left as it is."""

    def make(tmp_path):
        import torchao.quantization as quantization
        from transformers import TorchAoConfig

        values = {name: value(quantization) if callable(value) else value for name, value in settings.items()}
        return loaded(tmp_path, lambda: TorchAoConfig(getattr(quantization, config_name)(**values)))

    return make


def whole_torchao(tmp_path):
    """With the head in 8 bits, too."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    target = make_target()
    quantize_(target, Int8WeightOnlyConfig())
    return target


def bitsandbytes(**settings):
    """bitsandbytes by transformers' configuration."""

    def make(tmp_path):
        from transformers import BitsAndBytesConfig

        return loaded(tmp_path, lambda: BitsAndBytesConfig(**settings))

    return make


def quanto(weights):
    """optimum-quanto by transformers' configuration."""

    def make(tmp_path):
        from transformers import QuantoConfig

        return loaded(tmp_path, lambda: QuantoConfig(weights=weights))

    return make


def hqq(tmp_path):
    """HQQ by its own class; transformers does not load it on every release."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = {"compute_dtype": torch.float32, "device": "cpu"}
    return replaced(
        make_target(), lambda linear: HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=64), **settings)
    )


def compressed(inputs):
    """compressed-tensors as its own functions apply it: the layers get another forward, their class stays."""

    def make(tmp_path):
        from compressed_tensors import quantization

        values = {"num_bits": 8, "type": "int", "symmetric": True}
        scheme = {"weights": quantization.QuantizationArgs(**values, strategy="channel")}
        if inputs is not None:
            scheme["input_activations"] = quantization.QuantizationArgs(**values, strategy=inputs, dynamic=True)
        group = quantization.QuantizationScheme(targets=["Linear"], **scheme)
        target = make_target()
        quantization.apply_quantization_config(target, quantization.QuantizationConfig(config_groups={"all": group}))
        for layer in target.modules():
            if hasattr(layer, "weight_scale"):
                layer.weight_scale.data = layer.weight.abs().amax(1, keepdim=True) / 127
                layer.quantization_status = quantization.QuantizationStatus.FROZEN
        return target

    return make


class PackedCodes(nn.Module):
    """Stands in for the layers of GPTQ and AWQ, whose kernels need a GPU: two codes of 4 bits in a byte, scales of groups of
    32, no `weight`; like AWQ's, few tokens take another product than many, here in another order of summation."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.weight.data.unflatten(1, (-1, 32))
        scales = groups.abs().amax(-1, keepdim=True) / 7
        codes = ((groups / scales).round() + 8).to(torch.uint8).flatten(1)
        self.register_buffer("qweight", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, input):
        codes = torch.stack((self.qweight & 15, self.qweight >> 4), dim=-1).flatten(1)
        weight = ((codes.float() - 8).unflatten(1, (-1, 32)) * self.scales).flatten(1).to(input.dtype)
        if input.shape[:-1].numel() > 4:
            return input @ weight.T
        return sum(part @ rows.T for part, rows in zip(input.chunk(2, -1), weight.chunk(2, -1), strict=True))


# Those that warn that their layers round inputs or products.
ROUNDING = {
    "torchao int8, inputs by token",
    "bitsandbytes 8 bits, no outliers",
    "bitsandbytes 4 bits",
    "compressed-tensors int8, inputs by token",
}
# The package that makes it, how, and whether drafts serve it.
CASES = {
    "torchao int8": ("torchao", torchao("Int8WeightOnlyConfig"), True),
    "torchao int8, head too": ("torchao", whole_torchao, True),
    "torchao int8, inputs by token": ("torchao", torchao("Int8DynamicActivationInt8WeightConfig"), True),
    "torchao int8, inputs by forward": (
        "torchao",
        torchao("Int8DynamicActivationInt8WeightConfig", granularity=lambda quantization: quantization.PerTensor()),
        False,
    ),
    "torchao int4": (
        "torchao",
        torchao(
            "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=lambda quantization: quantization.PerGroup(32)
        ),
        True,
    ),
    "torchao float8": ("torchao", torchao("Float8WeightOnlyConfig"), True),
    "bitsandbytes 8 bits": ("bitsandbytes", bitsandbytes(load_in_8bit=True), False),
    "bitsandbytes 8 bits, no outliers": (
        "bitsandbytes",
        bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0),
        True,
    ),
    "bitsandbytes 4 bits": (
        "bitsandbytes",
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        True,
    ),
    "quanto int8": ("optimum.quanto", quanto("int8"), True),
    "quanto int4": ("optimum.quanto", quanto("int4"), True),
    "hqq int4": ("hqq", hqq, True),
    "compressed-tensors int8": ("compressed_tensors", compressed(None), True),
    "compressed-tensors int8, inputs by token": ("compressed_tensors", compressed("token"), True),
    "compressed-tensors int8, inputs by forward": ("compressed_tensors", compressed("tensor"), False),
    "packed codes": ("torch", lambda tmp_path: replaced(make_target(), PackedCodes), True),
    "bfloat16": ("torch", lambda tmp_path: make_target(dtype=torch.bfloat16), True),
    "float16": ("torch", lambda tmp_path: make_target().half(), True),
}


def build(case, tmp_path):
    """The target of a case; its test is skipped where the package is not there."""
    package, make, is_served = CASES[case]
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(package) is not None:
            return make(tmp_path), is_served
    pytest.skip(f"{package} is not installed")


def assert_own_text(target, draft, input_ids, attention_mask, max_new_tokens=LENGTH):
    """Plain and drafted texts are one, up to near-ties; returns how many rows part at one."""
    arguments = {
        "attention_mask": attention_mask,
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "pad_token_id": PAD_ID,
    }
    plain = target.generate(input_ids=input_ids, **arguments)
    drafted = target.generate(input_ids=input_ids, assistant_model=draft, **arguments)
    if torch.equal(plain, drafted):
        return 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    differences, _ = find_differences(target, inputs, arguments, drafted)
    assert all(one.is_near_tie for one in differences), differences[-1]
    return len({one.row for one in differences})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_quantised_targets_write_their_own_text(tmp_path, case, num_rows):
    """With a draft that knows the text, so that long paths of trees are accepted, or plainly, with the reason."""
    target, is_served = build(case, tmp_path)
    input_ids, mask = prompts(num_rows)
    plain = target.generate(
        input_ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, pad_token_id=PAD_ID
    )
    draft = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
    if is_served:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            num_parted = assert_own_text(target, draft, input_ids, mask)
        assert any("round their inputs" in str(one.message) for one in caught) == (case in ROUNDING)
        assert draft.last_speculation.declined is None
        assert draft.last_speculation.stopped_drafting is None
        assert num_parted or draft.last_speculation.acceptance_length > 1.3
    else:
        with pytest.warns(UserWarning, match="another output when other tokens are in the same forward"):
            assert assert_own_text(target, draft, input_ids, mask) == 0


@pytest.mark.parametrize("case", [case for case, (_, _, is_served) in CASES.items() if is_served])
@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_quantised_targets_lend_their_heads(tmp_path, case, draft_vocab_size):
    """The draft's logits are the head's own, whether it is used or rows are copied."""
    target, _ = build(case, tmp_path)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size).to(target.dtype).bind(target)
    state = torch.linspace(-1, 1, 3 * 128).view(3, 128).to(target.dtype)
    with torch.no_grad():
        expected = target.lm_head(state)[:, :draft_vocab_size].float()
        found = draft.compute_logits(state).float()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    input_ids, mask = prompts(2)
    assert_own_text(target, draft, input_ids, mask)


@pytest.mark.parametrize("case", CASES)
def test_quantised_layers_are_left_alone_by_prepare_for_cpu(tmp_path, case):
    """What is packed is plain; the logits stay, and the layers come back."""
    target, _ = build(case, tmp_path)
    input_ids, _ = prompts(1)
    linears = {name: type(module) for name, module in target.named_modules()}
    with torch.no_grad(), prepare_for_cpu(target) as prepared:
        assert all(is_plain_linear(layer) for layer in prepared.linears)
        changed = {name for name, module in target.named_modules() if type(module) is not linears[name]}
        assert len(changed) == len(prepared.linears)
        logits = target(input_ids).logits
    with torch.no_grad():
        tolerance = 1e-3 if target.dtype is torch.float32 else 4 * torch.finfo(target.dtype).eps * float(logits.abs().max())
        torch.testing.assert_close(target(input_ids).logits, logits, atol=tolerance, rtol=1e-3)
    assert {name: type(module) for name, module in target.named_modules()} == linears


def adapted(target, targets=("q_proj", "v_proj", "up_proj", "lm_head")):
    """The target with two adapters, "default" and "other"."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=32, target_modules=list(targets), init_lora_weights=False)
    model = peft.get_peft_model(target, settings)
    model.add_adapter("other", settings)
    return model.eval()


@pytest.mark.parametrize("draft_vocab_size", [None, 50])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_adapters_are_followed(draft_vocab_size, is_prepared):
    """Switched, off, merged, unmerged and unloaded between calls: the text is the target's own, the draft's head what the
    target's computes now."""
    target = make_target()
    model = adapted(target)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    input_ids, mask = prompts(2)
    state = torch.linspace(-1, 1, 128)[None]
    seen = []

    def check():
        with torch.no_grad():
            head = target.get_output_embeddings()
            plain = target.generate(
                input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=PAD_ID
            )
            script = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
            assert_own_text(model, script, input_ids, mask, 12)
            assert_own_text(model, draft, input_ids, mask, 12)
            logits, expected = draft.compute_logits(state), head(state)[:, :draft_vocab_size]
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
        assert script.last_speculation.stopped_drafting is None
        seen.append(expected)

    with prepare_for_cpu(target) if is_prepared else contextlib.nullcontext():
        check()
        model.set_adapter("other")
        check()
        with model.disable_adapter():
            check()
        model.merge_adapter()
        check()
        model.unmerge_adapter()
        check()
        if not is_prepared:  # layers that are taken out of the model are no longer what was prepared
            target = model.merge_and_unload()
            model = target
            check()
    first, other, off, merged, unmerged, *_ = seen
    assert not torch.allclose(first, other, atol=1e-2)
    assert not torch.allclose(other, off, atol=1e-2)
    torch.testing.assert_close(merged, other, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(unmerged, other, atol=2e-3, rtol=1e-3)


def test_a_draft_is_loaded_for_an_adapted_target(tmp_path):
    """By the model that peft made."""
    target = make_target(dtype=torch.bfloat16)
    tiny_draft(target).save_pretrained(tmp_path / "draft")
    model = adapted(target)
    draft = load_draft(tmp_path / "draft", model)
    assert draft.dtype == torch.bfloat16
    input_ids, mask = prompts(1)
    assert_own_text(model, draft, input_ids, mask, 8)


def test_an_adapter_with_another_vocabulary_is_refused():
    """Before any token, the target as it was."""
    target = make_target()
    draft = tiny_draft(target)
    model = adapted(target, ("q_proj",))
    target.resize_token_embeddings(136)
    input_ids, mask = prompts(1)
    weights = copy.deepcopy(target.state_dict())
    # transformers itself says so, in its own words.
    with pytest.raises(ValueError, match="different tokenizers|vocab_size: expected 128 .* got 136"):
        model.generate(input_ids, attention_mask=mask, assistant_model=draft, max_new_tokens=4)
    assert all(torch.equal(weights[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_offloaded_targets_write_their_own_text(tmp_path, where, draft_vocab_size):
    """By accelerate's hooks: weights on the meta device but while a layer runs, the head's too."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    target = make_target()
    input_ids, mask = prompts(2)
    expected = target.generate(input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=PAD_ID)
    if where == "cpu":
        accelerate.cpu_offload(target, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(target, str(tmp_path), execution_device="cpu")
    else:
        last = {"model.layers.2": "disk", "model.layers.3": "disk", "model.norm": "disk", "lm_head": "disk"}
        parts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
        device_map = {**dict.fromkeys(parts, "cpu"), **last}
        accelerate.dispatch_model(target, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    script = scripted_draft(target, expected, input_ids.shape[1], is_strict=False)
    for assistant in (draft, script):
        assert assert_own_text(target, assistant, input_ids, mask, 12) == 0
        assert assistant.last_speculation.declined is None
    assert script.last_speculation.acceptance_length > 1.3
    draft.generation_config.update(tree="auto")  # which measures the target's forwards first
    assert_own_text(target, draft, input_ids, mask, 12)
    assert draft.last_speculation.declined is None


def test_a_plain_target_has_nothing_against_it():
    """Nor one that prepare_for_cpu packed."""
    target = make_target()
    with prepare_for_cpu(target), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(target.lm_head, PackedLinear)
        assert reason_against_target(target) is None
