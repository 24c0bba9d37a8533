"""A quantized LLaVA: structure, identity, masks; what every family promises: test_quantized_family.py."""

from __future__ import annotations

import copy

import pytest
import torch

from quota.core.errors import CheckpointError, UsageError
from quota.models import model_fingerprint
from quota.models.quantize import quantize_structure, quantized_linears, weight_bytes
from quota.models.rtn import quantize_rtn
from tests.prune.recipes import greedy
from tests.tiny import llava_inputs, tiny_llava

ALL = ("vision", "projector", "llm")


@pytest.fixture(scope="module")
def model():
    return quantize_rtn(tiny_llava())


def test_the_last_vision_layer_is_left_alone(model):
    assert not any("encoder.layers.2" in name for name in quantized_linears(model))


def test_the_layer_that_feeds_nothing_is_not_computed(model):
    inputs, damaged = llava_inputs(model), copy.deepcopy(model)
    for parameter in damaged.get_submodule("model.vision_tower.encoder.layers.2").parameters():
        parameter.data.fill_(float("nan"))
    hidden = [
        m.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states for m in (model, damaged)
    ]
    assert len(hidden[0]) == 4 and torch.equal(hidden[0][-2], hidden[1][-2]) and torch.isfinite(hidden[1][-1]).all()
    assert torch.equal(model(**inputs).logits, damaged(**inputs).logits)


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


def test_masks_that_cannot_be_obeyed(model):
    inputs = llava_inputs(model, rows=((3, 5), (9, 4)))
    flipped = inputs["attention_mask"].flip(1)
    with pytest.raises(UsageError, match="padding_side"):
        model(**{**inputs, "attention_mask": flipped})
    with pytest.raises(UsageError, match="growing cache"):
        greedy(model, inputs, cache_implementation="static")


def test_calling_a_layer_by_itself(model):
    """No mask, no cache: what calibration does with one block."""
    layer = model.model.language_model.layers[0]
    x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(2))
    rotary = model.model.language_model.rotary_emb(x, position_ids=torch.arange(7)[None])
    whole = layer(x, position_embeddings=rotary)
    part = layer(x[:, :4], position_embeddings=tuple(t[:, :4] for t in rotary))
    assert torch.equal(whole[:, :4], part)
