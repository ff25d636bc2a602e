"""Which tokens plain decoding would have emitted, and how far along the drafted tree that is.

A tree is a deterministic function of the context, so nothing has to be corrected for: each next token is chosen from
the target's processed logits at the current node exactly as plain decoding chooses it, and the walk goes on while a
child of that node holds the chosen token. One random draw per emitted token, in order, makes sampled text equal to
plain `generate` with the same seed.
Source: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1, with the draft's distribution a point mass.
"""

import torch
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .tree import Tree


class OutputRows:
    """The sequences of one generate() call: chooses next tokens, appends them, and knows when a row ends.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): the prompts as plain decoding holds them.
        logits_processor (`LogitsProcessorList`): called once per emitted token, in order, with the ids so far.
        stopping_criteria (`StoppingCriteriaList`): called once per emitted token, in order.
        generation_config (`GenerationConfig`): prepared by generate().
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
    ):
        self.num_rows, self.prompt_length = input_ids.shape
        self.max_length = generation_config.max_length
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.do_sample = generation_config.do_sample
        self.pad_token_id = generation_config._pad_token_tensor
        self.pads_finished_rows = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        capacity = max(self.max_length, self.prompt_length) + 1
        self.ids = input_ids.new_zeros((self.num_rows, capacity))
        self.ids[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * self.num_rows
        self.end_lengths: list[int | None] = [None] * self.num_rows  # where the criteria stopped each row
        returns = generation_config.return_dict_in_generate
        # For each row what every emitted token was chosen from, where that was asked for.
        self.scores = self._kept_rows() if returns and generation_config.output_scores else None
        self.logits = self._kept_rows() if returns and generation_config.output_logits else None
        self.noise = _StepNoise(input_ids.device) if self.num_rows > 1 and self.do_sample else None

    def _kept_rows(self) -> list[list[torch.Tensor]]:
        return [[] for _ in range(self.num_rows)]

    @property
    def chooses_by_argmax(self) -> bool:
        """Whether a next token is the argmax of the target's own logits, so that all nodes can be read at once."""
        keeps_rows = self.scores is not None or self.logits is not None
        return not (self.do_sample or len(self.logits_processor) or keeps_rows)

    def is_done(self, row: int) -> bool:
        """Whether `row` emits no more tokens.

        Without an EOS criterion plain decoding goes on writing in rows that a criterion has stopped, until every row
        is stopped; so do we.
        """
        if self.pads_finished_rows:
            return self.end_lengths[row] is not None
        end = self.max_length if None in self.end_lengths else max(self.end_lengths)
        return self.lengths[row] >= end

    def remaining(self, row: int) -> int:
        """Tokens that `row` may still emit before the length limit."""
        return self.max_length - self.lengths[row]

    def append(self, row: int, token: int) -> None:
        """Emit `token` in `row` and ask the stopping criteria."""
        length = self.lengths[row]
        self.ids[row, length] = token
        self.lengths[row] = length + 1
        if self.end_lengths[row] is None:
            scores = tuple(self.scores[0]) if self.scores is not None and self.num_rows == 1 else None
            if bool(self.stopping_criteria(self.ids[row : row + 1, : length + 1], scores)[0]):
                self.end_lengths[row] = length + 1

    def choose(self, row: int, logits: torch.Tensor) -> int:
        """The token that plain decoding emits next in `row`, given the target's logits `(V,)` there.

        Raises:
            ValueError: if the processed logits hold NaN.
        """
        raw = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)[None]  # [1, V]
        scores = self._process(row, raw)
        if self.scores is not None:
            self.scores[row].append(scores)
        if self.logits is not None:
            self.logits[row].append(raw)
        probs = torch.nn.functional.softmax(scores, dim=-1) if self.do_sample else scores
        if torch.isnan(probs).any():
            self.refuse_nan(row)
        if not self.do_sample:
            return int(torch.argmax(scores, dim=-1))
        if self.noise is None:
            return int(torch.multinomial(probs, num_samples=1))
        # Equal to torch.multinomial of the whole batch, bit for bit, whichever row comes to this step first.
        noise = self.noise.of_step(self.lengths[row] - self.prompt_length, (self.num_rows, probs.shape[-1]))
        return int(torch.argmax(probs / noise[row : row + 1], dim=-1))

    def _process(self, row: int, raw: torch.Tensor) -> torch.Tensor:
        ids = self.ids[row : row + 1, : self.lengths[row]]
        if self.num_rows == 1:
            return self.logits_processor(ids, raw)
        if not len(self.logits_processor):
            return raw
        # Some processors keep state per row of the batch, so each row is shown in its own place of a whole batch.
        batch_ids = ids.repeat(self.num_rows, 1)
        return self.logits_processor(batch_ids, raw.repeat(self.num_rows, 1))[row : row + 1]

    def refuse_nan(self, row: int):
        """Stop before a token is chosen from NaN."""
        raise ValueError(f"expected finite logits from the target, got NaN for token {self.lengths[row]} of row {row}")

    def forget_passed_noise(self, active: list[int]) -> None:
        """Free the sampling noise of steps that every row still decoding has passed."""
        if self.noise is not None:
            self.noise.forget_before(min(self.lengths[row] for row in active) - self.prompt_length)

    def finish(self) -> torch.LongTensor:
        """The sequences as plain decoding returns them, and the generator in the state that it leaves."""
        width = max(self.end_lengths)
        for row, length in enumerate(self.lengths):
            if length < width:
                self.ids[row, length:width] = self.pad_token_id
        if self.noise is not None:
            self.noise.rewind_to(width - self.prompt_length)
        return self.ids[:, :width]

    def stacked(self, kept: list[list[torch.Tensor]] | None, num_steps: int):
        """Scores or logits as plain decoding returns them: a tuple with `(B, V)` for each emitted token.

        Rows that ended earlier hold zeros.
        """
        if kept is None:
            return None
        zeros = torch.zeros_like(kept[0][0])
        return tuple(torch.cat([row[step] if step < len(row) else zeros for row in kept]) for step in range(num_steps))


class _StepNoise:
    """The exponential noise of each decoding step for a whole batch, drawn in order when a row first needs it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.of_steps: dict[int, torch.Tensor] = {}
        self.states: list[torch.Tensor] = []  # of the generator, before each step's draw
        self.module = torch if device.type == "cpu" else getattr(torch, device.type)

    def of_step(self, step: int, shape: tuple[int, int]) -> torch.Tensor:
        """Noise `(B, V)` of a step, the same for every row that asks."""
        while len(self.states) <= step:
            self.states.append(self.module.get_rng_state())
            noise = torch.empty(shape, dtype=torch.float32, device=self.device).exponential_(1)
            self.of_steps[len(self.states) - 1] = noise
        return self.of_steps[step]

    def forget_before(self, step: int) -> None:
        """Free the noise of steps that every row has passed."""
        for passed in [key for key in self.of_steps if key < step]:
            del self.of_steps[passed]

    def rewind_to(self, num_steps: int) -> None:
        """Leave the generator as if only `num_steps` steps had been drawn."""
        if num_steps < len(self.states):
            self.module.set_rng_state(self.states[num_steps])


def walk(rows: OutputRows, row: int, tree: Tree, tree_row: int, logits, choices=None) -> list[int]:
    """Emit what plain decoding would, as far as the tree goes along.

    Args:
        rows (`OutputRows`): the sequences; tokens are appended to `row`.
        row (`int`): row of the sequences.
        tree (`Tree`): N nodes; `tree_row` is the tree's row for this sequence.
        logits (`torch.Tensor` of shape `(N, V)`): the target's logits at each node.
        choices (`list[int]`, *optional*): argmax of each node's logits, where that decides.
    Returns:
        `list[int]`: the nodes that a token was emitted at, the root first. Their keys and values stay; the last token
        emitted has none yet. So the number of nodes is the number of tokens.
    """
    children = _children(tree, tree_row)
    node, nodes = 0, [0]
    while True:
        token = choices[node] if choices is not None else rows.choose(row, logits[node])
        if token < 0:
            rows.refuse_nan(row)
        rows.append(row, token)
        following = children.get((node, token))
        if rows.is_done(row) or following is None:
            return nodes
        node = following
        nodes.append(node)


def _children(tree: Tree, row: int) -> dict[tuple[int, int], int]:
    """(parent, token) -> node; of twins the first."""
    table: dict[tuple[int, int], int] = {}
    pairs = zip(tree.parents[row].tolist(), tree.token_ids[row].tolist(), strict=True)
    for node, pair in enumerate(pairs):
        if node > 0:
            table.setdefault(pair, node)
    return table


def argmax_choices(rows: OutputRows, logits: torch.Tensor) -> list[list[int]] | None:
    """Argmax of the logits `(B, N, V)` of every node in one read, where nothing else decides, else None; -1 for NaN."""
    if not rows.chooses_by_argmax:
        return None
    choices = logits.float().argmax(dim=-1)
    is_nan = logits.gather(2, choices[..., None])[..., 0].isnan()  # argmax takes NaN for the largest
    return torch.where(is_nan, -1, choices).tolist()
