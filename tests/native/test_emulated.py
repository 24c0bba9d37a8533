"""The CUDA kernels against the references, played by tests/native/emulation.h: index arithmetic, operand layouts,
barriers, pipelines.

What this cannot see: whether the hardware's instructions are as the PTX tables say, memory ordering between proxies,
and speed.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from quota.ops import native
from quota.ops.kv4_append import kv4_append_ref
from quota.ops.kv4_attention import kv4_attention_ref
from quota.ops.kv4_paged_attention import kv4_paged_attention_ref
from quota.ops.qkv_append import qkv_append_ref
from quota.ops.quantize_act import quantize_act_ref
from quota.ops.transform import transform_ref
from quota.ops.w4a4_linear import w4a4_linear_ref
from quota.ops.weights import Factor, PackedWeight
from quota.quant.pack import pack_int4
from tests.ops.kv import cache

WAYS = ("few4", "few8", "tile4", "tile8", "warpgroup")


def product(
    m: int, k: int, n: int, low: int = -8, high: int = 8
) -> tuple[torch.Tensor, torch.Tensor, PackedWeight, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(m * 7 + k * 3 + n)
    x, w = (torch.randint(low, high, s, generator=g, dtype=torch.int8) for s in ((m, k), (n, k)))
    weight = PackedWeight(pack_int4(w), torch.rand(n, generator=g) + 0.01, k)
    return (
        pack_int4(x),
        torch.rand(m, generator=g) + 0.01,
        weight,
        torch.randn(n, generator=g),
        torch.randint(-20, 20, (m,), generator=g, dtype=torch.int32),
    )


def assert_exact(emulated: ModuleType, way: str, m: int, k: int, n: int) -> None:
    x, scale, weight, bias, zero = product(m, k, n)
    for b, z in ((None, None), (bias, zero)):
        assert torch.equal(
            emulated.w4a4_linear(x, scale, weight, b, z, way), w4a4_linear_ref(x, scale, weight, b, z)
        ), f"{way} M={m} K={k} N={n}"


# Around tiles of 8, 16, 64 and 128 rows and channels, steps of 128 values of k, 4 stages; odd k; k that 16-byte copies
# cannot read in place.
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (2, 127, 17), (8, 129, 16), (9, 544, 130), (16, 1281, 33)])
@pytest.mark.parametrize("way", WAYS)
def test_linear_equals_the_reference_bit_for_bit(emulated: ModuleType, way: str, m: int, k: int, n: int) -> None:
    assert_exact(emulated, way, m, k, n)


@pytest.mark.parametrize(("m", "k", "n"), [(17, 256, 129), (65, 1155, 70), (150, 640, 40)])
@pytest.mark.parametrize("way", ["tile4", "tile8", "warpgroup"])
def test_linear_of_many_rows(emulated: ModuleType, way: str, m: int, k: int, n: int) -> None:
    assert_exact(emulated, way, m, k, n)


@pytest.mark.parametrize("way", WAYS)
def test_linear_in_any_order_of_threads(emulated: ModuleType, order: str, way: str) -> None:
    assert_exact(emulated, way, 13, 1700, 20)


# One processor: no splits of k, and every width of a wgmma tile comes up.
@pytest.mark.parametrize("m", [33, 70, 100, 160, 190])
def test_every_width_of_a_warpgroup_tile(emulated: ModuleType, m: int) -> None:
    emulated._library.use_device(90, 1)
    try:
        assert_exact(emulated, "warpgroup", m, 300, 9)
    finally:
        emulated._library.use_device(90, 132)


def test_the_largest_sums_are_exact(emulated: ModuleType) -> None:
    for way in WAYS:
        x, scale, weight, bias, _ = product(3, 2048, 5, -8, -7)
        assert torch.equal(
            emulated.w4a4_linear(x, scale, weight, bias, None, way), w4a4_linear_ref(x, scale, weight, bias)
        )


def factor(n: int, g: torch.Generator) -> Factor:
    return Factor(torch.randn(n, n, generator=g) / n**0.5)


@pytest.mark.parametrize(
    ("m", "left", "right"),
    [(3, 4, 6), (2, 5, 7), (1, 9, 64), (2, 43, 64), (2, 12, 0), (3, 0, 20), (2, 0, 0), (1, 1, 31)],
)
@pytest.mark.parametrize("prologue", [None, "silu_mul", "quick_gelu", "gelu"])
def test_quantize_act_equals_the_reference_bit_for_bit(
    emulated: ModuleType, m: int, left: int, right: int, prologue: str | None
) -> None:
    g = torch.Generator().manual_seed(left + right)
    k = (left or 3) * (right or 7)
    x = torch.randn(m, 2 * k if prologue == "silu_mul" else k, generator=g) * 3
    factors = [factor(n, g) if n else None for n in (left, right)]
    for got, want in zip(
        emulated.quantize_act(x, *factors, 0.9, prologue), quantize_act_ref(x, *factors, 0.9, prologue), strict=True
    ):
        assert torch.equal(got, want)
    if prologue is None:
        assert torch.equal(emulated.transform(x, *factors), transform_ref(x, *factors))


def test_transform_of_many_rows(emulated: ModuleType, order: str) -> None:
    g = torch.Generator().manual_seed(1)
    emulated._library.use_device(90, 1)  # so that this is much work: the wide tile
    x, left, right = torch.randn(9, 13 * 36, generator=g), factor(13, g), factor(36, g)
    codes = emulated.quantize_act(x, left, right, 1.0)
    emulated._library.use_device(90, 132)
    assert all(torch.equal(a, b) for a, b in zip(codes, quantize_act_ref(x, left, right, 1.0), strict=True))


def test_quantize_act_of_rows_that_are_not_numbers(emulated: ModuleType) -> None:
    x = torch.randn(4, 12)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0.0
    for got, want in zip(emulated.quantize_act(x, None, None, 1.0), quantize_act_ref(x, None, None, 1.0), strict=True):
        assert torch.equal(got.nan_to_num(nan=-1.0), want.nan_to_num(nan=-1.0))


@pytest.mark.parametrize(("b", "h", "t", "d"), [(1, 1, 1, 2), (2, 3, 5, 34), (1, 2, 9, 128)])
def test_append_equals_the_reference_bit_for_bit(emulated: ModuleType, b: int, h: int, t: int, d: int) -> None:
    x = torch.randn(b, h, t, d, generator=torch.Generator().manual_seed(d))
    got, want = (cache(torch.zeros(b, h, 1, d), t + 3) for _ in range(2))
    emulated.kv4_append(*got, x, 2, 0.9)
    kv4_append_ref(*want, x, 2, 0.9)
    assert all(torch.equal(a.nan_to_num(nan=-1.0), c.nan_to_num(nan=-1.0)) for a, c in zip(got, want, strict=True))


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("moves", [True, False])
def test_qkv_append_equals_the_reference_bit_for_bit(
    emulated: ModuleType, order: str, rotates: bool, moves: bool
) -> None:
    b, t, heads, kv_heads, d = 2, 9, 4, 2, 36
    g = torch.Generator().manual_seed(4)
    qkv = torch.randn(b, t, (heads + 2 * kv_heads) * d, generator=g)
    rotary = (torch.randn(b, t, d, generator=g), torch.randn(b, t, d, generator=g)) if rotates else None
    transforms = (factor(d, g), factor(d, g)) if moves else (None, None)
    caches = [[cache(torch.zeros(b, kv_heads, 1, d), t + 2) for _ in range(2)] for _ in range(2)]
    results = [
        f(qkv, rotary, transforms, *c, 1, (0.95, 0.9))
        for f, c in zip((emulated.qkv_append, qkv_append_ref), caches, strict=True)
    ]
    assert torch.equal(*results)
    for got, want in zip(*caches, strict=True):
        assert all(torch.equal(a.nan_to_num(nan=-1.0), c.nan_to_num(nan=-1.0)) for a, c in zip(got, want, strict=True))


def attention_case(b: int, h: int, hkv: int, t: int, s: int, d: int, extra: int = 0) -> tuple:
    g = torch.Generator().manual_seed(s * 10 + d)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((b, h, t, d + extra), (b, hkv, s, d), (b, hkv, s, d)))
    shared = torch.randn(b, extra, s + 3, generator=g) if extra else None
    return q, cache(k, s + 5), cache(v, s + 5), s, torch.arange(b, dtype=torch.int32) * min(3, s - 1), d**-0.5, shared


SHAPES = [
    (1, 1, 1, 1, 1, 8),
    (2, 4, 2, 5, 9, 16),
    (2, 3, 3, 1, 70, 64),
    (1, 7, 1, 2, 131, 128),
    (1, 2, 1, 1, 600, 96),
    (1, 1, 1, 1, 130, 192),
    (1, 40, 1, 1, 70, 256),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_has_the_bits_of_the_cpu(emulated: ModuleType, shape: tuple[int, ...]) -> None:
    args = attention_case(*shape)
    (out, lse), (want, want_lse) = emulated.kv4_attention(*args), kv4_attention_ref(*args)
    assert float((out.double() - want.double()).norm() / want.double().norm()) < 5e-7
    seen = want_lse.isfinite()
    assert torch.equal(seen, lse.isfinite()) and (lse[seen] - want_lse[seen]).abs().max() < 1e-5
    if native.why_not() is None:
        assert torch.equal(out, native.kv4_attention(*args)[0])


def test_attention_in_any_order_of_threads(emulated: ModuleType, order: str) -> None:
    args = attention_case(2, 6, 2, 3, 150, 32)
    want = native.kv4_attention(*args)[0] if native.why_not() is None else kv4_attention_ref(*args)[0]
    assert (emulated.kv4_attention(*args)[0] - want).abs().max() < 1e-5


def test_attention_with_shared_channels(emulated: ModuleType) -> None:
    args = attention_case(2, 4, 2, 3, 77, 16, extra=5)
    out, want = emulated.kv4_attention(*args)[0], kv4_attention_ref(*args)[0]
    assert float((out.double() - want.double()).norm() / want.double().norm()) < 5e-7
    if native.why_not() is None:
        assert torch.equal(out, native.kv4_attention(*args)[0])


def test_attention_over_several_splits(emulated: ModuleType) -> None:
    args = attention_case(2, 2, 1, 1, 2100, 16)
    (out, lse), (want, want_lse) = emulated.kv4_attention(*args), kv4_attention_ref(*args)
    assert (
        float((out.double() - want.double()).norm() / want.double().norm()) < 1e-6
        and (lse - want_lse).abs().max() < 1e-5
    )
    alone = [args[0][1:], *((tuple(x[1:] for x in kv)) for kv in args[1:3]), args[3], args[4][1:], args[5], None]
    assert torch.equal(emulated.kv4_attention(*alone)[0], out[1:])


def test_attention_of_a_long_prompt_in_a_workspace_that_does_not_grow(emulated: ModuleType) -> None:
    """Twenty queries over two splits, eight at a time: each has the bits that it has alone."""
    args = attention_case(2, 2, 1, 20, 1100, 16)
    (out, lse), (want, want_lse) = emulated.kv4_attention(*args), kv4_attention_ref(*args)
    assert (
        float((out.double() - want.double()).norm() / want.double().norm()) < 1e-6
        and (lse - want_lse).abs().max() < 1e-5
    )
    for t in (0, 7, 8, 19):
        one, one_lse = emulated.kv4_attention(
            args[0][:, :, t : t + 1].contiguous(), *args[1:3], 1100 - 19 + t, *args[4:]
        )
        assert torch.equal(one, out[:, t : t + 1]) and torch.equal(one_lse, lse[:, :, t : t + 1])


@pytest.mark.parametrize("extra", [0, 5])
def test_paged_attention(emulated: ModuleType, extra: int) -> None:
    g = torch.Generator().manual_seed(3)
    units, hkv, places, d, lengths = 9, 2, 16, 32, (37, 1, 0, 48)
    pages = [cache(torch.randn(units, hkv, places, d, generator=g), places) for _ in range(2)]
    table = torch.stack([torch.randperm(units, generator=g)[:4] for _ in lengths]).int()
    q, length = torch.randn(len(lengths), 4, 1, d + extra, generator=g), torch.tensor(lengths, dtype=torch.int32)
    shared = torch.randn(len(lengths), extra, 50, generator=g) if extra else None
    implementations = (emulated.kv4_paged_attention, kv4_paged_attention_ref)
    (out, lse), (want, want_lse) = (f(q, *pages, table, length, 0.3, shared) for f in implementations)
    assert torch.equal(out, want) or (out - want).abs().max() < 1e-6
    assert torch.equal(lse.isfinite(), want_lse.isfinite()) and torch.isinf(lse[2]).all() and (out[2] == 0).all()
    if native.why_not() is None:
        assert torch.equal(out, native.kv4_paged_attention(q, *pages, table, length, 0.3, shared)[0])


def test_room_for_more_pages_changes_no_bit(emulated: ModuleType) -> None:
    """A table as wide as a captured graph needs it: the slots are split, and a row that ends in the first split has the
    CPU's bits all the same."""
    g = torch.Generator().manual_seed(4)
    pages = [cache(torch.randn(70, 1, 16, 8, generator=g), 16) for _ in range(2)]
    table, length = torch.randperm(70, generator=g)[None].int(), torch.tensor([77], dtype=torch.int32)
    q = torch.randn(1, 2, 1, 8, generator=g)
    out, _ = emulated.kv4_paged_attention(q, *pages, table, length, 0.3)
    assert torch.equal(out, emulated.kv4_paged_attention(q, *pages, table[:, :5], length, 0.3)[0])
    if native.why_not() is None:
        assert torch.equal(out, native.kv4_paged_attention(q, *pages, table, length, 0.3)[0])


def test_wrong_shapes_are_refused(emulated: ModuleType) -> None:
    x, scale, weight, _, _ = product(2, 16, 8)
    with pytest.raises(RuntimeError, match=r"x_q: expected shape \[any, 8\], got \[2, 4\]"):
        emulated.w4a4_linear(x[:, :4], scale, weight)
    with pytest.raises(RuntimeError, match="multiple of 8"):
        emulated.kv4_attention(*attention_case(1, 1, 1, 1, 4, 18))
