import pytest
import torch

from quota.ops import native
from quota.ops.kv4_append import kv4_append_ref


def empty(b: int, h: int, c: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.full((b, h, c, d // 2), 77, dtype=torch.uint8), torch.full((b, h, c), 3.0), torch.full((b, h, c), 4.0)


@pytest.mark.parametrize(
    ("b", "h", "t", "d"), [(1, 1, 1, 2), (2, 3, 5, 64), (1, 2, 3, 22), (2, 1, 4, 130), (1, 1, 0, 8)]
)
def test_native_equals_reference_bit_for_bit(isa: str, b: int, h: int, t: int, d: int) -> None:
    x = torch.randn(b, t, h, d, generator=torch.Generator().manual_seed(d)).transpose(1, 2) * 3 + 1
    got, want = empty(b, h, t + 4, d), empty(b, h, t + 4, d)
    native.kv4_append(*got, x, 3, 0.87)
    kv4_append_ref(*want, x, 3, 0.87)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_strided_cache_and_constant_rows(isa: str) -> None:
    whole, want = empty(3, 2, 9, 8), empty(1, 2, 9, 8)
    x = torch.cat((torch.full((1, 2, 1, 8), -5.0), torch.zeros(1, 2, 1, 8)), 2)
    native.kv4_append(*(t[1:2] for t in whole), x, 0, 1.0)
    kv4_append_ref(*want, x, 0, 1.0)
    assert all(torch.equal(g[1:2], w) for g, w in zip(whole, want, strict=True))
    assert (whole[0][0] == 77).all() and (whole[0][2] == 77).all()


def test_nan_reaches_scale_and_zero(isa: str) -> None:
    for at in (0, 15, 20):
        got, x = empty(1, 1, 1, 22), torch.ones(1, 1, 1, 22)
        x[..., at] = float("nan")
        native.kv4_append(*got, x, 0, 1.0)
        assert got[1].isnan().all() and got[2].isnan().all()


def test_overflowing_the_cache_is_refused(isa: str) -> None:
    with pytest.raises(RuntimeError, match=r"expected room for slots 3\.\.5"):
        native.kv4_append(*empty(1, 1, 4, 8), torch.zeros(1, 1, 2, 8), 3, 1.0)
