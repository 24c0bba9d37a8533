"""A quantized model without pruning: structure, cache, batches, threads."""

from __future__ import annotations

import copy

import pytest
import torch

from quota.core.errors import CheckpointError, UsageError
from quota.models import model_fingerprint
from quota.models.quantize import quantize_structure, quantized_linears, quantized_modules, weight_bytes
from quota.models.rtn import quantize_rtn
from quota.nn.embedding import Rotary
from tests.prune.recipes import final_states, greedy, single
from tests.tiny import llava_inputs, tiny_llava

ALL = ("vision", "projector", "llm")


@pytest.fixture(scope="module")
def model():
    return quantize_rtn(tiny_llava())


def test_everything_asked_for_is_replaced():
    for modules in (("llm",), ("vision", "llm"), ALL, ("vision",), ("projector",)):
        model = quantize_rtn(tiny_llava(), modules)
        assert quantized_modules(model) == tuple(m for m in ALL if m in modules)
        assert torch.isfinite(model(**llava_inputs(model)).logits).all()
    names = quantized_linears(quantize_rtn(tiny_llava()))
    assert (
        len(names) == 4 * 4 + 2 * 4 + 2
    )  # four groups per decoder layer and per used vision layer; the last vision layer feeds nothing
    assert not any("encoder.layers.2" in name for name in names)


def test_the_layer_that_feeds_nothing_is_not_computed(model):
    inputs, damaged = llava_inputs(model), copy.deepcopy(model)
    for parameter in damaged.get_submodule("model.vision_tower.encoder.layers.2").parameters():
        parameter.data.fill_(float("nan"))
    hidden = [
        m.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states for m in (model, damaged)
    ]
    assert len(hidden[0]) == 4 and torch.equal(hidden[0][-2], hidden[1][-2]) and torch.isfinite(hidden[1][-1]).all()
    assert torch.equal(model(**inputs).logits, damaged(**inputs).logits)


def test_structure_on_meta_matches_the_quantized_model(model):
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config))
    quantize_structure(empty, ALL)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }
    assert all(t.is_meta for t in empty.state_dict().values())


def test_structure_follows_a_checkpoints_shapes():
    plain = quantize_rtn(tiny_llava(), transforms=False)
    shapes = {name: tuple(t.shape) for name, t in plain.state_dict().items()}
    rebuilt = quantize_structure(tiny_llava(), ALL, shapes)
    assert rebuilt.state_dict().keys() == plain.state_dict().keys()
    assert not any(name.endswith((".left", ".right", "_transform")) for name in shapes)
    with pytest.raises(CheckpointError, match="square"):
        quantize_structure(tiny_llava(), ALL, {**shapes, "model.language_model.layers.0.mlp.down_proj.left": (5, 5)})
    with pytest.raises(CheckpointError, match="modules"):
        quantize_structure(tiny_llava(), ("text",))


def test_identity_survives_quantization_and_bytes_shrink(model):
    original = tiny_llava()
    assert model_fingerprint(model) == model_fingerprint(original)
    assert weight_bytes(model) < weight_bytes(original)


def test_transforms_cancel_before_rounding():
    """Quantization error aside, the rotated model is the float one: it stays far closer to it than to a different
    model."""
    original, inputs = tiny_llava(), llava_inputs(tiny_llava())
    want, got = (m(**inputs).logits[:, -1] for m in (original, quantize_rtn(tiny_llava())))
    other = tiny_llava(seed=3)(**inputs).logits[:, -1]
    assert (got - want).norm() < 0.8 * (other - want).norm()


def test_rotary_agrees_with_upstream(model):
    upstream = tiny_llava().model.language_model.rotary_emb
    positions = torch.arange(50)[None]
    for got, want in zip(
        Rotary(model.config.text_config)(torch.zeros(1), positions), upstream(torch.zeros(1), positions), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_prefill_then_decode_equals_one_prefill(model):
    """KV4 is read alike by prefill and decode, so a prompt may be cut anywhere: equal bits."""
    inputs = llava_inputs(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad(), final_states(model) as states:
        model(**inputs)
        cut = ids.shape[1] - 3
        cache = model(
            ids[:, :cut], attention_mask=mask[:, :cut], pixel_values=inputs["pixel_values"], use_cache=True
        ).past_key_values
        for t in range(cut, ids.shape[1]):
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        assert torch.equal(states[0], states[-1])
        cache.crop(-3)
        model(ids[:, cut:], attention_mask=mask, past_key_values=cache, use_cache=True)
        assert torch.equal(states[0], states[-1])


def test_rows_alone_and_in_a_batch(model):
    inputs = llava_inputs(model, rows=((3, 5), (9, 4), (0, 1)))
    with final_states(model) as states:
        together = greedy(model, inputs).sequences[:, -5:]
        batched = states[:]
        for row in range(3):
            states.clear()
            alone = greedy(model, single(inputs, row)).sequences[:, -5:]
            assert torch.equal(alone[0], together[row])
            for step, state in enumerate(states):
                # left-padded positions start at 0 in generate, so every bit of the decoder agrees
                assert torch.equal(state[0], batched[step][row]), (row, step)


def test_threads_change_nothing(model):
    inputs, found = llava_inputs(model), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with final_states(model) as states:
                found.append((greedy(model, inputs).sequences, states))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_beam_search_sampling_copies_and_prompt_lookup(model):
    inputs = llava_inputs(model)
    plain, again = greedy(model, inputs).sequences, greedy(model, inputs).sequences
    assert torch.equal(plain, again)
    assert torch.equal(greedy(model, inputs, num_beams=1, num_return_sequences=1).sequences, plain)
    beams = [greedy(model, inputs, num_beams=3, use_cache=use_cache).sequences for use_cache in (True, False)]
    assert torch.equal(*beams)
    alone = single(inputs, 0)
    assert torch.equal(greedy(model, alone, prompt_lookup_num_tokens=3).sequences, greedy(model, alone).sequences)


def test_masks_that_cannot_be_obeyed(model):
    inputs = llava_inputs(model, rows=((3, 5), (9, 4)))
    flipped = inputs["attention_mask"].flip(1)
    with pytest.raises(UsageError, match="padding_side"):
        model(**{**inputs, "attention_mask": flipped})
    with pytest.raises(UsageError, match="growing cache"):
        greedy(model, inputs, cache_implementation="static")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_float_parts(model, dtype):
    inputs = llava_inputs(model)
    low = copy.deepcopy(model).to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert low(**inputs).logits.dtype == dtype
    assert low.model.language_model.layers[0].mlp.down_proj.w_scale.dtype == torch.float32
    assert greedy(low, inputs).sequences.shape == greedy(model, llava_inputs(model)).sequences.shape


def test_calling_a_layer_by_itself(model):
    """No mask, no cache: what calibration does with one block."""
    layer = model.model.language_model.layers[0]
    x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(2))
    rotary = model.model.language_model.rotary_emb(x, position_ids=torch.arange(7)[None])
    whole = layer(x, position_embeddings=rotary)
    part = layer(x[:, :4], position_embeddings=tuple(t[:, :4] for t in rotary))
    assert torch.equal(whole[:, :4], part)
