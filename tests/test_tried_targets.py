"""The list of types that were tried."""

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from transformers_prism.tried_targets import TRIED_TYPES


def test_tried_types_are_types_of_transformers():
    """Or text parts of them."""
    assert {"llama", "qwen3", "gemma3_text", "mistral", "gpt2"} <= TRIED_TYPES
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    assert len(TRIED_TYPES & known) / len(TRIED_TYPES) > 0.8
