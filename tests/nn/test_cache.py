from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from quota.core.errors import UsageError
from quota.nn.cache import Kv4Layer, Kv16Layer, KvCache, PrunedLayer, kv_bytes, kv_layer, pruned_layer
from tests.tiny import tiny_llava


def states(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, tokens, 8, generator=generator), torch.randn(batch, 3, tokens, 8, generator=generator)


def test_growing_by_pieces_equals_one_append():
    key, value = states(150)
    whole, pieces = Kv4Layer(), Kv4Layer()
    whole.append(key, value, 0.9, 0.8)
    for first, last in ((0, 1), (1, 64), (64, 65), (65, 66), (66, 150)):
        pieces.append(key[:, :, first:last], value[:, :, first:last], 0.9, 0.8)
    assert whole.get_seq_length() == pieces.get_seq_length() == 150
    assert torch.equal(whole.dequantize_keys(), pieces.dequantize_keys())
    assert torch.equal(whole.dequantize_values(), pieces.dequantize_values())
    assert whole.nbytes == pieces.nbytes == 2 * (2 * 3 * 150 * (4 + 4 + 4))


def test_halves_are_rounded_and_bounded():
    key, value = states(5)
    key[0, 0, 0, 0] = -1e6
    layer = Kv16Layer()
    layer.append(key[:, :, :2], value[:, :, :2])
    layer.append(key[:, :, 2:], value[:, :, 2:])
    assert torch.equal(layer.dequantize_values(), value.half().float()) and layer.nbytes == 2 * (2 * 3 * 5 * 8 * 2)
    assert layer.dequantize_keys()[0, 0, 0, 0] == -65504
    layer.crop(-4)
    assert torch.equal(layer.dequantize_keys()[..., 1:], key[:, :, :1, 1:].half().float())


def test_values_are_within_half_a_step():
    key, value = states(20)
    layer = Kv4Layer()
    got_key, got_value = layer.update(key, value)
    for got, want in ((got_key, key), (got_value, value)):
        step = (want.amax(-1) - want.amin(-1)) / 15
        assert bool(((got - want).abs() <= step[..., None] * 0.5001).all())


def test_crop_reorder_select_repeat_and_reset():
    key, value = states(10)
    layer = Kv4Layer()
    layer.append(key, value)
    layer.start, layer.dropped = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([5, 2])
    before = layer.dequantize_keys()
    layer.reorder_cache(torch.tensor([1, 0]))
    assert (
        torch.equal(layer.dequantize_keys(), before[[1, 0]])
        and layer.start.tolist() == [3, 0]
        and layer.dropped.tolist() == [2, 5]
    )
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.dequantize_keys(), before[[1, 1, 0, 0]]) and layer.start.tolist() == [3, 3, 0, 0]
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.dequantize_keys(), before[[1, 0]])
    layer.crop(-4)
    assert torch.equal(layer.dequantize_keys(), before[[1, 0], :, :6]) and layer.get_mask_sizes(2) == (8, 0)
    with pytest.raises(ValueError, match="<= 0"):
        layer.crop(3)
    layer.append(*states(3, seed=4))  # writes over the cropped slots
    assert layer.length == 9
    layer.reset()
    assert layer.length == 0 and layer.start is None and layer.nbytes == 0


def test_taking_over_the_cache_that_generate_makes():
    cache = DynamicCache()
    layer = kv_layer(cache, 2)
    assert isinstance(layer, Kv4Layer) and kv_layer(cache, 2) is layer and isinstance(cache, KvCache)
    layer.append(*states(4))
    assert cache.nbytes == sum(kv_bytes(cache)) == layer.nbytes and cache.get_seq_length(2) == 4


def test_foreign_caches_are_refused():
    config = tiny_llava().config.get_text_config()
    filled = DynamicCache(config=config)
    filled.update(*states(4), 0)
    with pytest.raises(UsageError, match="already holds 4 tokens"):
        kv_layer(filled, 0)
    with pytest.raises(UsageError, match="growing cache"):
        kv_layer(StaticCache(config=config, max_cache_len=8), 0)
    layer = Kv4Layer()
    layer.append(*states(4))
    with pytest.raises(UsageError, match="batch of 2"):
        layer.append(*states(1, batch=3))


def test_float_layer_remembers_its_rows():
    cache = DynamicCache(config=tiny_llava().config.get_text_config())
    layer = pruned_layer(cache, 1)
    assert isinstance(layer, PrunedLayer)
    layer.update(*states(4))
    layer.start, layer.dropped = torch.tensor([0, 1]), torch.tensor([7, 8])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert layer.start.tolist() == [1, 1] and layer.dropped.tolist() == [8, 8]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert layer.start.tolist() == [1] and layer.keys.shape[0] == 1
    cache.reset()
    assert layer.start is None and layer.get_seq_length() == 0
