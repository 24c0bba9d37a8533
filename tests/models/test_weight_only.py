"""WeightLinear and the structure of a W4A16 model: exact buffers in any dtype, one checkpoint format, transformers'
door."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from quota.core.checkpoint import Manifest, save_checkpoint
from quota.core.errors import CheckpointError
from quota.core.formats import WEIGHT_ONLY
from quota.models import model_fingerprint
from quota.models.quantize import quantize_structure, quantized_linears
from quota.models.rtn import quantize_rtn
from quota.nn.head import HeadLinear
from quota.nn.weight_linear import WeightLinear
from quota.ops.elementwise import apply_prologue
from quota.runtime import load
from quota.runtime.hf import register
from tests.prune.recipes import greedy
from tests.tiny import llava_inputs, tiny_llava, tiny_qwen

ALL = ("vision", "projector", "llm")


def rounded(model, modules=ALL):
    return quantize_rtn(model, modules, scheme=WEIGHT_ONLY)


def test_layer_equals_its_dequantized_weight_in_every_dtype():
    old, new = nn.Linear(150, 20), WeightLinear(150, 20, bias=True, input_scale=True)
    new.round_from(old.weight, old.bias)
    new.input_scale.copy_(torch.linspace(0.5, 2, 150))
    x = torch.randn(2, 3, 150, generator=torch.Generator().manual_seed(0))
    expected = (x * new.input_scale) @ new.dequantized_weight().T + new.bias
    assert torch.allclose(new(x), expected, atol=1e-5) and torch.allclose(new(x), old(x * new.input_scale), atol=0.3)
    state = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    clone = copy.deepcopy(new).to(torch.bfloat16)
    assert all(torch.equal(clone.state_dict()[name], tensor) for name, tensor in state.items())  # moved, never rounded
    for dtype in (torch.bfloat16, torch.float16):
        got = clone(x.to(dtype))
        assert got.dtype == dtype and torch.equal(got, new(x.to(dtype).float()).to(dtype))
    new.round_from(nn.Linear(150, 20).weight, None)
    assert not torch.allclose(new(x), expected, atol=0.1)  # no stale layout


@pytest.mark.parametrize("prologue", ["silu_mul", "quick_gelu", "gelu"])
def test_activations_of_its_input_are_those_of_quantize_act(prologue):
    layer = WeightLinear(150, 20)
    layer.round_from(nn.Linear(150, 20).weight, None)
    x = torch.randn(9, 300 if prologue == "silu_mul" else 150, generator=torch.Generator().manual_seed(0)) * 3
    whole = layer(x, prologue)
    torch.testing.assert_close(whole, layer(apply_prologue(x, prologue)), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(layer(x[row : row + 1], prologue)[0], whole[row]) for row in range(9))


@pytest.mark.parametrize("modules", [ALL, ("llm",)])
@torch.no_grad()
def test_saved_loaded_and_opened_by_transformers(tmp_path, modules):
    model = rounded(tiny_llava(), modules)
    save_checkpoint(
        model, tmp_path / "out", Manifest(WEIGHT_ONLY, modules, model_fingerprint(model)), max_shard_bytes=100_000
    )
    register()
    own, opened = (
        load(tmp_path / "out"),
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32),
    )
    inputs = llava_inputs(model)
    logits = model(**inputs).logits
    assert torch.equal(own(**inputs).logits, logits) and torch.equal(opened(**inputs).logits, logits)
    assert torch.equal(greedy(own, inputs).sequences, greedy(model, inputs).sequences)
    half = load(tmp_path / "out", dtype=torch.bfloat16)
    assert half(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}).logits.dtype == torch.bfloat16


def test_which_linears():
    for make, linears in ((tiny_llava, 4 * 4 + 2 * 4 + 2), (tiny_qwen, 4 * 4 + 3 * 4 + 2)):
        model = quantize_structure(make(), ALL, scheme=WEIGHT_ONLY)
        assert len(quantized_linears(model)) == linears and type(model.lm_head) is HeadLinear
    with pytest.raises(CheckpointError, match="modules"):
        quantize_structure(tiny_llava(), ("head",), scheme=WEIGHT_ONLY)
