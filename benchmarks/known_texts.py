"""What drafts accept of texts that are known, without a forward of the target in any round.

A draft does not change what its target writes: a prompt's text is the same with every draft, and so is sampled text with the
same seed. So the target writes each text once, and its states are computed once. Then a draft grows trees along the text,
several texts in a batch, and a round commits the longest path of its tree that matches the text. This gives the rounds of real
decoding in a fraction of the time; `transformers-prism bench acceptance` really decodes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from torch.nn.functional import pad
from transformers import GenerationConfig

from transformers_prism.bench.acceptance import answer_figures, tree_settings
from transformers_prism.bench.prompts import sampling_settings
from transformers_prism.decoding.attention import lent_attention
from transformers_prism.decoding.target_support import hidden_state, states_to_ask_for
from transformers_prism.decoding.tree import CandidatePool, select_nodes
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.whole_files import whole_file


@dataclass
class KnownText:
    """A prompt and what its target answers.

    Args:
        task (`str`): of the prompt.
        prompt (`torch.LongTensor` of shape `(1, T)`): its tokens.
        answer (`list[int]`): the target's, A tokens.
        max_new_tokens (`int`): limit of the answer.
        states (`dict`): by layer the target's states `(1, T + A - 1, target_hidden_size)`, of all tokens but the last.
        probabilities (`list[float]`): that the target gave each token of the answer; [] if it was not asked.
    """

    task: str
    prompt: torch.Tensor
    answer: list[int]
    max_new_tokens: int
    states: dict[int, torch.Tensor] = field(repr=False)
    probabilities: list[float] = field(default_factory=list)

    @property
    def token_ids(self) -> torch.Tensor:
        """Prompt and answer, `(1, T + A)`."""
        return torch.cat((self.prompt, torch.tensor([self.answer])), dim=1)

    def states_of(self, layer_ids: list[int]) -> torch.Tensor:
        """What a draft of these layers reads, `(1, T + A - 1, L * target_hidden_size)`."""
        return torch.cat([self.states[layer] for layer in layer_ids], dim=-1)


@torch.no_grad()
def write_texts(
    target, questions: list[tuple[str, dict]], temperature: float, max_new_tokens: int, seed: int, layer_ids: list[int]
) -> list[KnownText]:
    """Let a target answer prompts, one by one, without a draft.

    Args:
        questions: task and generate()'s inputs of each prompt.
        temperature (`float`): 0 is greedy.
        seed (`int`): set before every answer.
        layer_ids (`list[int]`): of the hidden states that drafts will read.
    """
    texts = []
    for task, inputs in questions:
        torch.manual_seed(seed)
        ids = target.generate(**inputs, **sampling_settings(max_new_tokens, temperature))
        outputs = target(input_ids=ids[:, :-1], output_hidden_states=states_to_ask_for(layer_ids, target.config))
        states = {layer: hidden_state(outputs, layer, target.config).clone() for layer in layer_ids}
        length = inputs["input_ids"].shape[1]
        texts.append(KnownText(task, ids[:, :length], ids[0, length:].tolist(), max_new_tokens, states))
    return texts


def keep_texts(path: Path, made_of: dict, write: Callable[[], list[KnownText]]) -> list[KnownText]:
    """The texts of a file, or those that `write` returns, which are then saved there; other processes wait meanwhile.

    Args:
        made_of (`dict`): what the texts depend on; if the file was made from something else, they are written again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            found = torch.load(path, weights_only=True)
            if found["made_of"] == made_of:
                return [KnownText(**text) for text in found["texts"]]
        texts = write()
        with whole_file(path) as partial:
            torch.save({"made_of": made_of, "texts": [vars(text) for text in texts]}, partial)
        return texts


@torch.no_grad()
def follow_texts(target, draft, texts: list[KnownText], tree: str, batch_size: int = 8) -> list[dict]:
    """Lead a draft along texts; returns the records that decoding them would give.

    Args:
        draft (`PrismDraftModel`): bound to the target that wrote the texts.
        texts (`list[KnownText]`): with the states that the draft reads.
        tree (`str`): nodes/depth/top-k.
        batch_size (`int`): texts in a batch; 1 if the draft proposes tokens of its text, since it would then also propose
            tokens of the other texts.
    Returns:
        `list[dict]`: as of [`~transformers_prism.bench.acceptance.decode_prompts`].
    """
    if draft.takes_text_rows and _settings(draft, tree).text_tokens:
        batch_size = 1
    # Texts of similar length share a batch, since the shorter ones are padded.
    order = sorted(range(len(texts)), key=lambda index: texts[index].prompt.shape[1])
    answers: dict[int, dict] = {}
    with lent_attention(target, draft):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            accepted = rounds_of(draft, [texts[index] for index in chosen], tree)
            for index, counts in zip(chosen, accepted, strict=True):
                text = texts[index]
                answers[index] = answer_figures(text.task, text.answer, counts)
    return [answers[index] for index in range(len(texts))]


@torch.no_grad()
def rounds_of(draft, texts: list[KnownText], tree: str) -> list[list[int]]:
    """Drafted tokens that each round of each text accepts, with all texts in one batch.

    Args:
        draft (`PrismDraftModel`): bound; its other settings of generation count as in decoding.
        texts (`list[KnownText]`), tree (`str`): see [`follow_texts`].
    """
    settings = _settings(draft, tree)
    drafter = draft.make_drafter()
    drafter.use_text_tokens(settings.text_tokens)
    rows = [_Row(text, draft.config.target_layer_ids) for text in texts]
    drafter.prefill(*_prompts(rows))
    active = rows
    while True:
        going = [place for place, row in enumerate(active) if row.left]
        if not going:
            return [row.accepted for row in rows]
        if len(going) < len(active):
            drafter.keep_sequences(going)
            active = [active[place] for place in going]
        lengths = _path_lengths(drafter, active, settings)
        starts = [row.num_read for row in active]
        for row, length in zip(active, lengths, strict=True):
            row.accept(length)
        drafter.prefill(*_rounds(active, starts))


def _settings(draft, tree: str) -> TreeSettings:
    """As a generate() call would find them."""
    call = GenerationConfig(**tree_settings(tree))
    return TreeSettings.resolve(call, draft.generation_config, num_draft_tokens=draft.config.num_draft_tokens)


def _path_lengths(drafter, rows: list["_Row"], settings: TreeSettings) -> list[int]:
    """For each row, how many drafted tokens of its tree match its text. Near the end of a text the tree is shallower."""
    of_rows = [settings.clipped(row.room, settings.num_nodes) for row in rows]
    depth = max(one.depth for one in of_rows)
    lengths = [0] * len(rows)
    if depth == 0:
        return lengths
    # What is drawn at a depth does not depend on the tree's final depth.
    steps = drafter.draw(settings.top_k, depth).steps
    for chosen in {one.depth: one for one in of_rows if one.depth}.values():
        places = [place for place, one in enumerate(of_rows) if one.depth == chosen.depth]
        pool = CandidatePool([tuple(part[places] for part in step) for step in steps[: chosen.depth]])
        tree = select_nodes(drafter.root_ids[places], pool, chosen.num_nodes)
        for place, token_ids, parents in zip(places, tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
            lengths[place] = len(path_of(token_ids, parents, rows[place].left))
    return lengths


class _Row:
    """How far a text was followed.

    Args:
        text (`KnownText`): of T tokens in all.
        layer_ids (`list[int]`): whose states the draft reads.
    """

    def __init__(self, text: KnownText, layer_ids: list[int]):
        self.token_ids = text.token_ids[0].tolist()
        self.states = text.states_of(layer_ids)[0]  # [T - 1, L * target_hidden_size]
        self.most = text.prompt.shape[1] + text.max_new_tokens
        self.num_read = text.prompt.shape[1]  # positions that the draft has read; the next token is the root
        self.accepted: list[int] = []

    @property
    def left(self) -> list[int]:
        """Tokens after the root."""
        return self.token_ids[self.num_read + 1 :]

    @property
    def room(self) -> int:
        """Largest depth that a tree may have: one more token is always written."""
        return self.most - self.num_read - 2

    def accept(self, num_drafted: int) -> None:
        """Move on past these drafted tokens, and past the target's own token if the text continues."""
        num_committed = min(num_drafted + 1, len(self.left))
        self.accepted.append(num_committed - 1)
        self.num_read += num_committed


def _prompts(rows: list[_Row]) -> tuple:
    """Arguments of `Drafter.prefill` for prompts, the shorter ones padded on the left."""
    longest = max(row.num_read for row in rows)
    padding = [longest - row.num_read for row in rows]
    parts = [
        (blank, row.token_ids[1 : row.num_read + 1], row.states[: row.num_read])
        for row, blank in zip(rows, padding, strict=True)
    ]
    token_ids = torch.tensor([[0] * blank + tokens for blank, tokens, _ in parts])
    states = torch.stack([pad(of_row, (0, 0, blank, 0)) for blank, _, of_row in parts])
    position_ids = (torch.arange(longest)[None] - torch.tensor(padding)[:, None]).clamp(min=0)
    mask = torch.arange(longest)[None] >= torch.tensor(padding)[:, None]
    return token_ids, states, position_ids, [longest] * len(rows), mask if any(padding) else None


def _rounds(rows: list[_Row], starts: list[int]) -> tuple:
    """Arguments of `Drafter.prefill` for what a round committed, from these positions on; padded on the right."""
    num_new = [row.num_read - start for row, start in zip(rows, starts, strict=True)]
    longest = max(num_new)
    parts = [
        (longest - count, row.token_ids[start + 1 : start + 1 + count], row.states[start : start + count])
        for row, start, count in zip(rows, starts, num_new, strict=True)
    ]
    token_ids = torch.tensor([tokens + [0] * blank for blank, tokens, _ in parts])
    states = torch.stack([pad(of_row, (0, 0, 0, blank)) for blank, _, of_row in parts])
    return token_ids, states, torch.tensor(starts)[:, None] + torch.arange(longest)[None], num_new


def path_of(token_ids: list[int], parents: list[int], continuation: list[int], root: int = 0) -> list[int]:
    """The path of nodes below the root whose tokens match the beginning of a continuation; of equal siblings the first counts.

    Args:
        token_ids, parents: of each node; where the root is one of them it is its own parent, else `root` is -1.
    """
    nodes = reversed(list(enumerate(zip(parents, token_ids, strict=True))))
    children = {(parent, token): node for node, (parent, token) in nodes if node != parent}
    path, node = [], root
    for token in continuation:
        if (node, token) not in children:
            break
        node = children[node, token]
        path.append(node)
    return path


__all__ = ["KnownText", "follow_texts", "keep_texts", "path_of", "rounds_of", "write_texts"]
