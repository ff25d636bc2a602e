"""Which tree to draft: reading, checking and defaulting the `tree*` settings of a generation configuration."""

import dataclasses
import warnings
from dataclasses import dataclass

_TREES = ("auto", "static", "chain")
_INTEGERS = ("tree_top_k", "tree_depth", "tree_num_nodes")
_SWITCHES = ("tree_ngrams", "tree_coupled", "tree_text_tokens")


def default_tree_settings() -> dict:
    """Default settings: the best tree in each round, within limits that are seldom reached."""
    sizes = {"tree_top_k": 10, "tree_depth": 8, "tree_num_nodes": 63}
    switches = {"tree_ngrams": True, "tree_coupled": True, "tree_text_tokens": True}
    return {"tree": "auto", **sizes, **switches}


def fill_in_tree_settings(generation_config) -> None:
    """Give a draft's generation configuration the default of each setting that it does not have."""
    for name, value in default_tree_settings().items():
        # `update` would ignore absent attributes.
        if getattr(generation_config, name, None) is None:
            setattr(generation_config, name, value)


@dataclass(frozen=True)
class TreeSettings:
    """The tree that a round drafts.

    Args:
        tree (`str`): "auto": chosen anew every round, at most as large as said here; "static": the same size every
            round; "chain": one candidate per draft step.
        top_k (`int`): children drawn per node and nodes kept on the frontier.
        depth (`int`): draft steps, step 0 included, so the longest drafted path in tokens.
        num_nodes (`int`): drafted nodes that the target verifies, the root not counted.
        ngrams (`bool`): with "auto", whether continuations copied from the text may join the tree.
        coupled (`bool`): whether the draft may look at the random numbers that the target will sample with.
        text_tokens (`bool`): whether the draft may also propose tokens of the text so far that its vocabulary lacks.
    """

    tree: str
    top_k: int
    depth: int
    num_nodes: int
    ngrams: bool = False
    coupled: bool = True
    text_tokens: bool = True

    @classmethod
    def resolve(cls, *generation_configs, num_draft_tokens: int) -> "TreeSettings":
        """Settings from generation configurations, the first that names a setting wins.

        Args:
            generation_configs (`GenerationConfig`): in order of precedence: the call's, then the draft's.
            num_draft_tokens (`int`): tokens that the draft can propose; no node can have more children.
        Raises:
            ValueError: if a setting cannot work, saying what was expected and found.
        """
        values = {}
        for name, default in default_tree_settings().items():
            found = (getattr(generation_config, name, None) for generation_config in generation_configs)
            values[name] = next((value for value in found if value is not None), default)
        if values["tree"] not in _TREES:
            raise ValueError(f"tree: expected one of {', '.join(_TREES)}, got {values['tree']!r}")
        for name in _INTEGERS:
            if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {values[name]!r}")
        if any(getattr(generation_config, "tree_cuda_graph", False) for generation_config in generation_configs):
            warnings.warn("tree_cuda_graph: this setting was removed and has no effect", stacklevel=3)
        for name in _SWITCHES:
            if not isinstance(values[name], bool):
                raise ValueError(f"{name}: expected True or False, got {values[name]!r}")
        depth, num_nodes = values["tree_depth"], values["tree_num_nodes"]
        switches = {name: values[f"tree_{name}"] for name in ("coupled", "text_tokens")}
        if values["tree"] == "chain":
            return cls("chain", 1, depth, num_nodes, **switches).as_chain()
        top_k = min(values["tree_top_k"], num_draft_tokens)
        settings = cls(values["tree"], top_k, depth, num_nodes, **switches)
        if settings.tree == "auto":
            return dataclasses.replace(settings, ngrams=values["tree_ngrams"])
        if num_nodes > settings.pool_size(depth):
            raise ValueError(
                f"tree_num_nodes: expected at most {settings.pool_size(depth)}, the nodes that a tree with "
                f"tree_top_k={top_k} and tree_depth={depth} draws, got {num_nodes}"
            )
        return settings

    def pool_size(self, depth: int) -> int:
        """Nodes drawn by `depth` draft steps: the children of the root, then top_k children of top_k nodes a step."""
        return self.top_k + (depth - 1) * self.top_k**2 if depth > 0 else 0

    def clipped(self, max_depth: int, max_nodes: int) -> "TreeSettings":
        """The same settings for a tree of at most `max_depth` steps and `max_nodes` drafted nodes, 0 or more."""
        depth = min(self.depth, max_depth, max_nodes)
        num_nodes = min(self.num_nodes, self.pool_size(depth), max_nodes)
        return dataclasses.replace(self, depth=depth, num_nodes=num_nodes)

    def as_small_tree(self) -> "TreeSettings":
        """A tree of one size that hardly ever costs much, for rounds whose costs are not known."""
        smaller = dataclasses.replace(self, tree="static", top_k=min(self.top_k, 4), ngrams=False)
        return smaller.clipped(max_depth=4, max_nodes=15)

    def as_chain(self) -> "TreeSettings":
        """The chain that fits into this tree: as long as its depth and its number of nodes allow."""
        length = min(self.depth, self.num_nodes)
        tree = "auto" if self.tree == "auto" else "chain"
        return dataclasses.replace(self, tree=tree, top_k=1, depth=length, num_nodes=length, ngrams=False)
