"""Drafts in vLLM's engine, on a CPU, against transformers-prism's own chain and plain decoding."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM, which `make test-vllm` installs")

from transformers_prism_vllm.model import PrismDraftModel
from vllm import SamplingParams

NAMES = "m1_l1 m1_l4 m2_l1 m2_l4 m4_l1 m4_l4 m8_map reduced own_layers two_layers window norms scaled granite qwen3".split()


def check_rounds(found: list[list[int]], expected: list[list[int]]) -> None:
    """Rounds of one sequence; transformers-prism drafts no more than the tokens that are still wanted."""
    assert len(found) >= len(expected) > 8
    for found_ids, expected_ids in zip(found, expected, strict=False):
        assert found_ids[: len(expected_ids)] == expected_ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("in_float32")
def test_engine_drafts_as_own_chain(name, cases, engine, rounds, greedy):
    """The text is the target's, and each round's draft tokens are those of transformers-prism."""
    llm = engine(name)
    for index, prompt in enumerate(cases.prompts):
        rounds.clear()
        assert greedy(llm, prompts=[prompt]) == [cases.cases[name]["tokens"][index]]
        check_rounds([ids for (ids,) in rounds], cases.cases[name]["rounds"][index])


@pytest.mark.usefixtures("in_float32")
def test_engine_compiled_target(cases, engine, rounds, greedy):
    """The target is compiled, the draft is not: its modules still switch by step."""
    llm = engine("m2_l4", enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    for index, prompt in enumerate(cases.prompts):
        rounds.clear()
        assert greedy(llm, prompts=[prompt]) == [cases.cases["m2_l4"]["tokens"][index]]
        check_rounds([ids for (ids,) in rounds], cases.cases["m2_l4"]["rounds"][index])


def test_engine_frozen_counter_shows(cases, engine, rounds, greedy, monkeypatch):
    """A draft step that stays 0, as in a replayed graph, drafts other tokens, and the guard says so."""
    forward, errors = PrismDraftModel.forward, []

    def frozen(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        self.draft_step = 0
        return output

    monkeypatch.setattr(PrismDraftModel, "forward", frozen)
    monkeypatch.setattr("transformers_prism_vllm.model.logger.error_once", lambda *args: errors.append(args[0] % args[1:]))
    assert greedy(engine("m2_l4"), prompts=cases.prompts[1:2]) == [cases.cases["m2_l4"]["tokens"][1]]
    with pytest.raises(AssertionError):
        check_rounds([ids for (ids,) in rounds], cases.cases["m2_l4"]["rounds"][1])
    assert "expected 4 draft steps in each round, got 0" in errors[0]


def test_engine_wrong_map_shows(cases, engine, rounds, greedy, tmp_path):
    """Another map of draft steps to modules drafts other tokens: modules do switch by step."""
    folder = shutil.copytree(cases.draft("m2_l4"), tmp_path / "draft")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "draft_step_to_module": [0, 0, 1]}))
    llm = engine("m2_l4", speculative={"model": str(folder)})
    assert greedy(llm, prompts=cases.prompts[1:2]) == [cases.cases["m2_l4"]["tokens"][1]]
    with pytest.raises(AssertionError):
        check_rounds([ids for (ids,) in rounds], cases.cases["m2_l4"]["rounds"][1])


def test_engine_half_weights(cases, engine, rounds, greedy):
    """Weights in float16 draft nearly the same; the text is the target's."""
    llm = engine("m2_l4")
    assert greedy(llm) == cases.cases["m2_l4"]["tokens"]
    assert share_of_rounds(rounds, cases.cases["m2_l4"]["rounds"], cases.num_steps) > 0.9


def share_of_rounds(found: list[list[list[int]]], expected: list[list[list[int]]], num_steps: int) -> float:
    """How many of the whole rounds of several sequences vLLM's proposer drafted, in whatever batch."""
    drafted = Counter(tuple(ids) for batch in found for ids in batch)
    whole = Counter(tuple(ids) for rounds in expected for ids in rounds if len(ids) == num_steps)
    return 1 - (whole - drafted).total() / whole.total()


@pytest.mark.usefixtures("in_float32")
def test_engine_batch(cases, engine, rounds, greedy):
    """Four prompts at once."""
    case = cases.cases["m2_l4"]
    assert greedy(engine("m2_l4"), at_once=True) == case["tokens"]
    assert share_of_rounds(rounds, case["rounds"], cases.num_steps) == 1


@pytest.mark.usefixtures("in_float32")
def test_engine_batch_with_chunked_prefill(cases, engine, rounds, greedy):
    """Prompts that are read in pieces of up to 24 tokens while others are in their rounds. At the end of a piece vLLM 0.32
    hands the draft the prompt's last token in place of the next one, so that some rounds differ."""
    case = cases.cases["m2_l4"]
    llm = engine("m2_l4", max_num_batched_tokens=24, enable_prefix_caching=False)
    assert greedy(llm, at_once=True) == case["tokens"]
    assert share_of_rounds(rounds, case["rounds"], cases.num_steps) > 0.9


@pytest.mark.usefixtures("in_float32")
def test_engine_prefix_caching(cases, engine, rounds, greedy):
    """A prompt whose beginning is in the cache, the draft's keys and values with it."""
    llm = engine("m2_l4", block_size=32, enable_prefix_caching=True, disable_log_stats=False)
    for _ in range(2):
        rounds.clear()
        assert greedy(llm, prompts=cases.prompts[3:]) == cases.cases["m2_l4"]["tokens"][3:]
        check_rounds([ids for (ids,) in rounds], cases.cases["m2_l4"]["rounds"][3])
    hits = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:prefix_cache_hits")
    assert hits >= 32


@pytest.mark.usefixtures("in_float32")
def test_engine_top_tokens(cases, engine, rounds, greedy):
    """`use_local_argmax_reduction` takes the best token without logits over the whole vocabulary."""
    llm = engine("reduced", speculative={"use_local_argmax_reduction": True})
    assert greedy(llm, prompts=cases.prompts[:1]) == cases.cases["reduced"]["tokens"][:1]
    check_rounds([ids for (ids,) in rounds], cases.cases["reduced"]["rounds"][0])


def test_engine_bfloat16(cases, engine, rounds, greedy):
    """In bfloat16 most rounds begin as those of float32."""
    tokens = greedy(engine("m2_l4", dtype="bfloat16"), prompts=cases.prompts[1:2])
    assert len(tokens[0]) == cases.num_tokens
    assert rounds[0][0][:2] == cases.cases["m2_l4"]["rounds"][1][0][:2]


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_engine_sampling_keeps_distribution(method, cases, engine):
    """The first two tokens of many samples are distributed as the target says; the second one was drafted or drawn anew. By
    the bound of Bretagnolle, Huber and Carol, 2 000 samples over 9 outcomes are further than 0.06 from it with a probability
    below 0.4 %."""
    from transformers import AutoModelForCausalLM

    num_samples, prompt, temperature = 2000, cases.prompts[1], 0.7
    target = AutoModelForCausalLM.from_pretrained(cases.target("m2_l4"), dtype=torch.float32)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        first = (target(ids).logits[0, -1] / temperature).softmax(-1)
        continued = torch.cat((ids.expand(len(first), -1), torch.arange(len(first))[:, None]), dim=1)
        second = (target(continued).logits[:, -1] / temperature).softmax(-1)
    pairs = (first[:, None] * second).flatten()
    expected, chosen = pairs.topk(8)
    llm = engine("m2_l4", max_num_seqs=64, speculative={"draft_sample_method": method, "num_speculative_tokens": 2})
    settings = SamplingParams(temperature=temperature, max_tokens=4, ignore_eos=True, detokenize=False, n=num_samples, seed=7)
    output = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)[0]
    found = Counter(sample.token_ids[0] * len(first) + sample.token_ids[1] for sample in output.outputs)
    shares = torch.tensor([found[pair] / num_samples for pair in chosen.tolist()])
    distance = ((shares - expected).abs().sum() + (shares.sum() - expected.sum()).abs()) / 2
    assert distance < 0.06


def test_engine_reads_stored_norm(cases, engine, rounds, greedy, tmp_path):
    """A draft that carries the target's final norm needs no file of the target for it."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(cases.draft("m1_l1"), tmp_path / "draft")
    norm = load_file(Path(cases.target("m1_l1"), "model.safetensors"))["model.norm.weight"]
    save_file({"target_final_norm": 2 * norm}, folder / "target_final_norm.safetensors")
    greedy(engine("m1_l1", speculative={"model": str(folder)}), prompts=cases.prompts[:1])
    with pytest.raises(AssertionError):  # twice as much is another input
        check_rounds([ids for (ids,) in rounds], cases.cases["m1_l1"]["rounds"][0])


def other_config(cases, tmp_path, name: str, **fields) -> str:
    """A copy of a draft with other fields in its config.json."""
    folder = shutil.copytree(cases.draft(name), tmp_path / "draft")
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **fields}))
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"module_form": "eagle3"}, "module_form: expected 'prism', got 'eagle3'"),
        ({"context_kv": "own_module"}, "context_kv: expected 'prefill_module', got 'own_module'"),
        ({"num_processing_modules": 3, "draft_step_to_module": [0, 1, 2]}, r"processing_modules\.2\.\S+ is missing"),
        ({"vocab_size": 98}, "vocab_size: expected 98 .draft., got 97 .target."),
    ],
)
def test_engine_refuses_drafts(fields, message, cases, engine, tmp_path):
    """What would be useless is refused at the start, with the reason."""
    with pytest.raises(Exception, match=message):  # pydantic's ValidationError, or ValueError
        engine("m2_l4", speculative={"model": other_config(cases, tmp_path, "m2_l4", **fields)})


@pytest.mark.parametrize(
    ("speculative", "settings", "message"),
    [
        ({"method": "draft_model"}, {}, "method: expected 'eagle3', got 'draft_model'"),
        ({}, {"enable_lora": True}, "enable_lora: expected False"),
        ({"disable_padded_drafter_batch": True}, {}, "disable_padded_drafter_batch: expected False"),
    ],
)
def test_engine_refuses_settings(speculative, settings, message, cases, engine):
    """So are settings of the engine."""
    with pytest.raises(ValueError, match=message):
        engine("m2_l4", speculative=speculative, **settings)


def test_engine_refuses_other_target(cases, engine):
    """A target of another shape, both sides named."""
    with pytest.raises(ValueError, match=r"this draft was made for another target\. .*\(draft\), got .*\(target\)"):
        engine("m2_l4", target=cases.target("qwen3"))
