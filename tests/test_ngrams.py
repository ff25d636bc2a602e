"""Continuations copied from the text so far."""

import pytest

from transformers_prism.policy.ngrams import NgramIndex

pytestmark = pytest.mark.quick


def test_ngrams_the_longest_match_wins_over_a_later_shorter_one():
    """5 6 7 -> 8 once, 6 7 -> 9 later; a text that ends in 5 6 7 goes on with 8."""
    index = NgramIndex([5, 6, 7, 8, 1, 6, 7, 9, 2, 5, 6, 7])
    assert index.continuation(3) == (3, [8, 1, 6])


def test_ngrams_of_equal_length_the_latest_place_wins():
    """It is the nearest in the text."""
    assert NgramIndex([1, 2, 3, 1, 2, 4, 9, 1, 2]).continuation(2) == (2, [4, 9])


def test_ngrams_the_end_of_the_text_does_not_match_itself():
    """Only what stood there before, with a token behind it, can be copied."""
    assert NgramIndex([1, 2, 3]).continuation(4) == (0, [])
    assert NgramIndex([]).continuation(4) == (0, [])
    assert NgramIndex([7, 7, 7]).continuation(4) == (2, [7])


def test_ngrams_extending_equals_indexing_at_once():
    """In pieces of any size."""
    text = [1, 2, 3, 4, 1, 2, 3, 5, 2, 3, 4, 1, 2, 3]
    whole = NgramIndex(text)
    pieces = NgramIndex(text[:3])
    for start, end in ((3, 4), (4, 4), (4, 9), (9, len(text))):
        pieces.extend(text[start:end])
    assert pieces.following == whole.following
    assert pieces.continuation(5) == whole.continuation(5) == (4, [5, 2, 3, 4, 1])
