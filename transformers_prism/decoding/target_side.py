"""The target's half of a round: what all kinds of targets share, which is the prompt's forward, positions and states.

Shape letters: B sequences that still decode, T prompt positions, N tree nodes, L target layers that the draft reads.
"""

import copy
import math
import re
import sys
import time
from itertools import chain

import torch
from torch.nn.functional import pad

from ..transformers_names import (
    CACHE_NAMES,
    attention_name,
    cache_argument,
    cache_of,
    experts_of_step,
    is_callers_cache,
    next_kwargs,
    prefill,
    takes_logits_to_keep,
)
from .cache import CacheSnapshot, stored_length
from .layer_check import input_device
from .positions import AxisPositions, inputs_by_kind, text_positions
from .round_values import Prompt, Verified, joined_states
from .sequences import Sequences
from .target_support import (
    Declined,
    counts_positions,
    image_layers,
    inputs_of_next_step,
    makes_own_inputs,
    may_know_rows,
    one_stream,
    place_of_state,
    position_offset,
    reason_against_batch_positions,
    reason_against_layers,
    reason_against_switch,
    rotary_switches,
    skipped_token,
    states_to_ask_for,
    takes_positions,
)
from .transfer import on_device
from .tree import Tree
from .uneven_prompts import right_aligned

# What generate() prepares and a verification forward replaces.
_REPLACED_INPUTS = (
    *CACHE_NAMES,
    *("attention_mask", "cache_position", "input_ids", "inputs_embeds", "logits_to_keep", "output_attentions"),
    *("output_hidden_states", "position_ids", "return_dict", "use_cache"),
)
# Steps after the prompt up to which a target's own way of making inputs is looked at.
_MOST_STEPS_AHEAD = 1024
# Names of tables of learned positions.
_OF_POSITIONS = re.compile("posit|pos_|wpe")


class TargetSide:
    """What a target does in a generate() call; one object serves one call.

        prompt = side.prefill(input_ids)     Prompt: logits of the last position, states and positions for the draft
        while there are rounds:
            verified = side.verify(tree)     Verified: logits and states at each node, seconds; the tree is at most
                                             `side.max_depth` deep and has at most `side.max_nodes` drafted nodes
            side.commit(kept)                keep what was computed at these nodes of each sequence, forget the rest
            side.keep_sequences(places)      only these sequences of the batch go on; never where `keeps_finished`
        side.finish(sequences)               the cache becomes what plain decoding would have left, if anyone gets it
        side.abandon()                       after an error, instead: the cache becomes what it was before the call

    A kind of target overrides `_verify`, `commit`, `keep_sequences` and `finish`, and where it needs to `_before_prefill`,
    `_after_prefill`, `forget_appended`, `plain_steps`, `max_nodes` and `can_read_anew`. Its `__init__` hands
    all arguments on. All attributes are made in `__init__`; the prefill puts what it finds out into them, or returns it.

    Args:
        target (`PreTrainedModel`): the model to decode.
        layer_ids (`list[int]`): indices into its hidden states, which the draft reads.
        generation_config (`GenerationConfig`), model_kwargs (`dict`): as generate() prepared them.
        inputs (`dict`, *optional*): of a step after the prompt, as plain decoding makes them.
        sequences (`Sequences`): what has been emitted, which the loop appends to.
        why_no_tree (`str`, *optional*): why this kind stands in for one that verifies trees.
    """

    kind = "tree"  # what statistics call it
    leaves_image_layers = False  # whether layers of the cache that hold an image may stay as they are

    def __init__(
        self,
        target,
        layer_ids: list[int],
        generation_config,
        model_kwargs: dict,
        inputs: dict | None,
        sequences: Sequences,
        why_no_tree: str | None = None,
    ):
        self.target, self.device = target, input_device(target)
        self.layer_ids = list(layer_ids)
        self.asked_states = states_to_ask_for(self.layer_ids, target.config)
        # By how many hidden states a forward returns, since transformers searches the configuration in each look at it.
        self.places_of_states: dict[int, list[int]] = {}
        self.image_layers = image_layers(target.config)
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.sequences = sequences
        self.why_no_tree = why_no_tree
        self.cache = cache_of(model_kwargs)
        self.snapshot = CacheSnapshot(self.cache)
        self.own_cache = copy.copy(self.cache)  # which keeps its own layers where others are lent
        self.returns_cache = generation_config.return_dict_in_generate or is_callers_cache(self.cache)
        # Sequences that have ended stay in the batch.
        self.keeps_finished = self.returns_cache or (len(sequences) > 1 and may_know_rows(target))
        self.has_given_up = False
        self.rotary_switches = rotary_switches(target.config.get_text_config())
        self.model_forward = target
        self.takes_position_ids = takes_positions(target) and not counts_positions(inputs)
        self.skipped_token = skipped_token(target, inputs)
        # What belongs to the prompt alone, as images do, is not among the inputs of a later step.
        kept = model_kwargs if inputs is None else inputs
        self.forward_kwargs = {key: value for key, value in kept.items() if key not in _REPLACED_INPUTS}
        # Whether the model says what a step reads, and that includes tensors that a forward does not get anyway.
        has_tensors = any(isinstance(value, torch.Tensor) for value in self.forward_kwargs.values())
        self.has_more_inputs = inputs is not None and has_tensors
        self.token_inputs: dict[str, torch.Tensor] = {}  # of single tokens, `(B, 1, ...)`, the same for all that are emitted
        self.axes: AxisPositions | None = None  # where positions have several axes
        self.position_offset = position_offset(inputs, model_kwargs)
        self.num_cached_before = 0  # tokens in the cache that are not among the call's input_ids
        # Of each sequence: the position of its next root, and the last one that plain decoding computes.
        self.next_position: list[int] = []
        self.position_limit: list[int] = []

    def prefill(self, input_ids: torch.LongTensor) -> Prompt:
        """Run the prompt.

        Raises:
            ValueError: if the prompt has more tokens than the target has learned positions.
            Declined: if the forward shows that this target cannot be served.
        """
        num_positions = num_learned_positions(self.target)
        num_tokens = self._most_tokens(input_ids)
        if num_positions is not None and num_tokens > num_positions:
            raise ValueError(
                f"input_ids: expected at most {num_positions} tokens (the target's max_position_embeddings), "
                f"got {num_tokens}"
            )
        had_cached = bool(stored_length(self.cache))
        self._before_prefill()
        rows, outputs = self._read_prompts(input_ids)
        width = stored_length(self.cache)
        if width is None:  # of recurrent states alone
            width = input_ids.shape[1]
        if width < input_ids.shape[1] and not had_cached:
            kept = f"{width} of the prompt's {input_ids.shape[1]} tokens in its cache" if width else "no cache of the prompt"
            raise Declined(f"{type(self.target).__name__} keeps {kept}")
        if width > input_ids.shape[1] and not had_cached:  # an image before the text, as in the model type git
            raise Declined(f"the prompt takes {width} places of the cache and has {input_ids.shape[1]} tokens for a draft to read")
        reason = reason_against_layers(self.cache, width, self.image_layers, self.leaves_image_layers)
        if reason is not None:
            raise Declined(reason)
        self._take_inputs(input_ids, outputs[0])
        self.num_cached_before = width - input_ids.shape[1]
        states = [joined_states(self._states(one)) for one in outputs]
        logits, hidden = outputs[0].logits[:, -1], states[0]
        if rows:
            logits = right_aligned(rows, [one.logits[:, -1:] for one in outputs], len(input_ids), 1, dim=1)[:, 0]
            hidden = right_aligned(rows, states, len(input_ids), input_ids.shape[1], dim=1)
        mask = self.model_kwargs.get("attention_mask")
        mask = torch.ones((len(input_ids), width), device=hidden.device) if mask is None else mask
        mask = mask.bool()
        if stored_length(self.cache) is not None and mask.shape[1] != width:
            # Where nothing is masked, only the length counts, and that is the cache's.
            if not mask.all():
                raise Declined(f"attention_mask has {mask.shape[1]} columns, but the cache holds {width} tokens")
            mask = mask[:, :1].expand(-1, width)
        given = self.model_kwargs.get("position_ids")
        position_ids = text_positions(given, mask) + self.position_offset
        if given is not None and given.dim() == 3:
            self.axes = AxisPositions(given, position_ids)
        self._set_positions(position_ids[:, -1].tolist(), input_ids.shape[1], num_positions)
        if makes_own_inputs(self.target) and self.axes is None:
            self._check_own_inputs(input_ids, outputs[0], position_ids[:, -1:], mask)
        self._after_prefill(mask)
        length = hidden.shape[1]
        read_mask = mask[:, -length:] if self.is_padded else None
        return Prompt(logits, hidden, position_ids[:, -length:], read_mask)

    def _read_prompts(self, input_ids: torch.LongTensor) -> tuple[list[list[int]], list]:
        """Read the prompts into the cache; returns the rows of each forward and its outputs, no rows if one read all."""
        return [], [self._read_together(input_ids)]

    def _read_together(self, input_ids: torch.Tensor, **replaced):
        """Outputs of one forward over prompts `(B, T)`, in which some of the inputs are replaced."""
        # A copy, since transformers' chunked prefill writes to it.
        model_kwargs = {**self.model_kwargs, **replaced, "output_hidden_states": self.asked_states}
        outputs = prefill(self.target, input_ids, self.generation_config, model_kwargs)
        self._take_over(cache_of(outputs))
        return outputs

    def _take_inputs(self, input_ids: torch.Tensor, outputs) -> None:
        """Keep the inputs that every round's forward gets in addition to those made for it, as plain decoding derives them from
        the prompt's outputs."""
        if self.has_more_inputs:
            model_kwargs, steps = self.model_kwargs, list[dict]()
            for _ in range(2):
                model_kwargs, input_ids = self._next_step(input_ids, outputs, model_kwargs)
                step = inputs_of_next_step(self.target, input_ids, model_kwargs)
                if step is None:
                    raise Declined(f"{type(self.target).__name__} does not say what a step after its prompt reads")
                steps.append(step)
            self.forward_kwargs, self.token_inputs = inputs_by_kind(steps[0], steps[1], _REPLACED_INPUTS)
        if takes_logits_to_keep(self.target):
            self.forward_kwargs["logits_to_keep"] = 0
        # A loss over router logits takes no tree mask, and nobody gets what rounds would return of it.
        asks_for_router = getattr(self.target.config.get_text_config(), "output_router_logits", False)
        if asks_for_router or "output_router_logits" in self.forward_kwargs:
            self.forward_kwargs["output_router_logits"] = False
        # Tensors of the whole call, and an image in the cache, may have a row for each sequence, so all sequences stay.
        self.keeps_finished |= any(isinstance(value, torch.Tensor) for value in self.forward_kwargs.values())
        layers = enumerate(getattr(self.cache, "layers", ()))
        if any(int(layer.get_seq_length()) for index, layer in layers if index in self.image_layers):
            self.keeps_finished = True
            if not self.token_inputs and attention_name(self.target.config) != "eager":
                raise Declined(
                    "without a cross_attention_mask several tokens see other parts of an image than single ones; pass one for the "
                    "whole text"
                )

    def _next_step(self, input_ids: torch.Tensor, outputs, model_kwargs: dict) -> tuple[dict, torch.Tensor]:
        """What plain decoding prepares the step after these outputs from: its arguments, and ids with one more token."""
        model_kwargs = next_kwargs(self.target, outputs, model_kwargs)
        model_kwargs |= {name: self.own_cache for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        return model_kwargs, pad(input_ids, (0, 1))

    def _check_own_inputs(self, input_ids: torch.Tensor, outputs, last_position: torch.Tensor, mask: torch.Tensor) -> None:
        """Compare what the target's own code makes the next steps of, and the last one, with what rounds give them.

        Args:
            last_position (`torch.LongTensor` of shape `(B, 1)`), mask (`torch.BoolTensor` of shape `(B, P)`): of the prompt.
        Raises:
            Declined: if positions or masks differ.
        """
        num_steps = min(max(self.generation_config.max_length - input_ids.shape[1], 2), _MOST_STEPS_AHEAD)
        model_kwargs = self.model_kwargs
        for step in range(1, num_steps + 1):
            model_kwargs, input_ids = self._next_step(input_ids, outputs, model_kwargs)
            if step not in (1, 2, num_steps):
                continue
            made = inputs_of_next_step(self.target, input_ids, model_kwargs) or {}
            expected = {"position_ids": last_position + step, "attention_mask": pad(mask, (0, step), value=True)}
            for name, value in expected.items():
                given = made.get(name)
                if given is None or given.dim() != 2:
                    continue
                given = given[:, -1:] if name == "position_ids" else given.bool()
                if not torch.equal(given.to(value), value):
                    raise Declined(f"{type(self.target).__name__} makes {name} of later steps in its own way, which rounds do not")

    def _most_tokens(self, input_ids: torch.LongTensor) -> int:
        """Tokens of the longest prompt, padding not counted."""
        position_ids, mask = self.model_kwargs.get("position_ids"), self.model_kwargs.get("attention_mask")
        if position_ids is not None and position_ids.dim() == 2:
            return int(position_ids.max()) + 1
        return input_ids.shape[1] if mask is None else int(mask.bool().sum(dim=1).max())

    def _take_over(self, made) -> None:
        """Make sure that the call's cache holds what the model has read, if it has read it into another cache, `made`."""
        if stored_length(self.cache) == 0:
            self._fill_cache(made)
        elif made is not None and made is not self.cache:
            where = ", as behind a rotary switch" if self.rotary_switches else ""
            raise Declined(f"the model reads the whole text into another cache than the caller's{where}")

    def _set_positions(self, last_positions: list[int], prompt_length: int, num_positions: int | None) -> None:
        """Start after these positions of the prompt; decline if rotary frequencies change where rounds cannot follow."""
        self.next_position = [position + 1 for position in last_positions]
        num_new_tokens = self.generation_config.max_length - prompt_length
        reason = None
        if len(self.next_position) > 1:
            reason = reason_against_batch_positions(self.rotary_switches, self.next_position, num_new_tokens)
        elif not self.can_read_anew:
            reason = reason_against_switch(self.rotary_switches, self.next_position[0], num_new_tokens)
        if reason is not None:
            raise Declined(reason)
        self.position_limit = [position + max(num_new_tokens - 2, 0) for position in self.next_position]
        if num_positions is not None:
            self.position_limit = [min(limit, num_positions - 1) for limit in self.position_limit]

    def verify(self, tree: Tree) -> Verified:
        """The target's logits at each node of a tree, and the states that the draft reads, in one forward."""
        start = time.perf_counter()
        logits, states = self._verify(tree)
        return Verified(logits, states, self.next_position, time.perf_counter() - start)

    def _verify(self, tree: Tree) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits and states of [`Verified`]."""
        raise NotImplementedError

    def commit(self, kept: list[list[int]]) -> None:
        """Keep what was computed at these nodes of each sequence of the latest tree, and forget the rest.

        Args:
            kept (`list[list[int]]`): nodes, rising, the root first; [] for a sequence that has ended.
        """
        self.next_position = [position + len(nodes) for position, nodes in zip(self.next_position, kept, strict=True)]

    def keep_sequences(self, places: list[int]) -> None:
        """Keep only the sequences at these places of the batch."""
        self.next_position = [self.next_position[place] for place in places]
        self.position_limit = [self.position_limit[place] for place in places]
        if self.axes is not None:
            self.axes.keep_sequences(places)
        self.token_inputs = {name: value[places] for name, value in self.token_inputs.items()}

    def finish(self, sequences: torch.Tensor) -> None:
        """If the cache is returned, leave it as plain decoding of these sequences `(B, T)` would."""

    def abandon(self) -> None:
        """Leave the cache as it was before the call."""
        self.snapshot.restore()

    def give_up_drafting(self) -> None:
        """Forget what was appended since the last commit; the next rounds are plain steps."""
        self.has_given_up = True
        self.forget_appended()

    def plain_steps(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Logits `(B, A, V)` of single steps over tokens `(B, A)` after the committed ones; these tokens are not committed."""
        raise NotImplementedError

    def forget_appended(self) -> None:
        """Drop what was appended since the last commit."""

    def _before_prefill(self) -> None:
        """Prepare the cache."""

    def _after_prefill(self, mask: torch.Tensor) -> None:
        """Note what the cache holds; `mask` is `(B, P)` over what it holds, False at padding."""

    def _fill_cache(self, made) -> None:
        """Copy what the model has read into a cache of its own, as some do beyond a rotary switch."""

    @property
    def can_read_anew(self) -> bool:
        """Whether the cache can be filled with the whole text once more."""
        return False

    @property
    def is_checked(self) -> bool:
        """Whether rounds are compared with single steps although the target was tried."""
        return False

    @property
    def max_nodes(self) -> int:
        """Drafted nodes that the next tree may have."""
        return sys.maxsize

    @property
    def max_depth(self) -> float:
        """Depth that the next tree may have, so that its forward computes what plain decoding would."""
        if self.has_given_up:
            return 0
        if len(self.next_position) > 1:
            return math.inf  # no switch is near, or the call would have been declined
        depths = (switch.max_depth(self.next_position[0]) for switch in self.rotary_switches)
        return min(depths, default=math.inf)

    @property
    def num_carried(self) -> int:
        """Committed tokens that the next forward runs besides the tree."""
        return 0

    @property
    def is_padded(self) -> bool:
        """Whether a prompt was padded: generate() hands over no mask where nothing is."""
        return self.model_kwargs.get("attention_mask") is not None

    def _mask_over(self, width: int) -> torch.Tensor | None:
        """The prompt's mask with ones for all that follows, over `width` places in all; None where nothing is padded."""
        mask = self.model_kwargs.get("attention_mask")
        return None if mask is None else pad(mask, (0, width - mask.shape[1]), value=1)

    def _forward(
        self, tree: Tree, mask, position_ids: torch.Tensor, num_logits: int = 0
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One target forward over a tree; returns logits `(B, N, V)` and the states that the draft reads.

        Logits are those of the last `num_logits` nodes where the target can leave out the others; 0: of all.
        """
        inputs = dict(self.forward_kwargs)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = num_logits
        if self.takes_position_ids:
            along = position_ids if self.axes is None else self.axes.along(position_ids)
            inputs["position_ids"] = on_device(along, self.device)
        for name, value in self.token_inputs.items():
            inputs[name] = on_device(value, self.device).expand(-1, tree.num_nodes, *value.shape[2:])
        with experts_of_step(self.target, tree.num_nodes):
            outputs = self.model_forward(
                input_ids=on_device(tree.token_ids, self.device),
                attention_mask=mask,
                **cache_argument(self.target, self.cache),
                use_cache=True,
                output_hidden_states=self.asked_states,
                return_dict=True,
                **inputs,
            )
        return outputs.logits, self._states(outputs)

    def _states(self, outputs) -> list[torch.Tensor]:
        """The states that the draft reads, `(B, T, target_hidden_size)` of each of L layers."""
        if outputs.hidden_states is None:
            raise Declined(f"the draft reads hidden states {self.layer_ids}, of which {type(self.target).__name__} returns none")
        num_states = len(outputs.hidden_states)
        if num_states not in self.places_of_states:
            places = [place_of_state(layer, self.target.config, num_states) for layer in self.layer_ids]
            if max(places) >= num_states:
                raise Declined(
                    f"the draft reads hidden states {self.layer_ids}, of which {type(self.target).__name__} returns only the "
                    f"first {num_states}"
                )
            self.places_of_states[num_states] = places
        places = self.places_of_states[num_states]
        return [one_stream(outputs.hidden_states[place], self.target.config) for place in places]


def num_learned_positions(target) -> int | None:
    """How many positions a target's table of learned positions has; None where any position can be computed."""
    text_config = target.config.get_text_config()
    num_positions = getattr(text_config, "max_position_embeddings", None)
    if getattr(text_config, "rope_parameters", None) is not None or num_positions is None:
        return None
    # Sinusoidal tables grow with the text: they have a method for it.
    if any(hasattr(module, "make_weights") for module in target.modules()):
        return None
    tables = (one for name, one in chain(target.named_parameters(), target.named_buffers()) if _OF_POSITIONS.search(name))
    return num_positions if any(one.dim() == 2 and len(one) >= num_positions for one in tables) else None
