"""`target.generate(**inputs, assistant_model=draft)`: the hook into transformers and the round loop.

A round drafts a tree, verifies it in one forward of the target, and commits the path that plain decoding would have
taken:

    draft   the drafter reads what the last round committed (step 0) and grows a tree (steps 1 and later)
    verify  one target forward over the tree under its ancestor mask
    commit  walk the tree with the target's processed logits, emit, compact the caches to the path
"""

import functools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from transformers.cache_utils import DynamicLayer

from .decoding.attention import install_lending, lent_attention, uninstall_lending
from .decoding.round_check import RoundCheck
from .decoding.sequences import OutputRows, walk, walk_on_device
from .decoding.speculation import RoundTree, Speculation, warn_if_hardly_used
from .decoding.target_side import ChainTarget, NewPositions, make_target, read_all
from .decoding.target_support import Declined, reason_against_training
from .decoding.tree import root_tree
from .layer_check import reason_against_target
from .policy.automatic import AutoTrees
from .policy.ngrams import NgramIndex
from .policy.planned import PlannedTrees
from .policy.settings import TreeSettings
from .transformers_names import (
    assisted_decoding,
    cache_of,
    decode_plainly,
    decoder_only_output,
    decoding_experts,
    set_assisted_decoding,
)

# Processors that keep one state for a whole batch, so that rows cannot run ahead of each other.
_WHOLE_BATCH_PROCESSORS = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")


class _ChatContext(NamedTuple):
    """What a draft has read of a conversation, kept for as long as the cache that a user continues it with."""

    drafter: object
    unread: list[NewPositions]  # committed and not yet read
    length: int  # of the cache
    head: object  # the target's, whose rows the drafter holds
    text: NgramIndex | None


_chat_contexts: WeakKeyDictionary = WeakKeyDictionary()
_told_of_chains: WeakSet = WeakSet()


def install() -> None:
    """Let `generate(assistant_model=...)` reach drafts of model type "prism". Doing it twice changes nothing."""
    install_lending()
    original = assisted_decoding()
    if getattr(original, "_prism_original", None) is not None:
        return

    # The signature stays the original's: generate() passes some arguments only to methods that name them.
    @functools.wraps(original)
    def _assisted_decoding(self, *args, **kwargs):
        draft = kwargs.get("assistant_model")
        if draft is not None and draft.config.model_type == "prism":
            return draft.assist(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    _assisted_decoding._prism_original = original  # type: ignore[attr-defined]
    set_assisted_decoding(_assisted_decoding)


def uninstall() -> None:
    """Undo [`install`]; making or loading a draft installs the hook again."""
    original = getattr(assisted_decoding(), "_prism_original", None)
    if original is not None:
        set_assisted_decoding(original)
    uninstall_lending()


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
    try:
        with _tensors_that_last(cache_of(model_kwargs)):
            if (reason := reason_against_target(target)) is not None:  # whose head may be one that no draft can borrow
                raise Declined(reason)
            draft.bind(target, tokenizer)
            if assistant_tokenizer is not None:
                raise Declined("an assistant tokenizer was given, but a draft shares its target's; leave it out")
            _check_call(target, input_ids, plain_arguments, model_kwargs)
            # Plain decoding turns other integers into these with the first token.
            input_ids = input_ids.long()
            target_side = make_target(target, draft.config.target_layer_ids, generation_config, model_kwargs, input_ids)
            return _speculate(target, draft, input_ids, settings, target_side, plain_arguments, model_kwargs)
    except Declined as error:
        reason = str(error)
    return _decode_plainly(reason, target, draft, input_ids, plain_arguments, model_kwargs)


def _tensors_of(states) -> Iterator[torch.Tensor]:
    """Tensors in dictionaries and lists."""
    if isinstance(states, torch.Tensor):
        yield states
    elif isinstance(states, (dict, list, tuple)):
        for state in states.values() if isinstance(states, dict) else states:
            yield from _tensors_of(state)


@contextmanager
def _tensors_that_last(cache) -> Iterator[None]:
    """Leave `torch.inference_mode`, whose tensors no later call could write to outside of it; states that are
    written in place (static layers, recurrent ones) and were made in it can only be written to in it."""
    is_bound = any(
        state.is_inference()
        for layer in getattr(cache, "layers", ())
        if not isinstance(layer, DynamicLayer)
        for state in _tensors_of(vars(layer))
    )
    with torch.inference_mode(torch.is_inference_mode_enabled() and is_bound), torch.no_grad():
        yield


def _speculate(target, draft, input_ids, settings: TreeSettings, target_side, plain_arguments: dict, model_kwargs: dict):
    """Decode with drafts; arguments and result as for [`speculative_generate`].

    Raises:
        Declined: before any token, if the prompt's forward shows that this target cannot be served.
    """
    generation_config, streamer = plain_arguments["generation_config"], plain_arguments["streamer"]
    processors, criteria = plain_arguments["logits_processor"], plain_arguments["stopping_criteria"]
    rows = OutputRows(input_ids, processors, criteria, generation_config, settings.coupled)
    is_chain = isinstance(target_side, ChainTarget)
    if is_chain:
        _tell_of_chain(target, settings, target_side.why_no_tree)
        settings = settings.as_chain()
    was_training = draft.training
    try:
        draft.eval()
        with decoding_experts(target), lent_attention(target, draft):
            drafter, unread, text = _chat_so_far(draft, target_side.cache, rows.num_rows, settings)
            trees = _trees_for(settings, target, draft, rows, text)
            speculation, unread = _decode(drafter, unread, target_side, rows, trees, streamer, input_ids)
            sequences = rows.finish()
            target_side.finish(sequences)
            if target_side.returns_cache and rows.num_rows == 1 and not target_side.has_given_up:
                length = int(target_side.cache.get_seq_length())
                context = _ChatContext(drafter, unread, length, draft.target_head, trees.text_of(0))
                _chat_contexts[target_side.cache] = context
            if streamer is not None:
                streamer.end()
            draft.last_speculation = speculation
            warn_if_hardly_used(speculation, draft, target, generation_config)
            if not generation_config.return_dict_in_generate:
                return sequences
            num_steps = sequences.shape[1] - rows.prompt_length
            kept = {name: rows.stacked(getattr(rows, name), num_steps) for name in ("scores", "logits")}
            output = decoder_only_output(cache_of(model_kwargs), sequences=sequences, **kept)
            output.speculation = speculation
            return output
    except BaseException:
        target_side.abandon()
        raise
    finally:
        draft.train(was_training)


def _tell_of_chain(target, settings: TreeSettings, reason: str) -> None:
    """Say once for each target why it gets a chain where trees were asked for."""
    if settings.tree != "chain" and target not in _told_of_chains:
        _told_of_chains.add(target)
        warnings.warn(f"drafting a chain instead of a tree: {reason}", stacklevel=6)


def _chat_so_far(draft, cache, num_rows: int, settings: TreeSettings):
    """The drafter that has read what the given cache holds, what it has not read of that, and the text; or a new one."""
    context = _chat_contexts.pop(cache, None)
    is_known = context is not None and num_rows == 1 and context.drafter.draft is draft
    if is_known and context.length == int(cache.get_seq_length()) and context.head is draft.target_head:
        context.drafter.text_tokens = settings.text_tokens
        return context.drafter, context.unread, context.text
    drafter = draft.make_drafter()
    drafter.text_tokens = settings.text_tokens
    return drafter, [], None


class _FixedTrees:
    """The same settings in every round."""

    def __init__(self, settings: TreeSettings, rows: OutputRows):
        self.settings, self.rows = settings, rows

    def propose(self, drafter, unread: list[NewPositions], active: list[int], max_depth: int, max_nodes: int):
        """The tree of the next round; the arguments are those of [`AutoTrees.propose`]."""
        read_all(drafter, unread)
        self.clipped = self.settings.clipped(max_depth, max_nodes)
        self.depth = self.clipped.depth
        return drafter.grow(self.clipped, self.rows.coupling(active, self.depth))

    def observe(self, tree, kept: list[list[int]], verify_seconds: float) -> RoundTree:
        """What the round was."""
        return RoundTree(self.clipped.depth, tree.num_nodes - 1)

    def estimates(self) -> None:
        """None are made."""

    def text_of(self, row: int) -> None:
        """None is indexed."""


class _PlainSteps:
    """No trees: for a target that turned out to compute them otherwise than single steps."""

    depth = 0

    def __init__(self, rows: OutputRows, estimates: dict | None):
        self.rows, self.last_estimates = rows, estimates

    def propose(self, drafter, unread: list[NewPositions], active: list[int], max_depth: int, max_nodes: int):
        """The last token of each row."""
        return root_tree(torch.tensor([self.rows.new_tokens[row][-1] for row in active]))

    def observe(self, tree, kept: list[list[int]], verify_seconds: float) -> RoundTree:
        """What the round was."""
        return RoundTree(0, 0)

    def estimates(self) -> dict | None:
        """What choices rested on before."""
        return self.last_estimates

    def text_of(self, row: int) -> None:
        """None is indexed."""


def _trees_for(settings: TreeSettings, target, draft, rows: OutputRows, text: NgramIndex | None):
    """Where trees come from; choosing within a round needs tensors that can be looked at without waiting."""
    if settings.tree != "auto":
        return _FixedTrees(settings, rows)
    kind = AutoTrees if draft.device.type == "cpu" else PlannedTrees
    return kind(settings, target, draft, rows, text)


def _decode(drafter, unread: list[NewPositions], target_side, rows: OutputRows, trees, streamer, input_ids):
    """The prefill, then rounds until every row is done.

    Args:
        drafter (`Drafter`), unread (`list[NewPositions]`): the draft's side, and what it has not read.
        target_side (`TreeTarget` or `ChainTarget`): the target's side.
        rows (`OutputRows`): the sequences.
        trees: proposes each round's tree and sees what became of it, as [`AutoTrees`].
    Returns:
        `tuple`: the statistics, and what the draft has not read at the end.
    """
    speculation = Speculation.empty(rows.num_rows)
    speculation.target = "chain" if isinstance(target_side, ChainTarget) else "tree"
    speculation.why_no_tree = target_side.why_no_tree
    speculation.walk, speculation.coupled = "device" if rows.walks_on_device else "host", rows.is_coupled
    active = list(range(rows.num_rows))  # which sequence each row of the caches belongs to
    stream = _Stream(streamer, rows)
    first_logits = target_side.prefill(input_ids)
    check = RoundCheck(target_side)
    _walk_rows(rows, active, root_tree(input_ids[:, -1]), first_logits[:, None], depth=0)
    stream.put()
    unread.append(target_side.prompt_for_draft(rows))
    logits = states = None
    while True:
        with speculation.timed("other"):
            active, unread = _drop_finished(rows, active, unread, target_side, drafter)
        if all(rows.is_done(row) for row in active):
            speculation.estimates = trees.estimates()
            return speculation, unread
        with speculation.timed("draft"):
            # A node can only be emitted if there is room for the token behind it.
            max_depth = min(max(rows.remaining(row) for row in active) - 1, target_side.max_depth, check.max_depth())
            tree = trees.propose(drafter, unread, active, max(int(max_depth), 0), target_side.max_nodes)
        with speculation.timed("check"):
            steps = check.plain_steps(tree)
        start = time.perf_counter()
        with speculation.timed("verify"), check.failing_forwards(tree):
            logits, states = target_side.verify(tree)
        verify_seconds = time.perf_counter() - start
        if not target_side.has_given_up and (check.finding or check.differs(tree, logits, steps)):
            # Nothing of this round was emitted, and no later one has a tree.
            target_side.give_up_drafting()
            trees, speculation.stopped_drafting = _PlainSteps(rows, trees.estimates()), check.finding
            continue
        with speculation.timed("commit"):
            kept = _walk_rows(rows, active, tree, logits, trees.depth)
            speculation.add_rounds(active, kept)
            target_side.commit(kept)
            if not target_side.has_given_up:
                unread.append(target_side.committed_for_draft(rows, active, kept, states))
        with speculation.timed("other"):
            speculation.trees.append(trees.observe(tree, kept, verify_seconds))
        stream.put(num_drafted=max(map(len, kept)) - 1)


def _walk_rows(rows: OutputRows, active: list[int], tree, logits, depth: int) -> list[list[int]]:
    """Emit tokens along a tree of this depth; returns for each row the nodes whose keys and values stay."""
    if rows.walks_on_device:
        kept = walk_on_device(rows, active, tree, logits, depth)
    else:
        kept = [[] if rows.is_done(row) else walk(rows, row, tree, i, logits[i]) for i, row in enumerate(active)]
    rows.forget_passed_noise(active)
    return kept


def _drop_finished(rows: OutputRows, active: list[int], unread: list[NewPositions], target_side, drafter):
    """Leave finished rows out of the caches, unless the target keeps them."""
    going = [i for i, row in enumerate(active) if not rows.is_done(row)]
    if len(going) == len(active) or not going or target_side.keeps_rows:
        return active, unread
    # Rows at the end take the places of those that leave, so that no others have to be moved.
    moving = [i for i in going if i >= len(going)]
    kept = [place if place in going else moving.pop() for place in range(len(going))]
    target_side.keep_rows(kept)
    drafter.keep_rows(kept)
    return [active[i] for i in kept], [part.select(kept) for part in unread]


class _Stream:
    """Hands tokens to a streamer one step at a time, as plain decoding does: of a batch when every row has that step's.

    A streamer with a method `put_round` is told at each round how many of its tokens were drafted,
    in a batch those of the row that went furthest.
    """

    def __init__(self, streamer, rows: OutputRows):
        self.streamer, self.rows, self.num_put = streamer, rows, rows.prompt_length

    def put(self, num_drafted: int | None = None) -> None:
        """Hand over what every row has; rows that have ended go on with padding."""
        if self.streamer is None:
            return
        rows = self.rows
        if num_drafted is not None and hasattr(self.streamer, "put_round"):
            self.streamer.put_round(num_drafted)
        going = [length for row, length in enumerate(rows.lengths) if not rows.is_done(row)]
        end = min(going) if going else max(rows.lengths)
        for index in range(self.num_put, end):
            tokens = rows.ids[:, index].cpu()
            has_ended = torch.tensor([length <= index for length in rows.lengths])
            if has_ended.any():
                tokens[has_ended] = rows.pad_token_id.to(tokens)
            self.streamer.put(tokens)
        self.num_put = end


def _check_call(target, input_ids, plain_arguments: dict, model_kwargs: dict) -> None:
    """See whether the settings of a call can be served.

    Raises:
        Declined: if plain decoding has to serve them.
        ValueError: for what plain decoding would not do either.
    """
    generation_config = plain_arguments["generation_config"]
    if target.config.is_encoder_decoder:
        raise ValueError(f"expected a decoder-only target, got {type(target).__name__}")
    if generation_config.dola_layers is not None:
        raise ValueError(f"dola_layers: expected None beside a draft, got {generation_config.dola_layers!r}")
    if not model_kwargs.get("use_cache"):
        raise Declined("use_cache=False leaves nothing to verify a draft against; pass use_cache=True")
    if cache_of(model_kwargs) is None:
        raise Declined(f"{type(target).__name__} keeps its state in no cache of transformers that could be rolled back")
    if plain_arguments["synced_gpus"]:
        raise Declined("synced_gpus asks for the same forwards on every process")
    if model_kwargs.get("inputs_embeds") is not None:
        raise Declined("inputs_embeds has no token ids for the draft to read; pass input_ids")
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
    """Rows of a batch run ahead of each other, which a processor or criterion with a state of its own cannot follow."""
    for kind in ("logits_processor", "stopping_criteria"):
        for function in plain_arguments[kind]:
            name, module = type(function).__name__, type(function).__module__
            if name in _WHOLE_BATCH_PROCESSORS or not module.startswith("transformers."):
                return f"{name} may keep a state for the whole batch; decode one row at a time"
    return None


def _decode_plainly(reason: str, target, draft, input_ids, plain_arguments: dict, model_kwargs: dict):
    """Plain decoding from inside the hook, with a warning; the result is the same as without a draft."""
    warnings.warn(f"decoding without the draft: {reason}", stacklevel=5)
    output = decode_plainly(target, input_ids, **plain_arguments, **model_kwargs)
    returns_dict = plain_arguments["generation_config"].return_dict_in_generate
    sequences = output.sequences if returns_dict else output
    num_rounds = max(sequences.shape[1] - input_ids.shape[1] - 1, 0)
    speculation = Speculation.empty(input_ids.shape[0])
    speculation.declined = reason
    for row in range(input_ids.shape[0]):
        for _ in range(num_rounds):
            speculation.add_round(row, num_emitted=1)
    draft.last_speculation = speculation
    if returns_dict:
        output.speculation = speculation
    return output
