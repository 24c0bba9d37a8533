import pytest
import torch

from quota.ops.elementwise import apply_prologue, exponential, gated_by_sigmoid


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
        assert (gated_by_sigmoid(x, slope) - want).abs().max() < 2e-6 and (gated_by_sigmoid(x, slope) - want).norm() < 3e-7 * want.norm()


def test_wrong_prologues_are_refused() -> None:
    with pytest.raises(ValueError, match="prologue: expected one of silu_mul, quick_gelu"):
        apply_prologue(torch.zeros(1, 4), "relu")
    with pytest.raises(ValueError, match="halves of one size, got 5"):
        apply_prologue(torch.zeros(1, 5), "silu_mul")
