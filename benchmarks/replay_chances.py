"""What better estimates of acceptance could gain: a network with more features of a node, against the policy's table.

The automatic policy reads a node's chance of acceptance from a table by depth and by the draft's cumulative probability. Here a
small network also gets: the probabilities of the token and of its ancestors, rank, entropy among the draft's best tokens, the
lead over the next one, whether the n-gram copy agrees and how long its match is, whether the token occurred in the text, and
how often the draft was right lately. Both are cross-validated: fitted on some texts and judged on others. Then both choose
draft steps and nodes of each recorded round, with the same rule and the same costs. The steps are chosen after all were
drawn, which helps both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.known_texts import path_of
from transformers_prism.policy.experience import EDGES, MAX_COPIED, cells_of_drafted
from transformers_prism.policy.ngrams import MAX_MATCH, NgramIndex

_NUM_FOLDS = 4
_NUM_EPOCHS, _MIN_UPDATES, _BATCH, _RATE, _WIDTH = 3, 200, 8192, 6e-3, 32
_NUM_CELLS, _NUM_COPIED_CELLS = 8 * (len(EDGES) + 1), (MAX_MATCH + 1) * MAX_COPIED
_PRIOR_WEIGHT = 8.0  # pseudo-count of nodes in each cell
_RECENT = (8, 32)  # positions over which the draft's hits are counted


@dataclass
class Nodes:
    """What the draft drew at one position, and what else was copied from the text: N nodes, parents before children.

    Args:
        features (`np.ndarray` of shape `(D, F)`): the network's inputs for the D drawn nodes, which come first.
        cells (`np.ndarray` of shape `(D,)`): indices of these nodes in the policy's table.
        copied_cells (`np.ndarray` of shape `(N,)`): index in the table of copies for nodes that the copy holds; else -1.
        parents, depths (`np.ndarray` of shape `(N,)`): parent node, -1 for the root; depth, from 1 on.
        accepted (`np.ndarray` of shape `(N,)`): whether the text continues with the node.
        num_left (`int`): tokens that are still to be written.
        room (`int`): largest depth that a tree may have.
    """

    features: np.ndarray
    cells: np.ndarray
    copied_cells: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    accepted: np.ndarray
    num_left: int
    room: int


def nodes_of(text: dict, max_new_tokens: int, has_copies: bool = True) -> list[Nodes]:
    """Nodes at each position of a recorded text."""
    answer, index, known = text["answer"], NgramIndex(text["prompt"]), set(text["prompt"])
    hits: list[float] = []
    positions = []
    for position in range(len(answer) - 1):
        index.extend([answer[position]])
        known.add(answer[position])
        continuation = answer[position + 1 :]
        drawn = [[part[position].numpy() for part in step] for step in text["steps"]]
        token_ids, parents, log_probs = (np.concatenate([step[part] for step in drawn]) for part in range(3))
        depths = np.repeat(np.arange(1, len(drawn) + 1), [len(step[0]) for step in drawn])
        match, copied = index.continuation(MAX_COPIED) if has_copies else (0, [])
        both = path_of(token_ids.tolist(), parents.tolist(), copied, root=-1)
        is_copied = np.zeros(len(token_ids))
        is_copied[both] = 1.0
        recent = [float(np.mean(hits[-count:])) if hits else 0.5 for count in _RECENT]
        of_round = [match, *recent, math.log1p(len(text["prompt"]))]
        in_text = [token in known for token in token_ids.tolist()]
        features = np.column_stack(
            (*_of_draws(parents, log_probs, depths), is_copied, in_text, np.tile(of_round, (len(token_ids), 1)))
        )
        cells = np.array(cells_of_drafted(depths.tolist(), log_probs.tolist()))
        # The rest of the copy continues below those of its tokens that the draft drew, too.
        rest, num_drawn = copied[len(both) :], len(token_ids)
        below = [both[-1] if both else -1, *range(num_drawn, num_drawn + len(rest) - 1)][: len(rest)]
        parents, all_ids = np.concatenate((parents, below)).astype(int), [*token_ids.tolist(), *rest]
        copied_cells = np.full(len(all_ids), -1)
        copied_cells[[*both, *range(num_drawn, len(all_ids))]] = match * MAX_COPIED + np.arange(len(copied))
        accepted = np.zeros(len(all_ids), dtype=bool)
        # The last token of an answer is the bonus of its last round.
        accepted[path_of(all_ids, parents.tolist(), continuation[:-1], root=-1)] = True
        depths = np.concatenate((depths, np.arange(len(both) + 1, len(copied) + 1)))
        positions.append(
            Nodes(
                *(features.astype(np.float32), cells, copied_cells, parents, depths, accepted, len(continuation)),
                room=max_new_tokens - position - 2,
            )
        )
        hits.append(float(token_ids[log_probs[: len(drawn[0][0])].argmax()] == continuation[0]))
    return positions


def _of_draws(parents: np.ndarray, log_probs: np.ndarray, depths: np.ndarray) -> list[np.ndarray]:
    """Features that the draft's own probabilities give, each `(N,)`."""
    above = np.maximum(parents, 0)
    own = log_probs - np.where(parents >= 0, log_probs[above], 0.0)
    of_parent = np.where(parents >= 0, own[above], 0.0)
    # Siblings stand side by side, and each parent has the same number of them.
    _, first, family, counts = np.unique(parents, return_index=True, return_inverse=True, return_counts=True)
    chances = np.exp(own)
    mass = np.bincount(family, chances)
    entropy = np.bincount(family, -chances * own)
    order = np.lexsort((-own, family))
    rank = np.empty(len(own))
    rank[order] = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    best = np.zeros((2, len(counts)))
    for place in (0, 1):
        chosen = order[rank[order] == place]
        best[place, family[chosen]] = own[chosen]
    return [
        *(log_probs, np.exp(log_probs), own, chances, depths, rank, mass[family], entropy[family]),
        *((best[0] - best[1])[family], of_parent, np.where(parents >= 0, rank[above], 0.0), log_probs / depths),
    ]


def fit_network(features: np.ndarray, accepted: np.ndarray, seed: int = 0) -> nn.Module:
    """Fit a network from standardised features `(N, F)` to logits of acceptance."""
    inputs, wanted = torch.from_numpy(features), torch.from_numpy(accepted).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        last = nn.Linear(_WIDTH, 1)
        nn.init.constant_(last.bias, math.log(max(accepted.mean(), 1e-6)))
        network = nn.Sequential(nn.Linear(inputs.shape[1], _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _WIDTH), nn.GELU(), last)
        num_updates = max(_MIN_UPDATES, _NUM_EPOCHS * len(inputs) // _BATCH)
        optimizer = torch.optim.AdamW(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=num_updates + 1)
        for _ in range(num_updates):
            chosen = torch.randint(0, len(inputs), (min(_BATCH, len(inputs)),))
            loss = nn.functional.binary_cross_entropy_with_logits(network(inputs[chosen])[:, 0], wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _shares(cells: np.ndarray, accepted: np.ndarray, num_cells: int) -> np.ndarray:
    """Share of each cell's nodes that were accepted, `(num_cells,)`; with few nodes it is shrunk towards the share of all."""
    seen, hits = np.bincount(cells, minlength=num_cells), np.bincount(cells[accepted], minlength=num_cells)
    return (hits + _PRIOR_WEIGHT * accepted.mean()) / (seen + _PRIOR_WEIGHT) if len(cells) else np.zeros(num_cells)


def cross_validated(texts: list[list[Nodes]]) -> dict[str, list[list[np.ndarray]]]:
    """Chances of all nodes by way, fitted on texts other than the node's own. For copies both ways use a table."""
    features, cells, copied_cells = (
        [np.concatenate([getattr(nodes, name) for nodes in text]) for text in texts] for name in ("features", "cells", "copied_cells")
    )
    accepted = [np.concatenate([nodes.accepted for nodes in text]) for text in texts]
    of_drawn = [np.concatenate([nodes.accepted[: len(nodes.cells)] for nodes in text]) for text in texts]
    joined = np.concatenate(features)
    mean, spread = joined.mean(axis=0), joined.std(axis=0) + 1e-6
    features = [(one - mean) / spread for one in features]
    found: dict[str, list] = {way: [None] * len(texts) for way in ("table", "network")}
    for fold in range(min(_NUM_FOLDS, len(texts))):
        others = [index for index in range(len(texts)) if index % _NUM_FOLDS != fold]

        def of_others(parts: list[np.ndarray], others=others) -> np.ndarray:
            return np.concatenate([parts[one] for one in others])

        table = _shares(of_others(cells), of_others(of_drawn), _NUM_CELLS)
        is_copied = of_others(copied_cells) >= 0
        copies = _shares(of_others(copied_cells)[is_copied], of_others(accepted)[is_copied], _NUM_COPIED_CELLS)
        network = fit_network(of_others(features), of_others(of_drawn))
        for index in range(fold, len(texts), _NUM_FOLDS):
            with torch.no_grad():
                learned = torch.sigmoid(network(torch.from_numpy(features[index]))[:, 0]).numpy()
            ends = np.cumsum([len(nodes.cells) for nodes in texts[index]])[:-1]
            of_network, of_table = np.split(learned, ends), np.split(table[cells[index]], ends)
            found["network"][index], found["table"][index] = [], []
            for nodes, by_network, by_table in zip(texts[index], of_network, of_table, strict=True):
                copied = np.where(nodes.copied_cells >= 0, copies[nodes.copied_cells], 0.0)
                num_drawn = len(nodes.cells)
                found["network"][index].append(np.concatenate((by_network, copied[num_drawn:])))
                higher = np.maximum(by_table, copied[:num_drawn])
                found["table"][index].append(np.concatenate((higher, copied[num_drawn:])))
    return found


def choose(nodes: Nodes, chances: np.ndarray, rate: float, costs: list[list[float]]) -> tuple[float, int]:
    """Choose the round with the best expected reward at this rate; returns its seconds and the tokens that it commits.

    Args:
        costs: seconds of a round by draft steps and nodes.
    """
    values = chances.tolist()
    for node, parent in enumerate(nodes.parents.tolist()):
        if parent >= 0:
            values[node] = min(values[node], values[parent])
    bounded = np.array(values)
    best, seconds, chosen = -rate * costs[0][0], costs[0][0], np.array([], dtype=int)
    for num_steps in range(min(len(costs), nodes.room + 1)):
        # Nodes that only the copy holds cost no draft step.
        is_there = (nodes.depths <= num_steps) | (nodes.copied_cells >= 0)
        drawn = np.flatnonzero(is_there & (nodes.depths <= nodes.room))
        if not len(drawn):
            continue
        ranked = drawn[np.argsort(-bounded[drawn], kind="stable")][: len(costs[0]) - 1]
        rewards = bounded[ranked].cumsum() - rate * np.array(costs[num_steps][1 : len(ranked) + 1])
        size = int(rewards.argmax())
        if rewards[size] > best:
            best, seconds, chosen = rewards[size], costs[num_steps][size + 1], ranked[: size + 1]
    # Accepted nodes form one path, and a parent's value is at least its child's, so the chosen part of the path has no gap.
    return seconds, int(nodes.accepted[chosen].sum()) + 1


def replay_chances(texts: list[list[Nodes]], chances: list[list[np.ndarray]], by_size: list[list[float]]) -> dict:
    """Seconds and tau of all texts, at the rate found by repeating the replay; `by_size` are the costs of [`choose`]."""
    rate, found = 1.0 / by_size[0][0], {}
    for _ in range(3):
        seconds, num_rounds, num_tokens = 0.0, 0, 0
        for text, of_text in zip(texts, chances, strict=True):
            position = 0
            while position < len(text):
                took, committed = choose(text[position], of_text[position], rate, by_size)
                committed = min(committed, text[position].num_left)
                seconds, num_rounds, num_tokens = seconds + took, num_rounds + 1, num_tokens + committed
                position += committed
        rate = num_tokens / seconds
        found = {"seconds": seconds, "tau": num_tokens / num_rounds}
    return found


def compare_chances(recorded: dict, round_seconds: Callable[[int, int], float]) -> dict[str, dict]:
    """For chances by `table` and by `network`: seconds, tau, and log loss in nats per node; {} for fewer than two texts, which
    cannot be cross-validated.

    Args:
        recorded (`dict`): of [`benchmarks.replay.record`].
        round_seconds: of a round, from nodes and draft steps.
    """
    settings = recorded["settings"]
    texts = [nodes_of(text, recorded["max_new_tokens"], settings["ngrams"]) for text in recorded["texts"]]
    texts = [nodes for nodes in texts if nodes]
    if len(texts) < 2:
        return {}
    sizes = range(settings["num_nodes"] + 1)
    by_size = [[round_seconds(size, steps) for size in sizes] for steps in range(settings["depth"] + 1)]
    found = {}
    accepted = np.concatenate([nodes.accepted for text in texts for nodes in text])
    for way, chances in cross_validated(texts).items():
        said = np.concatenate([one for text in chances for one in text]).clip(1e-9, 1 - 1e-9)
        log_loss = -np.log(np.where(accepted, said, 1 - said)).mean()
        found[way] = {**replay_chances(texts, chances, by_size), "log_loss": float(log_loss)}
    return found


__all__ = ["Nodes", "choose", "compare_chances", "nodes_of"]
