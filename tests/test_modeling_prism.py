"""The draft model: shapes, borrowing from the target, saving and loading."""

import copy
import itertools
import json
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, VOCAB_SIZE, prompts, tiny_draft, tiny_target
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from transformers_prism import PrismConfig, PrismDraftModel, modeling_prism, prepare_for_cpu
from transformers_prism.transformers_names import cache_of

pytestmark = pytest.mark.quick

# As EAGLE-3 has it.
EAGLE3 = {
    "module_form": "eagle3",
    "num_processing_modules": 1,
    "projection_bias": False,
    "share_target_head": False,
    "draft_vocab_size": 20,
}


def hidden(draft, num_rows, length, fused=True, seed=0):
    """Random states for a draft."""
    width = draft.config.fused_hidden_size if fused else draft.config.hidden_size
    return torch.randn(num_rows, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("draft_step", [0, 1, 2, 5])
@pytest.mark.parametrize("num_layers_per_module", [1, 2])
@pytest.mark.parametrize("module_form", ["prism", "eagle3"])
def test_forward_with_a_cache_equals_forward_without(draft_step, num_layers_per_module, module_form):
    """In pieces of any size, with left padding or without."""
    target = tiny_target()
    settings = {"num_layers_per_module": num_layers_per_module, "module_form": module_form, "initializer_range": 0.1}
    draft = tiny_draft(target, **settings).bind(target)
    input_ids, mask = prompts(2, length=10)
    states = hidden(draft, 2, 10)
    for attention_mask in (None, mask):
        whole = draft(input_ids, states, draft_step, attention_mask=attention_mask)
        assert whole.last_hidden_state.shape == (2, 10, 32)
        assert cache_of(whole) is None
        cache, start = None, 0
        for end in (4, 5, 10):
            piece = draft(
                input_ids[:, start:end],
                states[:, start:end],
                draft_step,
                attention_mask=None if attention_mask is None else attention_mask[:, :end],
                cache=cache,
                use_cache=True,
            )
            cache = cache_of(piece)
            real = mask[:, start:end].bool()
            torch.testing.assert_close(
                piece.last_hidden_state[real], whole.last_hidden_state[:, start:end][real], atol=1e-4, rtol=1e-4
            )
            start = end


@pytest.mark.parametrize("num_layers_per_module", [1, 2])
@pytest.mark.parametrize("module_form", ["prism", "eagle3"])
@pytest.mark.parametrize("length", [1, 10])
def test_outputs_that_nobody_needs_are_left_out(length, num_layers_per_module, module_form):
    """The last output and all keys and values are what they were."""
    target = tiny_target()
    settings = {"num_layers_per_module": num_layers_per_module, "module_form": module_form, "initializer_range": 0.1}
    draft = tiny_draft(target, **settings).bind(target)
    input_ids, mask = prompts(2, length=length)
    states = hidden(draft, 2, length)
    near = {"atol": 1e-5, "rtol": 1e-5}
    for attention_mask in (None, mask):
        whole = draft(input_ids, states, attention_mask=attention_mask, use_cache=True)
        for num_outputs in (0, 1):
            part = draft(
                input_ids, states, attention_mask=attention_mask, cache=DynamicCache(), num_outputs=num_outputs
            )
            assert part.last_hidden_state.shape == (2, num_outputs, 32)
            expected = whole.last_hidden_state[:, length - num_outputs :]
            torch.testing.assert_close(part.last_hidden_state, expected, **near)
            layers = zip(cache_of(part).layers, cache_of(whole).layers, strict=True)
            for layer, expected_layer in layers:
                torch.testing.assert_close(layer.keys, expected_layer.keys, **near)
                torch.testing.assert_close(layer.values, expected_layer.values, **near)


@torch.no_grad()
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "biased"])
def test_tokens_of_a_text_are_proposed_as_if_the_vocabulary_held_them(architecture, is_prepared):
    """Scaled, capped and biased heads included; the draft's own order of tokens makes no difference."""
    target = tiny_target("llama" if architecture == "biased" else architecture)
    if architecture == "biased":
        target.set_output_embeddings(torch.nn.Linear(32, VOCAB_SIZE))
    small, large = (tiny_draft(target, draft_vocab_size=size, initializer_range=0.1).bind(target) for size in (10, 12))
    large.draft_to_target.copy_(torch.tensor([*range(10), 40, 77]))
    large.bind(target)
    with prepare_for_cpu(*(target, small, large) if is_prepared else ()):
        large.bind(target)
        states = hidden(small, 2, 5, fused=False)
        text = small.text_rows(torch.tensor([[77, 3, 40], [40, 77, 9]]))
        assert text.token_ids.tolist() == [*range(10), 40, 77]
        near = {"atol": 1e-3, "rtol": 1e-3} if is_prepared else {"atol": 1e-6, "rtol": 1e-6}
        torch.testing.assert_close(small.compute_logits(states, text), large.compute_logits(states), **near)
        torch.testing.assert_close(small.compute_target_logits(states, text), large.compute_target_logits(states), **near)
        token_ids, log_probs = small.propose(states, 12, text)
        expected_ids, expected_log_probs = large.propose(states, 12)
        torch.testing.assert_close(log_probs, expected_log_probs, **near)
        assert is_prepared or torch.equal(token_ids, expected_ids)


def test_rows_of_a_growing_text_are_gathered_once(monkeypatch):
    """Each token's row, and merged into longer layers seldom: logits as of all rows at once, in whatever order they come."""
    target = tiny_target("llama", 3)
    draft = tiny_draft(target, draft_vocab_size=20).bind(target)
    gathered: list[int] = []
    original = modeling_prism.rows_of_head
    monkeypatch.setattr(
        modeling_prism, "rows_of_head", lambda head, ids, kind: gathered.append(len(ids)) or original(head, ids, kind)
    )
    token_ids, text = torch.arange(20, 90), None
    hidden = torch.randn(2, 3, 32)
    for new in token_ids.split([5, 1, 1, 2, 1, 7, 1, 1, 30, 21]):
        text = draft.rows_beside(new, text)
        whole = draft.rows_beside(text.text_ids)
        gathered.pop()
        torch.testing.assert_close(draft.compute_logits(hidden, text), draft.compute_logits(hidden, whole))
        assert torch.equal(text.weight, whole.weight)
        assert torch.equal(text.token_ids, whole.token_ids)
        sizes = [part.out_features for part in text.parts]
        assert all(2 * after <= before for before, after in itertools.pairwise(sizes))
    assert sum(gathered) == len(token_ids)


def test_texts_that_add_nothing():
    """A whole vocabulary, one that holds the text's tokens, and a head of the draft's own."""
    target = tiny_target()
    text_ids = torch.tensor([[1, 2, 3]])
    for overrides in ({}, {"draft_vocab_size": 10}, {"draft_vocab_size": 2, "share_target_head": False}):
        assert tiny_draft(target, **overrides).bind(target).text_rows(text_ids) is None


@pytest.mark.parametrize("arguments", [{"num_outputs": 2, "use_cache": True}, {"num_outputs": 1}])
def test_outputs_are_left_out_one_way_only(arguments):
    """More than one output, or keys and values that nothing would take, are refused."""
    target = tiny_target()
    draft = tiny_draft(target).bind(target)
    with pytest.raises(ValueError, match="num_outputs: expected 0 or 1 and a cache, got"):
        draft(prompts(1)[0], hidden(draft, 1, 9), **arguments)


def test_each_step_uses_its_module():
    """Steps beyond the map use the last."""
    target = tiny_target()
    draft = tiny_draft(target, num_processing_modules=2, draft_step_to_module=[0, 1, 1]).bind(target)
    input_ids, states = prompts(1)[0], hidden(tiny_draft(target), 1, 9)
    outputs = [draft(input_ids, states, step).last_hidden_state for step in range(5)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert all(torch.equal(outputs[1], output) for output in outputs[2:])


def test_attention_sees_no_later_position():
    """The first layer has no norm before attention and is causal all the same."""
    target = tiny_target()
    draft = tiny_draft(target).bind(target)
    input_ids, states = prompts(1)[0], hidden(tiny_draft(target), 1, 9)
    before = draft(input_ids, states).last_hidden_state
    states[:, 6:] += 1
    after = draft(input_ids, states).last_hidden_state
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6], after[:, 6])


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 8, 96), "expected shape"), ((1, 9, 33), r"or \(1, 9, 96\), got \(1, 9, 33\)"), ((9, 96), "got")],
)
def test_wrong_shapes_are_refused(shape, message):
    """Saying what was expected and found."""
    target = tiny_target()
    with pytest.raises(ValueError, match=message):
        tiny_draft(target).bind(target)(prompts(1)[0], torch.zeros(shape))


def test_an_unbound_draft_says_what_to_do():
    """It needs its target's embedding and head."""
    draft = tiny_draft(tiny_target())
    with pytest.raises(ValueError, match=r"call draft.bind\(target\) first"):
        draft(prompts(1)[0], hidden(draft, 1, 9))
    with pytest.raises(ValueError, match="assistant_model"):
        draft.compute_logits(torch.zeros(1, 1, 32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_targets_own_of_the_same_state(architecture):
    """Embedding scale, logit scale and soft-cap included; a draft vocabulary takes rows of it."""
    target = tiny_target(architecture)
    draft = tiny_draft(target).bind(target)
    few = tiny_draft(target, draft_vocab_size=20)
    few.draft_to_target.copy_(torch.arange(20) * 4 + 3)
    few.bind(target)
    input_ids, _ = prompts(1)
    with torch.no_grad():
        outputs = target(input_ids, output_hidden_states=True)
        last = outputs.hidden_states[-1]
        torch.testing.assert_close(draft.compute_logits(last), outputs.logits, atol=1e-5, rtol=1e-5)
        rows = outputs.logits[..., few.draft_to_target]
        torch.testing.assert_close(few.compute_logits(last), rows, atol=1e-5, rtol=1e-5)
        if architecture != "gpt2":  # adds positions to its embeddings
            expected = outputs.hidden_states[0]
            torch.testing.assert_close(draft.embed(input_ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_form_eagle3_equals_its_definition(num_layers):
    """EAGLE-3's layer written out by weight names; the state of the next step comes before the final norm."""
    target = tiny_target()
    draft = tiny_draft(target, **EAGLE3, num_layers_per_module=num_layers, normalize_target_hidden=False).bind(target)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    weights = draft.state_dict()
    heads, groups, width = draft.config.num_attention_heads, draft.config.num_key_value_heads, draft.config.head_dim

    def norm(states, name):
        scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + draft.config.rms_norm_eps)
        return states * scale * weights[f"{name}.weight"]

    def attend(states, prefix):
        def project(name, count):
            return (states @ weights[f"{prefix}.{name}_proj.weight"].T).view(1, -1, count, width).transpose(1, 2)

        angles = torch.arange(states.shape[1])[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
        cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))

        def rotate(part):
            first, second = part.chunk(2, dim=-1)
            return part * cos + torch.cat((-second, first), dim=-1) * sin

        query, key, value = rotate(project("q", heads)), rotate(project("k", groups)), project("v", groups)
        key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) / width**0.5
        later = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).triu(1)
        mixed = torch.softmax(scores.masked_fill(later, -torch.inf), dim=-1) @ value
        return mixed.transpose(1, 2).flatten(2) @ weights[f"{prefix}.o_proj.weight"].T

    input_ids, states = prompts(1)[0], hidden(draft, 1, 9)
    stream = states @ weights["fusion_layer.weight"].T
    embeddings = target.get_input_embeddings()(input_ids)
    for layer in range(num_layers):
        prefix = f"processing_modules.0.layers.{layer}"
        read = norm(stream, f"{prefix}.hidden_norm" if layer == 0 else f"{prefix}.input_layernorm")
        if layer == 0:
            read = torch.cat((norm(embeddings, f"{prefix}.input_layernorm"), read), dim=-1)
        stream = stream + attend(read, f"{prefix}.self_attn")
        read = norm(stream, f"{prefix}.post_attention_layernorm")
        gate, up, down = (weights[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        stream = stream + (torch.nn.functional.silu(read @ gate.T) * (read @ up.T)) @ down.T
    with torch.no_grad():
        output = draft(input_ids, states).last_hidden_state
        torch.testing.assert_close(output, stream, atol=1e-4, rtol=1e-4)
        logits = norm(stream, "norm") @ weights["lm_head.weight"].T
        torch.testing.assert_close(draft.compute_logits(output), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite", "cohere"])
def test_target_logits_are_the_targets_whatever_head_the_draft_has(architecture):
    """A draft with its own head and norm still aims at the target's distribution, over its own vocabulary."""
    target = tiny_target(architecture)
    draft = tiny_draft(target, **EAGLE3, logit_scale=1.0, logit_softcap=None)
    draft.draft_to_target.copy_(torch.arange(20) * 4 + 3)
    draft.bind(target)
    input_ids, _ = prompts(1)
    with torch.no_grad():
        outputs = target(input_ids, output_hidden_states=True)
        expected = outputs.logits[..., draft.draft_to_target]
        found = draft.compute_target_logits(outputs.hidden_states[-1])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(draft.compute_logits(outputs.hidden_states[-1]), expected)


def test_binding_registers_copies_and_moves_nothing():
    """The draft's parameters, its state and the target's modules stay as they are."""
    target = tiny_target()
    draft = tiny_draft(target)
    names, storage = list(draft.state_dict()), target.lm_head.weight.data_ptr()
    draft.bind(target)
    assert list(draft.state_dict()) == names
    assert draft._borrowed.head is target.lm_head
    assert target.lm_head.weight.data_ptr() == storage
    assert sum(parameter.numel() for parameter in draft.parameters()) < 60_000
    draft.to(torch.float64)
    assert target.dtype == torch.float32


def test_a_copy_borrows_the_same_layers_and_a_pickle_none():
    """Neither carries the target along."""
    target = tiny_target()
    draft = tiny_draft(target).bind(target)
    assert copy.deepcopy(draft)._borrowed.head is target.lm_head
    assert pickle.loads(pickle.dumps(draft))._borrowed is None


def test_a_draft_without_weights_is_refused():
    """Before anything is computed with it."""
    with pytest.raises(ValueError, match="meta device"):
        tiny_draft(tiny_target()).to("meta").bind(tiny_target())


def test_rows_of_a_draft_vocabulary_follow_the_head():
    """Weights written after binding are seen at the next binding."""
    target = tiny_target()
    draft = tiny_draft(target, draft_vocab_size=20).bind(target)
    before = draft.compute_logits(torch.ones(1, 1, 32))
    with torch.no_grad():
        target.lm_head.weight.mul_(2)
    after = draft.bind(target).compute_logits(torch.ones(1, 1, 32))
    torch.testing.assert_close(after, 2 * before)


def test_a_mild_mismatch_is_a_warning():
    """Other weights of the same shape: fewer tokens accepted, nothing else."""
    target = tiny_target()
    target.config._name_or_path = "org/model"
    draft = tiny_draft(target)
    other = tiny_target(seed=1)
    other.config._name_or_path = "org/finetuned"
    with pytest.warns(UserWarning, match=r"name: expected 'org/model' \(draft\), got 'org/finetuned' \(target\)"):
        draft.bind(other)
    assert draft._borrowed.target is other
    other.config._name_or_path = "/some/folder"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_draft(target).bind(other)  # an unknown part is not compared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draft_vocab_size": 20},
        {"share_target_embedding": False, "share_target_head": False},
        {"target_layer_ids": [4]},
        {"num_layers_per_module": 2},
        EAGLE3,
        {**EAGLE3, "num_layers_per_module": 2, "hidden_size": 24, "head_dim": 8, "share_target_embedding": False},
    ],
)
def test_saving_and_loading_keeps_every_bit(tmp_path, dtype, settings):
    """Weights, the draft vocabulary, the rotary tables that are not saved; by both auto classes, in one shard or many."""
    target = tiny_target()
    if settings.get("target_layer_ids"):
        settings = {**settings, "normalize_target_hidden": False}
    draft = tiny_draft(target, **settings).to(dtype)
    if draft.draft_to_target is not None:
        draft.draft_to_target.copy_(torch.randperm(VOCAB_SIZE)[:20])
    draft.save_pretrained(tmp_path / "one")
    draft.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    input_ids, states = prompts(1)[0], hidden(draft, 1, 9).to(dtype)
    # Rotary tables are made anew in float32 at loading, which `to(dtype)` rounded here.
    rebuilt = PrismDraftModel.from_pretrained(tmp_path / "one", dtype=dtype).eval()
    expected = rebuilt.bind(target)(input_ids, states, 1).last_hidden_state
    for folder in ("one", "many"):
        for auto_class, arguments in (
            (AutoModel, {"dtype": dtype}),
            (AutoModelForCausalLM, {}),
            (AutoModel, {"device_map": "cpu"}),
        ):
            again = auto_class.from_pretrained(tmp_path / folder, **arguments)
            assert type(again) is PrismDraftModel
            assert again.dtype == dtype
            for name, value in draft.state_dict().items():
                assert torch.equal(value, again.state_dict()[name])
            assert torch.equal(again.eval().bind(target)(input_ids, states, 1).last_hidden_state, expected)


def test_loading_casts_on_request(tmp_path):
    """`dtype` wins over the saved one; the draft vocabulary stays integer."""
    draft = tiny_draft(tiny_target(), draft_vocab_size=20)
    draft.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert again.draft_to_target.dtype == torch.long


def test_the_other_context_kv_can_be_chosen_at_loading(tmp_path):
    """The weights are the same; only where modules write their keys and values differs."""
    tiny_draft(tiny_target(), num_processing_modules=2).save_pretrained(tmp_path)
    draft = AutoModel.from_pretrained(tmp_path, context_kv="own_module")
    assert [module.layers[0].self_attn.layer_idx for module in draft.processing_modules] == [0, 1]


def test_a_sliding_window_can_be_given_at_loading(tmp_path):
    """To drafts that were saved without one; it is saved with them then."""
    tiny_draft(tiny_target()).save_pretrained(tmp_path / "draft")
    draft = AutoModel.from_pretrained(tmp_path / "draft", sliding_window=7)
    assert draft.config.sliding_window == 7
    draft.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again").config.sliding_window == 7
    assert PrismDraftModel.from_pretrained(tmp_path / "again", sliding_window=None).config.sliding_window is None
    with pytest.raises(ValueError, match=r"sliding_window: expected None \(no window\) or at least 1 position, got 0"):
        AutoModel.from_pretrained(tmp_path / "draft", sliding_window=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_keeps_to_the_sliding_window(attention, is_padded):
    """As with a mask that says so, with and without a cache, and where rows are padded on the left."""
    draft = tiny_draft(tiny_target(), sliding_window=3, num_layers_per_module=2, attn_implementation=attention)
    draft.bind(tiny_target())
    input_ids, padding = prompts(2)
    length = input_ids.shape[1]
    states = hidden(draft, 2, length)
    index = torch.arange(length)
    visible = (index <= index[:, None]) & (index > index[:, None] - 3)
    visible = visible.expand(2, 1, -1, -1)
    if is_padded:
        visible = visible & padding[:, None, None].bool()
    ready = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    position_ids = index[None]
    expected = draft(input_ids, states, 1, ready, position_ids).last_hidden_state
    # How a processor adds up depends on how many positions it is given; the values are large.
    near = {"atol": 1e-5 * float(expected.detach().abs().max()), "rtol": 0.0}
    mask = padding if is_padded else None
    real = padding.bool() if is_padded else torch.ones_like(padding).bool()
    found = draft(input_ids, states, 1, mask, position_ids).last_hidden_state
    torch.testing.assert_close(found[real], expected[real], **near)
    cache, parts = DynamicCache(), []
    for part in (slice(0, 5), slice(5, 6), slice(6, length)):
        seen = None if mask is None else mask[:, : part.stop]
        arguments = (input_ids[:, part], states[:, part], 1, seen, position_ids[:, part], cache)
        parts.append(draft(*arguments).last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], **near)


def test_a_checkpoint_without_a_weight_is_refused(tmp_path):
    """A module that stayed random would only show as poor acceptance."""
    draft = tiny_draft(tiny_target())
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["extra"] = weights.pop("processing_modules.1.input_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1.input_projection.weight is missing; extra is unknown"):
        AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    """Saying which weight, and both shapes."""
    tiny_draft(tiny_target()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 48
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mlp.gate_proj.weight has shape \(64, 32\) instead of \(48, 32\)"):
        AutoModel.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    """Never a half-loaded draft."""
    tiny_draft(tiny_target()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|truncated|deserializ|invalid"):
        AutoModel.from_pretrained(tmp_path)


def test_fusion_divides_each_state_by_its_own_size():
    """One huge state does not drown the others."""
    target = tiny_target()
    draft = tiny_draft(target)
    states = hidden(draft, 1, 3)
    scaled = states.clone()
    scaled[..., 32:64] *= 25_000
    torch.testing.assert_close(draft.fuse(states), draft.fuse(scaled), atol=1e-4, rtol=1e-4)
    raw = PrismDraftModel(PrismConfig.from_target(target, normalize_target_hidden=False))
    raw.load_state_dict(draft.state_dict())
    assert not torch.allclose(raw.fuse(states), raw.fuse(scaled))
