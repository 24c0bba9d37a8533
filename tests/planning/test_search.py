"""What FitPrune and VTW measure, against full attention matrices and a forward without pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quota.calib.samples import Sample, Samples, encode
from quota.core.errors import SampleError
from quota.models.rtn import quantize_rtn
from quota.planning.facts import measured_facts
from quota.planning.search import attention_statistics, withdrawal_divergence
from quota.prune.attention import text_queries
from quota.scenes.model import build_config, build_model, build_processor
from tests.calib.calibration import picture_samples

LAYERS = 3


@pytest.fixture(scope="module")
def world():
    return build_model(build_config(56, 64, LAYERS)).eval(), build_processor(56), picture_samples(2)


@torch.no_grad()
def test_attention_statistics_are_the_largest_head_of_the_full_matrix(world):
    model, processor, samples = world
    inputs = encode(processor, samples[0])
    visual = (inputs["input_ids"] == model.config.image_token_index)[0]
    text = text_queries(visual[None], torch.ones_like(visual)[None])[0]
    found = attention_statistics(model, processor, samples)
    assert len(found) == 2 and found[0].cross.shape == found[0].self_.shape == (LAYERS, int(visual.sum()))
    model.set_attn_implementation("eager")
    try:
        attentions = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for layer, a in enumerate(attentions):
        np.testing.assert_allclose(
            found[0].cross[layer], a[0][:, text][:, :, visual].amax(0).mean(0).numpy(), rtol=1e-3, atol=1e-6
        )
        np.testing.assert_allclose(
            found[0].self_[layer], a[0][:, visual][:, :, visual].amax(0).mean(0).numpy(), rtol=1e-3, atol=1e-6
        )


@torch.no_grad()
def test_statistics_leave_the_model_as_it_was(world):
    model, processor, samples = world
    inputs = encode(processor, samples[0])
    before = model(**inputs).logits
    attention_statistics(model, processor, samples), withdrawal_divergence(model, processor, samples)
    assert torch.equal(model(**inputs).logits, before) and model.config.text_config._attn_implementation == "sdpa"
    assert not model.model.language_model.layers[0].self_attn._forward_pre_hooks


@torch.no_grad()
def test_withdrawal_before_the_last_layer_changes_least_of_all_it_can(world):
    """KL is positive, and 0 where the last layers do not look at the picture: with values of later layers zeroed,
    withdrawing there is free."""
    model, processor, samples = world
    kl = withdrawal_divergence(model, processor, samples)
    assert sorted(kl) == [1, 2] and all(v > 0 for v in kl.values())
    attention = model.model.language_model.layers[2].self_attn
    kept = attention.o_proj.weight.clone()
    attention.o_proj.weight.zero_()
    try:
        assert withdrawal_divergence(model, processor, samples)[2] < 1e-9
    finally:
        attention.o_proj.weight.copy_(kept)


def test_quantized_models_are_measured_as_deployed(world):
    _, processor, samples = world
    model = quantize_rtn(build_model(build_config(56, 64, LAYERS)).eval())
    told: list[tuple[int, int]] = []
    first, second = (attention_statistics(model, processor, samples, lambda *at: told.append(at)) for _ in range(2))
    assert all(
        np.array_equal(a.cross, b.cross) and np.array_equal(a.self_, b.self_)
        for a, b in zip(first, second, strict=True)
    )
    assert told == [(1, 2), (2, 2)] * 2 and all(
        v >= 0 for v in withdrawal_divergence(model, processor, samples).values()
    )


def test_facts_need_no_forward_and_a_picture(world):
    model, processor, samples = world
    facts = measured_facts(model, processor, samples)
    assert facts.visual_tokens == 16 and facts.layers == LAYERS and facts.text_tokens and facts.vision_macs
    words = Samples.of([Sample("a", "what is it ?")])
    with pytest.raises(SampleError, match="at least one with an image"):
        measured_facts(model, processor, words)
    with pytest.raises(SampleError, match="at least one with an image"):
        withdrawal_divergence(model, processor, words)


def test_a_mark_in_the_last_sample_is_found_before_the_first_is_run(world, monkeypatch):
    model, processor, samples = world
    wrong = Samples.of([*samples, Sample("last", "what is <image> ?")])
    for name in ("search.inputs_of", "search._attention_sample", "search._next", "facts.encode"):
        monkeypatch.setattr(f"quota.planning.{name}", lambda *_: pytest.fail("it was run"))
    for measured in (attention_statistics, withdrawal_divergence, measured_facts):
        with pytest.raises(SampleError, match="'last': instruction"):
            measured(model, processor, wrong)
