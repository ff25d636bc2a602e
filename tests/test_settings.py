"""Settings of the tree."""

import pytest
from transformers import GenerationConfig

from transformers_prism.policy.settings import TreeSettings, default_tree_settings

pytestmark = pytest.mark.quick


def resolve(*configs, num_draft_tokens=1000):
    """Settings from dicts."""
    return TreeSettings.resolve(*(GenerationConfig(**config) for config in configs), num_draft_tokens=num_draft_tokens)


def test_the_first_configuration_that_names_a_setting_wins():
    """Then the default."""
    settings = resolve({"tree_depth": 3}, {"tree": "static", "tree_depth": 5, "tree_num_nodes": 20})
    assert settings == TreeSettings("static", default_tree_settings()["tree_top_k"], 3, 20)
    assert resolve({}) == TreeSettings("auto", 10, 8, 63, ngrams=True)
    assert resolve({"tree_ngrams": False}) == TreeSettings("auto", 10, 8, 63)


@pytest.mark.parametrize("value", [False, True])
def test_the_removed_graph_setting_of_saved_drafts_is_taken(value, recwarn):
    """Drafts saved with it load and draft; who turned it on is told that it does nothing any more."""
    assert resolve({"tree_cuda_graph": value}) == resolve({})
    assert [str(warning.message)[:16] for warning in recwarn] == ["tree_cuda_graph:"] * value


def test_a_chain_is_as_long_as_depth_and_nodes_allow():
    """tree_top_k does not matter."""
    assert resolve({"tree": "chain", "tree_depth": 7, "tree_num_nodes": 5}) == TreeSettings("chain", 1, 5, 5)
    assert resolve(
        {"tree": "static", "tree_top_k": 2, "tree_depth": 3, "tree_num_nodes": 9}
    ).as_chain() == TreeSettings("chain", 1, 3, 3)


def test_a_node_has_no_more_children_than_there_are_draft_tokens():
    """And the tree must still hold its nodes."""
    assert resolve({"tree_num_nodes": 40}, num_draft_tokens=3).top_k == 3
    with pytest.raises(ValueError, match="expected at most 48, .* got 59"):
        resolve({"tree": "static", "tree_depth": 6, "tree_num_nodes": 59}, num_draft_tokens=3)


@pytest.mark.parametrize(("max_depth", "expected"), [(0, (0, 0)), (1, (1, 4)), (2, (2, 15)), (9, (4, 15))])
def test_clipping_to_the_room_that_is_left(max_depth, expected):
    """Depth 0 is a plain step."""
    settings = TreeSettings("static", 4, 4, 15).clipped(max_depth, 99)
    assert (settings.depth, settings.num_nodes) == expected
