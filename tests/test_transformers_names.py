"""Names of transformers that differ between releases: one file knows them, and chooses by what is there."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PAD_ID, prompts, scripted_draft, varied_target
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from transformers_prism import transformers_names
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_keyword, cache_of, output_embeddings

PACKAGE = Path(transformers_names.__file__).parent
# `_x` of an object that is not this package's own.
PRIVATE = re.compile(r"\b(?:target|model|config|generation_config|cache|GenerationMixin|layer)\._(?!_|borrowed)[a-z]\w*")


def test_one_file_knows_private_names():
    """Of transformers' models, configurations and caches."""
    found = {
        f"{path.name}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "transformers_names.py"
        for name in PRIVATE.findall(path.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_the_keyword_is_the_one_in_the_signature(name):
    """Of remote code, too, which may be older than this release."""
    namespace: dict = {}
    exec(f"def forward(self, input_ids, {name}=None): pass", namespace)
    assert cache_keyword(namespace["forward"]) == name
    assert cache_keyword(lambda self, **kwargs: None) == CACHE_KEYWORD


def test_a_cache_is_found_under_any_name():
    """In keyword arguments and in outputs, without a warning."""
    cache = DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_of({"past_key_values": cache}) is cache_of({"cache": cache}) is cache
        assert cache_of(CausalLMOutputWithPast(**{CACHE_KEYWORD: cache})) is cache
    assert cache_of({"attention_mask": torch.ones(1, 2), "cache": None}) is None


@pytest.mark.quick
def test_serving_names_its_extra(monkeypatch):
    """Where a package of it is missing."""
    monkeypatch.setattr(transformers_names.importlib.util, "find_spec", lambda name: None if name == "openai" else name)
    with pytest.raises(ImportError, match="got none named openai; pip install 'transformers\\[serving\\]'"):
        transformers_names.serve_parts()


@pytest.mark.quick
def test_a_draft_drafts_on_this_release():
    """Not declined, and more than one token a round, without any deprecation warning."""
    prompt, _ = prompts(1)
    arguments = {"max_new_tokens": 40, "pad_token_id": PAD_ID}
    target = varied_target("llama", prompt, **arguments)
    plain = target.generate(prompt, do_sample=False, **arguments)
    draft = scripted_draft(target, plain, prompt.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafted = target.generate(prompt, assistant_model=draft, do_sample=False, **arguments)
    assert torch.equal(plain, drafted)
    assert draft.last_speculation.declined is None
    assert draft.last_speculation.acceptance_length > 1.5


def test_a_head_that_a_composite_model_does_not_hand_out_is_its_text_parts():
    """Where neither has one, there is none."""
    class Part(torch.nn.Module):
        def __init__(self, head, **parts):
            super().__init__()
            self.own = [head]
            for name, part in parts.items():
                setattr(self, name, part)

        def get_output_embeddings(self):
            return self.own[0]

    head = SimpleNamespace()
    assert output_embeddings(Part(head)) is head
    assert output_embeddings(Part(None, vision=torch.nn.Linear(2, 2), language_model=Part(head))) is head
    assert output_embeddings(Part(None, language_model=Part(None))) is None
