"""Verification for targets with recurrent layers, and for batches that need chains: a chain with lazy replay.

A recurrent state cannot be rolled back, and running accepted tokens in a forward of their own would cost one more forward
per round. So the cache stays at the last state that is known to be right, and the tokens committed since then are carried:

    verify   one forward over [carried tokens, root, drafted chain] from that state
    commit   all accepted: the cache is where it should be, and nothing is carried any more
             else: the cache goes back to the state, and the accepted tokens join those that are carried

A forward over a few more tokens costs next to nothing as long as it is bound by memory bandwidth. When many tokens are
carried, a round without drafted tokens advances the state. Attention layers go back to the same length as the state. States
are only copied before a forward that may have to be undone, so that rounds without drafted tokens cost no copy.

Sequences of a batch share one length of the state and carry different numbers of tokens. Shorter ones are padded after their
chain, where none of their tokens reads it. Padding never becomes part of a state, which only advances by what all sequences
have committed. When a sequence carries many tokens, that takes a forward of its own.
Shape letters: B sequences, C carried tokens, N chain nodes, W tokens of a forward, V vocabulary.
"""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from ..transformers_names import GENERATION_MODE_CHECK, is_stateful, replace_method, restore_method
from .cache import CacheSnapshot
from .memory import kept_with
from .round_values import Prompt
from .target_side import TargetSide
from .target_support import Declined
from .transfer import on_device
from .tree import Tree, chain_tree

# From this many carried tokens on, a round without drafted tokens advances the state. `tree="auto"` does so earlier if it pays.
MAX_CARRIED = 16
# Tokens of the check; the error that rounding can explain, in units in the last place of float32 or of the dtype; and the
# most that it can be, as a share of the logits' spread. Float64 models compute parts in float32.
_NUM_CHECKED, _ROUNDING, _MOST_ROUNDING = 8, 512, 0.05
# Fields of configurations of models that only attend to keys that an indexer chooses.
_CHOOSES_KEYS = ("index_topk", "indexer_budget", "compress_rates")
# Amounts of padding are told apart modulo this number: models that merge keys merge a number of them that divides it.
_CHUNK = 16


class RecurrentTarget(TargetSide):
    """A target that verifies chains by lazy replay; its cache may be any whose states can be copied."""

    kind = "chain"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.keeps_finished = True  # all sequences share one state
        self.num_stored = 0  # tokens of each sequence, padding included, in the cache's state
        self.stored_position: list[int] = []  # of each sequence: the position after them
        self.num_carried_of = [0] * len(self.sequences)  # C, committed tokens of each sequence that the state does not hold
        self.padding_places: set[int] = set()  # numbers of padding tokens, modulo _CHUNK
        self.num_run = 0  # W, of the latest forward over a chain
        self.state: CacheSnapshot | None = None  # to go back to; None until a forward may have to be forgotten

    @property
    def num_carried(self) -> int:
        """Tokens that the next forward runs besides the chains, all sequences together."""
        return len(self.num_carried_of) * self._most_carried()

    @property
    def is_checked(self) -> bool:
        """Whether rounds are compared with single steps even if the target was tried. With padding they are: some targets then
        choose keys by their places in the cache, from a length on that their configuration names."""
        return self.is_padded

    @property
    def max_depth(self) -> float:
        """Draft steps that the next tree may have; 0 when so much is carried that the state has to advance."""
        is_one = len(self.num_carried_of) == 1
        return 0 if is_one and self.num_carried >= MAX_CARRIED else super().max_depth

    def prefill(self, input_ids: torch.LongTensor) -> Prompt:
        """Run the prompt.

        Raises:
            Declined: if the model computes other logits for several tokens at once than for one at a time.
        """
        config = self.target.config.get_text_config()
        if self.is_padded and any(getattr(config, name, None) is not None for name in _CHOOSES_KEYS):
            raise Declined("the model chooses some keys by an index, others for several tokens at once where there is padding")
        prompt = super().prefill(input_ids)
        self.stored_position = list(self.next_position)
        # Kept for each target, not for its class: limits in its configuration, which single steps of some ignore, matter, too.
        found = kept_with(self.target, "checks of states", dict)
        on, is_batch = (prompt.logits.dtype, self.device.type), len(input_ids) > 1
        kinds = [(*on, is_batch, self.is_padded, place) for place in self.padding_places]
        if not all(kind in found for kind in kinds):
            num_tokens = min(_NUM_CHECKED, self.generation_config.max_length - input_ids.shape[1] - 1)
            if num_tokens < 2:  # no room to check, and hardly any to draft
                self.has_given_up = True
                return prompt
            reason = self._check(prompt.logits.topk(num_tokens).indices.to(input_ids))
            found.update(dict.fromkeys(kinds, reason))
        if (reason := next(filter(None, map(found.get, kinds)), None)) is not None:
            raise Declined(reason)
        return prompt

    def _after_prefill(self, mask: torch.Tensor) -> None:
        self.num_stored = mask.shape[1]
        self.padding_places = set(((~mask).sum(dim=1) % _CHUNK).tolist())

    def _check(self, token_ids: torch.Tensor) -> str | None:
        """Why a forward over tokens `(B, A)` does not compute what single steps do; None if it does."""
        name, what = type(self.target).__name__, "its recurrent state" if is_stateful(self.target) else "its cache"
        steps = self.plain_steps(token_ids).float()
        try:
            together = self.verify(chain_tree(token_ids)).logits.float()
        except Exception as error:
            # Models that were not made for several tokens after a state may fail in any way.
            return f"{name} refuses several tokens behind {what} ({type(error).__name__}: {error})"
        finally:
            self.forget_appended()
        spread = float(steps.std())
        difference = float((together - steps).square().mean().sqrt()) / max(spread, 1e-30)
        eps = max(torch.finfo(kind).eps for kind in (self.target.dtype, torch.float32))
        if difference <= min(_ROUNDING * eps, _MOST_ROUNDING):
            return None
        return (
            f"{name} does not continue {what} over several tokens at once: their logits differ from those of "
            f"single steps by {difference:.2g} of their spread"
        )

    def _verify(self, tree: Tree):
        while self.has_given_up and min(self._carried()):
            self._catch_up(1)
        if len(self.num_carried_of) > 1 and self._most_carried() >= MAX_CARRIED:
            self._catch_up()
        tokens, starts = self._with_carried(tree.token_ids)
        if tree.num_nodes > 1 or min(starts) < max(starts):
            self._keep_state()
        self.num_run = tokens.shape[1]
        num_kept = self.num_run - min(starts)  # the last ones, among which all chains are
        logits, states = self._run(tokens, num_kept)
        starts = [start - min(starts) for start in starts]
        return _of_nodes(logits[:, -num_kept:], [state[:, -num_kept:] for state in states], starts, tree.num_nodes)

    def _carried(self) -> list[int]:
        """C of each sequence that is not done, or of all if every one is."""
        return [count for one, count in enumerate(self.num_carried_of) if not self.sequences.is_done(one)] or self.num_carried_of

    def _most_carried(self) -> int:
        return max(self._carried())

    def _text(self, width: int) -> torch.Tensor:
        """The next `width` tokens of each sequence after the state, `(B, width)`; padding after the end of sequences that have
        ended, zeros after the others."""
        start = self.num_stored - self.num_cached_before
        self.sequences.pad_ended(start + width)
        ids = self.sequences.ids[:, start : start + width]
        return pad(ids, (0, width - ids.shape[1]))

    def _with_carried(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Carried tokens, then `token_ids` `(B, N)`, then padding, `(B, W)`; and where `token_ids` begin in each sequence.
        Sequences that have ended get the padding that plain decoding gives them."""
        longest = self._most_carried()
        width = longest + token_ids.shape[1]
        text = self._text(width)
        has_ended = [self.sequences.is_done(one) for one in range(len(self.num_carried_of))]
        starts = [longest if ended else count for ended, count in zip(has_ended, self.num_carried_of, strict=True)]
        tokens = torch.cat((text[:, :longest], on_device(token_ids, text.device)), dim=1)
        if min(starts) < longest:
            index = torch.arange(width, device=text.device)[None]
            start = on_device(starts, text.device)[:, None]
            tokens = tokens.gather(1, torch.where(index < start, index, (index + longest - start).clamp(max=width - 1)))
        if any(has_ended) and not all(has_ended):
            tokens = torch.where(on_device(has_ended, text.device)[:, None], text, tokens)
        return tokens, starts

    def _run(self, tokens: torch.Tensor, num_logits: int = 0):
        """Logits and states of a forward over tokens `(B, W)` after the state."""
        width = tokens.shape[1]
        # Limited, so that padding after a chain gets no position that the model may not have.
        limits = [max(ends) for ends in zip(self.next_position, self.position_limit, strict=True)]
        first, limit = torch.tensor([self.stored_position, limits], device="cpu")[..., None]  # [B, 1] each
        position_ids = (first + torch.arange(width, device="cpu")).minimum(limit)
        mask = self._mask_over(self.num_stored + width)
        return self._forward(chain_tree(tokens), mask, position_ids, num_logits=num_logits)

    def _catch_up(self, most: int | None = None) -> None:
        """Advance the state by what all sequences have committed, or the first `most` tokens of it, in a forward of its own."""
        width = min(self._carried()) if most is None else min(*self._carried(), most)
        if width:
            self._run(self._text(width), 1)
            self._move_on(width)

    def _keep_state(self) -> None:
        """Copy the state that the cache has, unless it is kept already."""
        if self.state is None:
            self.state = CacheSnapshot(self.cache)

    def _move_on(self, num_tokens: int) -> None:
        """Note that this many more tokens of each sequence are in the cache's state."""
        self.num_stored += num_tokens
        self.stored_position = [position + num_tokens for position in self.stored_position]
        self.num_carried_of = [max(count - num_tokens, 0) for count in self.num_carried_of]
        self.state = None

    def forget_appended(self) -> None:
        """Go back to the state that is kept."""
        if self.state is not None:
            self.state.restore()

    def commit(self, kept: list[list[int]]) -> None:
        """Keep these nodes of the chains: in the cache if all that was run is accepted, else as carried tokens."""
        self.num_carried_of = [count + len(nodes) for count, nodes in zip(self.num_carried_of, kept, strict=True)]
        if all(count == self.num_run for count, nodes in zip(self.num_carried_of, kept, strict=True) if nodes):
            self._move_on(self.num_run)
        else:
            self.forget_appended()
        super().commit(kept)

    def plain_steps(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `(B, A, V)` of single steps over tokens `(B, A)` after the committed ones; these tokens are not committed."""
        self._keep_state()
        tokens, starts = self._with_carried(token_ids)
        before, steps = (self.num_stored, self.stored_position), []
        for token in tokens.split(1, dim=1):
            steps.append(self._run(token, 1)[0][:, -1:])
            self.num_stored, self.stored_position = self.num_stored + 1, [one + 1 for one in self.stored_position]
        self.num_stored, self.stored_position = before
        self.forget_appended()
        return _of_nodes(torch.cat(steps, dim=1), [], starts, token_ids.shape[1])[0]

    def finish(self, sequences: torch.Tensor) -> None:
        """If the cache is returned, run the committed tokens that it lacks, so that it is as plain decoding leaves it."""
        rest = sequences[:, self.num_stored - self.num_cached_before : -1]
        if self.returns_cache and rest.shape[1]:
            for tokens in rest.split(1 if self.has_given_up else rest.shape[1], dim=1):
                self._run(tokens, 1)
                self._move_on(tokens.shape[1])


def _of_nodes(
    logits: torch.Tensor, states: list[torch.Tensor], starts: list[int], num_nodes: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and states `(B, N, .)` of the `num_nodes` tokens that begin at `starts` in each sequence of `(B, W, .)`."""
    if len(set(starts)) == 1:
        return logits[:, starts[0] : starts[0] + num_nodes], [state[:, starts[0] : starts[0] + num_nodes] for state in states]
    index = torch.tensor(starts, device="cpu")[:, None] + torch.arange(num_nodes, device="cpu")  # [B, N]
    parts = [part.gather(1, index.to(part.device)[..., None].expand(-1, -1, part.shape[-1])) for part in (logits, *states)]
    return parts[0], parts[1:]


def why_no_replay(cache, num_rows: int) -> str | None:
    """Why a target cannot be served by lazy replay; None if it can."""
    if getattr(cache, "offloading", False):
        return "an offloaded cache cannot be rolled back"
    if num_rows > 1 and type(cache) is not DynamicCache:
        return f"{type(cache).__name__} has no room for sequences of a batch that run ahead of each other; pass one sequence"
    return None


class _NotStateful:
    """A target as transformers' check of a generation mode should see it: not stateful, else the target itself."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name: str):
        return False if name == "_is_stateful" else getattr(self._target, name)

    @property  # type: ignore[misc]
    def __class__(self):
        return type(self._target)


def install_for_stateful() -> None:
    """Let targets with recurrent layers pass transformers' check if the draft is of model type "prism", and only then; another
    target's draft is refused there in our words."""

    def make(original):
        def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
            draft = generation_mode_kwargs.get("assistant_model")
            is_ours = getattr(getattr(draft, "config", None), "model_type", None) == "prism"
            if is_ours and draft.config.vocab_size != self.config.get_text_config().vocab_size:
                draft.bind(self)  # raises an error that names both sides; transformers would advise to pass tokenizers
            seen = _NotStateful(self) if is_ours and is_stateful(self) else self
            return original(seen, generation_mode, generation_config, generation_mode_kwargs)

        return _validate_generation_mode

    replace_method(GENERATION_MODE_CHECK, make)


def uninstall_for_stateful() -> None:
    """Undo [`install_for_stateful`]."""
    restore_method(GENERATION_MODE_CHECK)
