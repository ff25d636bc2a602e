"""`kernels/few_queries.py`: attention of a tree's nodes on a CPU, compiled by the system's compiler."""

import os
import subprocess
import sys

import pytest
import torch

from transformers_prism.kernels import few_queries as few_queries_file
from transformers_prism.kernels.few_queries import (
    MAX_QUERIES,
    PART,
    Tail,
    few_queries_attention,
    few_queries_is_available,
    few_queries_reference,
    serves_few_queries,
)

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not few_queries_is_available(), reason="the kernel needs a C++ compiler and an x86 CPU with AVX2"),
]

# Sequences, heads, groups, queries, keys, sizes of heads and of values: parts of keys, registers and rows, whole or not.
SHAPES = [
    (1, 9, 3, 1, 1, 64, 64),
    (1, 9, 3, 10, 127, 64, 64),
    (1, 9, 3, 60, 128, 64, 64),
    (2, 4, 4, 5, 129, 80, 80),
    (3, 8, 1, 7, 300, 96, 96),
    (1, 6, 2, 64, 1000, 128, 128),
    (1, 4, 2, 5, 513, 64, 32),
    (2, 2, 2, 2, 528, 16, 64),
    (1, 9, 3, 2, 36, 64, 64),
    (1, 2, 1, 3, 0, 16, 16),
    (2, 4, 2, 3, 257, 24, 48),
    (1, 2, 2, 13, 40, 5, 16),
]
# As a process of its own, since the kernel of a process is that of its CPU.
_CHECK = """
import torch
from transformers_prism.kernels.few_queries import few_queries_attention, few_queries_reference
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
for B, H, G, N, K, E, V in {shapes}:
    query, key, value = torch.randn(B, H, N, E), torch.randn(B, G, K, E), torch.randn(B, G, K, V)
    visible = torch.rand(B, N, K) < 0.7
    arguments = (query, key, value, visible, E**-0.5)
    torch.testing.assert_close(few_queries_attention(*arguments), few_queries_reference(*arguments), atol=1e-5, rtol=1e-5)
print("equal")
"""


def inputs_of(shape):
    """Random queries, keys and values."""
    num_rows, num_heads, num_groups, num_queries, num_keys, head_dim, value_dim = shape
    query = torch.randn(num_rows, num_heads, num_queries, head_dim)
    key = torch.randn(num_rows, num_groups, num_keys, head_dim)
    return query, key, torch.randn(num_rows, num_groups, num_keys, value_dim)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seen", ["everything", "most", "a few", "a window", "nothing in a part", "by some nothing"])
def test_equals_the_reference(shape, seen, one_thread):
    """Whatever is visible; the same bits by any number of threads."""
    query, key, value = inputs_of(shape)
    visible = torch.ones(len(query), query.shape[2], key.shape[2], dtype=torch.bool)
    if seen == "most":
        visible[:, :, -query.shape[2] :] = torch.rand(len(query), query.shape[2], min(query.shape[2], key.shape[2])) < 0.5
        visible[:, :, :1] = True
    elif seen == "a few":
        visible = torch.rand(visible.shape) < 0.05
        visible[:, :, -1:] = True
    elif seen == "a window":
        visible[:, :, : key.shape[2] // 2] = False
    elif seen == "nothing in a part":
        visible[:, ::2, :400] = False
    elif seen == "by some nothing":
        visible[-1, -1] = False
    output = few_queries_attention(query, key, value, visible, 0.3)
    assert output.is_contiguous()
    torch.testing.assert_close(output, few_queries_reference(query, key, value, visible, 0.3), atol=1e-5, rtol=1e-5)
    if seen == "everything":
        assert torch.equal(output, few_queries_attention(query, key, value, None, 0.3))
    if seen == "by some nothing":
        assert not output[-1, -1].any()
    for num_threads in (2, 3, 5):
        torch.set_num_threads(num_threads)  # the fixture sets it back
        assert torch.equal(output, few_queries_attention(query, key, value, visible, 0.3))


def test_a_query_does_not_depend_on_the_others():
    """Nor on hidden keys in its part: the same bits as alone."""
    query, key, value = inputs_of((1, 9, 3, 20, 300, 64, 64))
    visible = torch.rand(1, 20, 300) < 0.8
    output = few_queries_attention(query, key, value, visible, 0.125)
    for one in range(20):
        alone = few_queries_attention(query[:, :, one : one + 1], key, value, visible[:, one : one + 1], 0.125)
        assert torch.equal(output[:, one], alone[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_before", [3, 250, 254, 300, 510, 700])
def test_a_node_gets_what_its_token_alone_would_get(dtype, num_before):
    """The same bits as one query over the text up to it, though siblings lie between, and wherever a part of the text ends."""
    parents = [-1, 0, 0, 1, 2, 2, 4, 3, 6, 8]
    num_nodes, num_keys = len(parents), num_before + len(parents)
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    query, key, value = (one.to(dtype) for one in inputs_of((1, 9, 3, num_nodes, num_keys + 20, 64, 64)))
    visible = torch.zeros(1, num_nodes, num_keys + 20, dtype=torch.bool)
    visible[..., :num_before] = True
    for node, path in enumerate(paths):
        visible[0, node, [num_before + one for one in path]] = True
    start = num_before // PART * PART
    places = torch.tensor([*range(start, num_before), *(num_before + len(path) - 1 for path in paths)])
    parts = torch.arange(start // PART, int(places.max()) // PART + 1)
    tail = Tail(start, visible[:, None, :, start:num_keys] & (places // PART == parts[:, None])[None, :, None])
    output = few_queries_attention(query, key, value, visible, 0.125, tail)
    expected = few_queries_reference(query, key, value, visible, 0.125, tail)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps)
    torch.testing.assert_close(few_queries_reference(query, key, value, visible, 0.125), expected)
    for node, path in enumerate(paths):
        text = [*range(num_before), *(num_before + one for one in path)]
        alone = few_queries_attention(query[:, :, node : node + 1], key[:, :, text], value[:, :, text], None, 0.125)
        assert torch.equal(output[:, node], alone[:, 0]), node


def test_large_scores_and_numbers_that_are_not_finite():
    """Softmax does not overflow, tiny weights vanish, and NaN stays NaN."""
    query, key, value = inputs_of((1, 4, 2, 6, 400, 64, 64))
    for scale in (30.0, 1e-6):
        expected = few_queries_reference(query, key, value, None, scale)
        torch.testing.assert_close(few_queries_attention(query, key, value, None, scale), expected, atol=1e-4, rtol=1e-4)
    query[0, 1, 2] = torch.nan
    key[0, 0, 9, 1] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # NaN as well
    assert few_queries_attention(query, key, value, None, 0.125)[0, :, :2].isnan().all()
    visible = torch.ones(1, 6, 400, dtype=torch.bool)
    visible[..., 9] = False
    value[0, 1, 5, 3] = torch.inf
    key[0, 0, 9, 1] = 0.0
    output = few_queries_attention(query, key, value, visible, 0.125)
    assert output[0, 2, 1].isnan().all()
    assert output[0, :, 2:, 3].isinf().all()
    assert output[0, 3, :2].isfinite().all()


def test_states_of_every_layout():
    """As models hand them on: transposed, slices of a longer cache, one sequence for several."""
    states = torch.randn(2, 7, 9, 64)
    query = states.transpose(1, 2)
    cache = torch.randn(2, 2, 3, 500, 64)
    key, value = cache[0][:, :, 30:330], cache[1][:, :, 30:330]
    visible = (torch.rand(1, 7, 400) < 0.5).expand(2, -1, -1)[..., 50:350]
    arguments = (query, key, value, visible, 0.125)
    torch.testing.assert_close(few_queries_attention(*arguments), few_queries_reference(*arguments), atol=1e-5, rtol=1e-5)
    arguments = (query, key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1), visible, 0.125)
    torch.testing.assert_close(few_queries_attention(*arguments), few_queries_reference(*arguments), atol=1e-5, rtol=1e-5)


def test_what_it_does_not_serve():
    """Other dtypes, many queries, gradients, values that do not fill registers, another layout or device."""
    query, key, value = inputs_of((1, 2, 1, 4, 30, 16, 32))
    assert serves_few_queries(query, key, value)
    assert not serves_few_queries(query.half(), key, value)
    assert not serves_few_queries(query, key, value.double())
    assert not serves_few_queries(query, key, value[..., :15])
    assert not serves_few_queries(torch.randn(1, 2, MAX_QUERIES + 1, 16), key, value)
    assert not serves_few_queries(query.requires_grad_(), key, value)
    query = query.detach()
    assert not serves_few_queries(query, key.transpose(2, 3).contiguous().transpose(2, 3), value)
    assert not serves_few_queries(query.to("meta"), key.to("meta"), value.to("meta"))
    with pytest.raises(ValueError, match="expected what serves_few_queries accepts, got torch.float16"):
        few_queries_attention(query.half(), key, value, None, 1.0)
    for tail in (Tail(1, torch.ones(1, 1, 4, 29, dtype=torch.bool)), Tail(0, torch.ones(1, 1, 4, 31, dtype=torch.bool))):
        with pytest.raises(ValueError, match="expected tail as torch.bool"):
            few_queries_attention(query, key, value, None, 1.0, tail)
    assert not serves_few_queries(query, key, value[:, :, 1:])
    assert not serves_few_queries(query, key.expand(3, -1, -1, -1), value.expand(3, -1, -1, -1))
    assert not serves_few_queries(query[..., :0], key[..., :0], value)
    assert not serves_few_queries(query, key[:, :0], value[:, :0])
    assert not serves_few_queries(torch._neg_view(query), key, value)
    for wrong in (torch.ones(1, 4, 29, dtype=torch.bool), torch.ones(1, 4, 30)):
        with pytest.raises(ValueError, match=r"expected visible as torch.bool \(1, 4, 30\), got"):
            few_queries_attention(query, key, value, wrong, 1.0)
    assert few_queries_attention(query[:0], key[:0], value[:0], None, 1.0).shape == (0, 4, 2, 32)


def test_the_kernel_of_a_cpu_without_avx512():
    """Half as wide; torch takes it for an older CPU."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    script = _CHECK.format(shapes=SHAPES)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr


def test_without_a_compiler(monkeypatch):
    """It serves nothing."""
    monkeypatch.setattr(few_queries_file, "_built", lambda: None)
    assert not serves_few_queries(*inputs_of((1, 2, 1, 4, 30, 16, 32)))
