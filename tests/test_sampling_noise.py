"""A draft that sees the random numbers of sampling: it guesses better, and what is emitted does not change."""

import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from tiny_models import PAD_ID, generate_twice, prompts, scripted_draft, tiny_draft, tiny_target, varied_target
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from transformers_prism.decoding import drafter as drafting
from transformers_prism.decoding import sampler as sampler_module
from transformers_prism.decoding.sampler import Sampler, treating_cpus_as_accelerators
from transformers_prism.decoding.sampling_noise import MAX_NOISE_BYTES, StepNoise
from transformers_prism.decoding.sequences import Sequences
from transformers_prism.modeling_prism import PrismDraftModel

VOCABULARY = 50
NUM_STEPS = 40


class Impatient(StoppingCriteria):
    """A criterion of a user's own."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def started(num_rows: int, processors=(), criteria=(), is_coupled: bool = True) -> tuple[Sequences, Sampler]:
    config = GenerationConfig(do_sample=True, max_length=100)
    config._pad_token_tensor = torch.tensor(PAD_ID)
    criteria = StoppingCriteriaList([MaxLengthCriteria(100), *criteria])
    input_ids = torch.zeros((num_rows, 3), dtype=torch.long)
    sampler = Sampler(input_ids, LogitsProcessorList(processors), criteria, config, is_coupled)
    return sampler.new_sequences(input_ids, criteria, config), sampler


WARPERS = {
    "none": [],
    "all": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.9)],
    "hot": [TemperatureLogitsWarper(1.8), MinPLogitsWarper(0.05)],
}


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("warpers", WARPERS)
def test_a_draft_that_knows_the_distribution_knows_the_token(num_rows, warpers):
    """With the target's own log-probabilities the first proposal is what will be chosen, at every depth and in every row."""
    torch.manual_seed(3)
    sequences, sampler = started(num_rows, WARPERS[warpers])
    logits = 2 * torch.randn(NUM_STEPS, num_rows, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for row in range(num_rows):
        sequences.append(row, sampler.choose(sequences, row, logits[0, row]))
    # Rows are not equally far.
    for row in range(1, num_rows):
        for step in range(1, 1 + row):
            sequences.append(row, sampler.choose(sequences, row, logits[step, row]))
    num_chosen = 0
    while sequences.lengths[0] - 3 < NUM_STEPS - 10:
        coupling = sampler.coupling(sequences, 4)
        starts = [length - 3 for length in sequences.lengths]
        for depth in range(4):
            log_probs, token_ids = (
                torch.stack([torch.log_softmax(logits[start + depth, row], -1) for row, start in enumerate(starts)])
                .sort(-1, descending=True)
            )
            found, chances = coupling.likeliest(depth, token_ids[:, None], log_probs[:, None], 3)
            assert (chances.diff(dim=-1) <= 0).all()
            assert (chances.exp().sum(-1) <= 1 + 1e-6).all()
            for row in range(num_rows):
                token = sampler.choose(sequences, row, logits[starts[row] + depth, row])
                assert int(found[row, 0, 0]) == token
                sequences.append(row, token)
                num_chosen += token != int(token_ids[row, 0])
        sampler.forget_passed_noise(sequences)
    assert num_chosen > 10, "expected draws that the distribution alone does not tell"


def test_log_probabilities_of_nan_are_numbers_again():
    """A draft's NaN, which is minus infinity in all its proposals, does not spread to its choice of nodes."""
    sequences, sampler = started(1, WARPERS["all"])
    sequences.append(0, sampler.choose(sequences, 0, torch.randn(VOCABULARY)))
    nothing = torch.full((1, 2, VOCABULARY), -torch.inf)
    token_ids = torch.arange(VOCABULARY).expand(1, 2, -1)
    tokens, chances = sampler.coupling(sequences, 1).likeliest(0, token_ids, nothing, 5)
    assert chances.isfinite().all()
    assert all(len(set(row)) == 5 for row in tokens[0].tolist())


@pytest.fixture
def even_pair(monkeypatch):
    """A target to which all tokens are equal, and a draft that knows it but not which one will be drawn."""
    target = tiny_target("llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        target.get_output_embeddings().weight.zero_()

    def propose(self, hidden_states, top_k, text=None):
        shape = (*hidden_states.shape[:-1], top_k)
        token_ids = torch.arange(VOCABULARY - top_k, VOCABULARY).expand(shape)
        return token_ids, torch.full(shape, 1 / VOCABULARY).log()

    monkeypatch.setattr(PrismDraftModel, "propose", propose)
    return target, tiny_draft(target)


@pytest.mark.quick
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("tree", ["chain", "static"])
def test_text_is_the_same_and_more_of_it_is_foreseen(even_pair, tree, num_rows):
    """With equal seeds: plain sampling's tokens and generator, coupled or not; coupled, every draft is accepted."""
    target, draft = even_pair
    input_ids, mask = prompts(num_rows)
    input_ids = input_ids % VOCABULARY
    arguments = {"do_sample": True, "max_new_tokens": 33, "pad_token_id": PAD_ID}
    lengths = {}
    for is_coupled in (False, True):
        draft.generation_config.update(tree=tree, tree_coupled=is_coupled)
        plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, seed=5, **arguments)
        assert torch.equal(plain, speculative)
        assert same_state
        lengths[is_coupled] = draft.last_speculation.acceptance_length
    assert lengths[False] < 1.5
    assert lengths[True] > 4


def test_planned_and_automatic_trees_see_them_too(even_pair, cheap_rounds):
    """Trees of the round's own choice, as on a CPU and as on an accelerator."""
    target, draft = even_pair
    input_ids = prompts(1)[0] % VOCABULARY
    arguments = {"do_sample": True, "max_new_tokens": 80, "pad_token_id": PAD_ID}
    draft.generation_config.update(tree="auto", tree_ngrams=False)
    for treat in (nullcontext, treating_cpus_as_accelerators):
        for _ in range(3):
            with treat():
                plain, speculative, same_state = generate_twice(target, draft, input_ids, None, seed=5, **arguments)
            assert torch.equal(plain, speculative)
            assert same_state
        assert draft.last_speculation.acceptance_length > 2.5


def test_what_might_draw_in_between_is_not_overtaken():
    """Nothing is drawn ahead where a processor or criterion is not transformers' own stock, nor where it is not wanted."""
    sequences, sampler = started(1)
    assert sampler.coupling(sequences, 0) is None
    for processors, criteria, is_coupled in (
        ([RepetitionPenaltyLogitsProcessor(1.3)], (), True),
        ([], [Impatient()], True),
        ([], (), False),
    ):
        sequences, sampler = started(1, processors, criteria, is_coupled)
        sequences.append(0, sampler.choose(sequences, 0, torch.randn(VOCABULARY)))
        assert sampler.noise is None
        assert sampler.coupling(sequences, 4) is None


@pytest.mark.parametrize(("num_competing", "expected"), [(64, 20), (16, 16), (2, 3)])
def test_draft_tokens_compete_beyond_the_proposals(even_pair, monkeypatch, num_competing, expected):
    """As many as `NUM_COMPETING`, or all that a draft can propose; no fewer than it shall propose."""
    target, _ = even_pair
    monkeypatch.setattr(drafting, "NUM_COMPETING", num_competing)
    asked, propose = set(), PrismDraftModel.propose
    monkeypatch.setattr(
        PrismDraftModel, "propose", lambda self, states, top_k, *text: asked.add(top_k) or propose(self, states, top_k, *text)
    )
    draft = tiny_draft(target, draft_vocab_size=20)
    draft.generation_config.update(tree="static")
    plain, speculative, same_state = generate_twice(
        target, draft, prompts(1)[0] % VOCABULARY, None, seed=1, do_sample=True, max_new_tokens=12, pad_token_id=PAD_ID
    )
    assert torch.equal(plain, speculative)
    assert same_state
    assert asked == {expected}


@pytest.mark.quick
@pytest.mark.parametrize("max_bytes", [0, 7 * 4 * 4 * VOCABULARY, MAX_NOISE_BYTES])
def test_noise_is_what_was_drawn_however_far_rows_are_apart(max_bytes):
    """One row far ahead, one far behind, two in between that meet; one ends; a window of no more than it may take."""
    shape, generator = (4, VOCABULARY), random.Random(0)
    torch.manual_seed(3)
    drawn = [torch.empty(shape).exponential_(1) for _ in range(400)]
    end_state = torch.get_rng_state()
    torch.manual_seed(3)
    noise, steps = StepNoise(torch.device("cpu"), max_bytes), [0, 0, 0, 0]
    rates, num_draws = [9, 1, 4, 3], []
    original = noise._draw
    noise._draw = lambda *args: num_draws.append(1) or original(*args)
    while steps[0] < 380:
        going = [row for row in range(4) if row != 2 or steps[2] < 100]
        ends = {row: steps[row] + 6 for row in going}
        held = noise.fill(ends, shape)
        for row in going:
            for step in range(steps[row], ends[row]):
                assert torch.equal(held[step - noise.starts[row], row], drawn[step][row])
                assert torch.equal(noise.of_step(row, step, shape), drawn[step][row])
            steps[row] += generator.randint(1, rates[row])
            if row == 3:
                steps[3] = max(steps[3], steps[1])
        noise.forget_before([step if row in going else None for row, step in enumerate(steps)])
        assert held.numel() * 4 <= max(max_bytes, 6 * 4 * 4 * VOCABULARY)
    assert min(noise.states) == min(steps[1], steps[3])
    assert (len(num_draws) > noise.num_drawn) == (max_bytes < MAX_NOISE_BYTES), "expected draws that are made again"
    while noise.num_drawn < 400:
        noise.of_step(0, noise.num_drawn, shape)
    noise.rewind_to(400)
    assert torch.equal(torch.get_rng_state(), end_state)
    torch.manual_seed(3)
    for _ in range(370):
        torch.empty(shape).exponential_(1)
    expected = torch.get_rng_state()
    noise.rewind_to(370)
    assert torch.equal(torch.get_rng_state(), expected), "others have drawn since"
    torch.set_rng_state(end_state)
    torch.rand(1)
    drawn_since = torch.get_rng_state()
    noise.rewind_to(370)
    assert torch.equal(torch.get_rng_state(), drawn_since)
    torch.set_rng_state(end_state)
    noise.rewind_to(370)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("walk", "is_coupled", "settings"),
    [
        *[("host", False, {}), ("host", True, {}), ("host", True, {"repetition_penalty": 1.2})],
        *[("device", False, {}), ("device", True, {})],
    ],
)
def test_rows_far_apart_are_plain_samplings_with_a_small_buffer(walk, is_coupled, settings, monkeypatch):
    """A row whose tokens are all foreseen beside rows that draft nothing right; text and generator stay plain's."""
    input_ids = prompts(1)[0].repeat(3, 1)
    input_ids[:, 3] += torch.arange(3)
    arguments = {"do_sample": True, "max_new_tokens": 90, "pad_token_id": PAD_ID, **settings}
    target = varied_target("llama", input_ids, max_new_tokens=90, pad_token_id=PAD_ID)
    torch.manual_seed(5)
    plain = target.generate(input_ids, **arguments)
    lead, windows = [], []
    make_room = StepNoise._make_room
    monkeypatch.setattr(
        StepNoise, "_make_room", lambda noise, *args: make_room(noise, *args) or windows.append(len(noise.buffer))
    )
    forget = Sampler.forget_passed_noise
    monkeypatch.setattr(
        Sampler,
        "forget_passed_noise",
        lambda sampler, all: lead.append(max(all.lengths) - min(all.lengths)) or forget(sampler, all),
    )
    monkeypatch.setattr(sampler_module, "StepNoise", partial(StepNoise, max_bytes=0))
    draft = scripted_draft(target, plain, input_ids.shape[1], tree_coupled=is_coupled)
    for row in (1, 2):
        draft.script[row] = [(token + 1) % 97 for token in draft.script[row]]
    draft.is_strict = False
    torch.manual_seed(5)
    with treating_cpus_as_accelerators() if walk == "device" else nullcontext():
        output = target.generate(input_ids, assistant_model=draft, **arguments)
    state = torch.get_rng_state()
    assert torch.equal(output, plain)
    torch.manual_seed(5)
    target.generate(input_ids, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert draft.last_speculation.walk == walk
    assert max(lead) > 30
    assert max(windows) <= 5
