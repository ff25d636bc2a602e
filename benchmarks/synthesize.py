"""How fast conversations are written: `synthesize` against generate() in batches of the same size, in turn.

    python -m benchmarks.synthesize --prompts spec_bench.jsonl --batch-size 64 --json result.json
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging

from transformers_prism.bench.record import write_record
from transformers_prism.cli.options import JsonOption, TargetOption, report_file, user_errors
from transformers_prism.cpu import prepare_for_cpu
from transformers_prism.target import load_target
from transformers_prism.training.data.formats import read_chats
from transformers_prism.training.data.synthesis import SynthesisConfig, Synthesizer
from transformers_prism.training.data.templates import opening, tokenize


def bench_synthesize(
    target, tokenizer, chats: list[list[dict]], batch_size: int, max_new_tokens: int, repeat: int = 3
) -> dict:
    """Time both ways of answering the same prompts greedily.

    Args:
        target, tokenizer: an instruct model and its tokenizer; generate() runs on the untouched model.
        chats: messages with one user turn each.
        batch_size: rows decoded at once.
        max_new_tokens: tokens of an answer at most.
        repeat: runs of each way, in turn.
    Returns:
        `dict`: tokens/s of both (medians), their ratio, seconds of each run, and how many answers are identical.
    """
    config = SynthesisConfig(
        num_tokens=1 << 60,
        batch_size=min(batch_size, len(chats)),
        temperatures=(0.0,),
        max_user_tokens=1,  # none is written
        max_answer_tokens=max_new_tokens,
        max_turns=1,
        max_length=2 * max_new_tokens + max(len(tokenize(tokenizer, chat[0]["content"])) for chat in chats) + 128,
    )
    seconds: dict[str, list[float]] = {"generate": [], "synthesize": []}
    num_tokens: dict[str, int] = {}
    for _ in range(repeat):
        start = time.perf_counter()
        plain = _generate(target, tokenizer, chats, batch_size, max_new_tokens)
        seconds["generate"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with prepare_for_cpu(target):
            rows = list(Synthesizer(target, tokenizer, config, chats).run(iter(range(len(chats)))))
        seconds["synthesize"].append(time.perf_counter() - start)
    written = {row.index: row.tokens[slice(*row.spans[0])] for row in rows if row.spans}
    num_tokens["generate"] = sum(map(len, plain))
    num_tokens["synthesize"] = sum(map(len, written.values()))
    speeds = {way: num_tokens[way] / statistics.median(times) for way, times in seconds.items()}
    return {
        "num_prompts": len(chats),
        "num_tokens": num_tokens,
        "num_identical": sum(written.get(index) == answer for index, answer in enumerate(plain)),
        "seconds": seconds,
        "generate_tokens_per_second": speeds["generate"],
        "synthesize_tokens_per_second": speeds["synthesize"],
        "ratio": speeds["synthesize"] / speeds["generate"],
    }


def _generate(target, tokenizer, chats, batch_size: int, max_new_tokens: int) -> list[list[int]]:
    """Answers with the token that ends them, without padding."""
    eos = target.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    answers = []
    for start in range(0, len(chats), batch_size):
        prompts = [_prompt(tokenizer, chat) for chat in chats[start : start + batch_size]]
        longest = max(map(len, prompts))
        pad = next(iter(eos_ids))
        input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = target.generate(
            input_ids.to(target.device),
            attention_mask=mask.to(target.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        for tokens in output[:, longest:].tolist():
            end = next((index + 1 for index, token in enumerate(tokens) if token in eos_ids), len(tokens))
            answers.append(tokens[:end])
    return answers


def _prompt(tokenizer, chat: list[dict]) -> list[int]:
    """Token ids as the synthesizer joins them."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before = opening(tokenizer)
    words = chat[0]["content"]
    return tokenize(tokenizer, before) + tokenize(tokenizer, words) + tokenize(tokenizer, text[len(before) + len(words) :])


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines of chats, or in Spec-Bench's form.")],
    target: TargetOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded at once, for both ways.")] = 64,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts taken from the file.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer at most.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each way, in turn; medians count.")] = 3,
    json_file: JsonOption = None,
):
    """Tokens per second of `synthesize` over those of generate() in batches, greedy, on the same prompts, in turn."""
    logging.disable_progress_bar()
    with user_errors():
        model, tokenizer = load_target(target)
        users = ([turn for turn in chat if turn["role"] == "user"] for chat in read_chats(prompts))
        chats = [turns[:1] for turns in users if turns][:num_prompts]
        if not chats:
            raise ValueError(f"prompts: expected at least one chat with a user turn in {Path(prompts).name}, got none")
        figures = bench_synthesize(model, tokenizer, chats, batch_size, max_new_tokens, repeat)
    typer.echo(
        f"generate {figures['generate_tokens_per_second']:.1f} tokens/s, synthesize "
        f"{figures['synthesize_tokens_per_second']:.1f} tokens/s, ratio {figures['ratio']:.2f}; "
        f"identical answers: {figures['num_identical']} of {figures['num_prompts']}"
    )
    settings = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "repeat": repeat}
    write_record(json_file, "synthesize", model, settings, figures)
    report_file(json_file)


if __name__ == "__main__":
    app()
