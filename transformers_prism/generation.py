"""`target.generate(**inputs, assistant_model=draft)`: the hook into transformers and the round loop.

A round drafts a tree, verifies it in one forward of the target, and commits the path that plain decoding would have
taken:

    draft   the draft reads what the last round committed (step 0) and grows a tree (steps 1 and later)
    verify  one target forward over the tree under its ancestor mask
    commit  walk the tree with the target's processed logits, emit, compact the caches to the path

The loop is [`_decode`]; what its parts hand to each other stands in `decoding/round_values.py`.
"""

import copy
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import DynamicLayer
from transformers.generation import MaxLengthCriteria, MaxTimeCriteria

from .decoding.attention import install_lending, lent_attention, uninstall_lending
from .decoding.cache import stored_length
from .decoding.callers_mode import as_called, remembering_inference_mode
from .decoding.chat import Chat
from .decoding.draft_side import DraftSide
from .decoding.eval_mode import in_eval_mode
from .decoding.layer_check import reason_against_target
from .decoding.memory import kept_with, warn_once
from .decoding.recurrent_target import install_for_stateful, uninstall_for_stateful
from .decoding.round_check import RoundCheck
from .decoding.round_values import Limits, Proposal, Verified
from .decoding.sampler import Sampler
from .decoding.sequences import Sequences, Stopping, flattened
from .decoding.speculation import Speculation, warn_if_hardly_used
from .decoding.static_shapes import static_shapes
from .decoding.target_choice import make_target
from .decoding.target_side import TargetSide
from .decoding.target_support import Declined, reason_against_training
from .decoding.tree import Tree, root_tree
from .decoding.walk import walk
from .policy.automatic import AutomaticTrees, are_costs_known
from .policy.fixed import FixedTrees, PlainSteps
from .policy.settings import TreeSettings
from .transformers_names import (
    ASSISTED_DECODING,
    cache_of,
    compiled_forward,
    decode_plainly,
    decoder_only_output,
    decodes_in_its_own_way,
    replace_method,
    restore_method,
)
from .tried_releases import warn_of_untried_release

_lock = threading.Lock()
_MOST_LENGTH = 2**31 - 1  # of a text in tokens
# Processors that keep one state for a whole batch, so that sequences cannot run ahead of each other.
_WHOLE_BATCH_PROCESSORS = (
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "ConfidenceCriteria",
)


def install() -> None:
    """Let `generate(assistant_model=...)` reach drafts of model type "prism". Doing it twice changes nothing."""
    install_lending()
    install_for_stateful()

    def make(original):
        def _assisted_decoding(self, *args, **kwargs):
            draft = kwargs.get("assistant_model")
            if draft is not None and draft.config.model_type == "prism":
                return draft.assist(self, *args, **kwargs)
            return original(self, *args, **kwargs)

        return _assisted_decoding

    replace_method(ASSISTED_DECODING, make)


def uninstall() -> None:
    """Undo [`install`]; making or loading a draft installs the hook again."""
    restore_method(ASSISTED_DECODING)
    uninstall_lending()
    uninstall_for_stateful()


def speculative_generate(
    target,
    draft,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    streamer=None,
    inputs_tensor=None,
    assistant_model=None,
    assistant_tokenizer=None,
    tokenizer=None,
    **model_kwargs,
):
    """Decode `target` with `draft`; the arguments are those that generate() prepares for its decoding methods.

    Returns:
        `torch.LongTensor` of shape `(B, T)`, or `GenerateDecoderOnlyOutput` with the attribute `speculation`.
    Raises:
        ValueError: before any token, if settings or models cannot work together.
    """
    settings = TreeSettings.resolve(
        generation_config, draft.generation_config, num_draft_tokens=draft.config.num_draft_tokens
    )
    plain_arguments = {
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "generation_config": generation_config,
        "synced_gpus": synced_gpus,
        "streamer": streamer,
    }
    if target.config.is_encoder_decoder:
        raise ValueError(f"expected a decoder-only target, got {type(target).__name__}")
    try:
        with remembering_inference_mode(), _tensors_that_last(cache_of(model_kwargs)), _drafting_for(target, draft):
            if (reason := reason_against_target(target)) is not None:  # before bind(), which may fail on such a head
                raise Declined(reason)
            draft.bind(target, tokenizer)
            if assistant_tokenizer is not None:
                raise Declined("an assistant tokenizer was given, but a draft shares its target's; leave it out")
            _check_call(target, input_ids, plain_arguments, model_kwargs)
            # Plain decoding turns other integer types into int64 when it appends the first token.
            return _speculate(target, draft, input_ids.long(), settings, plain_arguments, model_kwargs)
    except Declined as error:
        reason = str(error)
    return _decode_plainly(reason, target, draft, input_ids, plain_arguments, model_kwargs)


@contextmanager
def _drafting_for(target, draft) -> Iterator[None]:
    """Note that a draft is used with a target.

    Raises:
        Declined: if it is being used with another one, by another thread or around this call: it can be bound to one only.
    """
    targets = kept_with(draft, "targets of running calls", list)
    with _lock:
        if any(one is not target for one in targets):
            raise Declined("the draft is drafting for another target at this moment; load it once for each target")
        targets.append(target)
    try:
        yield
    finally:
        targets.remove(target)


def _tensors_of(states) -> Iterator[torch.Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(states, torch.Tensor):
        yield states
    elif isinstance(states, (dict, list, tuple)):
        for state in states.values() if isinstance(states, dict) else states:
            yield from _tensors_of(state)


@contextmanager
def _tensors_that_last(cache) -> Iterator[None]:
    """Leave `torch.inference_mode`, since a later call outside of it could not write to tensors that were made in it. Stay
    in it if the cache has states that were made in it and are written in place (static layers, recurrent states)."""
    is_bound = any(
        state.is_inference()
        for layer in getattr(cache, "layers", ())
        if not isinstance(layer, DynamicLayer)
        for state in _tensors_of(vars(layer))
    )
    with torch.inference_mode(torch.is_inference_mode_enabled() and is_bound), torch.no_grad():
        yield


def _speculate(target, draft, input_ids, settings: TreeSettings, plain_arguments: dict, model_kwargs: dict):
    """Decode with drafts; arguments and result as for [`speculative_generate`].

    Raises:
        Declined: before any token, if this target and call cannot be served.
    """
    streamer, criteria = plain_arguments["streamer"], plain_arguments["stopping_criteria"]
    generation_config = _with_length_of(criteria, plain_arguments["generation_config"], input_ids.shape[1])
    sampler = Sampler(input_ids, plain_arguments["logits_processor"], criteria, generation_config, settings.coupled)
    sequences = sampler.new_sequences(input_ids, criteria, generation_config, streamer)
    layer_ids = draft.config.target_layer_ids
    target_side = make_target(target, layer_ids, generation_config, model_kwargs, input_ids, sequences)
    asked = settings
    if target_side.why_no_tree is not None:
        settings = settings.as_chain()
    is_target_compiled = compiled_forward(target, model_kwargs, generation_config) is not None
    num_cached = stored_length(target_side.cache) or 0
    shapes = static_shapes(draft, settings, generation_config, is_target_compiled, num_cached)
    target_side.keeps_finished |= shapes is not None
    try:
        with in_eval_mode(draft), lent_attention(target, draft, shapes is not None):
            chat = Chat.of(target_side.cache, draft, len(sequences))
            drafter = chat.draft_side.drafter
            drafter.use_text_tokens(settings.text_tokens)
            drafter.use_shapes(shapes)
            policy: AutomaticTrees | FixedTrees
            if settings.tree == "auto" and _has_time_limit(criteria) and not are_costs_known(target, draft, len(sequences)):
                settings = settings.as_small_tree()  # measuring would use up the call's time limit
            if settings.tree == "auto":
                policy = AutomaticTrees(settings, target, draft, sequences, sampler, chat.text)
            else:
                policy = FixedTrees(settings, sampler)
            speculation = _decode(input_ids, sequences, sampler, policy, chat.draft_side, target_side, asked)
            ids = sequences.finished().to(input_ids.device)
            num_steps = ids.shape[1] - sequences.prompt_length
            sampler.finish(num_steps)
            target_side.finish(ids)
            if target_side.returns_cache and len(sequences) == 1 and not target_side.has_given_up:
                chat.keep(target_side.cache, policy.text())
            if streamer is not None:
                with as_called():
                    streamer.end()
            draft.last_speculation = speculation
            warn_if_hardly_used(speculation, draft, target, generation_config)
            if not generation_config.return_dict_in_generate:
                return ids
            output = decoder_only_output(cache_of(model_kwargs), sequences=ids, **sampler.outputs(num_steps))
            output.speculation = speculation
            return output
    except BaseException:
        # Whatever the error is, even an interrupt, the caller finds models and cache as they were.
        target_side.abandon()
        raise


def _with_length_of(criteria, generation_config, prompt_length: int):
    """The generation configuration with `max_length` as an integer: the smallest limit of the criteria, if there is one.

    It allows at least one token, as plain decoding does. Numbers that stand for "no limit" are capped to fit a tensor.
    """
    limits = [one.max_length for one in flattened(criteria) if isinstance(one, MaxLengthCriteria)]
    most = min(limits, default=generation_config.max_length)
    most = max(math.ceil(min(most, _MOST_LENGTH)), prompt_length + 1)
    if type(generation_config.max_length) is int and generation_config.max_length == most:
        return generation_config
    generation_config = copy.copy(generation_config)
    generation_config.max_length = most
    return generation_config


def _has_time_limit(criteria) -> bool:
    return any(isinstance(one, MaxTimeCriteria) for one in flattened(criteria))


def _tell_of_chain(target_side: TargetSide, asked: TreeSettings) -> None:
    """Warn, once for each target, that chains replace the trees that were asked for, and why."""
    told, reason = kept_with(target_side.target, "told of chains", list), target_side.why_no_tree
    if reason is not None and asked.tree != "chain" and not told:
        told.append(reason)
        warnings.warn(f"drafting a chain instead of a tree: {reason}", stacklevel=7)


def _decode(
    input_ids, sequences: Sequences, sampler: Sampler, policy, draft_side: DraftSide, target_side: TargetSide, asked: TreeSettings
) -> Speculation:
    """The prefill, then rounds until every sequence is done.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, T)`): the prompts.
        sequences (`Sequences`), sampler (`Sampler`): what is emitted, and what chooses it.
        policy (`AutomaticTrees` or `FixedTrees`): proposes each round's tree and learns from what becomes of it.
        draft_side (`DraftSide`), target_side (`TargetSide`): the models' halves.
        asked (`TreeSettings`): what the call asked for, which the target may not be able to verify.
    Returns:
        `Speculation`: the statistics.
    """
    speculation = Speculation.empty(len(sequences))
    speculation.target, speculation.why_no_tree = target_side.kind, target_side.why_no_tree
    speculation.walk, speculation.coupled = "device" if sampler.walks_on_device else "host", sampler.is_coupled
    prompt = target_side.prefill(input_ids)
    _tell_of_chain(target_side, asked)  # not before, since the prompt may show that decoding has to be plain
    check = RoundCheck(target_side)
    walk(sequences, sampler, Proposal(root_tree(input_ids[:, -1])), Verified(prompt.logits[:, None], [], [], 0.0))
    draft_side.commit_prompt(sequences, prompt)
    sequences.stream()
    while not sequences.are_done:
        with speculation.timed("other"):
            _drop_finished(sequences, draft_side, target_side)
        with speculation.timed("draft"):
            proposal = policy.propose(draft_side, sequences, _limits(sequences, target_side, check))
        verified = _verify(proposal.tree, target_side, check, speculation)
        if verified is None:
            # Nothing of this round was emitted, and no later one has a tree.
            target_side.give_up_drafting()
            speculation.stopped_drafting, speculation.estimates = check.finding, policy.estimates()
            policy = PlainSteps()
            continue
        with speculation.timed("commit"):
            kept = walk(sequences, sampler, proposal, verified)
            target_side.commit(kept)
            if not target_side.has_given_up:
                draft_side.commit(sequences, kept, verified)
        with speculation.timed("other"):
            speculation.add_rounds(sequences.active, kept, policy.learn(proposal, kept, verified))
        sequences.stream(kept)
    speculation.estimates = speculation.estimates or policy.estimates()
    return speculation


def _drop_finished(sequences: Sequences, draft_side: DraftSide, target_side: TargetSide) -> None:
    """Leave sequences that have ended out of the caches, unless the target keeps them."""
    places = sequences.places_to_keep()
    if len(places) < len(sequences.active) and not target_side.keeps_finished:
        for part in (target_side, draft_side, sequences):
            part.keep_sequences(places)


def _limits(sequences: Sequences, target_side: TargetSide, check: RoundCheck) -> Limits:
    """How deep and how large the next tree may be."""
    # A node can only be emitted if there is room for the token after it.
    depth = min(sequences.max_remaining - 1, target_side.max_depth, check.max_depth())
    return Limits(max(int(depth), 0), target_side.max_nodes, target_side.num_carried)


def _verify(tree: Tree, target_side: TargetSide, check: RoundCheck, speculation: Speculation) -> Verified | None:
    """The target's outputs for a tree; None if they were found to differ from single steps, or if the forward failed."""
    verified = None
    with speculation.timed("check"):
        steps = check.plain_steps(tree)
    with speculation.timed("verify"), check.failing_forwards(tree):
        verified = target_side.verify(tree)
    if target_side.has_given_up:
        return verified  # plain steps need no check
    return None if check.finding or check.differs(tree, verified.logits, steps) else verified


def _check_call(target, input_ids, plain_arguments: dict, model_kwargs: dict) -> None:
    """Check that the settings of a call can be served with a draft.

    Raises:
        Declined: if plain decoding has to serve them.
        ValueError: for what plain decoding would not do either.
    """
    generation_config = plain_arguments["generation_config"]
    if generation_config.dola_layers is not None:
        raise ValueError(f"dola_layers: expected None with a draft, got {generation_config.dola_layers!r}")
    if input_ids.shape[0] == 0:
        raise Declined("the batch has no rows")
    if decodes_in_its_own_way(target):
        raise Declined(f"{type(target).__name__} has a decoding loop of its own (_sample), which drafting would bypass")
    if not model_kwargs.get("use_cache"):
        raise Declined("use_cache=False leaves nothing to verify a draft against; pass use_cache=True")
    if cache_of(model_kwargs) is None:
        raise Declined(f"{type(target).__name__} keeps its state in no cache of transformers that could be rolled back")
    if plain_arguments["synced_gpus"]:
        raise Declined("synced_gpus requires the same forwards on every process, which drafting does not run")
    if (getattr(target, "tp_size", None) or 1) > 1:
        raise Declined("the processes of a tensor-parallel target would each choose a tree of their own")
    embeds = model_kwargs.get("inputs_embeds")
    if embeds is not None and embeds.shape[1] != input_ids.shape[1]:
        raise Declined("inputs_embeds has no token ids for the draft to read; pass the input_ids of the same prompt, too")
    if generation_config.return_dict_in_generate and (
        generation_config.output_attentions or generation_config.output_hidden_states
    ):
        raise Declined("attentions and hidden states of every step were asked for")
    reason = reason_against_training(target)
    if reason is None and input_ids.shape[0] > 1:
        reason = _reason_against_batch(plain_arguments)
    if reason is not None:
        raise Declined(reason)


def _reason_against_batch(plain_arguments: dict) -> str | None:
    """Why these processors or criteria cannot serve a batch whose sequences advance unevenly; None if they can."""
    for function in (*plain_arguments["logits_processor"], *flattened(plain_arguments["stopping_criteria"])):
        name, module = type(function).__name__, type(function).__module__
        if name in _WHOLE_BATCH_PROCESSORS or not module.startswith("transformers."):
            return f"{name} may keep a state for the whole batch; decode one sequence at a time"
    return None


def _decode_plainly(reason: str, target, draft, input_ids, plain_arguments: dict, model_kwargs: dict):
    """Plain decoding from inside the hook, with a warning; the result is the same as without a draft."""
    warn_once(target, f"decoding without the draft: {reason}", stacklevel=5)
    warn_of_untried_release(stacklevel=5)
    output = decode_plainly(target, input_ids, **plain_arguments, **model_kwargs)
    returns_dict = plain_arguments["generation_config"].return_dict_in_generate
    sequences = output.sequences if returns_dict else output
    speculation = Speculation.empty(input_ids.shape[0])
    speculation.declined = reason
    end_tokens = Stopping(plain_arguments["stopping_criteria"], sequences.device).end_tokens
    for index, tokens in enumerate(sequences[:, input_ids.shape[1] :].tolist()):
        # Everything after an end token is padding.
        length = next((place for place, token in enumerate(tokens, start=1) if token in end_tokens), len(tokens))
        for _ in range(length - 1):
            speculation.add_round(index, num_emitted=1)
    draft.last_speculation = speculation
    if returns_dict:
        output.speculation = speculation
    return output
