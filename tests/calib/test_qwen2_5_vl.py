"""Calibrating Qwen2.5-VL, beside what every family promises (test_family.py): key biases and images of several
sizes."""

from __future__ import annotations

import pytest
import torch

from quota.calib import run
from quota.calib.stream import FloatSource
from quota.models import find_family
from quota.models.qwen_tower import geometry_of
from quota.nn.key_bias import QuantBiasedAttention
from quota.planning.profile import profile
from quota.runtime import load
from tests.calib.calibration import QUICK, batch_for, mixed_samples, qwen_folder, relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qwen_folder(tmp_path_factory.mktemp("float") / "model", key_bias=800)


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """(float, calibrated)."""
    out = tmp_path_factory.mktemp("out") / "quantized"
    run.calibrate(folder, mixed_samples(), out=out, progress=False, settings=QUICK)
    return load(folder), load(out)


def test_planted_key_biases_do_not_reach_the_key_quantizer(folder):
    """Layer 0 has a key bias of norm 800: its 4-bit error is like that of layer 1, which has none."""
    source, errors = FloatSource(folder), []
    for index in (0, 1):
        block, batch = (
            source.block("decoder", f"model.language_model.layers.{index}"),
            batch_for("qwen2_5_vl", "decoder"),
        )
        update = block(batch) - batch.hidden
        block.quantize_linears()
        block.set_mode("rtn")
        errors.append(relative(block(batch) - batch.hidden, update))
    assert errors[0] < 1.6 * errors[1], errors


def test_key_biases_stay_as_they_are(models):
    original, quantized = models
    assert all(isinstance(layer.self_attn, QuantBiasedAttention) for layer in quantized.model.language_model.layers)
    bias = original.model.language_model.layers[0].self_attn.k_proj.bias
    assert torch.equal(quantized.model.language_model.layers[0].self_attn.k_bias.flatten(), bias.detach())


def test_profile_of_mixed_sizes(models):
    original, quantized = models
    made = profile(original, quantized, original.processor, mixed_samples())
    assert (
        made.samples == 6 and made.model.visual_tokens == 10 and len(made.sensitivity) == 4
    )  # tokens of the six: 16, 6, none, 10, 25, 8
    assert all(0 < x < 1.5 for x in made.sensitivity[1:]) and made.model.vision_macs
    assert (
        find_family(original).visual_tokens is None
        and geometry_of(original.config.vision_config, (1, 8, 8)).patches == 64
    )
