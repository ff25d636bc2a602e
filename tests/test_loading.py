"""Loading: what is no draft, or asks for more than its files hold, is refused with a message, and before memory is taken."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tiny_models import generate_twice, prompts, tiny_draft, tiny_target
from transformers import AutoModel

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.hub import loading
from transformers_prism.hub.inspection import inspect_draft

pytestmark = pytest.mark.quick
CARDS = Path(__file__).parents[1] / "hub_cards"


@pytest.fixture
def folder(tmp_path):
    """A tiny draft's folder."""
    tiny_draft(tiny_target(), draft_vocab_size=50).save_pretrained(tmp_path / "draft")
    return tmp_path / "draft"


def change(folder: Path, **settings) -> None:
    """Replace settings in a draft's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_processing_modules": 10**9},
        {"num_processing_modules": 40, "draft_step_to_module": list(range(40))},
        {"num_layers_per_module": 20},
        {"hidden_size": 60_000, "target_hidden_size": 60_000},
        {"intermediate_size": 10**8},
        {"head_dim": 10**8},
        {"vocab_size": 10**10, "draft_vocab_size": 10**10},
        {"target_layer_ids": list(range(10**4))},
    ],
)
@pytest.mark.parametrize("load", [PrismDraftModel.from_pretrained, AutoModel.from_pretrained])
def test_sizes_that_the_weights_do_not_have_take_no_memory(folder, sizes, load):
    """Each of these would be gigabytes."""
    change(folder, **sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, StrictDataclassError), match="expected .* got"):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_a_long_list_of_wrong_weights_is_cut(folder):
    """A message is read by people."""
    change(folder, num_layers_per_module=40)
    with pytest.raises(ValueError, match="and [0-9]+ more$") as error:
        PrismDraftModel.from_pretrained(folder)
    assert len(str(error.value)) < 10_000


def test_shards_are_compared_as_one_file_is(folder, tmp_path):
    """By the headers that their index names."""
    PrismDraftModel.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    PrismDraftModel.from_pretrained(tmp_path / "shards")
    change(tmp_path / "shards", intermediate_size=10**8)
    with pytest.raises(ValueError, match="mlp.down_proj.weight has shape .* instead of"):
        PrismDraftModel.from_pretrained(tmp_path / "shards")


def test_a_draft_larger_than_memory_is_not_begun(monkeypatch):
    """On the device that it would be made on; a description without memory may be of any size."""
    with pytest.raises(ValueError, match=r"expected a configuration whose weights fit .* hidden_size=90000"):
        PrismDraftModel(PrismConfig(hidden_size=90_000, intermediate_size=90_000))
    with torch.device("meta"):
        PrismDraftModel(PrismConfig(hidden_size=90_000, intermediate_size=90_000))
    monkeypatch.setattr(loading.os, "sysconf", lambda name: 1)
    with pytest.raises(ValueError, match="memory of 0 GB"):
        PrismDraftModel(PrismConfig())
    monkeypatch.delattr(loading.os, "sysconf")
    PrismDraftModel(PrismConfig(hidden_size=32, intermediate_size=32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["fusion_layer.bias", "processing_modules.1.layers.0.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers_are_named(folder, name, value):
    """One among thousands."""
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (PrismDraftModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=rf"^{name}: expected finite numbers, got NaN or infinity in 1 of"):
            load(folder)


def test_large_numbers_are_numbers(folder):
    """Although their sum is none, in the dtype of the file."""
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["fusion_layer.weight"].fill_(60_000)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert PrismDraftModel.from_pretrained(folder, dtype=torch.float16).fusion_layer.weight.min() == 60_000
    weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    weights["fusion_layer.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert PrismDraftModel.from_pretrained(folder).fusion_layer.weight.isfinite().all()


@pytest.mark.parametrize("token", [-1, 97])
def test_a_draft_vocabulary_outside_the_target_s_is_refused(folder, token):
    """Before an index runs out of a head."""
    weights = load_file(folder / "model.safetensors")
    weights["draft_to_target"][7] = token
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"draft_to_target: expected token ids of 0..96 .* got"):
        PrismDraftModel.from_pretrained(folder)


def test_a_draft_that_was_saved_earlier_loads_unchanged(tmp_path):
    """The shipped one, with the settings that its own code saved, and none of what is younger."""
    source = CARDS / "SmolLM2-135M-Instruct-PRISM"
    draft = PrismDraftModel.from_pretrained(source)
    saved = json.loads((source / "config.json").read_text())
    known = draft.config.to_dict()
    assert {name: known[name] for name in saved if name not in ("dtype", "transformers_version")} == {
        name: value for name, value in saved.items() if name not in ("dtype", "transformers_version")
    }
    trees = json.loads((source / "generation_config.json").read_text())
    assert {name: getattr(draft.generation_config, name) for name in trees if name.startswith("tree")} == {
        name: value for name, value in trees.items() if name.startswith("tree")
    }
    weights, loaded = load_file(source / "model.safetensors"), draft.state_dict()
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(weight.to(loaded[name].dtype), loaded[name]) for name, weight in weights.items())
    assert draft.config.target_embedding_size is None
    assert {**inspect_draft(source).config.to_dict(), "_name_or_path": ""} == {**known, "_name_or_path": ""}


def test_a_config_without_younger_fields_drafts_as_before(folder, tmp_path):
    """A field that an earlier commit did not write has the value that it stood for then."""
    target = tiny_target()
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    settings = json.loads((older / "config.json").read_text())
    del settings["target_embedding_size"]
    (older / "config.json").write_text(json.dumps(settings))
    ids, _ = prompts(1)
    outputs = [
        generate_twice(target, PrismDraftModel.from_pretrained(one), ids, max_new_tokens=12, do_sample=False)
        for one in (folder, older)
    ]
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert torch.equal(outputs[1][0], outputs[1][1])
