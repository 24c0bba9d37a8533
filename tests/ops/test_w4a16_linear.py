from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from quota.core.formats import INT4_GROUPS
from quota.ops import GroupedWeight, native
from quota.ops.w4a16_linear import w4a16_linear_ref
from quota.quant.grouped import dequantize_groups, round_groups
from quota.quant.pack import pack_uint4, unpack_uint4


def case(m: int, k: int, n: int, symmetric: bool = False) -> tuple[torch.Tensor, GroupedWeight, torch.Tensor]:
    g = torch.Generator().manual_seed(m * 7 + k * 3 + n)
    q, scale, zero = round_groups(torch.randn(n, k, generator=g), replace(INT4_GROUPS, symmetric=symmetric))
    return torch.randn(m, k, generator=g), GroupedWeight(pack_uint4(q), scale, zero, k), torch.randn(n, generator=g)


# Around every block of a kernel: streamed rows (4), rows of a tile (6, 12) and of a pass (64), a word (8 codes), a
# group (128), a panel (64 columns).
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (1, 1, 1),
        (1, 128, 64),
        (1, 129, 65),
        (1, 300, 130),
        (2, 7, 3),
        (2, 127, 63),
        (3, 64, 65),
        (4, 257, 16),
        (5, 33, 130),
        (6, 136, 15),
        (7, 9, 63),
        (13, 129, 100),
        (64, 40, 17),
        (65, 131, 70),
        (130, 48, 66),
        (0, 16, 8),
        (5, 8, 0),
        (3, 0, 5),
        (9, 0, 5),
    ],
)
def test_native_equals_reference_bit_for_bit(isa: str, m: int, k: int, n: int) -> None:
    for symmetric in (False, True):
        x, weight, bias = case(m, k, n, symmetric)
        for b in (None, bias):
            for rows in (x, x.bfloat16()):
                got = native.w4a16_linear(rows, weight, b)
                assert got.dtype == rows.dtype and torch.equal(got, w4a16_linear_ref(rows, weight, b)), (
                    f"M={m} K={k} N={n}"
                )


def test_reference_is_the_dequantized_product() -> None:
    x, weight, bias = case(11, 300, 37)
    w = dequantize_groups(unpack_uint4(weight.w_q, 300), weight.w_scale, weight.w_zero)
    expected = x.double() @ w.double().T + bias.double()
    assert torch.allclose(w4a16_linear_ref(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-4)
    half = w4a16_linear_ref(x.bfloat16(), weight, bias)
    assert torch.equal(half, w4a16_linear_ref(x.bfloat16().float(), weight, bias).bfloat16())


def test_result_does_not_depend_on_batch_or_threads(isa: str, threads: Callable[[int], None]) -> None:
    x, weight, bias = case(140, 1100, 200)
    threads(1)
    one = native.w4a16_linear(x, weight, bias)
    for count in (2, 3):
        threads(count)
        assert torch.equal(native.w4a16_linear(x, weight, bias), one)
    for rows in (slice(0, 1), slice(5, 7), slice(9, 12), slice(20, 24), slice(30, 35), slice(0, 139)):
        assert torch.equal(native.w4a16_linear(x[rows], weight, bias), one[rows])


def test_extreme_values_follow_the_reference(isa: str) -> None:
    x, weight, _ = case(6, 260, 20)
    x[0, 3], x[1, 200], x[2, 5], x[3] = float("inf"), float("nan"), 1e-42, 0.0
    for rows in (x, x[:2], x[2:4]):
        assert torch.equal(
            native.w4a16_linear(rows, weight).nan_to_num(nan=7.0), w4a16_linear_ref(rows, weight).nan_to_num(nan=7.0)
        )


def test_strided_input(isa: str) -> None:
    x, weight, _ = case(12, 40, 9)
    wide = torch.stack((x, x), -1).flatten(-2)[:, ::2]
    assert not wide.is_contiguous() and torch.equal(native.w4a16_linear(wide, weight), w4a16_linear_ref(x, weight))


def test_wrong_shapes_are_refused(isa: str) -> None:
    x, weight, bias = case(2, 200, 8)
    with pytest.raises(RuntimeError, match=r"words: expected shape \[1, 12, 64\], got \[1, 25, 64\]"):
        native.w4a16_linear(x[:, :96], weight)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[8\], got \[3\]"):
        native.w4a16_linear(x, weight, bias[:3])
    with pytest.raises(ValueError, match=r"w_zero: expected torch.uint8 \[8, 2\], got torch.uint8 \[8, 1\]"):
        GroupedWeight(weight.w_q, weight.w_scale, weight.w_zero[:, :1], 200)
    with pytest.raises(ValueError, match="w_q: expected uint8"):
        GroupedWeight(weight.w_q, weight.w_scale, weight.w_zero, 202)
