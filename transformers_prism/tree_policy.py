"""Which tree to draft: reading, checking and defaulting the `tree*` settings of a generation configuration."""


def default_tree_settings() -> dict:
    """Settings of a draft that says nothing else: the tree of the PRISM evaluation (60 nodes with the root)."""
    return {"tree": "static", "tree_top_k": 10, "tree_depth": 6, "tree_num_nodes": 59}
