"""A quantized Qwen2.5-VL: key biases, tower, cache; what every family promises: test_quantized_family.py."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from quota.models.rtn import quantize_rtn
from quota.nn.attention import QuantAttention
from quota.nn.cache import kv_bytes
from quota.nn.key_bias import BiasedKv4Layer, QuantBiasedAttention, bias_coefficients
from quota.ops.qkv_append import apply_rotary
from tests.tiny import qwen_inputs, tiny_qwen

ALL = ("vision", "projector", "llm")
MIXED = ((3, ((8, 8),), 5), (9, ((4, 6),), 4), (6, (), 2), (1, ((4, 4), (8, 6)), 3))


@pytest.fixture(scope="module")
def model():
    return quantize_rtn(tiny_qwen(key_bias=800))


def test_bias_coefficients_are_the_rotated_dot_product():
    generator = torch.Generator().manual_seed(0)
    q, bias, angles = (
        torch.randn(1, 4, 3, 16, generator=generator),
        900 * torch.randn(2, 16, generator=generator),
        torch.rand(1, 7, 8, generator=generator) * 6,
    )
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    turned = apply_rotary(bias.repeat_interleave(2, 0)[None, :, None].expand(-1, -1, 7, -1), cos, sin)
    wanted = q @ turned.transpose(-1, -2)
    got = bias_coefficients(q, bias) @ torch.cat([cos[..., :8], sin[..., :8]], -1)[:, None].transpose(-1, -2)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-2)


def log_probabilities(model, inputs):
    return (model(**inputs).logits.double() / 8).log_softmax(-1)


def divergence(model, inputs, wanted) -> float:
    """Mean over real positions of KL(float || quantized) of the next-token distribution, at a temperature that suits
    random weights."""
    got, real = log_probabilities(model, inputs), inputs["attention_mask"].bool()
    return float((wanted.exp() * (wanted - got)).sum(-1)[real].mean())


@torch.no_grad()
def test_large_key_biases_cost_nothing():
    """Against the same model with the bias taken down to nothing: an equal KL. The bias inside the cache, as plain
    W4A4KV4 has it, ruins the model."""
    found = {}
    for norm in (1e-3, 600.0, 900.0):
        original = tiny_qwen(key_bias=norm)
        inputs = qwen_inputs(original, rows=MIXED)
        wanted = log_probabilities(original, inputs)
        found[norm] = divergence(quantize_rtn(tiny_qwen(key_bias=norm), ("llm",)), inputs, wanted)
        if norm > 1:
            naive = quantize_rtn(tiny_qwen(key_bias=norm), ("llm",))
            for index, layer in enumerate(naive.model.language_model.layers):
                layer.self_attn = folded(layer.self_attn, index)
            found[-norm] = divergence(naive, inputs, wanted)
    assert found[600.0] < 1.25 * found[1e-3] and found[900.0] < 1.25 * found[1e-3], found
    assert found[-600.0] > 2 * found[600.0] and found[-900.0] > 2 * found[900.0], found


def folded(attention: QuantBiasedAttention, index: int) -> QuantAttention:
    """The same layer with the bias in the keys it caches."""
    sizes = {
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "layer_idx": index,
    }
    plain = QuantAttention(attention.qkv_proj, attention.o_proj, **sizes)
    plain.q_transform, plain.k_transform = attention.q_transform, attention.k_transform
    first = attention.heads * attention.head_dim
    plain.qkv_proj.bias[first : first + attention.k_bias.numel()] = attention.k_bias.flatten()
    return plain


def test_float_attention_in_the_quantized_tower_is_upstreams():
    """Only rounding separates the two towers: without it (wide weights) they would agree, so features stay close."""
    original, inputs = tiny_qwen(), qwen_inputs(tiny_qwen(), rows=MIXED)
    want, got = (
        m.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        for m in (original, quantize_rtn(tiny_qwen()))
    )
    other = tiny_qwen(seed=3).model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    assert got.shape == want.shape
    assert (got - want).norm() < 0.6 * (other - want).norm()


def test_a_picture_alone_and_in_a_batch(model):
    inputs = qwen_inputs(model, rows=MIXED)
    together = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    sizes = inputs["image_grid_thw"].prod(-1).tolist()
    for number, part in enumerate(inputs["pixel_values"].split(sizes)):
        alone = model.model.visual(part, grid_thw=inputs["image_grid_thw"][number : number + 1]).pooler_output
        assert torch.equal(alone, together.split([n // 4 for n in sizes])[number]), number


def test_one_table_of_angles_and_the_bytes_of_a_cache(model):
    inputs = qwen_inputs(model)
    cache = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    assert all(isinstance(layer, BiasedKv4Layer) for layer in cache.layers)
    assert len({id(layer.angles) for layer in cache.layers}) == 1  # one table for all layers
    assert kv_bytes(cache)[0] - kv_bytes(cache)[1] == 2 * inputs["input_ids"].shape[1] * 16 * 4


def test_key_biases_stay_float32(model):
    assert (
        copy.deepcopy(model).to(torch.bfloat16).model.language_model.layers[0].self_attn.k_bias.dtype == torch.float32
    )
