"""Key and value caches that can be committed to a path: append the keys of a tree, keep some of them, in each sequence.

Layout: new keys are appended after the longest sequence of the batch. Committing keeps those that were accepted, in one
of two ways. A dense cache moves them to the end of their own sequence. A cache that may have holes moves them to the end of
the longest one, where most of them already are, and for a single sequence it moves nothing. Keys that were not accepted
leave holes, which the masks exclude. Once there are too many holes, all are closed together.

There are two kinds of layers with the same few methods: `TreeLayer` grows, `StaticTreeLayer` keeps its shapes, so that a
compiled forward is never compiled anew.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from ..kernels.compact_cache import compact_cache
from .transfer import on_device

_ADOPTABLE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
# Positions behind the first hole of a single sequence at which its holes are closed.
_MOST_BEHIND_A_HOLE = 512
# Spare positions at the end of a mask.
_MASK_ROOM = 256
_NO_STATES = torch.empty((0, 0, 0, 0), device="cpu")


class TreeLayer(DynamicLayer):
    """A cache layer that writes in place into a buffer which grows by half, and whose keys can be moved.

    It keeps every position and leaves sliding windows to the mask, since sequences that lag behind in a batch still need
    keys that are no longer in the window of the longest one.
    """

    def __init__(self, **kwargs):
        super().__init__()
        self.length = 0
        self.key_buffer = self.value_buffer = _NO_STATES

    @property
    def keys(self) -> torch.Tensor | None:
        """A view of all stored keys; None before the first update."""
        return self.key_buffer[:, :, : self.length] if self.is_initialized else None

    @keys.setter
    def keys(self, states) -> None:
        """Replace them by others `(B, G, T, E)`, as hooks do that compress a cache; any other value is ignored."""
        self._replace("key_buffer", states)

    @property
    def values(self) -> torch.Tensor | None:
        """A view of all stored values; None before the first update."""
        return self.value_buffer[:, :, : self.length] if self.is_initialized else None

    @values.setter
    def values(self, states) -> None:
        """As for `keys`."""
        self._replace("value_buffer", states)

    def _replace(self, name: str, states) -> None:
        if isinstance(states, torch.Tensor) and states.dim() == 4:
            setattr(self, name, states)
            self.length = states.shape[2]

    def lazy_initialization(self, key_states, value_states) -> None:
        """Take dtype and device from the first keys and values."""
        super().lazy_initialization(key_states, value_states)
        self.length = 0
        self.key_buffer = self.value_buffer = _NO_STATES

    def reserve(self, key_states, value_states, length: int) -> None:
        """Make room for `length` positions; what is stored is copied only when the buffer grows."""
        capacity = self.key_buffer.shape[2]
        if length <= capacity:
            return
        capacity = max(length + 64, capacity + capacity // 2)
        for name, states in (("key_buffer", key_states), ("value_buffer", value_states)):
            stored = getattr(self, name)
            dtype = stored.dtype if self.length else states.dtype
            buffer = states.new_empty((states.shape[0], states.shape[1], capacity, states.shape[3]), dtype=dtype)
            if self.length:
                buffer[:, :, : self.length] = stored[:, :, : self.length]
            setattr(self, name, buffer)

    def update(self, key_states, value_states, *args, **kwargs):
        """Append keys and values of shape `(B, G, N, E)`; returns views of all that is stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.key_buffer.dtype is not key_states.dtype and self.length:
            # As torch.cat does, for a cache that was filled in another dtype.
            dtype = torch.promote_types(self.key_buffer.dtype, key_states.dtype)
            self.key_buffer, self.value_buffer = self.key_buffer.to(dtype), self.value_buffer.to(dtype)
        end = self.length + key_states.shape[2]
        self.reserve(key_states, value_states, end)
        self.key_buffer[:, :, self.length : end] = key_states
        self.value_buffer[:, :, self.length : end] = value_states
        self.set_length(end)
        return self.keys, self.values

    def set_length(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.length = length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` positions."""
        if self.is_initialized:
            self.set_length(self.length - abs(tokens_to_remove))

    def get_seq_length(self) -> int:
        """Positions stored, holes included."""
        return self.length

    def keep_sequences(self, places: list[int]) -> None:
        """Keep the sequences at these places, in place. Each stays where it is or moves to a smaller index."""
        for to, place in enumerate(places):
            if to != place:
                self.key_buffer[to, :, : self.length] = self.key_buffer[place, :, : self.length]
                self.value_buffer[to, :, : self.length] = self.value_buffer[place, :, : self.length]
        self.key_buffer, self.value_buffer = self.key_buffer[: len(places)], self.value_buffer[: len(places)]


class StaticTreeLayer(StaticLayer):
    """A static layer that keeps some of the keys appended and forgets the rest: its tensors stay where they are, and
    every update returns all `max_cache_len` positions.

    It adds no state of its own, so that it can share the tensors of a user's static layer (`_sharing`).
    """

    @property
    def key_buffer(self) -> torch.Tensor:
        """All positions, written or not, `(B, G, C, E)`."""
        return self.keys

    @property
    def value_buffer(self) -> torch.Tensor:
        """All positions, written or not, `(B, G, C, E)`."""
        return self.values

    def set_length(self, length: int) -> None:
        """Keep the first `length` positions."""
        self.cumulative_length.fill_(length)


class CommittedCache:
    """A cache of `TreeLayer`s or `StaticTreeLayer`s, and which of its positions are committed in each sequence.

    Args:
        cache (`Cache`): holds such layers.
        committed (`torch.BoolTensor` of shape `(B, P)`): True where a key takes part in attention.
        max_holes (`int`): positions by which P may exceed the longest sequence before holes are closed; 0: every
            sequence is dense at all times.
    """

    def __init__(self, cache: Cache, committed: torch.Tensor, max_holes: int = 0):
        self.cache = cache
        self.committed = committed
        self.max_holes = max_holes
        self.lengths = [committed.shape[1]] * committed.shape[0]  # left padding included, without holes
        # First key of each sequence after left padding. Only used on a CPU; on other devices reading it would wait.
        self.starts = committed.int().argmax(dim=1).tolist() if committed.numel() and committed.device.type == "cpu" else []
        self.num_dense = committed.shape[1]  # positions before which no sequence has a hole
        # A longer mask, True at its further positions, and the part of it that is `committed`; once one was made.
        self.longer = self.part_of_longer = committed

    @property
    def width(self) -> int:
        """P: positions in use, holes included."""
        return self.committed.shape[1]

    def commit(self, accepted: list[list[int]]) -> None:
        """Keep some of the keys appended since the last commit and forget the others.

        Args:
            accepted: for each sequence the offsets, rising, among the appended keys.
        """
        if self.max_holes and len(accepted) == 1:
            self._commit_in_place(accepted[0])
            return
        width = self.width
        ends = [width] * len(accepted) if self.max_holes else self.lengths
        new_ends = [end + len(offsets) for end, offsets in zip(ends, accepted, strict=True)]
        moves = [
            [(width + offset, end + i) for i, offset in enumerate(offsets) if width + offset != end + i]
            for end, offsets in zip(ends, accepted, strict=True)
        ]
        num_moves = max(map(len, moves))
        if num_moves:
            # -1 moves nothing.
            rows = [one + [(-1, -1)] * (num_moves - len(one)) for one in moves]
            table = torch.tensor(rows, device="cpu")  # [B, A, 2]
            self._move(table)
        self.set_length(max(new_ends))
        self._grow_mask(ends, new_ends)
        self.lengths = [length + len(offsets) for length, offsets in zip(self.lengths, accepted, strict=True)]
        self._close_too_many_holes()

    def _commit_in_place(self, offsets: list[int]) -> None:
        """[`commit`] of a single sequence: accepted keys stay where they are, and the others before the last become holes."""
        width, num_new = self.width, offsets[-1] + 1 if offsets else 0
        self.set_length(width + num_new)
        if num_new == len(offsets):
            self._grow_mask([width], [width + num_new])
        else:
            is_kept = on_device([[offset in offsets for offset in range(num_new)]], self.committed.device)
            self.committed = torch.cat((self.committed, is_kept), dim=1)
        self.lengths = [self.lengths[0] + len(offsets)]
        self._close_too_many_holes()

    def _layers(self) -> list:
        # Other layers do not hold the text.
        return [layer for layer in self.cache.layers if layer.is_initialized and hasattr(layer, "key_buffer")]

    def set_length(self, length: int) -> None:
        """Keep the first `length` positions of all layers; `committed` is not changed."""
        for layer in self._layers():
            layer.set_length(length)

    def _move(self, table: torch.Tensor) -> None:
        """Move keys and values of all layers, from and to positions `(B, A, 2)`; -1 moves nothing."""
        buffers: dict = {}
        for layer in self._layers():
            buffers.setdefault(layer.key_buffer.device, []).extend((layer.key_buffer, layer.value_buffer))
        for device, of_device in buffers.items():
            source, destination = on_device(table, device).unbind(-1)  # [B, A] each
            compact_cache(of_device, source, destination)

    def _grow_mask(self, ends: list[int], new_ends: list[int]) -> None:
        width = max(new_ends)
        if len(set(ends)) == len(set(new_ends)) == 1:
            if self.committed is not self.part_of_longer or width > self.longer.shape[1]:
                self.longer = torch.nn.functional.pad(self.committed, (0, width - self.width + _MASK_ROOM), value=True)
            self.committed = self.part_of_longer = self.longer[:, :width]
        else:
            index = torch.arange(width, device=self.committed.device)
            limits = on_device([ends, new_ends], self.committed.device)[..., None]  # [2, B, 1]
            is_new = (index >= limits[0]) & (index < limits[1])
            padding = self.committed.new_zeros((len(new_ends), width - self.width))
            self.committed = torch.cat((self.committed, padding), dim=1) | is_new

    def forget_all(self) -> None:
        """Drop all keys, so that the text can be read again; which positions are committed stays known."""
        self.close_holes()
        self.set_length(0)

    def places(self) -> torch.Tensor:
        """The index of each key in its sequence, holes not counted, `(B, P)`."""
        index = torch.arange(self.width, device=self.committed.device).expand(len(self.lengths), -1)
        if min(self.lengths) == self.width:
            return index
        behind = self.committed[:, self.num_dense :].cumsum(dim=1) + (self.num_dense - 1)
        return torch.cat((index[:, : self.num_dense], behind), dim=1)

    def _close_too_many_holes(self) -> None:
        if min(self.lengths) == self.width:
            self.num_dense = self.width
            return
        # Attention looks at each key behind the first hole several times.
        is_far_back = len(self.lengths) == 1 and self.width - self.num_dense > _MOST_BEHIND_A_HOLE
        if is_far_back or self.width - max(self.lengths) > self.max_holes:
            self.close_holes()

    def close_holes(self) -> None:
        """Make every sequence dense, and P the length of the longest."""
        if min(self.lengths) == self.width:
            return
        start, end = self.num_dense, max(self.lengths)
        device = self.committed.device
        index = torch.arange(end - start, device=device)
        is_key = index < (on_device(self.lengths, device) - start)[:, None]
        if self.max_holes and end > start:
            # False sorts before True: the keys of each sequence in order, then its holes.
            order = (~self.committed[:, start:]).sort(dim=1, stable=True).indices[:, : end - start]
            table = torch.stack((order, index.expand_as(order)), dim=-1) + start
            self._move(torch.where(is_key[..., None], table, -1))
        self.set_length(end)
        self.committed = torch.cat((self.committed[:, :start], is_key), dim=1)
        self.num_dense = min(self.lengths)

    def forget_appended(self) -> None:
        """Drop all keys appended since the last commit."""
        self.set_length(self.width)

    def keep_sequences(self, places: list[int]) -> None:
        """Keep the sequences at these places, in place. Each stays where it is or moves to a smaller index."""
        self.lengths = [self.lengths[place] for place in places]
        self.starts = [self.starts[place] for place in places] if self.starts else []
        self.committed = self.committed[on_device(places, self.committed.device)]
        for layer in self._layers():
            layer.keep_sequences(places)
        self._close_too_many_holes()


def stored_length(cache) -> int | None:
    """Positions that a cache holds; None for a cache of recurrent states only, which do not count positions."""
    layers = getattr(cache, "layers", ())
    if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
        return None
    return int(cache.get_seq_length())


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def new_tree_cache() -> DynamicCache:
    """An empty cache whose layers are `TreeLayer`s, made as they are needed."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = TreeLayer
    return cache


def _layers_of_capacity(capacity: int | None) -> Callable[[], DynamicLayer | StaticLayer]:
    """A function that makes empty `StaticTreeLayer`s of `capacity` positions; None: `TreeLayer`s, which grow."""
    return TreeLayer if capacity is None else functools.partial(StaticTreeLayer, capacity)


def relaid(cache: Cache, capacity: int | None) -> DynamicCache:
    """A copy of a cache of our layers, in `StaticTreeLayer`s of `capacity` positions; None: in `TreeLayer`s."""
    copy, new_layer = new_tree_cache(), _layers_of_capacity(capacity)
    copy.layers = [_with_states_of(layer, new_layer()) for layer in cache.layers]
    return copy


def is_adoptable(cache) -> bool:
    """Whether [`AdoptedLayers`] can serve this cache: full and sliding attention, dynamic or static, not offloaded."""
    return (
        type(cache) in (DynamicCache, StaticCache)
        and not cache.offloading
        and all(type(layer) in _ADOPTABLE_LAYERS for layer in cache.layers)
    )


class CacheSnapshot:
    """A cache as it is now, to be restored if a call fails; only states that forwards write to in place are copied.

    Args:
        cache (`Cache`): of any kind.
    """

    def __init__(self, cache):
        self.cache = cache
        self.layers = list(getattr(cache, "layers", ()))
        self.lengths = [int(layer.get_seq_length()) if type(layer) in _ADOPTABLE_LAYERS else 0 for layer in self.layers]
        # Layers of keys and values make new tensors, or write after their length; others are written to in place.
        self.states = [vars(layer).copy() for layer in self.layers]
        self.copies = [self._copy_of(layer) for layer in self.layers]
        self.layer_class = getattr(cache, "layer_class_to_replicate", None)

    @staticmethod
    def _copy_of(layer) -> dict | None:
        """A copy of the states of a layer that forwards may overwrite; None if they overwrite none. Static windows overwrite
        keys and values; other layers of keys and values may overwrite everything else that they hold."""
        rolls = isinstance(layer, StaticSlidingWindowLayer)
        if type(layer) in _ADOPTABLE_LAYERS and not rolls:
            return None
        stays = () if rolls or not isinstance(layer, (DynamicLayer, StaticLayer)) else ("keys", "values")
        return {name: state if name in stays else _copied(state) for name, state in vars(layer).items()}

    def restore(self) -> None:
        """Make the cache what it was."""
        if not hasattr(self.cache, "layers"):
            return
        self.cache.layers = list(self.layers)
        self.cache.layer_class_to_replicate = self.layer_class
        parts = (self.layers, self.states, self.copies, self.lengths)
        for layer, state, copy, length in zip(*parts, strict=True):
            vars(layer).clear()
            vars(layer).update(state if copy is None else _restored(state, copy))
            if type(layer) is StaticLayer:
                layer.cumulative_length.fill_(length)


def _restored(state, copy):
    """The copied states, written to the old tensors where possible, since a compiled forward may refer to these."""
    if isinstance(state, torch.Tensor) and isinstance(copy, torch.Tensor) and state.shape == copy.shape:
        is_expanded = any(not stride and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True))
        return copy if state is copy or is_expanded else state.copy_(copy)
    if isinstance(state, dict):
        return {name: _restored(state.get(name), part) for name, part in copy.items()}
    return copy


def _copied(states):
    """A copy of states in dictionaries and lists, tensors included."""
    if isinstance(states, torch.Tensor):
        return states.detach().clone()
    if isinstance(states, dict):
        return {name: _copied(state) for name, state in states.items()}
    return [_copied(state) for state in states] if type(states) is list else states


class AdoptedLayers:
    """Lends a cache layers whose keys can be moved while the loop runs, and puts its own layers back afterwards.

    Args:
        cache (`Cache`): an adoptable cache. Its stored keys and values are copied once and never changed. Static layers of
            exactly `capacity` positions are not copied: their tensors are used, and written to after what they hold.
        capacity (`int`, *optional*): positions of `StaticTreeLayer`s; without it `TreeLayer`s are lent.
        image_layers (`Collection[int]`): indices of layers that hold an image; these are not replaced.
    """

    def __init__(self, cache: Cache, capacity: int | None = None, image_layers: Collection[int] = ()):
        self.cache, self.capacity, self.image_layers = cache, capacity, image_layers
        self.originals = list(cache.layers)
        self.layer_class = cache.layer_class_to_replicate
        if self.layer_class is not None:
            while len(self.originals) <= max(image_layers, default=-1):
                self.originals.append(self.layer_class())
        self.lent_class = _layers_of_capacity(capacity)

    def lend(self) -> "AdoptedLayers":
        """Give the cache the layers that are lent."""
        # All of them before the cache gets any, so that an error leaves it as it was.
        layers = enumerate(self.originals)
        self.cache.layers = [layer if index in self.image_layers else self._lent(layer) for index, layer in layers]
        if self.layer_class is not None:
            self.cache.layer_class_to_replicate = self.lent_class
        return self

    def _is_shared(self, layer) -> bool:
        """Whether the layer that is lent in place of this one shares its tensors."""
        return type(layer) is StaticLayer and layer.max_cache_len == self.capacity

    def _lent(self, layer):
        return _sharing(layer) if self._is_shared(layer) else _with_states_of(layer, self.lent_class())

    def fill(self, cache: Cache) -> None:
        """Take the states of another cache into the lent layers, which are empty."""
        if self.cache.layer_class_to_replicate is not None:
            while len(self.cache.layers) < len(cache.layers):
                self.cache.layers.append(self.cache.layer_class_to_replicate())
        for lent, layer in zip(self.cache.layers, cache.layers, strict=False):
            _with_states_of(layer, lent)

    @contextlib.contextmanager
    def rolling_windows(self) -> Iterator[None]:
        """For a forward over one token of each sequence, give the cache the sliding windows that plain decoding would have;
        afterwards the lent layers also get the token's keys and values.

        Some models only build masks for such windows, or rely on the cache for the window. All sequences must have one length.
        """
        lent = self.cache.layers
        pairs = [(layer, self._rolled(index, layer)) for index, layer in enumerate(lent)]
        self.cache.layers = [layer if window is None else window for layer, window in pairs]
        try:
            yield
        finally:
            self.cache.layers = lent
        for layer, window in pairs:
            if window is not None:
                layer.update(window.keys[:, :, -1:], window.values[:, :, -1:])

    def _rolled(self, index: int, lent) -> DynamicSlidingWindowLayer | None:
        original = self.originals[index] if index < len(self.originals) else None
        if original is None or type(original) is not DynamicSlidingWindowLayer or not lent.is_initialized:
            return None
        window = DynamicSlidingWindowLayer(sliding_window=original.sliding_window)
        _write_states(window, lent.keys, lent.values)
        return window

    def put_back(self) -> None:
        """Restore the layers and give them what the loop has committed; all sequences must have one length."""
        lent, self.cache.layers = self.cache.layers, self.originals
        self.cache.layer_class_to_replicate = self.layer_class
        while len(self.cache.layers) < len(lent):
            # A model may have added layers in its first forward.
            self.cache.layers.append((self.layer_class or DynamicLayer)())
        for original, layer in zip(self.cache.layers, lent, strict=True):
            if not layer.is_initialized or layer is original:
                continue
            length = int(layer.get_seq_length())
            if self._is_shared(original):
                vars(original).update(vars(layer))  # its tensors may have been made during the loop
                layer.keys[:, :, length:] = 0
                layer.values[:, :, length:] = 0
            else:
                _write_states(original, layer.key_buffer[:, :, :length], layer.value_buffer[:, :, :length])


def _sharing(layer: StaticLayer) -> StaticTreeLayer:
    """A layer that shares the tensors of a static one, so that a compiled forward finds them where they were."""
    lent = StaticTreeLayer.__new__(StaticTreeLayer)
    lent.__dict__.update(vars(layer))
    return lent


def _with_states_of(layer, lent):
    """`lent` with the stored positions of `layer`; those that a window has dropped are zeros, which masks leave out."""
    length = int(layer.get_seq_length())
    if layer.is_initialized and length > 0:
        kept = min(length, layer.keys.shape[2])
        lent.update(*(pad(states[:, :, :kept], (0, 0, length - kept, 0)) for states in (layer.keys, layer.values)))
    return lent


def _write_states(layer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Store `(B, G, T, E)` keys and values in a stock layer the way that layer would have stored them."""
    length = keys.shape[2]
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    if isinstance(layer, StaticLayer):
        kept = min(length, layer.max_cache_len)
        # Positions from before the call are written with the same values, so that an interruption leaves them intact.
        for stored, states in ((layer.keys, keys), (layer.values, values)):
            stored[:, :, :kept] = states[:, :, length - kept :]
            stored[:, :, kept:] = 0
        layer.cumulative_length.fill_(length if type(layer) is StaticLayer else kept)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int = length
        return
    start = 0
    if isinstance(layer, DynamicSlidingWindowLayer):
        # A layer that records past positions keeps those that it had and all new ones.
        stored = layer.keys.shape[2] if layer.keys.dim() == 4 else 0
        start = layer.cumulative_length - stored if layer.record_past else max(0, length - layer.sliding_window + 1)
        layer.cumulative_length = length
    layer.keys = keys[:, :, start:].clone()
    layer.values = values[:, :, start:].clone()
