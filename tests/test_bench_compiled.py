"""`bench generate` with transformers' compiled decoding, which takes its time to compile."""

import pytest
import torch
from tiny_models import tiny_draft, tiny_target, word_tokenizer

from transformers_prism.bench.generate import bench_generate, make_items
from transformers_prism.bench.methods import Contest, parse_methods
from transformers_prism.cli.demo import chat_inputs


@pytest.mark.slow
def test_bench_compiled_decodes_alike_and_compiles_once(one_thread):
    """Prompts of two lengths share one static cache: tokens of plain decoding, nothing compiled after the warm-up."""
    target = tiny_target("llama", seed=3)
    contest = Contest(target, tiny_draft(target), None, parse_methods(["compiled"], is_packed=False), max_length=40)
    texts = ("w30 w31 w32", "w33 w34 w35 w36 w37")
    records = [{"question_id": index, "category": "qa", "turns": [text]} for index, text in enumerate(texts)]
    items = make_items(records, [chat_inputs(word_tokenizer(), text) for text in texts], 1, pad_token_id=0)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    results, compiled = [], []
    for result in bench_generate(contest, items, {"max_new_tokens": 8, "do_sample": False}, repeat=2):
        results.append(result)
        compiled.append(counters["unique_graphs"])
    assert all(result.outcomes["compiled"].is_identical == [True] for result in results)
    assert compiled[0] == compiled[1] >= 1
