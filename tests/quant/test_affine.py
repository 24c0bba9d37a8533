import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quota.quant.affine import (
    dequantize_kv,
    dequantize_symmetric,
    quantize_asymmetric,
    quantize_kv,
    quantize_symmetric,
    quantize_weight,
)
from quota.quant.pack import unpack_int4

finite = st.floats(-1e6, 1e6, width=32)
rows = st.lists(finite, min_size=1, max_size=40)


@given(rows)
def test_symmetric_error_is_at_most_half_a_step(values: list[float]) -> None:
    x = torch.tensor([values])
    q, scale = quantize_symmetric(x)
    assert q.min() >= -8 and q.max() <= 7 and scale.dtype == torch.float32 and (scale > 0).all()
    assert ((dequantize_symmetric(q, scale) - x).abs() <= scale[:, None] * 0.5 * (1 + 1e-5)).all()


@given(rows, st.floats(-10, 10, width=32))
def test_kv_error_is_at_most_half_a_step(values: list[float], shift: float) -> None:
    x = torch.tensor([values]) + shift
    q, scale, zero = quantize_kv(x)
    assert q.max() <= 15 and (scale > 0).all()
    assert ((dequantize_kv(q, scale, zero) - x).abs() <= scale[:, None] * 0.5 * (1 + 1e-4) + x.abs().max() * 1e-6).all()


@given(rows)
def test_asymmetric_activations_represent_zero_exactly(values: list[float]) -> None:
    x = torch.tensor([[*values, 0.0]])
    q, scale, zero = quantize_asymmetric(x)
    assert zero.dtype == torch.int32 and int(q[0, -1]) == int(zero[0])
    assert (((q - zero[:, None]) * scale[:, None] - x).abs() <= scale[:, None] * 1.001).all()


@given(rows, st.floats(0.25, 1.0, width=32))
def test_clip_scales_the_range(values: list[float], clip: float) -> None:
    x = torch.tensor([values])
    assert torch.equal(quantize_symmetric(x, clip)[1], (x.abs().amax(-1) * clip).clamp_min(1e-8) / 7)


def test_all_zero_rows_quantize_to_zero() -> None:
    q, scale = quantize_symmetric(torch.zeros(2, 5))
    assert not q.any() and (scale > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_scale_and_leave_defined_codes(bad: float) -> None:
    x = torch.ones(2, 5)
    x[0, 3] = bad
    q, scale = quantize_symmetric(x)
    assert not dequantize_symmetric(q, scale)[0].isfinite().all() and scale[1] == 1 / 7
    q, scale, zero = quantize_kv(x)
    assert not dequantize_kv(q, scale, zero)[0].isfinite().all()


def test_rounding_is_half_to_even() -> None:
    assert quantize_symmetric(torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5]]))[0].tolist() == [[7, 0, 2, 2, 0]]


def test_weight_has_one_scale_per_output_channel() -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    packed, scale = quantize_weight(w, torch.linspace(0.5, 1, 5))
    q, expected = quantize_symmetric(w, torch.linspace(0.5, 1, 5))
    assert torch.equal(unpack_int4(packed, 7), q) and torch.equal(scale, expected)
