"""A converted draft computes what the authors' code computes: numbers within 1e-4, tokens, trees and paths exactly.

`tests/data/reference/README.md` says what was recorded. The smallest gap between two candidates of any recorded choice is
6e-4 in the trees, far above float32 noise, so trees are compared node by node.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from transformers_prism.conversion.prism_artifact import convert
from transformers_prism.decoding.drafter import Drafter
from transformers_prism.decoding.sampler import Sampler
from transformers_prism.decoding.tree import Tree
from transformers_prism.decoding.walk import walk_on_host
from transformers_prism.policy.settings import TreeSettings
from transformers_prism.transformers_names import cache_of

pytestmark = pytest.mark.quick

VECTORS = Path(__file__).parent / "data" / "reference"
CONFIGS = json.loads((VECTORS / "configs.json").read_text())
DRAFTS = ["c1_v2_prism2", "c2_v2_prism3", "c3_legacy_001", "c4_legacy_hass1"]
TOLERANCE = 1e-4
# With one module there is nobody else's context to see, so both modes must agree with the authors' decoding.
DRAFTS_IN_MODES = [(name, "prefill_module") for name in DRAFTS] + [("c4_legacy_hass1", "own_module")]
TREES = ["tree_16_5_4", "tree_60_5_10", "tree_8_3_2", "tree_5_5_1"]


@functools.cache
def read_vectors(name):
    """The arrays of one file as tensors, integers as int64."""
    with np.load(VECTORS / f"{name}.npz") as arrays:
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return {key: tensor.long() if tensor.dtype == torch.int16 else tensor for key, tensor in tensors.items()}


def convert_vectors(name, folder, **arguments):
    """The recorded draft, written in the authors' form, converted and loaded."""
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIGS[name]["drafter_config"]))
    weights = {key[2:]: tensor for key, tensor in read_vectors(name).items() if key.startswith("w.")}
    weights.pop("lm_head.weight", None)  # the target's; recorded beside the checkpoint, not in it
    save_file(weights, source / "model.safetensors")
    convert(source, folder / "draft", **arguments)
    return AutoModel.from_pretrained(folder / "draft").eval()


@pytest.fixture(scope="module", params=DRAFTS_IN_MODES, ids="-".join)
def recorded(request, tmp_path_factory):
    """A converted draft, bound to a target that lends it the recorded embedding and head, and its vectors."""
    name, context_kv = request.param
    vectors = read_vectors(name)
    draft = convert_vectors(name, tmp_path_factory.mktemp(name), context_kv=context_kv, num_target_layers=32)
    config = LlamaConfig(
        vocab_size=draft.config.vocab_size,
        hidden_size=draft.config.hidden_size,
        intermediate_size=8,
        num_hidden_layers=32,
        num_attention_heads=4,
    )
    target = LlamaForCausalLM(config).eval()
    target.get_input_embeddings().weight.data.copy_(vectors["w.embed_tokens.weight"])
    target.get_output_embeddings().weight.data.copy_(vectors["w.lm_head.weight"])
    return draft.bind(target), vectors


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def states(vectors, prefix):
    """Target states before the fusion layer where the draft has one."""
    raw = vectors.get(f"{prefix}_raw")
    return vectors[prefix] if raw is None else raw


@torch.no_grad()
def test_chain(recorded):
    """A prefill and four greedy steps through `forward`: outputs, logits, tokens, keys and values."""
    draft, vectors = recorded
    assert [draft.config.module_of_step(step) for step in range(5)] == vectors["chain.module_per_step"].tolist()
    output = draft(vectors["inf.input_ids"][:, 1:], states(vectors, "inf.target_hidden"), use_cache=True)
    assert_near(output.last_hidden_state, vectors["chain.prefill_hidden"])
    assert_near(draft.compute_logits(output.last_hidden_state), vectors["chain.prefill_logits"])
    assert_near(cache_of(output).layers[0].keys, vectors["chain.prefill_kv_k"])
    assert_near(cache_of(output).layers[0].values, vectors["chain.prefill_kv_v"])
    for step in range(1, 5):
        hidden = output.last_hidden_state[:, -1:]
        token = draft.compute_logits(hidden).argmax(dim=-1)
        assert torch.equal(token, vectors[f"chain.step{step}.input_token"])
        output = draft(token, hidden, draft_step=step, cache=cache_of(output))
        assert_near(output.last_hidden_state, vectors[f"chain.step{step}.hidden"])
        assert_near(draft.compute_logits(output.last_hidden_state), vectors[f"chain.step{step}.logits"])
    assert_near(cache_of(output).layers[0].keys, vectors["chain.final_kv_k"])
    assert_near(cache_of(output).layers[0].values, vectors["chain.final_kv_v"])


@torch.no_grad()
@pytest.mark.parametrize("tree_name", TREES)
def test_trees(recorded, tree_name):
    """Three rounds on one cache: every node with its parent, depth and score, every prefill output, every key."""
    draft, vectors = recorded
    drafter = Drafter(draft)
    outputs = []
    hook = draft.register_forward_hook(lambda module, inputs, output: outputs.append(output.last_hidden_state))
    keys, values = [vectors["chain.prefill_kv_k"]], [vectors["chain.prefill_kv_v"]]
    num_read = 0
    for round_number in (1, 2, 3):
        prefix = f"{tree_name}.r{round_number}."
        if round_number == 1:
            input_ids, hidden = vectors["inf.input_ids"], states(vectors, "inf.target_hidden")
            prefill_hidden = vectors["chain.prefill_hidden"]
        else:
            input_ids, hidden = vectors[prefix + "input_ids"], states(vectors, prefix + "target_hidden_new")
            prefill_hidden = vectors[prefix + "prefill_hidden"]
            keys.append(vectors[prefix + "new_kv_k"])
            values.append(vectors[prefix + "new_kv_v"])
        num_new = hidden.shape[1]
        assert num_read + num_new == input_ids.shape[1] - 1
        position_ids = torch.arange(num_read, num_read + num_new)[None]
        outputs.clear()
        drafter.prefill(input_ids[:, num_read + 1 :], hidden, position_ids, [num_new])
        # Of the prompt only the last output is made.
        assert outputs[0].shape[1] == (1 if round_number == 1 else num_new)
        assert_near(outputs[0], prefill_hidden[:, -outputs[0].shape[1] :])
        num_read += num_new

        tree = drafter.grow(settings_of(tree_name))
        assert torch.equal(tree.token_ids, vectors[prefix + "draft_tokens"])
        assert torch.equal(tree.parents[0, 1:], vectors[prefix + "parent"][1:])
        assert torch.equal(tree.depths[0], vectors[prefix + "tree_position_ids"])
        assert torch.equal(tree.ancestors(), vectors[prefix + "tree_mask"][0].bool())
        assert_near(tree.log_probs[0, 1:], vectors[prefix + "scores"])
        assert paths_of(tree) == [
            [node for node in path if node >= 0] for path in vectors[prefix + "retrieve_indices"].tolist()
        ]
        layer = drafter.cache.cache.layers[0]
        assert_near(layer.keys, torch.cat(keys, dim=2))
        assert_near(layer.values, torch.cat(values, dim=2))
    hook.remove()


def settings_of(tree_name):
    """The authors' total, depth and top-k in our terms: they count the root, and leave out draft step 0."""
    total_tokens, depth, top_k = (int(number) for number in tree_name.split("_")[1:])
    return TreeSettings("static", top_k=top_k, depth=depth + 1, num_nodes=total_tokens - 1)


def paths_of(tree):
    """Nodes from the root to each leaf, leaves in rising order: the rows of the authors' retrieve_indices."""
    parents = tree.parents[0].tolist()
    paths = []
    for leaf in sorted(set(range(tree.num_nodes)) - set(parents[1:])):
        path = [leaf]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def end_to_end(tmp_path_factory):
    """The recorded target and its converted draft; the target is given to the converter as a folder."""
    folder = tmp_path_factory.mktemp("e2e_v2")
    vectors = read_vectors("e2e_v2")
    settings = dict(CONFIGS["e2e_v2"]["target_config"])
    rope_theta = settings.pop("rope_theta")
    config = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, **settings)
    target = LlamaForCausalLM(config).eval()
    weights = {key.removeprefix("target."): tensor for key, tensor in vectors.items() if key.startswith("target.")}
    target.load_state_dict(weights)
    target.save_pretrained(folder / "target")
    draft = convert_vectors("e2e_v2", folder, target=folder / "target")
    assert draft.config.share_target_embedding
    return target, draft, vectors


@torch.no_grad()
def test_target_states(end_to_end):
    """The target that was rebuilt from the vectors computes the recorded states, the ones that the draft reads among
    them."""
    target, draft, vectors = end_to_end
    output = target(vectors["prompt0"], output_hidden_states=True)
    assert_near(output.logits, vectors["target_logits"])
    assert draft.config.target_layer_ids == [3, 17, 30]
    for index in (0, 3, 17, 30, 32):
        assert_near(output.hidden_states[index], vectors[f"target_hidden_states_{index}"])


@pytest.mark.parametrize("run", CONFIGS["e2e_v2"]["runs"])
def test_whole_generation(end_to_end, run):
    """Greedy text and accepted tokens of every round.

    The authors' loop ends on a whole round, without its bonus token. Room for one more tree lets this loop draft its
    last recorded round as freely; the rounds behind it were not recorded.
    """
    target, draft, vectors = end_to_end
    prompt, expected = vectors[f"prompt{run[3]}"], vectors[f"{run}.output_ids"]
    accepted = vectors[f"{run}.accept_length"].tolist()
    assert prompt.shape[1] + sum(accepted) + len(accepted) == expected.shape[1]
    settings = settings_of(run)
    draft.generation_config.update(
        tree="static", tree_top_k=settings.top_k, tree_depth=settings.depth, tree_num_nodes=settings.num_nodes
    )
    num_new = expected.shape[1] - prompt.shape[1] + 1 + settings.depth
    arguments = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0}
    output = target.generate(prompt, assistant_model=draft, return_dict_in_generate=True, **arguments)
    assert torch.equal(output.sequences[:, : expected.shape[1]], expected)
    assert output.speculation.accepted_per_round[0][: len(accepted)] == accepted
    plain = target.generate(prompt, **arguments)
    assert torch.equal(output.sequences, plain)
    recorded = vectors[f"naive{run[3]}.output_ids"]
    assert torch.equal(plain, recorded[:, : plain.shape[1]])


def tree_of_case(vectors, case):
    """The recorded tree of a verification case."""
    token_ids, parents = vectors[f"{case}.node_tokens"][None], vectors[f"{case}.node_parents"][None].clamp(min=0)
    depths = torch.zeros_like(parents)
    for node in range(1, parents.shape[1]):
        depths[0, node] = depths[0, parents[0, node]] + 1
    return Tree(token_ids, parents, depths, torch.zeros(parents.shape))


def walk_once(tree, logits, logits_processor=None, do_sample=False):
    """Nodes kept and tokens emitted for one sequence that ends in the tree's root, with room for every path."""
    generation_config = GenerationConfig(max_length=tree.num_nodes + 2, do_sample=do_sample)
    generation_config._pad_token_tensor = torch.tensor(0)
    processors = LogitsProcessorList(logits_processor or [])
    arguments = (StoppingCriteriaList(), generation_config)
    sampler = Sampler(tree.token_ids[:, :1], processors, *arguments)
    sequences = sampler.new_sequences(tree.token_ids[:, :1], *arguments)
    return walk_on_host(sequences, sampler, 0, tree, 0, logits), sequences.new_tokens[0]


@pytest.mark.parametrize(
    "case", "reject_all partial to_padded_leaf full_depth tie_first_row chain".split(), ids=lambda case: case
)
def test_greedy_verification(case):
    """The recorded row of retrieve_indices, cut at the accepted length, is the path; the bonus is the recorded one."""
    vectors, case = read_vectors("verification"), f"greedy.{case}"
    tree, logits = tree_of_case(vectors, case), vectors[f"{case}.node_logits"]
    num_accepted = int(vectors[f"{case}.accept_length"])
    row = vectors[f"{case}.retrieve_indices"][int(vectors[f"{case}.best_candidate"])]
    path = row[: num_accepted + 1].tolist()
    kept, emitted = walk_once(tree, logits)
    assert kept == path
    tokens = tree.token_ids[0, path[1:]].tolist()
    assert emitted == [*tokens, int(vectors[f"{case}.bonus_token"])]


@pytest.mark.parametrize(
    ("case", "processors"),
    [
        ("t1_all_rejected", []),
        ("t07_rejected", [TemperatureLogitsWarper(0.7)]),
        ("t1_topp_rejected", [TopPLogitsWarper(0.8)]),
    ],
)
def test_sampled_verification_rejects_to_the_same_distribution(case, processors):
    """Where all children of the root are rejected, the bonus follows the recorded distribution.

    The authors accept child by child with given uniform draws and sample the rest; this package samples from the target
    and looks whether a child holds the token. The draws cannot be replayed, so the recorded paths of the other sampled cases
    say nothing here. What both rules share is the law of the bonus given a rejection, recorded as `bonus_probs`.
    By the bound of Weissman et al. (2003) for 8 outcomes, total variation of n = 1000 samples exceeds 0.1 with
    a probability below 2**8 * exp(-2 * 1000 * 0.1**2) < 6e-7.
    """
    vectors, case = read_vectors("verification"), f"sample.{case}"
    tree, logits = tree_of_case(vectors, case), vectors[f"{case}.node_logits"]
    expected = vectors[f"{case}.bonus_probs"]
    torch.manual_seed(0)
    counts = torch.zeros_like(expected)
    while counts.sum() < 1000:
        kept, emitted = walk_once(tree, logits, processors, do_sample=True)
        if kept == [0]:
            counts[emitted[0]] += 1
    assert (counts[expected == 0] == 0).all()
    assert (counts / counts.sum() - expected).abs().sum() / 2 < 0.1
