"""`tree="auto"`: what it chooses, what it learns, and that it costs little where it cannot help."""

import random

import pytest
import torch
from tiny_models import PAD_ID, observer, prompts, scripted_draft, tiny_draft, varied_target
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from transformers_prism.decoding.round_values import plain_step
from transformers_prism.decoding.sampler import Sampler
from transformers_prism.decoding.sequences import Sequences
from transformers_prism.policy.automatic import AutomaticTrees
from transformers_prism.policy.candidates import Candidates
from transformers_prism.policy.experience import AcceptanceTable
from transformers_prism.policy.planners import Lesson
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

pytestmark = pytest.mark.quick
LENGTH = {"max_new_tokens": 60, "pad_token_id": PAD_ID}
ARGUMENTS = {**LENGTH, "do_sample": False}


class PerfectDraft:
    """Chances of a scripted draft that is always right."""

    def randint(self, low: int, high: int) -> int:
        """As many true tokens as there may be."""
        return high

    def randrange(self, end: int) -> int:
        """The same wrong token everywhere."""
        return 0

    def shuffle(self, values: list) -> None:
        """True tokens before wrong ones."""

    def choice(self, values: list):
        """Wrong ones below the root."""
        return values[0]


def always_right(monkeypatch, draft) -> None:
    """Let a scripted draft propose the script alone."""
    make_drafter = type(draft).make_drafter

    def perfect(self):
        drafter = make_drafter(self)
        drafter.random = PerfectDraft()
        return drafter

    monkeypatch.setattr(type(draft), "make_drafter", perfect)


def run(cheap_rounds, monkeypatch=None, num_rows: int = 1, **settings):
    """Statistics of a call with a scripted draft under fixed costs."""
    input_ids, mask = prompts(num_rows)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    draft = scripted_draft(target, plain, input_ids.shape[1], **{"tree": "auto", "tree_ngrams": False, **settings})
    if monkeypatch is not None:
        always_right(monkeypatch, draft)
    for _ in range(3):
        assert torch.equal(target.generate(input_ids, attention_mask=mask, assistant_model=draft, **ARGUMENTS), plain)
    return draft.last_speculation


def test_auto_a_draft_that_is_always_right_gets_deep_trees(cheap_rounds, monkeypatch):
    """After a few calls rounds commit nearly as many tokens as the largest tree allows."""
    speculation = run(cheap_rounds, monkeypatch, tree_depth=6)
    assert speculation.acceptance_length > 5
    assert speculation.estimates["advantage"] > 2


def test_auto_a_useless_draft_is_left_alone(cheap_rounds):
    """A random draft is tried a few times, then seldom, and most rounds are plain steps."""
    input_ids, mask = prompts(1)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto", tree_ngrams=False)
    cheap_rounds.step_seconds = 0.2  # at 0.02, the luck of one token in 97 would nearly pay
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    tried = []
    for _ in range(6):
        assert torch.equal(target.generate(input_ids, attention_mask=mask, assistant_model=draft, **ARGUMENTS), plain)
        tried.append(sum(tree.num_steps > 0 for tree in draft.last_speculation.trees))
    assert 1 <= tried[0] <= 25  # of some sixty rounds; luck can make a few of them pay
    assert tried[1] <= 2
    assert 1 <= sum(tried[2:]) <= 30


def test_auto_batches_of_another_size_are_judged_anew(cheap_rounds):
    """What did not pay for one row may pay for three, and the other way round."""
    input_ids, mask = prompts(3)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto", tree_ngrams=False)
    cheap_rounds.step_seconds = 0.2
    for rows in (slice(0, 1), slice(0, 3)):
        target.generate(input_ids[rows], attention_mask=mask[rows], assistant_model=draft, **ARGUMENTS)
        assert draft.last_speculation.trees[0].num_steps > 0


def batch_trees(lengths: list[int], ends=(), **settings) -> tuple[AutomaticTrees, Sequences]:
    """Trees for sequences of these lengths, of which some have ended, before their first round."""
    target = varied_target("llama", *prompts(1), **LENGTH)
    config = GenerationConfig(max_length=1000, do_sample=False)
    config._pad_token_tensor = torch.tensor(PAD_ID)
    input_ids = torch.zeros((len(lengths), 4), dtype=torch.long)
    sampler = Sampler(input_ids, LogitsProcessorList(), StoppingCriteriaList(), config)
    sequences = sampler.new_sequences(input_ids, StoppingCriteriaList(), config)
    sequences.lengths, sequences.new_tokens = lengths, [[3]] * len(lengths)
    sequences.is_done = lambda index: index in ends
    settings = TreeSettings(**{"tree": "auto", "top_k": 4, "depth": 4, "num_nodes": 15, **settings})
    return AutomaticTrees(settings, target, tiny_draft(target), sequences, sampler), sequences


def observe(trees: AutomaticTrees, sequences: Sequences, expected: float, kept: list[list[int]]) -> None:
    """A round of one draft step, from which this many tokens were expected."""
    outlook = trees.begin_round(sequences)
    lesson = Lesson(outlook.weights, 0.0, [], [])
    seconds = trees.known.costs.verify(len(kept))
    trees.observe_payoff(plain_step(sequences.last_tokens(), num_steps=1, expected_tokens=expected, lesson=lesson), kept, seconds)


def test_auto_tokens_count_less_in_sequences_that_are_ahead(cheap_rounds):
    """Half after a few tokens, not at all in those that have ended, and in one sequence as in several that are even."""
    trees, sequences = batch_trees([20, 24, 9, 20], ends=(2,))
    assert trees.begin_round(sequences).weights == pytest.approx([1.2, 0.6, 0.0, 1.2])
    sequences.active = [1]
    assert trees.begin_round(sequences).weights == [1.0]
    sequences.active = [2]
    assert trees.begin_round(sequences).weights == [0.0]


def test_auto_sequences_that_gain_do_not_hide_one_that_gains_nothing(cheap_rounds):
    """Two of three commit three tokens a round at the cost of 1.3 plain steps: once they are ahead, drafting stops."""
    cheap_rounds.step_seconds = 0.3
    trees, sequences = batch_trees(lengths := [9, 9, 9])
    for _ in range(40):
        weights = trees.begin_round(sequences).weights
        if not trees.payoff.is_draft_due():
            break
        observe(trees, sequences, 3 + 2 * sum(weights[::2]), [[0, 1, 2], [0], [0, 1, 2]])
        for index in (0, 2):
            lengths[index] += 3
        lengths[1] += 1
    assert lengths[0] - lengths[1] >= 4
    assert trees.payoff.recent.advantage < 1.1
    # The same rounds pay where no sequence lags behind.
    trees, sequences = batch_trees([9, 9, 9])
    for _ in range(40):
        observe(trees, sequences, 9.0, [[0, 1, 2]] * 3)
    assert trees.payoff.recent.advantage > 2


def test_auto_few_sequences_that_are_left_are_judged_anew(cheap_rounds):
    """Drafting that did not pay for five sequences is tried at once for two."""
    cheap_rounds.step_seconds = 0.5
    trees, sequences = batch_trees([9] * 5)
    trees.begin_round(sequences)
    for _ in range(20):
        if trees.payoff.is_draft_due():
            observe(trees, sequences, 5.0, [[0]] * 5)
    assert not trees.payoff.is_draft_due()
    sequences.active = [0, 3]
    trees.begin_round(sequences)
    assert trees.payoff.is_draft_due()


def test_auto_a_useless_draft_is_tried_seldom_in_a_batch(cheap_rounds):
    """By a handful of rounds in some hundred; all others are plain steps of one forward each, which move no keys."""
    length = {"max_new_tokens": 110, "pad_token_id": PAD_ID}
    input_ids, mask = prompts(3)
    target = varied_target("llama", input_ids, mask, **length)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto", tree_ngrams=False)
    cheap_rounds.step_seconds = 0.2
    plain = target.generate(input_ids, attention_mask=mask, do_sample=False, **length)
    forwards = []
    hook = target.register_forward_hook(observer(lambda module, arguments, output: forwards.append(output.logits.shape[1])))
    output = target.generate(input_ids, attention_mask=mask, do_sample=False, assistant_model=draft, **length)
    hook.remove()
    assert torch.equal(output, plain)
    trees = draft.last_speculation.trees
    assert 1 <= sum(tree.num_steps > 0 for tree in trees) <= 8
    assert len(trees) > 90
    assert forwards[1:] == [1 + tree.num_nodes for tree in trees]


def test_auto_expensive_verification_leads_to_plain_decoding(cheap_rounds):
    """If every further token costs a whole plain step, no node can pay unless it is certain."""
    cheap_rounds.verify_seconds[1] = 64.0
    speculation = run(cheap_rounds)
    assert sum(tree.num_nodes for tree in speculation.trees) <= len(speculation.trees) // 4


def test_auto_copies_join_where_the_text_repeats(cheap_rounds):
    """A target that loops is followed by copying alone, even past a draft that knows nothing."""
    input_ids, mask = prompts(1)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto")
    input_ids = target.generate(input_ids, attention_mask=mask, **{**ARGUMENTS, "max_new_tokens": 40})
    text = torch.cat((input_ids, input_ids, input_ids), dim=1)
    plain = target.generate(text, **ARGUMENTS)
    assert torch.equal(target.generate(text, assistant_model=draft, **ARGUMENTS), plain)
    assert any(tree.num_copied for tree in draft.last_speculation.trees)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_auto_chat_goes_on_after_plain_rounds(cheap_rounds, num_rows):
    """What the draft did not read in one call it reads in the next, on the same cache."""
    cheap_rounds.verify_seconds[1] = 64.0
    input_ids, mask = prompts(num_rows)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    draft = tiny_draft(target)
    draft.generation_config.update(tree="auto")
    outputs = []
    for assistant in ({}, {"assistant_model": draft}):
        first = target.generate(input_ids, attention_mask=mask, return_dict_in_generate=True, **ARGUMENTS, **assistant)
        longer = torch.cat((first.sequences, first.sequences[:, 3:6]), dim=1)
        longer_mask = torch.cat((mask, mask.new_ones(num_rows, longer.shape[1] - mask.shape[1])), dim=1)
        if "assistant_model" in assistant:
            cheap_rounds.verify_seconds[1] = 1.1
        outputs.append(
            target.generate(
                longer, attention_mask=longer_mask, **{CACHE_KEYWORD: cache_of(first)}, **ARGUMENTS, **assistant
            )
        )
    assert torch.equal(*outputs)


def test_auto_tables_start_from_the_prior_and_follow_observations():
    """Cells that were not seen keep the prior; old observations fade."""
    table = AcceptanceTable(torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    table.observe([1] * 200 + [-1], [True] * 200 + [False])
    assert table.chances[0] == 0.5
    assert table.rows()[0][1] > 0.95
    for _ in range(100):
        table.observe([1] * 10, [False] * 10)
    assert table.chances[1] < 0.2


def random_candidates(chances: list[float]) -> Candidates:
    """Five draft steps over random parents, as a draft draws them: 4 children of the root, then 16 a step."""
    generator = random.Random(0)
    parents, depths = [-1] * 4, [1] * 4
    for depth in range(2, 6):
        above = [node for node, one in enumerate(depths) if one == depth - 1]
        parents += generator.choices(above, k=16)
        depths += [depth] * 16
    cells = [generator.randrange(len(chances)) for _ in parents]
    tokens = [generator.randrange(97) for _ in parents]
    return Candidates.drafted(tokens, parents, depths, [-1.0] * len(cells), cells, chances)


def check_path(nodes: Candidates) -> None:
    """Nodes of a tree stand behind their parents, one deeper and worth no more."""
    for node, parent in enumerate(nodes.parents, start=1):
        assert parent < node
        assert nodes.depths[node - 1] == (nodes.depths[parent - 1] if parent else 0) + 1
        assert not parent or nodes.values[node - 1] <= nodes.values[parent - 1]


def test_auto_values_never_rise_along_a_path():
    """So that any choice of the best nodes holds their parents, even where the tables say that deeper is better."""
    candidates = random_candidates([random.Random(1).random() for _ in range(20)])
    for num_nodes in (1, 7, 20, 68):
        best = candidates.best(num_nodes)
        assert len(best.values) == num_nodes
        assert sorted(best.values, reverse=True) == sorted(candidates.values, reverse=True)[:num_nodes]
        check_path(best)


def test_auto_copies_join_candidates_that_say_the_same():
    """They raise what was drafted on their way and go on behind it, never more likely than the token before."""
    candidates = random_candidates([0.1] * 20)
    first = 2
    second = candidates.parents.index(first)
    tokens = [candidates.token_ids[first], candidates.token_ids[second], 98, 99]
    candidates.add_copy(1, tokens, [0.0] * 10 + [0.5, 0.6, 0.4, 0.3])
    assert (candidates.values[first], candidates.values[second]) == (0.5, 0.5)
    assert candidates.token_ids[-2:] == [98, 99]
    assert candidates.values[-2:] == [0.4, 0.3]
    assert candidates.parents[-2:] == [second, len(candidates.values) - 2]
    best = candidates.best(4)
    assert best.token_ids == tokens
    assert best.parents == [0, 1, 2, 3]
    assert best.depths == [1, 2, 3, 4]
    assert best.copied_cells == [10, 11, 12, 13]
    check_path(best)


def test_auto_of_equal_candidates_the_first_are_chosen():
    """As the draft ranked them."""
    candidates = random_candidates([0.5] * 20)
    best = candidates.best(6)
    assert best.parents == [0, 0, 0, 0, *best.parents[4:]]
    assert best.depths == [1, 1, 1, 1, 2, 2]
    assert sorted(best.token_ids) == sorted(candidates.token_ids[:6])


def test_auto_the_likeliest_path_comes_first():
    """Each node is followed by all that lies below it, the better child first, so that a path down the first ones is
    already where a commit wants it."""
    candidates = Candidates.drafted(
        token_ids=[10, 11, 12, 13, 14], parents=[-1, -1, 1, 1, 2], depths=[1, 1, 2, 2, 3], log_probs=[-1.0] * 5,
        cells=[0, 1, 2, 3, 4], chances=[0.3, 0.9, 0.5, 0.8, 0.4],
    )  # fmt: skip
    best = candidates.best(5)
    assert best.token_ids == [11, 13, 12, 14, 10]
    assert best.parents == [0, 1, 1, 3, 0]
    assert best.drafted_cells == [1, 3, 2, 4, 0]
    check_path(best)
