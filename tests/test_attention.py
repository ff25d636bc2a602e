"""prism_tree and grouped attention: the text and the logits of "sdpa" or "eager", with trees on the tree attention's own path."""

import threading
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_draft, tiny_target
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import transformers_prism.decoding.attention as attention
from transformers_prism.decoding.attention import TreeMask, attach_tree
from transformers_prism.kernels.few_queries import few_queries_is_available
from transformers_prism.kernels.tree_attention import pack_ancestors

pytestmark = pytest.mark.quick
ARCHITECTURES = ["llama", "qwen2_mixed_windows", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox"]
needs_kernel = pytest.mark.skipif(not few_queries_is_available(), reason="no C++ compiler or no x86 CPU with AVX2")
LENGTH = {"max_new_tokens": 20, "pad_token_id": PAD_ID, "do_sample": False}


@pytest.fixture
def attended(monkeypatch):
    """Query lengths of the calls that reach the tree attention."""
    lengths = []
    original = TreeMask.attend

    def attend(self, query, *args):
        lengths.append(query.shape[2])
        return original(self, query, *args)

    monkeypatch.setattr(TreeMask, "attend", attend)
    return lengths


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_text_is_that_of_plain_decoding(architecture, num_rows, attended):
    """Left padding, sliding windows, soft-caps; every layer of every verification goes through the tree attention."""
    input_ids, mask = prompts(num_rows)
    target = tiny_target(architecture, attn_implementation="eager")
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    target.set_attn_implementation("prism_tree")
    assert torch.equal(target.generate(input_ids, attention_mask=mask, **LENGTH), plain)
    assert not attended
    draft = scripted_draft(target, plain, input_ids.shape[1])
    output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
    assert torch.equal(output, plain)
    assert max(attended) == 1 + draft.generation_config.tree_num_nodes
    assert len(attended) == target.config.num_hidden_layers * max(draft.last_speculation.num_rounds)


@torch.no_grad()
def test_a_draft_on_prism_tree_drafts_the_same(attended):
    """Its own steps run on the tree attention, too; accepted tokens and text stay."""
    input_ids, mask = prompts(2)
    target = tiny_target("llama", 3)
    results = []
    for implementation in ("sdpa", "prism_tree"):
        draft = tiny_draft(target)
        draft.set_attn_implementation(implementation)
        output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
        results.append((output.tolist(), draft.last_speculation.accepted_per_round))
        assert bool(attended) == (implementation == "prism_tree")
    assert results[0] == results[1]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_logits_respect_padding(architecture):
    """The mask function is registered with the implementation: without it padding would be attended to."""
    input_ids, mask = prompts(3)
    target = tiny_target(architecture, attn_implementation="eager")
    expected = target(input_ids, attention_mask=mask).logits
    target.set_attn_implementation("prism_tree")
    found = target(input_ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)
    unpadded = target(input_ids[:1]).logits
    torch.testing.assert_close(unpadded, expected[:1], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_mask_that_lost_its_tree_gives_the_same():
    """A model may hand on a slice of the mask; the dense mask then decides."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    module = (
        LlamaForCausalLM._from_config(
            LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 9, "intermediate_size": 8})
        )
        .model.layers[0]
        .self_attn
    )
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 16, generator=generator)
    key, value = (torch.randn(2, 2, 12, 16, generator=generator) for _ in range(2))
    committed = torch.rand(2, 7, generator=generator) < 0.7
    ancestors = torch.rand(2, 5, 5, generator=generator) < 0.5
    ancestors |= torch.eye(5, dtype=torch.bool)
    dense = torch.cat((committed[:, None].expand(-1, 5, -1), ancestors), dim=2)[:, None]
    for softcap in (None, 2.0):
        lost, _ = attention.prism_tree_attention(module, query, key, value, dense.clone(), 0.3, softcap=softcap)
        kept, _ = attention.prism_tree_attention(
            module, query, key, value, attach_tree(dense, pack_ancestors(ancestors), committed), 0.3, softcap=softcap
        )
        torch.testing.assert_close(lost, kept, atol=1e-5, rtol=0)


def test_inputs_that_would_be_ignored_are_refused():
    """Sinks of attention, as some models have them."""
    states = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match="prism_tree: expected attention without s_aux, got Linear with it"):
        attention.prism_tree_attention(torch.nn.Linear(1, 1), states, states, states, None, s_aux=torch.zeros(2))


@torch.no_grad()
@pytest.mark.parametrize("shares_heads", [True, False])
def test_grouped_attention_is_sdpa_without_repeated_keys(shares_heads, monkeypatch):
    """The same output under a mask, and no larger keys or values than the cache holds."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    num_key_heads = 2 if shares_heads else 4
    module.num_key_value_groups = 4 // num_key_heads
    query = torch.randn(2, 4, 5, 16, generator=generator)
    key, value = (torch.randn(2, num_key_heads, 12, 16, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 5, 12, generator=generator) < 0.7
    mask[..., 0] = True
    expected, _ = attention.sdpa_attention_forward(module, query, key, value, mask)
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", None if shares_heads else attention.sdpa_attention_forward
    )
    found, _ = attention.grouped_attention(module, query, key, value, mask)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("long_context", [4096, 1])
def test_rows_attend_to_their_own_keys(long_context, monkeypatch):
    """Neighbours together as long as that costs less than a call; the output is that of all rows over all keys."""
    monkeypatch.setattr(attention, "_WORTH_A_CALL", 4)
    monkeypatch.setattr(attention, "_LONG_CONTEXT", long_context)
    generator = torch.Generator().manual_seed(0)
    module, starts = torch.nn.Module(), [9, 8, 0, 3, 8]
    module.num_key_value_groups = 2
    query = torch.randn(5, 4, 2, 16, generator=generator)
    key, value = (torch.randn(5, 2, 12, 16, generator=generator) for _ in range(2))
    mask = torch.ones(5, 1, 2, 12, dtype=torch.bool)
    for row, start in enumerate(starts):
        mask[row, ..., :start] = False
    expected, _ = attention.grouped_attention(module, query, key, value, mask)
    attention.attach_starts(mask, starts)
    assert mask.prism_runs == [(0, 2, 8), (2, 4, 0), (4, 5, 8)]
    # What is in front of a row's first key is not read.
    key[0, :, :8] = value[0, :, :8] = float("nan")
    for num_keys in (1, 1000):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_KERNEL_KEYS", num_keys)
            patch.setattr(attention, "_KERNEL_KEYS_OF_QUERY", 1)
            found, _ = attention.grouped_attention(module, query, key, value, mask)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    for nothing_to_skip in ([], [0, 0], [0, 1]):
        attention.attach_starts(plain := torch.ones(2, 1, 1, 3, dtype=torch.bool), nothing_to_skip)
        assert not hasattr(plain, "prism_runs")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_is_the_same_where_rows_attend_apart(architecture, monkeypatch):
    """Of target and draft, in every forward behind the prompts, also where sequences have left the batch."""
    monkeypatch.setattr(attention, "_WORTH_A_CALL", 0)
    input_ids, mask = prompts(4)
    target = tiny_target(architecture, 3, eos_token_id=list(range(5)))
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    draft = tiny_draft(target)
    runs, by_kernel, by_sdpa = [], attention._attend_by_kernel, attention._grouped_sdpa
    monkeypatch.setattr(attention, "_attend_by_kernel", lambda query, *args: runs.append(len(query)) or by_kernel(query, *args))
    monkeypatch.setattr(attention, "_grouped_sdpa", lambda query, *args: runs.append(len(query)) or by_sdpa(query, *args))
    assert torch.equal(target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH), plain)
    assert 1 in runs or target.config._attn_implementation == "eager"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_nodes", [1, 5])
def test_long_contexts_are_attended_to_as_by_sdpa(num_nodes, dtype, monkeypatch):
    """Rows with padding, with holes and with neither, keys as a slice of a longer cache; and SDPA is not asked."""
    monkeypatch.setattr(attention, "serves_few_queries", lambda *states: False)
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    query = torch.randn(3, num_nodes, 4, 16, generator=generator, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(3, 2, 60, 16, generator=generator, dtype=dtype)[:, :, :50] for _ in range(2))
    mask = torch.ones(3, 1, num_nodes, 50, dtype=torch.bool)
    mask[..., 50 - num_nodes :] = torch.eye(num_nodes, dtype=torch.bool)
    mask[0, ..., :7] = False
    mask[1, ..., [20, 33]] = False
    # A sliding window, of which nodes further down the tree see less.
    mask[2, 0] &= torch.arange(50) > 30 + torch.arange(num_nodes)[:, None]
    for scaling in (None, 0.3):
        expected, _ = attention.grouped_attention(module, query, key, value, mask, scaling=scaling)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_LONG_CONTEXT", 50)
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
            found, _ = attention.grouped_attention(module, query, key, value, mask, scaling=scaling)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=1e-6 if dtype == torch.float32 else 1e-14, rtol=0)


@pytest.mark.parametrize("what", ["gradients", "many queries", "bfloat16", "an added mask", "dropout", "short"])
def test_what_products_over_all_keys_do_not_suit_goes_to_sdpa(what, monkeypatch):
    """Short contexts, prefills in chunks, training, numbers too narrow for scores, and masks that are added."""
    monkeypatch.setattr(attention, "serves_few_queries", lambda *states: False)
    monkeypatch.setattr(attention, "_LONG_CONTEXT", 101 if what == "short" else 100)
    monkeypatch.setattr(attention, "_long_attention", None)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    num_nodes = attention._FEW_QUERIES + 1 if what == "many queries" else 3
    dtype = torch.bfloat16 if what == "bfloat16" else torch.float32
    query = torch.randn(1, 4, num_nodes, 16, dtype=dtype, requires_grad=what == "gradients")
    key, value = (torch.randn(1, 2, 100, 16, dtype=dtype) for _ in range(2))
    mask = torch.ones(1, 1, num_nodes, 100, dtype=torch.bool)
    if what == "an added mask":
        mask = torch.zeros(mask.shape)
    found, _ = attention.grouped_attention(
        module, query, key, value, mask, dropout=0.1 if what == "dropout" else 0.0
    )
    assert found.shape == (1, num_nodes, 4, 16)


@torch.no_grad()
@needs_kernel
@pytest.mark.parametrize("num_heads", [2, 4])
@pytest.mark.parametrize("num_nodes", [1, 5])
def test_few_queries_are_attended_to_by_the_kernel(num_nodes, num_heads, monkeypatch):
    """Under a mask, in groups of rows with much padding, and over many keys without one; the rest goes to SDPA."""
    monkeypatch.setattr(attention, "_WORTH_A_CALL", 0)
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // num_heads
    query = torch.randn(3, 4, num_nodes, 16)
    key, value = (torch.randn(3, num_heads, 40, 16) for _ in range(2))
    mask = torch.rand(3, 1, num_nodes, 40) < 0.8
    mask[..., -1] = True
    attention.attach_starts(padded := mask.clone(), [0, 20, 0])
    padded[1, ..., :20] = False
    calls = []
    for one, scaling in ((mask, None), (padded, None), (padded, 0.3), (None, None)):
        expected, _ = attention.sdpa_attention_forward(module, query, key, value, one, scaling=scaling)
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_MANY_KEYS", 40)
            patch.setattr(attention, "_KERNEL_KEYS", 40)
            patch.setattr(attention, "_KERNEL_KEYS_OF_QUERY", 8)
            kernel = attention.attend_served
            patch.setattr(attention, "attend_served", lambda *args, kernel=kernel: calls.append(1) or kernel(*args))
            if one is not None or num_nodes == 1:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
            found, weights = attention.grouped_attention(module, query, key, value, one, scaling=scaling)
        assert weights is None
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert len(calls) == 1 + 3 + 3 + (num_nodes == 1)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("name", ["_long_attention", pytest.param("_attend_by_kernel", marks=needs_kernel)])
def test_text_is_the_same_over_long_contexts(name, num_rows, monkeypatch):
    """Target and draft with products over all keys, or the kernel, in every forward behind the prompt."""
    if name == "_long_attention":
        monkeypatch.setattr(attention, "serves_few_queries", lambda *states: False)
    for limit in ("_LONG_CONTEXT", "_KERNEL_KEYS", "_KERNEL_KEYS_OF_QUERY", "_MANY_KEYS"):
        monkeypatch.setattr(attention, limit, 1)
    calls, attend = [], getattr(attention, name)
    monkeypatch.setattr(attention, name, lambda *args: calls.append(1) or attend(*args))
    target = tiny_target("llama", 0, head_dim=16)  # a whole register
    input_ids, mask = prompts(num_rows)
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    assert not calls
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH), plain)
    assert calls


def test_grouped_attention_is_lent_while_the_loop_runs(monkeypatch):
    """To models on "sdpa" in this thread, also if the loop fails; names of implementations never change."""
    calls = []
    grouped = attention.grouped_attention
    monkeypatch.setattr(attention, "grouped_attention", lambda *args, **kwargs: calls.append(1) or grouped(*args, **kwargs))
    target, eager = tiny_target("llama"), tiny_target("llama", attn_implementation="eager")
    input_ids, _ = prompts(1)

    def fail():
        with attention.lent_attention(target, eager):
            target(input_ids)
            eager(input_ids)
            assert (target.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
            other = threading.Thread(target=target, args=(input_ids,))
            other.start()
            other.join()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(calls) == target.config.num_hidden_layers
    target(input_ids)
    assert len(calls) == target.config.num_hidden_layers


def test_lending_is_undone_with_the_hook():
    """And comes back with it."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    attention.uninstall_lending()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before.prism_original
    attention.uninstall_lending()
    attention.install_lending()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].prism_original is before.prism_original


@torch.no_grad()
def test_tree_attention_is_lent_to_a_draft_where_triton_computes(monkeypatch, attended):
    """Pretended for the CPU, with the kernels' PyTorch twins: the draft's steps reach the tree attention and the target's
    forwards do not; a draft that a user put on something else stays there."""
    pytest.importorskip("triton")
    monkeypatch.setattr(attention, "use_triton", lambda implementation, device: implementation == "auto")
    input_ids, mask = prompts(2)
    target = tiny_target("llama", 3)
    plain = target.generate(input_ids, attention_mask=mask, **LENGTH)
    for implementation in ("sdpa", "eager"):
        draft = tiny_draft(target)
        draft.set_attn_implementation(implementation)
        output = target.generate(input_ids, attention_mask=mask, assistant_model=draft, **LENGTH)
        assert torch.equal(output, plain)
        assert draft.config._attn_implementation == implementation
        assert target.config._attn_implementation == "sdpa"
        if implementation == "sdpa":
            # As many as the steps of a tree bring new rows; a verification has 16.
            assert attended
            assert 1 + draft.generation_config.tree_num_nodes not in attended
            attended.clear()
    assert not attended


@pytest.mark.parametrize("shape", [(2, 4, 3, 5000), (1, 1, 3, 5000)], ids=["for each head", "for all rows"])
def test_masks_of_other_shapes_over_a_long_context(shape):
    """Attention code of others may hand on a mask for each head, or one for all rows."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5000, 8, generator=generator) for _ in range(2))
    mask = torch.rand(shape, generator=generator) > 0.5
    module = SimpleNamespace(num_key_value_groups=2, is_causal=False)
    found, expected = (function(module, query, key, value, mask)[0] for function in (attention.grouped_attention, sdpa_attention_forward))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
