"""int8 weights and activations: the reference's bits on every instruction set and however rows are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quota.ops import ByteWeight, native
from quota.ops.w8a8_linear import w8a8_linear_ref


def case(m: int, n: int, k: int) -> tuple[torch.Tensor, ByteWeight, torch.Tensor]:
    g = torch.Generator().manual_seed(m + 10 * n + 100 * k)
    w = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    w[: n // 2] = w[: n // 2].sign() * 127  # as large as sums of products get
    x = torch.randn(m, k, generator=g)
    x[: m // 2] = x[: m // 2].sign()
    return x, ByteWeight(w, torch.rand(n, generator=g)), torch.randn(n, generator=g)


SIZES = [(1, 1, 1), (1, 64, 64), (2, 65, 63), (7, 130, 200), (13, 33, 1000), (6, 128, 4096)]


@pytest.mark.parametrize("sizes", SIZES)
def test_native_equals_the_reference(isa: str, sizes: tuple[int, int, int]) -> None:
    x, weight, bias = case(*sizes)
    for added in (bias, None):
        assert torch.equal(native.w8a8_linear(x, weight, added), w8a8_linear_ref(x, weight, added))


def test_a_row_depends_on_itself_alone(isa: str, threads: Callable[[int], None]) -> None:
    x, weight, bias = case(29, 200, 96)
    whole = native.w8a8_linear(x, weight, bias)
    for row in (0, 5, 28):
        assert torch.equal(native.w8a8_linear(x[row : row + 1], weight, bias)[0], whole[row])
    threads(3)
    assert torch.equal(native.w8a8_linear(x, weight, bias), whole)


def test_rows_that_are_zero_or_not_finite(isa: str) -> None:
    x, weight, bias = case(6, 40, 70)
    x[0], x[1, 3], x[2, 69], x[3, 0] = 0, float("nan"), float("inf"), -1e30
    got, want = native.w8a8_linear(x, weight, bias), w8a8_linear_ref(x, weight, bias)
    assert torch.allclose(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[0], bias) and got[1].isnan().all() and got[2].isnan().all() and got[3:].isfinite().all()


def test_wrong_shapes_are_refused(isa: str) -> None:
    x, weight, bias = case(2, 8, 16)
    for wrong in ((x[:, :-1], weight, bias), (x.double(), weight, bias), (x, weight, bias[:-1])):
        with pytest.raises((RuntimeError, ValueError), match="expected"):
            native.w8a8_linear(*wrong)
    with pytest.raises(ValueError, match="w_q: expected int8"):
        ByteWeight(weight.w_q.short(), weight.w_scale)
    with pytest.raises(ValueError, match="w_scale: expected"):
        ByteWeight(weight.w_q, weight.w_scale[1:])
