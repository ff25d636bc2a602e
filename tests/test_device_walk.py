"""The walk on the device, on CPU tensors: lossless as the host's, which calls it takes, and one read per round."""

import types
from contextlib import nullcontext

import pytest
import torch
from pretend_accelerator import DEVICE, OnDevice, PretendedAccelerator, move_model
from tiny_models import (
    PAD_ID,
    VOCAB_SIZE,
    generate_twice,
    prompts,
    scripted_pair,
    tiny_draft,
    tiny_target,
    word_tokenizer,
)
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from transformers_prism import PrismDraftModel, generation
from transformers_prism.decoding import draft_side
from transformers_prism.decoding.sampler import treating_cpus_as_accelerators, warper_settings
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

pytestmark = pytest.mark.quick
LENGTH = {"max_new_tokens": 30, "pad_token_id": PAD_ID}
SETTINGS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "top_k": 0, "temperature": 0.8},
    "top-k and top-p": {"do_sample": True, "top_k": 30, "top_p": 0.9},
    "all warpers": {
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 60,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.9,
    },
}


def scripted(num_rows, settings, architecture="llama"):
    return scripted_pair(num_rows, {**settings, **LENGTH}, architecture)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_device_walk_equals_plain(architecture, num_rows, settings, device_walk):
    """Same tokens, the generator in plain's state, and paths of all lengths."""
    target, draft, input_ids, mask = scripted(num_rows, settings, architecture)
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **settings, **LENGTH)
    assert torch.equal(plain, speculative)
    assert same_state
    assert draft.last_speculation.walk == "device"
    accepted = {count for row in draft.last_speculation.accepted_per_round for count in row}
    assert len(accepted) > 2
    assert max(accepted) == 4


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_device_walk_ends_where_plain_ends(num_rows, do_sample, device_walk):
    """At each of several EOS tokens and at stop strings, inside a block, with the generator rewound."""
    settings = {"do_sample": do_sample, "top_k": 0}
    target, draft, input_ids, mask = scripted(num_rows, settings)
    ends = [{"eos_token_id": [draft.script[0][place], draft.script[-1][15]]} for place in (2, 5, 8, 11)]
    stop_strings = [f"w{row[5 + 4 * index]}" for index, row in enumerate(draft.script)]
    ends.append({"stop_strings": stop_strings, "tokenizer": word_tokenizer()})
    for end in ends:
        arguments = {**settings, **LENGTH, **end}
        plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **arguments)
        assert torch.equal(plain, speculative)
        assert same_state
        assert min(draft.last_speculation.num_committed) < 29
        assert draft.last_speculation.walk == "device"


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_device_walk_leaves_plains_cache(num_rows, do_sample, device_walk):
    """Rows that are done stay in a cache that is returned, and emit nothing."""
    settings = {"do_sample": do_sample, "top_k": 0, "return_dict_in_generate": True}
    target, draft, input_ids, mask = scripted(num_rows, {"do_sample": do_sample, "top_k": 0})
    arguments = {**settings, **LENGTH, "eos_token_id": draft.script[0][7]}
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **arguments)
    assert torch.equal(plain.sequences, speculative.sequences)
    assert same_state
    assert cache_of(plain).get_seq_length() == cache_of(speculative).get_seq_length()


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_device_walk_with_automatic_trees(num_rows, do_sample, device_walk, cheap_rounds):
    """Trees of every depth, plain steps in between, and copied continuations."""
    settings = {"do_sample": do_sample, "top_k": 0}
    target, draft, input_ids, mask = scripted(num_rows, settings)
    draft.generation_config.update(tree="auto", tree_depth=5, tree_num_nodes=16)
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **settings, **LENGTH)
    assert torch.equal(plain, speculative)
    assert same_state
    assert draft.last_speculation.walk == "device"
    assert len({tree.num_nodes for tree in draft.last_speculation.trees}) > 1


@pytest.mark.parametrize("num_rows", [1, 3])
def test_device_walk_and_host_walk_do_the_same(num_rows):
    """Token by token and round by round, with a real draft that is seldom right."""
    input_ids, mask = prompts(num_rows)
    target = tiny_target("llama", 3)
    rounds = []
    for walk in ("device", "host"):
        draft = tiny_draft(target)
        torch.manual_seed(1)
        with treating_cpus_as_accelerators() if walk == "device" else nullcontext():
            output = target.generate(
                input_ids, attention_mask=mask, do_sample=True, temperature=0.4, assistant_model=draft, **LENGTH
            )
        assert draft.last_speculation.walk == walk
        rounds.append((output.tolist(), draft.last_speculation.accepted_per_round))
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_device_walk_refuses_nan(do_sample, device_walk):
    """Where the host's walk does, with its words."""
    target, draft, input_ids, mask = scripted(3, {"do_sample": do_sample})
    draft.is_strict = False
    target.lm_head.register_forward_hook(lambda head, inputs, logits: logits.masked_fill(logits > 2, torch.nan))
    with pytest.raises(ValueError, match="expected finite logits from the target, got NaN for token 9 of row"):
        target.generate(input_ids, attention_mask=mask, do_sample=do_sample, assistant_model=draft, **LENGTH)


class EveryTenth(StoppingCriteria):
    """A criterion of the user's, whatever it looks at."""

    def __call__(self, input_ids, scores, **kwargs):
        """True for every tenth length."""
        return torch.full((input_ids.shape[0],), input_ids.shape[1] % 10 == 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.2},
        {"do_sample": True, "eta_cutoff": 0.001},
        {"return_dict_in_generate": True, "output_scores": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"stopping_criteria": StoppingCriteriaList([EveryTenth()])},
        {"do_sample": True, "logits_processor": LogitsProcessorList([TopKLogitsWarper(9, min_tokens_to_keep=2)])},
    ],
    ids=lambda settings: next(iter(reversed(settings))),
)
def test_other_calls_cannot_walk_on_the_device(settings, monkeypatch):
    """An accelerator takes the host's walk."""
    target, draft, input_ids, _ = scripted(1, {"do_sample": False})
    arguments = {"do_sample": False, "top_k": None, "assistant_model": draft, **LENGTH, **settings}
    draft.is_strict = False
    target.generate(input_ids, **arguments)
    assert draft.last_speculation.walk == "host"
    monkeypatch.setattr("transformers_prism.decoding.sampler.TRITON_DEVICES", ("cpu",))
    target.generate(input_ids, **arguments)
    assert draft.last_speculation.walk == "host"


def test_an_accelerator_walks_on_the_device_by_itself(monkeypatch):
    """And a CPU on the host."""
    target, draft, input_ids, _ = scripted(1, {"do_sample": False})
    for devices, walk in ((("cuda", "xpu"), "host"), (("cpu",), "device")):
        monkeypatch.setattr("transformers_prism.decoding.sampler.TRITON_DEVICES", devices)
        target.generate(input_ids, do_sample=False, assistant_model=draft, **LENGTH)
        assert draft.last_speculation.walk == walk


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_cpu_may_walk_as_accelerators_do(do_sample):
    """In a block, and where the call allows it; the statistics say which way was taken."""
    settings = {"do_sample": do_sample, "top_k": None}
    target, draft, input_ids, _ = scripted(1, settings)
    draft.is_strict = False
    for penalty, walk in ((1.0, "device"), (1.2, "host")):
        arguments = {**settings, **LENGTH, "repetition_penalty": penalty}
        with treating_cpus_as_accelerators():
            plain, speculative, same_state = generate_twice(target, draft, input_ids, **arguments)
        assert torch.equal(plain, speculative)
        assert same_state
        speculation = draft.last_speculation
        assert (speculation.walk, speculation.target) == (walk, "tree")
        assert speculation.coupled == (do_sample and walk == "device")
        draft.generation_config.tree_coupled = False
        generate_twice(target, draft, input_ids, **arguments)
        assert (draft.last_speculation.walk, draft.last_speculation.coupled) == ("host", False)
        draft.generation_config.tree_coupled = True


def test_warper_settings_are_read_from_stock_warpers_only():
    """In transformers' order, once each, with default options; a subclass may do anything."""

    class OwnTemperature(TemperatureLogitsWarper):
        pass

    stock = [
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(5),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.1),
        TypicalLogitsWarper(0.8),
    ]
    expected = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8}
    assert warper_settings(LogitsProcessorList(stock)) == expected
    assert warper_settings(LogitsProcessorList()) == {}
    for others in (
        [stock[1], stock[0]],
        [stock[1], stock[1]],
        [OwnTemperature(0.7)],
        [TopPLogitsWarper(0.9, filter_value=-1e4)],
        [MinPLogitsWarper(0.1, min_tokens_to_keep=3)],
        [RepetitionPenaltyLogitsProcessor(1.1)],
    ):
        assert warper_settings(LogitsProcessorList(others)) is None


def move_to_accelerator(monkeypatch, target, draft):
    """Move both there, and do what accelerators do."""
    draft.bind(target)
    monkeypatch.setattr(draft, "bind", lambda target, tokenizer: draft)  # refuses weights on such a device
    move_model(target)
    move_model(draft)
    monkeypatch.setattr("transformers_prism.decoding.transfer.ASYNCHRONOUS_DEVICES", (DEVICE.type,))
    for module in ("decoding.sampler", "decoding.sampling_noise"):
        monkeypatch.setattr(f"transformers_prism.{module}.TRITON_DEVICES", (DEVICE.type,))
    generator = types.SimpleNamespace(
        get_rng_state=lambda device: torch.get_rng_state(),
        set_rng_state=lambda state, device: torch.set_rng_state(state),
    )
    monkeypatch.setattr(torch, DEVICE.type, generator, raising=False)


def reads_by_round(
    monkeypatch, input_ids, mask, walk="device", attn_implementation=None, tree=None, draft_vocab_size=None, **settings
):
    """What the host waited for in each round of a call on the pretended accelerator, whose output is plain's."""
    target = tiny_target("llama", 3, attn_implementation)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    draft.generation_config.update(**{"tree_top_k": 30, "tree_depth": 2, "tree_num_nodes": 150, **(tree or {})})
    torch.manual_seed(5)
    plain = target.generate(input_ids, attention_mask=mask, **settings)
    move_to_accelerator(monkeypatch, target, draft)
    accelerator, starts, uploads = PretendedAccelerator(), [], []
    drop_finished = generation._drop_finished

    # The first thing that a round does.
    def begin_round(*args):
        starts.append(len(accelerator.reads))
        uploads.append(len(accelerator.uploads))
        return drop_finished(*args)

    monkeypatch.setattr(generation, "_drop_finished", begin_round)
    torch.manual_seed(5)
    with accelerator:
        output = target.generate(OnDevice(input_ids), attention_mask=OnDevice(mask), assistant_model=draft, **settings)
    assert torch.equal(output.host, plain)
    assert tree is not None or draft.last_speculation.acceptance_length > 1
    assert draft.last_speculation.walk == walk
    # A copy to the device that the host waits for would stop it until all that is queued is done.
    assert walk == "host" or accelerator.uploads[uploads[0] : uploads[-1]] == []
    # What follows the last round is not told apart from it.
    return [accelerator.reads[start:end] for start, end in zip(starts, starts[1:], strict=False)]


CHAIN = {"tree": "chain", "tree_depth": 3}
AUTO = {"tree": "auto", "tree_ngrams": True}


@pytest.mark.parametrize(
    ("attn_implementation", "kind", "tree"),
    [
        *[("sdpa", "greedy", None), ("eager", "greedy", None), ("sdpa", "all warpers", None)],
        *[("sdpa", "greedy", CHAIN), ("sdpa", "greedy", AUTO), ("sdpa", "all warpers", AUTO)],
    ],
)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_round_reads_the_device_once(attn_implementation, kind, tree, num_rows, monkeypatch, cheap_rounds):
    """Draft, verify, commit and what lies between: one copy of the walks, whatever else is computed; rows that end
    early leave the caches without a look at the device, and no tensor of the host meets one of the device."""
    settings, input_ids = SETTINGS[kind], prompts(1)[0].repeat(num_rows, 1)
    input_ids[:, 3] += torch.arange(num_rows)
    target = tiny_target("llama", 3, attn_implementation)
    torch.manual_seed(5)
    plain = target.generate(input_ids, **settings, **LENGTH)
    arguments = {**settings, **LENGTH, "attn_implementation": attn_implementation, "eos_token_id": int(plain[0, 20])}
    arguments["tree"] = tree
    rounds = reads_by_round(monkeypatch, input_ids, torch.ones_like(input_ids), **arguments)
    assert len(rounds) > 3
    for reads in rounds:
        assert len(reads) == 1, reads
        assert reads[0].startswith("_to_copy at")
        assert "walk.py" in reads[0]


def test_a_round_of_a_padded_batch_reads_the_device_once(monkeypatch):
    """The first too, in which the draft reads the prompts."""
    rounds = reads_by_round(monkeypatch, *prompts(3), do_sample=False, **LENGTH)
    assert len(rounds) > 3
    assert all(len(reads) == 1 for reads in rounds), rounds[0]


def test_tokens_of_an_answer_that_join_the_draft_vocabulary_are_not_read_back(monkeypatch):
    """They come from the host, where the walk has left them."""
    input_ids, mask = prompts(1)
    joined = []
    rows_beside = PrismDraftModel.rows_beside
    monkeypatch.setattr(
        PrismDraftModel, "rows_beside", lambda draft, ids, *text: joined.append(len(ids)) or rows_beside(draft, ids, *text)
    )
    _, *rounds = reads_by_round(monkeypatch, input_ids, mask, draft_vocab_size=8, tree=CHAIN, do_sample=False, **LENGTH)
    assert len(joined) > 3
    assert sum(joined) <= VOCAB_SIZE - 8  # each token once
    assert all(len(reads) == 1 for reads in rounds), rounds


def test_a_chat_goes_on_on_the_device(monkeypatch):
    """What was left unread of a turn, and the next turn, are read together."""
    target, turns = tiny_target("llama", 3), [prompts(1)[0], torch.tensor([[5, 9, 60]])]
    draft = tiny_draft(target)
    draft.generation_config.update(**CHAIN)

    def chat(accelerator=lambda values: values, **settings):
        cache, text = DynamicCache(config=target.config), torch.zeros((1, 0), dtype=torch.long)
        for turn in turns:
            text = accelerator(torch.cat((text, turn), dim=1))
            text = target.generate(
                text, attention_mask=torch.ones_like(text), **{CACHE_KEYWORD: cache}, do_sample=False, **LENGTH, **settings
            )
            text = getattr(text, "host", text)
        return text

    plain, spoken = chat(), []
    move_to_accelerator(monkeypatch, target, draft)
    join = draft_side.joined
    monkeypatch.setattr(
        draft_side, "joined", lambda parts: spoken.append([part.is_prompt for part in parts]) or join(parts)
    )
    with PretendedAccelerator():
        assert torch.equal(chat(OnDevice, assistant_model=draft), plain)
    assert [False, True] in spoken


CALLS = {
    "host's walk": {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "scores": {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "stop strings": {"stop_strings": ["w5"], "tokenizer": word_tokenizer()},
}
DRAFTS = {
    "draft vocabulary": {"draft_vocab_size": 20},
    "own keys and values": {"context_kv": "own_module", "num_processing_modules": 2, "num_layers_per_module": 2},
    "eagle3": {"module_form": "eagle3", "share_target_head": False},
}


@pytest.mark.parametrize("tree", [CHAIN, AUTO], ids=["chain", "auto"])
@pytest.mark.parametrize(
    ("settings", "overrides"),
    [*[(settings, {}) for settings in CALLS.values()], *[({}, overrides) for overrides in DRAFTS.values()]],
    ids=[*CALLS, *DRAFTS],
)
def test_calls_of_all_kinds_keep_host_and_device_apart(settings, overrides, tree, monkeypatch, cheap_rounds):
    """No operation mixes their tensors, and the text is plain's; a padded batch."""
    input_ids, mask = prompts(3)
    target = tiny_target("llama", 3)
    draft = tiny_draft(target, **overrides)
    draft.generation_config.update(**{"tree_depth": 3, **tree})
    arguments = {**LENGTH, "max_new_tokens": 16, **settings}
    torch.manual_seed(5)
    plain = target.generate(input_ids, attention_mask=mask, **arguments)
    move_to_accelerator(monkeypatch, target, draft)
    torch.manual_seed(5)
    with PretendedAccelerator():
        output = target.generate(
            OnDevice(input_ids), attention_mask=OnDevice(mask), assistant_model=draft, **arguments
        )
    is_output = "return_dict_in_generate" in settings
    plain, output = (plain.sequences, output.sequences) if is_output else (plain, output)
    assert torch.equal(getattr(output, "host", output), plain)
    assert draft.last_speculation.declined is None


def test_the_hosts_walk_reads_more(monkeypatch):
    """So that the count above can fail."""
    input_ids, mask = prompts(1)
    arguments = {"walk": "host", "do_sample": True, "repetition_penalty": 1.1}
    assert all(len(reads) > 1 for reads in reads_by_round(monkeypatch, input_ids, mask, **arguments, **LENGTH))


@pytest.mark.parametrize(
    "read",
    [
        lambda one: one.sum().item(),
        lambda one: bool(one.any()),
        lambda one: int(one[0]),
        lambda one: one.tolist(),
        lambda one: one.nonzero(),
        lambda one: one[one > 1],
        lambda one: torch.equal(one, one + 1),
        lambda one: one.cpu(),
        lambda one: torch.zeros(3).copy_(one),
    ],
)
def test_the_pretended_accelerator_notes_every_read(read):
    """And computing alone is none."""
    with PretendedAccelerator() as accelerator:
        values = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
        values += torch.arange(3, device=DEVICE)
        assert values.device == DEVICE
        assert not accelerator.reads
        read(values)
        assert len(accelerator.reads) == 1
        with pytest.raises(AssertionError, match="tensors of the host and of the device"):
            values + torch.ones(3)
