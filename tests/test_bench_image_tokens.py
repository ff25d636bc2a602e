"""The trial of what a draft reads at the positions of an image, at a size that says nothing."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.image_tokens import IMAGE_ID, NUM_CELLS, QUESTION, WAYS, Pictures, measure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.quick
def test_pictures_show_what_the_text_says():
    """Each cell has the colour that is named for it, up to noise."""
    pictures = Pictures(0)
    pixels, text = pictures.draw(2)
    assert (text[:, : len(QUESTION)] == IMAGE_ID).sum(dim=1).tolist() == [NUM_CELLS] * 2
    named = pictures.colours[text[:, len(QUESTION) :: 2] - 8]  # [2, cells, 3]
    shown = pixels.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(-1, -2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(shown, named, atol=0.1, rtol=0)


def test_both_ways_are_measured():
    """For each seed, with what the target has learned."""
    found = measure(range(1), target_steps=10, draft_steps=10, batch_size=2, num_pictures=1)
    assert {len(one) for one in found.values()} == {1}
    assert all(1 <= found[way][0] <= 5 for way in WAYS)
