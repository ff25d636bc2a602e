"""Compiled drafts: what asks for them, and that steps keep their shapes, trees and text."""

import pytest
import torch
from pretended_graphs import PretendedGraphs
from tiny_models import PAD_ID, prompts, tiny_draft, tiny_target, varied_target
from transformers import CompileConfig, DynamicCache

from transformers_prism.decoding import round_check
from transformers_prism.decoding.drafter import Drafter
from transformers_prism.decoding.static_shapes import static_shapes
from transformers_prism.decoding.tree_target import is_compiled
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.transformers_names import CACHE_KEYWORD

LENGTH = {"max_new_tokens": 40, "pad_token_id": PAD_ID}
ARGUMENTS = {**LENGTH, "do_sample": False}
EVERYWHERE = CompileConfig(backend="eager", mode=None, fullgraph=True, dynamic=False)
EVERYWHERE._compile_all_devices = True
STATIC = {"cache_implementation": "static", "compile_config": EVERYWHERE}
DRAFTS = {
    "one module": {"num_processing_modules": 1},
    "shared keys": {"num_processing_modules": 3, "num_layers_per_module": 2},
    "own keys": {"num_processing_modules": 2, "context_kv": "own_module"},
    "eagle3": {"module_form": "eagle3", "share_target_head": False},
    "eager attention": {"attn_implementation": "eager"},
}


@pytest.fixture
def graphs(monkeypatch):
    """In place of torch.compile."""
    pretended = PretendedGraphs()
    monkeypatch.setattr(torch, "compile", pretended.compile)
    return pretended


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def drawn(monkeypatch):
    """Every pool of candidates that is drawn: ids and parents."""
    pools, draw = [], Drafter.draw

    def drawing(*args, **kwargs):
        pool = draw(*args, **kwargs)
        pools.append((pool.token_ids.tolist(), pool.parents.tolist()))
        return pool

    monkeypatch.setattr(Drafter, "draw", drawing)
    return pools


def models(num_rows=1, **overrides):
    """Target, draft, prompts and mask; in float64, so that sums in another order choose the same nodes."""
    input_ids, mask = prompts(num_rows)
    target = varied_target("llama", input_ids, mask, **LENGTH).double()
    draft = tiny_draft(target, draft_vocab_size=40, **overrides).double()
    return target, draft, input_ids, mask


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "num_rows"), [*((kind, 1) for kind in DRAFTS), ("shared keys", 3)])
def test_a_compiled_draft_draws_the_same_trees_in_few_shapes(kind, num_rows, graphs, drawn):
    """Beside a target that grows and one that generate() compiles, whose outputs are overwritten alike; over 30 rounds."""
    target, draft, input_ids, mask = models(num_rows, **DRAFTS[kind])
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    runs = []
    for compile_config, arguments in ((None, {}), (EVERYWHERE, {}), (None, STATIC)):
        drawn.clear()
        draft.generation_config.compile_config = compile_config
        output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **arguments, **ARGUMENTS)
        assert torch.equal(output, plain)
        assert draft.last_speculation.declined is None
        runs.append(list(drawn))
    assert len(runs[0]) >= 30
    assert runs[1] == runs[2]
    # Sequences that have ended leave a batch only where shapes may change.
    assert runs[0] == runs[1] or num_rows > 1
    # Step 0 and later steps; with keys of its own each of two modules has these, and catches up on several steps at once.
    assert len(graphs.graphs["run_module"]) <= (2 if kind != "own keys" else 5) * 2  # caches of two calls
    assert graphs.num_runs > 100


@pytest.mark.quick
def test_rows_that_end_stay_and_automatic_trees_keep_their_shapes(graphs, cheap_rounds):
    """Of a batch with rows of different lengths."""
    target, draft, input_ids, mask = models(3)
    draft.generation_config.update(tree="auto", tree_top_k=4, compile_config=EVERYWHERE)
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    arguments = {**ARGUMENTS, "eos_token_id": int(plain[0, 14])}
    plain = target.generate(input_ids, attention_mask=mask, **arguments)
    output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **arguments)
    assert torch.equal(output, plain)
    assert len(graphs.graphs["run_module"]) <= 3


@pytest.mark.quick
def test_chats_go_on_whatever_is_compiled(graphs):
    """A turn compiled, one not, one with longer trees: what was read is kept, in other layers, and the text is plain's."""
    target, draft, input_ids, _ = models()
    turns = [input_ids, *(torch.tensor([[5 + turn, 9, 60]]) for turn in range(4))]
    settings = [{"compile_config": EVERYWHERE}, {"compile_config": EVERYWHERE}, {"compile_config": None}]
    settings += [{"compile_config": EVERYWHERE, "tree_depth": 100, "tree_top_k": 5}, {"disable_compile": True}]

    def chat(**assistant):
        cache, text = DynamicCache(config=target.config), torch.zeros((1, 0), dtype=torch.long)
        for turn, one in zip(turns, settings, strict=True):
            draft.generation_config.update(**{"disable_compile": False, **one})
            text = torch.cat((text, turn), dim=1)
            text = target.generate(text, **{CACHE_KEYWORD: cache}, **assistant, **{**ARGUMENTS, "max_new_tokens": 8})
            runs.append(graphs.num_runs)
        return text

    runs = []
    plain = chat()
    runs.clear()
    assert torch.equal(chat(assistant_model=draft), plain)
    assert 0 < runs[0] < runs[1] == runs[2] < runs[3] == runs[4]


@pytest.mark.quick
def test_single_steps_of_a_compiled_target_are_not_overwritten(graphs, monkeypatch):
    """A target that nobody has tried is compared with single steps, one run of a graph after the other."""
    monkeypatch.setattr(round_check, "TRIED_TYPES", frozenset())
    target, draft, input_ids, mask = models(2)
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **STATIC, **ARGUMENTS)
    assert torch.equal(output, plain)
    assert draft.last_speculation.stopped_drafting is None


@pytest.mark.quick
def test_what_asks_for_a_compiled_draft(graphs):
    """Its own compile_config, or the call's where generate() compiles the target; disable_compile of either says no."""
    target, draft, _, _ = models()
    settings = TreeSettings("static", 3, 4, 15)
    other = CompileConfig(backend="aot_eager", mode=None)
    call, own = target.generation_config, draft.generation_config
    call.max_length = 100

    def found(is_target_compiled=False, **changes):
        for config, prefix in ((call, "call_"), (own, "own_")):
            config.compile_config = changes.get(f"{prefix}config")
            config.disable_compile = changes.get(f"{prefix}off", False)
        shapes = static_shapes(draft, settings, call, is_target_compiled)
        return shapes and graphs.configs[-1]["backend"]

    assert found() is None
    assert found(True) is None
    assert found(call_config=EVERYWHERE) is None
    assert found(True, call_config=EVERYWHERE) == "eager"
    assert found(own_config=other) == "aot_eager"
    assert found(True, call_config=EVERYWHERE, own_config=other) == "aot_eager"
    assert found(own_config=other, own_off=True) is None
    assert found(own_config=other, call_off=True) is None
    assert len(graphs.configs) == 2  # once for equal settings
    shapes = static_shapes(draft, settings, call, False)
    assert shapes is None


@pytest.mark.quick
def test_capacity_only_grows(graphs):
    """So that calls share what is compiled."""
    _, draft, _, _ = models()
    draft.generation_config.compile_config = EVERYWHERE
    call, sizes = draft.generation_config, []
    for max_length in (100, 600, 100):
        call.max_length = max_length
        sizes.append(static_shapes(draft, TreeSettings("static", 3, 4, 15), call, False).capacity)
    assert sizes == [256, 768, 768]


@pytest.mark.quick
def test_an_error_in_a_compiled_step_leaves_the_chat_as_it_was(graphs, monkeypatch):
    """And the next call works."""
    target, draft, input_ids, _ = models()
    plain = target.generate(input_ids, **ARGUMENTS)
    draft.generation_config.compile_config = EVERYWHERE
    cache = DynamicCache(config=target.config)
    with monkeypatch.context() as patched:
        patched.setattr(type(draft.processing_modules[0]), "forward", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.generate(input_ids, **{CACHE_KEYWORD: cache}, assistant_model=draft, **ARGUMENTS)
    assert cache.get_seq_length() == 0
    output = target.generate(input_ids, **{CACHE_KEYWORD: cache}, assistant_model=draft, **ARGUMENTS)
    assert torch.equal(output, plain)


@pytest.mark.slow
def test_nothing_is_compiled_anew_in_30_rounds(fresh_compiler, drawn):
    """By torch's compiler, draft and target: two graphs for all three modules of the draft, and none in a second call, with
    other weights in the same places."""
    target, draft, input_ids, _ = models(num_processing_modules=3)
    compiled, counters = [], torch._dynamo.utils.counters["stats"]
    counters.clear()
    runs = []
    for arguments in ({}, STATIC, {}, STATIC):
        if len(runs) == 2:
            for parameter in (*target.parameters(), *draft.parameters()):
                parameter.data.mul_(1.01)
        drawn.clear()
        stance = "fail_on_recompile" if len(runs) == 3 else "default"
        with torch.compiler.set_stance(stance):
            output = target.generate(input_ids, assistant_model=draft, **arguments, **ARGUMENTS)
        runs.append((output.tolist(), list(drawn)))
        compiled.append(counters["unique_graphs"])
    assert len(runs[0][1]) >= 30
    assert runs[0] == runs[1]
    assert runs[2] == runs[3]
    assert runs[0] != runs[2]
    # Read and step of the draft; a tree of 16 nodes, a plain step and what lies between of the target.
    assert compiled[0] == 0
    assert compiled[1] <= 2 + 3
    assert compiled[3] == compiled[1]


@pytest.mark.slow
def test_a_draft_that_its_user_compiled_keeps_its_shapes(fresh_compiler):
    """By `draft.forward`; its prompts run uncompiled."""
    target, draft, input_ids, _ = models(num_processing_modules=2)
    plain = target.generate(input_ids, **ARGUMENTS)
    draft.forward = torch.compile(draft.forward, backend="eager", dynamic=False, fullgraph=True)
    assert is_compiled(draft)
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for prompt in (input_ids, input_ids[:, :-1]):
        output = target.generate(prompt, assistant_model=draft, **ARGUMENTS)
        assert counters["unique_graphs"] <= 3
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **ARGUMENTS), plain)
    assert output.shape[1] == plain.shape[1] - 1


@pytest.mark.slow
def test_a_draft_compiled_by_inductor_draws_what_it_draws_plainly(fresh_compiler, drawn):
    """Generated code for the CPU."""
    target, draft, input_ids, _ = models(num_processing_modules=1)
    runs = []
    for compile_config in (None, CompileConfig(mode="default", dynamic=False)):
        draft.generation_config.compile_config = compile_config
        drawn.clear()
        output = target.generate(input_ids, assistant_model=draft, **ARGUMENTS)
        runs.append((output.tolist(), list(drawn)))
    assert runs[0] == runs[1]


@pytest.mark.quick
def test_targets_and_drafts_are_left_as_they_are(graphs):
    """Nothing of a compiled call is saved or copied with a draft, and a draft can be collected."""
    target, draft, input_ids, _ = models()
    draft.generation_config.compile_config = EVERYWHERE
    before = set(vars(draft))
    target.generate(input_ids, assistant_model=draft, **ARGUMENTS)
    assert set(vars(draft)) == before
    assert not is_compiled(tiny_target())


def test_a_compiled_draft_in_a_chat_that_hands_over_new_tokens_alone():
    """What the cache holds already takes room, too."""
    target = tiny_target("llama", 3, max_position_embeddings=4096)
    texts = []
    for draft in (None, tiny_draft(target)):
        if draft is not None:
            draft.compile(disable=True)
        cache, mask, text = DynamicCache(config=target.config), torch.zeros((1, 0), dtype=torch.long), []
        for turn in range(4):
            new, _ = prompts(1, length=90, seed=turn)
            mask = torch.cat((mask, torch.ones_like(new)), dim=1)
            ids = target.generate(
                new, attention_mask=mask, assistant_model=draft, max_new_tokens=6, do_sample=False, pad_token_id=PAD_ID, **{CACHE_KEYWORD: cache}
            )
            mask = torch.cat((mask, torch.ones((1, 5), dtype=torch.long)), dim=1)
            text.append(ids.tolist())
        texts.append(text)
    assert texts[0] == texts[1]


def test_a_draft_without_a_generation_configuration_drafts():
    target = tiny_target("llama", 3)
    input_ids, _ = prompts(1)
    draft = tiny_draft(target)
    draft.generation_config = None
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD_ID}
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **settings), target.generate(input_ids, **settings))
    assert draft.last_speculation.declined is None
