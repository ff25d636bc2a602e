"""The sweep over types of models: a part of it, that it can fail, and that what it wrote is what it found."""

import json
import subprocess
import sys
import time
from pathlib import Path

import compatibility
import pytest
import torch
from compatibility_models import all_types, build, small_config
from compatibility_page import faults_section, page, soak_section, tried_file, tried_types
from compatibility_runs import (
    DRAFTED,
    Case,
    _of_error,
    _rounds_checked,
    broken,
    compare,
    compare_once,
    run_case,
    thresholds,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transformers_prism import PrismConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_compatibility_quick_part_is_lossless(tmp_path):
    """The command's quick part: trees, a chain, refusals; what counts as drafted committed 2 tokens a round."""
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "tests.compatibility", "--quick", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())["results"]
    assert set(results) == set(compatibility.QUICK)
    outcomes = {name: result["outcome"] for name, result in results.items()}
    assert outcomes["llama"] == outcomes["gemma3_text"] == outcomes["gpt2"] == "tree"
    assert outcomes["lfm2"] == "chain"
    assert outcomes["kimi_linear"] == "chain"  # recurrent and full attention
    # Variants may be of plain steps for a part: across a rotary switch.
    drafted = {name: result["tokens_per_round"] for name, result in results.items() if result["outcome"] in DRAFTED}
    assert all(rate >= 2 for name, rate in drafted.items() if ":" not in name), drafted


@pytest.mark.parametrize("error", ["mask", "rows"])
def test_compatibility_broken_rounds_are_reported(error, one_thread):
    """A mask that is off by one, and keys that moved to a wrong place, are "different"."""
    case = Case("llama", "llama", runs=("greedy",))
    target = case.draw(1)
    assert compare(target, case, "greedy")["outcome"] == "tree"
    # A check of rounds would notice it.
    with broken(target, error), _rounds_checked(False):
        assert compare_once(target, case, "greedy")["outcome"] == "different"


def test_compatibility_model_that_proves_nothing_is_a_failure(one_thread):
    """A target whose logits are all the same could hide any error."""

    def silence(target):
        target.lm_head.register_forward_hook(lambda module, args, output: torch.zeros_like(output))

    result = run_case(Case("llama", "llama", prepare=silence))
    assert result["outcome"] == "unproven"
    assert "apart" in result["detail"]


def test_compatibility_lengths_that_stay_below_a_threshold_prove_nothing(one_thread):
    """A window of 40 is not passed by 33 tokens."""
    result = run_case(Case("mistral", "mistral", {"sliding_window": 40}, runs=("greedy",)))
    assert result["outcome"] == "unproven"
    assert "beyond sliding_window" in result["detail"]


@pytest.mark.quick
def test_compatibility_thresholds_are_those_of_the_text_part():
    """Windows of text count, rotary switches too; those of other parts do not."""
    config = small_config(CONFIG_MAPPING["gemma3"], {})
    assert thresholds(config) == {"sliding_window": 8}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
    config = small_config(CONFIG_MAPPING["llama"], {"rope_parameters": rope})
    assert thresholds(config) == {"original_max_position_embeddings": 24}


@pytest.mark.quick
def test_compatibility_errors_are_told_apart(one_thread):
    """A refusal by transformers before our code, one of ours with what was expected, and anything else."""
    target = build("llama")
    with pytest.raises(ValueError, match="expected") as ours:
        PrismConfig.from_target(CONFIG_MAPPING["t5"]())
    assert _of_error(ours.value)["detail"].startswith("transformers_prism: ")
    with pytest.raises(ValueError, match="num_return_sequences|do_sample") as theirs:
        target.generate(torch.ones(1, 3, dtype=torch.long), do_sample=False, num_return_sequences=2)
    assert _of_error(theirs.value)["detail"].startswith("transformers: ")
    with pytest.raises(AttributeError) as crash:
        PrismConfig.from_target(3)
    assert _of_error(crash.value)["outcome"] == "crash"


@pytest.mark.quick
def test_compatibility_case_is_ended_in_time(monkeypatch):
    """A case that hangs, and one whose process dies, are results too."""
    monkeypatch.setattr(compatibility, "run_case", lambda case: time.sleep(60))
    start = time.monotonic()
    assert compatibility.run_in_time(Case("llama", "llama"), 0.5)["outcome"] in compatibility.BAD
    assert time.monotonic() - start < 20
    monkeypatch.setattr(compatibility, "run_case", lambda case: sys.exit(3))
    assert compatibility.run_in_time(Case("llama", "llama"), 30)["outcome"] == "crash"


@pytest.mark.quick
def test_compatibility_sweep_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Results in the file are not made anew, unless that is asked for; a failure is the exit code."""
    calls = []

    def run(case, seconds):
        calls.append(case.name)
        return {"outcome": "different" if case.name == "gpt2" else "tree", "tokens_per_round": 2.5}

    monkeypatch.setattr(compatibility, "run_in_time", run)
    path = tmp_path / "results.json"
    assert compatibility.main(["--only", "mixtral", "--json", str(path)]) == 0
    assert compatibility.main(["--only", "mixtral", "--only", "doge", "--json", str(path)]) == 0
    assert calls == ["mixtral", "mixtral: eager attention", "doge"]
    assert compatibility.main(["--only", "doge", "--again", "--json", str(path)]) == 0
    assert calls[3:] == ["doge"]
    assert compatibility.main(["--only", "gpt2", "--json", str(path)]) == 1


@pytest.mark.quick
def test_compatibility_every_type_of_the_release_is_a_case():
    """Both mappings of transformers; a type with two classes is two cases."""
    from transformers.models.auto import modeling_auto

    names = all_types()
    assert set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(names)
    assert set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(names)
    assert names["gemma3 (image-text)" if "gemma3 (image-text)" in names else "gemma3"].startswith("Gemma3")
    assert {"qwen3_5", "qwen3_5 (image-text)"} <= set(names)


@pytest.mark.quick
def test_compatibility_types_count_as_their_weakest_case():
    """On every release, as every class; variants say nothing about a type."""
    def found(outcome, *model_types):
        return {"outcome": outcome, "model_types": model_types}

    results = {
        "5.23.0": {"a": found("tree", "a"), "b": found("tree", "b"), "d": found("tree", "d", "d_text")},
        "5.24.0": {
            "a": found("tree", "a"),
            "b": found("plain", "b"),
            "c": found("chain", "c"),
            "d": found("tree", "d", "d_text"),
            "d (image-text)": found("different", "d", "e"),
            "a: long": found("different", "a"),
        },
    }
    assert tried_types(results) == ["a", "c", "d_text"]
    namespace: dict = {}
    exec(tried_file(results), namespace)
    assert namespace["TRIED_TYPES"] == {"a", "c", "d_text"}
    text = page(results)
    assert "| `b` | tree | plain |" in text
    assert "## Different from plain decoding" in text


@pytest.mark.quick
def test_compatibility_page_tells_of_soak_and_faults():
    """Figures with the command that makes them; a difference is a figure, too."""
    versions = {"transformers": "5.24.0", "torch": "2.13.0"}
    tally = {**versions, "num_generations": 3002, "growth": 1.004, "tokens_per_round": 2.406, "differences": ["a"]}
    text = soak_section(tally | {"counts": {"drafted": 2300, "both raised": 32}})
    assert "--generations 3000" in text
    assert "| different from plain decoding | 1 |" in text
    assert "+0.4 %" in text
    lines = {"chain": {"places": 1500, "errors": ["MemoryError"], "faults": 500, "failed": 2}}
    text = faults_section({**versions, "lines": lines, "others": {"fork": 0}})
    assert "| chain | 1 | 1500 | 500 | 2 |" in text
    assert "| fork |  |  |  | 0 |" in text


@pytest.mark.quick
def test_compatibility_written_files_are_what_was_found():
    """`python -m tests.compatibility --update` would change nothing."""
    for path, text in compatibility.written_files().items():
        assert path.read_text(encoding="utf-8") == text, f"run python -m tests.compatibility --update: {path.name}"
    for results in compatibility.read_results(compatibility.RESULTS).values():
        assert not {name for name, result in results.items() if result["outcome"] in ("different", "crash")}
