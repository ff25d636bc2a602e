"""How far plain decoding goes along a drafted tree, which is what a round emits.

A tree does not influence what is emitted, so nothing has to be corrected: each next token is chosen from the target's
processed logits at the current node exactly as plain decoding chooses it, and the walk goes on while a child of that
node holds the chosen token.

There are two ways. On the device, one operator walks all trees, and one read returns what they emit; this serves greedy
decoding without processors, and sampling with stock warpers. On the host, processors are called node by node, with exactly
the ids that plain decoding would have shown them; this serves everything else, and everything on a CPU.
Source: Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1, with the draft's distribution a point mass.
"""

from typing import Any

import torch

from ..kernels.verify_tree import verify_tree
from .round_values import Proposal, Verified
from .sampler import Sampler, refuse_nan
from .sequences import Sequences
from .transfer import on_device
from .tree import Tree


def walk(sequences: Sequences, sampler: Sampler, proposal: Proposal, verified: Verified) -> list[list[int]]:
    """Emit in every active sequence what plain decoding would, for as long as the tree holds the chosen tokens.

    Args:
        sequences (`Sequences`): tokens are appended to them.
        sampler (`Sampler`): chooses them.
        proposal (`Proposal`), verified (`Verified`): of this round.
    Returns:
        `list[list[int]]`: for each active sequence the nodes that a token was emitted at, the root first; [] for those
        that are done. Keys and values of these nodes stay; the last token emitted has none yet. So the number of nodes is
        the number of tokens.
    """
    tree, logits = proposal.tree, verified.logits
    if sampler.walks_on_device:
        kept = walk_on_device(sequences, sampler, tree, logits, proposal.depth)
    else:
        kept = [
            [] if sequences.is_done(index) else walk_on_host(sequences, sampler, index, tree, place, logits[place])
            for place, index in enumerate(sequences.active)
        ]
    sampler.forget_passed_noise(sequences)
    return kept


def walk_on_device(sequences: Sequences, sampler: Sampler, tree: Tree, logits, depth: int) -> list[list[int]]:
    """[`walk`] with one read of the device.

    Args:
        tree (`Tree`): N nodes of each active sequence.
        logits (`torch.Tensor` of shape `(B, N, V)`): the target's logits at each node, or at the first ones.
        depth (`int`): of the deepest node, or more.
    """
    num_steps, drawn = depth + 1, dict[str, Any]()
    if sampler.noise is not None:
        assert sampler.warpers is not None, "other processors are called on the host"
        names = ("noise", "noise_steps", "noise_rows")
        noise = sampler.noise_of_next(sequences, num_steps, logits.shape[-1])
        drawn = dict(zip(names, noise, strict=True)) | sampler.warpers
    # As plain decoding does, which chooses from float32.
    logits = logits.float() if logits.dtype == torch.float64 else logits
    parts = (part[:, : logits.shape[1]] for part in (tree.token_ids, tree.parents, tree.depths))
    token_ids, parents, depths = (on_device(part, sampler.device) for part in parts)
    walks = verify_tree(logits.to(sampler.device), token_ids, parents, depths, num_steps, **drawn).tolist()
    kept: list[list[int]] = []
    for index, (num_emitted, *walked) in zip(sequences.active, walks, strict=True):
        kept.append([])
        for node, token in zip(walked[:num_emitted], walked[num_steps:], strict=False):
            if sequences.is_done(index):
                break
            if token < 0:
                refuse_nan(sequences, index)
            sequences.append(index, token)
            kept[-1].append(node)
    return kept


def walk_on_host(sequences: Sequences, sampler: Sampler, index: int, tree: Tree, place: int, logits) -> list[int]:
    """[`walk`] of one sequence, node by node.

    Args:
        index (`int`): of the sequence.
        tree (`Tree`): N nodes; `place` is the tree's row for this sequence.
        logits (`torch.Tensor` of shape `(N, V)`): the target's logits at each node, or at the first ones.
    """
    children = _children(tree, place, len(logits))
    node, nodes = 0, [0]
    while True:
        token = sampler.choose(sequences, index, logits[node])
        sequences.append(index, token)
        following = children.get((node, token))
        if sequences.is_done(index) or following is None:
            return nodes
        node = following
        nodes.append(node)


def _children(tree: Tree, place: int, num_nodes: int) -> dict[tuple[int, int], int]:
    """(parent, token) -> node, for the first nodes; if two children of a parent have the same token, the first of them."""
    parents, token_ids = tree.parents[place].tolist(), tree.token_ids[place].tolist()
    return {(parents[node], token_ids[node]): node for node in range(num_nodes - 1, 0, -1)}
