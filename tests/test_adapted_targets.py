"""Targets with adapters of every kind, and drafts and targets in other dtypes, quantised or compiled by the user: the text is the
target's own."""

import contextlib

import pytest
import torch
from test_quantised_targets import adapted, assert_own_text, make_target, replaced
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_draft
from torch import nn
from transformers import DynamicCache

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def tuned(target, kind, **settings):
    """The target with one of peft's other adapters, its weights drawn at random."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    model = peft.get_peft_model(target, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        ("LoraConfig", {"use_dora": True, "target_modules": ["q_proj", "v_proj", "lm_head"]}, None),
        ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, None),
        ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, None),
        ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, None),
        ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"]}, None),
        ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}, None),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}, "virtual tokens before the text"),
        ("PromptTuningConfig", {"num_virtual_tokens": 4}, "virtual tokens before the text"),
    ],
)
def test_other_adapters_are_followed_or_declined(num_rows, kind, settings, match):
    """Virtual tokens of peft's prompt learning shift the places of padding, which a tree's mask would not know of."""
    target = make_target()
    model = tuned(target, kind, **settings)
    input_ids, mask = prompts(num_rows)
    arguments = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**arguments)
    script = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
    for draft in (script, tiny_draft(target, draft_vocab_size=50)):
        with contextlib.nullcontext() if match is None else pytest.warns(UserWarning, match=match):
            assert torch.equal(model.generate(**arguments, assistant_model=draft), plain)
        assert (draft.last_speculation.declined is None) == (match is None)
        assert match is not None or draft is not script or draft.last_speculation.acceptance_length > 1.3


def test_an_adapter_of_the_last_tokens_is_declined():
    """aLoRA: also after a prompt without the tokens that switch it on, and in a batch."""
    target = make_target()
    input_ids, mask = prompts(3)
    tokens = input_ids[0, -3:-1].tolist()
    model = tuned(target, "LoraConfig", target_modules=["q_proj", "down_proj"], alora_invocation_tokens=tokens)
    other = (input_ids + 7) % 90 + 3
    draft = tiny_draft(target)
    for ids, of_ids in ((other[:1], mask[:1]), (input_ids[:1], mask[:1]), (input_ids, mask)):
        arguments = {"input_ids": ids, "attention_mask": of_ids, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(**arguments)
        with pytest.warns(UserWarning, match="aLoRA changes the last tokens of each forward"):
            assert torch.equal(model.generate(**arguments, assistant_model=draft), plain)


def test_rows_with_adapters_of_their_own():
    """peft's hooks hold one adapter for each row of the batch, so that rows that have ended stay."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    target = make_target()
    model = tuned(target, "LoraConfig", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter("b", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    input_ids, mask = prompts(3)
    arguments = {
        **{"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD_ID},
        "adapter_names": ["default", "b", "__base__"],
    }
    # Ends one row early.
    arguments["eos_token_id"] = int(model.generate(**arguments)[1, input_ids.shape[1] + 3])
    plain = model.generate(**arguments)
    for tree in ("auto", "static"):
        draft = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
        draft.generation_config.update(tree=tree)
        assert torch.equal(model.generate(**arguments, assistant_model=draft), plain)


class Steered(nn.Module):
    """A layer, and a vector for each row."""

    def __init__(self, layer, vectors):
        super().__init__()
        self.layer, self.vectors = layer, vectors

    def forward(self, *args, **kwargs):
        output = self.layer(*args, **kwargs)
        return output + self.vectors[: len(output)]


@pytest.mark.parametrize("is_hook", [True, False])
def test_added_code_that_knows_rows(is_hook, one_thread):
    """A vector for each row of the batch, added by somebody's hook or module: rows that have ended stay in their places."""
    target = make_target()
    input_ids, mask = prompts(3)
    vectors = 0.3 * torch.randn(3, 1, target.config.hidden_size)
    layer = target.model.layers[0].mlp
    if is_hook:
        layer.register_forward_hook(lambda module, args, output: output + vectors[: len(output)])
    else:
        target.model.layers[0].mlp = Steered(layer, vectors)
    arguments = {"input_ids": input_ids, "attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "pad_token_id": PAD_ID}
    arguments["eos_token_id"] = int(target.generate(**arguments)[1, input_ids.shape[1] + 3])
    plain = target.generate(**arguments)
    for draft in (scripted_draft(target, plain, input_ids.shape[1], is_strict=False), tiny_draft(target)):
        assert torch.equal(target.generate(**arguments, assistant_model=draft), plain)
        assert draft.last_speculation.declined is None


@pytest.mark.parametrize(
    "switch",
    [
        lambda model, turn: model.set_adapter("other" if turn == 0 else "default"),
        lambda model, turn: model.merge_adapter() if turn == 0 else model.unmerge_adapter(),
        lambda model, turn: model.disable_adapter_layers() if turn == 0 else model.enable_adapter_layers(),
    ],
    ids=["another", "merged", "off"],
)
def test_adapters_are_switched_within_a_chat(switch):
    """Between the turns of one cache: what is in the cache stays as plain decoding left it."""
    model = adapted(make_target())
    input_ids, _ = prompts(1)
    texts = []
    for assistant in ({}, {"assistant_model": tiny_draft(model.base_model.model, draft_vocab_size=50)}):
        model.set_adapter("default")
        cache, text, turns = DynamicCache(config=model.config), input_ids, []
        for turn in range(3):
            arguments = {"attention_mask": torch.ones_like(text), "max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD_ID}
            text = model.generate(input_ids=text, past_key_values=cache, **arguments, **assistant)
            turns.append(text)
            text = torch.cat((text, input_ids[:, :3]), dim=1)
            if turn < 2:
                switch(model.base_model, turn)
        texts.append(turns)
    assert all(map(torch.equal, *texts))


@pytest.mark.parametrize("draft_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("draft_vocab_size", [None, 50])
def test_a_draft_may_have_another_dtype(dtype, draft_dtype, draft_vocab_size):
    """And the target may be cast after it was bound."""
    target = make_target(dtype=dtype)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size).to(draft_dtype)
    input_ids, mask = prompts(2)
    assert_own_text(target, draft, input_ids, mask, 8)
    target.half()
    assert_own_text(target, draft, input_ids, mask, 8)
    assert draft.last_speculation.declined is None
    assert draft.last_speculation.stopped_drafting is None


@pytest.mark.parametrize("kind", ["torchao", "quanto", "dynamic"])
def test_a_draft_may_be_quantised(kind):
    """Whatever it proposes, the text is the target's."""
    target = make_target()
    draft = tiny_draft(target, draft_vocab_size=50)
    if kind == "torchao":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(draft, quantization.Int8WeightOnlyConfig())
    elif kind == "quanto":
        library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        library.quantize(draft, weights=library.qint8)
        library.freeze(draft)
    else:
        draft = torch.ao.quantization.quantize_dynamic(draft, {nn.Linear}, dtype=torch.qint8)
    input_ids, mask = prompts(2)
    assert assert_own_text(target, draft, input_ids, mask, 8) == 0
    assert draft.last_speculation.declined is None


@pytest.mark.parametrize("part", ["layers", "mlp", "linear layers", "head"])
def test_parts_of_a_target_may_be_compiled(part):
    """By the user, before any call."""
    target = make_target()
    for index, layer in enumerate(target.model.layers):
        if part == "layers":
            target.model.layers[index] = torch.compile(layer, backend="eager")
        elif part == "mlp":
            layer.mlp = torch.compile(layer.mlp, backend="eager")
    if part == "linear layers":
        target = replaced(target, lambda linear: torch.compile(linear, backend="eager"))
    elif part == "head":
        target.lm_head = torch.compile(target.lm_head, backend="eager")
    input_ids, mask = prompts(2)
    assert assert_own_text(target, tiny_draft(target, draft_vocab_size=50), input_ids, mask, 8) == 0
