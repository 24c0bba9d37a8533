from collections.abc import Callable

import pytest
import torch

from quota.ops import PackedWeight, native
from quota.ops.w4a4_linear import w4a4_linear_ref
from quota.quant.pack import pack_int4

SHAPES = [
    (1, 1, 1),
    (1, 192, 64),
    (2, 7, 3),
    (3, 64, 65),
    (7, 33, 130),
    (8, 40, 16),
    (9, 16, 63),
    (13, 129, 100),
    (100, 48, 70),
    (0, 16, 8),
    (5, 8, 0),
]


def case(
    m: int, k: int, n: int, extreme: bool = False
) -> tuple[torch.Tensor, torch.Tensor, PackedWeight, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(m * 7 + k * 3 + n)
    x, w = (torch.randint(-8, 8, s, generator=g, dtype=torch.int8) for s in ((m, k), (n, k)))
    if extreme:
        x, w = torch.full_like(x, -8), torch.full_like(w, -8)
    weight = PackedWeight(pack_int4(w), torch.rand(n, generator=g) + 0.01, k)
    return (
        pack_int4(x),
        torch.rand(m, generator=g) + 0.01,
        weight,
        torch.randn(n, generator=g),
        torch.randint(-20, 20, (m,), generator=g, dtype=torch.int32),
    )


def assert_exact(m: int, k: int, n: int) -> None:
    x, scale, weight, bias, zero = case(m, k, n)
    for b in (None, bias):
        for z in (None, zero):
            assert torch.equal(native.w4a4_linear(x, scale, weight, b, z), w4a4_linear_ref(x, scale, weight, b, z)), (
                f"M={m} K={k} N={n}"
            )


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_native_equals_reference_bit_for_bit(isa: str, m: int, k: int, n: int) -> None:
    assert_exact(m, k, n)


# Around every block size of a kernel: rows of a tile (6, 16, 32), of a task (320, 480), columns of a register, a tile
# and a panel.
@pytest.mark.parametrize("m", [1, 4, 5, 6, 7, 12, 13, 16, 17, 31, 33, 48, 49, 320, 321, 481, 1000])
@pytest.mark.parametrize("n", [1, 15, 17, 63, 64, 65])
def test_row_and_column_tails(isa: str, m: int, n: int) -> None:
    assert_exact(m, 68, n)


# A step of 64, blocks of 512, the widths of the 7B models.
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 63, 64, 65, 127, 511, 512, 513, 1027, 4096, 11008])
@pytest.mark.parametrize("m", [1, 5, 33])
def test_k_tails(isa: str, m: int, k: int) -> None:
    assert_exact(m, k, 66)


def test_activations_larger_than_the_cache(isa: str) -> None:
    assert_exact(352, 3200, 330)  # 1.1 MB: several panels share a pass over them, the last group is not full


def test_very_many_rows(isa: str) -> None:
    assert_exact(40_001, 8, 3)


def test_largest_sums_do_not_saturate(isa: str) -> None:
    for m in (1, 9):
        x, scale, weight, bias, _ = case(m, 4096, 5, extreme=True)
        assert torch.equal(native.w4a4_linear(x, scale, weight, bias), w4a4_linear_ref(x, scale, weight, bias))


def test_result_does_not_depend_on_batch_or_threads(isa: str, threads: Callable[[int], None]) -> None:
    x, scale, weight, bias, _ = case(700, 1100, 200)
    threads(1)
    one = native.w4a4_linear(x, scale, weight, bias)
    assert torch.equal(one, w4a4_linear_ref(x, scale, weight, bias))
    for count in (2, 3, 7):
        threads(count)
        assert torch.equal(native.w4a4_linear(x, scale, weight, bias), one)
    for rows in (slice(0, 1), slice(5, 9), slice(100, 117), slice(300, 340), slice(0, 699)):
        assert torch.equal(native.w4a4_linear(x[rows], scale[rows], weight, bias), one[rows])


def test_strided_input(isa: str) -> None:
    x, scale, weight, _, _ = case(12, 40, 9)
    wide = torch.stack((x, x), -1).flatten(-2)[:, ::2]
    assert not wide.is_contiguous() and torch.equal(
        native.w4a4_linear(wide, scale, weight), w4a4_linear_ref(x, scale, weight)
    )


def test_wrong_shapes_are_refused(isa: str) -> None:
    x, scale, weight, bias, _ = case(2, 16, 8)
    with pytest.raises(RuntimeError, match=r"x_q: expected shape \[any, 8\], got \[2, 4\]"):
        native.w4a4_linear(x[:, :4], scale, weight)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[8\], got \[3\]"):
        native.w4a4_linear(x, scale, weight, bias[:3])
    with pytest.raises(ValueError, match="w_q: expected uint8"):
        PackedWeight(x, scale, 17)
