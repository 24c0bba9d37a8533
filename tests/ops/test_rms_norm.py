import pytest
import torch

from quota.ops import native
from quota.ops.rms_norm import rms_norm_ref


@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 16), (5, 40), (2, 257), (0, 8)])
def test_native_equals_reference_bit_for_bit(isa: str, m: int, k: int) -> None:
    g = torch.Generator().manual_seed(k)
    x, weight = torch.randn(m, k, generator=g) * 3, torch.randn(k, generator=g)
    for scale in (1.0, 1e-12, 1e12):
        assert torch.equal(native.rms_norm(x * scale, weight, 1e-5), rms_norm_ref(x * scale, weight, 1e-5))


def test_it_is_the_root_mean_square(isa: str) -> None:
    x, weight = torch.randn(7, 300), torch.rand(300)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert (native.rms_norm(x, weight, 1e-6) - want).norm() < 3e-7 * want.norm()


def test_rows_and_strides(isa: str) -> None:
    x, weight = torch.randn(40, 200)[:, ::2], torch.rand(100)
    whole = native.rms_norm(x, weight, 1e-6)
    assert torch.equal(whole[7:8], native.rms_norm(x[7:8], weight, 1e-6))
    assert native.rms_norm(torch.full((1, 20), float("nan")), torch.ones(20), 1e-6).isnan().all()


def test_wrong_weight_is_refused(isa: str) -> None:
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[8\], got \[7\]"):
        native.rms_norm(torch.zeros(2, 8), torch.ones(7), 1e-6)
