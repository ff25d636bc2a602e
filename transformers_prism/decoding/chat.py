"""What a draft has read of a chat, kept with the cache that its user passes to continue the chat."""

from typing import Any, NamedTuple

from .cache import stored_length
from .draft_side import DraftSide
from .memory import keep_with, take_from


class Chat(NamedTuple):
    """A draft in the middle of a text, or at its beginning.

    Args:
        draft_side: what was read, and what was committed and not read yet.
        place: device and dtype of what was read.
        head: the target's head, of which the drafter holds rows.
        length: of the cache in tokens.
        text: the n-gram index of the text, if there is one.
    """

    draft_side: DraftSide
    place: tuple
    head: object
    length: int = 0
    text: Any = None

    @classmethod
    def of(cls, cache, draft, num_sequences: int) -> "Chat":
        """The chat kept with a cache, if this draft has read exactly what the cache holds now; else a new one."""
        chat = take_from(cache, "chat")
        if (
            chat is not None
            and num_sequences == 1
            and chat.draft_side.drafter.draft is draft
            and chat.place == (draft.device, draft.dtype)
            and chat.head is draft.target_head
            and chat.length == stored_length(cache)
        ):
            return chat
        return cls(DraftSide(draft.make_drafter()), (draft.device, draft.dtype), draft.target_head)

    def keep(self, cache, text) -> None:
        """Let a later call with this cache continue from here."""
        length = stored_length(cache)
        if length is not None:  # a cache of recurrent states only does not show whether another call continued it
            keep_with(cache, "chat", self._replace(length=length, text=text))
