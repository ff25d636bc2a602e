"""What is kept with a cache between the turns of a chat, and what lives as long as its owner."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from transformers_prism.decoding.chat import Chat
from transformers_prism.decoding.memory import keep_with, kept_with, take_from

pytestmark = pytest.mark.quick


class FakeCache:
    """A cache of a length."""

    length = 9

    def get_seq_length(self) -> int:
        return self.length


def a_draft(head="head"):
    """A draft whose drafter says whose it is."""
    draft = SimpleNamespace(target_head=head, device=torch.device("cpu"), dtype=torch.float32)
    draft.make_drafter = lambda: SimpleNamespace(draft=draft)
    return draft


def test_a_chat_goes_on_once_with_its_cache():
    """The same draft, head, length and one sequence; it is taken away, so that a call that fails leaves none behind."""
    cache, draft = FakeCache(), a_draft()
    Chat.of(cache, draft, 1).keep(cache, "text")
    chat = Chat.of(cache, draft, 1)
    assert (chat.text, chat.length) == ("text", 9)
    assert Chat.of(cache, draft, 1).text is None


@pytest.mark.parametrize("change", ["length", "head", "draft", "batch"])
def test_a_chat_that_is_another_begins_anew(change):
    """What the draft has read does not fit any more."""
    cache, draft = FakeCache(), a_draft()
    Chat.of(cache, draft, 1).keep(cache, "text")
    if change == "length":
        cache.length = 10
    if change == "head":
        draft.target_head = "another"
    chat = Chat.of(cache, a_draft() if change == "draft" else draft, 2 if change == "batch" else 1)
    assert chat.text is None
    assert chat.draft_side.unread == []


def test_what_is_kept_goes_with_its_owner():
    """And is made once, by name."""
    owner, value = FakeCache(), FakeCache()
    seen = weakref.ref(value)
    keep_with(owner, "one", value)
    assert kept_with(owner, "one", FakeCache) is value
    assert kept_with(owner, "two", FakeCache) is kept_with(owner, "two", FakeCache)
    keep_with(owner, "other", 5)
    assert take_from(owner, "other") == 5
    assert take_from(owner, "other") is None
    assert take_from(FakeCache(), "one") is None
    del owner, value
    gc.collect()
    assert seen() is None
