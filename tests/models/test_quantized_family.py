"""A quantized model of every family, without pruning: structure, rotary, cache, batches, beams, dtypes, threads."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from quota.models import find_family, model_fingerprint
from quota.models.quantize import quantize_structure, quantized_linears, quantized_modules
from quota.models.rtn import quantize_rtn
from tests.prune.recipes import final_states, greedy, single
from tests.tiny import KEY_BIASED, ROWS, TINY, tiny_dinov2, tiny_llava, tiny_qwen

ALL = ("vision", "projector", "llm")
# four groups per decoder layer; per used vision layer two or three times two; the projector's two
LINEARS = {
    "llava": 4 * 4 + 2 * 4 + 2,
    "llava_dinov2": 4 * 4 + 2 * 4 + 2,
    "llava_pixtral": 4 * 4 + 2 * 4 + 2,
    "llava_siglip": 4 * 4 + 2 * 4 + 2,
    "llava_next": 4 * 4 + 2 * 4 + 2,
    "llava_onevision": 4 * 4 + 2 * 4 + 2,
    "internvl": 4 * 4 + 2 * 4 + 2,
    "mistral3": 4 * 4 + 2 * 4 + 3,
    "paligemma": 4 * 4 + 2 * 4 + 1,
    "qwen2_vl": 4 * 4 + 4 * 2 + 2,
    "qwen2_5_vl": 4 * 4 + 4 * 3 + 2,
    "qwen3_vl": 4 * 4 + 4 * 3 + 3 * 2,
}


@pytest.fixture(scope="module", params=TINY)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return quantize_rtn(TINY[name][0](**({"key_bias": 800} if name in KEY_BIASED else {})))


def kind(model):
    return type(find_family(model)).__module__.rpartition(".")[2]


def inputs_of(model, **rows):
    return TINY[kind(model)][1](model, **rows)


@pytest.mark.parametrize("modules", [("llm",), ("vision", "llm"), ALL, ("vision",), ("projector",)])
def test_everything_asked_for_is_replaced(name, modules):
    model = quantize_rtn(TINY[name][0](), modules)
    assert quantized_modules(model) == modules
    assert torch.isfinite(model(**inputs_of(model)).logits).all()
    assert modules != ALL or len(quantized_linears(model)) == LINEARS[name]


@pytest.mark.parametrize(
    "made", [tiny_llava, tiny_dinov2, tiny_qwen, partial(tiny_qwen, tied=True)], ids=["llava", "dinov2", "qwen", "tied"]
)
def test_structure_on_meta_matches_the_quantized_model(made):
    model = quantize_rtn(made())
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config))
    quantize_structure(empty, ALL)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in model.state_dict().items()
    }
    assert all(t.is_meta for t in empty.state_dict().values())
    assert model_fingerprint(model) == model_fingerprint(made())


def test_rotary_agrees_with_upstream(name, model):
    upstream = TINY[name][0]().model.language_model.rotary_emb
    axes = find_family(model).axes
    positions = torch.randint(0, 60, (axes, 2, 9), generator=torch.Generator().manual_seed(0))
    positions = positions if axes > 1 else positions[0]
    ours = find_family(model).rotary(None)
    for got, want in zip(ours(torch.zeros(1), positions), upstream(torch.zeros(1), positions), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@torch.no_grad()
def test_prefill_then_decode_equals_one_prefill(name, model):
    """The 4-bit cache is read alike by prefill and decode, so a prompt may be cut anywhere: equal bits."""
    inputs = inputs_of(model)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    positions = mask.cumsum(-1).sub(1).clamp(min=0)
    if find_family(model).axes > 1:
        positions = model.model.get_rope_index(
            ids, attention_mask=mask, **{k: inputs[k] for k in ("mm_token_type_ids", "image_grid_thw")}
        )[0]
    images = {k: v for k, v in inputs.items() if not k.endswith("token_type_ids")}
    cut, cache = ids.shape[1] - 3, DynamicCache()
    prompt = {}  # where the tokens of a prompt see each other, the others are its answer
    if find_family(model).prefix:
        prompt = {"token_type_ids": (torch.arange(ids.shape[1]) >= cut).long().expand(ids.shape)}

    def run(begin, end, cache=None, **more):
        model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[..., begin:end],
            past_key_values=cache,
            use_cache=cache is not None,
            **more,
        )

    with final_states(model) as states:
        run(0, ids.shape[1], **images, **prompt)
        run(0, cut, cache, **images, **{name: kinds[:, :cut] for name, kinds in prompt.items()})
        for t in range(cut, ids.shape[1]):
            run(t, t + 1, cache)
        assert torch.equal(states[0], states[-1])
        cache.crop(-3)
        run(cut, ids.shape[1], cache)
        assert torch.equal(states[0], states[-1])


def test_rows_alone_and_in_a_batch(model):
    """Left-padded positions start at 0 in generate, so every bit of the decoder agrees."""
    rows = ROWS[kind(model)]
    inputs = inputs_of(model, rows=rows)
    with final_states(model) as states:
        together = greedy(model, inputs).sequences[:, -5:]
        batched = states[:]
        for row in range(len(rows)):
            states.clear()
            alone = greedy(model, single(inputs, row)).sequences[:, -5:]
            assert torch.equal(alone[0], together[row]), row
            assert all(torch.equal(state[0], batched[step][row]) for step, state in enumerate(states)), row


def test_threads_change_nothing(model):
    inputs, found = inputs_of(model), []
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


def test_beam_search_and_prompt_lookup(model):
    inputs = inputs_of(model)
    plain, again = greedy(model, inputs).sequences, greedy(model, inputs).sequences
    assert torch.equal(plain, again)
    assert torch.equal(greedy(model, inputs, num_beams=1, num_return_sequences=1).sequences, plain)
    beams = [greedy(model, inputs, num_beams=3, use_cache=use_cache).sequences for use_cache in (True, False)]
    assert torch.equal(*beams)
    alone = single(inputs, 0)
    assert torch.equal(greedy(model, alone, prompt_lookup_num_tokens=3).sequences, greedy(model, alone).sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_float_parts(model, dtype):
    inputs, low = inputs_of(model), copy.deepcopy(model).to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert low(**inputs).logits.dtype == dtype
    assert low.model.language_model.layers[0].mlp.down_proj.w_scale.dtype == torch.float32
    assert greedy(low, inputs).sequences.shape == greedy(model, inputs_of(model)).sequences.shape
