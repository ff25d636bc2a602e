"""The drafter against a slow twin that keeps no cache: every node's path is drafted again from the beginning."""

import pytest
import torch
from tiny_models import prompts, tiny_draft, tiny_target

from transformers_prism.decoding.static_shapes import StaticShapes
from transformers_prism.decoding.tree import select_nodes
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.transformers_names import cache_of

pytestmark = pytest.mark.quick


def path_hidden(draft, token_ids, states, path):
    """Output after a path of tokens below committed positions, by masks alone, without any cache.

    Row i of the input is a committed position, or a node of the path; with "prefill_module" its keys and values come
    from the module that made it, with "own_module" all come from the module of the step at hand.
    """
    committed = draft.fuse(states)
    num_committed = committed.shape[1]
    rows = torch.cat((committed, committed.new_zeros((1, len(path), committed.shape[2]))), dim=1)
    tokens = torch.cat((token_ids, torch.tensor([path], dtype=torch.long)), dim=1)
    makers = [0] * num_committed
    output = committed
    for step in range(len(path) + 1):
        length = num_committed + step
        if step:
            makers.append(step)
            rows[:, length - 1] = output[:, -1]
        if draft.config.context_kv == "own_module":
            output = draft(tokens[:, :length], rows[:, :length], step).last_hidden_state
            continue
        # One row after the other, each through the module of its own step, over all keys and values so far.
        cache = None
        for start in range(length):
            result = draft(
                tokens[:, start : start + 1],
                rows[:, start : start + 1],
                makers[start],
                cache=cache,
                use_cache=True,
            )
            cache, output = cache_of(result), result.last_hidden_state
    return output[:, -1]


def proposed_tokens(draft, text_ids):
    """What a draft can propose in a text: its vocabulary, and behind it what else the text holds."""
    own = draft.draft_to_target.tolist()
    has_own_head = not draft.config.share_target_head
    return own + ([] if has_own_head else sorted(set(text_ids.flatten().tolist()) - set(own)))


def check_tree(draft, tree, row, token_ids, states, text_ids=None):
    """Every node's log-probability equals the slow twin's along its path."""
    names = None if text_ids is None else proposed_tokens(draft, text_ids)
    for node in range(1, tree.num_nodes):
        path, at = [], node
        while at:
            path.insert(0, at)
            at = int(tree.parents[row, at])
        expected = 0.0
        for depth, step_node in enumerate(path):
            above = [int(tree.token_ids[row, n]) for n in path[:depth]]
            hidden = path_hidden(draft, token_ids, states, above)
            logits = draft.compute_logits(hidden).float()
            token = int(tree.token_ids[row, step_node])
            if names is not None:
                further = names[logits.shape[-1] :]
                logits = torch.cat((logits, draft._borrowed.head(hidden)[..., further]), dim=-1)
                token = names.index(token)
            log_probs = torch.log_softmax(logits, dim=-1)[0]
            expected += float(log_probs[token])
        assert float(tree.log_probs[row, node]) == pytest.approx(expected, abs=2e-4)


def padding(draft, width):
    """Shapes of a compiled draft, whose steps run uncompiled."""
    return StaticShapes(capacity=64, num_read=3, width=width, run_module=type(draft).run_module)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize(
    ("num_modules", "step_map", "num_layers", "module_form", "window"),
    [
        (1, [0], 1, "prism", None),
        (2, [0, 1, 1], 1, "prism", None),
        (3, [0, 1, 2], 2, "prism", None),
        (2, [1, 0, 1], 1, "prism", None),
        (1, [0], 1, "eagle3", None),
        (2, [0, 1, 1], 2, "eagle3", None),
        (2, [0, 1, 1], 1, "prism", 3),
        (3, [0, 1, 2], 2, "prism", 2),
        (2, [0, 1, 1], 2, "eagle3", 5),
        (1, [0], 2, "prism", 1),
    ],
)
def test_trees_of_several_rounds_equal_the_slow_twin(
    context_kv, num_modules, step_map, num_layers, module_form, window, is_padded
):
    """Two rows that commit different numbers of tokens, three rounds on one cache, with a draft vocabulary."""
    target = tiny_target()
    draft = tiny_draft(
        target,
        num_processing_modules=num_modules,
        draft_step_to_module=step_map,
        num_layers_per_module=num_layers,
        module_form=module_form,
        share_target_head=module_form == "prism",
        context_kv=context_kv,
        draft_vocab_size=30,
        initializer_range=0.1,
        sliding_window=window,
    ).bind(target)
    draft.draft_to_target.copy_(torch.arange(30) * 3)
    draft.bind(target)
    if context_kv == "prefill_module" and draft.config.module_of_step(0) != 0:
        pytest.skip("the slow twin names modules by step, and step 0's module is its first")
    drafter = draft.make_drafter()
    drafter.use_shapes(padding(draft, 2) if is_padded else None)
    token_ids, _ = prompts(2, length=20)
    token_ids[token_ids == 0] = 5
    states = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(1))
    ends = [4, 4]
    drafter.prefill(token_ids[:, :4], states[:, :4], torch.arange(4).expand(2, -1), ends)
    text = [token_ids[:, :4].flatten()]
    for committed in ([2, 4], [1, 3], None):
        tree = drafter.grow(TreeSettings("static", top_k=2, depth=4, num_nodes=6))
        for row in range(2):
            read = slice(row, row + 1), slice(ends[row])
            check_tree(draft, tree, row, token_ids[read], states[read], text_ids=torch.cat(text))
        if committed is None:
            break
        longest = max(committed)
        index = torch.tensor(ends)[:, None] + torch.arange(longest)
        rows = torch.arange(2)[:, None]
        drafter.prefill(token_ids[rows, index], states[rows, index], index, committed)
        text.append(token_ids[rows, index].flatten())
        ends = [end + count for end, count in zip(ends, committed, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("text_tokens", [True, False])
def test_tokens_of_the_text_join_the_draft_vocabulary(text_tokens):
    """Those of the prompt and of every round; with the setting off, only the vocabulary is proposed."""
    target = tiny_target()
    draft = tiny_draft(target, draft_vocab_size=10, initializer_range=0.1).bind(target)
    states = torch.randn(1, 120, 96, generator=torch.Generator().manual_seed(1))
    texts = [torch.tensor([[3, 20, 30]]), torch.tensor([[4, 20]]), torch.tensor([[40, 5]]), torch.arange(50, 90)[None]]
    drafter, start = draft.make_drafter(), 0
    drafter.text_tokens = text_tokens
    for number, text in enumerate(texts):
        end = start + text.shape[1]
        drafter.prefill(text, states[:, start:end], torch.arange(start, end)[None], [end - start])
        start = end
        expected = set(range(10))
        if text_tokens:
            expected.update(*(earlier.flatten().tolist() for earlier in texts[: number + 1]))
        settings = TreeSettings("static", top_k=len(expected), depth=1, num_nodes=len(expected))
        assert set(drafter.grow(settings).token_ids[0, 1:].tolist()) == expected


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("context_kv", ["prefill_module", "own_module"])
@pytest.mark.parametrize("widths", [(1, 3, 2, 3), (3, 1, 1, 0), (2, 1, 3, 1)])
def test_steps_of_changing_width_equal_the_slow_twin(context_kv, widths, is_padded):
    """A step that goes on with more or fewer nodes than the one before: every node still sees its own path."""
    target = tiny_target()
    draft = tiny_draft(target, num_processing_modules=3, context_kv=context_kv, initializer_range=0.1).bind(target)
    token_ids, _ = prompts(2, length=5)
    token_ids[token_ids == 0] = 5
    states = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1))
    drafter = draft.make_drafter()
    drafter.prefill(token_ids, states, torch.arange(5).expand(2, -1), [5, 5])
    drafter.use_shapes(padding(draft, 3) if is_padded else None)
    coming = iter(widths)
    pool = drafter.draw(3, 5, lambda log_probs: next(coming))
    assert pool.token_ids.shape[1] == 3 + 3 * sum(widths)
    tree = select_nodes(drafter.root_ids, pool, pool.token_ids.shape[1])
    for row in range(2):
        check_tree(draft, tree, row, token_ids[row : row + 1], states[row : row + 1])


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("window", [None, 2, 4])
def test_padding_on_the_left_changes_nothing(window, num_layers):
    """A padded row drafts the tree of the row alone."""
    target = tiny_target()
    draft = tiny_draft(target, sliding_window=window, num_layers_per_module=num_layers).bind(target)
    token_ids, mask = prompts(2, length=8)
    states = torch.randn(2, 8, 96, generator=torch.Generator().manual_seed(1))
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    settings = TreeSettings("static", 3, 4, 12)
    batch = draft.make_drafter()
    batch.prefill(token_ids, states, position_ids, [8, 8], mask.bool())
    padded = batch.grow(settings)
    for row in range(2):
        alone = draft.make_drafter()
        start = 2 * row
        alone.prefill(
            token_ids[row : row + 1, start:], states[row : row + 1, start:], torch.arange(8 - start)[None], [8 - start]
        )
        tree = alone.grow(settings)
        assert torch.equal(tree.token_ids[0], padded.token_ids[row])
        assert torch.equal(tree.parents[0], padded.parents[row])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "prism_tree"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_window_hides_what_is_before_it(num_layers, attention):
    """Other states outside of it change no node, those inside change some; one layer of them reaches no further."""
    target, window = tiny_target(), 4
    draft = tiny_draft(
        target, sliding_window=window, num_layers_per_module=num_layers, attn_implementation=attention
    ).bind(target)
    token_ids, _ = prompts(1, length=20)
    states = torch.randn(1, 20, 96, generator=torch.Generator().manual_seed(1))
    settings = TreeSettings("static", 3, 3, 9)

    def drafted(states):
        drafter = draft.make_drafter()
        for part in (slice(0, 17), slice(17, 20)):
            drafter.prefill(token_ids[:, part], states[:, part], torch.arange(20)[None, part], [part.stop - part.start])
        return drafter.grow(settings)

    tree = drafted(states)
    # The root's children come from position 19, which sees 16 to 19, and these in a layer below as many before.
    first_seen = 19 - num_layers * (window - 1)
    for position, is_seen in ((first_seen - 1, False), (first_seen, True), (19, True)):
        changed = states.clone()
        changed[:, position] += 1.0
        other = drafted(changed)
        assert torch.equal(other.log_probs, tree.log_probs) is not is_seen
    changed = states.clone()
    changed[:, :first_seen] = 100.0
    assert torch.equal(drafted(changed).token_ids, tree.token_ids)


@torch.no_grad()
def test_the_cost_of_a_step_does_not_depend_on_the_number_of_modules():
    """The same operations run for M = 1 and M = 8, whatever module serves a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operations = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operations.append((str(function), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
            return function(*args, **(kwargs or {}))

    target = tiny_target()
    recorded = []
    for num_modules in (1, 8):
        draft = tiny_draft(target, num_processing_modules=num_modules).bind(target)
        drafter = draft.make_drafter()
        drafter.prefill(prompts(1)[0], torch.ones(1, 9, 96), torch.arange(9)[None], [9])
        with Recorder() as recorder:
            drafter.prefill(prompts(1, length=3)[0], torch.ones(1, 3, 96), torch.arange(9, 12)[None], [3])
            drafter.grow(TreeSettings("static", 4, 6, 20))
        recorded.append(recorder.operations)
    assert recorded[0] == recorded[1]


def on_meta(monkeypatch, **settings):
    """A drafter whose models and tensors hold no numbers, on the path that accelerators take, after two rounds' reading:
    whatever asks for a value fails, and every shape is known beforehand."""
    pytest.importorskip("triton")
    monkeypatch.setattr("transformers_prism.kernels.dispatch.TRITON_DEVICES", ("meta",))
    target = tiny_target()
    draft = tiny_draft(target, **settings).bind(target)
    target.to("meta")
    drafter = draft.to("meta").make_drafter()
    for num_positions, num_new in ((9, [9, 9]), (3, [3, 1])):
        token_ids = torch.zeros((2, num_positions), dtype=torch.long)
        drafter.prefill(token_ids, torch.empty((2, num_positions, 96), device="meta"), token_ids, num_new)
    return drafter


@torch.no_grad()
@pytest.mark.parametrize(
    "form",
    [{}, {"sliding_window": 4}, {"context_kv": "own_module"}, {"module_form": "eagle3", "share_target_head": False}],
)
@pytest.mark.parametrize("attention", ["sdpa", "prism_tree"])
@pytest.mark.parametrize(
    "tree", [TreeSettings("static", 4, 4, 12), TreeSettings("static", 10, 8, 63), TreeSettings("chain", 1, 5, 5)]
)
def test_the_draft_phase_reads_nothing_back(monkeypatch, form, attention, tree):
    """Reading what was committed, all draft steps and the choice of nodes, on the kernels' operators."""
    drafter = on_meta(monkeypatch, num_processing_modules=2, attn_implementation=attention, **form)
    grown = drafter.grow(tree)
    assert grown.token_ids.shape == (2, tree.num_nodes + 1)
    assert grown.token_ids.device.type == "meta"
    assert grown.ancestors().shape == (2, tree.num_nodes + 1, tree.num_nodes + 1)


@torch.no_grad()
@pytest.mark.parametrize("form", [{}, {"context_kv": "own_module"}])
def test_a_compiled_draft_phase_launches_less_than_half(monkeypatch, form):
    """Of the operations of a round of eight draft steps, on the kernels' operators, a graph counted as one; none reads back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Launches(TorchDispatchMode):
        count, is_in_graph = 0, False

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            is_view = any(one.alias_info and not one.alias_info.is_write for one in function._schema.returns)
            self.count += not (is_view or self.is_in_graph)
            return function(*args, **(kwargs or {}))

    def graph(draft, *arguments):
        launches.is_in_graph = True
        output = type(draft).run_module(draft, *arguments)
        launches.is_in_graph, launches.count = False, launches.count + 1
        return output

    counts = []
    for attention, shapes in (("prism_tree", None), ("sdpa", StaticShapes(256, 16, 10, graph))):
        drafter = on_meta(monkeypatch, num_processing_modules=2, attn_implementation=attention, **form)
        drafter.use_shapes(shapes)
        token_ids = torch.zeros((2, 3), dtype=torch.long)
        with Launches() as launches:
            drafter.prefill(token_ids, torch.empty((2, 3, 96), device="meta"), token_ids, [3, 1])
            drafter.grow(TreeSettings("static", 10, 8, 63))
        counts.append(launches.count)
    assert counts[1] < 0.5 * counts[0], counts


@torch.no_grad()
def test_a_draft_phase_that_reads_back_is_caught(monkeypatch):
    """A choice of width that looks at values, as on a CPU, fails where the test above passes."""
    drafter = on_meta(monkeypatch)
    assert drafter.draw(4, 3).token_ids.shape == (2, 4 + 2 * 16)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        drafter.draw(4, 3, lambda log_probs: int((log_probs > -1.0).sum()))
