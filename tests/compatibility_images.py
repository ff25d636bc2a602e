"""Prompts with an image for tiny image-text models: made without a processor, by the forms of inputs that models take.

Each form is tried in turn; the number of image tokens is what the model says it expects.
"""

import inspect
import re

import torch

IMAGE_ID, VIDEO_ID, START_ID, END_ID = 90, 91, 92, 93
# Not to be emitted: in a text that goes on, they would have to have images of their own.
SPECIAL_IDS = [IMAGE_ID, VIDEO_ID, START_ID, END_ID]
_TOKENS = {
    "video_token_id video_token_index": VIDEO_ID,
    # Last of the two, since some models have one token for both.
    "image_token_id image_token_index media_placeholder_token_id im_patch_id image_patch_id": IMAGE_ID,
    "vision_start_token_id image_start_token_id boi_token_id boi_token_index im_start_id": START_ID,
    "vision_end_token_id image_end_token_id eoi_token_id eoi_token_index im_end_id": END_ID,
}


_OF_TOKENS = {"cross_attention_mask", "image_attention_mask"}
# What holds an image, by the names of models.
_IMAGES = {"pixel_values", "flattened_patches"}
# Inputs along whose last dimension images are put side by side.
_SIDE_BY_SIDE = "target_sizes"
# Of these a model may take fewer than its configuration lets expect.
_TYPES = {"mm_token_type_ids", "token_type_ids"}


def set_image_tokens(target) -> None:
    """Give the special tokens of images ids of the small vocabulary."""
    for config in (target.config, target.config.get_text_config()):
        for names, token in _TOKENS.items():
            for name in names.split():
                if hasattr(config, name):
                    setattr(config, name, token)


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _forms(target) -> list[dict]:
    """Image inputs without tokens, by form."""
    vision = getattr(target.config, "vision_config", None) or getattr(target.config, "vq_config", None) or target.config
    # Encoders without a size of their own, which make a token of two by two pixels.
    size = getattr(vision, "image_size", 8 if hasattr(vision, "channel_multiplier") else 32) or 32
    size = size[0] if isinstance(size, (list, tuple)) else size
    patch = getattr(vision, "patch_size", 8)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    names = ("spatial_merge_size", "merge_size", "merge_kernel_size")
    merge = next((getattr(vision, name) for name in names if getattr(vision, name, None)), 1)
    merge = merge if isinstance(merge, int) else merge[0]
    grid = 2 * merge
    flat = _pixels(grid * grid, channels * frames * patch * patch)
    grids = torch.tensor([[1, grid, grid]])
    sizes = torch.tensor([[size, size]])
    square = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).reshape(1, 16, 2)
    side = getattr(vision, "model_patch_size", patch)
    patches = _pixels(1, 16, channels * side * side)
    tokens = torch.arange(4)
    rows, columns = tokens // 2, tokens % 2
    flattened = _pixels(1, 4, 2 + getattr(vision, "patch_embed_hidden_size", 1))
    flattened[..., 0], flattened[..., 1] = rows, columns
    high_resolution = getattr(getattr(target.config, "high_res_vision_config", None), "image_size", size)
    one_tile = torch.ones(1, 1, dtype=torch.long)
    tiles = getattr(vision, "max_num_tiles", 1)
    forms = [
        {"pixel_values": flat, "image_grid_thw": grids},
        {"pixel_values": _pixels(grid * grid, channels, patch, patch), "image_grid_thw": grids},
        {"pixel_values": _pixels(1, 3, size, size)},
        {"pixel_values": _pixels(1, 3, size, size), "image_sizes": sizes},
        {"pixel_values": _pixels(1, 1, 3, size, size)},
        {"pixel_values": _pixels(1, 2, 3, size, size), "image_sizes": sizes},
        {"pixel_values": _pixels(1, 1, 3, size, size), "pixel_attention_mask": torch.ones(1, 1, size, size, dtype=torch.long)},
        {"pixel_values": flat[None], "image_grid_thw": grids[None]},
        {"pixel_values": _pixels(grid * grid, 2 * channels * frames * patch * patch), "image_grid_thw": grids},
        {"pixel_values": flat, "image_grid_thw": grids, "image_merge_sizes": torch.tensor([merge])},
        {"pixel_values": patches, "image_position_ids": square},
        {"pixel_values": patches, "spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16).long()},
        {"pixel_values": _pixels(1, 3, patch, 16 * patch), "target_sizes": torch.tensor([[4, 4]])},
        {
            "pixel_values": _pixels(1, 1, tiles, 3, size, size),
            "aspect_ratio_ids": one_tile,
            "aspect_ratio_mask": torch.ones(1, 1, tiles).long(),
            "cross_attention_mask": torch.ones(1, 1, 1, tiles).long(),
        },
        {"pixel_values": _pixels(1, 1, 3, size, size), "image_attention_mask": torch.ones(1, 1, 1).long()},
        {"pixel_values": _pixels(1, 3, size, size), "image_embeds_position_mask": one_tile},
        {"flattened_patches": flattened, "image_embeds_position_mask": one_tile},
        {"pixel_values": patches},
        {"pixel_values": _pixels(4, patch * merge, patch * merge, channels), "image_grid_thw": torch.tensor([[1, 2, 2]])},
        {"pixel_values": _pixels(1, 3, size, size), "high_res_pixel_values": _pixels(1, 3, high_resolution, high_resolution)},
        {"pixel_values": _pixels(1, 1, 3, size, size), "pixel_attention_mask": torch.ones(1, 1).bool()},
        {"pixel_values": _pixels(1, 3, size, size), "qformer_input_ids": tokens[None], "qformer_attention_mask": one_tile.repeat(1, 4)},
        {"pixel_values": _pixels(1, 4, 3, size, size), "qformer_input_ids": tokens[None], "qformer_attention_mask": one_tile.repeat(1, 4)},
        {"pixel_values": _pixels(16, channels * patch * patch), "image_grid_hw": torch.tensor([[4, 4]])},
        {
            "pixel_values": patches,
            "image_token_pooling": torch.arange(16).view(4, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]]),
        },
    ]
    # What only some models take says which form is theirs.
    shared = {"pixel_values", "image_grid_thw", "image_sizes"}
    return sorted(forms, key=lambda form: set(form) <= shared or not set(form) <= _parameters(target))


def _with_tokens(target, form: dict, num_tokens: int, num_rows: int = 1) -> dict:
    """Inputs of generate(): text, an image, text; later rows with more left padding."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(8, 88, (num_rows, 9), generator=generator)
    start, image, end = (torch.full((num_rows, count), token) for token, count in ((START_ID, 1), (IMAGE_ID, num_tokens), (END_ID, 1)))
    input_ids = torch.cat((text[:, :4], start, image, end, text[:, 4:]), dim=1)
    mask = torch.ones_like(input_ids)
    for row in range(num_rows):
        mask[row, :row] = 0
        input_ids[row, :row] = 0
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    for name, value in form.items():
        is_packed = name == "pixel_values" and _SIDE_BY_SIDE in form
        inputs[name] = torch.cat([value] * num_rows, dim=-1 if is_packed else 0)
    for name in _OF_TOKENS & set(form):  # what each token sees of the image
        inputs[name] = inputs[name].repeat(1, input_ids.shape[1], *[1] * (form[name].dim() - 2))
    if "image_embeds_position_mask" in form:
        inputs["image_embeds_position_mask"] = (input_ids == IMAGE_ID).long()
    if "mm_token_type_ids" in _parameters(target) or hasattr(target.config, "vision_start_token_id"):
        inputs["mm_token_type_ids"] = (input_ids == IMAGE_ID).long()
    if "token_type_ids" in _parameters(target):
        inputs["token_type_ids"] = (input_ids == IMAGE_ID).long()
    return inputs


def _parameters(target) -> set[str]:
    return set(inspect.signature(type(target).forward).parameters)


def image_prompt(target, num_rows: int = 1) -> dict:
    """Inputs of generate() with an image in each row.

    Raises:
        ValueError: if the model takes none of the forms, with what it said to each.
    """
    set_image_tokens(target)
    errors = []
    for form in _forms(target):
        if not set(form) <= _parameters(target) | {"image_grid_thw"}:
            continue
        num_tokens, without = 4, set()
        for _ in range(4):
            inputs = _with_tokens(target, form, num_tokens, num_rows)
            inputs = {name: value for name, value in inputs.items() if name not in without}
            try:
                target.generate(**inputs, max_new_tokens=2, do_sample=False)
                return inputs
            except Exception as error:
                text = str(error)
            if "not used by the model" in text:
                unused = {name for name in _TYPES if name in text} - without
                if not unused:
                    break
                without |= unused
                continue
            errors.append(f"{sorted(form)} {num_tokens}: {text[:150]}")
            wanted = _wanted_tokens(text, num_rows, num_tokens)
            if wanted in (None, num_tokens):
                break
            num_tokens = wanted
    raise ValueError("; ".join(errors))


def _wanted_tokens(error: str, num_rows: int, num_tokens: int) -> int | None:
    """Image tokens of each row that a model says it expects, given `num_tokens`; None if it says nothing."""
    told = re.search(r"value tensor of shape \[3, (\d+)\] .* indexing result of shape \[3, (\d+)\]", error)
    if told is not None:  # positions of a whole row
        return num_tokens + int(told[1]) - int(told[2])
    told = re.search(r"Got (\d+) feature vectors", error)
    if told is not None:
        return int(told[1]) // num_rows
    told = re.search(r"tokens: \d+, features:? (\d+)", error)
    if told is not None and int(told[1]) % num_rows == 0:
        features = int(told[1]) // num_rows
        return features if features < 200 else features // 64
    told = re.search(r"span_length=\d+, expected (\d+)|value tensor of shape \[(\d+), \d+\] cannot be broadcast to indexing", error)
    return None if told is None else int(told[1] or told[2]) // (1 if told[1] else num_rows)


def further_turn(inputs: dict, input_ids: torch.Tensor) -> dict:
    """What a later turn of a chat needs again of the first one's inputs: what each token sees of the image, and the image where
    the cache holds nothing of it."""
    name = next(iter(_OF_TOKENS & set(inputs)), None)
    if name is None:
        return {}
    seen = inputs[name][:, -1:].repeat(1, input_ids.shape[1] - inputs[name].shape[1], *[1] * (inputs[name].dim() - 2))
    again = {name: torch.cat((inputs[name], seen), dim=1)}
    return again | ({"pixel_values": inputs["pixel_values"]} if name == "image_attention_mask" else {})


def takes_images(target) -> bool:
    """Whether a model's forward has an input for images."""
    return bool(_IMAGES & _parameters(target))
