"""The draft phase as one graph, on CPU tensors: the same trees, the same addresses, nothing read, one capture of each kind."""

import pytest
import torch
from pretend_accelerator import OnDevice, PretendedAccelerator, move_model
from recorded_graph import pretend_graphs
from tiny_models import PAD_ID, generate_twice, prompts, tiny_draft, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_prism import graph_drafting
from transformers_prism.graph_drafting import GraphDrafter
from transformers_prism.modeling_prism import PrismDraftModel
from transformers_prism.planned_trees import PlannedTrees
from transformers_prism.tree_policy import TreeSettings

pytestmark = pytest.mark.quick
TREE = TreeSettings("static", 4, 4, 12)
CHAIN = TreeSettings("chain", 1, 5, 5)
FORMS = {
    "prism": {},
    "own_module": {"context_kv": "own_module"},
    "eagle3": {"module_form": "eagle3", "share_target_head": False, "draft_vocab_size": 30},
}


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that are recorded in place of CUDA's."""
    return pretend_graphs(monkeypatch)


def call_by_call(phase, device):
    """The static function without a graph."""
    return phase


def bound_draft(form="prism", attention="sdpa", **settings):
    """A draft whose proposals differ clearly from each other."""
    target = tiny_target()
    draft = tiny_draft(target, num_processing_modules=2, attn_implementation=attention, **FORMS[form], **settings)
    return draft.bind(target)


def read(drafters, generator, num_new, ends, is_prompt=False):
    """Let all drafters read the same random positions, of a prompt with padding in its last row; returns the new ends."""
    longest = max(num_new)
    token_ids = torch.randint(3, 97, (len(num_new), longest), generator=generator)
    states = torch.randn(len(num_new), longest, 96, generator=generator)
    position_ids = torch.tensor(ends)[:, None] + torch.arange(longest)
    padding = torch.ones(len(num_new), longest, dtype=torch.bool)
    padding[-1, :3] = False
    for drafter in drafters:
        drafter.prefill(token_ids, states, position_ids, num_new, padding if is_prompt else None)
    return [end + count for end, count in zip(ends, num_new, strict=True)]


def check_same(trees):
    """Tokens, parents and depths are equal, log-probabilities as close as float32 is over other shapes."""
    one, other = trees
    for name in ("token_ids", "parents", "depths"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.log_probs, other.log_probs, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def check_rounds(draft, capture, trees, num_rows=2, num_rounds=12):
    """Two drafters, one of them static, draft the same trees for many rounds; returns the static one."""
    generator = torch.Generator().manual_seed(1)
    drafters = (draft.make_drafter(), GraphDrafter(draft, capture))
    ends = read(drafters, generator, [7] * num_rows, [0] * num_rows, is_prompt=True)
    for index in range(num_rounds):
        settings = trees[index % len(trees)]
        check_same([drafter.grow(settings) for drafter in drafters])
        num_new = torch.randint(1, settings.depth + 2, (num_rows,), generator=generator).tolist()
        ends = read(drafters, generator, num_new, ends)
    return drafters[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager", "prism_tree"])
@pytest.mark.parametrize("tree", [TREE, CHAIN], ids=["tree", "chain"])
def test_graph_replays_draft_the_trees_of_the_ordinary_path(form, attention, tree, graphs):
    """Rows of different lengths, one with padding; whatever the function took from the host would be frozen."""
    check_rounds(bound_draft(form, attention), graph_drafting.capture_graph, [tree])
    assert len(graphs) == 1
    # One round grew from the prompt, one ran call by call.
    assert graphs[0].num_replays == 10


def test_graph_kinds_are_captured_once_each(graphs):
    """Trees that take turns, as planned ones do."""
    shallow = TreeSettings("static", 3, 2, 5)
    drafter = check_rounds(bound_draft(), graph_drafting.capture_graph, [CHAIN, TREE, TREE, shallow], num_rounds=24)
    assert len(graphs) == 3
    assert set(drafter.kinds) == {(6, TREE), (6, shallow), (6, CHAIN)}
    # The first tree grew from the prompt, and each kind ran once call by call.
    assert sorted(graph.num_replays for graph in graphs) == [4, 5, 11]


def test_graph_static_function_needs_no_graph():
    """Run call by call it drafts the same trees."""
    check_rounds(bound_draft(), call_by_call, [TREE, CHAIN], num_rows=3)


def test_graph_text_that_outgrows_its_place_moves(graphs, monkeypatch):
    """And is captured again there; places grow by half, so seldom."""
    monkeypatch.setattr(graph_drafting, "_CAPACITY_STEP", 8)
    drafter = check_rounds(bound_draft("own_module"), graph_drafting.capture_graph, [TREE], num_rounds=30)
    assert drafter.reserved.width > 64
    assert 2 < len(graphs) < 7
    assert sum(graph.num_replays for graph in graphs) > 15


class ShapeRecorder(TorchDispatchMode):
    """Notes operations and the shapes of their tensors."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Note one."""
        self.operations.append((str(function), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_graph_shapes_and_addresses_stay(form):
    """Of every operation of a phase, and of everything that it reads or that outlives it."""
    found = []

    def recorded(phase, device):
        def run():
            with ShapeRecorder() as recorder:
                outputs = phase()
            layers = drafter.reserved.cache.layers
            places = [*next(iter(drafter.inputs.values())), drafter.reserved.committed]
            places += [buffer for layer in layers for buffer in (layer.key_buffer, layer.value_buffer)]
            found.append((recorder.operations, [place.data_ptr() for place in places]))
            return outputs

        return run

    draft = bound_draft(form)
    drafter, generator = GraphDrafter(draft, recorded), torch.Generator().manual_seed(1)
    ends = read([drafter], generator, [7, 7], [0, 0], is_prompt=True)
    for num_new in ([1, 5], [3, 2], [5, 5], [2, 1], [4, 3]):
        drafter.grow(TREE)
        ends = read([drafter], generator, num_new, ends)
    drafter.grow(TREE)
    assert len(found) == 4
    assert all(one == found[0] for one in found)


@torch.no_grad()
@pytest.mark.parametrize("tree", [TREE, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize("form", FORMS)
def test_graph_phase_neither_reads_nor_brings_over(form, tree):
    """On a pretended accelerator; only what is handed to a phase comes from the host."""
    draft = bound_draft(form)
    move_model(draft._require_target().target)
    move_model(draft)
    if draft._borrowed.head_rows is not None:
        move_model(draft._borrowed.head_rows)
    inside = []

    def watched(phase, device):
        def run():
            before = len(accelerator.reads), len(accelerator.uploads)
            outputs = phase()
            inside.append((accelerator.reads[before[0] :], accelerator.uploads[before[1] :]))
            return outputs

        return run

    with PretendedAccelerator() as accelerator:
        drafter, ends = GraphDrafter(draft, watched), [0, 0]
        for num_new in ([7, 7], [1, 5], [3, 2], [2, 4]):
            token_ids = torch.ones(2, max(num_new), dtype=torch.long)
            position_ids = torch.tensor(ends)[:, None] + torch.arange(max(num_new))
            drafter.prefill(token_ids, OnDevice(torch.randn(*token_ids.shape, 96)), position_ids, num_new)
            drafter.grow(tree)
            ends = [end + count for end, count in zip(ends, num_new, strict=True)]
        assert inside == [([], [])] * 2
        assert not accelerator.reads
        assert accelerator.uploads


@torch.no_grad()
def test_graph_what_reads_cannot_be_captured(graphs, monkeypatch):
    """It is drafted call by call from then on, with a warning that says why, and with the same trees."""
    read_later = GraphDrafter._read_later

    def nosy(self, *arguments):
        output = read_later(self, *arguments)
        output.sum().item()
        return output

    monkeypatch.setattr(GraphDrafter, "_read_later", nosy)
    with pytest.warns(
        UserWarning, match="tree_cuda_graph: drafting without a graph, since capturing failed: .*_scalar"
    ):
        check_rounds(bound_draft(), graph_drafting.capture_graph, [TREE])
    assert len(graphs) == 1
    assert graphs[0].num_replays == 0


@torch.no_grad()
def test_graph_drafter_reads_long_and_repeated_texts(graphs):
    """What was committed while the draft rested, and a second text before a tree has grown."""
    draft, generator = bound_draft(), torch.Generator().manual_seed(1)
    drafters = (draft.make_drafter(), GraphDrafter(draft))
    ends = read(drafters, generator, [7, 7], [0, 0], is_prompt=True)
    for num_new in ([3, 1], [80, 75], [2, 5], [70, 90], [1, 1]):
        ends = read(drafters, generator, num_new, ends)
        ends = read(drafters, generator, [2, 1], ends)
        check_same([drafter.grow(TREE) for drafter in drafters])


@torch.no_grad()
def test_graph_rows_leave(graphs):
    """The others go on as they were, captured anew."""
    draft, generator = bound_draft(), torch.Generator().manual_seed(1)
    drafters = (draft.make_drafter(), GraphDrafter(draft))
    ends = read(drafters, generator, [7, 7, 7], [0, 0, 0], is_prompt=True)
    for rows in ([0, 1, 2], [0, 2], [1]):
        for drafter in drafters:
            drafter.keep_rows(rows)
        ends = [ends[row] for row in rows]
        for _ in range(4):
            check_same([drafter.grow(TREE) for drafter in drafters])
            num_new = torch.randint(1, 6, (len(rows),), generator=generator).tolist()
            ends = read(drafters, generator, num_new, ends)
    assert len(graphs) == 3


@pytest.fixture
def graph_drafters(graphs, monkeypatch):
    """Graph drafters although no draft is on CUDA; returns those that are made."""
    made: list[GraphDrafter] = []
    monkeypatch.setattr(
        PrismDraftModel, "make_graph_drafter", lambda self: made.append(GraphDrafter(self)) or made[-1]
    )
    return made


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "top_k": 0, "temperature": 0.6}])
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("tree", ["static", "chain", "auto"])
def test_graph_generation_is_lossless(tree, num_rows, settings, graph_drafters, graphs, monkeypatch, cheap_rounds):
    """Rows that end early, padding, trees of one size and planned ones."""
    monkeypatch.setattr("transformers_prism.generation.AutoTrees", PlannedTrees)
    input_ids, mask = prompts(num_rows)
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    sizes = {"tree_top_k": 30, "tree_depth": 3, "tree_num_nodes": 150}
    draft.generation_config.update(tree=tree, tree_cuda_graph=True, **sizes)
    torch.manual_seed(5)
    arguments = {"max_new_tokens": 40, "pad_token_id": PAD_ID, **settings}
    end = target.generate(input_ids, attention_mask=mask, **arguments)[0, 24]
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **arguments, eos_token_id=int(end))
    assert torch.equal(plain, speculative)
    assert same_state
    assert len(graph_drafters) == 1
    assert sum(graph.num_replays for graph in graphs) > 0


def test_graph_chats_go_on(graph_drafters, graphs):
    """A second call on the cache of the first reads the new prompt with the same drafter."""
    input_ids, mask = prompts(1)
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    draft.generation_config.update(tree_cuda_graph=True)
    arguments = {"max_new_tokens": 16, "pad_token_id": PAD_ID, "do_sample": False}
    outputs = []
    for assistant in ({}, {"assistant_model": draft}):
        first = target.generate(input_ids, return_dict_in_generate=True, **arguments, **assistant)
        longer = torch.cat((first.sequences, first.sequences[:, 3:6]), dim=1)
        outputs.append(target.generate(longer, past_key_values=first.past_key_values, **arguments, **assistant))
    assert torch.equal(*outputs)
    assert len(graph_drafters) == 1
    assert sum(graph.num_replays for graph in graphs) > 5


def test_graph_is_refused_with_a_reason(monkeypatch):
    """Without CUDA, without the target on the same device, with frequencies that depend on the length."""
    draft = bound_draft()
    with pytest.warns(
        UserWarning, match="drafting without a graph: a CUDA graph needs a draft on a CUDA .*, got one on cpu"
    ):
        assert type(draft.make_graph_drafter()) is type(draft.make_drafter())
    monkeypatch.setattr(PrismDraftModel, "device", torch.device("cuda:0"))
    with pytest.warns(UserWarning, match="the draft is on cuda:0, and the target's embedding or head on cpu"):
        draft.make_graph_drafter()
    draft.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.warns(UserWarning, match="dynamic rotary frequencies look at the length"):
        draft.make_graph_drafter()


def test_graph_setting_falls_back_in_generate():
    """On a CPU the output is plain's, with the warning."""
    input_ids, _ = prompts(1)
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    draft.generation_config.update(tree_cuda_graph=True)
    arguments = {"max_new_tokens": 8, "pad_token_id": PAD_ID, "do_sample": False}
    with pytest.warns(UserWarning, match="tree_cuda_graph: drafting without a graph"):
        output = target.generate(input_ids, assistant_model=draft, **arguments)
    assert torch.equal(output, target.generate(input_ids, **arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["sdpa", "prism_tree"])
def test_graph_of_cuda_is_lossless(form, attention):
    """Captured and replayed by CUDA itself."""
    input_ids, _ = prompts(1)
    target = tiny_target("llama", 3).to("cuda")
    draft = tiny_draft(target, num_processing_modules=2, attn_implementation=attention, **FORMS[form]).to("cuda")
    draft.generation_config.update(tree_cuda_graph=True)
    arguments = {"max_new_tokens": 60, "pad_token_id": PAD_ID, "do_sample": False}
    plain, speculative, _ = generate_twice(target, draft, input_ids.to("cuda"), **arguments)
    assert torch.equal(plain, speculative)
