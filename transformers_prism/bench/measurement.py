"""One run of `bench generate`: its settings, its models, its file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from transformers_prism.bench.figures import as_json, differences, main_method
from transformers_prism.bench.generate import ItemResult, bench_generate, make_items
from transformers_prism.bench.methods import Contest, Method, load_assistant
from transformers_prism.bench.prompts import check_positions, contexts_of
from transformers_prism.bench.record import finished_part, prompts_sha256, record_head
from transformers_prism.training.progress_bar import ProgressBar
from transformers_prism.whole_files import write_json

BASELINE = "target.generate without a draft, on the same weights, in the same process, in turn"
_TREE_NAMES = ("tree", "tree_top_k", "tree_depth", "tree_num_nodes")


@dataclass
class GenerateMeasurement:
    """Settings of `bench generate`.

    Args:
        generate: arguments of generate() that all methods share.
        context: tokens that prompts are brought to; None leaves them as they are.
        repeat, warm_up, seed: as for [`bench_generate`].
        assistant: name of the model for assisted decoding, or None.
    """

    methods: list[Method]
    generate: dict
    prompts: str
    batch_size: int = 1
    context: int | None = None
    repeat: int = 3
    warm_up: int = 1
    seed: int = 0
    assistant: str | None = None

    def run(
        self, target, tokenizer, draft, weights: str, make_inputs: Callable[..., dict], chosen: list[dict],
        records: list[dict], path: Path | None, is_resumed: bool, console: Console
    ) -> dict:
        """Measure, writing the file after every prompt or batch; returns what [`as_json`] makes of it.

        Args:
            target, tokenizer, draft: the models, not prepared.
            weights: [`weights_sha256`] of the draft.
            make_inputs: of (tokenizer, prompt, device), gives the inputs of generate().
            chosen, records: prompts to decode, and all prompts of the file; text of the others may lengthen prompts.
            is_resumed: whether to keep what is in the file and to decode the rest.
        Raises:
            ValueError: if the file is of other settings, or the settings cannot be served.
        """
        rows = contexts_of(
            tokenizer, records, chosen, self.context, lambda text: make_inputs(tokenizer, text, target.device)
        )
        check_positions(target, rows, self.generate["max_new_tokens"])
        items = make_items(chosen, rows, self.batch_size, tokenizer.pad_token_id or 0)
        longest = max(item.inputs["input_ids"].shape[1] for item in items)
        assistant = load_assistant(self.assistant, target)
        contest = Contest(target, draft, assistant, self.methods, longest + self.generate["max_new_tokens"])
        settings = {**self._settings(contest, draft, len(chosen)), "prompts_sha256": prompts_sha256(rows)}
        head = record_head("generate", target, settings, weights)
        found = finished_part(path, head) if is_resumed and path is not None else None
        results = [ItemResult.from_json(content) for content in found["prompts"]] if found else []
        if results:
            console.print(f"{len(results)} of {len(items)} were finished before", style="dim")
        num_runs = len(self.methods) * self.repeat
        with ProgressBar("runs", len(items) * num_runs, completed=len(results) * num_runs, console=console) as bar:
            rest = items[len(results) :]
            try:
                for result in bench_generate(
                    contest, rest, self.generate, self.repeat, self.seed, self.warm_up, bar.advance
                ):
                    results.append(result)
                    if path is not None:
                        write_json(path, {**head, **as_json(results, self.methods)})
                    self._tell(result, f"{len(results)}/{len(items)}", console)
            except KeyboardInterrupt:
                console.print(f"{len(results)} of {len(items)} are finished; --resume measures the others")
                raise
            finally:
                contest.close()
        return as_json(results, self.methods)

    def _settings(self, contest: Contest, draft, num_prompts: int) -> dict:
        """The settings that decide the figures; a draft's card reads the tree of the main method here."""
        main = main_method(self.methods)
        used = contest.drafts.get(main.name, draft).generation_config
        return {
            "prompts": self.prompts,
            "num_prompts": num_prompts,
            "batch_size": self.batch_size,
            "context": self.context,
            "baseline": BASELINE,
            "generate": self.generate,
            "repeat": self.repeat,
            "warm_up": self.warm_up,
            "seed": self.seed,
            "methods": [method.name for method in self.methods],
            "main_method": main.name,
            "assistant": self.assistant,
            "packed": main.is_prepared,
            **{name: getattr(used, name, None) for name in _TREE_NAMES},
        }

    def _tell(self, result: ItemResult, count: str, console: Console) -> None:
        main = main_method(self.methods)
        figures = as_json([result], self.methods)["methods"][main.name]["summary"]
        tau = figures["acceptance_length_pooled"]
        console.print(
            f"{count} {result.task} {', '.join(map(str, result.question_ids))}: {main.name} identical "
            f"{figures['num_identical']} of {figures['num_prompts']}, tau {tau if tau is None else round(tau, 2)}, "
            f"ratio {figures['ratio']:.2f}",
            soft_wrap=True,
            highlight=False,
        )
        for line in differences(result):
            console.print(line, style="yellow", soft_wrap=True, highlight=False)
