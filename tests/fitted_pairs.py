"""Tiny targets that write predictable text, and drafts fitted to them: rounds commit several tokens, as real ones do.

A random target's text is noise, of which a draft predicts next to nothing, so that paths of more than one node are
rare. Here the target learns a random Markov chain for a second or two, and the draft learns the target.
"""

import torch
from tiny_models import VOCAB_SIZE, tiny_target

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.training.alignment import aligned_forward

FIRST_WORD = 3  # tokens before it are padding, end and beginning
# What follows each token, likeliest first.
_CHANCES = (0.8, 0.15, 0.05)
_NUM_STEPS = 4
_BATCH, _LENGTH = 16, 40


def chain_of(seed: int) -> torch.LongTensor:
    """A random Markov chain: the successors of each token, `(V, 3)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCAB_SIZE, (VOCAB_SIZE, len(_CHANCES)), generator=generator)


def text_of(chain: torch.LongTensor, num_rows: int, length: int, generator: torch.Generator) -> torch.LongTensor:
    """Text that a chain writes, `(num_rows, length)`."""
    tokens = [torch.randint(FIRST_WORD, VOCAB_SIZE, (num_rows,), generator=generator)]
    chances = torch.tensor(_CHANCES).expand(num_rows, -1)
    for _ in range(length - 1):
        choice = torch.multinomial(chances, 1, generator=generator)
        tokens.append(chain[tokens[-1]].gather(1, choice)[:, 0])
    return torch.stack(tokens, dim=1)


def fitted_target(architecture: str, chain: torch.LongTensor, seed: int = 0, num_updates: int = 120, **overrides):
    """A tiny target that has learnt to write like `chain`, a random one after no updates."""
    target = tiny_target(architecture, seed, **{"initializer_range": 0.08, **overrides})
    generator = torch.Generator().manual_seed(seed)

    def loss():
        text = text_of(chain, _BATCH, _LENGTH, generator)
        logits = target(text, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())

    return _fit(target, loss, num_updates)


def fitted_draft(target, chain: torch.LongTensor, seed: int = 0, num_updates: int = 100, **overrides):
    """A draft that has learnt to foresee `target` on such text, a random one after no updates."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = PrismDraftModel(PrismConfig.from_target(target, **overrides)).float().bind(target)
    generator = torch.Generator().manual_seed(seed)
    layers = draft.config.target_layer_ids
    names = draft.draft_to_target

    def loss():
        text = text_of(chain, _BATCH, _LENGTH, generator)
        with torch.no_grad():
            outputs = target(text, use_cache=False, output_hidden_states=True)
            chances = outputs.logits[:, 1:].softmax(-1)
            chances = chances if names is None else chances[..., names]
        hidden = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
        predictions = aligned_forward(draft, text[:, 1:], hidden[:, :-1], _NUM_STEPS)
        losses = [
            -(chances[:, step:] * draft.compute_logits(prediction[:, step:]).log_softmax(-1)).sum(-1).mean()
            for step, prediction in enumerate(predictions)
        ]
        return torch.stack(losses).sum()

    return _fit(draft, loss, num_updates)


def _fit(model, loss, num_updates: int):
    """The model after so many updates of all its own weights; the global generator stays as it is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, max(num_updates, 1))
    with torch.random.fork_rng(), torch.enable_grad():
        for _ in range(num_updates):
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    optimizer.zero_grad()
    return model.eval().requires_grad_(False)
