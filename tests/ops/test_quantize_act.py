from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quota.ops import native
from quota.ops.quantize_act import quantize_act_ref
from quota.ops.weights import Factor
from quota.quant.pack import unpack_int4

SHAPES = [(1, 1, 1), (3, 3, 5), (2, 12, 16), (5, 3, 17), (4, 1, 64), (2, 15, 33)]


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("m", "l", "r"), SHAPES)
@pytest.mark.parametrize("clip", [1.0, 0.83])
def test_native_equals_reference_bit_for_bit(isa: str, m: int, l: int, r: int, clip: float) -> None:
    g = torch.Generator().manual_seed(m + r)
    x, left, right = (torch.randn(*s, generator=g) for s in ((m, l * r), (l, l), (r, r)))
    left, right = Factor(left), Factor(right)
    for a, b in ((left, right), (left, None), (None, right), (None, None)):
        assert same(native.quantize_act(x, a, b, clip), quantize_act_ref(x, a, b, clip))


@pytest.mark.parametrize(("m", "l", "r"), SHAPES)
def test_prologues_equal_the_reference_bit_for_bit(isa: str, m: int, l: int, r: int) -> None:
    g = torch.Generator().manual_seed(m + r)
    x, left, right = (torch.randn(*s, generator=g) for s in ((m, 2 * l * r), (l, l), (r, r)))
    left, right = Factor(left), Factor(right)
    x[0, 0], x[0, -1] = -95.0, 95.0
    for a, b in ((left, right), (None, None)):
        assert same(native.quantize_act(x, a, b, 0.9, "silu_mul"), quantize_act_ref(x, a, b, 0.9, "silu_mul"))
        half = x[:, : l * r]
        for name in ("quick_gelu", "gelu"):
            assert same(native.quantize_act(half, a, b, 0.9, name), quantize_act_ref(half, a, b, 0.9, name))


def test_gelu_of_many_values(isa: str) -> None:
    x = torch.cat(
        [torch.linspace(-20, 20, 4000), torch.tensor([1e-40, -1e-40, -0.0, 3e38, -3e38, 16.0, -16.0, 1e-30])]
    ).view(24, 167)
    for rows in (x, x[:, None].reshape(-1, 1)):  # alone, a value is its row's largest: the scale is its bits
        assert same(native.quantize_act(rows, None, None, 0.9, "gelu"), quantize_act_ref(rows, None, None, 0.9, "gelu"))
    for bad in (float("nan"), float("inf"), -float("inf")):
        got, want = (
            f(torch.tensor([[bad]]), None, None, 1.0, "gelu")[1] for f in (native.quantize_act, quantize_act_ref)
        )
        assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0))


def test_wrong_prologues_are_refused(isa: str) -> None:
    with pytest.raises(ValueError, match="prologue: expected one of silu_mul, quick_gelu, gelu, got 'relu'"):
        native.quantize_act(torch.zeros(1, 4), None, None, 1.0, "relu")
    with pytest.raises(RuntimeError, match="halves of one size, got 5"):
        native.quantize_act(torch.zeros(1, 5), None, None, 1.0, "silu_mul")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_any_finite_row(isa: str, values: list[float]) -> None:
    x = torch.tensor([values])
    assert same(native.quantize_act(x, None, None, 0.9), quantize_act_ref(x, None, None, 0.9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 15, 16, 20])
def test_nan_and_infinity_reach_the_scale(isa: str, bad: float, at: int) -> None:
    x = torch.ones(2, 21)
    x[1, at] = bad
    (q, scale), (want_q, want) = native.quantize_act(x, None, None, 1.0), quantize_act_ref(x, None, None, 1.0)
    assert (
        not scale[1].isfinite() and torch.equal(q, want_q) and torch.equal(scale.nan_to_num(1e9), want.nan_to_num(1e9))
    )
    assert not unpack_int4(q, 21)[1].any()


def test_result_does_not_depend_on_batch_or_threads(isa: str, threads: Callable[[int], None]) -> None:
    g = torch.Generator().manual_seed(0)
    x, left, right = (torch.randn(*s, generator=g) for s in ((129, 192), (12, 12), (16, 16)))
    left, right = Factor(left), Factor(right)
    threads(1)
    one = native.quantize_act(x, left, right, 0.9)
    threads(3)
    assert same(native.quantize_act(x, left, right, 0.9), one)
    for i in (0, 64, 128):
        assert same(native.quantize_act(x[i : i + 1], left, right, 0.9), (one[0][i : i + 1], one[1][i : i + 1]))
