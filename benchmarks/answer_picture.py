"""`docs/answer.svg`, the picture of the README: a real answer, in the colours of `transformers-prism generate`.

    python -m benchmarks.answer_picture

It needs the demo target (SmolLM2-135M-Instruct) and the draft in `hub_cards/`. The tree is static, so that the picture
does not depend on the machine; the answer is compared with plain decoding before anything is written.
"""

import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from transformers_prism.cli.demo import STYLES, RoundStreamer, chat_inputs, load_pair
from transformers_prism.whole_files import write_text

PROMPT = "Explain how a rainbow forms, in four sentences."
WIDTH = 92  # columns
TREE = {"tree": "static", "tree_top_k": 4, "tree_depth": 4, "tree_num_nodes": 15}


class _Paper:
    """Stands in for the console of a [`RoundStreamer`]: keeps the coloured text, so that it is wrapped as a whole."""

    def __init__(self):
        self.text = Text()

    def print(self, text: Text | str = "", **_) -> None:
        """Add to the text."""
        self.text.append_text(Text(text) if isinstance(text, str) else text)


def picture(command: str, answer: Text, summary: str) -> str:
    """An SVG of a terminal.

    Args:
        command: what the user typed.
        answer: coloured by accepted and bonus tokens.
        summary: one line below the answer.
    """
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text(f"$ {command}\n", style="bold"))
        console.print(answer)
        console.print()
        console.print(
            Text.assemble(
                ("green", STYLES["accepted"]), ": drafted and accepted   ", ("yellow", STYLES["bonus"]), ": chosen by the target"
            )
        )
        console.print(Text(summary))
        svg = console.export_svg(title="transformers-prism", unique_id="answer")
    # Viewers of README files load no external fonts.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main(output: Annotated[Path, typer.Option(help="The SVG file.")] = Path("docs/answer.svg")) -> None:
    """Decode the prompt with and without the draft, and write the picture."""
    target, tokenizer, draft = load_pair(None, None)
    draft.generation_config.update(**TREE)
    inputs = chat_inputs(tokenizer, PROMPT)
    settings = {"max_new_tokens": 128, "do_sample": False}
    paper = _Paper()
    streamer = RoundStreamer(paper, tokenizer)  # type: ignore[arg-type]
    plain = target.generate(**inputs, **settings)
    drafted = target.generate(**inputs, **settings, assistant_model=draft, streamer=streamer)
    if not torch.equal(plain, drafted):
        raise SystemExit("expected the text of plain decoding, got another")
    speculation, num_tokens = draft.last_speculation, drafted.shape[1] - inputs["input_ids"].shape[1]
    assert speculation is not None, "expected a call with the draft"
    summary = (
        f"{num_tokens} tokens from {num_tokens - speculation.num_committed[0] + speculation.num_rounds[0]} forwards of "
        f"SmolLM2-135M-Instruct, {speculation.acceptance_length:.2f} a round; the same text as without the draft."
    )
    write_text(output, picture(f'transformers-prism generate --prompt "{PROMPT}"', paper.text, summary))
    typer.echo(f"{output}: {summary}")


if __name__ == "__main__":
    typer.run(main)
