"""The cost model against counts done by hand and the published ratios."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quota.allocate.compute import DecoderSizes, cost, decoder_sizes, kv_token_bytes, layer_macs
from quota.allocate.solve import uniform
from quota.arch.llava import vision_macs
from quota.core.recipe import kept_tokens

SMALL = DecoderSizes(layers=2, hidden_size=8, kv_size=4, intermediate_size=16)


def test_layer_macs_counts_the_products() -> None:
    n, d, kv, m = 3, 8, 4, 16
    q = o = n * d * d
    k = v = n * d * kv
    scores = values = n * n * d
    assert layer_macs(n, SMALL) == q + o + k + v + scores + values + 3 * n * d * m


def test_unpruned_ratio_is_one() -> None:
    c = cost([10, 10], 10, 5, SMALL, tower_macs=1000, head_dim=4)
    assert c.ratio == c.ratio_language == c.ratio_visual == 1.0
    assert c.kv_bytes == c.kv_bytes_unpruned


def test_text_and_tower_dilute_the_saving() -> None:
    c = cost([10, 3], 10, 5, SMALL, tower_macs=5000, head_dim=4)
    assert c.ratio_visual < c.ratio_language < c.ratio < 1
    assert c.average_visual_tokens == 6.5
    assert c.final_visual_tokens == 3


def test_kv_bytes() -> None:
    assert kv_token_bytes(192, 64) == 2 * (96 + 3 * 8)
    assert kv_token_bytes(192, 64, bits=16) == 2 * 192 * 2
    assert cost([10, 3], 10, 5, SMALL, head_dim=4).kv_bytes == (15 + 8) * kv_token_bytes(4, 4)


@pytest.mark.parametrize(("layers", "first", "last", "published"), [(32, 2, 8, 0.4089), (28, 8, 12, 0.5580)])
def test_published_average_is_near_the_uniform_table(layers: int, first: int, last: int, published: float) -> None:
    """Published compute ratios at 30 %: they depend on the sensitivities, the uniform table on the same layers is close."""
    table = dict(zip(range(first, last + 1), uniform(last - first + 1, 0.3), strict=True))
    alive, tokens = 1.0, []
    for layer in range(layers):
        alive = table.get(layer, alive)
        tokens.append(kept_tokens(round(alive, 9), 576))
    assert sum(tokens) / layers / 576 == pytest.approx(published, abs=0.01)


def test_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"one entry per decoder layer \(2\), got 3"):
        cost([1, 1, 1], 1, 0, SMALL)


def test_sizes_from_a_config() -> None:
    text = SimpleNamespace(num_hidden_layers=8, hidden_size=192, num_key_value_heads=3, num_attention_heads=3, head_dim=64, intermediate_size=512)
    vision = SimpleNamespace(image_size=28, patch_size=14, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_channels=3)
    config = SimpleNamespace(text_config=text, vision_config=vision, vision_feature_layer=-2)
    assert decoder_sizes(config) == DecoderSizes(8, 192, 192, 512)
    n, h, m = 5, 8, 16
    block = 4 * n * h * h + 2 * n * n * h + 2 * n * h * m
    assert vision_macs(config) == 4 * 3 * 196 * h + 2 * block + 4 * (h * 192 + 192 * 192)
