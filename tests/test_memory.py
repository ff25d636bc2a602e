"""docs/memory.md: its formulas against the bytes of a tiny model's caches."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import PAD_ID, prompts, tiny_draft, tiny_target
from typer.testing import CliRunner

from benchmarks.memory import WAYS, app
from transformers_prism.decoding.tree_target import TreeTarget
from transformers_prism.modeling_prism import PrismDraftModel

pytestmark = pytest.mark.quick
PAGE = (Path(__file__).resolve().parent.parent / "docs" / "memory.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def formulas() -> dict:
    """The functions that the page states."""
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL).group(1), names)
    return names


def stored_bytes(cache) -> int:
    """Of the keys and values that a cache has reserved."""
    buffers = [buffer for layer in cache.layers for buffer in (layer.key_buffer, layer.value_buffer)]
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


@pytest.fixture
def held(monkeypatch):
    """Bytes at the end of a call: of the target's cache, of the draft's, and of the largest mask."""
    found = {"masks": 0}
    masks, finish = TreeTarget._masks, TreeTarget.finish

    def note_mask(self, tree, depths):
        mask = masks(self, tree, depths)
        found["masks"] = max(found["masks"], mask.numel() + self.committed.committed.numel())
        found["longest"] = max(found.get("longest", 0), mask.shape[3])
        return mask

    def note_caches(self, sequences):
        found["target"] = stored_bytes(self.cache)
        found["capacity"] = self.capacity
        finish(self, sequences)

    monkeypatch.setattr(TreeTarget, "_masks", note_mask)
    monkeypatch.setattr(TreeTarget, "finish", note_caches)
    return found


@pytest.fixture
def drafters(monkeypatch):
    """Those of the calls so far."""
    made, original = [], PrismDraftModel.make_drafter
    monkeypatch.setattr(PrismDraftModel, "make_drafter", lambda draft: made.append(original(draft)) or made[-1])
    return made


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
def test_memory_of_a_short_call_is_what_the_page_says(formulas, held, drafters, num_rows, context_kv):
    """Nothing has grown yet."""
    input_ids, mask = prompts(num_rows)
    target = tiny_target("llama")
    draft = tiny_draft(target, context_kv=context_kv)
    target.generate(
        input_ids,
        attention_mask=mask,
        assistant_model=draft,
        do_sample=False,
        max_new_tokens=20,
        pad_token_id=PAD_ID,
        return_dict_in_generate=True,
    )
    positions = formulas["first_positions"](input_ids.shape[1])
    assert held["target"] == formulas["cache_bytes"](4, num_rows, 2, 8, positions, 4)
    config = draft.config
    num_caches = config.num_processing_modules if context_kv == "own_module" else 1
    sizes = (num_rows, config.num_key_value_heads, config.head_dim)
    catching_up = formulas["cache_bytes"](config.num_layers_per_module * (num_caches - 1), *sizes, positions, 4)
    of_step_0 = formulas["cache_bytes"](config.num_layers_per_module, *sizes, positions - 1, 4)
    assert stored_bytes(drafters[-1].cache.cache) == catching_up + of_step_0
    assert held["masks"] <= formulas["mask_bytes"](num_rows, 16, held["longest"])


def test_memory_of_a_long_call_stays_below_what_the_page_says(formulas, held):
    """Buffers have grown several times."""
    input_ids, _ = prompts(1)
    target = tiny_target("llama", max_position_embeddings=512)
    target.generate(
        input_ids, assistant_model=tiny_draft(target), do_sample=False, max_new_tokens=300, pad_token_id=PAD_ID
    )
    most = formulas["most_positions"](input_ids.shape[1] + 300 + 16)
    assert formulas["cache_bytes"](4, 1, 2, 8, 300, 4) < held["target"] <= formulas["cache_bytes"](4, 1, 2, 8, most, 4)


def test_memory_of_static_layers_is_what_the_page_says(formulas, held):
    """A multiple of 256 positions."""
    input_ids, _ = prompts(1)
    target = tiny_target("llama")
    arguments = {"do_sample": False, "pad_token_id": PAD_ID, "cache_implementation": "static"}
    target.generate(input_ids, assistant_model=tiny_draft(target), max_new_tokens=20, **arguments)
    assert held["capacity"] == 256
    assert held["target"] == formulas["cache_bytes"](4, 1, 2, 8, 256, 4)


def test_memory_of_the_page_s_example(formulas):
    """46 080 bytes for each position of SmolLM2-135M."""
    assert formulas["cache_bytes"](30, 1, 3, 64, 1, 4) == 46_080
    assert round(46_080 * 8192 / 1e6) == 377
    assert torch.float32.itemsize == 4


@pytest.mark.slow
def test_peak_memory_is_measured_in_processes_of_their_own(tiny_folders):
    """A row for each way of decoding, each with what its own process took."""
    arguments = ["--target", tiny_folders[0], "--draft", tiny_folders[1], "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    for way in WAYS:
        assert re.search(rf"^ ?{way} +\d+ *$", result.output, flags=re.MULTILINE), result.output
