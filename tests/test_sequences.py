"""The walk through a verified tree."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from transformers_prism.decoding.sequences import OutputRows, walk
from transformers_prism.decoding.tree import Tree

pytestmark = pytest.mark.quick
V = 11


def output_rows(num_rows=1, max_length=30, eos=None, processors=(), **settings) -> OutputRows:
    """Rows with a prompt of three tokens."""
    config = GenerationConfig(max_length=max_length, **settings)
    config._pad_token_tensor = torch.tensor(0)
    criteria = [MaxLengthCriteria(max_length)]
    if eos is not None:
        criteria.append(EosTokenCriteria(eos))
    input_ids = torch.tensor([[3, 4, 5]]).repeat(num_rows, 1)
    return OutputRows(input_ids, LogitsProcessorList(processors), StoppingCriteriaList(criteria), config)


def a_tree() -> Tree:
    """1 and 2 below the root, with tokens 6 and 7; 3 below 1 with token 8; 4 below 3 with token 9."""
    token_ids, parents, depths = [5, 6, 7, 8, 9], [0, 0, 0, 1, 3], [0, 1, 1, 2, 3]
    return Tree(*(torch.tensor([part]) for part in (token_ids, parents, depths)), torch.zeros(1, 5))


def logits_choosing(tokens) -> torch.Tensor:
    """Logits `(N, V)` whose argmax at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float() * 20


class OwnCriteria(MaxLengthCriteria):
    """Not a stock one."""


def test_criteria_are_asked_where_they_may_have_a_say():
    """Others than stock ones always; stock ones at their tokens, at the shortest length, and where they warn."""
    config = GenerationConfig(max_length=30)
    config._pad_token_tensor = torch.tensor(0)

    def emit(tokens, *criteria):
        rows = OutputRows(torch.tensor([[3, 4, 5]]), LogitsProcessorList(), StoppingCriteriaList(criteria), config)
        asked = []
        rows.stopping_criteria = lambda ids, scores: asked.append(ids.shape[1]) or StoppingCriteriaList(criteria)(ids, scores)
        for token in tokens:
            rows.append(0, token)
        return asked, rows.end_lengths[0]

    assert emit([1, 2, 9, 1], MaxLengthCriteria(30), EosTokenCriteria([8, 9])) == ([6], 6)
    assert emit([1, 2, 6, 1], MaxLengthCriteria(30), EosTokenCriteria([8, 9])) == ([], None)
    assert emit([1, 2, 6, 1], MaxLengthCriteria(30), MaxLengthCriteria(5)) == ([5], 5)
    assert emit([1, 2, 6], MaxLengthCriteria(30), OwnCriteria(30)) == ([4, 5, 6], None)
    assert emit([1, 2, 6], MaxLengthCriteria(30, max_position_embeddings=5)) == ([5, 6], None)


@pytest.mark.parametrize(
    ("choices", "nodes", "emitted"),
    [
        ([6, 8, 1, 9, 2], [0, 1, 3, 4], [6, 8, 9, 2]),  # all the way, and a bonus at the leaf
        ([6, 8, 1, 1, 2], [0, 1, 3], [6, 8, 1]),
        ([7, 8, 1, 9, 2], [0, 2], [7, 1]),
        ([1, 8, 1, 9, 2], [0], [1]),
    ],
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_walk_follows_the_targets_choices(choices, nodes, emitted, do_sample):
    """Whatever lies off their way."""
    logits = logits_choosing(choices)
    rows = output_rows(do_sample=do_sample)
    assert walk(rows, 0, a_tree(), 0, logits) == nodes
    assert rows.ids[0, 3 : rows.lengths[0]].tolist() == emitted


def test_the_walk_ends_where_the_row_ends():
    """At EOS, and at the length limit; what is emitted counts, what lies deeper does not."""
    logits = logits_choosing([6, 8, 1, 9, 2])
    rows = output_rows(eos=8)
    assert walk(rows, 0, a_tree(), 0, logits) == [0, 1]
    assert rows.is_done(0)
    assert rows.finish().tolist() == [[3, 4, 5, 6, 8]]
    rows = output_rows(max_length=6)
    assert walk(rows, 0, a_tree(), 0, logits) == [0, 1, 3]
    assert rows.is_done(0)


def test_of_twins_either_may_be_taken():
    """Two children with one token: the walk does not stop between them."""
    tree = a_tree()
    tree.token_ids[0, 2] = 6
    assert walk(output_rows(), 0, tree, 0, logits_choosing([6, 8, 8, 9, 2])) == [0, 1, 3, 4]


def test_draws_equal_multinomial_of_the_batch_in_any_order():
    """Rows that come to a step at different times draw what plain decoding draws for all of them at once."""
    logits = torch.randn(6, 3, V, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    plain = [torch.multinomial(step.softmax(-1), 1)[:, 0].tolist() for step in logits]
    state = torch.get_rng_state()
    torch.manual_seed(7)
    rows = output_rows(num_rows=3, max_length=9, do_sample=True)
    for row, steps in ((2, 4), (0, 6), (1, 1), (2, 2), (1, 5)):
        for _ in range(steps):
            rows.append(row, rows.choose(row, logits[rows.lengths[row] - 3, row]))
    assert rows.finish()[:, 3:].T.tolist() == plain
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_freed_once_every_row_has_passed():
    """One noise matrix of the whole vocabulary per step would fill the memory."""
    rows = output_rows(num_rows=2, max_length=40, do_sample=True)
    for row, steps in ((0, 10), (1, 8)):
        for _ in range(steps):
            rows.append(row, rows.choose(row, torch.zeros(V)))
    rows.forget_passed_noise([0, 1])
    for _ in range(500):
        for row in (0, 1):
            rows.noise.of_step(row, rows.lengths[row] - 3, (2, V))
            rows.lengths[row] += 1
        rows.max_length += 1
        rows.forget_passed_noise([0, 1])
    assert len(rows.noise.buffer) < 20


def test_processors_see_each_row_in_its_own_place():
    """A processor with one entry per row of the batch is shown the whole batch."""
    seen = []

    class Recorder(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            seen.append((tuple(input_ids.shape), tuple(scores.shape)))
            return scores

    rows = output_rows(num_rows=2, processors=[Recorder(1.0)])
    rows.append(1, rows.choose(1, torch.zeros(V)))
    rows.choose(1, torch.zeros(V))
    assert seen == [((2, 3), (2, V)), ((2, 4), (2, V))]


def test_nan_is_refused_only_where_the_walk_comes():
    """A node that is never reached may hold anything."""
    logits = logits_choosing([6, 1, 1, 1, 1])
    logits[4] = torch.nan
    rows = output_rows()
    assert walk(rows, 0, a_tree(), 0, logits) == [0, 1]
    logits[0] = torch.nan
    for do_sample in (False, True):
        rows = output_rows(do_sample=do_sample)
        with pytest.raises(ValueError, match="got NaN for token 3 of row 0"):
            walk(rows, 0, a_tree(), 0, logits)
