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

from ..kernels.dispatch import use_triton
from ..kernels.grow_tree import ancestor_bits, choose_nodes
from ..kernels.tree_attention import unpack_ancestors


@dataclass
class Tree:
    """Drafted tokens of a batch of sequences, all of shape `(B, N)`.

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
        """`(B, N, N)` bool: [b, i, j] is True where j is i or one of its ancestors."""
        return ancestor_mask(self.parents)


@dataclass
class CandidatePool:
    """Every node drawn while a tree grows, in the order drawn.

    Args:
        steps: of each draft step the token ids `(B, n)`, parents `(B, K)` and log-probabilities `(B, n)` of the nodes
            drawn. Each parent has the same number of children; they are grouped by parent, in the parents' order. Parents
            index the pool; -1 is the root.
    """

    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @property
    def token_ids(self) -> torch.Tensor:
        """`(B, C)`."""
        return torch.cat([token_ids for token_ids, _, _ in self.steps], dim=1)

    @property
    def parents(self) -> torch.Tensor:
        """`(B, C)`."""
        num_children = [token_ids.shape[1] // parents.shape[1] for token_ids, parents, _ in self.steps]
        parents = [one[1].repeat_interleave(num, dim=1) for one, num in zip(self.steps, num_children, strict=True)]
        return torch.cat(parents, dim=1)

    @property
    def depths(self) -> torch.Tensor:
        """`(B, C)`, 1 for the root's children."""
        depths = [torch.full_like(token_ids, depth) for depth, (token_ids, _, _) in enumerate(self.steps, start=1)]
        return torch.cat(depths, dim=1)

    @property
    def log_probs(self) -> torch.Tensor:
        """`(B, C)`, cumulative ones."""
        return torch.cat([log_probs for _, _, log_probs in self.steps], dim=1)

    def rows(self) -> list[tuple[list[int], list[int], list[int], list[float]]]:
        """Token ids, parents, depths and log-probabilities of each sequence."""
        rows: list[tuple] = [([], [], [], []) for _ in self.steps[0][0]]
        for depth, step in enumerate(self.steps, start=1):
            for (ids, parents, depths, log_probs), *drawn in zip(rows, *(part.tolist() for part in step), strict=True):
                num_children = len(drawn[0]) // len(drawn[1])
                ids += drawn[0]
                parents += [parent for parent in drawn[1] for _ in range(num_children)]
                depths += [depth] * len(drawn[0])
                log_probs += drawn[2]
        return rows


def root_tree(token_ids: torch.Tensor) -> Tree:
    """A tree of the root alone, `token_ids` of shape `(B,)`: verifying it is a plain decoding step."""
    zeros = torch.zeros_like(token_ids)[:, None]
    return Tree(token_ids[:, None], zeros, zeros, torch.zeros(zeros.shape, dtype=torch.float32, device=zeros.device))


def chain_tree(token_ids: torch.Tensor) -> Tree:
    """Tokens `(B, N)` as a tree of one path."""
    index = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    return Tree(token_ids, (index - 1).clamp(min=0), index, torch.zeros(index.shape, device=index.device))


def ancestor_mask(parents: torch.Tensor) -> torch.Tensor:
    """Ancestors of each node, itself included.

    Args:
        parents (`torch.LongTensor` of shape `(B, N)`): 0 for the root.
    Returns:
        `torch.BoolTensor` of shape `(B, N, N)`.
    """
    if parents.device.type != "cpu" or use_triton("auto", parents.device):
        return unpack_ancestors(ancestor_bits(parents), parents.shape[1])
    # On a CPU a dozen tensor operations would cost more than this loop over a few numbers.
    ancestors = bytearray().join(row for one in parents.tolist() for row in _ancestors_of(one))
    return torch.frombuffer(ancestors, dtype=torch.bool).view(*parents.shape, -1)


def _ancestors_of(parents: list[int]) -> list[bytearray]:
    """For each node of a sequence a 1 at the node itself and at its ancestors, else 0."""
    ancestors: list[bytearray] = []
    for node, parent in enumerate(parents):
        ancestors.append(ancestors[parent].copy() if node else bytearray(len(parents)))
        ancestors[node][node] = 1
    return ancestors


def select_nodes(root_ids: torch.Tensor, pool: CandidatePool, num_nodes: int) -> Tree:
    """Keep the most probable nodes of a pool as a tree.

    The choice is closed under parents: log-probabilities never rise along a path, ties go to the smaller pool index,
    and parents precede their children in the pool.

    Args:
        root_ids (`torch.LongTensor` of shape `(B,)`): last committed token of each sequence.
        pool (`CandidatePool`): C candidates.
        num_nodes (`int`): drafted nodes to keep, the root not counted; at most C.
    Returns:
        `Tree` with `num_nodes + 1` nodes, in pool order after the root.
    """
    return Tree(*choose_nodes(root_ids, pool.token_ids, pool.parents, pool.depths, pool.log_probs, num_nodes))


def visible_keys(committed: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """What each new node may attend to: all committed keys and its own ancestors among the new ones.

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
