"""A quantized Qwen2.5-VL without pruning: structure, key biases, tower, cache, batches."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from quota.models import model_fingerprint
from quota.models.quantize import quantize_structure, quantized_linears, quantized_modules
from quota.models.qwen2_5_vl import MultimodalRotary
from quota.models.rtn import quantize_rtn
from quota.nn.attention import QuantAttention
from quota.nn.cache import kv_bytes
from quota.nn.key_bias import BiasedKv4Layer, QuantBiasedAttention, bias_coefficients
from quota.ops.qkv_append import apply_rotary
from tests.prune.recipes import final_states, greedy, single
from tests.tiny import qwen_inputs, tiny_qwen

ALL = ("vision", "projector", "llm")
MIXED = ((3, ((8, 8),), 5), (9, ((4, 6),), 4), (6, (), 2), (1, ((4, 4), (8, 6)), 3))


@pytest.fixture(scope="module")
def model():
    return quantize_rtn(tiny_qwen(key_bias=800))


def test_everything_asked_for_is_replaced():
    for modules in (("llm",), ("vision", "llm"), ALL, ("projector",)):
        model = quantize_rtn(tiny_qwen(), modules)
        assert quantized_modules(model) == tuple(m for m in ALL if m in modules)
        assert torch.isfinite(model(**qwen_inputs(model)).logits).all()
    assert len(quantized_linears(quantize_rtn(tiny_qwen()))) == 4 * 4 + 4 * 3 + 2


@pytest.mark.parametrize("tied", [False, True])
def test_structure_on_meta_matches_the_quantized_model(tied):
    model = quantize_rtn(tiny_qwen(tied=tied))
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config))
    quantize_structure(empty, ALL)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }
    assert model_fingerprint(model) == model_fingerprint(tiny_qwen())


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


def test_rotary_agrees_with_upstream(model):
    upstream = tiny_qwen().model.language_model.rotary_emb
    positions = torch.randint(0, 60, (3, 2, 9), generator=torch.Generator().manual_seed(0))
    for got, want in zip(
        MultimodalRotary(model.config.text_config)(torch.zeros(1), positions),
        upstream(torch.zeros(1), positions),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


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


@torch.no_grad()
def test_prefill_then_decode_equals_one_prefill(model):
    """generate's way of cutting: the cache of a shorter prompt, then token by token with the same positions; equal
    bits."""
    inputs = qwen_inputs(model)
    full = model.model.get_rope_index(
        **{k: inputs[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
    )[0]
    ids, mask, cut = inputs["input_ids"], inputs["attention_mask"], inputs["input_ids"].shape[1] - 3
    pictures = {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    with final_states(model) as states:
        model(ids, attention_mask=mask, position_ids=full, **pictures)
        cache = DynamicCache()
        model(
            ids[:, :cut],
            attention_mask=mask[:, :cut],
            position_ids=full[..., :cut],
            past_key_values=cache,
            use_cache=True,
            **pictures,
        )
        assert all(isinstance(layer, BiasedKv4Layer) for layer in cache.layers)
        assert len({id(layer.angles) for layer in cache.layers}) == 1  # one table for all layers
        for t in range(cut, ids.shape[1]):
            model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=full[..., t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
        assert torch.equal(states[0], states[-1])
        cache.crop(-3)
        model(ids[:, cut:], attention_mask=mask, position_ids=full[..., cut:], past_key_values=cache, use_cache=True)
        assert torch.equal(states[0], states[-1])
    assert kv_bytes(cache)[0] - kv_bytes(cache)[1] == 2 * ids.shape[1] * 16 * 4


def test_rows_alone_and_in_a_batch(model):
    inputs = qwen_inputs(model, rows=MIXED)
    with final_states(model) as states:
        together = greedy(model, inputs).sequences[:, -5:]
        batched = states[:]
        for row in range(len(MIXED)):
            states.clear()
            alone = greedy(model, single(inputs, row)).sequences[:, -5:]
            assert torch.equal(alone[0], together[row]), row
            assert all(torch.equal(state[0], batched[step][row]) for step, state in enumerate(states)), row


def test_beams_and_prompt_lookup(model):
    inputs = qwen_inputs(model, rows=MIXED[:2])
    beams = [greedy(model, inputs, num_beams=3, use_cache=use_cache).sequences for use_cache in (True, False)]
    assert torch.equal(*beams)
    alone = single(inputs, 0)
    assert torch.equal(greedy(model, alone, prompt_lookup_num_tokens=3).sequences, greedy(model, alone).sequences)


def test_low_precision_float_parts(model):
    inputs = qwen_inputs(model)
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low(**inputs).logits.dtype == torch.bfloat16
    assert low.model.language_model.layers[0].self_attn.k_bias.dtype == torch.float32
