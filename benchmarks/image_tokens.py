"""What a draft should read at the positions of an image: the image token's embedding, or the target's merged embedding.

    python -m benchmarks.image_tokens            three seeds, two minutes on one core
    python -m benchmarks.image_tokens --target-steps 30 --draft-steps 30 --pictures 4 --seeds 1      a trial of seconds

A tiny random LLaVA learns to name the colours of a picture's 16 cells, in order, each with a word that a random Markov chain
adds. Two drafts with the same initial weights are then trained on the same pictures. At the positions of the image, one
reads the embedding of the image token, as for any other token; the other reads the target's merged embedding of the cell.
Both read the target's hidden states there. What counts is the acceptance length of chains over pictures that neither has seen.
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from transformers_prism import PrismConfig, PrismDraftModel
from transformers_prism.training.alignment import aligned_forward
from transformers_prism.whole_files import write_json

NUM_COLOURS, NUM_CELLS, CELL = 12, 16, 8  # a picture has 4 x 4 cells of 8 x 8 pixels
IMAGE_ID, FIRST_COLOUR, FIRST_WORD, VOCAB_SIZE = 3, 8, 24, 64
QUESTION = [4, *[IMAGE_ID] * NUM_CELLS, 5]
NUM_STEPS = 4
WAYS = ("image token", "merged embedding")


class ImageDraft(PrismDraftModel):
    """A draft that reads `image_embeddings`, if they are set, in place of the embeddings of image tokens."""

    image_embeddings: torch.Tensor | None = None  # [image tokens of the batch, D]

    def embed(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Token embeddings `(B, T, D)`."""
        embeddings = super().embed(input_ids)
        is_image = input_ids == IMAGE_ID
        if self.image_embeddings is None or not is_image.any():
            return embeddings
        return embeddings.masked_scatter(is_image[..., None], self.image_embeddings.to(embeddings.dtype))


def new_target(seed: int) -> LlavaForConditionalGeneration:
    """A tiny random LLaVA whose patches are the cells of a picture."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = LlamaConfig(**sizes, vocab_size=VOCAB_SIZE, num_hidden_layers=4, num_key_value_heads=2, tie_word_embeddings=False)
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=4 * CELL, patch_size=CELL, projection_dim=64)
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID, eos_token_id=None, pad_token_id=0)
    return LlavaForConditionalGeneration(config).float()


class Pictures:
    """Random pictures with their descriptions.

    Args:
        seed (`int`): of colours and of the words that follow them.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        rules = torch.Generator().manual_seed(seed + 1000)
        self.colours = torch.rand((NUM_COLOURS, 3), generator=rules) * 4 - 2
        self.words = torch.randint(FIRST_WORD, VOCAB_SIZE, (NUM_COLOURS, NUM_COLOURS), generator=rules)

    def draw(self, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels `(num, 3, 32, 32)`, and the texts `(num, T)`: the question and, for each cell, its colour and the word
        that this colour has after the previous colour."""
        cells = torch.randint(NUM_COLOURS, (num, NUM_CELLS), generator=self.generator)
        pixels = self.colours[cells].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        pixels = pixels.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        pixels = pixels + 0.1 * torch.randn(pixels.shape, generator=self.generator)
        before = torch.cat((cells[:, :1], cells[:, :-1]), dim=1)
        answer = torch.stack((cells + FIRST_COLOUR, self.words[before, cells]), dim=-1).flatten(1)
        return pixels, torch.cat((torch.tensor(QUESTION).expand(num, -1), answer), dim=1)


def _fit(model, loss, num_steps: int, rate: float) -> float:
    """Train a model's own weights on a loss; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps)
    value = torch.tensor(0.0)
    for step in range(num_steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            say(f"  step {step}/{num_steps}: loss {value.item():.3f}")
    model.eval().requires_grad_(False)
    return value.item()


def fitted_target(seed: int, num_steps: int, batch_size: int):
    """A target that names what it sees, and its last loss over the colours."""
    target, pictures = new_target(seed).train(), Pictures(seed)

    def loss():
        pixels, text = pictures.draw(batch_size)
        logits = target(input_ids=text, pixel_values=pixels, use_cache=False).logits[:, len(QUESTION) - 1 : -1]
        return cross_entropy(logits.flatten(0, 1), text[:, len(QUESTION) :].flatten())

    return target, _fit(target, loss, num_steps, 3e-3)


def fitted_draft(target, way: str, seed: int, num_steps: int, batch_size: int) -> ImageDraft:
    """A draft that has learned what the target says of pictures, reading image tokens in one of `WAYS`."""
    torch.manual_seed(seed)
    draft = ImageDraft(PrismConfig.from_target(target, draft_vocab_size=None)).float().bind(target).train()
    pictures, layers = Pictures(seed), draft.config.target_layer_ids

    def loss():
        pixels, text = pictures.draw(batch_size)
        with torch.no_grad():
            outputs = target(input_ids=text, pixel_values=pixels, use_cache=False, output_hidden_states=True)
        _show(draft, way, outputs, text)
        hidden = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)[:, :-1]
        chances = outputs.logits[:, 1:].softmax(-1)
        predictions = aligned_forward(draft, text[:, 1:], hidden, NUM_STEPS)
        first = len(QUESTION) - 2  # the last position whose prediction is the beginning of the answer
        losses = [
            -(chances[:, first + step :] * draft.compute_logits(one[:, first + step :]).log_softmax(-1)).sum(-1).mean()
            for step, one in enumerate(predictions)
        ]
        return torch.stack(losses).mean()

    _fit(draft, loss, num_steps, 3e-3)
    return draft


def _show(draft: ImageDraft, way: str, outputs, text: torch.Tensor) -> None:
    """Give the draft the merged embeddings of the image tokens, if that is what it reads."""
    draft.image_embeddings = outputs.hidden_states[0][text == IMAGE_ID] if way == WAYS[1] else None


@torch.no_grad()
def acceptance_length(target, draft: ImageDraft, way: str, seed: int, num_pictures: int) -> float:
    """Tokens per round over pictures that were not trained on."""
    draft.generation_config.update(tree="chain", tree_depth=NUM_STEPS, tree_num_nodes=NUM_STEPS)
    pixels, text = Pictures(seed).draw(num_pictures)
    tokens = rounds = 0
    for one in range(num_pictures):
        inputs = {"input_ids": text[one : one + 1, : len(QUESTION)], "pixel_values": pixels[one : one + 1]}
        _show(draft, way, target(**inputs, output_hidden_states=True), inputs["input_ids"])
        settings = {"do_sample": False, "max_new_tokens": 2 * NUM_CELLS, "pad_token_id": 0}
        target.generate(**inputs, **settings, attention_mask=torch.ones_like(inputs["input_ids"]), assistant_model=draft)
        speculation = draft.last_speculation
        assert speculation is not None, "there was a call"
        tokens, rounds = tokens + sum(speculation.num_committed), rounds + sum(speculation.num_rounds)
    return tokens / rounds


def measure(seeds: range, target_steps: int, draft_steps: int, batch_size: int, num_pictures: int) -> dict:
    """Acceptance lengths of both ways by seed."""
    found: dict = {"target_loss": [], **{way: [] for way in WAYS}}
    for seed in seeds:
        say(f"seed {seed}: target")
        target, loss = fitted_target(seed, target_steps, batch_size)
        found["target_loss"].append(loss)
        for way in WAYS:
            say(f"seed {seed}: draft that reads the {way}")
            draft = fitted_draft(target, way, seed, draft_steps, batch_size)
            found[way].append(acceptance_length(target, draft, way, seed + 500, num_pictures))
            say(f"seed {seed}: {way}: {found[way][-1]:.3f} tokens a round")
    return found


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(
    seeds: Annotated[int, typer.Option(help="targets, each with a draft of either kind")] = 3,
    first_seed: Annotated[int, typer.Option(help="of these targets, so that several processes can share the work")] = 0,
    target_steps: Annotated[int, typer.Option(help="updates of each target")] = 300,
    draft_steps: Annotated[int, typer.Option(help="updates of each draft")] = 300,
    batch_size: Annotated[int, typer.Option(help="pictures of an update")] = 12,
    pictures: Annotated[int, typer.Option(help="new pictures that acceptance is measured on")] = 30,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Measure and print."""
    found = measure(range(first_seed, first_seed + seeds), target_steps, draft_steps, batch_size, pictures)
    for way in WAYS:
        say(f"{way:16s} {statistics.mean(found[way]):.3f} tokens a round ({', '.join(f'{one:.3f}' for one in found[way])})")
    if json_file is not None:
        write_json(json_file, found)


if __name__ == "__main__":
    typer.run(main)
