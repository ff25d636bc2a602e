"""Starting a draft from another: what is copied from where, what stays as it was, and what is refused."""

import pytest
import torch
from tiny_models import PAD_ID, prompts, tiny_draft, tiny_target
from transformers import AutoModel

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.conversion import eagle
from transformers_prism.training.warm_start import expand_modules, warm_start, with_modules

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def target():
    """A target of eight layers."""
    return tiny_target(num_hidden_layers=8)


def outputs(draft, target, num_steps=5):
    """What each draft step computes over the same input."""
    draft.bind(target)
    input_ids = prompts(1)[0]
    states = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [draft(input_ids, states, step).last_hidden_state for step in range(num_steps)]


def copies(draft):
    """Its weights as they are."""
    return {name: tensor.clone() for name, tensor in draft.state_dict().items()}


@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_layers_per_module": 2}, {"module_form": "eagle3", "share_target_head": False}]
)
def test_expanded_modules_compute_what_the_one_computed(target, context_kv, settings):
    """Every step, and whole generations with their accepted tokens; settings and draft vocabulary come along."""
    one = tiny_draft(target, num_processing_modules=1, context_kv=context_kv, draft_vocab_size=40, **settings)
    one.draft_to_target.copy_(torch.arange(40) * 2)
    three = expand_modules(one, 3)
    assert (three.config.num_processing_modules, three.config.draft_step_to_module) == (3, [0, 1, 2])
    assert three.training is one.training
    for ours, theirs in zip(outputs(three, target), outputs(one, target), strict=True):
        assert torch.equal(ours, theirs)
    input_ids, mask = prompts(2)
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": PAD_ID, "do_sample": False}
    target.generate(input_ids, assistant_model=one, **arguments)
    target.generate(input_ids, assistant_model=three, **arguments)
    assert three.last_speculation.accepted_per_round == one.last_speculation.accepted_per_round
    assert three.generation_config.tree_num_nodes == 15


def test_expanded_modules_share_nothing(target):
    """One can be trained without the others."""
    one = tiny_draft(target, num_processing_modules=1)
    before = copies(one)
    three = expand_modules(one, 3)
    with torch.no_grad():
        three.processing_modules[1].input_projection.weight.zero_()
    assert torch.equal(
        three.processing_modules[2].input_projection.weight, before["processing_modules.0.input_projection.weight"]
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


def test_modules_grow_out_of_the_one_that_served_their_step(target):
    """Two modules for the steps 0, 1, 1 become four: the new ones out of module 1."""
    two = tiny_draft(target, num_processing_modules=2, draft_step_to_module=[0, 1, 1])
    four = expand_modules(two, 4)
    for ours, theirs in zip(outputs(four, target), outputs(two, target), strict=True):
        assert torch.equal(ours, theirs)
    shared = expand_modules(two, PrismConfig.from_dict({**two.config.to_dict(), "draft_step_to_module": [1, 0, 1]}))
    weights, expected = shared.state_dict(), two.state_dict()
    for name, other in (("0", "1"), ("1", "0")):
        found = weights[f"processing_modules.{name}.input_projection.weight"]
        assert torch.equal(found, expected[f"processing_modules.{other}.input_projection.weight"])


def test_expanding_keeps_the_dtype(target):
    """Also bfloat16."""
    draft = expand_modules(tiny_draft(target, num_processing_modules=1).to(torch.bfloat16), 2)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (1, "num_modules: expected at least the draft's 2, got 1"),
        (0, "num_modules: expected at least the draft's 2, got 0"),
        ({"draft_vocab_size": 40}, "draft_vocab_size: expected the draft's, None, got 40"),
        ({"intermediate_size": 48}, r"mlp.gate_proj.weight \(shape \[48, 32\], the source's \[64, 32\]\)"),
        (
            {"projection_bias": False},
            r"expected the configuration to have every weight of the draft, missing: \['fusion_layer.bias'",
        ),
        ({"module_form": "eagle3"}, "module_form: expected the source's, 'prism', got 'eagle3'"),
    ],
)
def test_what_is_no_expansion_is_refused(target, asked, message):
    """Fewer modules, or another architecture, with the names."""
    draft = tiny_draft(target, num_processing_modules=2)
    if isinstance(asked, dict):
        asked = PrismConfig.from_dict({**with_modules(draft.config, 3).to_dict(), **asked})
    with pytest.raises(ValueError, match=message):
        expand_modules(draft, asked)


def test_a_prism_draft_starts_from_an_eagle_checkpoint(tmp_path, target):
    """Read from its own layout; both modules are its layer, and the fusion layer, which it lacks, has to be named."""
    settings = {"num_processing_modules": 1, "target_layer_ids": [8], "normalize_target_hidden": False}
    tiny_draft(target, seed=4, **settings).save_pretrained(tmp_path / "ours")
    eagle.export(tmp_path / "ours", tmp_path / "theirs")
    eagle.convert(tmp_path / "theirs", tmp_path / "converted", num_target_layers=8)
    source = AutoModel.from_pretrained(tmp_path / "converted")
    draft = tiny_draft(target, num_processing_modules=2)
    before = copies(draft)
    with pytest.raises(
        ValueError, match=r"or its part among `fresh`, got none for fusion_layer.weight \(the source has none\)"
    ):
        warm_start(draft, source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())
    report = warm_start(draft, source, fresh=["fusion_layer"])
    for module in draft.processing_modules:
        for name, tensor in source.processing_modules[0].state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor)
    assert torch.equal(draft.fusion_layer.weight, before["fusion_layer.weight"])
    assert report.initial == {"fusion_layer.weight": "asked for", "fusion_layer.bias": "asked for"}
    assert set(report.matched) == set(before) - set(report.initial)
    assert not report.unused
    text = str(report)
    assert (
        "processing_modules.1.layers.0.mlp.up_proj.weight <- processing_modules.0.layers.0.mlp.up_proj.weight" in text
    )
    assert "note: target_layer_ids: [8] in the source, [3, 5, 6] here" in text


def test_rows_of_an_own_head_follow_the_tokens(target):
    """Vocabularies that overlap in part: shared tokens bring their rows, the others stay."""
    settings = {"share_target_head": False, "draft_vocab_size": 20}
    source, draft = (tiny_draft(target, seed=seed, **settings) for seed in (1, 2))
    source.draft_to_target.copy_(torch.arange(20))
    draft.draft_to_target.copy_(torch.arange(15, 35).flip(0))
    before = draft.lm_head.weight.clone()
    report = warm_start(draft, source)
    assert report.matched["lm_head.weight"].startswith("lm_head.weight, 5 of 20 rows")
    for row, token in enumerate(draft.draft_to_target.tolist()):
        expected = source.lm_head.weight[token] if token < 20 else before[row]
        assert torch.equal(draft.lm_head.weight[row], expected)
    assert draft.draft_to_target.tolist() == list(range(34, 14, -1))


def test_a_bias_that_the_source_lacks_becomes_zero(target):
    """Which computes the same."""
    settings = {"num_processing_modules": 1, "target_layer_ids": [8], "normalize_target_hidden": False}
    source = tiny_draft(target, seed=1, projection_bias=False, **settings)
    draft = tiny_draft(target, seed=2, **settings)
    with torch.no_grad():
        draft.processing_modules[0].input_projection.bias.fill_(3)
    report = warm_start(draft, source)
    assert report.matched["processing_modules.0.input_projection.bias"].startswith("zeros")
    assert all(torch.equal(a, b) for a, b in zip(outputs(draft, target), outputs(source, target), strict=True))


def test_what_nothing_was_taken_from_is_listed(target):
    """A module fewer, and a head that the new draft borrows."""
    source = tiny_draft(target, num_processing_modules=2, share_target_head=False)
    report = warm_start(tiny_draft(target, num_processing_modules=1), source)
    assert "lm_head.weight" in report.unused
    assert {name.split(".")[1] for name in report.unused if name.startswith("processing_modules")} == {"1"}


@pytest.mark.parametrize(
    ("settings", "fresh", "message"),
    [
        ({}, ["fc"], r"fresh: expected parts of the draft, \['fusion_layer', 'processing_modules'\], got \['fc'\]"),
        ({"target_layer_ids": [2, 4]}, [], r"fusion_layer.weight \(shape \[32, 64\], the source's \[32, 96\]\)"),
        ({"share_target_head": False}, [], r"lm_head.weight \(the source has none\)"),
        ({"num_layers_per_module": 2}, [], r"layers.1.input_layernorm.weight \(the source has none\)"),
        ({"module_form": "eagle3"}, [], "module_form: expected the source's, 'prism', got 'eagle3'"),
    ],
)
def test_what_does_not_fit_is_refused(target, settings, fresh, message):
    """And nothing is written."""
    draft = tiny_draft(target, **settings)
    before = copies(draft)
    with pytest.raises(ValueError, match=message):
        warm_start(draft, tiny_draft(target, seed=1), fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())


def test_another_target_is_noted(target):
    """Weights of one target's draft are a start for another's, with a word about it."""
    source, draft = tiny_draft(target, seed=1), PrismDraftModel(PrismConfig.from_target(target))
    source.config.target_fingerprint["name"], draft.config.target_fingerprint["name"] = "org/old", "org/new"
    assert "the source's target has name 'org/old', this one's 'org/new'" in warm_start(draft, source).notes
