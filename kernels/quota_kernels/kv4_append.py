"""`kv4_append`: keys or values to 4 bits, one (scale, zero) per token and head, into slots of a cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import round_even
from quota_kernels.launch import cdiv, launch

_ROWS = 8


@triton.jit
def range_codes(x, inside, d, clip, DP: tl.constexpr):
    """x float32 [R, DP], channels from d on ignored -> (codes int32 [R, DP], scale [R], low [R]). A NaN makes scale and
    low NaN and the codes 0."""
    channel = tl.arange(0, DP)
    there = inside[:, None] & (channel[None, :] < d)
    nan = tl.max(tl.where(there & (x != x), 1, 0), 1) > 0
    low = tl.min(tl.where(there & (x == x), x, float("inf")), 1)
    high = tl.max(tl.where(there & (x == x), x, float("-inf")), 1)
    low, high = tl.where(nan, float("nan"), low) * clip, tl.where(nan, float("nan"), high) * clip
    reach = high - low
    scale = tl.div_rn(tl.where(reach < 1e-8, 1e-8, reach), tl.full(reach.shape, 15.0, tl.float32))
    inverse = tl.div_rn(tl.full(reach.shape, 1.0, tl.float32), scale)
    v = (x - low[:, None]) * inverse[:, None]
    v = tl.where(v == v, tl.minimum(tl.maximum(v, 0.0), 15.0), 0.0)
    return round_even(v), scale, low


@triton.jit
def store_codes(codes, scale, low, cache_q, cache_scale, cache_zero, q_at, scale_at, inside, d, DP: tl.constexpr):
    """Pack rows of codes two to a byte; q_at, scale_at int64 [R]: places of a row in the three tensors."""
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], DP // 2, 2)))
    b = tl.arange(0, DP // 2)
    tl.store(
        cache_q + q_at[:, None] + b[None, :],
        (even | (odd << 4)).to(tl.uint8),
        mask=inside[:, None] & (b[None, :] < d // 2),
    )
    tl.store(cache_scale + scale_at, scale, mask=inside)
    tl.store(cache_zero + scale_at, low, mask=inside)


@triton.jit
def kv4_append_kernel(
    x,
    cache_q,
    cache_scale,
    cache_zero,
    rows,
    tokens,
    heads,
    d,
    position,
    clip,
    q_batch,
    q_head,
    scale_batch,
    scale_head,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """x [B, Hkv, T, D] as `rows` rows of d."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, channel = row < rows, tl.arange(0, DP)
    value = tl.load(x + row[:, None] * d + channel[None, :], mask=inside[:, None] & (channel[None, :] < d), other=0.0)
    codes, scale, low = range_codes(value, inside, d, clip, DP)
    token, head, batch = row % tokens + position, row // tokens % heads, row // tokens // heads
    q_at, scale_at = batch * q_batch + head * q_head + token * (d // 2), batch * scale_batch + head * scale_head + token
    store_codes(codes, scale, low, cache_q, cache_scale, cache_zero, q_at, scale_at, inside, d, DP)


def cache_strides(cache_q: Tensor, cache_scale: Tensor, cache_zero: Tensor) -> tuple[int, int, int, int]:
    """(batch, head) strides of the codes, then of scale and zero, whose slots must be dense and whose strides must
    agree."""
    if (
        cache_q.stride()[2:] != (cache_q.shape[3], 1)
        or cache_scale.stride(2) != 1
        or cache_scale.stride() != cache_zero.stride()
    ):
        found = ", ".join(str(t.stride()) for t in (cache_q, cache_scale, cache_zero))
        raise ValueError(f"cache: expected dense slots with scale and zero alike, got strides {found}")
    return cache_q.stride(0), cache_q.stride(1), cache_scale.stride(0), cache_scale.stride(1)


def kv4_append(cache_q: Tensor, cache_scale: Tensor, cache_zero: Tensor, x: Tensor, position: int, clip: float) -> None:
    """As `quota.ops.kv4_append`."""
    x = x.contiguous()
    b, h, t, d = x.shape
    if position + t > cache_q.shape[2]:
        raise ValueError(
            f"kv4_append: expected room for slots {position}..{position + t}, the cache holds {cache_q.shape[2]}"
        )
    dp = max(2, triton.next_power_of_2(d))
    launch(
        kv4_append_kernel,
        (cdiv(b * h * t, _ROWS),),
        x,
        cache_q,
        cache_scale,
        cache_zero,
        b * h * t,
        t,
        h,
        d,
        position,
        clip,
        *cache_strides(cache_q, cache_scale, cache_zero),
        _ROWS,
        dp,
        num_warps=4,
    )
