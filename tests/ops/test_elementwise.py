import pytest
import torch

from quota.ops.elementwise import apply_prologue, exponential, gated_by_sigmoid, gelu


def test_exponential_is_accurate_and_bounded() -> None:
    x = torch.linspace(-86.9, 87.9, 20001)
    assert ((exponential(x) - x.double().exp()) / x.double().exp()).abs().max() < 2.5e-7
    ends = exponential(torch.tensor([-float("inf"), -87.5, 0.0, float("inf")]))
    assert ends[:2].eq(0).all() and ends[2] == 1 and ends[3].isfinite()
    assert exponential(torch.tensor([float("nan")])).isnan().all()


def test_gates_are_silu_and_quick_gelu() -> None:
    x = torch.linspace(-30, 30, 4001)
    for slope in (1.0, 1.702):
        want = x.double() * torch.sigmoid(slope * x.double())
        assert (gated_by_sigmoid(x, slope) - want).abs().max() < 2e-6 and (
            gated_by_sigmoid(x, slope) - want
        ).norm() < 3e-7 * want.norm()


@pytest.mark.parametrize(
    ("low", "high", "absolute", "relative"),
    [
        (-100, -6, 1e-11, 1),
        (-6, -3, 3e-9, 1),
        (-3, -1, 4e-8, 6e-7),
        (-1, 0, 4e-8, 2.2e-7),
        (0, 1, 1e-7, 1.5e-7),
        (1, 100, 1e-5, 1e-7),
    ],
)
def test_gelu_is_as_accurate_as_float32_arithmetic_of_torch(
    low: float, high: float, absolute: float, relative: float
) -> None:
    x = torch.cat([torch.linspace(low, high, 20001), torch.logspace(-30, 0, 501) * (low if high == 0 else high)])
    x = x[(x >= low) & (x <= high)]
    wide = x.double()
    want = wide * torch.special.erfc(-wide / 2**0.5) / 2
    (got, got_relative), (theirs, theirs_relative) = (
        ((y.double() - want).abs().max(), ((y.double() - want).abs() / want.abs().clamp_min(1e-37)).max())
        for y in (gelu(x), torch.nn.functional.gelu(x))
    )
    assert got <= absolute and got_relative <= relative
    assert got <= 1.1 * theirs and got_relative <= max(1.1 * float(theirs_relative), 1.5e-7)


def test_gelu_of_extreme_values() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 3e38, -3e38, 1e-45, -20.0, 20.0])
    want = torch.tensor([inf, 0.0, nan, 0.0, -0.0, 3e38, 0.0, 0.0, 0.0, 20.0])
    torch.testing.assert_close(gelu(x), want, rtol=0, atol=1e-44, equal_nan=True)
    falling = torch.linspace(-40, -0.76, 4001)
    assert gelu(falling).diff().le(0).all()  # no ripple in the tail


def test_wrong_prologues_are_refused() -> None:
    with pytest.raises(ValueError, match="prologue: expected one of silu_mul, quick_gelu, gelu"):
        apply_prologue(torch.zeros(1, 4), "relu")
    with pytest.raises(ValueError, match="halves of one size, got 5"):
        apply_prologue(torch.zeros(1, 5), "silu_mul")
