"""verify_tree: walks by hand, warpers against transformers' own, seeds, and the kernels against the definition."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    Guards,
    check_operator,
    guarded_allocations,
    nothing_computed,
    run_interpreted,
)
from transformers.generation import LogitsProcessorList

from transformers_prism.kernels import verify_tree as kernel
from transformers_prism.kernels.verify_tree import WARPERS, verify_tree

pytestmark = pytest.mark.quick

# The warpers alone, and in company: each of them removes tokens that the ones before it kept.
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.6},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
]


def binary_trees(num_rows, num_nodes):
    """`(parents, depths)` of binary trees: node n is below node (n - 1) // 2."""
    parents = [0, *((node - 1) // 2 for node in range(1, num_nodes))]
    depths = [0] * num_nodes
    for node in range(1, num_nodes):
        depths[node] = depths[parents[node]] + 1
    return torch.tensor([parents] * num_rows), torch.tensor([depths] * num_rows)


def chosen(logits, depths, noise, noise_steps, noise_rows, settings):
    """What transformers' warpers and torch.argmax choose, node by node, `(B, N)`."""
    warpers = LogitsProcessorList([WARPERS[name](value) for name, value in settings.items()])
    choices = torch.zeros(logits.shape[:2], dtype=torch.long)
    for row in range(logits.shape[0]):
        for node in range(logits.shape[1]):
            scores = logits[row, node].float()[None]
            if noise is not None:
                step = int(noise_steps[row] + depths[row, node])
                probs = warpers(torch.zeros(1, 1, dtype=torch.long), scores).softmax(-1)
                scores = probs / noise[step, noise_rows[row]]
            choices[row, node] = scores.argmax()
    return choices


def make(num_rows=3, num_nodes=15, vocab_size=97, dtype=torch.float32, is_sampled=True, seed=0, **settings):
    """Arguments of a call whose walks end at all depths, and the `choices` `(B, N)` that they rest on."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn((num_rows, num_nodes, vocab_size), generator=generator) * 3).to(dtype)
    parents, depths = binary_trees(num_rows, num_nodes)
    num_steps = int(depths.max()) + 1
    noise = noise_steps = noise_rows = None
    if is_sampled:
        noise = torch.empty(num_steps + 2, num_rows + 1, vocab_size).exponential_(1, generator=generator)
        noise_steps = torch.arange(num_rows) % 3
        noise_rows = torch.arange(num_rows).flip(0) + 1
    choices = chosen(logits, depths, noise, noise_steps, noise_rows, settings)
    token_ids = torch.randint(0, vocab_size, (num_rows, num_nodes), generator=generator)
    for row in range(num_rows):
        # Down to depth `row` every right child holds what its parent chooses.
        for node in range(1, num_nodes):
            if node % 2 == 0 and depths[row, node] <= row + 1:
                token_ids[row, node] = choices[row, parents[row, node]]
    arguments = {"logits": logits, "token_ids": token_ids, "parents": parents, "depths": depths}
    if is_sampled:
        arguments.update(noise=noise, noise_steps=noise_steps, noise_rows=noise_rows)
    return {**arguments, "num_steps": num_steps, **settings}, choices


def walked(arguments, choices):
    """The result as a loop over nodes writes it."""
    rows = []
    for row, (tokens, parents) in enumerate(zip(arguments["token_ids"], arguments["parents"], strict=True)):
        node, nodes, emitted = 0, [], []
        while node is not None and len(nodes) < arguments["num_steps"]:
            nodes.append(node)
            emitted.append(int(choices[row, node]))
            fitting = [
                child for child in range(1, len(tokens)) if parents[child] == node and tokens[child] == emitted[-1]
            ]
            node = fitting[0] if fitting and emitted[-1] >= 0 else None
        padding = [0] * (arguments["num_steps"] - len(nodes))
        rows.append([len(nodes), *nodes, *padding, *emitted, *padding])
    return torch.tensor(rows)


@pytest.mark.parametrize("num_nodes", [1, 15, 63])
@pytest.mark.parametrize("is_sampled", [False, True])
def test_walks_equal_a_loop(num_nodes, is_sampled):
    """Nodes, tokens and their number; some rows go deeper than others."""
    arguments, choices = make(num_nodes=num_nodes, is_sampled=is_sampled)
    found = verify_tree(**arguments)
    assert torch.equal(found, walked(arguments, choices))
    if num_nodes > 1:
        assert found[:, 0].tolist() == [2, 3, 4]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_warpers_are_transformers_own(settings, dtype):
    """Every node of a batch chooses what transformers' warpers choose for it alone, bit for bit."""
    arguments, choices = make(num_rows=8, num_nodes=31, vocab_size=211, dtype=dtype, **settings)
    assert torch.equal(verify_tree(**arguments), walked(arguments, choices))
    # Every node as a tree of its own, so that all choices are seen.
    num_nodes = arguments["logits"].shape[1]
    arguments["noise_steps"] = (arguments["noise_steps"][:, None] + arguments["depths"]).flatten()
    arguments["noise_rows"] = arguments["noise_rows"].repeat_interleave(num_nodes)
    for name in ("token_ids", "parents", "depths"):
        arguments[name] = torch.zeros(8 * num_nodes, 1, dtype=torch.long)
    arguments.update(logits=arguments["logits"].flatten(0, 1)[:, None], num_steps=1)
    assert torch.equal(verify_tree(**arguments)[:, 2], choices.flatten())


def test_draws_equal_multinomial_with_the_same_seed():
    """A chain of nodes, each drawn with a step's noise, against one draw per step of the whole batch."""
    logits = torch.randn((3, 6, 50), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(7)
    drawn = torch.stack([torch.multinomial(logits[:, step].softmax(-1), 1)[:, 0] for step in range(6)], dim=1)
    torch.manual_seed(7)
    noise = torch.stack([torch.empty(3, 50).exponential_(1) for _ in range(6)])
    depths = torch.arange(6).repeat(3, 1)
    token_ids = torch.cat((torch.zeros(3, 1, dtype=torch.long), drawn[:, :-1]), dim=1)
    rows = torch.arange(3)
    found = verify_tree(logits, token_ids, (depths - 1).clamp(min=0), depths, 6, noise, rows * 0, rows)
    assert found[:, 0].tolist() == [6, 6, 6]
    assert torch.equal(found[:, 7:], drawn)


def spoiled(is_sampled):
    """Logits that hold what is not a number at the second node of each walk, and what that emits."""
    arguments, choices = make(num_rows=4, is_sampled=is_sampled)
    logits, is_bad = arguments["logits"], torch.zeros_like(choices, dtype=torch.bool)
    logits[0, 2, 5] = torch.nan
    logits[1, 2, 96] = torch.inf
    logits[2, 2] = -torch.inf
    logits[3, 13, 1] = torch.nan  # where no walk comes
    is_bad[0, 2], is_bad[1:3, 2] = True, is_sampled
    if not is_sampled:
        choices[1, 2], choices[2, 2] = 96, 0
    return arguments, choices.masked_fill(is_bad, -1)


@pytest.mark.parametrize("is_sampled", [False, True])
def test_what_is_not_a_number_emits_minus_one(is_sampled):
    """NaN always; infinities where a distribution has to be made of them."""
    arguments, choices = spoiled(is_sampled)
    assert torch.equal(verify_tree(**arguments), walked(arguments, choices))


def test_it_compiles_without_a_break():
    """The PyTorch path with every warper, in one graph."""
    arguments, _ = make(**SETTINGS[-1])
    compiled = torch.compile(verify_tree, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**arguments), verify_tree(**arguments))


def test_it_says_what_is_wrong():
    """Before anything is computed."""
    good, _ = make()
    ids = good["token_ids"]
    for changes, message in (
        ({"logits": good["logits"][:0]}, r"logits: expected 3 dimensions, none empty, got \(0, 15, 97\)"),
        ({"logits": good["logits"].double()}, "logits: expected dtype float32, .* got torch.float64"),
        ({"logits": good["logits"].transpose(1, 2).contiguous().mT}, "logits: expected the last dimension contig"),
        ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
        ({"token_ids": ids[:2]}, r"token_ids: expected shape \(3, 15\), got \(2, 15\)"),
        ({"parents": ids.int()}, "parents: expected dtype torch.int64, got torch.int32"),
        ({"depths": ids.to("meta")}, "depths: expected device cpu, got meta"),
        ({"noise": None}, "noise_steps: expected it with noise only, got tensor"),
        ({"noise": None, "noise_steps": None, "noise_rows": None, "top_k": 3}, "top_k: expected it with noise only"),
        ({"noise": good["noise"][..., :9]}, r"noise: expected shape \('W', 'R', 97\), contiguous, got \(6, 4, 9\)"),
        ({"noise": good["noise"].half()}, "noise: expected dtype torch.float32, got torch.float16"),
        ({"noise": good["noise"].to("meta")}, "noise: expected device cpu, got meta"),
        ({"noise_steps": None}, "noise_steps: expected it with noise, got None"),
        ({"noise_rows": None}, "noise_rows: expected it with noise, got None"),
        ({"noise": good["noise"].transpose(0, 1)}, r"noise: expected shape \('W', 'R', 97\), contiguous"),
        ({"noise_steps": good["noise_steps"].int()}, "noise_steps: expected dtype torch.int64, got torch.int32"),
        ({"noise_rows": good["noise_rows"].to("meta")}, "noise_rows: expected device cpu, got meta"),
        ({"logits": good["logits"].to("meta")}, "token_ids: expected device meta, got cpu"),
        ({"noise_rows": ids[0]}, r"noise_rows: expected shape \(3,\), got \(15,\)"),
        ({"temperature": -1.0}, "strictly positive float"),
        ({"top_p": 1.5}, "top_p"),
    ):
        with pytest.raises(ValueError, match=message), nothing_computed(kernel):
            verify_tree(**{**good, **changes})
    large, _ = make(num_rows=1, num_nodes=1025, vocab_size=3)
    message = "logits: expected at most 1024 nodes, got 1025"
    with pytest.raises(ValueError, match=message), nothing_computed(kernel):
        verify_tree(**large, implementation="triton")
    verify_tree(**large)


def on_device(arguments, guards=None):
    """The same arguments on `DEVICE`, between guard regions if there are some."""
    place = (lambda one: one.to(DEVICE)) if guards is None else (lambda one: guards.around(one.to(DEVICE)))
    return {name: place(one) if isinstance(one, torch.Tensor) else one for name, one in arguments.items()}


# The results are integers and have to be equal in every dtype: logits are exact in float32, where both compute, and
# the next best of p / noise is never as near as float32 rounds in these draws.
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("settings", "dtype"),
    [(one, torch.float32) for one in (None, *SETTINGS)]
    + [(one, dtype) for dtype in (torch.float16, torch.bfloat16) for one in (None, SETTINGS[0], SETTINGS[-1])],
    ids=str,
)
def test_kernel_equals_the_definition(settings, dtype):
    """None is greedy. Logits of few bits have many ties."""
    arguments, choices = make(num_nodes=7, dtype=dtype, is_sampled=settings is not None, **(settings or {}))
    guards = Guards()
    with guarded_allocations():
        found = verify_tree(**on_device(arguments, guards), implementation="triton").clone()
    guards.check()
    assert torch.equal(found.cpu(), walked(arguments, choices))


@pytest.mark.kernel
@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 97), (2, 63, 97), (1, 111, 97), (2, 3, 50257), (1, 2, 151936), (1, 257, 8)], ids=str
)
def test_kernel_takes_awkward_sizes(sizes, is_sampled):
    """Rows, nodes and tokens that fill no tile."""
    arguments, choices = make(*sizes, is_sampled=is_sampled)
    guards = Guards()
    with guarded_allocations():
        found = verify_tree(**on_device(arguments, guards), implementation="triton").clone()
    guards.check()
    assert torch.equal(found.cpu(), walked(arguments, choices))


@pytest.mark.kernel
@pytest.mark.parametrize("vocab_size", [50257, 151936])
def test_bounds_over_several_tiles(vocab_size):
    """Every warper over a whole vocabulary keeps what transformers' warpers keep."""
    logits = torch.randn((1, 1, vocab_size), generator=torch.Generator().manual_seed(1)) * 3
    settings = {"top_k": 400, "top_p": 0.7, "min_p": 0.01, "typical_p": 0.8}
    found = kept_by_kernel(logits, 0.9, **settings)
    scores = logits[0]
    for name, value in {"temperature": 0.9, **settings}.items():
        scores = WARPERS[name](value)(None, scores)
    assert torch.equal(found[0, 0], scores[0] > -torch.inf)
    assert 10 < int(found.sum()) < 400


def kept_by_kernel(logits, temperature, top_k=None, top_p=None, min_p=None, typical_p=None):
    """Which tokens `(B, N, V)` the kernel's bounds keep."""
    logits = logits.to(DEVICE)
    scale = kernel._LOG2_E / temperature
    bounds, first_ties = kernel._verify_tree_bounds_fwd(logits, scale, top_k, top_p, min_p, typical_p)
    token, values = torch.arange(logits.shape[-1], device=DEVICE), logits.float()
    is_tie = (values == bounds[..., :1]) & (token >= first_ties[..., None])
    return (((values > bounds[..., :1]) | is_tie) & (values <= bounds[..., 1:])).cpu()


def kept_by_stable_sort(scores, settings):
    """What the warpers keep of scores `(V,)` in float64; of equal ones the smaller ids go first."""
    probs = scores.double().softmax(-1)
    if "top_k" in settings:
        probs = probs * (scores >= scores.topk(min(settings["top_k"], len(scores))).values[-1])
    if "top_p" in settings:
        order = scores.argsort(stable=True)
        is_removed = (probs / probs.sum())[order].cumsum(-1) <= 1 - settings["top_p"]
        is_removed[-1] = False
        probs[order[is_removed]] = 0
    if "min_p" in settings:
        probs = probs * (probs >= settings["min_p"] * probs.max())
    if "typical_p" in settings:
        logs = (probs / probs.sum()).log()
        distance = (-logs - torch.special.entr(probs / probs.sum()).sum()).abs()
        by_distance = distance.sort().values
        cumulative = (probs / probs.sum())[distance.argsort()].cumsum(-1)
        reached = int((cumulative < settings["typical_p"]).sum().clamp(max=len(scores) - 1))
        probs = probs * (distance <= by_distance[reached])
    return probs > 0


@pytest.mark.kernel
@pytest.mark.parametrize("settings", [one for one in SETTINGS if set(one) - {"temperature"}], ids=str)
def test_bounds_keep_the_right_ties(settings):
    """Logits of few values, negative and positive, some minus infinity: among equals the smaller ids go first."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-4, 5, (1, 4, 97), generator=generator).to(torch.bfloat16) * 0.5
    logits[0, 0, ::3] = -torch.inf
    logits[0, 3, 3:] = -torch.inf  # fewer tokens than top-k
    logits[0, 1] -= 200  # all negative
    temperature = settings.get("temperature", 1.0)
    found = kept_by_kernel(logits, **{"temperature": temperature, **settings})
    for node in range(4):
        expected = kept_by_stable_sort(logits[0, node].float() / temperature, settings)
        assert torch.equal(found[0, node] & (logits[0, node] > -torch.inf), expected), node


@pytest.mark.kernel
@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("settings", [{}, SETTINGS[-1]], ids=str)
def test_kernel_emits_minus_one_for_what_is_not_a_number(is_sampled, settings):
    """As the definition does, with bounds as without."""
    arguments, _ = spoiled(is_sampled)
    arguments.update(settings if is_sampled else {})
    found = verify_tree(**on_device(arguments), implementation="triton")
    assert torch.equal(found.cpu(), verify_tree(**arguments, implementation="torch"))


@pytest.mark.kernel
def test_kernel_takes_rows_of_a_larger_tensor():
    """Strides of logits that are a part of others, and noise for fewer steps than the tree is deep."""
    arguments, _ = make()
    wide = torch.full((3, 20, 120), torch.nan)
    wide[:, :15, :97] = arguments["logits"]
    arguments.update(logits=wide[:, :15, :97], noise=arguments["noise"][:3], num_steps=3)
    arguments["noise_steps"] = torch.zeros_like(arguments["noise_steps"])
    found = verify_tree(**on_device(arguments), implementation="triton")
    assert torch.equal(found.cpu(), verify_tree(**arguments, implementation="torch"))


@pytest.mark.kernel
@pytest.mark.parametrize("is_sampled", [False, True])
def test_operator_is_registered_properly(is_sampled):
    """opcheck, and one graph with the operator in it."""
    arguments, _ = make(is_sampled=is_sampled, **(SETTINGS[-1] if is_sampled else {}))
    arguments = on_device(arguments)
    names = ("logits", "token_ids", "parents", "depths", "num_steps", "noise", "noise_steps", "noise_rows", *WARPERS)
    check_operator(kernel._verify_tree, tuple(arguments.get(name) for name in names))
    run = torch.compile(lambda **one: verify_tree(**one, implementation="triton"), fullgraph=True, backend="aot_eager")
    assert torch.equal(run(**arguments), verify_tree(**arguments, implementation="torch"))


@pytest.mark.kernel
def test_bench_cases_pass_and_wrong_ones_do_not():
    """The cases' walks reach leaves, and are right under the interpreter; a wrong result is seen."""
    import dataclasses
    from functools import partial

    from transformers_prism.bench.kernel_cases.verify_tree import cases
    from transformers_prism.bench.kernels import Inputs, relative_error

    for case in cases():
        small = dataclasses.replace(case, make=partial(case.make, num_nodes=7, vocab_size=97))
        assert relative_error(small, DEVICE) == 0.0
        arguments = small.make(Inputs(DEVICE))
        assert int(small.call(*arguments)[:, 0].min()) == 3
    wrong = dataclasses.replace(small, call=lambda *inputs, implementation: verify_tree(*inputs) + len(implementation))
    assert relative_error(wrong, DEVICE) > 0


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
