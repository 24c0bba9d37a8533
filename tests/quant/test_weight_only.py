"""Rounding in groups, GPTQ and AWQ: what their papers claim, on inputs with known structure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quota.core.formats import INT4_GROUPS, Format
from quota.quant.awq import awq, search_clip, search_scale
from quota.quant.gptq import GptqOptions, Hessian, gptq, output_error
from quota.quant.grouped import dequantize_groups, round_groups


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, k: int) -> torch.Tensor:
    """Inputs of low rank with a little noise: what GPTQ lives on."""
    return normal(rows, k // 8, seed=1) @ normal(k // 8, k, seed=2) + 0.1 * normal(rows, k, seed=3)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    for part in x.split(100):
        hessian.add(part)
    return hessian.value


def error_of(w: torch.Tensor, x: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((x.double() @ (w - rounded).double().T).square().sum() / len(x))


@pytest.mark.parametrize("k", [1, 100, 128, 130, 300])
@pytest.mark.parametrize("form", [INT4_GROUPS, replace(INT4_GROUPS, symmetric=True), replace(INT4_GROUPS, group=32)])
def test_rounding_to_nearest(k: int, form: Format) -> None:
    w = normal(7, k)
    w[3] = 0
    q, scale, zero = round_groups(w, form)
    assert (
        q.shape == w.shape
        and q.dtype == zero.dtype == torch.uint8
        and int(q.max()) <= 15
        and scale.shape == zero.shape == (7, -(-k // form.group))
    )
    assert not form.symmetric or bool((zero == 8).all())
    back = dequantize_groups(q, scale, zero, form)
    step = scale.repeat_interleave(form.group, 1)[:, :k]
    assert (
        bool(((back - w).abs() <= step * (0.5 + 1e-5) + 1e-12).all()) or not form.symmetric
    )  # the zero of an asymmetric grid is rounded too
    assert bool(((back - w).abs() <= step * (1 + 1e-5)).all())
    again = round_groups(back, form)
    assert torch.allclose(dequantize_groups(*again, form), back, atol=1e-6) and bool((back[3] == 0).all())


def test_a_short_last_group_is_rounded_as_if_alone() -> None:
    w = normal(5, 200)
    q, scale, zero = round_groups(w)
    tail = round_groups(w[:, 128:])
    assert torch.equal(q[:, 128:], tail[0]) and torch.equal(scale[:, 1:], tail[1]) and torch.equal(zero[:, 1:], tail[2])


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("form", [INT4_GROUPS, replace(INT4_GROUPS, symmetric=True), replace(INT4_GROUPS, group=32)])
@pytest.mark.parametrize("k", [64, 256, 300])
def test_gptq_loses_less_than_nearest_on_correlated_inputs(k: int, form: Format, by_activation: bool) -> None:
    w, x = normal(48, k, seed=5), correlated(2000, k)
    h = hessian_of(x)
    found = dequantize_groups(*gptq(w, h, form, GptqOptions(by_activation=by_activation)), form)
    nearest = dequantize_groups(*round_groups(w, form), form)
    assert error_of(w, x, found) < 0.7 * error_of(w, x, nearest)
    assert output_error(w, found, h) == pytest.approx(error_of(w, x, found), rel=1e-4)


def test_gptq_on_a_diagonal_hessian_is_rounding_to_nearest() -> None:
    w = normal(20, 260)
    for got, expected in zip(gptq(w, torch.eye(260, dtype=torch.float64) * 3), round_groups(w), strict=True):
        assert torch.equal(got, expected)


def test_gptq_stays_on_its_grid_and_is_deterministic() -> None:
    w, h = normal(16, 300), hessian_of(correlated(500, 300))
    q, scale, zero = gptq(w, h)
    assert q.dtype == torch.uint8 and int(q.max()) <= 15 and bool((scale > 0).all()) and int(zero.max()) <= 15
    assert all(torch.equal(a, b) for a, b in zip(gptq(w, h), (q, scale, zero), strict=True))


def test_gptq_survives_dead_inputs_and_refuses_a_hopeless_hessian() -> None:
    w, x = normal(8, 140), correlated(50, 140)  # fewer inputs than features: singular without damping
    x[:, [3, 139]] = 0
    q, scale, zero = gptq(w, hessian_of(x))
    assert bool(dequantize_groups(q, scale, zero).isfinite().all())
    with pytest.raises(ValueError, match="not positive definite"):
        gptq(w, torch.full((140, 140), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected \[140, 140\]"):
        gptq(w, torch.eye(3, dtype=torch.float64))


def salient(rows: int, k: int) -> torch.Tensor:
    """A few channels thirty times as large as the others."""
    x = normal(rows, k, seed=7)
    x[:, :: k // 6] *= 30
    return x


@pytest.mark.parametrize("form", [INT4_GROUPS, replace(INT4_GROUPS, symmetric=True), replace(INT4_GROUPS, group=32)])
def test_awq_loses_less_than_nearest_with_salient_channels(form: Format) -> None:
    w, x = normal(48, 300, seed=8), salient(600, 300)
    s, alpha = search_scale([w[:20], w[20:]], x, x.abs().mean(0), form)
    assert 0 < alpha < 1 and bool((s[:: 300 // 6] > s.median()).all())
    scaled = dequantize_groups(*awq(w * s, x / s, form=form), form) / s
    plain = dequantize_groups(*awq(w * s, x / s, form=form, clip=False), form) / s
    nearest = error_of(w, x, dequantize_groups(*round_groups(w, form), form))
    assert error_of(w, x, scaled) <= error_of(w, x, plain) < 0.5 * nearest


def test_awq_never_does_worse_than_nearest_on_its_samples() -> None:
    for seed in range(5):
        w, x = normal(20, 200, seed=seed), normal(64, 200, seed=seed + 50)
        s, _ = search_scale([w], x, x.abs().mean(0))
        assert error_of(w, x, dequantize_groups(*awq(w * s, x / s)) / s) <= error_of(
            w, x, dequantize_groups(*round_groups(w))
        ) * (1 + 1e-6)


def test_clipping_pays_where_one_weight_is_an_outlier_nobody_uses() -> None:
    w, x = normal(6, 128, seed=3).abs(), normal(200, 128, seed=4)
    w[:, 5], x[:, 5] = 6.0, 0.0
    clips = search_clip(w, x)
    assert bool((clips < 1).all())
    assert error_of(w, x, dequantize_groups(*round_groups(w, clip=clips))) < 0.5 * error_of(
        w, x, dequantize_groups(*round_groups(w))
    )
    assert torch.equal(clips, search_clip(w, x))
