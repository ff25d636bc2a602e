"""The random numbers of sampling, which target and draft share (Gumbel coupling): known before the draft proposes.

Plain decoding samples the token `argmax p / e`, with e drawn anew from the exponential distribution for each step and
p the target's processed distribution; `torch.multinomial` does that, bit for bit. e depends on nothing but the step.
So it can be drawn a few steps ahead, in order, and the draft may look at it: where its distribution q is near p, the token
`argmax q / e` is chosen more often than `argmax q`, and the most probable nodes of a tree change with e. The target's choice
does not depend on the tree, so the text stays plain decoding's. The setting `tree_coupled` turns this off.
Shape letters: B sequences, K nodes of a draft step, M tokens that compete, W steps, V vocabulary.
Source: Daliri, Musco and Suresh 2024 (arXiv:2408.07978), Gumbel sampling with random numbers that both sides share.
"""

from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessorList

from ..kernels.dispatch import TRITON_DEVICES

# The likeliest tokens after a node, among which the proposed ones are chosen: more than are proposed, since a draw may lift
# any of them, and no more than `top_k_log_prob` finds in one call.
NUM_COMPETING = 64
# Of sampling noise for sequences that have advanced unevenly: a step of 8 of them over a vocabulary of 152k takes 5 MB.
MAX_NOISE_BYTES = 2**28
# Score of a token that a warper rules out: small, but finite.
_RULED_OUT = -100.0


class StepNoise:
    """The exponential noise of each decoding step for a whole batch, drawn in order when a sequence first needs it.

    Each sequence, a row of the noise, has a window of its own steps. A draw, `(B, V)`, is stored for every row whose window it
    continues. A row far ahead of others would need a buffer as long as its lead, so windows have a largest size: what does not
    fit into the window of a row that lags is dropped. When the row reaches that step, it is drawn again, from the generator's
    state before the step. A state takes 5 kB on a CPU and 16 bytes on a GPU.

    Args:
        device (`torch.device`): whose global generator plain decoding draws from.
        max_bytes (`int`): that the windows may take, unless the next steps of a single round need more.
    """

    def __init__(self, device: torch.device, max_bytes: int = MAX_NOISE_BYTES):
        self.device, self.max_bytes = device, max_bytes
        self.buffer = torch.empty((0, 0, 0), device=device)  # [W, B, V]: of step starts[row] + w for each row
        self.starts: list[int] = []
        self.ends: list[int] = []  # the step that each row's window is filled up to
        self.needed: list[int | None] = []  # the first step that each row still needs; None: it has ended
        self.num_drawn = 0
        self.first_needed = 0  # by any row
        self.states: dict[int, torch.Tensor] = {}  # of the generator, before the draw of each step that is still needed
        self.state_after = torch.empty(0, device="cpu")  # of the generator, after the last draw
        self.module = torch if device.type == "cpu" else getattr(torch, device.type)
        # A process may have several accelerators, each with a generator of its own.
        self.which = (device,) if device.type in TRITON_DEVICES else ()

    def of_step(self, row: int, step: int, shape: tuple[int, int]) -> torch.Tensor:
        """Noise `(V,)` of a row's step, given the shape `(B, V)` of a draw."""
        self.fill({row: step + 1}, shape)
        return self.buffer[step - self.starts[row], row]

    def fill(self, ends: dict[int, int], shape: tuple[int, int]) -> torch.Tensor:
        """Hold the noise of some rows up to these steps, which are not included.

        Args:
            ends (`dict[int, int]`): the step for each row that needs noise.
            shape (`tuple[int, int]`): `(B, V)`, of a draw.
        Returns:
            `torch.Tensor` of shape `(W, B, V)`: the step `starts[row] + w` of each row, as far as it is filled.
        """
        if not self.starts:
            self.starts, self.ends, self.needed = [0] * shape[0], [0] * shape[0], [0] * shape[0]
        missing = {row: end for row, end in ends.items() if end > self.ends[row]}
        if not missing:
            return self.buffer
        self._make_room(missing, shape)
        # Steps that rows lack, and all steps up to the last of them, since steps are drawn in order.
        steps = {step for row, end in missing.items() for step in range(self.ends[row], end)}
        again = _Replay(self)
        for step in sorted(steps.union(range(self.num_drawn, max(steps) + 1))):
            takers = [row for row, end in enumerate(self.ends) if end == step and self._has_room(row, step)]
            if takers or step >= self.num_drawn:
                self._draw(step, takers, again)
        return self.buffer

    def _has_room(self, row: int, step: int) -> bool:
        return self.needed[row] is not None and step - self.starts[row] < len(self.buffer)

    def _draw(self, step: int, takers: list[int], again: "_Replay") -> None:
        """Give a step's noise to these rows."""
        places = {row: step - self.starts[row] for row in takers}
        going = sum(needed is not None for needed in self.needed)
        # Drawn directly into its place, if that is free in every row.
        is_common = len(takers) == going and len(set(places.values())) == 1
        drawn = self.buffer[places[takers[0]]] if is_common else torch.empty_like(self.buffer[0])
        if step < self.num_drawn:
            drawn.exponential_(1, generator=again.before(step))
        else:
            self.states[step] = self.module.get_rng_state(*self.which)
            drawn.exponential_(1)
            self.num_drawn += 1
            self.state_after = self.module.get_rng_state(*self.which)
        for row, place in places.items():
            if not is_common:
                self.buffer[place, row] = drawn[row]
            self.ends[row] = step + 1

    def _make_room(self, missing: dict[int, int], shape: tuple[int, int]) -> None:
        """If the missing steps do not fit, let each window begin with the first step that its row needs, and grow."""
        end_of_all = max(missing.values())
        lead, most = end_of_all - self.first_needed, self.max_bytes // (4 * shape[0] * shape[1])
        # With so much to spare that windows are seldom moved.
        holds_all = lead + max(lead // 4, 8) <= most
        going = [row for row, needed in enumerate(self.needed) if needed is not None]
        wanted = dict.fromkeys(going, end_of_all) if holds_all else missing
        if all(end - self.starts[row] <= len(self.buffer) for row, end in wanted.items()):
            return
        firsts = [end if needed is None else needed for needed, end in zip(self.needed, self.ends, strict=True)]
        least = max(end - firsts[row] for row, end in missing.items())
        size = max(min(lead + max(lead // 2, 8), most), least, len(self.buffer))
        old, buffer = self.buffer, self.buffer
        if size > len(old):
            buffer = torch.empty((size, *shape), dtype=torch.float32, device=self.device)
        for row, first in enumerate(firsts if len(old) else []):
            held = old[first - self.starts[row] : self.ends[row] - self.starts[row], row]
            buffer[: len(held), row] = held.clone() if buffer is old else held
        self.buffer, self.starts = buffer, firsts

    def forget_before(self, needed: list[int | None]) -> None:
        """Forget steps that rows have passed; windows are freed when room is made next.

        Args:
            needed (`list[int]`): the first step that each row of the call still needs; None where it has ended.
        """
        going = [step for step in needed if step is not None]
        if not self.starts or not going:
            return
        for passed in range(self.first_needed, min(going)):
            del self.states[passed]
        self.needed, self.first_needed = needed, min(going)

    def rewind_to(self, num_steps: int) -> None:
        """Leave the generator as if only `num_steps` steps had been drawn, unless others have drawn from it since."""
        if num_steps < self.num_drawn and torch.equal(self.module.get_rng_state(*self.which), self.state_after):
            self.module.set_rng_state(self.states[num_steps], *self.which)


class _Replay:
    """A separate generator that draws steps again, so that the global one is not moved."""

    def __init__(self, noise: StepNoise):
        self.noise = noise
        self.generator: torch.Generator | None = None
        self.step: int | None = None

    def before(self, step: int) -> torch.Generator:
        """The generator in the state before a step, which is then drawn."""
        if self.generator is None:
            self.generator = torch.Generator(self.noise.device)
        if self.step != step:
            self.generator.set_state(self.noise.states[step])
        self.step = step + 1
        return self.generator


@dataclass(frozen=True)
class Coupling:
    """The known random numbers with which the tokens below the roots of a tree will be chosen.

    Args:
        noise (`torch.Tensor`): `(W, rows, V)`, of some steps of each row of the call.
        steps (`torch.LongTensor`): `(B,)`, index into its row's part of `noise` of the step that follows each root.
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
        # As p is not quite q, how likely a token is to win depends on its lead: a softmax of the scores.
        chances = torch.log_softmax(scores.clamp(min=_RULED_OUT) - drawn.log(), dim=-1)
        best, order = chances.topk(top_k, dim=-1)
        return token_ids.gather(-1, order), best
