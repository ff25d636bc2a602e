"""Verification for targets with recurrent layers: a chain with lazy replay.

A recurrent state cannot be rolled back, and running accepted tokens in a forward of their own would cost one more forward
per round. So the cache stays at the last state that is known to be right, and the tokens committed since then are carried:

    verify   one forward over [carried tokens, root, drafted chain] from that state
    commit   all accepted: the cache is where it should be, and nothing is carried any more
             else: the cache goes back to the state, and the accepted tokens join those that are carried

A forward over a few more tokens costs next to nothing as long as it is bound by reading the weights. When many tokens are
carried, a round without drafted tokens moves the state on. Attention layers go back to the same length as the state.
Shape letters: C carried tokens, N chain nodes, V vocabulary.
"""

import functools

import torch

from ..transformers_names import generation_mode_check, is_stateful, set_generation_mode_check
from .cache import CacheSnapshot
from .memory import kept_with
from .round_values import Prompt
from .target_side import TargetSide
from .target_support import Declined
from .transfer import on_device
from .tree import Tree, chain_tree, root_tree

# Carried tokens from which on a round without drafted tokens moves the state on. `tree="auto"` does so earlier if it pays.
MAX_CARRIED = 16
# Tokens of the check, and the error that rounding explains: units in the last place of float32 or of the dtype, at most
# this share of the logits' spread. Float64 models compute parts in float32.
_NUM_CHECKED, _ROUNDING, _MOST_ROUNDING = 8, 512, 0.05


class RecurrentTarget(TargetSide):
    """A target that verifies a chain for one row by lazy replay; any cache whose states can be copied."""

    kind = "chain"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_stored = 0  # tokens in the cache's state
        self.carried = torch.zeros((1, 0), dtype=torch.long)  # [1, C], committed tokens that it does not hold
        self.token_ids = self.carried  # [1, N], of the latest chain
        self.state = self.snapshot

    @property
    def num_carried(self) -> int:
        """C: tokens that the next forward runs besides the tree."""
        return self.carried.shape[1]

    @property
    def max_depth(self) -> float:
        """Draft steps that the next tree may have; 0 when so much is carried that the state has to move on."""
        return 0 if self.num_carried >= MAX_CARRIED else super().max_depth

    def prefill(self, input_ids: torch.LongTensor) -> Prompt:
        """Run the prompt.

        Raises:
            Declined: if the model computes other logits for several tokens at once than for one at a time.
        """
        prompt = super().prefill(input_ids)
        self.carried = input_ids[:, :0]
        self._move_on()
        # Of each target, not of its class: limits in a configuration, which single steps of some ignore, decide as well.
        found, kind = kept_with(self.target, "checks of states", dict), (prompt.logits.dtype, self.device.type)
        if kind not in found:
            num_tokens = min(_NUM_CHECKED, self.generation_config.max_length - input_ids.shape[1] - 1)
            if num_tokens < 2:  # no room to check, and hardly any to draft
                self.has_given_up = True
                return prompt
            found[kind] = self._check(prompt.logits.topk(num_tokens).indices.to(input_ids))
        if (reason := found[kind]) is not None:
            raise Declined(reason)
        return prompt

    def _after_prefill(self, mask: torch.BoolTensor) -> None:
        self.num_stored = mask.shape[1]

    def _check(self, token_ids: torch.Tensor) -> str | None:
        """Why a forward over tokens `(1, A)` does not compute what single steps do; None if it does."""
        name = type(self.target).__name__
        steps = self.plain_steps(token_ids).float()
        try:
            together = self.verify(chain_tree(token_ids)).logits.float()
        except Exception as error:
            # Whatever a model fails with that was not made for several tokens behind a state.
            return f"{name} refuses several tokens behind its recurrent state ({type(error).__name__}: {error})"
        finally:
            self.forget_appended()
        spread = float(steps.std())
        difference = float((together - steps).square().mean().sqrt()) / max(spread, 1e-30)
        eps = max(torch.finfo(kind).eps for kind in (self.target.dtype, torch.float32))
        if difference <= min(_ROUNDING * eps, _MOST_ROUNDING):
            return None
        return (
            f"{name} does not continue its recurrent state over several tokens at once: their logits differ from those of "
            f"single steps by {difference:.2g} of their spread"
        )

    def _verify(self, tree: Tree):
        self.token_ids = on_device(tree.token_ids, self.carried.device)
        tokens = torch.cat((self.carried, self.token_ids), dim=1)
        num_nodes, width = tree.num_nodes, tokens.shape[1]
        mask = self._mask_over(self.num_stored + width)
        position_ids = self.next_position[0] - self.num_carried + torch.arange(width)[None]
        logits, states = self._forward(chain_tree(tokens), mask, position_ids, num_logits=num_nodes)
        return logits[:, -num_nodes:], [state[:, -num_nodes:] for state in states]

    def _move_on(self) -> None:
        """What is carried is in the cache now: keep its state."""
        self.num_stored += self.num_carried
        self.carried = self.carried[:, :0]
        self.state = CacheSnapshot(self.cache)

    def forget_appended(self) -> None:
        """Go back to the state that is kept."""
        self.state.restore()

    def commit(self, kept: list[list[int]]) -> None:
        """Keep these nodes of the chain: in the cache if they are all, else as tokens that are carried."""
        num_kept = len(kept[0])
        self.carried = torch.cat((self.carried, self.token_ids[:, :num_kept]), dim=1)
        if num_kept == self.token_ids.shape[1]:
            self._move_on()
        else:
            self.forget_appended()
        super().commit(kept)

    def plain_steps(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Logits `(1, A, V)` of single steps over tokens `(1, A)` behind what is committed, which stays as it is."""
        names = ("state", "carried", "num_stored", "next_position")
        before, num_carried = {name: getattr(self, name) for name in names}, self.num_carried
        tokens = torch.cat((self.carried, token_ids.to(self.carried)), dim=1)
        self.carried, self.next_position = self.carried[:, :0], [self.next_position[0] - num_carried]
        steps = []
        for token in tokens.split(1, dim=1):
            steps.append(self.verify(root_tree(token[:, 0])).logits)
            self.commit([[0]])
        vars(self).update(before)
        self.forget_appended()
        return torch.cat(steps[num_carried:], dim=1)

    def finish(self, sequences: torch.LongTensor) -> None:
        """Let a cache that is returned hold all that was committed, as plain decoding leaves it."""
        if self.returns_cache and self.num_carried:
            last, self.carried = self.carried[:, -1], self.carried[:, :-1]
            self.next_position = [self.next_position[0] - 1]
            self.verify(root_tree(last))
            self.commit([[0]])


def why_no_replay(cache, num_rows: int) -> str | None:
    """Why a target with recurrent layers cannot be served by lazy replay; None if it can."""
    if num_rows > 1:
        return "rows of a batch accept different numbers of tokens, which one recurrent state cannot follow; pass one row"
    if getattr(cache, "offloading", False):
        return "an offloaded cache cannot be rolled back"
    return None


class _NotStateful:
    """A target as transformers' check of a generation mode shall see it; everything but one flag is the target's."""

    def __init__(self, target):
        self._target = target

    def __getattr__(self, name: str):
        return False if name == "_is_stateful" else getattr(self._target, name)

    @property  # type: ignore[misc]
    def __class__(self):
        return type(self._target)


def install_for_stateful() -> None:
    """Let targets with recurrent layers pass transformers' check beside drafts of model type "prism", and no others."""
    original = generation_mode_check()
    if getattr(original, "_prism_original", None) is not None:
        return

    @functools.wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        draft = generation_mode_kwargs.get("assistant_model")
        is_ours = getattr(getattr(draft, "config", None), "model_type", None) == "prism"
        seen = _NotStateful(self) if is_ours and is_stateful(self) else self
        return original(seen, generation_mode, generation_config, generation_mode_kwargs)

    _validate_generation_mode._prism_original = original  # type: ignore[attr-defined]
    set_generation_mode_check(_validate_generation_mode)


def uninstall_for_stateful() -> None:
    """Undo [`install_for_stateful`]."""
    original = getattr(generation_mode_check(), "_prism_original", None)
    if original is not None:
        set_generation_mode_check(original)
