"""A multimodal target of two million random parameters with real pictures through its processor: with a draft as without."""

import copy

import numpy as np
import pytest
import torch
from compatibility_models import build
from compatibility_runs import scripted
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor

from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

pytestmark = pytest.mark.usefixtures("one_thread")

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<begin>", "<end>"]
VOCAB_SIZE = 4000
ARGUMENTS = {"max_new_tokens": 20, "pad_token_id": 0, "suppress_tokens": list(range(len(SPECIAL)))}
TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<begin> <image> <end> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor() -> PaddleOCRVLProcessor:
    """Words w7 to w3999 and special tokens; pictures in patches of 14 pixels, four of which make a token."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL)}
    vocabulary.update({f"w{index}": index for index in range(len(SPECIAL), VOCAB_SIZE)})
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        additional_special_tokens=SPECIAL[5:],
        extra_special_tokens={"image_token": "<image>"},
    )
    images = PaddleOCRVLImageProcessorPil(patch_size=14, merge_size=2, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 12)
    return PaddleOCRVLProcessor(image_processor=images, tokenizer=fast, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def target():
    """Three axes of positions."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 512, "rope_parameters": rope}
    tokens = {"image_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    overrides = {f"text_config.{name}": value for name, value in sizes.items()} | {"vision_config.patch_size": 14, **tokens}
    return build("paddleocr_vl", overrides, seed=1)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random colours."""
    pixels = np.random.default_rng(seed).random((height, width, 3)) * 255
    return Image.fromarray(pixels.astype("uint8"))


def compare(target, make_inputs, **arguments):
    """Run with and without a draft, each on a target of its own that keeps something of images; returns what the draft did."""
    sequences, draft = [], None
    for _ in range(2):
        used = copy.deepcopy(target)
        inputs = make_inputs(used)
        torch.manual_seed(3)
        if sequences:
            draft = scripted(used, sequences[0], inputs["input_ids"].shape[1])
        sequences.append(used.generate(**inputs, assistant_model=draft, **{**ARGUMENTS, "do_sample": False, **arguments}))
    assert torch.equal(*sequences)
    assert len(set(sequences[0][0, -20:].tolist())) > 10
    return draft.last_speculation


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("has_picture", [False, True])
def test_one_prompt(target, processor, has_picture, do_sample):
    """With a picture and without, greedy and sampled with a seed."""
    text = "w20 w21 <begin> <image> <end> w30 w31" if has_picture else "w20 w21 w30 w31"
    pictures = [picture(90, 60)] if has_picture else None
    inputs = processor(text=[text], images=pictures, return_tensors="pt")
    speculation = compare(target, lambda used: dict(inputs), do_sample=do_sample)
    assert speculation.target == "tree"
    assert speculation.acceptance_length > 1.5


def test_a_chat_through_the_template(target, processor):
    """The processor's own template puts the picture in its place."""
    content = [{"type": "text", "text": "w40 w41"}, {"type": "image", "image": picture(56, 112)}, {"type": "text", "text": "w50"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == 4).sum() == inputs["image_grid_thw"].prod() // 4
    assert compare(target, lambda used: dict(inputs)).target == "tree"


def test_a_batch_with_pictures_of_several_sizes(target, processor):
    """Rows of uneven lengths, one with two pictures, one with none."""
    texts = ["w20 <begin> <image> <end> w30", "w7 <begin> <image> <end> w8 <begin> <image> <end>", "w9 w10 w11"]
    pictures = [[picture(90, 60)], [picture(56, 56, 1), picture(60, 120, 2)], []]
    inputs = processor(text=texts, images=[one for row in pictures for one in row], padding=True, return_tensors="pt")
    speculation = compare(target, lambda used: dict(inputs))
    assert speculation.target == "tree"
    assert speculation.acceptance_length > 1.5


def test_a_chat_that_goes_on_behind_the_picture(target, processor):
    """The second turn is text alone, in the cache of the first."""
    first = processor(text=["w20 <begin> <image> <end> w30"], images=[picture(90, 60)], return_tensors="pt")

    def second_turn(used):
        output = used.generate(**first, do_sample=False, return_dict_in_generate=True, **ARGUMENTS)
        question = torch.tensor([[70, 71, 72]])
        input_ids = torch.cat((output.sequences, question), dim=1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), CACHE_KEYWORD: cache_of(output)}

    speculation = compare(target, second_turn)
    assert speculation.target == "tree"
    assert speculation.declined is None
