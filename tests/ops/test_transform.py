import numpy as np
import pytest
import torch

from quota.ops import native
from quota.ops.fma import chain_matmul, fma
from quota.ops.transform import transform_ref
from quota.ops.weights import Factor
from quota.quant.fixed import LARGEST, LARGEST_COLUMN, fixed_factor, fixed_kronecker, rounded_factor, to_16_bits
from quota.quant.transform import apply_kronecker, hadamard

SHAPES = [(1, 1, 1), (5, 3, 7), (2, 12, 16), (7, 16, 33), (4, 1, 64), (3, 17, 1), (3, 23, 40), (2, 30, 86)]


def factors(l: int, r: int) -> list[tuple[Factor | None, Factor | None]]:
    g = torch.Generator().manual_seed(l * 100 + r)
    left, right = Factor(torch.randn(l, l, generator=g)), Factor(torch.randn(r, r, generator=g))
    return [(left, right), (left, None), (None, right), (None, None)]


def test_fma_rounds_once() -> None:
    a, b = 1 + 2.0**-12, 1 + 2.0**-12  # a * b = 1 + 2^-11 + 2^-24: a tie for float32, broken by c
    for c, bump in ((2.0**-80, 2.0**-23), (-(2.0**-80), 0.0), (0.0, 0.0)):
        got = fma(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64), torch.tensor([c]))
        assert got.item() == 1 + 2.0**-11 + bump
    assert np.isinf(fma(torch.tensor([1e30]).double(), torch.tensor([1e30]).double(), torch.ones(1)).item())


@pytest.mark.parametrize(("m", "l", "r"), SHAPES)
def test_native_equals_reference_bit_for_bit(isa: str, m: int, l: int, r: int) -> None:
    x = torch.randn(m, l * r, generator=torch.Generator().manual_seed(m))
    for left, right in factors(l, r):
        assert torch.equal(native.transform(x, left, right), transform_ref(x, left, right))


def test_chain_is_close_to_float64() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 200, generator=g), torch.randn(200, 11, generator=g)
    want = a.double() @ b.double()
    assert (chain_matmul(a, b) - want).norm() / want.norm() < 1e-6


def test_empty_strided_and_batched_rows(isa: str) -> None:
    (left, right), *_ = factors(12, 16)
    assert native.transform(torch.zeros(0, 192), left, right).shape == (0, 192)
    x = torch.randn(50, 384)[:, ::2]
    whole = native.transform(x, left, right)
    assert torch.equal(whole, transform_ref(x, left, right))
    assert torch.equal(whole[7:8], native.transform(x[7:8], left, right))


def test_wrong_factor_sizes_are_refused(isa: str) -> None:
    with pytest.raises(RuntimeError, match="left: size 3 does not divide the 10 features"):
        native.transform(torch.zeros(2, 10), Factor(torch.eye(3)), Factor(torch.eye(4)))


def test_close_to_float64_also_with_outliers() -> None:
    g = torch.Generator().manual_seed(0)
    for l, r in ((12, 16), (64, 64), (86, 128), (1, 173)):
        left, right = (rounded_factor(torch.linalg.qr(torch.randn(n, n, generator=g))[0]) for n in (l, r))
        x = torch.randn(20, l * r, generator=g)
        x[10:, 3] = 1000.0
        want = apply_kronecker(x.double(), left.double(), right.double())
        error = (transform_ref(x, Factor(left), Factor(right)) - want) / x.abs().amax(-1, keepdim=True)
        assert error.square().mean() < 2.0**-31 and error.abs().max() < 2.0**-13


def test_factors_keep_their_bounds_and_a_second_rounding_changes_nothing() -> None:
    g = torch.Generator().manual_seed(1)
    made = [torch.linalg.qr(torch.randn(n, n, generator=g))[0] for n in (1, 2, 17, 64, 128)]
    for matrix in (*made, torch.eye(86), torch.ones(9, 9), 1e6 * made[2], 1e-6 * made[2], torch.zeros(4, 4)):
        fixed, exponent = fixed_factor(matrix)
        assert fixed.long().abs().max() <= LARGEST and fixed.long().abs().sum(0).max() <= LARGEST_COLUMN
        rounded = rounded_factor(matrix)
        assert torch.equal(rounded, fixed.float() * 2.0**exponent)
        assert (rounded - matrix).abs().max() <= 2.0 ** (exponent - 1)
        x = torch.randn(5, len(matrix), generator=g)
        assert torch.equal(*(fixed_kronecker(x, None, fixed_factor(m)) for m in (matrix, rounded)))
    assert torch.equal(rounded_factor(hadamard(64)), hadamard(64))  # powers of two
    for bad in (torch.full((2, 2), float("nan")), torch.full((2, 2), 1e30)):
        with pytest.raises(ValueError, match="factor: expected finite values"):
            Factor(bad)
    with pytest.raises(ValueError, match="expected a square matrix"):
        Factor(torch.zeros(2, 3))


def test_the_largest_sums_fit(isa: str) -> None:
    """Every value, factor and rounding at its bound at once: a wrapped sum would change its sign."""
    for n in (2, 16, 65, 256):
        square = Factor(torch.ones(n, n))
        x = torch.full((2, n * n), 3.0)
        x[1] = -3.0
        y = native.transform(x, square, square)
        assert torch.equal(y, transform_ref(x, square, square))
        assert torch.allclose(y, x * n * n, rtol=1e-4)


def test_rounding_between_the_factors() -> None:
    most = LARGEST * LARGEST_COLUMN
    rows = torch.tensor([[LARGEST, -LARGEST], [LARGEST + 1, 1], [65278, 3], [65279, -65279], [most, -most], [0, 0]])
    got, shift = to_16_bits(rows.double())
    assert shift.tolist() == [0, 1, 1, 2, 16, 0]
    assert got.tolist() == [[LARGEST, -LARGEST], [16320, 1], [LARGEST, 2], [16320, -16320], [LARGEST, -LARGEST], [0, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_makes_its_row_nan(isa: str, bad: float) -> None:
    x = torch.ones(3, 192)
    x[1, 100] = bad
    for left, right in factors(12, 16)[:3]:
        for y in (native.transform(x, left, right), transform_ref(x, left, right)):
            assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_rows_near_zero(isa: str) -> None:
    x = torch.ones(4, 192)
    x[0], x[1], x[2], x[3] = 1e-40, 2.0**-100, 2.0**-99, 0.0
    left, right = factors(12, 16)[0]
    y = native.transform(x, left, right)
    assert torch.equal(y, transform_ref(x, left, right))
    assert not y[[0, 1, 3]].any() and y[2].any()
