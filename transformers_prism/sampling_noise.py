"""The random numbers of sampling: one draw per decoding step, known before the draft proposes.

Plain decoding samples the token `argmax p / e`, with e drawn anew from the exponential distribution for each step and
p the target's processed distribution; `torch.multinomial` does that, bit for bit. Nothing but the step decides on e. So
it can be drawn a few steps ahead, in order, and the draft may look at it: where q is near p, `argmax q / e` is more
often the token that will be chosen than `argmax q`, and the most probable nodes of a tree change with e. The target's
choice does not look at the tree, so the text stays plain decoding's.
Shape letters: B rows of the tree, K nodes of a draft step, M tokens that compete, W steps, V vocabulary.
Source: Daliri, Musco and Suresh 2024 (arXiv:2408.07978), Gumbel sampling with random numbers that both sides share.
"""

from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessorList

from .kernels.dispatch import TRITON_DEVICES

# Tokens after a node that compete for being proposed, its likeliest: more than are proposed, since a draw may lift any of
# them, and no more than `top_k_log_prob` finds in one go.
NUM_COMPETING = 64
# Score of a token that a warper rules out: small, but a number.
_RULED_OUT = -100.0


class StepNoise:
    """The exponential noise of each decoding step for a whole batch, drawn in order when a row first needs it.

    Args:
        device (`torch.device`): whose global generator plain decoding draws from.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty((0, 0, 0), device=device)  # [W, B, V], of the steps from `start` on
        self.start = 0
        self.first_needed = 0
        self.num_drawn = 0
        self.states: dict[int, torch.Tensor] = {}  # of the generator, before the draw of each step that is still needed
        self.module = torch if device.type == "cpu" else getattr(torch, device.type)
        # A process may have several accelerators, each with a generator of its own.
        self.which = (device,) if device.type in TRITON_DEVICES else ()

    def before(self, end: int, shape: tuple[int, int]) -> torch.Tensor:
        """Noise `(W, B, V)` of the steps from `start` to `end - 1` or a later one."""
        if end - self.start > self.buffer.shape[0]:
            self._move(end, shape)
        while self.num_drawn < end:
            self.states[self.num_drawn] = self.module.get_rng_state(*self.which)
            self.buffer[self.num_drawn - self.start].exponential_(1)
            self.num_drawn += 1
        return self.buffer[: self.num_drawn - self.start]

    def _move(self, end: int, shape: tuple[int, int]) -> None:
        """Make room for the steps before `end`, without those that are not needed any more."""
        held = self.buffer[self.first_needed - self.start : self.num_drawn - self.start]
        wanted = end - self.first_needed
        self.buffer = torch.empty((wanted + max(wanted // 2, 8), *shape), dtype=torch.float32, device=self.device)
        if len(held):
            self.buffer[: len(held)] = held
        self.start = self.first_needed

    def of_step(self, step: int, shape: tuple[int, int]) -> torch.Tensor:
        """Noise `(B, V)` of a step, the same for every row that asks."""
        return self.before(step + 1, shape)[step - self.start]

    def forget_before(self, step: int) -> None:
        """Free what belongs to steps that every row has passed: the noise when room is made next."""
        for passed in range(self.first_needed, step):
            del self.states[passed]
        self.first_needed = step

    def rewind_to(self, num_steps: int) -> None:
        """Leave the generator as if only `num_steps` steps had been drawn."""
        if num_steps < self.num_drawn:
            self.module.set_rng_state(self.states[num_steps], *self.which)


@dataclass(frozen=True)
class Coupling:
    """What is known of the draws that the tokens below the roots of a tree will be chosen with.

    Args:
        noise (`torch.Tensor`): `(W, rows, V)`, of some steps and all rows of the call.
        steps (`torch.LongTensor`): `(B,)`, index into `noise` of the step that follows each root.
        rows (`torch.LongTensor`): `(B,)`, index into `noise` of each row.
        warpers (`LogitsProcessorList`): stock ones, which the target's logits go through.
    """

    noise: torch.Tensor
    steps: torch.Tensor
    rows: torch.Tensor
    warpers: LogitsProcessorList

    def likeliest(self, depth: int, token_ids, log_probs, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that are most likely to be chosen, if the target's distribution is the draft's.

        Args:
            depth (`int`): below the root, from 0: of the step that chooses among them.
            token_ids (`torch.LongTensor` of shape `(B, K, M)`): the draft's likeliest tokens after each node.
            log_probs (`torch.Tensor` of shape `(B, K, M)`): their log-probabilities in nats.
            top_k (`int`): 1 to M.
        Returns:
            `tuple`: tokens `(B, K, top_k)`, best first, and the logarithm of how likely each is to be chosen.
        """
        ids = token_ids.to(self.noise.device)
        drawn = self.noise[(self.steps + depth)[:, None, None], self.rows[:, None, None], ids].to(log_probs.device)
        scores = self.warpers(ids.flatten(0, 1), log_probs.flatten(0, 1)).view_as(log_probs)
        # Where p is not quite q, a token wins by how far it is ahead, as a softmax of the scores says.
        chances = torch.log_softmax(scores.clamp(min=_RULED_OUT) - drawn.log(), dim=-1)
        best, order = chances.topk(top_k, dim=-1)
        return token_ids.gather(-1, order), best
