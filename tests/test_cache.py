"""Caches: rows that move, buffers that grow, layers that are lent and put back."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from transformers_prism.decoding import cache as cache_module
from transformers_prism.decoding.cache import (
    AdoptedLayers,
    CacheSnapshot,
    CommittedCache,
    TreeLayer,
    is_adoptable,
    new_tree_cache,
)

pytestmark = pytest.mark.quick


def numbered(num_rows: int, start: int, count: int) -> torch.Tensor:
    """States `(B, 2, count, 4)` whose value at row r, position t is 100 * r + start + t."""
    states = 100.0 * torch.arange(num_rows)[:, None] + torch.arange(start, start + count)
    return states[:, None, :, None].expand(-1, 2, -1, 4).contiguous()


def append(cache, num_rows: int, start: int, count: int) -> None:
    """Append to two layers; values are the negated keys."""
    for layer in range(2):
        cache.update(numbered(num_rows, start, count), -numbered(num_rows, start, count), layer)


def test_rows_keep_their_own_accepted_keys():
    """Three rows accept different nodes for many rounds; each is dense, in order, and equal to a list kept by hand."""
    generator = torch.Generator().manual_seed(0)
    cache = new_tree_cache()
    append(cache, 3, 0, 5)
    committed = CommittedCache(cache, torch.ones(3, 5, dtype=torch.bool))
    expected = [[100 * row + t for t in range(5)] for row in range(3)]
    for round_index in range(30):
        start = 1000 * (round_index + 1)
        append(cache, 3, start, 7)
        accepted = []
        for row in range(3):
            count = int(torch.randint(0, 8, (), generator=generator))
            offsets = sorted(torch.randperm(7, generator=generator)[:count].tolist())
            accepted.append(offsets)
            expected[row] += [100 * row + start + offset for offset in offsets]
        committed.commit(accepted)
        assert committed.lengths == [len(row) for row in expected]
        assert committed.width == max(committed.lengths) == cache.get_seq_length()
        for row in range(3):
            assert committed.committed[row].tolist() == [t < len(expected[row]) for t in range(committed.width)]
            for layer in cache.layers:
                assert layer.keys[row, 1, : len(expected[row]), 3].tolist() == expected[row]
                assert (layer.values == -layer.keys).all()


def test_masks_are_made_once_and_sliced():
    """Rows that stay alike copy no mask; once they were not, the next mask is made anew."""
    cache = new_tree_cache()
    append(cache, 2, 0, 5)
    committed = CommittedCache(cache, torch.tensor([[False] + [True] * 4, [True] * 5]))
    masks = []
    for start in range(5, 400):
        append(cache, 2, start, 3)
        committed.commit([[0], [0]])
        masks.append(committed.committed.untyped_storage().data_ptr())
        assert committed.width == start + 1
    assert len(set(masks)) == 2
    assert committed.committed.int().sum(dim=1).tolist() == [399, 400]
    append(cache, 2, 400, 3)
    committed.commit([[0, 1], [0]])
    append(cache, 2, 402, 3)
    committed.commit([[0, 1], [0, 1, 2]])
    assert committed.committed.int().sum(dim=1).tolist() == [403, 404]
    assert committed.lengths == [404, 404]


@pytest.fixture
def moves(monkeypatch) -> list[torch.Tensor]:
    """Where keys and values were moved to, by each call that moved any."""
    seen: list = []
    compact_cache = cache_module.compact_cache

    def noted(buffers, source, destination):
        seen.append(destination)
        compact_cache(buffers, source, destination)

    monkeypatch.setattr(cache_module, "compact_cache", noted)
    return seen


@pytest.mark.parametrize("max_holes", [1, 4, 1000])
def test_rows_with_holes_keep_their_own_accepted_keys(max_holes):
    """As lists kept by hand, behind left padding, while rows lag behind and leave; there are never too many holes."""
    generator = torch.Generator().manual_seed(0)
    cache = new_tree_cache()
    append(cache, 4, 0, 5)
    padding = torch.tensor([[0, 0, 1, 1, 1]] + [[1] * 5] * 3, dtype=torch.bool)
    committed = CommittedCache(cache, padding, max_holes)
    expected = {row: [100 * row + t for t in range(5)] for row in range(4)}
    rows = [0, 1, 2, 3]
    for start in range(1000, 31000, 1000):
        states = numbered(4, start, 6)[rows]
        for layer in range(2):
            cache.update(states, -states, layer)
        accepted = []
        for row in rows:
            count = int(torch.randint(0, 3 + row, (), generator=generator))
            accepted.append(sorted(torch.randperm(6, generator=generator)[:count].tolist()))
            expected[row] += [100 * row + start + offset for offset in accepted[-1]]
        committed.commit(accepted)
        if start == 20000:
            committed.keep_sequences([0, 3, 2])
            rows = [0, 3, 2]
        assert committed.lengths == [len(expected[row]) for row in rows]
        assert committed.width - max(committed.lengths) <= max_holes
        assert committed.width == cache.get_seq_length()
        check_rows(committed, [expected[row] for row in rows])
    committed.close_holes()
    assert committed.width == max(committed.lengths) == cache.get_seq_length()
    for place, row in enumerate(rows):
        assert cache.layers[1].keys[place, 0, : len(expected[row]), 2].tolist() == expected[row]
    check_rows(committed, [expected[row] for row in rows])


def check_rows(committed, expected: list[list[int]]) -> None:
    """What is committed in each row, and the index of each key; the first row begins with two positions of padding."""
    for row, keys in enumerate(expected):
        is_key = committed.committed[row].clone()
        if not is_key[0]:
            is_key[:2] = True
        assert committed.places()[row][is_key].tolist() == list(range(len(keys)))
        for layer in committed.cache.layers:
            assert layer.keys[row, 1][is_key][:, 3].tolist() == keys
            assert (layer.values == -layer.keys).all()


def test_rows_with_holes_move_only_what_was_not_accepted_in_order(moves):
    """Plain steps of uneven rows move nothing, and neither do rows that accepted the first nodes."""
    cache = new_tree_cache()
    append(cache, 3, 0, 5)
    committed = CommittedCache(cache, torch.ones(3, 5, dtype=torch.bool), 8)
    for accepted in ([[0, 1, 2], [0], [0, 1]], [[0], [0], [0]], [[0], [], [0, 1]]):
        append(cache, 3, 10, 3)
        committed.commit(accepted)
    assert not moves
    append(cache, 3, 20, 4)
    committed.commit([[0, 1], [0, 2], [0]])
    # Of three rows one has something to move: its second key.
    assert [destination.tolist() for destination in moves] == [[[-1], [committed.width - 1], [-1]]]


@pytest.mark.parametrize("max_holes", [1, 4, 1000])
def test_a_single_row_moves_nothing_until_there_are_too_many_holes(max_holes, moves):
    """As a list kept by hand, behind left padding; whatever was accepted stays where it is."""
    generator = torch.Generator().manual_seed(0)
    cache = new_tree_cache()
    append(cache, 1, 0, 5)
    committed = CommittedCache(cache, torch.tensor([[False, False, True, True, True]]), max_holes)
    expected, num_holes, num_closed = list(range(5)), 0, 0
    for start in range(1000, 41000, 1000):
        append(cache, 1, start, 6)
        count = int(torch.randint(0, 5, (), generator=generator))
        offsets = sorted(torch.randperm(6, generator=generator)[:count].tolist())
        expected += [start + offset for offset in offsets]
        committed.commit([offsets])
        num_holes += offsets[-1] + 1 - count if offsets else 0
        if num_holes > max_holes:
            num_holes, num_closed = 0, num_closed + 1
        assert (committed.width - committed.lengths[0], len(moves)) == (num_holes, num_closed)
        assert committed.width == cache.get_seq_length()
        check_rows(committed, [expected])
    assert num_closed == 0 if max_holes == 1000 else num_closed > 5
    committed.close_holes()
    assert committed.width == committed.lengths[0] == len(expected)
    check_rows(committed, [expected])


def test_rows_that_leave_are_replaced_by_the_last_in_place():
    """The others stay where they are; nothing is allocated."""
    cache = new_tree_cache()
    append(cache, 4, 0, 3)
    committed = CommittedCache(cache, torch.ones(4, 3, dtype=torch.bool), 8)
    addresses = [layer.key_buffer.data_ptr() for layer in cache.layers]
    committed.keep_sequences([0, 3, 2])
    assert [layer.key_buffer.data_ptr() for layer in cache.layers] == addresses
    assert cache.layers[0].keys[:, 0, :, 0].tolist() == [[0, 1, 2], [300, 301, 302], [200, 201, 202]]
    assert cache.layers[1].values[:, 1, 2, 3].tolist() == [-2, -302, -202]
    append(cache, 3, 3, 200)
    assert cache.layers[0].keys.shape == (3, 2, 203, 4)
    assert cache.layers[0].keys[1, 0, :3, 0].tolist() == [300, 301, 302]


def test_dropping_rows_keeps_the_others():
    """And the width shrinks to the longest that is left."""
    cache = new_tree_cache()
    append(cache, 3, 0, 2)
    committed = CommittedCache(cache, torch.ones(3, 2, dtype=torch.bool))
    append(cache, 3, 10, 4)
    committed.commit([[0, 1, 2, 3], [1], [0, 3]])
    committed.keep_sequences([1, 2])
    assert committed.width == cache.get_seq_length() == 4
    assert cache.layers[0].keys[:, 0, :, 0].tolist()[1] == [200, 201, 210, 213]
    assert cache.layers[0].keys[0, 0, :3, 0].tolist() == [100, 101, 111]
    assert committed.committed.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_buffers_grow_by_half_and_not_every_round():
    """200 rounds of up to four tokens allocate a handful of times."""
    layer = TreeLayer()
    pointers = set()
    for step in range(200):
        layer.update(numbered(1, step, 4), numbered(1, step, 4))
        layer.set_length(layer.length - 2)
        pointers.add(layer.key_buffer.shape[2])
    assert len(pointers) <= 6


def mistral_config():
    """Two layers with a window of 4."""
    return MistralConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2, sliding_window=4
    )


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_sliding", "lazy", "static", "static_sliding"])
@pytest.mark.parametrize("length_before", [0, 3, 9])
def test_lent_layers_leave_what_the_stock_layers_would_hold(kind, length_before):
    """Keys that a window has dropped are gone, lengths are right, and the cache works on."""
    config = mistral_config()
    full = MistralConfig(**{**config.to_dict(), "sliding_window": None})

    def fresh():
        if kind == "lazy":
            return DynamicCache()
        if kind.startswith("dynamic"):
            return DynamicCache(config=config if "sliding" in kind else full)
        return StaticCache(config=config if "sliding" in kind else full, max_cache_len=32)

    stock, ours = fresh(), fresh()
    for cache in (stock, ours):
        if length_before:
            append(cache, 2, 0, length_before)
    adopted = AdoptedLayers(ours).lend()
    for start in range(length_before, length_before + 6):
        append(stock, 2, start, 1)
    append(ours, 2, length_before, 6)
    adopted.put_back()
    for cache in (stock, ours):
        append(cache, 2, length_before + 6, 1)
    for a, b in zip(stock.layers, ours.layers, strict=True):
        assert type(a) is type(b)
        assert int(a.get_seq_length()) == int(b.get_seq_length()) == length_before + 7
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_a_failed_loop_leaves_the_cache_untouched():
    """The stored tensors are copied when they are lent, never written to."""
    cache = DynamicCache(config=mistral_config())
    append(cache, 2, 0, 6)
    layers, keys = list(cache.layers), cache.layers[0].keys.clone()
    snapshot = CacheSnapshot(cache)
    AdoptedLayers(cache).lend()
    append(cache, 2, 50, 3)
    snapshot.restore()
    assert cache.layers == layers
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("is_lazy", [False, True])
def test_layers_that_hold_an_image_are_not_lent(is_lazy):
    """They keep what they hold, however much is committed elsewhere."""
    config = mistral_config()
    config.sliding_window = None
    cache = DynamicCache() if is_lazy else DynamicCache(config=config)
    adopted = AdoptedLayers(cache, image_layers=[1]).lend()
    states = torch.randn(1, 2, 9, 4)
    for layer, length in ((0, 5), (1, 9)):
        cache.update(states[:, :, :length], states[:, :, :length], layer)
    committed = CommittedCache(cache, torch.ones(1, 5, dtype=torch.bool))
    cache.update(states[:, :, :3], states[:, :, :3], 0)
    committed.commit([[0, 2]])
    adopted.put_back()
    assert [int(layer.get_seq_length()) for layer in cache.layers[:2]] == [7, 9]
    assert torch.equal(cache.layers[1].keys, states)
    assert not any(isinstance(layer, TreeLayer) for layer in cache.layers)


def test_only_known_layers_are_lent():
    """A layer class that is not known might keep more than keys and values."""

    class Strange(DynamicLayer):
        pass

    cache = DynamicCache()
    assert is_adoptable(cache)
    cache.layers.append(Strange())
    assert not is_adoptable(cache)


def test_the_dense_part_of_a_single_row_grows_with_the_text(moves):
    """While there are no holes, and by closing one that lies far back: attention looks at what is behind it several times."""
    for max_holes in (0, 32):
        cache = new_tree_cache()
        append(cache, 1, 0, 5)
        committed = CommittedCache(cache, torch.ones(1, 5, dtype=torch.bool), max_holes)
        for _ in range(4):
            append(cache, 1, 10, 3)
            committed.commit([[0, 1]])
            assert committed.num_dense == committed.width == committed.lengths[0]
    append(cache, 1, 20, 3)
    committed.commit([[0, 2]])
    assert committed.num_dense == committed.width - 3
    while not moves:
        append(cache, 1, 30, 40)
        committed.commit([list(range(40))])
        assert committed.width - committed.num_dense <= 512 + 40
    assert committed.num_dense == committed.width == committed.lengths[0] > 512
