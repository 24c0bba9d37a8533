"""Every kernel against the reference, bit for bit; attention and scores against the native library, which fixes the
order of their sums."""

from __future__ import annotations

import pytest
import torch

from quota.ops import ByteWeight, Factor, FloatWeight, GroupedWeight, PackedWeight, native, triton
from quota.ops.float_linear import float_linear_ref
from quota.ops.kv4_append import kv4_append_ref
from quota.ops.kv4_attention import kv4_attention_ref
from quota.ops.kv4_page_read import kv4_page_read_ref
from quota.ops.kv4_page_write import kv4_page_write_ref
from quota.ops.kv16_attention import kv16_attention_ref
from quota.ops.qkv_append import qkv_append_ref
from quota.ops.quantize_act import quantize_act_ref
from quota.ops.rms_norm import rms_norm_ref
from quota.ops.token_gather import token_gather_ref
from quota.ops.token_score import token_score_ref
from quota.ops.token_select import token_select_ref
from quota.ops.transform import transform_ref
from quota.ops.w4a4_linear import w4a4_linear_ref
from quota.ops.w4a16_linear import w4a16_linear_ref
from quota.ops.w8a8_linear import w8a8_linear_ref
from quota.quant.grouped import round_groups
from quota.quant.pack import pack_int4, pack_uint4
from tests.ops.kv import cache, filled
from tests.ops.test_kv4_paged_attention import case
from tests.ops.test_kv16_attention import case as case16
from tests.ops.test_kv16_attention import paged_case

G = torch.Generator().manual_seed(3)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


def same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    """Equal, NaN included."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(got, want, strict=True)
    )


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize(("m", "l", "r"), [(3, 3, 5), (1, 12, 16), (2, 1, 20)])
def test_transform_and_quantize_act(m: int, l: int, r: int) -> None:
    x, left, right = randn(m, l * r), Factor(randn(l, l)), Factor(randn(r, r))
    for a, b in ((left, right), (left, None), (None, right)):
        assert same((triton.transform(x, a, b),), (transform_ref(x, a, b),))
        assert same(triton.quantize_act(x, a, b, 0.83), quantize_act_ref(x, a, b, 0.83))


def test_factors_that_are_no_powers_of_two() -> None:
    x, left, right = randn(1, 2 * 6 * 37), Factor(randn(6, 6)), Factor(randn(37, 37))  # as 86 x 128 and 128 x 148
    assert same(triton.quantize_act(x, left, right, 0.9, "silu_mul"), quantize_act_ref(x, left, right, 0.9, "silu_mul"))


def test_prologues_of_extreme_values() -> None:
    x = randn(2, 2 * 33)
    x[0, :6] = torch.tensor([-95.0, 95.0, -87.0, 88.5, -0.0, 1e-30])
    for prologue, rows in (("silu_mul", x), ("quick_gelu", x[:, :33]), ("gelu", x[:, :33])):
        assert same(
            triton.quantize_act(rows, None, None, 0.9, prologue), quantize_act_ref(rows, None, None, 0.9, prologue)
        )
    with pytest.raises(ValueError, match="prologue"):
        triton.quantize_act(x, None, None, 1.0, "relu")


def test_nan_infinity_and_zero_rows() -> None:
    x = torch.ones(4, 21)
    x[1, 20], x[2, 3], x[3] = float("nan"), float("inf"), 0.0
    assert same(triton.quantize_act(x, None, None, 1.0), quantize_act_ref(x, None, None, 1.0))


@pytest.mark.parametrize(("m", "k"), [(1, 5), (3, 100)])
def test_rms_norm(m: int, k: int) -> None:
    x, weight = randn(m, k), randn(k)
    assert same((triton.rms_norm(x, weight, 1e-5),), (rms_norm_ref(x, weight, 1e-5),))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (2, 7, 3), (3, 1100, 33), (65, 66, 70)])  # 1100: K is split
def test_w4a4_linear(m: int, k: int, n: int) -> None:
    x, w = (torch.randint(-8, 8, shape, generator=G, dtype=torch.int8) for shape in ((m, k), (n, k)))
    weight, scale, bias = (
        PackedWeight(pack_int4(w), torch.rand(n, generator=G) + 0.01, k),
        torch.rand(m, generator=G) + 0.01,
        randn(n),
    )
    zero = torch.randint(-20, 20, (m,), generator=G, dtype=torch.int32)
    for b, z in ((None, None), (bias, zero)):
        assert torch.equal(
            triton.w4a4_linear(pack_int4(x), scale, weight, b, z), w4a4_linear_ref(pack_int4(x), scale, weight, b, z)
        )


def test_largest_sums_of_w4a4_linear() -> None:
    k = 18944
    weight = PackedWeight(torch.full((2, k // 2), 0x88, dtype=torch.uint8), torch.ones(2), k)
    x = torch.full((1, k // 2), 0x88, dtype=torch.uint8)
    assert torch.equal(triton.w4a4_linear(x, torch.ones(1), weight), torch.full((1, 2), 64.0 * k))


def grouped(k: int, n: int) -> GroupedWeight:
    q, scale, zero = round_groups(randn(n, k))
    return GroupedWeight(pack_uint4(q), scale, zero, k)


# Around a word (8 codes), a group (128), a panel (64 columns), a tile of few rows (16) and one of more.
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 1, 1), (1, 137, 65), (3, 128, 64), (17, 137, 63), (0, 16, 8), (5, 8, 0), (3, 0, 5), (20, 0, 5)],
)
def test_w4a16_linear(m: int, k: int, n: int) -> None:
    from quota_kernels.w4a16_linear import PANEL, w4a16_linear

    x, weight, bias = randn(m, k), grouped(k, n), randn(n)
    for rows, b in ((x, None), (x.half(), bias), (x.bfloat16(), bias)):
        want = w4a16_linear_ref(rows, weight, b)
        for split in (False, True):
            assert same((w4a16_linear(rows, *weight.panels(PANEL), n, b, split),), (want,)), (
                f"{rows.dtype} split={split}"
            )
    assert same((triton.w4a16_linear(x, weight, bias),), (w4a16_linear_ref(x, weight, bias),))


def test_w4a16_linear_of_a_row_is_the_same_in_every_batch_and_layout() -> None:
    x, weight = randn(19, 40), grouped(40, 9)
    whole = triton.w4a16_linear(x, weight)
    for part in (slice(0, 1), slice(3, 8), slice(2, 19)):
        assert same((triton.w4a16_linear(x[part], weight),), (whole[part],))
    strided = torch.stack((x, x), -1).flatten(-2)[:, ::2]
    assert not strided.is_contiguous() and same((triton.w4a16_linear(strided, weight),), (whole,))


def test_w4a16_linear_of_extreme_values() -> None:
    x, weight = randn(5, 140), grouped(140, 20)
    x[0, 3], x[1, 130], x[2, 5], x[3], x[4] = float("inf"), float("nan"), 1e-42, 0.0, -0.0
    for rows in (x, x.repeat(4, 1)):
        assert same((triton.w4a16_linear(rows, weight),), (w4a16_linear_ref(rows, weight),))


def test_w4a16_linear_refuses_what_does_not_fit() -> None:
    weight = grouped(40, 9)
    with pytest.raises(ValueError, match="x: expected 33 to 40 features, got 41"):
        triton.w4a16_linear(randn(2, 41), weight)
    with pytest.raises(ValueError, match=r"bias: expected \[9\], got \[3\]"):
        triton.w4a16_linear(randn(2, 40), weight, randn(3))


def test_float_linear() -> None:
    x, w = randn(3, 40), FloatWeight(randn(70, 40).half())
    assert same((triton.float_linear(x, w),), (float_linear_ref(x, w),))


def test_kv4_append_writes_only_its_slots() -> None:
    x = randn(2, 3, 5, 22)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = float("nan"), float("inf")
    first = cache(randn(2, 3, 2, 22), 9)
    second = tuple(t.clone() for t in first)
    triton.kv4_append(*first, x, 2, 0.9)
    kv4_append_ref(*second, x, 2, 0.9)
    assert same(first, second)
    with pytest.raises(ValueError, match="expected room"):
        triton.kv4_append(*first, x, 5, 0.9)


@pytest.mark.parametrize(("b", "t", "h", "hkv", "d"), [(2, 2, 4, 2, 22), (1, 3, 9, 1, 16)])
def test_qkv_append(b: int, t: int, h: int, hkv: int, d: int) -> None:
    qkv, turns = randn(b, t, (h + 2 * hkv) * d), (randn(b, t, d), randn(b, t, d))
    both = (Factor(randn(d, d)), Factor(randn(d, d)))
    for rotary, transforms in ((turns, both), (None, (None, both[1])), ((turns[0][:1], turns[1][:1]), (None, None))):
        k, v = cache(randn(b, hkv, 2, d), 9), cache(randn(b, hkv, 2, d), 9)
        k_ref, v_ref = (tuple(x.clone() for x in kv) for kv in (k, v))
        got, want = (
            f(qkv, rotary, transforms, *kv, 2, (0.9, 0.8))
            for f, kv in ((triton.qkv_append, (k, v)), (qkv_append_ref, (k_ref, v_ref)))
        )
        assert same((got, *k, *v), (want, *k_ref, *v_ref))


SHAPES = [
    (2, 4, 2, 5, 9, 16),
    (1, 2, 1, 1, 130, 22),
    (1, 7, 1, 3, 70, 36),
    (1, 2, 2, 20, 70, 8),
    (1, 40, 1, 1, 70, 256),
]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("b", "h", "hkv", "t", "s", "d"), SHAPES)
def test_kv4_attention(b: int, h: int, hkv: int, t: int, s: int, d: int, split: bool) -> None:
    from quota_kernels.kv4_attention import kv4_attention

    start = torch.arange(b, dtype=torch.int32) * 6  # the second row is padded past its first query
    args = (
        randn(b, h, t, d),
        filled(cache(randn(b, hkv, s, d), s + 5), 3),
        cache(randn(b, hkv, s, d), s + 5),
        s,
        start,
        d**-0.5,
    )
    (out, lse), (want, want_lse) = kv4_attention(*args, split=split), kv4_attention_ref(*args)
    seen = want_lse.isfinite()
    assert (
        relative(out, want) < 5e-7
        and torch.equal(seen, lse.isfinite())
        and (lse[seen] - want_lse[seen]).abs().max() < 1e-5
    )
    assert (out[~seen.transpose(1, 2)] == 0).all()
    if native.why_not() is None:
        assert torch.equal(out, native.kv4_attention(*args)[0])


def test_shared_channels_and_strided_caches() -> None:
    from quota_kernels.kv4_attention import kv4_attention

    q, shared = randn(1, 4, 2, 22 + 10), randn(1, 10, 80)
    k, v = (tuple(t[1:] for t in cache(randn(2, 2, 75, 22), 80)) for _ in range(2))
    args = (q, k, v, 75, None, 0.2, shared)
    for split in (False, True):
        out = kv4_attention(*args, split=split)[0]
        assert relative(out, kv4_attention_ref(*args)[0]) < 1e-5
        if native.why_not() is None:
            assert torch.equal(out, native.kv4_attention(*args)[0])


def test_nan_reaches_the_rows_that_see_it() -> None:
    from quota_kernels.kv4_attention import kv4_attention

    q, k, v = randn(1, 1, 70, 16), cache(randn(1, 1, 70, 16), 70), cache(randn(1, 1, 70, 16), 70)
    k[1][0, 0, 40] = v[2][0, 0, 66] = float("nan")
    for split in (False, True):
        out = kv4_attention(q, k, v, 70, None, 0.25, split=split)[0][0, :, 0]
        assert out[40:].isnan().all() and out[:40].isfinite().all()


def test_pages() -> None:
    pages = cache(randn(6, 2, 4, 6), 4)
    mine = tuple(t.clone() for t in pages)
    rows, slot = cache(randn(1, 2, 5, 6), 5), torch.tensor([3, -1, 17, 8, 0])
    triton.kv4_page_write(mine, rows, slot)
    kv4_page_write_ref(pages, rows, slot)
    assert same(mine, pages)
    table, length = torch.tensor([[4, 2, 0], [1, -1, -1]], dtype=torch.int32), torch.tensor([9, 3], dtype=torch.int32)
    assert same(triton.kv4_page_read(pages, table, length, 11), kv4_page_read_ref(pages, table, length, 11))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("sizes", [(4, 2, 16, 4, 1, (5, 0, 70)), (3, 1, 22, 16, 3, (130, 3))])
def test_kv4_paged_attention(sizes: tuple, split: bool) -> None:
    from quota_kernels.kv4_paged_attention import kv4_paged_attention

    for extra in (0, 6):
        args = case(*sizes, extra=extra)
        (out, lse), (want, want_lse) = kv4_paged_attention(*args, split=split), native.kv4_paged_attention(*args)
        seen = want_lse.isfinite()
        assert (
            torch.equal(out, want)
            and torch.equal(seen, lse.isfinite())
            and (lse[seen] - want_lse[seen]).abs().max() < 1e-5
        )
    q, k, v, *rest = case(*sizes)
    with pytest.raises(ValueError, match="whole, contiguous pages"):
        kv4_paged_attention(q, tuple(t[:, :, 1:] for t in k), v, *rest)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 5, 9, 16), (1, 2, 1, 9, 70, 22), (1, 1, 1, 1, 130, 7)])
def test_kv16_attention(sizes: tuple) -> None:
    args = case16(*sizes)
    (out, lse), (want, want_lse) = triton.kv16_attention(*args), kv16_attention_ref(*args)
    seen = want_lse.isfinite()
    assert relative(out, want) < 5e-7 and torch.equal(seen, lse.isfinite())
    assert (lse[seen] - want_lse[seen]).abs().max() < 1e-5 and (out[~seen.transpose(1, 2)] == 0).all()
    if native.why_not() is None:
        assert torch.equal(out, native.kv16_attention(*args)[0])


def test_kv16_paged_attention_and_nan() -> None:
    q, k, v, *rest = paged_case(4, 2, 16, 4, 1, (5, 0, 70))
    (out, lse), (want, want_lse) = (
        triton.kv16_paged_attention(q, k, v, *rest),
        native.kv16_paged_attention(q, k, v, *rest),
    )
    seen = want_lse.isfinite()
    assert torch.equal(out, want) and (lse[seen] - want_lse[seen]).abs().max() < 1e-5
    with pytest.raises(ValueError, match="whole, contiguous pages"):
        triton.kv16_paged_attention(q, k[:, :, 1:], v, *rest)
    q, k, v, *rest = case16(1, 1, 1, 70, 70, 8)
    v[0, 0, 66] = float("nan")
    out = triton.kv16_attention(q, k, v, *rest)[0][0, :, 0]
    assert out[66:].isnan().all() and out[:66].isfinite().all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 3), (17, 70, 100)])
def test_w8a8_linear(m: int, n: int, k: int) -> None:
    x = randn(m, k)
    x[0, 0] = float("nan") if m > 1 else 1.0
    weight = ByteWeight(torch.randint(-127, 128, (n, k), generator=G, dtype=torch.int8), randn(n).abs())
    for bias in (randn(n), None):
        assert same((triton.w8a8_linear(x, weight, bias),), (w8a8_linear_ref(x, weight, bias),))


def test_token_select_and_gather() -> None:
    score = torch.randint(0, 5, (2, 70), generator=G).float()
    score[0, 3], score[1, 60], score[1, 61] = float("nan"), float("inf"), -0.0
    eligible, keep = torch.rand(2, 70, generator=G) < 0.7, torch.tensor([20, 100])
    assert torch.equal(triton.token_select(score, eligible, keep), token_select_ref(score, eligible, keep))
    index = torch.randint(0, 70, (2, 5), generator=G)
    for x in (randn(2, 70, 3), randn(2, 70, 3).half(), score > 2, randn(2, 70, 0)):
        assert torch.equal(triton.token_gather(x, index), token_gather_ref(x, index))


@pytest.mark.parametrize("packed", [True, False])
def test_token_score(packed: bool) -> None:
    b, h, hkv, s, d = 2, 4, 2, 70, 10
    q, x = randn(b, h, s, d), randn(b, hkv, s, d)
    k = cache(x, s) if packed else x
    lse = randn(b, h, s).abs() + 2
    column = torch.arange(s)
    text, visual = (column > 65).repeat(b, 1), (column < 66).repeat(b, 1) & (torch.rand(b, s, generator=G) < 0.8)
    text[1] = False
    got, want = triton.token_score(q, k, lse, text, visual, 0.3), token_score_ref(q, k, lse, text, visual, 0.3)
    assert all(relative(a, w) < 1e-6 for a, w in zip(got, want, strict=True)) and not got[0][1].any()
    if native.why_not() is None:
        assert same(got, native.token_score(q, k, lse, text, visual, 0.3))
