"""Small floats: every code, ties to even, scales, and that bfloat16 holds what is multiplied."""

from __future__ import annotations

import pytest
import torch

from quota.core.formats import FP8, MXFP4, NVFP4
from quota.quant.minifloat import LARGEST, codes_of, quantize, rounded, stored_values, values_of

FORMS = {"fp8": FP8, "nvfp4": NVFP4, "mxfp4": MXFP4}


def test_every_code_is_its_value():
    for number, codes in (("e4m3", 256), ("e2m1", 16)):
        bits = torch.arange(codes, dtype=torch.uint8)
        values = values_of(bits, number)
        finite = values.isfinite()
        assert values[finite].abs().max() == LARGEST[number]
        assert torch.equal(codes_of(values, number)[finite], bits[finite])
        assert torch.equal(rounded(values[finite], number), values[finite])


def test_the_nearest_value_and_of_two_the_even_one():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.3, -2.51, float("nan")])
    want = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.5, -3.0, float("nan")])
    assert torch.equal(rounded(x, "e2m1")[:-1], want[:-1]) and rounded(x, "e2m1")[-1].isnan()
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 3
    grid = values_of(torch.arange(16, dtype=torch.uint8), "e2m1")
    nearest = (x.clamp(-6, 6)[:, None] - grid).abs().amin(1)
    assert torch.equal((rounded(x, "e2m1") - x.clamp(-6, 6)).abs(), nearest)
    assert rounded(torch.tensor([1e4, -1e4]), "e4m3").tolist() == [448, -448]


@pytest.mark.parametrize("name", FORMS)
def test_codes_and_scales_give_the_values(name):
    form = FORMS[name]
    x = torch.randn(5, 75, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 5)[:, None]
    x[2, 16:48] = 0
    made = quantize(x, form)
    assert torch.equal(stored_values(made.codes, made.scale, form, 75), made.values)
    assert torch.equal(made.values.bfloat16().float(), made.values)
    value = made.values if made.row is None else made.values * made.row[:, None]
    bound = 2**-4 if name == "fp8" else 2**-1
    assert ((value - x).norm(dim=1) / x.norm(dim=1) < bound / 2).all()
    for row in range(5):  # a row depends on itself alone
        alone = quantize(x[row : row + 1], form)
        assert torch.equal(alone.codes[0], made.codes[row]) and torch.equal(alone.scale[0], made.scale[row])
    bytes_ = {"fp8": 75 + 4, "nvfp4": 38 + 5, "mxfp4": 38 + 3}
    assert form.vector_bytes(75) == bytes_[name]


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_finite_stays_so_and_zero_stays_zero(name):
    x = torch.ones(3, 40)
    x[0], x[1, 7] = 0, float("nan")
    made = quantize(x, FORMS[name])
    value = made.values if made.row is None else made.values * made.row[:, None]
    assert not value[0].any() and value[1].isnan().any() and value[2].isfinite().all()
