"""Linears of int8 and of small floats: the product of what their tensors say, in every dtype, a row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quota.core.formats import SCHEMES
from quota.models.quantize import linear_class

ROWS = [name for name, row in SCHEMES.items() if row.activations is not None and not row.transforms]


@pytest.mark.parametrize("name", ROWS)
def test_a_layer_is_the_product_of_its_rounded_operands(name):
    scheme = SCHEMES[name]
    g = torch.Generator().manual_seed(0)
    old = nn.Linear(150, 20)
    new = linear_class(scheme)(150, 20, bias=True, scheme=scheme)
    new.round_from(old.weight, old.bias)
    x = torch.randn(2, 3, 150, generator=g)
    coarse = {"w8a8": 0.02, "fp8": 0.06}.get(name, 0.25)
    error = (new(x) - old(x)).norm() / old(x).norm()
    assert 0 < error < coarse
    assert (new.dequantized_weight() - old.weight).norm() / old.weight.norm() < coarse
    risk = new.quant_risk(x)
    assert risk.shape == (2, 3) and (risk > 0).all() and (risk < coarse * x.norm(dim=-1)).all()
    # exact: the rounded input against the stored weight, in float64
    eye = torch.eye(150)[:7] * torch.tensor([1.0, 4, -2, 0.5, 128, 8, 16])[:, None]  # single inputs round to themselves
    want = eye.double() @ new.dequantized_weight().double().T + new.bias.double()
    torch.testing.assert_close(new(eye).double(), want, rtol=1e-6, atol=1e-6)
    state = {key: tensor.clone() for key, tensor in new.state_dict().items()}
    clone = copy.deepcopy(new).to(torch.bfloat16)
    assert all(torch.equal(clone.state_dict()[key], tensor) for key, tensor in state.items())  # moved, never rounded
    assert torch.equal(clone(x.bfloat16()), new(x.bfloat16().float()).bfloat16())
    whole = new(x[0].repeat(1, 2), "silu_mul")
    assert all(torch.equal(new(x[0, row : row + 1].repeat(1, 2), "silu_mul")[0], whole[row]) for row in range(3))
    new.round_from(nn.Linear(150, 20).weight, None)
    assert not torch.allclose(new(x), clone(x), atol=0.1)  # no stale layout
