"""Which tokens plain decoding would have emitted, and how far along the drafted tree that is.

A tree has no say in what is emitted, so nothing has to be corrected for: each next token is chosen from the target's
processed logits at the current node exactly as plain decoding chooses it, and the walk goes on while a child of that
node holds the chosen token. One random draw per emitted token, in order, makes sampled text equal to plain `generate`
with the same seed; drawn a little ahead, the draft can see it, too (`sampling_noise.py`).

There are two roads. On the device (`walk_on_device`) one operator walks all rows and one read brings what they emit:
greedy without processors, and sampling under stock warpers. On the host (`walk`) processors are called node by node,
with exactly the ids that plain decoding would have shown them: everything else, and everything on a CPU.
Source: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1, with the draft's distribution a point mass.
"""

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..kernels.dispatch import TRITON_DEVICES, expect
from ..kernels.verify_tree import WARPERS, verify_tree
from ..transformers_names import pad_token
from .sampling_noise import Coupling, StepNoise
from .tree import Tree

# Criteria that look at nothing but the ids, which the device's walk keeps on the host.
_CRITERIA_OF_IDS = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, StopStringCriteria)

# Devices whose calls walk on the device where they can.
_walking_devices: ContextVar[tuple[str, ...]] = ContextVar("walking_devices", default=())


@contextlib.contextmanager
def walking_as_accelerators_do() -> Iterator[None]:
    """Let generate() calls on a CPU choose tokens as those on accelerators do: by the walk on the device, where processors,
    criteria and outputs allow it."""
    token = _walking_devices.set(("cpu",))
    try:
        yield
    finally:
        _walking_devices.reset(token)


def warper_settings(logits_processor: LogitsProcessorList) -> dict | None:
    """Arguments by which `verify_tree` does what these processors do; None if it cannot.

    It can if they are stock warpers in transformers' order, each at most once and with its default options.
    """
    settings: dict = {}
    for processor in logits_processor:
        name = next((name for name, warper in WARPERS.items() if type(processor) is warper), None)
        if name is None or any(list(WARPERS).index(earlier) >= list(WARPERS).index(name) for earlier in settings):
            return None
        value = vars(processor)["mass" if name == "typical_p" else name]
        if vars(WARPERS[name](value)) != vars(processor):
            return None
        settings[name] = value
    return settings


def _quiet_range(stopping_criteria: StoppingCriteriaList, device: torch.device) -> tuple[float, set[int]]:
    """Where criteria need not be asked, since they neither stop a row nor warn: below a length, but behind some tokens."""
    length, tokens = float("inf"), set()
    for criterion in stopping_criteria:
        if type(criterion) is EosTokenCriteria:
            # Where the ids are, as the criterion itself does when it is first called.
            criterion.eos_token_id = criterion.eos_token_id.to(device)
            tokens.update(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxLengthCriteria:
            length = min(length, criterion.max_length, criterion.max_position_embeddings or length)
        else:
            length = 0
    return length, tokens


class OutputRows:
    """The sequences of one generate() call: chooses next tokens, appends them, and knows when a row ends.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): the prompts as plain decoding holds them.
        logits_processor (`LogitsProcessorList`): called once per emitted token, in order, with the ids so far.
        stopping_criteria (`StoppingCriteriaList`): called once per emitted token, in order.
        generation_config (`GenerationConfig`): prepared by generate().
        is_coupled (`bool`): whether the draft may see the random numbers of sampling, where nothing else could draw in
            between: with stock warpers and criteria.
        walk (`str`): "auto", "device" or "host". "auto" is the device's where the ids are on an accelerator, or in a block
            of [`walking_as_accelerators_do`], and processors, criteria and outputs allow it.
    Raises:
        ValueError: if the walk is asked for on the device, which it cannot be.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config,
        is_coupled: bool = False,
        walk: str = "auto",
    ):
        expect(walk in ("auto", "device", "host"), "walk", "auto, device or host", walk)
        self.num_rows, self.prompt_length = input_ids.shape
        self.device = input_ids.device
        self.max_length = generation_config.max_length
        self.logits_processor = logits_processor
        self.stopping_criteria = stopping_criteria
        self.do_sample = generation_config.do_sample
        self.pad_token_id = pad_token(generation_config)
        self.pads_finished_rows = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        returns = generation_config.return_dict_in_generate
        # For each row what every emitted token was chosen from, where that was asked for.
        self.scores = self._kept_rows() if returns and generation_config.output_scores else None
        self.logits = self._kept_rows() if returns and generation_config.output_logits else None
        # Processors may write to what they get, and kept logits would keep those of the whole tree alive.
        self.copies_logits = len(logits_processor) > 0 or self.scores is not None or self.logits is not None
        self.warpers = warper_settings(logits_processor)
        if walk == "device":
            expect(self.fits_device, "walk", "host, for these processors, criteria or outputs", walk)
        is_there = walk == "device" or (
            walk == "auto" and self.device.type in (*TRITON_DEVICES, *_walking_devices.get())
        )
        self.walks_on_device = is_there and self.fits_device
        capacity = max(self.max_length, self.prompt_length) + 1
        # Criteria that look at ids on the host read nothing from the device.
        ids_device = torch.device("cpu") if self.walks_on_device else self.device
        self.ids = torch.zeros((self.num_rows, capacity), dtype=input_ids.dtype, device=ids_device)
        self.ids[:, : self.prompt_length] = input_ids
        self.lengths = [self.prompt_length] * self.num_rows
        self.new_tokens: list[list[int]] = [[] for _ in range(self.num_rows)]  # behind the prompts
        self.end_lengths: list[int | None] = [None] * self.num_rows  # where the criteria stopped each row
        self.quiet_until, self.end_tokens = _quiet_range(stopping_criteria, ids_device)
        has_stock_parts = self.warpers is not None and self.has_stock_criteria
        self.is_coupled = is_coupled and self.do_sample and has_stock_parts
        needs_noise = self.do_sample and (self.num_rows > 1 or self.walks_on_device or self.is_coupled)
        self.noise = StepNoise(self.device) if needs_noise else None

    def _kept_rows(self) -> list[list[torch.Tensor]]:
        return [[] for _ in range(self.num_rows)]

    @property
    def fits_device(self) -> bool:
        """Whether the device's walk chooses and ends as processors and criteria do."""
        keeps_rows = self.scores is not None or self.logits is not None
        chooses = self.warpers is not None if self.do_sample else not len(self.logits_processor)
        return chooses and not keeps_rows and self.has_stock_criteria

    @property
    def has_stock_criteria(self) -> bool:
        """Whether no stopping criterion looks at anything but the ids."""
        return all(type(one) in _CRITERIA_OF_IDS for one in self.stopping_criteria)

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
        self.new_tokens[row].append(token)
        self.lengths[row] = length + 1
        if self.end_lengths[row] is None and self._is_end(row, token):
            self.end_lengths[row] = length + 1

    def _is_end(self, row: int, token: int) -> bool:
        """Whether the criteria stop a row behind `token`, its last."""
        length = self.lengths[row]
        if length < self.quiet_until and token not in self.end_tokens:
            return False
        scores = tuple(self.scores[0]) if self.scores is not None and self.num_rows == 1 else None
        return bool(self.stopping_criteria(self.ids[row : row + 1, :length], scores)[0])

    def choose(self, row: int, logits: torch.Tensor) -> int:
        """The token that plain decoding emits next in `row`, given the target's logits `(V,)` there.

        Raises:
            ValueError: if the processed logits hold NaN.
        """
        raw = logits.to(copy=self.copies_logits, dtype=torch.float32, device=self.ids.device)[None]  # [1, V]
        scores = self._process(row, raw)
        if self.scores is not None:
            self.scores[row].append(scores)
        if self.logits is not None:
            self.logits[row].append(raw)
        if not self.do_sample:
            token = int(torch.argmax(scores, dim=-1))
            # Which takes NaN for the largest.
            if math.isnan(scores[0, token]):
                self.refuse_nan(row)
            return token
        probs = torch.nn.functional.softmax(scores, dim=-1)
        if torch.isnan(probs).any():
            self.refuse_nan(row)
        if self.noise is None:
            return int(torch.multinomial(probs, num_samples=1))
        # Equal to torch.multinomial of the whole batch, bit for bit, whichever row comes to this step first.
        noise = self.noise.of_step(row, self.lengths[row] - self.prompt_length, (self.num_rows, probs.shape[-1]))
        return int(torch.argmax(probs / noise, dim=-1))

    def _process(self, row: int, raw: torch.Tensor) -> torch.Tensor:
        if not self.logits_processor:
            return raw
        ids = self.ids[row : row + 1, : self.lengths[row]]
        # Stock warpers look at nothing but the row's own scores.
        if self.num_rows == 1 or self.warpers is not None:
            return self.logits_processor(ids, raw)
        # Some processors keep state per row of the batch, so each row is shown in its own place of a whole batch.
        batch_ids = ids.repeat(self.num_rows, 1)
        return self.logits_processor(batch_ids, raw.repeat(self.num_rows, 1))[row : row + 1]

    def refuse_nan(self, row: int):
        """Stop before a token is chosen from NaN."""
        raise ValueError(f"expected finite logits from the target, got NaN for token {self.lengths[row]} of row {row}")

    def forget_passed_noise(self, active: list[int]) -> None:
        """Free the sampling noise of steps that rows have passed, and of rows that are done."""
        if self.noise is not None:
            needed: list[int | None] = [None] * self.num_rows
            for row in active:
                needed[row] = None if self.is_done(row) else self.lengths[row] - self.prompt_length
            self.noise.forget_before(needed)

    def coupling(self, active: list[int], num_steps: int) -> Coupling | None:
        """The draws of the next `num_steps` tokens of these rows, for the draft to see; None if it shall not."""
        if not self.is_coupled or num_steps == 0:
            return None
        noise, steps, rows = self.noise_of_next(active, num_steps, self.noise.buffer.shape[2])
        return Coupling(noise, steps, rows, self.logits_processor)

    def noise_of_next(self, active: list[int], num_steps: int, vocab_size: int):
        """Noise of each row's next steps, and where in it each row's next step and row are."""
        steps = [None if self.is_done(row) else self.lengths[row] - self.prompt_length for row in active]
        ends = {row: step + num_steps for row, step in zip(active, steps, strict=True) if step is not None}
        noise = self.noise.fill(ends, (self.num_rows, vocab_size))
        places = [0 if step is None else step - self.noise.starts[row] for row, step in zip(active, steps, strict=True)]
        return noise, torch.tensor(places, device=self.device), torch.tensor(active, device=self.device)

    def finish(self) -> torch.LongTensor:
        """The sequences as plain decoding returns them, and the generator in the state that it leaves."""
        width = max(self.end_lengths)
        for row, length in enumerate(self.lengths):
            if length < width:
                self.ids[row, length:width] = self.pad_token_id
        if self.noise is not None:
            self.noise.rewind_to(width - self.prompt_length)
        return self.ids[:, :width].to(self.device)

    def stacked(self, kept: list[list[torch.Tensor]] | None, num_steps: int):
        """Scores or logits as plain decoding returns them: a tuple with `(B, V)` for each emitted token.

        Rows that ended earlier hold zeros.
        """
        if kept is None:
            return None
        zeros = torch.zeros_like(kept[0][0])
        return tuple(torch.cat([row[step] if step < len(row) else zeros for row in kept]) for step in range(num_steps))


def walk_on_device(rows: OutputRows, active: list[int], tree: Tree, logits: torch.Tensor, depth: int):
    """Emit what plain decoding would in every row that is not done, as far as the trees go along; one read.

    Args:
        rows (`OutputRows`): the sequences; tokens are appended to them.
        active (`list[int]`): which sequence each row of the tree is.
        tree (`Tree`): N nodes in each row.
        logits (`torch.Tensor` of shape `(B, N, V)`): the target's logits at each node.
        depth (`int`): of the deepest node, or more.
    Returns:
        `list[list[int]]`: for each row of the tree what [`walk`] returns; [] for those that are done.
    """
    num_steps, drawn = depth + 1, {}
    if rows.noise is not None:
        names = ("noise", "noise_steps", "noise_rows")
        drawn = dict(zip(names, rows.noise_of_next(active, num_steps, logits.shape[-1]), strict=True)) | rows.warpers
    # As plain decoding does, which chooses from float32.
    logits = logits.float() if logits.dtype == torch.float64 else logits
    token_ids, parents, depths = (part.to(rows.device) for part in (tree.token_ids, tree.parents, tree.depths))
    walks = verify_tree(logits.to(rows.device), token_ids, parents, depths, num_steps, **drawn).tolist()
    kept: list[list[int]] = []
    for row, (num_emitted, *walked) in zip(active, walks, strict=True):
        kept.append([])
        for node, token in zip(walked[:num_emitted], walked[num_steps:], strict=False):
            if rows.is_done(row):
                break
            if token < 0:
                rows.refuse_nan(row)
            rows.append(row, token)
            kept[-1].append(node)
    return kept


def walk(rows: OutputRows, row: int, tree: Tree, tree_row: int, logits) -> list[int]:
    """Emit what plain decoding would, as far as the tree goes along.

    Args:
        rows (`OutputRows`): the sequences; tokens are appended to `row`.
        row (`int`): row of the sequences.
        tree (`Tree`): N nodes; `tree_row` is the tree's row for this sequence.
        logits (`torch.Tensor` of shape `(N, V)`): the target's logits at each node.
    Returns:
        `list[int]`: the nodes that a token was emitted at, the root first. Their keys and values stay; the last token
        emitted has none yet. So the number of nodes is the number of tokens.
    """
    children = _children(tree, tree_row)
    node, nodes = 0, [0]
    while True:
        token = rows.choose(row, logits[node])
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
