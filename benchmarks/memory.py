"""Peak memory of generate() with and without a draft, each way in a process of its own.

    python -m benchmarks.memory
"""

import resource
import subprocess
import sys
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from transformers_prism.cli.demo import PROMPTS, SHIPPED_DRAFT, chat_inputs, load_draft
from transformers_prism.cli.options import DraftOption, TargetOption, user_errors
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.target import load_target

WAYS = {
    "without a draft": (False, False),
    "with the draft": (True, False),
    "without a draft, weights packed": (False, True),
    "with the draft, weights packed": (True, True),
}
# The peak of a process is reported in units of 1024 bytes, on macOS in bytes.
_UNIT = 1 if sys.platform == "darwin" else 1024
_MIB = 2**20


def peak_bytes(has_draft: bool, packed: bool, target: str | None, draft: str | None, max_new_tokens: int) -> int:
    """Peak resident set of this process after one greedy answer."""
    model, tokenizer = load_target(target)
    model_draft = load_draft(draft or SHIPPED_DRAFT, model) if has_draft else None
    if packed:
        prepare_for_cpu(*(one for one in (model, model_draft) if one is not None))
    settings = {"do_sample": False, "min_new_tokens": max_new_tokens, "max_new_tokens": max_new_tokens}
    model.generate(**chat_inputs(tokenizer, PROMPTS[1]), **settings, assistant_model=model_draft)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: TargetOption = None,
    draft: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer.")] = 128,
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    """Measure the peak resident set of one answer in four ways: with and without the draft, with weights packed or not."""
    with user_errors():
        if way is not None:
            typer.echo(peak_bytes(*WAYS[way], target, draft, max_new_tokens))
            return
        table = Table(box=box.SIMPLE, pad_edge=False, caption=f"greedy, batch 1, {max_new_tokens} new tokens")
        table.add_column("generate()")
        table.add_column("peak MiB", justify="right")
        for name in WAYS:
            table.add_row(name, f"{_in_own_process(name, target, draft, max_new_tokens) / _MIB:.0f}")
        Console().print(table)


def _in_own_process(way: str, target: str | None, draft: str | None, max_new_tokens: int) -> int:
    words = [sys.executable, "-m", "benchmarks.memory", "--way", way, "--max-new-tokens", str(max_new_tokens)]
    for name, value in (("--target", target), ("--draft", draft)):
        words += [name, value] if value else []
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise OSError(f"expected a peak of memory, got the exit code {result.returncode} of `{way}`; its message is above")
    return int(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
