"""Sequences, the sampler that continues them, and the walk through a verified tree."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

from transformers_prism.decoding import sequences as sequences_module
from transformers_prism.decoding.sampler import Sampler
from transformers_prism.decoding.sequences import Sequences
from transformers_prism.decoding.tree import Tree
from transformers_prism.decoding.walk import walk_on_device, walk_on_host

pytestmark = pytest.mark.quick
V = 11


def started(num_rows=1, max_length=30, eos=None, processors=(), **settings) -> tuple[Sequences, Sampler]:
    """Sequences with a prompt of three tokens."""
    config = GenerationConfig(max_length=max_length, **settings)
    config._pad_token_tensor = torch.tensor(0)
    criteria = [MaxLengthCriteria(max_length)]
    if eos is not None:
        criteria.append(EosTokenCriteria(eos))
    input_ids = torch.tensor([[3, 4, 5]]).repeat(num_rows, 1)
    criteria = StoppingCriteriaList(criteria)
    sampler = Sampler(input_ids, LogitsProcessorList(processors), criteria, config)
    return sampler.new_sequences(input_ids, criteria, config), sampler


def a_tree() -> Tree:
    """1 and 2 below the root, with tokens 6 and 7; 3 below 1 with token 8; 4 below 3 with token 9."""
    token_ids, parents, depths = [5, 6, 7, 8, 9], [0, 0, 0, 1, 3], [0, 1, 1, 2, 3]
    return Tree(*(torch.tensor([part]) for part in (token_ids, parents, depths)), torch.zeros(1, 5))


def logits_choosing(tokens) -> torch.Tensor:
    """Logits `(N, V)` whose argmax at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float() * 20


def test_room_for_padding_grows(monkeypatch):
    """Chains of recurrent targets read padding behind sequences that ended long ago, up to where the longest is."""
    monkeypatch.setattr(sequences_module, "_FIRST_ROOM", 2)
    sequences, _ = started(2, max_length=50, eos=9)
    sequences.pad_token_id = torch.tensor(7)
    sequences.append(0, 9)
    sequences.pad_ended(20)
    assert sequences.ids[0, :20].tolist() == [3, 4, 5, 9] + [7] * 16


class OwnCriteria(MaxLengthCriteria):
    """Not a stock one."""


def test_criteria_are_asked_where_they_may_have_a_say():
    """Others than stock ones always; stock ones at their tokens, at the shortest length, and where they warn."""
    config = GenerationConfig(max_length=30)
    config._pad_token_tensor = torch.tensor(0)

    def emit(tokens, *criteria):
        sequences = Sequences(torch.tensor([[3, 4, 5]]), StoppingCriteriaList(criteria), config)
        stopping, asked = sequences.stopping, []
        stopping.criteria = lambda ids, scores: asked.append(ids.shape[1]) or StoppingCriteriaList(criteria)(ids, scores)
        for token in tokens:
            sequences.append(0, token)
        return asked, sequences.end_lengths[0]

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
    sequences, sampler = started(do_sample=do_sample)
    assert walk_on_host(sequences, sampler, 0, a_tree(), 0, logits) == nodes
    assert sequences.ids[0, 3 : sequences.lengths[0]].tolist() == emitted


def test_the_walk_ends_where_the_row_ends():
    """At EOS, and at the length limit; what is emitted counts, what lies deeper does not."""
    logits = logits_choosing([6, 8, 1, 9, 2])
    sequences, sampler = started(eos=8)
    assert walk_on_host(sequences, sampler, 0, a_tree(), 0, logits) == [0, 1]
    assert sequences.is_done(0)
    assert sequences.finished().tolist() == [[3, 4, 5, 6, 8]]
    sequences, sampler = started(max_length=6)
    assert walk_on_host(sequences, sampler, 0, a_tree(), 0, logits) == [0, 1, 3]
    assert sequences.is_done(0)


def test_the_walk_ends_where_the_target_verified_no_further():
    """A chain of which only the first nodes have logits: what is drafted behind them is not taken."""
    logits = logits_choosing([6, 8, 1, 9, 2])[:2]
    sequences, sampler = started()
    assert walk_on_host(sequences, sampler, 0, a_tree(), 0, logits) == [0, 1]
    sequences, sampler = started()
    assert walk_on_device(sequences, sampler, a_tree(), logits[None], depth=3) == [[0, 1]]
    assert sequences.ids[0, 3:5].tolist() == [6, 8]


def test_of_twins_either_may_be_taken():
    """Two children with one token: the walk does not stop between them."""
    tree = a_tree()
    tree.token_ids[0, 2] = 6
    assert walk_on_host(*started(), 0, tree, 0, logits_choosing([6, 8, 8, 9, 2])) == [0, 1, 3, 4]


def test_draws_equal_multinomial_of_the_batch_in_any_order():
    """Rows that come to a step at different times draw what plain decoding draws for all of them at once."""
    logits = torch.randn(6, 3, V, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(7)
    plain = [torch.multinomial(step.softmax(-1), 1)[:, 0].tolist() for step in logits]
    state = torch.get_rng_state()
    torch.manual_seed(7)
    sequences, sampler = started(num_rows=3, max_length=9, do_sample=True)
    for row, steps in ((2, 4), (0, 6), (1, 1), (2, 2), (1, 5)):
        for _ in range(steps):
            sequences.append(row, sampler.choose(sequences, row, logits[sequences.num_new(row), row]))
    assert sequences.finished()[:, 3:].T.tolist() == plain
    sampler.finish(6)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_freed_once_every_row_has_passed():
    """One noise matrix of the whole vocabulary per step would fill the memory."""
    sequences, sampler = started(num_rows=2, max_length=40, do_sample=True)
    for row, steps in ((0, 10), (1, 8)):
        for _ in range(steps):
            sequences.append(row, sampler.choose(sequences, row, torch.zeros(V)))
    sampler.forget_passed_noise(sequences)
    for _ in range(500):
        for row in (0, 1):
            sampler.noise.of_step(row, sequences.num_new(row), (2, V))
            sequences.lengths[row] += 1
        sequences.max_length += 1
        sampler.forget_passed_noise(sequences)
    assert len(sampler.noise.buffer) < 20


def test_processors_see_each_row_in_its_own_place():
    """A processor with one entry per row of the batch is shown the whole batch."""
    seen = []

    class Recorder(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            seen.append((tuple(input_ids.shape), tuple(scores.shape)))
            return scores

    sequences, sampler = started(num_rows=2, processors=[Recorder(1.0)])
    sequences.append(1, sampler.choose(sequences, 1, torch.zeros(V)))
    sampler.choose(sequences, 1, torch.zeros(V))
    assert seen == [((2, 3), (2, V)), ((2, 4), (2, V))]


def test_kept_scores_are_those_of_one_row():
    """A view would keep the scores of the whole batch for every token of each row."""

    class Stateful(TemperatureLogitsWarper):
        pass

    for processors in ([Stateful(2.0)], [RepetitionPenaltyLogitsProcessor(1.5)]):
        sequences, sampler = started(num_rows=4, processors=processors)
        sampler.scores = [[] for _ in range(4)]
        sampler.choose(sequences, 1, torch.zeros(V))
        assert sampler.scores[1][0].untyped_storage().nbytes() < 2 * 4 * V


def test_processors_of_rows_get_a_row():
    sequences, sampler = started(num_rows=4, processors=[MinLengthLogitsProcessor(9, 1), RepetitionPenaltyLogitsProcessor(1.5)])
    logits, ids = torch.linspace(-1, 1, V), sequences.ids[1:2, : sequences.lengths[1]]
    found = sampler._process(sequences, 1, logits[None])
    expected = sampler.logits_processor(ids.repeat(4, 1), logits.repeat(4, 1))[1:2]
    assert torch.equal(found, expected)


def test_nan_is_refused_only_where_the_walk_comes():
    """A node that is never reached may hold anything."""
    logits = logits_choosing([6, 1, 1, 1, 1])
    logits[4] = torch.nan
    assert walk_on_host(*started(), 0, a_tree(), 0, logits) == [0, 1]
    logits[0] = torch.nan
    for do_sample in (False, True):
        with pytest.raises(ValueError, match="got NaN for token 3 of row 0"):
            walk_on_host(*started(do_sample=do_sample), 0, a_tree(), 0, logits)


def test_sequences_at_the_end_take_the_places_of_those_that_leave():
    """So that no others have to be moved; where none is left, or none has ended, all stay."""
    sequences, _ = started(num_rows=4, eos=9)
    assert sequences.places_to_keep() == [0, 1, 2, 3]
    for index in (0, 2):
        sequences.append(index, 9)
    assert sequences.places_to_keep() == [3, 1]
    sequences.keep_sequences([3, 1])
    assert sequences.active == [3, 1]
    assert sequences.places_to_keep() == [0, 1]
    for index in (1, 3):
        sequences.append(index, 9)
    assert sequences.places_to_keep() == [0, 1]
    assert sequences.are_done
