"""Positions on several axes and types of tokens along a tree, on image-text targets."""

import copy
import functools
import warnings

import pytest
import torch
from compatibility_images import IMAGE_ID, SPECIAL_IDS, VIDEO_ID, image_prompt
from compatibility_models import build
from compatibility_runs import Case, compare, scripted
from transformers import AutoModelForCausalLM

from transformers_prism import PrismConfig
from transformers_prism.decoding.positions import AxisPositions, inputs_by_kind, text_positions
from transformers_prism.decoding.target_support import Declined
from transformers_prism.training.features import target_states
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

ARGUMENTS = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "suppress_tokens": SPECIAL_IDS}
# Three axes, three and one of the text, one axis, types of tokens, patches with positions, a recurrent text part.
IMAGE_TEXT = ["qwen2_vl", "qwen3_vl", "glm4v", "llava", "gemma3", "gemma4", "idefics3", "lfm2_vl", "qwen3_5 (image-text)"]


def image_target(name: str = "qwen2_vl", num_rows: int = 1):
    """A tiny image-text target, inputs with an image in each row, and the text of plain decoding."""
    for seed in (4, 0, 7, 8):
        target = Case(name, name).draw(seed)
        inputs = image_prompt(target, num_rows)
        plain = copy.deepcopy(target).generate(**inputs, **ARGUMENTS)
        if len(set(plain[0, inputs["input_ids"].shape[1] :].tolist())) > 6:
            return target, inputs, plain
    raise AssertionError(f"no {name} with a varied text")


@pytest.mark.quick
def test_positions_on_several_axes_keep_their_distance_to_the_text():
    """Base and depth on each axis, each row with its own offset, as plain decoding extends them."""
    text = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 2]])
    given = torch.stack((text, text - 2, text + 5))  # [3, 2, 4]
    axes = AxisPositions(given, text)
    nodes = torch.tensor([[4, 5, 5], [3, 4, 4]])
    assert torch.equal(axes.along(nodes), torch.stack((nodes, nodes - 2, nodes + 5)))
    axes.keep_sequences([1])
    assert torch.equal(axes.along(nodes[1:]), torch.stack((nodes[1:], nodes[1:] - 2, nodes[1:] + 5)))


@pytest.mark.quick
def test_positions_of_the_text_follow_the_mask_where_there_are_several_axes():
    """Padding does not count; positions on one axis are taken as they are."""
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert text_positions(None, mask).tolist() == [[0, 1, 2], [0, 0, 1]]
    assert text_positions(torch.zeros(3, 2, 3), mask).tolist() == [[0, 1, 2], [0, 0, 1]]
    assert text_positions(torch.tensor([[4, 5, 6]]), mask).tolist() == [[4, 5, 6], [4, 5, 6]]


@pytest.mark.quick
def test_inputs_of_the_call_and_of_single_tokens_are_told_apart():
    """What is handed on belongs to the call, what is made anew for each token to that token; what differs is named."""
    grid, embeddings = torch.ones(1, 3), torch.zeros(2, 1, 4)
    first = {"input_ids": torch.zeros(2, 1), "grid": grid, "embeddings": embeddings, "types": torch.tensor([[1], [0]]), "flag": True}
    second = {**first, "grid": grid.clone(), "types": first["types"].clone()}
    of_call, of_tokens = inputs_by_kind(first, second, ("input_ids",))
    assert of_call == {"grid": grid, "embeddings": embeddings, "flag": True}
    assert of_tokens == {"types": first["types"]}
    with pytest.raises(Declined, match="the model input types cannot be carried along a tree"):
        inputs_by_kind(first, {**second, "types": first["types"] + 1}, ())


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_text_behind_an_image_is_that_of_plain_decoding(name):
    """A prompt with an image, a chat that goes on behind it, sampling; padded rows with an image each."""
    target, _, _ = image_target(name)
    case, seen = Case(name, name), {}
    for run in ("image", "image rows", "image sampled"):
        seen[run] = compare(target, case, run)
    wanted = "chain" if name.startswith(("qwen3_5", "lfm2")) else "tree"
    assert seen["image"]["outcome"] == seen["image sampled"]["outcome"] == wanted, seen
    assert seen["image rows"]["outcome"] == wanted, seen
    assert seen["image"]["tokens_per_round"] > 1.5


def test_positions_of_nodes_behind_an_image_count(monkeypatch):
    """Without the offset of the axes the text differs: what the tests above compare depends on it."""
    target, inputs, plain = image_target()
    monkeypatch.setattr(AxisPositions, "along", lambda self, text: (text + 0 * self.offsets).long())
    got = target.generate(**inputs, **ARGUMENTS, assistant_model=scripted(target, plain, inputs["input_ids"].shape[1]))
    assert not torch.equal(got, plain)


def test_an_input_that_cannot_be_extended_is_declined_by_name():
    """Plain decoding serves it, once with the reason."""
    target, inputs, _ = image_target("llava")
    original = type(target).prepare_inputs_for_generation

    class WithOwnInput(type(target)):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            made = original(self, input_ids, **kwargs)
            return {**made, "own_types": torch.full_like(made["input_ids"], input_ids.shape[1])}

        @functools.wraps(type(target).forward)
        def forward(self, *args, own_types=None, **kwargs):
            return super().forward(*args, **kwargs)

    target.__class__ = WithOwnInput
    plain = target.generate(**inputs, **ARGUMENTS)
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    with pytest.warns(UserWarning, match="the model input own_types cannot be carried along a tree"):
        assert torch.equal(target.generate(**inputs, **ARGUMENTS, assistant_model=draft), plain)


@pytest.mark.parametrize("name", ["mllama (image-text)", "idefics"])
def test_attention_across_to_an_image_is_carried_along(name):
    """Its mask is extended along the tree, and layers of the cache that hold the image stay as they are: alone, in a chat that
    goes on behind the image, sampled, and in rows that see different parts of it and end at different lengths."""
    target, inputs, plain = image_target(name, num_rows=2)
    seen = {run: compare(target, Case(name, name), run) for run in ("image", "image rows", "image sampled")}
    assert {found["outcome"] for found in seen.values()} == {"tree"}, seen
    assert min(found["tokens_per_round"] for found in seen.values()) > 1.5
    mask = inputs["cross_attention_mask" if "cross_attention_mask" in inputs else "image_attention_mask"]
    mask[1, -3:] = 0
    length = inputs["input_ids"].shape[1]
    others = copy.deepcopy(target).generate(**inputs, **ARGUMENTS)
    assert torch.equal(others[0], plain[0])
    assert not torch.equal(others[1], plain[1])
    arguments = {**ARGUMENTS, "eos_token_id": int(others[0, length + 6])}
    others = copy.deepcopy(target).generate(**inputs, **arguments)
    draft = scripted(target, others, length)
    assert torch.equal(target.generate(**inputs, **arguments, assistant_model=draft), others)
    assert draft.last_speculation.target == "tree"


def test_an_image_in_a_static_cache():
    """Layers that hold an image have lengths of their own, which no commit changes."""
    target, inputs, _ = image_target("mllama (image-text)")
    arguments = {**ARGUMENTS, "cache_implementation": "static"}
    plain = copy.deepcopy(target).generate(**inputs, **arguments)
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    assert torch.equal(target.generate(**inputs, **arguments, assistant_model=draft), plain)
    assert draft.last_speculation.declined is None
    assert draft.last_speculation.acceptance_length > 1.5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_image_that_nothing_masks(implementation):
    """SDPA without a mask is causal for several tokens, as if an image were text, and not for single ones: plain decoding has
    to serve that. Eager attention has no such case."""
    target, inputs, _ = image_target("mllama (image-text)")
    target.set_attn_implementation(implementation)
    del inputs["cross_attention_mask"]
    plain = copy.deepcopy(target).generate(**inputs, **ARGUMENTS)
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(target.generate(**inputs, **ARGUMENTS, assistant_model=draft), plain)
    declined = draft.last_speculation.declined
    assert declined is None if implementation == "eager" else "without a cross_attention_mask" in declined


def test_layers_of_an_image_are_skipped_without_one():
    """The draft reads the states before them then, in the prompt and in every round."""
    target = image_target("mllama (image-text)")[0]
    found = compare(target, Case("mllama", "mllama (image-text)"), "greedy")
    assert found["outcome"] == "tree"
    # Training reads the same: layer 1 is skipped, so that the states behind it are those before it.
    states = target_states(target, (20, 21, 22), [1, 2, 3])
    one, two, three = states.chunk(3, dim=-1)
    assert torch.equal(one, two)
    assert not torch.equal(two, three)


def test_automatic_trees_for_a_target_that_needs_an_image_are_declined():
    """Their costs are those of forwards over text alone, which idefics refuses."""
    target, inputs, plain = image_target("idefics")
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    draft.generation_config.tree = "auto"
    with pytest.warns(UserWarning, match='tree="auto" times forwards over text alone, which IdeficsForVisionText2Text refuses'):
        assert torch.equal(target.generate(**inputs, **ARGUMENTS, assistant_model=draft), plain)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5 (image-text)"])
def test_a_chat_from_image_to_text_to_image(name):
    """The third turn's image is read behind a cache that holds the first."""
    target, inputs, _ = image_target(name)
    question = {"input_ids": torch.tensor([[20, 21, 22]]), "mm_token_type_ids": torch.zeros((1, 3), dtype=torch.long)}
    arguments = {**ARGUMENTS, "return_dict_in_generate": True}
    texts: list[list] = [[], []]
    for drafted in (False, True):
        used = copy.deepcopy(target)
        for turn, more in enumerate((inputs, question, inputs)):
            more = {key: value for key, value in more.items() if key in inputs and key != "attention_mask"}
            if turn:
                last = texts[drafted][-1]
                before = {"input_ids": last.sequences, "mm_token_type_ids": torch.zeros_like(last.sequences)}
                more |= {key: torch.cat((before[key], more[key]), dim=1) for key in before if key in more}
                more[CACHE_KEYWORD] = cache_of(last)
            if drafted:
                plain = texts[False][turn].sequences
                more["assistant_model"] = scripted(used, plain, more["input_ids"].shape[1])
            texts[drafted].append(used.generate(**more, attention_mask=torch.ones_like(more["input_ids"]), **arguments))
            if drafted:
                assert torch.equal(texts[True][turn].sequences, plain)
                assert texts[True][turn].speculation.acceptance_length > 1.3


def test_videos_are_read_as_images_are():
    """Frames, their grids, and seconds between them, which belong to the prompt alone."""
    target, inputs, _ = image_target("qwen2_5_vl")
    inputs["pixel_values_videos"], inputs["video_grid_thw"] = inputs.pop("pixel_values"), inputs.pop("image_grid_thw")
    inputs["second_per_grid_ts"] = torch.tensor([0.5])
    inputs["input_ids"][inputs["input_ids"] == IMAGE_ID] = VIDEO_ID
    inputs["mm_token_type_ids"] *= 2
    plain = copy.deepcopy(target).generate(**inputs, **ARGUMENTS)
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    assert torch.equal(target.generate(**inputs, **ARGUMENTS, assistant_model=draft), plain)
    assert draft.last_speculation.target == "tree"


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_both_auto_classes_find_the_text_part(name):
    """A draft made for the image-text model fits the same weights as a causal one: shapes and fingerprint."""
    whole = build(f"{name} (image-text)" if name == "qwen3_5" else name)
    text = AutoModelForCausalLM.from_config(whole.config)
    one, other = PrismConfig.from_target(whole), PrismConfig.from_target(text)
    assert one.target_fingerprint == other.target_fingerprint
    assert one.target_hidden_size == other.target_hidden_size == whole.config.get_text_config().hidden_size
    input_ids = torch.randint(8, 88, (1, 9), generator=torch.Generator().manual_seed(0))
    for target in (whole.float().eval(), text.float().eval()):
        plain = target.generate(input_ids, **ARGUMENTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = target.generate(input_ids, assistant_model=scripted(target, plain, 9), **ARGUMENTS)
        assert torch.equal(got, plain)
