"""The sequences of a generate() call: what was emitted, where each ends, and what a streamer was given of them."""

from collections.abc import Iterator

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from ..transformers_names import pad_token
from .callers_mode import as_called

_FIRST_ROOM = 1024  # tokens of a sequence; a limit may be far beyond what any reaches


def flattened(criteria) -> Iterator[StoppingCriteria]:
    """Criteria in the order in which they are called; those of lists within a list, too, unless these combine them otherwise."""
    for one in criteria:
        if type(one) is StoppingCriteriaList:
            yield from flattened(one)
        else:
            yield one


class Stopping:
    """Asks the stopping criteria of a call whether a sequence ends.

    Most tokens cannot end anything: below the length limit only end tokens can, unless there are other criteria. For
    tokens that cannot, the criteria are not called, which saves several small operations a token.

    Args:
        criteria (`StoppingCriteriaList`): called once for each emitted token that may end its sequence, in order.
        device (`torch.device`): where ids are.
        scores (`list[torch.Tensor]`, *optional*): what tokens were chosen from, for criteria that look at it; it grows.
    """

    def __init__(self, criteria: StoppingCriteriaList, device: torch.device, scores: list[torch.Tensor] | None = None):
        self.criteria, self.scores = criteria, scores
        # Where there are end tokens, sequences that have ended are padded until all have. Plain decoding sees none in lists within
        # the list.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.quiet_until = float("inf")  # length in tokens from which on criteria are always asked
        self.end_tokens: set[int] = set()
        for criterion in flattened(criteria):
            if type(criterion) is EosTokenCriteria:
                # Moved to the ids' device, as the criterion itself does at its first call.
                criterion.eos_token_id = criterion.eos_token_id.to(device)
                self.end_tokens.update(criterion.eos_token_id.flatten().tolist())
            elif type(criterion) is MaxLengthCriteria:
                # Beyond max_position_embeddings it warns, so it has to be called.
                limits = (self.quiet_until, criterion.max_length, criterion.max_position_embeddings or float("inf"))
                self.quiet_until = min(limits)
            else:
                self.quiet_until = 0

    def may_end(self, length: int, token: int) -> bool:
        """Whether a sequence of this length could end with `token`, its last."""
        return length >= self.quiet_until or token in self.end_tokens

    def is_end(self, ids: torch.LongTensor) -> bool:
        """Whether a sequence `(1, T)` that could end does."""
        with as_called():
            return bool(self.criteria(ids, None if self.scores is None else tuple(self.scores))[0])


class Sequences:
    """The sequences of one generate() call.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): the prompts as plain decoding holds them.
        stopping_criteria (`StoppingCriteriaList`): of the call.
        generation_config (`GenerationConfig`): prepared by generate().
        device (`torch.device`, *optional*): where ids are kept; by default where the prompts are.
        scores (`list[torch.Tensor]`, *optional*): see [`Stopping`].
        streamer (`BaseStreamer`, *optional*): gets tokens step by step, as from plain decoding. One that has a method
            `put_round` is told at each round how many of its tokens were drafted; in a batch, those of the sequence
            with the most.
    """

    def __init__(self, input_ids, stopping_criteria, generation_config, device=None, scores=None, streamer=None):
        num_sequences, self.prompt_length = input_ids.shape
        self.max_length = generation_config.max_length
        self.pad_token_id = pad_token(generation_config)
        self._hold(input_ids.to(device or input_ids.device), self.prompt_length + _FIRST_ROOM)
        self.stopping = Stopping(stopping_criteria, self.ids.device, scores)
        self.lengths = [self.prompt_length] * num_sequences
        self.new_tokens: list[list[int]] = [[] for _ in range(num_sequences)]  # after the prompts
        self.end_lengths: list[int | None] = [None] * num_sequences  # where the criteria stopped each
        self.active = list(range(num_sequences))  # which sequence each row of the caches belongs to
        self.streamer = streamer
        self.num_streamed = self.prompt_length

    def __len__(self) -> int:
        return len(self.lengths)

    def _hold(self, ids: torch.Tensor, capacity: int) -> None:
        """Keep ids `(B, T)` with room for more, up to this length in all."""
        capacity = min(capacity, max(self.max_length, self.prompt_length) + 1)
        self.ids: torch.LongTensor = ids.new_zeros((len(ids), capacity))  # type: ignore[assignment]
        self.ids[:, : ids.shape[1]] = ids
        # The same memory; numpy writes a single number in a tenth of torch's time.
        self.writable_ids = self.ids.numpy() if self.ids.device.type == "cpu" else self.ids

    def is_done(self, index: int) -> bool:
        """Whether a sequence gets no more tokens.

        Without an EOS criterion plain decoding goes on writing in sequences that a criterion has stopped, until every
        one is stopped; so do we.
        """
        if self.stopping.pads:
            return self.end_lengths[index] is not None
        ends = [end for end in self.end_lengths if end is not None]
        return self.lengths[index] >= (max(ends) if len(ends) == len(self) else self.max_length)

    @property
    def are_done(self) -> bool:
        """Whether no sequence gets more tokens."""
        return all(self.is_done(index) for index in self.active)

    def num_new(self, index: int) -> int:
        """Number of new tokens of a sequence, which is also the index of its next decoding step."""
        return self.lengths[index] - self.prompt_length

    @property
    def max_remaining(self) -> int:
        """Tokens that some sequence may still get before the length limit."""
        return max(self.max_length - self.lengths[index] for index in self.active)

    def last_tokens(self) -> list[int]:
        """The token that each active sequence ends with."""
        return [self.new_tokens[index][-1] for index in self.active]

    def append(self, index: int, token: int) -> None:
        """Emit `token` in a sequence and ask the stopping criteria."""
        if self.lengths[index] == self.ids.shape[1]:
            self._hold(self.ids, self.ids.shape[1] * 3 // 2)
        self.writable_ids[index, self.lengths[index]] = token
        self.new_tokens[index].append(token)
        self.lengths[index] = length = self.lengths[index] + 1
        if self.end_lengths[index] is None and self.stopping.may_end(length, token):
            if self.stopping.is_end(self.ids[index : index + 1, :length]):
                self.end_lengths[index] = length

    def places_to_keep(self) -> list[int]:
        """Places of the batch whose sequences go on; all of them where none or every one has ended."""
        going = [place for place, index in enumerate(self.active) if not self.is_done(index)]
        if not going or len(going) == len(self.active):
            return list(range(len(self.active)))
        # Those at the end take the places of those that leave, so that no others have to be moved.
        moving = [place for place in going if place >= len(going)]
        return [place if place in going else moving.pop() for place in range(len(going))]

    def keep_sequences(self, places: list[int]) -> None:
        """Let the sequences at these places of the batch be the active ones."""
        self.active = [self.active[place] for place in places]

    def stream(self, kept: list[list[int]] | None = None) -> None:
        """Give the streamer what every sequence has reached, after a round that kept these nodes; ended ones are padded."""
        if self.streamer is None:
            return
        if kept is not None and hasattr(self.streamer, "put_round"):
            with as_called():
                self.streamer.put_round(max(map(len, kept)) - 1)
        going = [length for index, length in enumerate(self.lengths) if not self.is_done(index)]
        end = min(going) if going else self.width
        for step in range(self.num_streamed, end):
            tokens = self.ids[:, step].to("cpu", copy=True)
            has_ended = [length <= step for length in self.lengths]
            if any(has_ended):
                tokens[torch.tensor(has_ended, device=tokens.device)] = self.pad_token_id.to(tokens)
            with as_called():
                self.streamer.put(tokens)
        self.num_streamed = end

    def pad_ended(self, width: int) -> None:
        """Fill sequences that have ended with padding up to this length, where there is any."""
        if self.stopping.pads:
            if width > self.ids.shape[1]:
                self._hold(self.ids, width)
            for index, length in enumerate(self.lengths):
                if self.is_done(index) and length < width:
                    self.ids[index, length:width] = self.pad_token_id

    @property
    def width(self) -> int:
        """Length at which the last sequence was stopped, once all are. Without padding, others go on beyond their own end."""
        return max(end for end in self.end_lengths if end is not None)

    def finished(self) -> torch.LongTensor:
        """The sequences `(B, T)` as plain decoding returns them."""
        self.pad_ended(self.width)
        ids = self.ids[:, : self.width].clone(memory_format=torch.contiguous_format)  # without the spare room
        return ids  # type: ignore[return-value]
