"""The hook, and everything that generate() lets a user ask for, with a draft as without."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from compatibility_models import build
from tiny_models import (
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    generate_twice,
    prompts,
    scripted_draft,
    scripted_pair,
    tiny_draft,
    tiny_target,
    varied_target,
    word_tokenizer,
)
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from transformers_prism import install, uninstall
from transformers_prism.configuration_prism import tokenizer_hash
from transformers_prism.decoding import sequences as sequences_module
from transformers_prism.decoding.drafter import Drafter
from transformers_prism.policy import automatic
from transformers_prism.policy.costs import RoundCosts
from transformers_prism.policy.ngrams import NgramIndex
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

pytestmark = pytest.mark.quick
LENGTH = {"max_new_tokens": 30, "pad_token_id": PAD_ID}


def scripted(num_rows=1, architecture="llama", **kwargs):
    """For greedy output of 30 tokens."""
    return scripted_pair(num_rows, {"do_sample": False, **LENGTH}, architecture, **kwargs)


class RecordingStreamer(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.calls = []

    def put(self, value):
        """Keep a call."""
        self.calls.append(value.tolist())

    def end(self):
        """Keep the end."""
        self.calls.append("end")


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("as_list", [False, True])
def test_eos_inside_a_block_ends_each_row_where_plain_ends(num_rows, as_list):
    """Every token of the plain output serves as EOS once, so that rows end at every place of a block."""
    target, draft, input_ids, mask = scripted(num_rows)
    for token in set(draft.script[0][:12]):
        eos = [token, draft.script[-1][15]] if as_list else token
        plain, speculative, _ = generate_twice(
            target, draft, input_ids, mask, do_sample=False, eos_token_id=eos, **LENGTH
        )
        assert torch.equal(plain, speculative)


@pytest.mark.parametrize("num_new_tokens", [1, 2, 3, 5, 17])
def test_length_limits(num_new_tokens):
    """max_new_tokens, max_length and min_new_tokens cut as plain decoding does."""
    # min_new_tokens changes the text, so the script need not fit: a draft that is wrong is still lossless.
    target, draft, input_ids, mask = scripted(3, is_strict=False)
    for limits in (
        {"max_new_tokens": num_new_tokens},
        {"max_length": input_ids.shape[1] + num_new_tokens},
        {"max_new_tokens": 20, "min_new_tokens": num_new_tokens, "eos_token_id": draft.script[0][2]},
    ):
        plain, speculative, _ = generate_twice(
            target, draft, input_ids, mask, do_sample=False, pad_token_id=PAD_ID, **limits
        )
        assert torch.equal(plain, speculative)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("limit", "settings"), [(40, {}), (40, {"max_new_tokens": 8}), (12, {"max_new_tokens": 30})])
def test_a_callers_length_criterion_takes_the_place_of_the_setting(num_rows, limit, settings):
    """As in plain decoding, longer or shorter; longer ones ended with an IndexError."""
    target, draft, input_ids, mask = scripted(num_rows, is_strict=False)
    plain, speculative, _ = generate_twice(
        target,
        draft,
        input_ids,
        mask,
        do_sample=False,
        pad_token_id=PAD_ID,
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(limit)]),
        **settings,
    )
    assert plain.shape[1] == limit
    assert torch.equal(plain, speculative)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("excess", [-3, 0])
def test_a_length_criterion_within_the_prompt_leaves_one_token(num_rows, excess):
    """As in plain decoding, which asks after each token; without an end token it ended with a ValueError."""
    target, draft, input_ids, mask = scripted(num_rows, is_strict=False)
    criteria = StoppingCriteriaList([MaxLengthCriteria(input_ids.shape[1] + excess)])
    settings = {"do_sample": False, "pad_token_id": PAD_ID, "max_new_tokens": 8, "stopping_criteria": criteria}
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, **settings)
    assert plain.shape[1] == input_ids.shape[1] + 1
    assert torch.equal(plain, speculative)


@pytest.mark.parametrize(
    "limit",
    [{"max_length": int(1e30)}, {"max_new_tokens": 10**13}, {"max_length": float("inf")}, {"max_new_tokens": 24.5}],
    ids=str,
)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_limits_that_no_text_reaches(num_rows, limit):
    """Such as `model_max_length` of tokenizers without one. They neither overflow nor take memory."""
    target, draft, input_ids, mask = scripted(num_rows, is_strict=False)
    # The first of these ends a row, those of the last stay.
    eos = [row[7 + 5 * index] for index, row in enumerate(draft.script)]
    settings = {"do_sample": False, "pad_token_id": PAD_ID, "eos_token_id": eos, **limit}
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, **settings)
    assert torch.equal(plain, speculative)


def test_a_text_longer_than_the_first_room(monkeypatch):
    """Room for tokens grows with the text."""
    monkeypatch.setattr(sequences_module, "_FIRST_ROOM", 3)
    target, draft, input_ids, mask = scripted(3)
    streamer = RecordingStreamer()
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, do_sample=False, **LENGTH)
    assert torch.equal(plain, speculative)
    target.generate(input_ids, attention_mask=mask, assistant_model=draft, do_sample=False, streamer=streamer, **LENGTH)
    assert [list(step) for step in zip(*streamer.calls[1:-1], strict=True)] == plain[:, input_ids.shape[1] :].tolist()


def test_an_end_token_without_dimensions():
    """As a caller's criterion may hold it."""
    target, draft, input_ids, mask = scripted()
    criteria = StoppingCriteriaList([EosTokenCriteria(torch.tensor(draft.script[0][9]))])
    plain, speculative, _ = generate_twice(
        target, draft, input_ids, mask, do_sample=False, stopping_criteria=criteria, **LENGTH
    )
    assert plain.shape[1] < input_ids.shape[1] + 30
    assert torch.equal(plain, speculative)


class CountsInPlace(LogitsProcessor):
    """Makes a token that was written less likely, by a tensor of its own."""

    def __init__(self):
        self.counts = torch.zeros(97)

    def __call__(self, input_ids, scores):
        """Count the last token."""
        self.counts[input_ids[0, -1]] += 1
        return scores - 2 * self.counts


class EndsAtCount(StoppingCriteria):
    """Ends when it was asked often enough, which it counts in a tensor."""

    def __init__(self):
        self.count = torch.zeros(1)

    def __call__(self, input_ids, scores, **kwargs):
        """Count the call."""
        self.count += 1
        return torch.full((len(input_ids),), bool(self.count >= 7), device=input_ids.device)


class SumsTokens(BaseStreamer):
    """Adds up what it is given in a tensor."""

    def __init__(self):
        self.total = torch.zeros(1, dtype=torch.long)

    def put(self, value):
        """Add it."""
        self.total += value.sum()

    def end(self):
        """Mark the end."""
        self.total += 1


@pytest.mark.parametrize("is_inference", [True, False])
def test_objects_of_the_caller_write_to_tensors_of_their_own(is_inference):
    """In `torch.inference_mode` such tensors can be written to in this mode only."""
    target, draft, input_ids, mask = scripted(is_strict=False)
    found = []
    for assistant in ({}, {"assistant_model": draft}):
        with torch.inference_mode(is_inference):
            processor, criterion, streamer = CountsInPlace(), EndsAtCount(), SumsTokens()
            tokens = target.generate(
                input_ids,
                attention_mask=mask,
                do_sample=False,
                logits_processor=LogitsProcessorList([processor]),
                stopping_criteria=StoppingCriteriaList([criterion]),
                streamer=streamer,
                **assistant,
                **LENGTH,
            )
        found.append((tokens.tolist(), processor.counts.tolist(), criterion.count.item(), streamer.total.item()))
    assert found[0] == found[1]
    assert draft.last_speculation.declined is None
    assert len(found[0][0][0]) == input_ids.shape[1] + 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_draft_that_is_cast_within_a_chat_reads_it_anew(dtype):
    """What it had read was of another dtype, in which no product can be made."""
    target = tiny_target("llama", 3)
    draft, (input_ids, _) = tiny_draft(target), prompts(1)
    found = []
    for assistant in ({}, {"assistant_model": draft}):
        cache, tokens = DynamicCache(), input_ids
        for kind in (torch.float32, dtype, torch.float32):
            draft.to(kind)
            tokens = target.generate(tokens, **{CACHE_KEYWORD: cache}, do_sample=False, **assistant, **LENGTH)
            tokens = torch.cat((tokens, input_ids[:, :3]), dim=1)
        found.append(tokens)
    assert torch.equal(*found)


def test_a_call_with_a_time_limit_measures_nothing(monkeypatch):
    """The time is the caller's. Trees are small until a call without a limit has measured."""
    target = tiny_target("llama", 3)
    draft, calls = tiny_draft(target), []
    draft.generation_config.update(tree="auto")
    monkeypatch.setattr(automatic, "known_costs", lambda *_: calls.append(0) or RoundCosts([1, 64], [1.0, 1.1], 0.1))
    input_ids, mask = prompts(1)
    plain, speculative, _ = generate_twice(
        target, draft, input_ids, mask, do_sample=False, max_time=1000.0, **LENGTH
    )
    assert torch.equal(plain, speculative)
    assert not calls
    assert max(tree.num_nodes for tree in draft.last_speculation.trees) == 15
    target.generate(input_ids, attention_mask=mask, assistant_model=draft, do_sample=False, **LENGTH)
    assert len(calls) == 1


def test_what_is_returned_owns_its_memory():
    """A view of the room for the longest text could not be flattened, and would keep and save all of it."""
    target, draft, input_ids, mask = scripted(3, is_strict=False)
    target.generation_config.eos_token_id = draft.script[0][2]
    found = target.generate(
        input_ids, attention_mask=mask, assistant_model=draft, do_sample=False, max_length=100, pad_token_id=PAD_ID
    )
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("with_eos", [False, True])
def test_stop_strings(num_rows, with_eos):
    """Without an EOS, plain decoding goes on writing in stopped rows until all are stopped; so do we."""
    target, draft, input_ids, mask = scripted(num_rows)
    tokenizer = word_tokenizer()
    stop_strings = [f"w{row[5 + 4 * index]}" for index, row in enumerate(draft.script)]
    eos = {"eos_token_id": EOS_ID} if with_eos else {}
    plain, speculative, _ = generate_twice(
        target,
        draft,
        input_ids,
        mask,
        do_sample=False,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        **eos,
        **LENGTH,
    )
    assert torch.equal(plain, speculative)
    assert plain.shape[1] < input_ids.shape[1] + 30
    assert draft.last_speculation.declined is None


def test_rows_that_run_ahead_leave_the_generator_in_plains_state():
    """Sampling without an EOS: rows are cut back to the step at which the last one stopped."""
    input_ids, mask = prompts(3)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    tokenizer = word_tokenizer()
    torch.manual_seed(5)
    plain = target.generate(input_ids, attention_mask=mask, do_sample=True, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    stop_strings = [f"w{row[8]}" for row in draft.script]
    plain, speculative, same_state = generate_twice(
        target, draft, input_ids, mask, do_sample=True, stop_strings=stop_strings, tokenizer=tokenizer, **LENGTH
    )
    assert torch.equal(plain, speculative)
    assert same_state


def test_a_custom_criterion_sees_every_token_in_order():
    """At batch 1 any criterion is served, called once per emitted token with the ids so far."""
    target, draft, input_ids, mask = scripted()

    class EverySeventh(StoppingCriteria):
        seen: list = []

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(input_ids.tolist())
            return torch.full((input_ids.shape[0],), len(self.seen) % 7 == 0)

    seen = []
    for assistant in ({}, {"assistant_model": draft}):
        criterion = EverySeventh()
        criterion.seen = []
        target.generate(
            input_ids, do_sample=False, stopping_criteria=StoppingCriteriaList([criterion]), **assistant, **LENGTH
        )
        seen.append(criterion.seen)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 7


class ForbidTwoBefore(LogitsProcessor):
    """Keeps a state: forbids the argmax of two calls ago."""

    def __init__(self):
        self.past = []

    def __call__(self, input_ids, scores):
        self.past.append(scores.argmax(-1))
        if len(self.past) > 2:
            scores = scores.scatter(1, self.past[-3][:, None], -torch.inf)
        return scores


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_processor_with_a_state_of_its_own(num_rows):
    """Served at batch 1; a batch is decoded plainly, with a warning, since its rows run ahead of each other."""
    input_ids, mask = prompts(num_rows)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    draft = tiny_draft(target)
    outputs = []
    for assistant in ({}, {"assistant_model": draft}):
        processors = LogitsProcessorList([ForbidTwoBefore()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(
                target.generate(
                    input_ids, attention_mask=mask, do_sample=False, logits_processor=processors, **assistant, **LENGTH
                )
            )
    assert torch.equal(*outputs)
    assert (draft.last_speculation.declined is None) == (num_rows == 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
        {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": EOS_ID},
        {"bad_words_ids": [[5], [7, 8]], "suppress_tokens": [9], "begin_suppress_tokens": [11]},
        {"sequence_bias": {(6,): 5.0}, "forced_eos_token_id": EOS_ID},
        {"guidance_scale": 1.5},
        {"do_sample": True, "typical_p": 0.8, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001},
        {"do_sample": True, "renormalize_logits": True, "min_p": 0.05},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [token for token in range(3, 97) if (token + batch) % 3]},
    ],
)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_processors_of_transformers(settings, num_rows):
    """Each gives plain's tokens, with a draft that is mostly wrong about them."""
    input_ids, mask = prompts(num_rows)
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    arguments = {"do_sample": False, **LENGTH, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, **arguments)
    assert torch.equal(plain, speculative)
    assert same_state


@pytest.mark.parametrize("num_rows", [1, 3])
def test_scores_and_logits(num_rows):
    """One entry per emitted token, within float noise of plain's; rows that ended earlier hold zeros."""
    target, draft, input_ids, mask = scripted(num_rows)
    eos = draft.script[0][7]
    plain, speculative, _ = generate_twice(
        target,
        draft,
        input_ids,
        mask,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.0001,
        eos_token_id=eos,
        **LENGTH,
    )
    assert torch.equal(plain.sequences, speculative.sequences)
    for name in ("scores", "logits"):
        assert len(plain[name]) == len(speculative[name]) == plain.sequences.shape[1] - input_ids.shape[1]
        for step, (a, b) in enumerate(zip(plain[name], speculative[name], strict=True)):
            for row in range(num_rows):
                ended = eos in plain.sequences[row, input_ids.shape[1] :][:step].tolist()
                torch.testing.assert_close(b[row], torch.zeros_like(b[row]) if ended else a[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_returned_cache_is_the_one_plain_returns(architecture, num_rows):
    """Same classes, lengths, keys and values, also behind rows that ended earlier; plain decoding continues on it."""
    target, draft, input_ids, mask = scripted(num_rows, architecture)
    plain, speculative, _ = generate_twice(
        target,
        draft,
        input_ids,
        mask,
        do_sample=False,
        return_dict_in_generate=True,
        eos_token_id=draft.script[0][9],
        **LENGTH,
    )
    assert torch.equal(plain.sequences, speculative.sequences)
    real = torch.cat((mask, torch.ones_like(plain.sequences[:, mask.shape[1] : -1])), dim=1).bool()
    assert cache_of(plain).get_seq_length() == cache_of(speculative).get_seq_length() == real.shape[1]
    for a, b in zip(cache_of(plain).layers, cache_of(speculative).layers, strict=True):
        assert type(a) is type(b)
        assert a.keys.shape == b.keys.shape
        seen = real[:, -a.keys.shape[2] :]
        for name in ("keys", "values"):
            left, right = getattr(a, name).transpose(1, 2)[seen], getattr(b, name).transpose(1, 2)[seen]
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_a_draft_remembers_the_chat_that_a_cache_holds(monkeypatch):
    """The second turn drafts from all positions, as if the whole chat had been read at once, and so accepts as much."""
    input_ids, _ = prompts(1)
    target = varied_target("llama", input_ids, None, **LENGTH)
    draft = tiny_draft(target, initializer_range=0.1)
    cache = DynamicCache(config=target.config)
    first = target.generate(input_ids, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH)
    chat = torch.cat((first, torch.tensor([[20, 30, 40]])), dim=1)
    read = []
    original = Drafter.grow
    monkeypatch.setattr(Drafter, "grow", lambda self, *args: read.append(self.cache.width) or original(self, *args))
    trees = []
    for past in (cache, DynamicCache(config=target.config)):
        read.clear()
        output = target.generate(chat, **{CACHE_KEYWORD: past}, do_sample=False, assistant_model=draft, **LENGTH)
        assert read[0] == chat.shape[1]
        trees.append((output.tolist(), draft.last_speculation.accepted_per_round))
    assert trees[0] == trees[1]
    cache.crop(-5)
    read.clear()
    target.generate(chat, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH)
    assert read[0] < chat.shape[1]  # a cache that was changed since is not trusted


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2_mixed_windows"])
@pytest.mark.parametrize("only_new_ids", [False, True])
def test_a_chat_continues_on_a_given_cache(architecture, only_new_ids):
    """Three turns, each with a draft, on one cache; all ids given again or only the new ones with a full mask."""
    input_ids, _ = prompts(1)
    target = varied_target(architecture, input_ids, None, **LENGTH)
    draft = tiny_draft(target)
    histories = []
    for assistant in ({}, {"assistant_model": draft}):
        cache = DynamicCache(config=target.config)
        history = input_ids
        for turn in range(3):
            given = history
            if only_new_ids and turn:
                given = history[:, cache.get_seq_length() :]
            length = given.shape[1] + 11
            output = target.generate(
                given,
                attention_mask=torch.ones_like(history),
                **{CACHE_KEYWORD: cache},
                do_sample=False,
                max_length=length,
                pad_token_id=PAD_ID,
                **assistant,
            )
            assert cache.get_seq_length() == history.shape[1] + 11 - 1
            history = torch.cat((history, output[:, given.shape[1] :], torch.tensor([[20 + turn, 30, 40]])), dim=1)
        histories.append(history)
    assert torch.equal(*histories)
    assert type(cache.layers[0]) is type(DynamicCache(config=target.config).layers[0])


def chat_cache(target, draft, input_ids, **settings):
    """A first turn: its cache, and the text of the second turn."""
    cache = DynamicCache(config=target.config)
    draft.generation_config.update(**settings)
    first = target.generate(input_ids, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH)
    return cache, torch.cat((first, torch.tensor([[20, 30, 40]])), dim=1)


def test_a_chat_follows_settings_that_change(monkeypatch):
    """What a text adds to the draft vocabulary leaves with the setting, and comes back with it."""
    input_ids, _ = prompts(1)
    target = varied_target("llama", input_ids, None, **LENGTH)
    draft = tiny_draft(target, draft_vocab_size=20)
    cache, chat = chat_cache(target, draft, input_ids)
    texts = []
    original = Drafter.grow
    monkeypatch.setattr(Drafter, "grow", lambda self, *args: texts.append(self.text) or original(self, *args))
    for is_wanted in (False, True):
        draft.generation_config.tree_text_tokens = is_wanted
        chat = target.generate(chat, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH)
        assert all((text is not None) == is_wanted for text in texts)
        texts.clear()


def test_a_chat_follows_another_head():
    """A head that the target was given between two turns is the draft's, too, and the text is plain decoding's."""
    input_ids, _ = prompts(1)
    target = varied_target("llama", input_ids, None, **LENGTH)
    draft = tiny_draft(target, draft_vocab_size=20)
    cache, chat = chat_cache(target, draft, input_ids)
    head = torch.nn.Linear(32, 97, bias=False)
    target.set_output_embeddings(head)
    plain = target.generate(chat, do_sample=False, **LENGTH)
    assert torch.equal(
        target.generate(chat, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH), plain
    )
    assert torch.equal(draft.target_head.weight, head.weight[draft.draft_to_target])


def test_a_chat_indexes_only_what_is_new(monkeypatch, cheap_rounds):
    """Copies of a long text are looked up in the index of the turn before."""
    input_ids, _ = prompts(1)
    target = varied_target("llama", input_ids, None, **LENGTH)
    draft = tiny_draft(target)
    cache, chat = chat_cache(target, draft, input_ids, tree="auto")
    indexed: list[int] = []
    original = NgramIndex.extend
    monkeypatch.setattr(NgramIndex, "extend", lambda self, ids: indexed.append(len(ids)) or original(self, ids))
    plain = target.generate(chat, do_sample=False, **LENGTH)
    found = target.generate(chat, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH)
    assert torch.equal(found, plain)
    assert sum(indexed) < found.shape[1] - input_ids.shape[1]


@pytest.mark.parametrize("ends", [{"eos_token_id": None}, {}])
def test_a_streamer_beside_a_batch_gets_each_step_of_all_rows(ends):
    """As plain decoding gives it: padding for rows that have ended, and nothing of a step that a row has not reached."""
    target, _, input_ids, mask = scripted(3)
    plain = target.generate(input_ids, attention_mask=mask, do_sample=False, **LENGTH)
    if not ends:
        ends = {"eos_token_id": [int(plain[0, 14]), int(plain[1, 24])]}
    arguments = {"attention_mask": mask, "do_sample": False, **LENGTH, **ends}
    plain = target.generate(input_ids, **arguments)
    draft = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
    calls = []
    for assistant in ({}, {"assistant_model": draft}):
        streamer = RecordingStreamer()
        target.generate(input_ids, streamer=streamer, **assistant, **arguments)
        calls.append(streamer.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("pad_token_id", [None, PAD_ID])
def test_a_streamer_beside_stop_strings_gets_no_more_than_is_returned(pad_token_id):
    """Without an end token rows run on behind their stop, until the last one has stopped."""
    target, draft, input_ids, mask = scripted(3)
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 30, "pad_token_id": pad_token_id}
    settings |= {"stop_strings": [f"w{row[4 + 3 * index]}" for index, row in enumerate(draft.script)], "tokenizer": word_tokenizer()}
    target.generation_config.eos_token_id = None
    calls = []
    for assistant in ({}, {"assistant_model": draft}):
        streamer = RecordingStreamer()
        calls.append((target.generate(input_ids, streamer=streamer, **assistant, **settings).tolist(), streamer.calls))
    assert calls[0] == calls[1]


def test_streamer_gets_what_plain_gives_it():
    """The prompt, then one tensor of one token at a time, then the end."""
    target, draft, input_ids, _ = scripted()
    calls = []
    for assistant in ({}, {"assistant_model": draft}):
        streamer = RecordingStreamer()
        target.generate(input_ids, do_sample=False, streamer=streamer, **assistant, **LENGTH)
        calls.append(streamer.calls)
    assert calls[0] == calls[1]


def test_streamer_can_tell_accepted_tokens_from_bonus_tokens():
    """`put_round` comes before each round's tokens and says how many of them were drafted."""
    target, draft, input_ids, _ = scripted()
    streamer = RecordingStreamer()
    streamer.put_round = lambda num_accepted: streamer.calls.append(num_accepted)
    target.generate(input_ids, do_sample=False, streamer=streamer, assistant_model=draft, **LENGTH)
    rounds = [call for call in streamer.calls if isinstance(call, int)]
    assert rounds == draft.last_speculation.accepted_per_round[0]
    assert sum(rounds) + len(rounds) == 29


@pytest.mark.parametrize("num_rows", [1, 3])
def test_statistics(num_rows):
    """Committed tokens and rounds agree with the output; the pooled acceptance length is their ratio."""
    target, draft, input_ids, mask = scripted(num_rows)
    output = target.generate(
        input_ids,
        attention_mask=mask,
        do_sample=False,
        assistant_model=draft,
        return_dict_in_generate=True,
        **LENGTH,
    )
    speculation = output.speculation
    assert speculation is draft.last_speculation
    assert speculation.num_committed == [29] * num_rows
    assert speculation.num_rounds == [len(row) for row in speculation.accepted_per_round]
    assert [sum(row) + len(row) for row in speculation.accepted_per_round] == [29] * num_rows
    assert speculation.acceptance_length == 29 * num_rows / sum(speculation.num_rounds)
    accepted = [count for row in speculation.accepted_per_round for count in row]
    assert speculation.conditional_acceptance[0] == sum(count > 0 for count in accepted) / len(accepted)
    assert set(speculation.seconds) == {"draft", "check", "verify", "commit", "other"}
    assert all(seconds > 0 for seconds in speculation.seconds.values())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_static_caches(architecture, num_rows):
    """A static cache that generate() makes, and one of the user's, which then holds what plain would have left."""
    target, draft, input_ids, mask = scripted(num_rows, architecture)
    plain, speculative, _ = generate_twice(
        target, draft, input_ids, mask, do_sample=False, cache_implementation="static", **LENGTH
    )
    assert torch.equal(plain, speculative)
    caches = []
    for assistant in ({}, {"assistant_model": draft}):
        cache = StaticCache(config=target.config, max_cache_len=48)
        output = target.generate(
            input_ids, attention_mask=mask, do_sample=False, **{CACHE_KEYWORD: cache}, **assistant, **LENGTH
        )
        assert torch.equal(output, plain)
        caches.append(cache)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert int(a.get_seq_length()) == int(b.get_seq_length())
        seen = min(int(a.get_seq_length()), a.keys.shape[2])
        left, right = a.keys[:, :, 6:seen], b.keys[:, :, 6:seen]  # behind the longest left padding
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_the_end_of_learned_positions_is_not_drafted_past():
    """An EOS may end the text before the context does, whatever max_length says; a longer prompt is refused."""
    input_ids, _ = prompts(1)
    target = tiny_target("gpt2", 0, n_positions=24)
    draft = tiny_draft(target)
    draft.generation_config.update(tree_depth=8, tree_num_nodes=30)
    plain = target.generate(input_ids, do_sample=False, max_length=24, pad_token_id=PAD_ID)
    eos = {"eos_token_id": int(plain[0, 22]), "max_length": 60, "pad_token_id": PAD_ID, "do_sample": False}
    assert torch.equal(target.generate(input_ids, **eos), target.generate(input_ids, assistant_model=draft, **eos))
    with pytest.raises(ValueError, match="input_ids: expected at most 24 tokens .* got 27"):
        target.generate(input_ids.repeat(1, 3), do_sample=False, assistant_model=draft, **LENGTH)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_chunked_prefill(num_rows):
    """The draft reads the last chunk only; the output does not change."""
    target, draft, input_ids, mask = scripted(num_rows)
    plain, speculative, _ = generate_twice(
        target, draft, input_ids, mask, do_sample=False, prefill_chunk_size=4, **LENGTH
    )
    assert torch.equal(plain, speculative)
    assert draft.last_speculation.declined is None


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"return_dict_in_generate": True, "output_attentions": True},
    ],
)
def test_what_the_loop_cannot_serve_is_decoded_plainly(settings):
    """With one warning, the same output, and the reason in the statistics."""
    target, draft, input_ids, mask = scripted(2)
    target.set_attn_implementation("eager")
    plain = target.generate(input_ids, attention_mask=mask, do_sample=False, **settings, **LENGTH)
    with pytest.warns(UserWarning, match="decoding without the draft"):
        speculative = target.generate(
            input_ids, attention_mask=mask, do_sample=False, assistant_model=draft, **settings, **LENGTH
        )
    if settings.get("return_dict_in_generate"):
        assert speculative.speculation.declined is not None
        assert len(plain) == len(speculative)
        plain, speculative = plain.sequences, speculative.sequences
    assert torch.equal(plain, speculative)
    assert draft.last_speculation.acceptance_length == 1


def test_padding_behind_the_end_of_a_plain_row_is_not_counted():
    target, draft, input_ids, mask = scripted(2)
    settings = {"do_sample": False, "use_cache": False, "eos_token_id": draft.script[1][0], "pad_token_id": PAD_ID}
    with pytest.warns(UserWarning, match="decoding without the draft"):
        found = target.generate(input_ids, attention_mask=mask, assistant_model=draft, max_new_tokens=30, **settings)
    lengths = [(row == draft.script[1][0]).nonzero() for row in found[:, input_ids.shape[1] :]]
    expected = [int(places[0]) if len(places) else found.shape[1] - input_ids.shape[1] - 1 for places in lengths]
    assert draft.last_speculation.num_committed == expected
    assert expected[1] == 0


@pytest.mark.parametrize("tree", ["static", "auto"])
def test_experts_are_implemented_as_plain_decoding_does(monkeypatch, tree):
    """On an accelerator it reads single tokens in another way than prompts; in that way trees may not fit its memory."""
    target = tiny_target("qwen3_moe", 0)
    target.set_experts_implementation("grouped_mm")
    draft = tiny_draft(target)
    draft.generation_config.update(tree=tree)
    entered = []

    @contextlib.contextmanager
    def decode():
        entered.append(True)
        yield
        entered.pop()

    def ids_of(arguments, named):
        return named["input_ids"] if "input_ids" in named else arguments[0]

    monkeypatch.setattr(target, "_optimize_model_for_decode", decode)
    seen = []
    target.register_forward_pre_hook(lambda *given: seen.append((ids_of(*given[1:]).shape[1], bool(entered))), with_kwargs=True)
    input_ids, _ = prompts(1)
    for assistant in ({}, {"assistant_model": draft}):
        seen.clear()
        target.generate(input_ids, do_sample=False, **assistant, **LENGTH)
        assert len({length for length, _ in seen}) > 1
        assert all(is_decode == (length == 1) for length, is_decode in seen)


def test_inputs_embeds_are_decoded_plainly():
    """There are no token ids for the draft to read."""
    target, draft, input_ids, _ = scripted()
    embeds = target.get_input_embeddings()(input_ids)
    plain = target.generate(inputs_embeds=embeds, do_sample=False, **LENGTH)
    with pytest.warns(UserWarning, match="inputs_embeds"):
        assert torch.equal(
            plain, target.generate(inputs_embeds=embeds, do_sample=False, assistant_model=draft, **LENGTH)
        )


@pytest.mark.parametrize("num_rows", [1, 3])
def test_inputs_embeds_with_their_ids_are_drafted_for(num_rows):
    """As models that put images into the embeddings call their text part: the prompt is read as given, the draft reads ids."""
    target = varied_target("llama", *prompts(num_rows), **LENGTH)
    input_ids, mask = prompts(num_rows)
    embeds = target.get_input_embeddings()(input_ids).detach() + 0.3
    arguments = {"inputs_embeds": embeds, "attention_mask": mask, "do_sample": False, **LENGTH}
    plain = target.generate(input_ids=input_ids, **arguments)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(target.generate(input_ids=input_ids, assistant_model=draft, **arguments), plain)
    assert draft.last_speculation.acceptance_length > 1.5



def test_prompt_lookup_beside_a_draft_changes_nothing():
    """The draft is used; the text is plain's."""
    target, draft, input_ids, mask = scripted()
    plain = target.generate(input_ids, do_sample=False, **LENGTH)
    speculative = target.generate(
        input_ids, do_sample=False, assistant_model=draft, prompt_lookup_num_tokens=3, **LENGTH
    )
    assert torch.equal(plain, speculative)


def test_an_empty_prompt_starts_from_bos():
    """generate() makes it one token long."""
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    assert torch.equal(
        target.generate(do_sample=False, **LENGTH), target.generate(do_sample=False, assistant_model=draft, **LENGTH)
    )


def test_a_batch_without_rows():
    """Plain decoding returns it, or says what is wrong with it."""
    target = tiny_target("llama", 3)
    draft, input_ids = tiny_draft(target), torch.zeros(0, 4, dtype=torch.long)
    found = []
    for settings in ({}, {"assistant_model": draft}):
        try:
            found.append(target.generate(input_ids, do_sample=False, **LENGTH, **settings).tolist())
        except Exception as error:
            found.append(repr(error))
    assert found[0] == found[1]


def test_a_number_of_positions_without_a_table_limits_nothing():
    """NemotronH has neither learned nor rotary positions."""
    target = build("nemotron_h", {"max_position_embeddings": 16})
    input_ids, _ = prompts(1, length=20)
    plain, speculative, _ = generate_twice(target, tiny_draft(target), input_ids, do_sample=False, **LENGTH)
    assert torch.equal(plain, speculative)


def test_learned_positions_are_never_exceeded():
    """GPT-2 has no position beyond its context: the deepest nodes of the last rounds are left out."""
    input_ids, mask = prompts(2)
    target = tiny_target("gpt2", 0, n_positions=24)
    draft = tiny_draft(target)
    draft.generation_config.update(tree_depth=8, tree_num_nodes=30)
    plain, speculative, _ = generate_twice(
        target, draft, input_ids, mask, do_sample=False, max_length=24, pad_token_id=PAD_ID
    )
    assert torch.equal(plain, speculative)


def test_a_draft_in_train_mode_draws_nothing():
    """Dropout would disturb the generator; the draft is put back into train mode."""
    target, _, input_ids, mask = scripted()
    draft = tiny_draft(target, attention_dropout=0.5).train()
    plain, speculative, same_state = generate_twice(target, draft, input_ids, mask, do_sample=True, **LENGTH)
    assert torch.equal(plain, speculative)
    assert same_state
    assert draft.training


@pytest.mark.parametrize("draft_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
def test_draft_and_target_may_differ_in_dtype(draft_dtype, target_dtype):
    """States are cast to the draft's dtype, its outputs to the head's."""
    target, _, input_ids, mask = scripted(2)
    target = target.to(target_dtype)
    draft = tiny_draft(target).to(draft_dtype)
    output = target.generate(input_ids, attention_mask=mask, do_sample=False, assistant_model=draft, **LENGTH)
    assert output.shape == (2, input_ids.shape[1] + 30)
    if target_dtype == torch.float32:
        assert torch.equal(output, target.generate(input_ids, attention_mask=mask, do_sample=False, **LENGTH))


def test_half_precision_differs_from_plain_only_at_near_ties():
    """In bf16 a tree's rows round differently than single rows: where the texts part, the two best logits are as
    close as that rounding, and both runs continue losslessly from there."""
    num_parted = 0
    for seed in range(12):
        input_ids, _ = prompts(1, seed=seed)
        target = tiny_target("llama", seed).to(torch.bfloat16)
        script = target.generate(input_ids, do_sample=False, **LENGTH)
        draft = scripted_draft(target, script, input_ids.shape[1], is_strict=False)
        plain, speculative, _ = generate_twice(
            target, draft, input_ids, do_sample=False, return_dict_in_generate=True, output_logits=True, **LENGTH
        )
        same = plain.sequences == speculative.sequences
        if same.all():
            continue
        num_parted += 1
        step = int((~same[0]).nonzero()[0]) - input_ids.shape[1]
        best = plain.logits[step][0].topk(2).values
        assert best[0] - best[1] <= 0.04 * best[0].abs()
    assert num_parted <= 6


def test_convolution_layers_are_served_by_a_chain():
    """Their states roll back along a chain, not across a tree."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        initializer_range=0.3,
        pad_token_id=PAD_ID,
        eos_token_id=None,
    )
    input_ids, _ = prompts(1)
    torch.manual_seed(4)
    target = Lfm2ForCausalLM(config).eval()
    plain = target.generate(input_ids, do_sample=False, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(plain, target.generate(input_ids, do_sample=False, assistant_model=draft, **LENGTH))
    assert draft.last_speculation.declined is None
    assert draft.last_speculation.acceptance_length > 2


def test_a_target_without_position_ids_is_served_by_a_chain():
    """BLOOM derives its positions from the mask."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(4)
    config = BloomConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=4, n_head=4, pad_token_id=PAD_ID, eos_token_id=None
    )
    target = BloomForCausalLM(config).eval()
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    input_ids, mask = prompts(2)
    plain = target.generate(input_ids[:1], do_sample=False, **LENGTH)
    draft = scripted_draft(target, plain, input_ids.shape[1])
    assert torch.equal(plain, target.generate(input_ids[:1], do_sample=False, assistant_model=draft, **LENGTH))
    assert draft.last_speculation.acceptance_length > 2
    batch = target.generate(input_ids, attention_mask=mask, do_sample=False, **LENGTH)
    draft = scripted_draft(target, batch, input_ids.shape[1])
    output = target.generate(input_ids, attention_mask=mask, do_sample=False, assistant_model=draft, **LENGTH)
    assert torch.equal(batch, output)
    assert draft.last_speculation.acceptance_length > 2


@pytest.mark.parametrize("num_rows", [1, 3])
def test_chain_setting(num_rows):
    """`tree="chain"` with one candidate per step."""
    target, draft, input_ids, mask = scripted(num_rows, tree="chain", tree_depth=5, tree_num_nodes=20)
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, do_sample=False, **LENGTH)
    assert torch.equal(plain, speculative)
    assert max(count for row in draft.last_speculation.accepted_per_round for count in row) <= 5


def test_a_generation_config_of_the_call_wins_over_the_drafts():
    """tree_depth=1 allows one accepted token per round."""
    target, draft, input_ids, _ = scripted()
    config = GenerationConfig(do_sample=False, tree_depth=1, tree_num_nodes=1, **LENGTH)
    output = target.generate(input_ids, generation_config=config, assistant_model=draft)
    assert torch.equal(output, target.generate(input_ids, do_sample=False, **LENGTH))
    assert max(draft.last_speculation.accepted_per_round[0]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tree": "bush"}, "tree: expected one of auto, static, chain, got 'bush'"),
        ({"tree_ngrams": 3}, "tree_ngrams: expected True or False, got 3"),
        ({"tree_top_k": 0}, "tree_top_k: expected an integer of at least 1, got 0"),
        ({"tree_depth": 2.5}, "tree_depth: expected an integer of at least 1, got 2.5"),
        ({"tree_top_k": 2, "tree_depth": 2, "tree_num_nodes": 7}, "expected at most 6, .* got 7"),
    ],
)
def test_bad_settings_are_refused_before_any_token(settings, message):
    """And nothing was changed."""
    target, draft, input_ids, _ = scripted()
    draft.generation_config.update(**settings)
    streamer = RecordingStreamer()
    with pytest.raises(ValueError, match=message):
        target.generate(input_ids, do_sample=False, assistant_model=draft, streamer=streamer, **LENGTH)
    assert streamer.calls == [input_ids.tolist()]


def test_settings_survive_saving(tmp_path):
    """They are generation settings, so they are kept in generation_config.json."""
    target = tiny_target()
    draft = tiny_draft(target)
    draft.generation_config.update(tree="chain", tree_depth=3)
    draft.save_pretrained(tmp_path)
    again = type(draft).from_pretrained(tmp_path)
    assert (again.generation_config.tree, again.generation_config.tree_depth) == ("chain", 3)
    again.save_pretrained(tmp_path / "twice")
    assert type(draft).from_pretrained(tmp_path / "twice").generation_config.tree == "chain"


def test_the_hook_can_be_undone_and_leaves_other_assistants_alone():
    """Installing twice wraps once; another model as assistant takes transformers' own path."""
    wrapped = GenerationMixin._assisted_decoding
    install()
    assert GenerationMixin._assisted_decoding is wrapped
    uninstall()
    try:
        assert GenerationMixin._assisted_decoding is wrapped._prism_original
    finally:
        tiny_draft(tiny_target())  # making a draft installs the hook again
    assert GenerationMixin._assisted_decoding._prism_original is wrapped._prism_original
    target, assistant, input_ids = tiny_target("llama", 3), tiny_target("llama", 4), prompts(1)[0]
    plain = target.generate(input_ids, do_sample=False, **LENGTH)
    assert torch.equal(plain, target.generate(input_ids, do_sample=False, assistant_model=assistant, **LENGTH))


def test_beams_and_return_sequences_stay_as_they_are():
    """generate() takes beams elsewhere, and refuses several sequences before our loop."""
    target, draft, input_ids, _ = scripted()
    plain = target.generate(input_ids, num_beams=2, do_sample=False, **LENGTH)
    assert torch.equal(
        plain, target.generate(input_ids, num_beams=2, do_sample=False, assistant_model=draft, **LENGTH)
    )
    with pytest.raises(ValueError, match="num_return_sequences"):
        target.generate(input_ids, do_sample=True, num_return_sequences=2, assistant_model=draft, **LENGTH)


def test_pipeline_takes_a_draft():
    """The ids of special tokens equal the target's, which the pipeline asks for."""
    target = tiny_target("llama", 3)
    draft = tiny_draft(target)
    arguments = {"model": target, "tokenizer": word_tokenizer()}
    settings = {"max_new_tokens": 12, "do_sample": False}
    plain = pipeline("text-generation", **arguments)("w5 w6 w7", **settings)
    assert pipeline("text-generation", assistant_model=draft, **arguments)("w5 w6 w7", **settings) == plain
    assert draft.last_speculation is not None


def test_a_draft_does_not_generate_alone():
    """It says how it is used."""
    with pytest.raises(TypeError, match="assistant_model=draft"):
        tiny_draft(tiny_target()).generate(torch.tensor([[1, 2]]))


class Poisoned(torch.nn.Module):
    """A head that writes NaN from its n-th call on."""

    def __init__(self, head, num_good_calls):
        super().__init__()
        self.head, self.left = head, num_good_calls
        self.weight = head.weight

    def forward(self, hidden_states):
        """Logits, or NaN."""
        self.left -= 1
        logits = self.head(hidden_states)
        return logits if self.left >= 0 else torch.full_like(logits, torch.nan)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_nan_logits_of_the_target_stop_with_an_error(do_sample, num_rows):
    """And the user's cache, the draft and the hook are as they were."""
    target, draft, input_ids, mask = scripted(num_rows, is_strict=False)
    draft.train()
    cache = DynamicCache(config=target.config)
    layers = list(cache.layers)
    head = target.lm_head
    target.lm_head = Poisoned(head, num_good_calls=3)
    with pytest.raises(ValueError, match="expected finite logits from the target, got NaN"):
        target.generate(
            input_ids,
            attention_mask=mask,
            **{CACHE_KEYWORD: cache},
            do_sample=do_sample,
            assistant_model=draft,
            repetition_penalty=1.1 if do_sample else 1.0,
            **LENGTH,
        )
    assert cache.layers == layers
    assert cache.get_seq_length() == 0
    assert draft.training
    target.lm_head = head
    plain = target.generate(input_ids, attention_mask=mask, do_sample=False, **LENGTH)
    assert torch.equal(
        plain,
        target.generate(
            input_ids, attention_mask=mask, **{CACHE_KEYWORD: cache}, do_sample=False, assistant_model=draft, **LENGTH
        ),
    )


def test_a_draft_with_broken_weights_costs_speed_only():
    """NaN in the draft makes poor trees, not wrong text."""
    target, _, input_ids, mask = scripted(2)
    draft = tiny_draft(target)
    draft.processing_modules[1].input_projection.weight.data.fill_(torch.nan)
    plain, speculative, _ = generate_twice(target, draft, input_ids, mask, do_sample=False, **LENGTH)
    assert torch.equal(plain, speculative)


def test_a_tokenizer_with_a_token_more_is_no_reason_to_refuse():
    """What is generated does not depend on it; it was refused in a draft's first call only."""
    target = tiny_target("llama", 0)
    tokenizer = word_tokenizer()
    draft = tiny_draft(target, target_fingerprint={"tokenizer_hash": tokenizer_hash(tokenizer)})
    tokenizer.add_tokens(["[PAD]"])
    input_ids, _ = prompts(1)
    with pytest.warns(UserWarning, match="tokenizer_hash: expected"):
        target.generate(input_ids, assistant_model=draft, tokenizer=tokenizer, stop_strings=["w1"], **LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_draft(target, target_fingerprint={"tokenizer_hash": "0"}).bind(target, tokenizer=SimpleNamespace())  # a processor


def test_a_draft_for_another_target_is_refused_with_both_names():
    """Sizes, layers and vocabulary."""
    target = tiny_target("llama", 0)
    input_ids, _ = prompts(1)
    wide = tiny_target("llama", 0, hidden_size=64)
    with pytest.raises(ValueError, match=r"hidden_size: expected 64 \(draft\), got 32 \(target\)"):
        target.generate(input_ids, assistant_model=tiny_draft(wide), **LENGTH)
    deep = tiny_target("llama", 0, num_hidden_layers=8)
    with pytest.raises(ValueError, match=r"num_hidden_layers: expected 8 \(draft\), got 4 \(target\)"):
        target.generate(input_ids, assistant_model=tiny_draft(deep), **LENGTH)
    more_words = tiny_draft(tiny_target("llama", 0, vocab_size=98))
    with pytest.raises(ValueError, match=r"vocab_size: expected 98 \(draft\), got 97 \(target\)"):
        more_words.bind(target)
    # transformers would advise to pass two tokenizers, which could not help.
    with pytest.raises(ValueError, match=r"vocab_size: expected 98 \(draft\), got 97 \(target\)"):
        target.generate(input_ids, assistant_model=more_words, **LENGTH)


@pytest.mark.parametrize("architecture", ["jamba", "mamba"])
def test_plain_decoding_is_told_of_once_and_no_chain(architecture):
    """Targets of which only the prompt's forward shows that they cannot be served."""
    target = build(architecture).float().eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        target.generate(prompts(1)[0], assistant_model=tiny_draft(target), max_new_tokens=8, pad_token_id=PAD_ID)
    reasons = [str(one.message) for one in told if "draft" in str(one.message)]
    assert len(reasons) == 1, reasons
    assert reasons[0].startswith("decoding without the draft")


def test_a_criterion_in_a_list_of_its_own_counts():
    """One that may keep a state for the whole batch: plain decoding, as where it stands in the outer list."""

    class SixCalls(StoppingCriteria):
        def __init__(self):
            self.num_calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.num_calls += 1
            return torch.full((len(input_ids),), self.num_calls >= 6, dtype=torch.bool)

    target = tiny_target("llama", 1)
    input_ids, attention_mask = prompts(3)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **LENGTH}

    def nested():
        return StoppingCriteriaList([StoppingCriteriaList([SixCalls()])])

    plain = target.generate(**inputs, stopping_criteria=nested())
    with pytest.warns(UserWarning, match="SixCalls may keep a state for the whole batch"):
        found = target.generate(**inputs, stopping_criteria=nested(), assistant_model=tiny_draft(target))
    assert torch.equal(found, plain)


def test_a_list_of_criteria_that_combines_them_otherwise():
    """Its own call decides: here all criteria have to agree, while transformers' list ends at the first."""

    class Multiple(StoppingCriteria):
        def __init__(self, number):
            self.number = number

        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] % self.number == 0, dtype=torch.bool)

    class All(StoppingCriteriaList):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.stack([one(input_ids, scores) for one in self]).all(dim=0)

    target = tiny_target("llama", 1)
    input_ids, attention_mask = prompts(1)
    criteria = StoppingCriteriaList([All([Multiple(3), Multiple(7)])])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "stopping_criteria": criteria, **LENGTH}
    plain = target.generate(**inputs)
    assert plain.shape[1] % 21 == 0
    assert torch.equal(target.generate(**inputs, assistant_model=tiny_draft(target)), plain)


def test_a_processor_that_writes_to_the_ids_is_refused():
    def replace(input_ids, scores):
        input_ids[:, -1] = 7
        return scores

    target = tiny_target("llama", 1)
    with pytest.raises(ValueError, match="logits_processor: expected processors that leave input_ids as they are"):
        target.generate(
            prompts(1)[0], logits_processor=LogitsProcessorList([replace]), assistant_model=tiny_draft(target), **LENGTH
        )


@pytest.mark.parametrize("placeholder", [-200, -1, VOCAB_SIZE, 32000])
@pytest.mark.parametrize("draft_vocab_size", [None, 30])
def test_placeholders_without_an_embedding_beside_inputs_embeds(placeholder, draft_vocab_size):
    """As LLaVA's own code writes them; the draft reads another token there."""
    target = tiny_target("llama", 1)
    input_ids = prompts(1)[0]
    embeds = target.get_input_embeddings()(input_ids).detach()
    input_ids[0, 3] = placeholder
    plain = target.generate(inputs_embeds=embeds, input_ids=input_ids, **LENGTH)
    draft = tiny_draft(target, draft_vocab_size=draft_vocab_size)
    found = target.generate(inputs_embeds=embeds, input_ids=input_ids, assistant_model=draft, **LENGTH)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_text_that_crosses_a_part_of_attention(implementation):
    """Masks of all forms are taken."""
    target = tiny_target("llama", 1, implementation, max_position_embeddings=1024)
    input_ids, _ = prompts(1, 250)
    plain = target.generate(input_ids, **LENGTH)
    draft = scripted_draft(target, plain, 250)
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **LENGTH), plain)


def test_a_placeholder_without_an_embedding_in_a_later_turn():
    """The draft reads another token there, as in a prompt."""
    target = tiny_target("llama", 1)
    found = []
    for draft in (None, tiny_draft(target)):
        cache, input_ids = DynamicCache(config=target.config), prompts(1)[0]
        for _ in range(2):
            known = input_ids.clamp(0, VOCAB_SIZE - 1)
            embeds = target.get_input_embeddings()(known).detach()
            given = {"inputs_embeds": embeds, "input_ids": input_ids, CACHE_KEYWORD: cache}
            output = target.generate(**given, assistant_model=draft, **LENGTH)
            input_ids = torch.cat((output, torch.tensor([[-200, 5, VOCAB_SIZE + 7]])), dim=1)
        found.append(output)
    assert torch.equal(*found)
    assert draft.last_speculation.declined is None


def test_a_tensor_parallel_target_is_decoded_plainly():
    """Each of its processes would choose trees of its own."""
    target = tiny_target("llama", 1)
    draft = tiny_draft(target)
    target._tp_size = 2
    with pytest.warns(UserWarning, match="tensor-parallel"):
        target.generate(prompts(1)[0], assistant_model=draft, **LENGTH)
    assert "tensor-parallel" in draft.last_speculation.declined


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_a_cache_that_was_filled_in_another_dtype(dtypes):
    """Keys of both become those of the wider one, as in plain decoding, or it fails as that does."""
    found = []
    for is_drafted in (False, True):
        target = tiny_target("llama", 1)
        cache = DynamicCache(config=target.config)
        with torch.no_grad():
            target.to(dtypes[0])(prompts(1)[0][:, :-1], **{CACHE_KEYWORD: cache})
        target.to(dtypes[1])
        draft = tiny_draft(target).to(dtypes[1]) if is_drafted else None
        try:
            found.append(target.generate(prompts(1)[0], **{CACHE_KEYWORD: cache}, assistant_model=draft, **LENGTH).tolist())
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_a_compiled_target_allocates_nothing_for_a_limit_that_no_text_reaches():
    """Nor in a later call with a small limit."""
    target = tiny_target("llama", 1)
    input_ids = prompts(1)[0]
    plain = target.generate(input_ids, max_new_tokens=12, pad_token_id=PAD_ID)
    end = {"eos_token_id": int(plain[0, -1]), "pad_token_id": PAD_ID}
    expected = target.generate(input_ids, max_new_tokens=12, **end)
    draft = tiny_draft(target)
    target.compile(backend="eager")
    for limit in ({"max_length": 10**12}, {"max_new_tokens": 12}):
        assert torch.equal(target.generate(input_ids, assistant_model=draft, **limit, **end), expected)
    assert draft.last_speculation.target == "tree"


@pytest.mark.parametrize("settings", [{}, {"pad_token_id": None}])
def test_end_tokens_of_nested_criteria(settings):
    """Plain decoding looks for end tokens among the outer criteria only, so sequences that have ended are not padded."""
    input_ids, mask = prompts(3)
    target = varied_target("llama", input_ids, mask, **LENGTH)
    inputs = {"attention_mask": mask, **LENGTH, "do_sample": False, **settings}
    if "pad_token_id" in settings:
        target.generation_config.pad_token_id = None
        input_ids, inputs["attention_mask"] = input_ids[:1], mask[:1]
    first = target.generate(input_ids, **inputs)[:, input_ids.shape[1] :]
    ends = torch.tensor([int(row[4 + 2 * place]) for place, row in enumerate(first)])

    def nested():
        return StoppingCriteriaList([StoppingCriteriaList([EosTokenCriteria(ends)])])

    plain = target.generate(input_ids, **inputs, stopping_criteria=nested())
    for cached in ({}, {"use_cache": False}):
        draft = scripted_draft(target, plain, input_ids.shape[1], is_strict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.generate(input_ids, **inputs, **cached, stopping_criteria=nested(), assistant_model=draft)
        assert torch.equal(found, plain), cached


def test_a_draft_that_is_used_with_another_target_meanwhile():
    """Here within the call, as it may happen in another thread: the inner call is plain, the outer one goes on drafting."""
    input_ids, _ = prompts(1)
    target, other = tiny_target("llama", 3), tiny_target("llama", 5).to(torch.bfloat16)
    plain, plain_of_other = (one.generate(input_ids, do_sample=False, **LENGTH) for one in (target, other))
    draft = tiny_draft(target, draft_vocab_size=20)
    found_of_other = []

    class Another(LogitsProcessor):
        def __call__(self, ids, scores):
            if not found_of_other and ids.shape[1] > input_ids.shape[1] + 3:
                found_of_other.append(None)
                with pytest.warns(UserWarning, match="drafting for another target at this moment"):
                    found_of_other[0] = other.generate(input_ids, assistant_model=draft, do_sample=False, **LENGTH)
            return scores

    processors = LogitsProcessorList([Another()])
    found = target.generate(input_ids, assistant_model=draft, logits_processor=processors, do_sample=False, **LENGTH)
    assert torch.equal(found, plain)
    assert torch.equal(found_of_other[0], plain_of_other)
    assert other.generate(input_ids, assistant_model=draft, do_sample=False, **LENGTH).shape == plain_of_other.shape
    assert draft.last_speculation.declined is None
