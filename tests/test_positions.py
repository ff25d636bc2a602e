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
from transformers_prism.decoding.positions import AxisPositions, text_positions, token_types
from transformers_prism.decoding.target_support import Declined, input_of_single_tokens
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
def test_types_of_tokens_are_extended_as_plain_decoding_does():
    """The last type of the row, or text; rows that differ are named."""
    inputs = {"token_type_ids": torch.tensor([[1]]), "mm_token_type_ids": torch.tensor([[1]])}
    given = {"token_type_ids": torch.tensor([[0, 1]]), "mm_token_type_ids": torch.tensor([[0, 1]])}
    assert token_types(inputs, given) == {"token_type_ids": 1, "mm_token_type_ids": 0}
    assert token_types(None, given) == {}
    with pytest.raises(Declined, match="rows of token_type_ids end with different types"):
        token_types({"token_type_ids": torch.zeros(2, 1)}, {"token_type_ids": torch.tensor([[0, 1], [0, 0]])})


@pytest.mark.quick
def test_an_input_of_single_tokens_is_named():
    """What has as many places as the prompt, or one, would have to be extended along the tree; grids would not."""
    assert input_of_single_tokens({"image_grid_thw": torch.zeros(1, 3), "input_ids": torch.zeros(1, 1)}, 9) is None
    assert input_of_single_tokens({"image_attention_mask": torch.zeros(1, 9, 2)}, 9) == "image_attention_mask"
    assert input_of_single_tokens({"router_types": torch.zeros(2, 1)}, 9) == "router_types"


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
            return {**made, "own_types": torch.zeros_like(made["input_ids"])}

        @functools.wraps(type(target).forward)
        def forward(self, *args, own_types=None, **kwargs):
            return super().forward(*args, **kwargs)

    target.__class__ = WithOwnInput
    plain = target.generate(**inputs, **ARGUMENTS)
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    with pytest.warns(UserWarning, match="the model input own_types cannot be carried along a tree"):
        assert torch.equal(target.generate(**inputs, **ARGUMENTS, assistant_model=draft), plain)


def test_cross_attention_to_an_image_is_declined():
    """Its mask would have to be extended along a tree, and its layers of the cache hold the image: in the first call, without
    that mask, and in a chat that goes on behind the image."""
    target, inputs, _ = image_target("mllama (image-text)")
    seen = {run: compare(target, Case("mllama", "mllama (image-text)"), run) for run in ("image", "image rows")}
    assert [found["outcome"] for found in seen.values()] == ["plain", "plain"], seen
    del inputs["cross_attention_mask"]
    plain = target.generate(**inputs, **ARGUMENTS)
    draft = scripted(target, plain, inputs["input_ids"].shape[1])
    with pytest.warns(UserWarning, match="positions of something else than the text"):
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
