"""Whether a target, its cache and its inputs allow trees to be verified, or a chain, or neither, with the reason.

Plain decoding asks the model itself for the inputs of every step; so do we, once per call, before the prompt is read. The
choice depends on what the answer lacks (positions) or adds (inputs that cannot be extended along a tree), not on model names.
"""

import functools
import inspect
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..transformers_names import attention_name, input_methods, keeps_no_activations
from .attention import PRISM_TREE
from .cache import is_adoptable, stored_length

_TREE_ATTENTION = ("sdpa", "eager", PRISM_TREE)
# Configuration fields of a local window or a number of keys to attend to, for which transformers makes no mask.
_OWN_WINDOWS = ("window_size", "attention_window", "local_window_size", "attention_window_size", "local_attention_window")


# Packages whose code treats several tokens at once as it treats one, be it modules, hooks or step inputs: transformers, what
# it was tried with, and layers of quantised weights. Ours is among them under either name.
_TRIED_PACKAGES = {
    *("torch", "transformers", "accelerate", "peft", "torchao", "bitsandbytes", "compressed_tensors", "kernels"),
    *("aqlm", "auto_gptq", "auto_round", "awq", "eetq", "fbgemm_gpu", "gptqmodel", "hqq", "optimum", "quark", "vptq"),
    *("transformers_prism", __name__.split(".")[0]),
}


class Declined(Exception):
    """The loop cannot serve this call, and plain decoding has to; the message says why."""


class RotarySwitch(NamedTuple):
    """A length at which the rotary frequencies of a whole forward change, by its longest position.

    Args:
        length: in tokens; longer texts have other frequencies.
        is_drafted_beyond: whether these are the same for all longer texts; else they change with every token.
    """

    length: int
    is_drafted_beyond: bool

    def max_depth(self, position: int) -> float:
        """Draft steps after a root at `position` that get the same frequencies as in plain decoding."""
        if position < self.length:
            return self.length - 1 - position
        # At the switch itself some models read the whole text anew.
        return math.inf if self.is_drafted_beyond and position > self.length else 0


def hidden_state(outputs, layer: int, config) -> torch.Tensor:
    """A hidden state `(B, T, D)` of a target's output; of several streams the one that the model continues with (gemma3n,
    `(streams, B, T, D)`) or their mean (hyper-connections, `(B, T, streams, D)`)."""
    return one_stream(outputs.hidden_states[place_of_state(layer, config, len(outputs.hidden_states))], config)


def one_stream(state: torch.Tensor, config) -> torch.Tensor:
    """A hidden state `(B, T, D)` of one that may have several streams, as for [`hidden_state`]."""
    if state.dim() == 3:
        return state
    active = getattr(config.get_text_config(), "altup_active_idx", None)
    return state.mean(dim=2) if active is None else state[active]


def image_layers(config) -> frozenset[int]:
    """Layers with cross-attention to an image, which their part of the cache holds (mllama); skipped without an image."""
    layers = getattr(config.get_text_config(), "cross_attention_layers", None)
    return frozenset(layers if isinstance(layers, (list, tuple)) else ())


def _place_without_image(layer: int, config) -> int:
    """Index of a hidden state among those of a forward that has skipped the layers of an image."""
    return layer - sum(skipped < layer for skipped in image_layers(config))


def place_of_state(layer: int, config, num_states: int) -> int:
    """Index of a hidden state among the `num_states` of a forward; for a skipped layer, that of the state before it."""
    is_skipping = num_states + len(image_layers(config)) == config.get_text_config().num_hidden_layers + 1
    return _place_without_image(layer, config) if is_skipping else layer


def states_to_ask_for(layer_ids: list[int], config) -> list[int]:
    """Which hidden states a forward has to return, so that those of `layer_ids` are among them with and without an image."""
    return sorted({*layer_ids, *(_place_without_image(layer, config) for layer in layer_ids)})


def rotary_switches(text_config) -> list[RotarySwitch]:
    """Lengths at which a target's frequencies change: `dynamic` and `longrope` rotary embeddings."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    switches = []
    for kind in kinds:
        # Dynamic frequencies follow the longest text from `max_position_embeddings` on, whatever else is written there.
        length = getattr(text_config, "max_position_embeddings", 0)
        if kind.get("rope_type") == "longrope":
            switches.append(RotarySwitch(kind.get("original_max_position_embeddings") or length, True))
        elif "dynamic" in str(kind.get("rope_type")):
            switches.append(RotarySwitch(length, False))
    # Models of the phi family read their text anew there, whatever their frequencies do.
    original = getattr(text_config, "original_max_position_embeddings", None)
    if original and RotarySwitch(original, True) not in switches:
        switches.append(RotarySwitch(original, True))
    return switches


def layer_windows(text_config) -> dict[str | None, int | None] | None:
    """The sliding window (None: full attention) of each kind of layer, keyed as the target's forward takes its masks;
    a single key None where it takes one tensor. None if a kind of layer has no tree mask.

    Source: `create_masks_for_generate` of transformers, whose cases these are.
    """
    window = getattr(text_config, "sliding_window", None)
    if hasattr(text_config, "layer_types"):
        kinds = set(text_config.layer_types)
        if not kinds <= {"full_attention", "sliding_attention"}:
            return None
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}
    if window is None and getattr(text_config, "attention_chunk_size", None) is not None:
        return None
    return {None: window}


def why_no_tree_mask(target) -> str | None:
    """Why a target's forward takes no tree; None if it does."""
    config = target.config.get_text_config()
    name = attention_name(config)
    if name not in _TREE_ATTENTION:
        return f'its attention, {name}, takes no tree mask; load it with attn_implementation="sdpa"'
    if not getattr(ALL_MASK_ATTENTION_FUNCTIONS[name], "__module__", "").startswith("transformers."):
        return f"masks of its attention, {name}, are made by a function that was registered for it"
    if layer_windows(config) is None:
        return "its layers are neither all full nor sliding attention"
    if not takes_positions(target):
        return "its forward takes no positions"
    if getattr(config, "alibi", False):
        return "its alibi biases follow places in the cache, not positions"
    # Where a configuration lists its layers, it may have no local one.
    kinds = getattr(config, "attention_layers", None)
    has_local = not isinstance(kinds, (list, tuple)) or "local" in kinds
    if has_local and any(isinstance(getattr(config, name, None), int) for name in _OWN_WINDOWS):
        return "its local attention follows places in the cache, not positions"
    return None


def package_of(function) -> str:
    """The package of a function, also behind functools.partial, or a class."""
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None) or type(function).__module__
    return module.split(".")[0]


def is_foreign(function) -> bool:
    """Whether a function, also behind functools.partial, or a class is from a package that was not tried."""
    return package_of(function) not in _TRIED_PACKAGES


def added_code(target) -> list:
    """The attention and mask functions that are registered for a model, hooks of its modules and of all modules, and forwards
    of single modules that replace their class's own."""
    everywhere = torch.nn.modules.module
    functions = [*everywhere._global_forward_hooks.values(), *everywhere._global_forward_pre_hooks.values()]
    name = attention_name(target.config.get_text_config())
    registered = (functions_by_name.get(name) for functions_by_name in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS))
    functions += [getattr(one, "prism_original", one) for one in registered if one is not None]  # "eager" is each model's own
    for module in target.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            functions += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module):
            functions.append(vars(module)["forward"])
    return functions


def foreign_forwards(target) -> list:
    """Forwards of the classes of a model's modules, from packages that were not tried."""
    kinds = dict.fromkeys(type(module) for module in target.modules())
    return [forward for forward in dict.fromkeys(kind.forward for kind in kinds) if is_foreign(forward)]


def is_changed(target) -> bool:
    """Whether code of packages that were not tried was added to a model: to any its [`added_code`], to one of transformers modules
    of other classes, too."""
    if any(map(is_foreign, added_code(target))):
        return True
    return not is_foreign(type(target)) and bool(foreign_forwards(target))


def may_know_rows(target) -> bool:
    """Whether code was added to a model that may hold something for each row of a batch, as peft's hooks do for rows with
    different adapters."""
    return is_changed(target) or any(package_of(one) == "peft" for one in added_code(target))


def makes_own_inputs(target) -> bool:
    """Whether a target makes the inputs of a step by code of its own, in place of transformers'."""
    return any(map(is_foreign, input_methods(target)))


def inputs_of_next_step(target, input_ids: torch.Tensor, model_kwargs: dict) -> dict | None:
    """What plain decoding would hand the target's forward for one more token; None if the model does not say beforehand."""
    try:
        return target.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, is_first_iteration=False, **model_kwargs
        )
    # A model's own code may fail in any way on a cache that is still empty.
    except Exception:
        return None


def reason_against_masks(text_config) -> str | None:
    """Why several tokens at once cannot get the attention that single steps get; None if they can."""
    if getattr(text_config, "keep_window_size", None) is not None:
        return "its dynamic mask keeps other keys for several tokens at once than for single ones (keep_window_size)"
    # `DynamicSlidingWindowLayer` slices the last `window - 1` positions; for 1, Python's slice is all of them.
    if getattr(text_config, "sliding_window", None) == 1:
        return "caches of transformers keep all positions for a sliding window of 1, and single steps attend to them"
    return None


def reason_against_adapters(target) -> str | None:
    """Why a target cannot be served if peft adds virtual tokens to its text, or adapts a part of the text; None if not."""
    # peft puts its own method in the place of the model's.
    owner = getattr(vars(target).get("prepare_inputs_for_generation"), "__self__", None)
    if getattr(getattr(owner, "active_peft_config", None), "is_prompt_learning", False):
        return "peft's prompt and prefix tuning put virtual tokens before the text, for which a draft has no states"
    if any("alora_offsets" in getattr(one, "keywords", ()) for one in added_code(target)):
        return "peft's aLoRA changes the last tokens of each forward, whichever they are"
    return None


def reason_against_untried_chat(cache) -> str | None:
    """Why an untried target cannot continue with a caller's cache; None if it can."""
    # The model's own masks for what follows may assume that the cache of a sliding window holds the window only.
    if stored_length(cache) and any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return "nobody has tried this model with a cache of sliding windows that holds a text already"
    return None


def reason_against_layers(cache, num_tokens: int, of_images: Collection[int], are_left_alone: bool = False) -> str | None:
    """Why a cache that has read a text of `num_tokens` tokens cannot be rolled back: layers `of_images` hold an image. None if
    all layers hold the text, except for layers `of_images` if those are left alone."""
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if are_left_alone and index in of_images:
            continue
        if getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length"):
            length = int(layer.get_seq_length())
            if length and (length != num_tokens or index in of_images):
                return f"layer {index} of its cache holds {length} positions of something other than the text, such as an image"
    return None


def reads_whole_text(inputs: dict | None) -> TypeGuard[dict]:
    """Whether a step with these inputs reads more than one token."""
    return inputs is not None and inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] != 1


def reason_against_inputs(inputs: dict | None, switches: list[RotarySwitch]) -> str | None:
    """Why a step with these inputs cannot be verified for several tokens at once; None if it can."""
    if inputs is None:
        return None
    # Beyond a rotary switch a model may ask for the whole text as long as its cache is empty.
    if reads_whole_text(inputs) and not switches:
        return "the model reads the whole text in every step and not the cache"
    position_ids = inputs.get("position_ids")
    if position_ids is not None and position_ids.dim() not in (2, 3):
        return f"position_ids has {position_ids.dim()} dimensions instead of 2 or 3"
    streamed = next((name for name, value in inputs.items() if isinstance(value, Iterator)), None)
    return f"the model reads {streamed} bit by bit, one token at a time" if streamed else None


def position_offset(inputs: dict | None, model_kwargs: dict) -> int:
    """What a model adds to the positions that generate() prepares, as paligemma does, which counts from 1.

    Raises:
        Declined: if that differs from row to row.
    """
    given, made = model_kwargs.get("position_ids"), (inputs or {}).get("position_ids")
    if given is None or made is None or given.dim() != 2 or made.dim() != 2:
        return 0
    offsets = set((made[:, -1] - given[:, -1]).tolist())
    if len(offsets) > 1:
        raise Declined(f"the model changes positions by {sorted(offsets)}, other rows otherwise")
    return offsets.pop()


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DRAWS_ANEW = "dropout or jitter in train mode draws anew in every forward; call target.eval()"


def reason_against_training(target) -> str | None:
    """Why a target in train mode cannot be served; None if it can."""
    # `target.model.train()` leaves the target's own flag alone.
    if not any(module.training for module in target.modules()):
        return None
    if target.training and keeps_no_activations(target):
        return "gradient checkpointing in train mode keeps no cache; call target.eval()"
    rates = vars(target.config.get_text_config()).items()
    if any(("drop" in name or "jitter" in name) and isinstance(rate, float) and rate > 0 for name, rate in rates):
        return _DRAWS_ANEW
    # Adapters bring dropout layers of their own, which the configuration does not mention.
    layers = (module for module in target.modules() if isinstance(module, _DROPOUT))
    return _DRAWS_ANEW if any(layer.training and layer.p > 0 for layer in layers) else None


# Types whose plain decoding goes on at a rotary switch without the text before it, as if its cache had been emptied.
LOSES_TEXT = ("phi4_multimodal",)
# Types whose prompt sees its own padding, so that plain decoding gives a padded row another text than the row alone.
SEES_PADDING = ("paligemma",)


def reason_against_switch(switches: list[RotarySwitch], position: int, max_new_tokens: int) -> str | None:
    """Why a sequence cannot be served if its cache cannot be filled again; arguments as [`reason_against_batch_positions`]."""
    for switch in switches:
        if switch.is_drafted_beyond and position <= switch.length < position + max_new_tokens:
            return (
                f"rotary frequencies change at {switch.length} tokens, where a model may read its text into another cache, "
                "and this call's cache cannot follow it there"
            )
    return None


def reason_against_batch_positions(switches: list[RotarySwitch], positions: list[int], max_new_tokens: int) -> str | None:
    """Why several rows cannot be served: rotary frequencies follow the longest row, which rows reach at different times.

    Args:
        switches (`list[RotarySwitch]`): of the target.
        positions (`list[int]`): of each row's next token.
        max_new_tokens (`int`): tokens that a row may still get.
    """
    for switch in switches:
        stays_below = max(positions) + max_new_tokens < switch.length
        if not stays_below and not (switch.is_drafted_beyond and min(positions) >= switch.length):
            return f"rotary frequencies change at {switch.length} tokens, which rows of a batch reach at different times"
    return None


def why_no_chain(cache) -> str | None:
    """Why a target's own cache cannot be rolled back; None if it can, which some layers only tell once they hold something."""
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        return f"{kind} cannot be rolled back"
    others = [type(layer).__name__ for layer in cache.layers if not type(layer).__module__.startswith("transformers.")]
    if others:
        return f"layers that are not transformers' own may not roll back ({', '.join(sorted(set(others)))})"
    if not (cache.is_croppable or stored_length(cache) == 0):
        return "a layer's state cannot be rolled back"
    return None


def why_no_tree(target, cache, inputs: dict | None) -> str | None:
    """Why trees cannot be verified with this target and cache; None if they can."""
    if not is_adoptable(cache):
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())})
        return f"the cache keeps states that cannot be moved ({type(cache).__name__} of {', '.join(kinds) or 'no layers'})"
    if counts_positions(inputs):
        return "the model counts positions by itself"
    return why_no_tree_mask(target)


def counts_positions(inputs: dict | None) -> bool:
    """Whether a model's `prepare_inputs_for_generation`, which made `inputs`, leaves positions to the model."""
    return inputs is not None and inputs.get("position_ids") is None


def takes_positions(target) -> bool:
    """Whether a target's forward can be told the positions of tokens."""
    return "position_ids" in inspect.signature(target.forward).parameters


def skipped_token(target, inputs: dict | None) -> int | None:
    """The padding token of a model that counts positions by itself, and may leave this token out (Kosmos-2)."""
    counts_them = counts_positions(inputs) and takes_positions(target)
    return target.config.get_text_config().pad_token_id if counts_them else None
