"""Trees of drafted tokens, as pure tensor functions.

Node 0 is the last committed token, every other node a drafted one; a node's parent has a smaller index. With nodes

    0 the            parents    [0, 0, 0, 1, 1, 3]
    |- 1 cat         depths     [0, 1, 1, 2, 2, 3]
    |  |- 3 sat      ancestors  node 5 sees 0, 1, 3 and 5
    |  |  `- 5 on
    |  `- 4 ran
    `- 2 dog

the target verifies all six in one forward, each at position `committed length - 1 + depth`.
Shape letters: B batch, N nodes with the root, C candidates in the pool, P committed positions.
Source: EAGLE-2 (arXiv:2406.16858), section 4; ties and orders as in its released code.
"""

from dataclasses import dataclass

import torch


@dataclass
class Tree:
    """Drafted tokens of a batch of rows, all of shape `(B, N)`.

    Args:
        token_ids (`torch.LongTensor`): ids in the target's vocabulary; node 0 is the last committed token.
        parents (`torch.LongTensor`): index of each node's parent, smaller than its own; 0 for the root itself.
        depths (`torch.LongTensor`): 0 for the root, 1 for its children.
        log_probs (`torch.FloatTensor`): the draft's cumulative log-probability in nats; 0 for the root.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    log_probs: torch.Tensor

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return self.token_ids.shape[1]

    def ancestors(self) -> torch.Tensor:
        """`(B, N, N)` bool: True where the column is the row's node or one of its ancestors."""
        return ancestor_mask(self.parents)


@dataclass
class CandidatePool:
    """Every node drawn while a tree grows, in the order drawn; all of shape `(B, C)`.

    `parents` index the pool, -1 is the root.
    """

    token_ids: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    log_probs: torch.Tensor

    def extend(self, token_ids, parents, depth: int, log_probs) -> None:
        """Append the nodes of one draft step, `(B, n)` each."""
        depths = torch.full_like(token_ids, depth)
        self.token_ids = torch.cat((self.token_ids, token_ids), dim=1)
        self.parents = torch.cat((self.parents, parents), dim=1)
        self.depths = torch.cat((self.depths, depths), dim=1)
        self.log_probs = torch.cat((self.log_probs, log_probs), dim=1)

    @classmethod
    def empty(cls, num_rows: int, device) -> "CandidatePool":
        """A pool without nodes for `num_rows` rows."""
        integers = torch.empty((num_rows, 0), dtype=torch.long, device=device)
        return cls(integers, integers, integers, torch.empty((num_rows, 0), dtype=torch.float32, device=device))


def root_tree(token_ids: torch.Tensor) -> Tree:
    """A tree of the root alone, `token_ids` of shape `(B,)`: verifying it is a plain decoding step."""
    zeros = torch.zeros_like(token_ids)[:, None]
    return Tree(token_ids[:, None], zeros, zeros, torch.zeros(zeros.shape, dtype=torch.float32, device=zeros.device))


def ancestor_mask(parents: torch.Tensor) -> torch.Tensor:
    """Ancestors of each node, itself included.

    Args:
        parents (`torch.LongTensor` of shape `(B, N)`): 0 for the root.
    Returns:
        `torch.BoolTensor` of shape `(B, N, N)`.
    """
    num_nodes = parents.shape[1]
    mask = torch.eye(num_nodes, dtype=torch.bool, device=parents.device).repeat(parents.shape[0], 1, 1)
    ancestor = parents
    # A node knows twice as many levels after each turn: its own, and those that its farthest known ancestor knows.
    for _ in range((num_nodes - 1).bit_length()):
        mask = mask | mask.gather(1, ancestor[..., None].expand_as(mask))
        ancestor = ancestor.gather(1, ancestor)
    return mask


def stable_top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest values along the last dimension, ties to the smaller index, NaN last; `(..., k)`."""
    values = torch.nan_to_num(values, nan=-torch.inf, neginf=-torch.inf)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def select_nodes(root_ids: torch.Tensor, pool: CandidatePool, num_nodes: int) -> Tree:
    """Keep the most probable nodes of a pool as a tree.

    The choice is closed under parents: log-probabilities never rise along a path, ties go to the smaller pool index,
    and parents precede their children in the pool.

    Args:
        root_ids (`torch.LongTensor` of shape `(B,)`): last committed token of each row.
        pool (`CandidatePool`): C candidates.
        num_nodes (`int`): drafted nodes to keep, the root not counted; at most C.
    Returns:
        `Tree` with `num_nodes + 1` nodes, in pool order behind the root.
    """
    return tree_of_nodes(root_ids, pool, best_nodes(pool.log_probs, num_nodes))


def best_nodes(scores: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """Pool indices `(B, num_nodes)` of the nodes with the highest scores `(B, C)`, in pool order, ties to the smaller."""
    return stable_top_k(scores, num_nodes).sort(dim=-1).values


def tree_of_nodes(root_ids: torch.Tensor, pool: CandidatePool, chosen: torch.Tensor) -> Tree:
    """The tree of chosen candidates.

    Args:
        root_ids (`torch.LongTensor` of shape `(B,)`): last committed token of each row.
        pool (`CandidatePool`): C candidates.
        chosen (`torch.LongTensor` of shape `(B, n)`): pool indices, increasing, each with its parents.
    Returns:
        `Tree` with `n + 1` nodes, in pool order behind the root.
    """
    node_of_candidate = torch.zeros_like(pool.token_ids)
    order = torch.arange(1, chosen.shape[1] + 1, device=chosen.device).expand_as(chosen)
    node_of_candidate.scatter_(1, chosen, order)
    pool_parents = pool.parents.gather(1, chosen)
    parents = node_of_candidate.gather(1, pool_parents.clamp(min=0)) * (pool_parents >= 0)
    root = root_tree(root_ids)
    return Tree(
        torch.cat((root.token_ids, pool.token_ids.gather(1, chosen)), dim=1),
        torch.cat((root.parents, parents), dim=1),
        torch.cat((root.depths, pool.depths.gather(1, chosen)), dim=1),
        torch.cat((root.log_probs, pool.log_probs.gather(1, chosen)), dim=1),
    )


def visible_keys(committed: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """What each new row may attend to: all committed keys and its own ancestors among the new ones.

    Args:
        committed (`torch.BoolTensor` of shape `(B, P)`): False at padding and at holes.
        ancestors (`torch.BoolTensor` of shape `(B, N, M)`, M >= N): over the uncommitted keys, itself included.
    Returns:
        `torch.BoolTensor` of shape `(B, N, P + M)`.
    """
    return torch.cat((committed[:, None].expand(-1, ancestors.shape[1], -1), ancestors), dim=2)


def within_window(query_index: torch.Tensor, key_index: torch.Tensor, sliding_window: int) -> torch.Tensor:
    """Which keys a sliding window lets a query see, `(B, N, K)`, from indices `(B, N)` and `(B, K)` in the sequence."""
    return key_index[:, None] > query_index[..., None] - sliding_window


def attention_mask(visible: torch.Tensor, attn_implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """`visible` `(B, N, K)` in the form `(B, 1, N, K)` that an attention implementation of transformers takes.

    SDPA takes booleans; eager attention adds the mask, so it gets 0 and the smallest finite number (minus infinity
    would turn fully masked rows into NaN).
    """
    visible = visible[:, None]
    if attn_implementation != "eager":
        return visible
    smallest = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, smallest)
