import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quota.quant.transform import apply_kronecker, decompose, hadamard, inverse_on_weight


@given(st.integers(1, 20000))
def test_decompose_multiplies_back(n: int) -> None:
    l, r = decompose(n)
    assert l * r == n and l <= r


KNOWN = [
    (4096, (64, 64)),
    (11008, (86, 128)),
    (5120, (64, 80)),
    (13824, (108, 128)),
    (192, (12, 16)),
    (512, (16, 32)),
    (13, (1, 13)),
]


@pytest.mark.parametrize(("n", "sizes"), KNOWN)
def test_decompose_known_sizes(n: int, sizes: tuple[int, int]) -> None:
    assert decompose(n) == sizes


@pytest.mark.parametrize("n", [1, 2, 3, 12, 16, 43, 86, 128])
def test_hadamard_is_orthogonal(n: int) -> None:
    h = hadamard(n).double()
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("parts", ["both", "left", "right", "none"])
def test_transform_and_its_inverse_on_the_weight_cancel(parts: str) -> None:
    g = torch.Generator().manual_seed(0)
    left = torch.randn(3, 3, generator=g, dtype=torch.float64) if parts in ("both", "left") else None
    right = torch.randn(4, 4, generator=g, dtype=torch.float64) if parts in ("both", "right") else None
    x, w = torch.randn(5, 12, generator=g, dtype=torch.float64), torch.randn(7, 12, generator=g, dtype=torch.float64)
    torch.testing.assert_close(apply_kronecker(x, left, right) @ inverse_on_weight(w, left, right).T, x @ w.T)


def test_row_convention_is_x_times_left_kron_right() -> None:
    g = torch.Generator().manual_seed(1)
    left, right, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 3), (4, 4), (2, 12)))
    torch.testing.assert_close(apply_kronecker(x, left, right), x @ torch.kron(left, right))
