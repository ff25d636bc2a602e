"""The target's half of a round where shapes must not change: static caches and compiled targets."""

import pytest
import torch
from tiny_models import PAD_ID, observer, prompts, scripted_draft, tiny_target, varied_target
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import StaticLayer

from transformers_prism.decoding import cache as cache_module
from transformers_prism.decoding import tree_target
from transformers_prism.decoding.tree_target import _static_size_within, is_compiled, static_size
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

LENGTH = {"max_new_tokens": 30, "pad_token_id": PAD_ID}
ARGUMENTS = {**LENGTH, "do_sample": False}
EAGER = CompileConfig(backend="eager", mode=None)
EAGER._compile_all_devices = True
# How a user compiles a target, and what generate() has to be told then.
WAYS = {
    "forward": (lambda target: setattr(target, "forward", torch.compile(target.forward, backend="eager")), {}),
    "module": (lambda target: target.compile(backend="eager"), {}),
    "layers": (lambda target: [layer.compile(backend="eager") for layer in target.model.layers], {}),
    "generate": (lambda target: None, {"cache_implementation": "static", "compile_config": EAGER}),
}


def scripted(architecture="llama", num_rows=1, length=9, **settings):
    """Target, plain output, scripted draft and prompts."""
    input_ids, mask = prompts(num_rows, length)
    target = varied_target(architecture, input_ids, mask, **LENGTH)
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    return target, plain, scripted_draft(target, plain, length, **settings), input_ids, mask


def num_compiled() -> int:
    """Graphs that torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh_compiler():
    """Nothing is compiled before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.quick
def test_static_sizes_are_few_and_enclose_every_tree():
    """The size that a tree is padded to always fits where a tree of its number of nodes was allowed."""
    assert {static_size(num_nodes) for num_nodes in range(1, 65)} == {1, 8, 16, 32, 64}
    assert static_size(65) == 128
    for room in range(1, 200):
        allowed = _static_size_within(room)
        assert static_size(allowed) == allowed <= room


@pytest.mark.quick
@pytest.mark.parametrize("way", ["forward", "module", "layers", "base"])
def test_compiled_targets_are_recognised(way):
    """Whatever part of them is compiled; none is run here."""
    target = tiny_target("llama")
    assert not is_compiled(target)
    if way == "base":
        target.model = torch.compile(target.model, backend="eager")
    else:
        WAYS[way][0](target)
    assert is_compiled(target)


def check_nothing_is_compiled_anew(prepare, architecture="llama", num_rows=1, **arguments):
    """Warm up with one call after another until every size has been met; from then on nothing is compiled."""
    input_ids, mask = prompts(num_rows)
    # Tracing takes seconds for each layer.
    target = tiny_target(architecture, seed=1, num_hidden_layers=2)
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    assert len(set(plain[0, 9:].tolist())) > 8
    prepare(target)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    graphs, num_plain_steps = [], []
    for seed in range(8):
        draft.seed = seed
        output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **arguments, **ARGUMENTS)
        assert torch.equal(output, plain)
        assert draft.last_speculation.declined is None
        graphs.append(num_compiled())
        num_plain_steps.append(sum(tree.num_nodes == 0 for tree in draft.last_speculation.trees))
    assert sum(num_plain_steps[:4]) > 0
    assert 0 < graphs[3] == graphs[-1]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_compiled_targets_are_not_compiled_anew(way, fresh_compiler):
    """Whichever way a target is compiled; other accepted paths compile nothing, and the text is plain's."""
    prepare, arguments = WAYS[way]
    check_nothing_is_compiled_anew(prepare, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_compiled_targets_of_batches_and_windows_are_not_compiled_anew(architecture, fresh_compiler):
    """Rows of different lengths and ends, sliding windows; one graph for each size, none of which is broken."""

    def prepare(target):
        target.forward = torch.compile(target.forward, backend="eager", dynamic=False, fullgraph=True)

    check_nothing_is_compiled_anew(prepare, architecture, num_rows=3)


@pytest.mark.slow
def test_a_target_compiled_by_inductor_writes_what_it_writes_plainly(fresh_compiler):
    """Generated code for the CPU, for trees of eight nodes and for plain steps."""
    input_ids, mask = prompts(1)
    target = tiny_target("llama", seed=1, num_hidden_layers=1)
    plain = target.generate(input_ids, attention_mask=mask, **ARGUMENTS)
    draft = scripted_draft(target, plain, input_ids.shape[1], tree_num_nodes=7)
    compile_config = CompileConfig(mode=None, dynamic=False)
    compile_config._compile_all_devices = True
    arguments = {"cache_implementation": "static", "compile_config": compile_config, **ARGUMENTS}
    output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **arguments)
    assert torch.equal(output, plain)
    assert num_compiled() > 0


@pytest.mark.quick
@pytest.mark.parametrize("tree", ["static", "auto"])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "qwen2_mixed_windows", "mistral"])
def test_a_callers_static_cache_is_filled_to_the_last_slot(architecture, num_rows, tree, cheap_rounds):
    """It has room for what plain decoding writes and nothing more; it then holds what plain would have left."""
    target, plain, draft, input_ids, mask = scripted(architecture, num_rows, tree=tree)
    size = plain.shape[1] - 1
    caches = []
    for assistant in ({}, {"assistant_model": draft}):
        cache = StaticCache(config=target.config, max_cache_len=size)
        output = target.generate(input_ids, attention_mask=mask, **{CACHE_KEYWORD: cache}, **assistant, **ARGUMENTS)
        assert torch.equal(output, plain)
        caches.append(cache)
    assert draft.last_speculation.declined is None
    assert draft.last_speculation.acceptance_length > 1.2
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert type(a) is type(b)
        assert int(a.get_seq_length()) == int(b.get_seq_length()) == size
        torch.testing.assert_close(a.keys[:, :, 4:], b.keys[:, :, 4:], atol=1e-4, rtol=1e-4)


@pytest.mark.quick
def test_a_callers_static_cache_is_used_in_place():
    """No copy is made for one row: trees shrink where its room ends, and its tensors stay where they are."""
    target, plain, draft, input_ids, _ = scripted()
    cache = StaticCache(config=target.config, max_cache_len=plain.shape[1] - 1)
    target(input_ids[:, :1], **{CACHE_KEYWORD: cache})
    cache.reset()
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    target.generate(input_ids, **{CACHE_KEYWORD: cache}, assistant_model=draft, **ARGUMENTS)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses
    assert all(type(layer) is StaticLayer for layer in cache.layers)
    sizes = [tree.num_nodes for tree in draft.last_speculation.trees]
    assert sizes[0] == 12
    assert set(sizes) <= {12, 7, 0}


@pytest.mark.quick
def test_a_full_static_cache_stops_with_an_error():
    """One position less than plain decoding needs; the cache is left as it was."""
    target, plain, draft, input_ids, _ = scripted()
    cache = StaticCache(config=target.config, max_cache_len=plain.shape[1] - 2)
    with pytest.raises(ValueError, match="expected a static cache with room for the next token, got one of 37"):
        target.generate(input_ids, **{CACHE_KEYWORD: cache}, assistant_model=draft, **ARGUMENTS)
    assert int(cache.get_seq_length()) == 0
    assert all(type(layer) is StaticLayer for layer in cache.layers)


@pytest.mark.quick
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2_mixed_windows"])
@pytest.mark.parametrize("max_holes", [2, 1000])
def test_caches_with_holes_give_plain_decodings_text_and_cache(architecture, max_holes, monkeypatch):
    """Whether they are closed every few rounds or at the end; windows count keys, not holes. Both go on alike."""
    monkeypatch.setattr(tree_target, "_MAX_HOLES", max_holes)
    target, plain, draft, input_ids, mask = scripted(architecture, num_rows=3)
    outputs = []
    for assistant in ({}, {"assistant_model": draft}):
        arguments = {**ARGUMENTS, **assistant, "return_dict_in_generate": True}
        first = target.generate(input_ids, attention_mask=mask, **arguments)
        assert torch.equal(first.sequences, plain)
        longer = torch.cat((mask, mask.new_ones(3, plain.shape[1] - mask.shape[1])), dim=1)
        cache = cache_of(first)
        outputs.append(target.generate(plain, attention_mask=longer, **{CACHE_KEYWORD: cache}, **ARGUMENTS))
    assert draft.last_speculation.acceptance_length > 1.2
    assert len({tuple(row) for row in draft.last_speculation.accepted_per_round}) > 1
    assert torch.equal(*outputs)


@pytest.mark.quick
def test_rounds_of_chains_move_no_keys(monkeypatch):
    """However uneven rows are: what was accepted of a chain is in its place already."""
    monkeypatch.setattr(tree_target, "_MAX_HOLES", 1000)
    moved = []
    monkeypatch.setattr(cache_module, "compact_cache", lambda *arguments: moved.append(1))
    target, plain, draft, input_ids, mask = scripted(num_rows=3, tree="chain", tree_depth=4)
    output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **ARGUMENTS)
    assert torch.equal(output, plain)
    assert len({len(row) for row in draft.last_speculation.accepted_per_round}) > 1
    assert not moved


@pytest.mark.quick
def test_rows_that_have_ended_leave_the_forwards():
    """Rounds go on with the rows that are left, in whatever order, and the text is plain's."""
    target, plain, draft, input_ids, mask = scripted(num_rows=3)
    arguments = {**ARGUMENTS, "eos_token_id": int(plain[0, 14])}
    plain = target.generate(input_ids, attention_mask=mask, **arguments)
    sizes = []
    hook = target.register_forward_hook(observer(lambda module, inputs, output: sizes.append(output.logits.shape[0])))
    output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **arguments)
    hook.remove()
    assert torch.equal(output, plain)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 3
    assert sizes[-1] < 3
