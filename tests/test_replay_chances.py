"""Chances of nodes by table and by network: what is seen of a node, the choice by hand, and a gain where there is one."""

import math

import numpy as np
import pytest
import torch
from test_replay import SETTINGS, chain_text, costs_of

from benchmarks.replay_chances import choose, compare_chances, nodes_of

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


def test_nodes_say_what_was_accepted_and_what_the_draft_said():
    """Two steps of which one, both or none are right; the last token is the bonus of its round."""
    first, second, third, last = nodes_of(chain_text([10, 11, 12, 13, 14], [2, 1, 0, 2]), 5)
    assert np.flatnonzero(first.accepted).tolist() == [0, 2]
    assert np.flatnonzero(second.accepted).tolist() == [0]
    assert not third.accepted.any()
    assert not last.accepted.any()
    assert [nodes.num_left for nodes in (first, second, third, last)] == [4, 3, 2, 1]
    assert [nodes.room for nodes in (first, second, third, last)] == [3, 2, 1, 0]
    assert first.parents.tolist() == [-1, -1, 0, 0, 1, 1]
    assert first.depths.tolist() == [1, 1, 2, 2, 2, 2]
    log_prob, chance, own, own_chance, depth, rank, mass, entropy, lead, of_parent, parent_rank, mean = first.features[2, :12]
    assert (log_prob, depth, rank, parent_rank) == pytest.approx((-0.2, 2, 0, 0))
    assert (own, of_parent, lead, mean) == pytest.approx((-0.1, -0.1, 3.8, -0.1), abs=1e-6)
    chances = [math.exp(-0.1), math.exp(-3.9)]
    assert (chance, own_chance, mass) == pytest.approx((math.exp(-0.2), chances[0], sum(chances)), abs=1e-6)
    assert entropy == pytest.approx(0.1 * chances[0] + 3.9 * chances[1], abs=1e-6)


def test_copies_join_below_what_the_draft_drew_of_them():
    """The text repeats itself: the drawn tokens of the copy are marked, and it goes on below them."""
    text = chain_text([20, 21, 22, 23, 24, 25], [2, 2, 2, 2, 0])
    text["prompt"] = [20, 21, 22, 23, 24, 25, 1]
    nodes = nodes_of(text, 8)[1]  # behind 20 21
    assert nodes.copied_cells.tolist() == [20, -1, 21, -1, -1, -1, *range(22, 27)]  # 24 25 1 20 21
    assert nodes.parents[6:].tolist() == [2, 6, 7, 8, 9]
    assert nodes.depths[6:].tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(nodes.accepted).tolist() == [0, 2, 6]  # 25 is the bonus


def test_a_round_takes_what_its_time_is_worth():
    """By hand: a step costs 0.1, a node 0.1; at one token a second everything above that is worth it."""
    nodes = nodes_of(chain_text([10, 11, 12, 13], [2, 0, 0]), 4)[0]
    costs = [[costs_of().round(size, steps) for size in range(7)] for steps in range(3)]
    assert choose(nodes, np.array([0.9, 0.05, 0.8, 0.05, 0.0, 0.0]), 1.0, costs) == (pytest.approx(1.4), 3)
    assert choose(nodes, np.array([0.9, 0.05, 0.15, 0.05, 0.0, 0.0]), 1.0, costs) == (pytest.approx(1.2), 2)
    assert choose(nodes, np.full(6, 0.1), 1.0, costs) == (pytest.approx(1.0), 1)
    # A child is worth no more than its parent.
    assert choose(nodes, np.array([0.1, 0.1, 0.9, 0.9, 0.9, 0.9]), 1.0, costs) == (pytest.approx(1.0), 1)


def test_a_network_wins_where_something_else_tells():
    """Whether drafts are right depends on the prompt's length alone, which the table does not know."""
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(12):
        is_long = bool(torch.randint(2, (1,), generator=generator))
        text = chain_text(list(range(10, 50)), [2 if is_long else 0] * 39)
        texts.append({**text, "prompt": list(range(1000, 1000 + (90 if is_long else 3)))})
    found = compare_chances({"settings": SETTINGS, "max_new_tokens": 40, "texts": texts}, costs_of(step=0.4).round)
    assert found["network"]["log_loss"] < 0.5 * found["table"]["log_loss"]
    assert found["network"]["seconds"] < 0.95 * found["table"]["seconds"]
    # A text is not judged by itself.
    assert compare_chances({"settings": SETTINGS, "max_new_tokens": 40, "texts": texts[:1]}, costs_of().round) == {}
