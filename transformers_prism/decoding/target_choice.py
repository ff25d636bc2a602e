"""Which kind of target side serves a call: trees if they can be verified, else a chain, else none."""

from ..transformers_names import cache_of, is_stateful
from .chain_target import ChainTarget
from .recurrent_target import RecurrentTarget, why_no_replay
from .round_check import is_tried
from .sequences import Sequences
from .target_side import TargetSide
from .target_support import (
    Declined,
    inputs_of_next_step,
    reason_against_adapters,
    reason_against_inputs,
    reason_against_masks,
    reason_against_untried_chat,
    rotary_switches,
    skipped_token,
    why_no_chain,
    why_no_tree,
)
from .tree_target import TreeTarget


def make_target(target, layer_ids, generation_config, model_kwargs: dict, input_ids, sequences: Sequences) -> TargetSide:
    """The way to verify drafts with this target and cache.

    Args:
        target, layer_ids, generation_config, model_kwargs, sequences: see [`TargetSide`].
        input_ids (`torch.LongTensor` of shape `(B, T)`): the prompts.
    Raises:
        Declined: if there is none, with the reason.
    """
    cache = cache_of(model_kwargs)
    # Plain decoding asks the model itself for the inputs of every step; so do we, once.
    inputs = inputs_of_next_step(target, input_ids, model_kwargs)
    config = target.config.get_text_config()
    reason = (
        reason_against_masks(config)
        or reason_against_adapters(target)
        or reason_against_inputs(inputs, rotary_switches(config))
    )
    if reason is None and (untried := reason_against_untried_chat(cache)) is not None and not is_tried(target):
        reason = untried
    if reason is not None:
        raise Declined(reason)
    why_chain = why_no_tree(target, cache, inputs)
    arguments = (target, layer_ids, generation_config, model_kwargs, inputs, sequences, why_chain)
    if why_chain is None:
        return TreeTarget(*arguments)
    num_rows = input_ids.shape[0]
    is_replayed = is_stateful(target) or num_rows > 1
    reason = why_no_replay(cache, num_rows) if is_replayed else why_no_chain(cache)
    if is_replayed and skipped_token(target, inputs) is not None:
        reason = "may leave padding tokens out, which a batch has"
    if reason is not None:
        raise Declined(f"{why_chain}, and {reason}")
    return (RecurrentTarget if is_replayed else ChainTarget)(*arguments)
