import numpy as np
import pytest
import torch

from quota.ops import native
from quota.ops.fma import chain_matmul, fma
from quota.ops.transform import transform_ref

SHAPES = [(1, 1, 1), (5, 3, 7), (2, 12, 16), (7, 16, 33), (4, 1, 64), (3, 17, 1), (3, 23, 40), (2, 30, 86)]


def factors(l: int, r: int) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    g = torch.Generator().manual_seed(l * 100 + r)
    left, right = torch.randn(l, l, generator=g), torch.randn(r, r, generator=g)
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
    whole = native.transform(x, left.T, right.T)
    assert torch.equal(whole, transform_ref(x, left.T, right.T))
    assert torch.equal(whole[7:8], native.transform(x[7:8], left.T, right.T))


def test_wrong_factor_sizes_are_refused(isa: str) -> None:
    with pytest.raises(RuntimeError, match="left: size 3 does not divide the 10 features"):
        native.transform(torch.zeros(2, 10), torch.eye(3), torch.eye(4))
