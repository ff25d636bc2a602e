"""Continuations copied from the text so far: what followed the last few tokens when they occurred before.

Source: prompt lookup decoding (Saxena 2023), which transformers has as `prompt_lookup_num_tokens`; here the
continuation joins the draft's tree instead of replacing it.
"""

# The longest match that is looked for, and the shortest that counts.
MAX_MATCH = 4
MIN_MATCH = 2


class NgramIndex:
    """An index of the growing text of one sequence: where each short run of tokens occurred last."""

    def __init__(self, token_ids: list[int]):
        self.token_ids: list[int] = []
        # By length of the run: its tokens -> index of the token after it.
        self.following: list[dict[tuple[int, ...], int]] = [{} for _ in range(MAX_MATCH + 1)]
        self.extend(token_ids)

    def extend(self, token_ids: list[int]) -> None:
        """Append tokens to the text."""
        for token in token_ids:
            # A run is entered when the token after it is known, so that the text's own end never matches itself.
            end = len(self.token_ids)
            for length in range(MIN_MATCH, min(MAX_MATCH, end) + 1):
                self.following[length][tuple(self.token_ids[end - length : end])] = end
            self.token_ids.append(token)

    def continuation(self, max_tokens: int) -> tuple[int, list[int]]:
        """Find the longest run that the text ends in and that occurred before: its length in tokens, and at most `max_tokens`
        tokens that followed its last occurrence; 0 and [] without a match."""
        for length in range(min(MAX_MATCH, len(self.token_ids)), MIN_MATCH - 1, -1):
            start = self.following[length].get(tuple(self.token_ids[-length:]))
            if start is not None:
                return length, self.token_ids[start : start + max_tokens]
        return 0, []


class Texts:
    """The texts of a call's sequences, indexed when they are asked for; `text` is an earlier call's index of the beginning of a
    single sequence."""

    def __init__(self, sequences, text: NgramIndex | None = None):
        self.sequences = sequences
        self.indexes: list[NgramIndex | None] = [text] + [None] * (len(sequences) - 1)
        self.num_indexed: list[int | None] = [None] * len(sequences)  # new tokens that each index holds

    def __getitem__(self, sequence: int) -> NgramIndex:
        """The sequence's text so far."""
        text, num_indexed = self.indexes[sequence], self.num_indexed[sequence]
        if text is None or num_indexed is None:
            prompt, num_indexed = self.sequences.ids[sequence, : self.sequences.prompt_length].tolist(), 0
            if text is None or prompt[: len(text.token_ids)] != text.token_ids:
                text = self.indexes[sequence] = NgramIndex([])
            text.extend(prompt[len(text.token_ids) :])
        text.extend(self.sequences.new_tokens[sequence][num_indexed:])
        self.num_indexed[sequence] = len(self.sequences.new_tokens[sequence])
        return text

    def all_repeat(self) -> bool:
        """Whether the text of every active sequence ends in a run that occurred in it before."""
        return all(self[sequence].continuation(1)[1] for sequence in self.sequences.active)
