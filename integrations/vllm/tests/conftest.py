"""Engines of vLLM with tiny models that `make_cases.py` wrote; without vLLM or these models the tests are skipped."""

import gc
import json
import os
from pathlib import Path

# Before vLLM reads them: the engine in this process, one GB for keys and values.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


class Cases:
    """What `make_cases.py` wrote.

    Args:
        folder (`Path`): where.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        about = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        self.prompts, self.num_steps, self.num_tokens = about["prompts"], about["num_steps"], about["num_tokens"]
        self.cases = about["cases"]

    def target(self, name: str) -> str:
        """Folder of a case's target."""
        return str(self.folder / "targets" / self.cases[name]["target"])

    def draft(self, name: str) -> str:
        """Folder of a case's draft."""
        return str(self.folder / "drafts" / name)


@pytest.fixture(scope="session")
def cases() -> Cases:
    """Tiny targets, drafts and the rounds of transformers-prism's own chain."""
    folder = os.environ.get("PRISM_VLLM_CASES")
    if not folder or not Path(folder, "cases.json").is_file():
        pytest.skip("no tiny models: `python integrations/vllm/tests/make_cases.py FOLDER`, then PRISM_VLLM_CASES=FOLDER")
    return Cases(Path(folder))


@pytest.fixture
def rounds(monkeypatch) -> list[list[list[int]]]:
    """Draft tokens of each call of vLLM's proposer, for each sequence."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    noted, propose = [], SpecDecodeBaseProposer.propose

    def noting(self, *args, **kwargs):
        draft_token_ids = propose(self, *args, **kwargs)
        noted.append(draft_token_ids.tolist())
        return draft_token_ids

    monkeypatch.setattr(SpecDecodeBaseProposer, "propose", noting)
    return noted


@pytest.fixture
def in_float32(monkeypatch):
    """A draft's weights as they are, where they would be packed in float16."""
    from transformers_prism_vllm import half_linear, model

    for module in (half_linear, model):
        monkeypatch.setattr(module, "takes_half", lambda weight: False)


@pytest.fixture
def engine(cases):
    """A function that makes an engine for a case's draft; it ends with the test."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    made = []

    def make(name: str, target: str | None = None, speculative: dict | None = None, **settings):
        draft = {"method": "eagle3", "model": cases.draft(name), "num_speculative_tokens": cases.num_steps}
        defaults = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True}
        draft.update(speculative or {})
        made.append(LLM(target or cases.target(name), speculative_config=draft, **{**defaults, **settings}))
        return made[-1]

    yield make
    # Left to the garbage collector, an engine would take down the process groups of the next one.
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture
def greedy(cases):
    """A function that continues prompts greedily, one after the other or at once; returns the tokens of each."""
    from vllm import SamplingParams

    def run(llm, at_once: bool = False, prompts=None) -> list[list[int]]:
        settings = SamplingParams(temperature=0, max_tokens=cases.num_tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts or cases.prompts]
        batches = [prompts] if at_once else [[prompt] for prompt in prompts]
        outputs = [output for batch in batches for output in llm.generate(batch, settings, use_tqdm=False)]
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run
