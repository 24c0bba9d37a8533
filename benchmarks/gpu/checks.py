"""Every op on the device against the CPU: fresh random inputs, poisoned outputs, awkward sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quota import ops
from quota.core.registry import HOST, Op
from quota.ops import cuda
from quota.ops.float_linear import FloatWeight
from quota.ops.w4a4_linear import PackedWeight
from quota.ops.w4a16_linear import GroupedWeight
from quota.ops.weights import ByteWeight, Factor
from quota.quant.affine import quantize_kv, quantize_weight
from quota.quant.grouped import round_groups
from quota.quant.pack import pack_int4, pack_uint4

FLOAT_TOLERANCE = 1e-6  # relative RMS of the float stage of attention, which float32 outputs allow
LINEARS = (
    (1, 1, 1),
    (1, 4096, 4096),
    (2, 127, 17),
    (5, 1281, 129),
    (8, 3584, 512),
    (16, 11008, 200),
    (17, 129, 130),
    (33, 4096, 1000),
    (100, 1155, 257),
    (173, 4096, 768),
    (640, 512, 300),
    (1000, 640, 136),
)
SMALL_LINEARS = ((1, 1, 1), (5, 257, 33), (16, 640, 130), (37, 300, 140))
FACTORS = ((None, None), (None, 128), (32, None), (5, 7), (64, 64), (86, 128), (56, 64), (128, 148), (9, 64))
GROUPED = ((1, 4096, 512), (5, 1281, 129), (16, 11008, 200), (17, 129, 130), (640, 512, 300))
SMALL_GROUPED = ((1, 129, 65), (17, 300, 33))
SMALL_FACTORS = ((None, None), (5, 7), (43, 64))
ATTENTIONS = (
    (1, 1, 1, 1, 1, 64),
    (2, 32, 32, 1, 700, 128),
    (3, 28, 4, 1, 1500, 128),
    (1, 9, 3, 40, 200, 64),
    (2, 4, 2, 3, 131, 96),
    (1, 2, 1, 1, 16385, 128),
)
SMALL_ATTENTIONS = ((1, 2, 1, 1, 70, 64), (2, 7, 1, 2, 130, 128))


@dataclass(frozen=True)
class Check:
    """One comparison: `tensors` are arguments by position, `op` runs on copies of them wherever it is asked to."""

    op: Op
    title: str
    make: Callable[[str], tuple[Any, ...]]
    exact: bool
    in_place: bool = False


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if isinstance(value, PackedWeight):
        return PackedWeight(value.w_q.to(device), value.w_scale.to(device), value.k)
    if isinstance(value, GroupedWeight):
        return GroupedWeight(value.w_q.to(device), value.w_scale.to(device), value.w_zero.to(device), value.k)
    if isinstance(value, ByteWeight):
        return ByteWeight(value.w_q.to(device), value.w_scale.to(device))
    if isinstance(value, Factor):
        return Factor(value.fixed.to(device) * 2.0**value.exponent)
    return FloatWeight(value.w.to(device)) if isinstance(value, FloatWeight) else value


def kv_of(x: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, Hkv, S, D] as the first S slots of a cache, the rest poisoned."""
    q, scale, zero = quantize_kv(x, 0.9)
    b, h, s, d = x.shape
    out = (
        torch.full((b, h, capacity, d // 2), 255, dtype=torch.uint8),
        torch.full((b, h, capacity), torch.nan),
        torch.full((b, h, capacity), torch.nan),
    )
    for whole, part in zip(out, (pack_uint4(q), scale, zero), strict=True):
        whole[:, :, :s] = part
    return out


def _linear(g: torch.Generator, m: int, k: int, n: int) -> tuple[Any, ...]:
    codes = torch.randint(-8, 8, (m, k), generator=g, dtype=torch.int8)
    weight = PackedWeight(*quantize_weight(torch.randn(n, k, generator=g)), k)
    zero = torch.randint(-20, 20, (m,), generator=g, dtype=torch.int32)
    return pack_int4(codes), torch.rand(m, generator=g) + 0.01, weight, torch.randn(n, generator=g), zero


def _matrix(g: torch.Generator, n: int | None) -> Factor | None:
    return None if n is None else Factor(torch.randn(n, n, generator=g) / n**0.5)


def _quantize(g: torch.Generator, m: int, left: int | None, right: int | None, prologue: str | None) -> tuple[Any, ...]:
    k = (left or 32) * (right or 128)
    return (
        torch.randn(m, 2 * k if prologue == "silu_mul" else k, generator=g) * 3,
        _matrix(g, left),
        _matrix(g, right),
        0.93,
        prologue,
    )


def _append(g: torch.Generator, b: int, h: int, t: int, d: int) -> tuple[Any, ...]:
    cache = kv_of(torch.zeros(b, h, 1, d), t + 9)
    return *cache, torch.randn(b, h, t, d, generator=g), 4, 0.95


def _qkv(g: torch.Generator, heads: int, kv_heads: int, t: int, d: int) -> tuple[Any, ...]:
    caches = [kv_of(torch.zeros(2, kv_heads, 1, d), t + 3) for _ in range(2)]
    rotary = torch.randn(2, t, d, generator=g), torch.randn(2, t, d, generator=g)
    return (
        torch.randn(2, t, (heads + 2 * kv_heads) * d, generator=g),
        rotary,
        (_matrix(g, d), _matrix(g, d)),
        caches[0],
        caches[1],
        2,
        (0.95, 0.9),
    )


def _attention(g: torch.Generator, b: int, h: int, hkv: int, t: int, s: int, d: int) -> tuple[Any, ...]:
    k, v = (kv_of(torch.randn(b, hkv, s, d, generator=g), s + 5) for _ in range(2))
    return torch.randn(b, h, t, d, generator=g), k, v, s, torch.arange(b, dtype=torch.int32) * min(3, s - 1), d**-0.5


def _paged(g: torch.Generator, h: int, hkv: int, d: int) -> tuple[Any, ...]:
    k, v = (kv_of(torch.randn(40, hkv, 16, d, generator=g), 16) for _ in range(2))
    table = torch.stack([torch.randperm(40, generator=g) for _ in range(3)]).int()
    return torch.randn(3, h, 1, d, generator=g), k, v, table, torch.tensor([601, 0, 17], dtype=torch.int32), d**-0.5


def all_checks(seed: int, small: bool) -> Iterator[Check]:
    """small: what compute-sanitizer gets through in seconds."""

    def case(
        op: Op,
        title: str,
        build: Callable[..., tuple[Any, ...]],
        *sizes: Any,
        exact: bool = True,
        in_place: bool = False,
    ) -> Check:
        def make(device: str) -> tuple[Any, ...]:
            return _to(build(torch.Generator().manual_seed(seed), *sizes), device)

        return Check(op, f"{op.name} {title}", make, exact, in_place)

    for m, k, n in SMALL_LINEARS if small else LINEARS:
        yield case(ops.w4a4_linear, f"M={m} K={k} N={n}", _linear, m, k, n)
    for left, right in SMALL_FACTORS if small else FACTORS:
        for prologue in (None, "silu_mul", "quick_gelu", "gelu"):
            for m in (3,) if small else (1, 17, 300):
                yield case(
                    ops.quantize_act, f"M={m} {left} x {right} {prologue or ''}", _quantize, m, left, right, prologue
                )
    for b, h, t, d in ((1, 1, 1, 64), (2, 3, 7, 128)):
        yield case(ops.kv4_append, f"B={b} H={h} T={t} D={d}", _append, b, h, t, d, in_place=True)
    for heads, kv_heads, t, d in ((4, 2, 5, 64),) if small else ((32, 32, 1, 128), (28, 4, 33, 128), (9, 3, 70, 64)):
        yield case(ops.qkv_append, f"H={heads} Hkv={kv_heads} T={t} D={d}", _qkv, heads, kv_heads, t, d, in_place=True)
    for shape in SMALL_ATTENTIONS if small else ATTENTIONS:
        yield case(ops.kv4_attention, "B={} H={} Hkv={} T={} S={} D={}".format(*shape), _attention, *shape, exact=False)
        yield case(ops.kv16_attention, "B={} H={} Hkv={} T={} S={} D={}".format(*shape), _halves, *shape, exact=False)
    yield case(ops.kv4_paged_attention, "Hkv=2 D=64", _paged, 4, 2, 64, exact=False)
    yield case(ops.kv16_paged_attention, "Hkv=2 D=64", _paged_halves, 4, 2, 64, exact=False)
    for m, k, n in SMALL_LINEARS if small else LINEARS:
        yield case(ops.w8a8_linear, f"M={m} K={k} N={n}", _bytes, m, k, n)
    for m, k, n in SMALL_GROUPED if small else GROUPED:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield case(ops.w4a16_linear, f"M={m} K={k} N={n} {dtype}", _grouped, m, k, n, dtype)
    for m, k in ((1, 5), (3, 100)) if small else ((1, 3584), (300, 4096)):
        yield case(
            ops.rms_norm,
            f"M={m} K={k}",
            lambda g, m, k: (torch.randn(m, k, generator=g), torch.randn(k, generator=g), 1e-5),
            m,
            k,
        )
    for m, k, n in ((3, 40, 70),) if small else ((1, 4096, 1000), (17, 300, 70)):
        yield case(ops.float_linear, f"M={m} K={k} N={n}", _float_linear, m, k, n)
    for left, right in ((5, 7),) if small else ((64, 64), (None, 128), (86, 128)):
        yield case(
            ops.transform,
            f"{left} x {right}",
            lambda g, left, right: _quantize(g, 17, left, right, None)[:3],
            left,
            right,
        )
    yield case(ops.kv4_page_write, "", _page_write, in_place=True)
    yield case(ops.kv4_page_read, "", lambda g: (*_paged(g, 4, 2, 64)[1:2], *_paged(g, 4, 2, 64)[3:5], 640))
    yield case(ops.token_score, "packed keys", _score, exact=False)
    yield case(ops.token_select, "", _select)
    yield case(
        ops.token_gather, "", lambda g: (torch.randn(2, 70, 33, generator=g), torch.randint(0, 70, (2, 9), generator=g))
    )


def _halves(g: torch.Generator, b: int, h: int, hkv: int, t: int, s: int, d: int) -> tuple[Any, ...]:
    k, v = (torch.full((b, hkv, s + 5, d), torch.nan, dtype=torch.float16) for _ in range(2))
    for cache in (k, v):
        cache[:, :, :s] = torch.randn(b, hkv, s, d, generator=g).half()
    return torch.randn(b, h, t, d, generator=g), k, v, s, torch.arange(b, dtype=torch.int32) * min(3, s - 1), d**-0.5


def _paged_halves(g: torch.Generator, h: int, hkv: int, d: int) -> tuple[Any, ...]:
    q, _, _, *rest = _paged(g, h, hkv, d)
    return q, *(torch.randn(40, hkv, 16, d, generator=g).half() for _ in range(2)), *rest


def _bytes(g: torch.Generator, m: int, k: int, n: int) -> tuple[Any, ...]:
    codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    weight = ByteWeight(codes, torch.rand(n, generator=g) + 0.01)
    return torch.randn(m, k, generator=g), weight, torch.randn(n, generator=g)


def _grouped(g: torch.Generator, m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Any, ...]:
    q, scale, zero = round_groups(torch.randn(n, k, generator=g))
    return (
        torch.randn(m, k, generator=g).to(dtype),
        GroupedWeight(pack_uint4(q), scale, zero, k),
        torch.randn(n, generator=g),
    )


def _float_linear(g: torch.Generator, m: int, k: int, n: int) -> tuple[Any, ...]:
    return torch.randn(m, k, generator=g), FloatWeight(torch.randn(n, k, generator=g).half())


def _page_write(g: torch.Generator) -> tuple[Any, ...]:
    pages = kv_of(torch.randn(6, 2, 4, 64, generator=g), 4)
    return pages, kv_of(torch.randn(1, 2, 5, 64, generator=g), 5), torch.tensor([3, -1, 17, 8, 0])


def _score(g: torch.Generator) -> tuple[Any, ...]:
    b, h, hkv, s, d = 2, 4, 2, 130, 64
    column = torch.arange(s)
    visual = (column < 100).repeat(b, 1) & (torch.rand(b, s, generator=g) < 0.8)
    lse = torch.randn(b, h, s, generator=g).abs() + 2
    return (
        torch.randn(b, h, s, d, generator=g),
        kv_of(torch.randn(b, hkv, s, d, generator=g), s),
        lse,
        (column >= 100).repeat(b, 1),
        visual,
        0.3,
    )


def _select(g: torch.Generator) -> tuple[Any, ...]:
    score = torch.randint(0, 5, (2, 576), generator=g).float()
    score[0, 3], score[1, 60] = float("nan"), float("inf")
    return score, torch.rand(2, 576, generator=g) < 0.7, torch.tensor([173, 1000])


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.cpu()]
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, tuple | list) else []


def _difference(check: Check, got: list[Tensor], want: list[Tensor]) -> str | None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i}: expected {b.dtype} {tuple(b.shape)}, got {a.dtype} {tuple(a.shape)}"
        if check.exact and not torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0)):
            return f"result {i}: {int((a != b).sum())} of {a.numel()} values differ"
        known = b.isfinite()
        if not torch.equal(known, a.isfinite()):
            return f"result {i}: {int((known != a.isfinite()).sum())} values are finite in one only"
        error = float((a[known].double() - b[known].double()).norm() / b[known].double().norm().clamp_min(1e-30))
        if not check.exact and error > FLOAT_TOLERANCE:
            return f"result {i}: relative RMS {error:.2e}, tolerance {FLOAT_TOLERANCE:.0e}"
    return None


def run(check: Check, device: str, implementation: str, against: str = "ref") -> str | None:
    """None when `implementation` on `device` agrees with the implementation `against` on the CPU, else the difference.
    Inputs are made from the seed twice.

    "native" takes seconds where "ref", which emulates fused multiply-adds, takes minutes.
    """
    reference = next(i for i in check.op.implementations if i.name == against)
    if reason := reference.supports(HOST):
        return f"nothing to compare with: {reason}"
    chosen = next((i for i in check.op.implementations if i.name == implementation), None)
    if chosen is None:
        return f"there is no implementation {implementation!r}"
    here, there = check.make("cpu"), check.make(device)
    want, got = reference.run(*here), chosen.run(*there)
    if check.in_place:
        want, got = (want, here), (got, there)
    return _difference(check, _leaves(got), _leaves(want))


def ways(seed: int, device: str, native4: bool) -> Iterator[tuple[str, str | None]]:
    """Every kernel of `w4a4_linear` that the device has, on one product: all give the bits of the reference."""
    for m, k, n in ((9, 1281, 130), (16, 4096, 256)):
        here = _linear(torch.Generator().manual_seed(seed), m, k, n)
        want = ops.w4a4_linear.implementations[-1].run(*here)
        for way in ("few4", "few8", "tile4", "tile8") if native4 else ("few8", "tile8", "warpgroup"):
            x_q, x_scale, weight, bias, zero = _to(here, device)
            got = cuda.w4a4_linear(x_q, x_scale, weight, bias, zero, way).cpu()
            yield (
                f"w4a4_linear way {way} M={m} K={k} N={n}",
                None if torch.equal(got, want) else f"{int((got != want).sum())} values differ",
            )
