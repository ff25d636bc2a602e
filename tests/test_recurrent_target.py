"""Targets with recurrent layers: a chain with lazy replay, and transformers' refusal."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from compatibility_models import build
from compatibility_runs import Case, compare, scripted
from pretend_accelerator import DEVICE, OnDevice, PretendedAccelerator
from tiny_models import PAD_ID, observer, prompts
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from transformers_prism import generation
from transformers_prism.decoding import recurrent_target, round_check, transfer
from transformers_prism.decoding.cache import CacheSnapshot
from transformers_prism.decoding.memory import keep_with
from transformers_prism.decoding.recurrent_target import MAX_CARRIED, RecurrentTarget
from transformers_prism.policy.fixed import FixedTrees, PlainSteps
from transformers_prism.transformers_names import CACHE_KEYWORD, cache_of

ARGUMENTS = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": PAD_ID}
# Recurrent and full attention, one layer with both, windows as well, states that are no keys, recurrent states alone.
CONTINUED = ["qwen3_next", "qwen3_5_text", "falcon_h1", "lara_mini", "deepseek_v4", "mamba2"]
CONTINUED = [name for name in CONTINUED if name in CONFIG_MAPPING]  # lara_mini is new in transformers 5.24
NOT_CONTINUED = ["jamba", "mamba"]


def target_and_text(name: str = "qwen3_next", length: int = 9, seed: int = 3):
    """A tiny target whose text has some variety, a prompt and the text."""
    input_ids, _ = prompts(1, length)
    for draw in range(seed, seed + 20):
        target = Case(name, name).draw(draw)
        plain = target.generate(input_ids, **ARGUMENTS)
        if len(set(plain[0, length:].tolist())) > 8:
            return target, input_ids, plain
    raise AssertionError(f"no {name} with a varied text")


def chain(target, plain, prompt_length: int = 9, **settings):
    """A draft that is right and wrong at random places of the text."""
    draft = scripted(target, plain, prompt_length)
    draft.generation_config.update(**settings)
    return draft


class Forwards:
    """Counts a target's forwards, and the tokens of each."""

    def __init__(self, target):
        self.num_tokens: list[int] = []
        target.register_forward_pre_hook(observer(self._note), with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.num_tokens.append((args[0] if args else kwargs["input_ids"]).shape[1])


@pytest.mark.parametrize("name", CONTINUED)
def test_text_is_that_of_plain_decoding(name):
    """Greedy, sampled, static caches and chats, with more than one and a half tokens a round."""
    case = Case(name, name)
    for seed in range(3, 12):
        target = case.draw(seed)
        result = compare(target, case, "greedy")
        assert result["outcome"] == "chain", result
        if result["tokens_per_round"] > 1.5:
            break
    assert result["tokens_per_round"] > 1.5
    for run in ("sampled", "static", "chat"):
        assert compare(target, case, run)["outcome"] in ("chain", "fails"), run


@pytest.mark.parametrize("name", NOT_CONTINUED)
def test_models_that_ignore_their_state_are_decoded_plainly(name):
    """Several tokens at once do not read what came before: the reason is given, and the text is that of plain decoding."""
    target, input_ids, plain = target_and_text(name)
    draft = chain(target, plain)
    with pytest.warns(UserWarning, match="does not continue its recurrent state over several tokens"):
        assert torch.equal(target.generate(input_ids, assistant_model=draft, **ARGUMENTS), plain)
    assert "does not continue" in draft.last_speculation.declined


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_checks_know_the_precision_of_the_model(dtype):
    """mamba2 returns float32 logits whatever it computes in, and computes parts of float64 in float32: that is rounding."""
    target, input_ids, plain = target_and_text("mamba2")
    target, draft = target.to(dtype), chain(target, plain).to(dtype)
    target.generate(input_ids, assistant_model=draft, **ARGUMENTS)
    assert draft.last_speculation.target == "chain"
    assert draft.last_speculation.stopped_drafting is None


def test_one_target_forward_a_round():
    """Beside the prompt's and the check's, which is made once for a target, there is one forward for each round."""
    target, input_ids, plain = target_and_text()
    draft = chain(target, plain)
    target.generate(input_ids, assistant_model=draft, **ARGUMENTS)
    forwards = Forwards(target)
    draft = chain(target, plain)
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **ARGUMENTS), plain)
    assert len(forwards.num_tokens) == 1 + draft.last_speculation.num_rounds[0]
    assert draft.last_speculation.acceptance_length > 1.5


def test_accepted_tokens_run_again_in_the_next_forward(monkeypatch):
    """After a chain that was accepted in part, the next forward carries what was kept of it; after a whole one, nothing."""
    target, input_ids, plain = target_and_text()
    draft = chain(target, plain, tree="chain", tree_depth=4)
    forwards = Forwards(target)
    keep_with(target, "checks of states", {(torch.float32, "cpu", False, False, 0): None})
    monkeypatch.setattr(round_check, "is_tried", lambda target: True)
    target.generate(input_ids, assistant_model=draft, **ARGUMENTS)
    accepted, trees = draft.last_speculation.accepted_per_round[0], draft.last_speculation.trees
    carried, expected = 0, []
    for num_accepted, tree in zip(accepted, trees, strict=True):
        expected.append(carried + 1 + tree.num_nodes)
        carried = 0 if num_accepted == tree.num_nodes else carried + num_accepted + 1
    assert forwards.num_tokens[1:] == expected
    assert max(expected) > 5, "something was carried"


def test_the_state_moves_on_when_much_is_carried():
    """A draft that is never wholly right does not let forwards grow without end."""
    target, input_ids, plain = target_and_text()
    arguments = {**ARGUMENTS, "max_new_tokens": 60}
    plain = target.generate(input_ids, **arguments)
    draft = chain(target, plain, tree="chain", tree_depth=2)
    draft.script = [[token if place % 3 else 96 - token for place, token in enumerate(draft.script[0])]]
    forwards = Forwards(target)
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **arguments), plain)
    assert max(forwards.num_tokens[1:]) <= MAX_CARRIED + 3


def test_rounds_without_a_tree_copy_no_state(monkeypatch):
    """Only a forward that may have to be forgotten needs one; plain stretches of `tree="auto"` do not."""
    target, input_ids, plain = target_and_text()
    copies = []
    monkeypatch.setattr(recurrent_target, "CacheSnapshot", lambda cache: copies.append(1) or CacheSnapshot(cache))
    keep_with(target, "checks of states", {(torch.float32, "cpu", False, False, 0): None})
    monkeypatch.setattr(round_check, "is_tried", lambda target: True)
    draft = chain(target, plain, tree="chain", tree_depth=4)
    monkeypatch.setattr(FixedTrees, "propose", PlainSteps.propose)
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **ARGUMENTS), plain)
    assert not copies


def batch_and_text(name: str = "qwen3_next", **arguments):
    """A tiny target, padded prompts of three sequences, and their text by plain decoding."""
    target, _, _ = target_and_text(name)
    input_ids, mask = prompts(3)
    torch.manual_seed(7)
    return target, {"input_ids": input_ids, "attention_mask": mask, **ARGUMENTS, **arguments}


@pytest.mark.parametrize("name", [*(name for name in CONTINUED if name != "deepseek_v4"), "lfm2", "falcon"])
def test_a_batch_equals_plain_decoding(name):
    """Sequences that accept different numbers of tokens, also of targets that get no tree for another reason."""
    target, arguments = batch_and_text(name)
    if name == "falcon":
        target = Case(name, name, {"alibi": True}).draw(4)
    plain = target.generate(**arguments)
    draft = chain(target, plain)
    assert torch.equal(target.generate(**arguments, assistant_model=draft), plain)
    speculation = draft.last_speculation
    assert (speculation.declined, speculation.target) == (None, "chain")
    assert speculation.acceptance_length > 1.3
    assert len({tuple(rounds) for rounds in speculation.accepted_per_round}) > 1


@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4", "qwen4_exp_text"])
def test_a_padded_batch_of_models_that_choose_keys_is_decoded_plainly(name):
    """Their index chooses other keys for several tokens at once than for single ones where there is padding."""
    target, arguments = batch_and_text(name)
    plain = target.generate(**arguments)
    with pytest.warns(UserWarning, match="chooses some keys by an index"):
        assert torch.equal(target.generate(**arguments, assistant_model=chain(target, plain)), plain)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_batch_whose_sequences_end_at_different_tokens(do_sample):
    """Those that have ended go on with padding, as in plain decoding; what is returned of the cache is the same."""
    target, arguments = batch_and_text(do_sample=do_sample, return_dict_in_generate=True)
    plain = target.generate(**arguments)
    ends = [int(row[place]) for row, place in zip(plain.sequences, (14, 24, 35), strict=True)]
    arguments["eos_token_id"] = ends
    outputs, states, draft = [], [], None
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(target.generate(**arguments, assistant_model=draft))
        states.append(torch.get_rng_state())
        draft = chain(target, outputs[0].sequences)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(*states)
    for one, other in zip(cache_of(outputs[1]).layers, cache_of(outputs[0]).layers, strict=True):
        for state, expected in zip(_tensors(one), _tensors(other), strict=True):
            torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)


def test_the_state_of_a_batch_moves_on_in_a_forward_of_its_own():
    """By what all sequences have committed, where one of them carries much; `tree="auto"` says the same."""
    target, arguments = batch_and_text(max_new_tokens=60)
    plain = target.generate(**arguments)
    for settings in ({"tree": "chain", "tree_depth": 4}, {"tree": "auto"}):
        draft = chain(target, plain, **settings)
        draft.script[1] = [96 - token for token in draft.script[1]]  # one is always wrong
        forwards = Forwards(target)
        assert torch.equal(target.generate(**arguments, assistant_model=draft), plain)
        # The first is as far ahead as it accepts more, and the others' part is never run twice sixteen times over.
        assert max(forwards.num_tokens[1:]) < 60 + 5


def test_a_static_cache_has_no_room_for_a_batch():
    """Sequences that run ahead of each other need more positions than the longest text has."""
    target, arguments = batch_and_text(cache_implementation="static")
    plain = target.generate(**arguments)
    with pytest.warns(UserWarning, match="StaticCache has no room for sequences of a batch"):
        assert torch.equal(target.generate(**arguments, assistant_model=chain(target, plain)), plain)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_a_padded_row_equals_plain_decoding(cache_implementation):
    """Left padding of a single row reaches the prompt's forward, and rounds go on behind it."""
    target, _, _ = target_and_text()
    input_ids, mask = (part[1:] for part in prompts(2))
    arguments = {**ARGUMENTS, "cache_implementation": cache_implementation, "attention_mask": mask}
    plain = target.generate(input_ids, **arguments)
    draft = chain(target, plain)
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **arguments), plain)
    assert draft.last_speculation.target == "chain"


def test_a_returned_cache_holds_what_plain_decoding_leaves():
    """Plain decoding goes on from it, and it goes on from plain decoding's; states agree."""
    target, input_ids, _ = target_and_text()
    arguments = {**ARGUMENTS, "return_dict_in_generate": True}
    plain = target.generate(input_ids, **arguments)
    ours = target.generate(input_ids, assistant_model=chain(target, plain.sequences), **arguments)
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(cache_of(ours).layers, cache_of(plain).layers, strict=True):
        for state, expected in zip(_tensors(one), _tensors(other), strict=True):
            torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)
    longer = torch.cat((plain.sequences, input_ids[:, :4]), dim=1)
    texts = []
    for first, _drafted in ((plain, False), (ours, False)):
        more = {CACHE_KEYWORD: cache_of(first)}
        texts.append(target.generate(longer, **{**arguments, **more}).sequences)
    assert torch.equal(*texts)


def _tensors(layer) -> list[torch.Tensor]:
    states = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for name in ("conv_states", "recurrent_states"):
        states += list(getattr(layer, name, {}).values())
    return [state for state in states if state is not None]


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_chat_begun_in_inference_mode_goes_on_in_it(name):
    """Recurrent states that were made in inference mode can only be written to in it."""
    target, input_ids, _ = target_and_text(name)
    arguments = {**ARGUMENTS, "return_dict_in_generate": True}
    texts = []
    for has_draft in (False, True):
        with torch.inference_mode():
            first = target.generate(input_ids, **arguments)
            longer = torch.cat((first.sequences, input_ids[:, :4]), dim=1)
            more = {**arguments, CACHE_KEYWORD: cache_of(first)}
            if has_draft:
                more["assistant_model"] = chain(target, texts[0], longer.shape[1])
            texts.append(target.generate(longer, **more).sequences)
    assert torch.equal(*texts)
    assert more["assistant_model"].last_speculation.target == "chain"


def test_scores_streamers_and_sampling_are_those_of_plain_decoding():
    """Scores at the same places, tokens in the same order, the generator in the same state."""
    target, input_ids, _ = target_and_text()
    streamed: list[list[int]] = []

    class Streamer(TextStreamer):
        def __init__(self):
            streamed.append([])

        def put(self, value):
            streamed[-1].extend(value.flatten().tolist())

        def end(self):
            pass

    outputs, states = [], []
    arguments = {**ARGUMENTS, "do_sample": True, "return_dict_in_generate": True, "output_scores": True}
    for has_draft in (False, True):
        more = {"assistant_model": chain(target, outputs[0].sequences)} if has_draft else {}
        torch.manual_seed(7)
        outputs.append(target.generate(input_ids, streamer=Streamer(), **arguments, **more))
        states.append(torch.get_rng_state())
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(*states)
    assert streamed[0] == streamed[1]
    for one, other in zip(outputs[0].scores, outputs[1].scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_an_error_leaves_the_cache_as_it_was():
    """A processor that fails in the middle of a chat: the caller's cache goes on as if nothing had been."""

    class Failing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 55:
                raise RuntimeError("enough")
            return scores

    target, input_ids, _ = target_and_text()
    arguments = {**ARGUMENTS, "return_dict_in_generate": True}
    first = target.generate(input_ids, **arguments)
    longer = torch.cat((first.sequences, input_ids[:, :4]), dim=1)
    more = {**arguments, CACHE_KEYWORD: cache_of(first)}
    draft = chain(target, torch.cat((longer, longer), dim=1), longer.shape[1])
    before = [state.clone() for layer in cache_of(first).layers for state in _tensors(layer)]
    with pytest.raises(RuntimeError, match="enough"):
        target.generate(longer, assistant_model=draft, logits_processor=LogitsProcessorList([Failing()]), **more)
    after = [state for layer in cache_of(first).layers for state in _tensors(layer)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_other_assistants_are_refused_as_before_and_the_hook_can_be_undone():
    """Only drafts of model type "prism" pass transformers' check."""
    target, input_ids, plain = target_and_text()
    draft = chain(target, plain)
    other = build("llama")
    with pytest.raises(ValueError, match="not supported with stateful models"):
        target.generate(input_ids, assistant_model=other, **ARGUMENTS)
    assert type(target)._is_stateful
    assert "_is_stateful" not in vars(target)
    generation.uninstall()
    try:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            target.generate(input_ids, assistant_model=draft, **ARGUMENTS)
    finally:
        generation.install()
    with pytest.raises(ValueError, match="num_return_sequences"):
        target.generate(input_ids, assistant_model=draft, num_return_sequences=2, **{**ARGUMENTS, "do_sample": True})
    assert torch.equal(target.generate(input_ids, assistant_model=draft, **ARGUMENTS), plain)


def test_automatic_chains_equal_plain_decoding():
    """`tree="auto"` weighs what is carried; the text does not depend on it."""
    target, input_ids, plain = target_and_text()
    draft = chain(target, plain, tree="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert torch.equal(target.generate(input_ids, assistant_model=draft, **ARGUMENTS), plain)
    assert draft.last_speculation.target == "chain"


@pytest.mark.quick
@pytest.mark.parametrize(("ended", "starts"), [([False, False], [1, 3]), ([True, False], [3, 3])])
def test_carried_tokens_are_put_before_a_chain_without_a_stop(ended, starts, monkeypatch):
    """Padding behind the shorter; a sequence that has ended goes on with its text. The device is not waited for."""
    monkeypatch.setattr(transfer, "ASYNCHRONOUS_DEVICES", (DEVICE.type,))
    side = RecurrentTarget.__new__(RecurrentTarget)
    side.num_carried_of, side.num_stored, side.num_cached_before = [1, 3], 0, 0
    ids = OnDevice(torch.tensor([[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]]))
    side.sequences = SimpleNamespace(ids=ids, is_done=lambda one: ended[one], pad_ended=lambda width: None)
    with PretendedAccelerator() as accelerator:
        tokens, found = side._with_carried(torch.tensor([[7, 8], [9, 10]]))
    assert (accelerator.uploads, accelerator.reads) == ([], [])
    assert found == starts
    assert tokens.host.tolist() == [[1, 2, 3, 4, 5] if ended[0] else [1, 7, 8, 8, 8], [11, 12, 13, 9, 10]]
