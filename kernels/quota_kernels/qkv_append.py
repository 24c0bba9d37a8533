"""`qkv_append`: rotary embedding, head transforms and cache writes between the q/k/v projection and attention, in one
launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.fixed import dot_fixed, fixed_point, power_of_two, unit_of
from quota_kernels.floats import largest_magnitude
from quota_kernels.kv4_append import cache_strides, range_codes, store_codes
from quota_kernels.launch import cdiv, launch

_HEADS = 16  # the least that a product takes


@triton.jit
def turned(qkv, cos, sin, first, head, inside, d, ROTARY: tl.constexpr, DP: tl.constexpr):
    """Heads of one token after the rotary embedding, float32 [R, DP]: two products and one sum, as LLaMA pairs channels
    (i, i + d/2)."""
    channel = tl.arange(0, DP)
    there = inside[:, None] & (channel[None, :] < d)
    at = qkv + first + head[:, None] * d
    x = tl.load(at + channel[None, :], mask=there, other=0.0)
    if ROTARY:
        half = d // 2
        low = channel < half
        other = tl.load(at + tl.where(low, channel + half, channel - half)[None, :], mask=there, other=0.0)
        c, s = tl.load(cos + channel, mask=channel < d, other=0.0), tl.load(sin + channel, mask=channel < d, other=0.0)
        along, across = x * c[None, :], other * s[None, :]
        x = tl.where(low[None, :], along - across, along + across)
    return x


@triton.jit
def through(x, matrix, exponent, d, DP: tl.constexpr, HEADS: tl.constexpr):
    """x [R, DP], zero from d on, times an int16 factor [d, d] of 2^exponent, in the integers of `transform`."""
    channel = tl.arange(0, DP)
    unit, factor = unit_of(largest_magnitude(x, 1))
    there = (channel < d)[:, None] & (channel < d)[None, :]
    b = tl.load(matrix + channel[:, None] * d + channel[None, :], mask=there, other=0).to(tl.int32)
    sums = dot_fixed(fixed_point(x, tl.broadcast_to(factor[:, None], (HEADS, DP))), b)
    return sums.to(tl.float32) * (unit * power_of_two(exponent))[:, None]


@triton.jit
def qkv_append_kernel(
    qkv,
    cos,
    sin,
    q_matrix,
    k_matrix,
    q_exponent,
    k_exponent,
    q,
    k_q,
    k_scale,
    k_zero,
    v_q,
    v_scale,
    v_zero,
    tokens,
    heads,
    kv_heads,
    d,
    position,
    rotary_batch,
    k_clip,
    v_clip,
    q_batch,
    q_head,
    scale_batch,
    scale_head,
    ROTARY: tl.constexpr,
    Q_MATRIX: tl.constexpr,
    K_MATRIX: tl.constexpr,
    HEADS: tl.constexpr,
    DP: tl.constexpr,
):
    """Program (token of the batch, HEADS heads of one kind: those of q, then of k, then of v)."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = token // tokens, token % tokens
    q_parts, kv_parts = tl.cdiv(heads, HEADS), tl.cdiv(kv_heads, HEADS)
    first = token * (heads + 2 * kv_heads) * d
    cos += b * rotary_batch + t * d
    sin += b * rotary_batch + t * d
    channel = tl.arange(0, DP)
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS).to(tl.int64)
        inside = head < heads
        at = ((b * heads + head) * tokens + t) * d
        x = turned(qkv, cos, sin, first, head, inside, d, ROTARY, DP)
        if Q_MATRIX:
            x = through(x, q_matrix, q_exponent, d, DP, HEADS)
        tl.store(q + at[:, None] + channel[None, :], x, mask=inside[:, None] & (channel[None, :] < d))
    elif part < q_parts + kv_parts:
        head = (part - q_parts) * HEADS + tl.arange(0, HEADS).to(tl.int64)
        inside = head < kv_heads
        x = turned(qkv, cos, sin, first + heads * d, head, inside, d, ROTARY, DP)
        if K_MATRIX:
            x = through(x, k_matrix, k_exponent, d, DP, HEADS)
        codes, scale, low = range_codes(x, inside, d, k_clip, DP)
        slot = t + position
        q_at, scale_at = b * q_batch + head * q_head + slot * (d // 2), b * scale_batch + head * scale_head + slot
        store_codes(codes, scale, low, k_q, k_scale, k_zero, q_at, scale_at, inside, d, DP)
    else:
        head = (part - q_parts - kv_parts) * HEADS + tl.arange(0, HEADS).to(tl.int64)
        inside = head < kv_heads
        x = turned(qkv, cos, sin, first + (heads + kv_heads) * d, head, inside, d, False, DP)
        codes, scale, low = range_codes(x, inside, d, v_clip, DP)
        slot = t + position
        q_at, scale_at = b * q_batch + head * q_head + slot * (d // 2), b * scale_batch + head * scale_head + slot
        store_codes(codes, scale, low, v_q, v_scale, v_zero, q_at, scale_at, inside, d, DP)


def qkv_append(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    transforms: tuple[Tensor | None, Tensor | None],
    exponents: tuple[int, int],
    k: Any,
    v: Any,
    position: int,
    clips: tuple[float, float],
) -> Tensor:
    """As `quota.ops.qkv_append`; transforms int16, times 2^exponent."""
    qkv = qkv.contiguous()
    batch, tokens, width = qkv.shape
    kv_heads, d = k[0].shape[1], 2 * k[0].shape[3]
    heads = width // d - 2 * kv_heads
    if position + tokens > k[0].shape[2]:
        raise ValueError(
            f"qkv_append: expected room for slots {position}..{position + tokens}, the cache holds {k[0].shape[2]}"
        )
    strides = cache_strides(*k)
    if cache_strides(*v) != strides:
        raise ValueError("v: expected a cache with the strides of k")
    q = torch.empty(batch, heads, tokens, d, dtype=torch.float32, device=qkv.device)
    q_matrix, k_matrix = (qkv if t is None else t.contiguous() for t in transforms)
    cos, sin = (qkv, qkv) if rotary is None else (rotary[0].contiguous(), rotary[1].contiguous())
    rotary_batch = tokens * d if rotary is not None and len(cos) > 1 else 0
    if batch == 1 or rotary is None:
        rotary_batch = 0
    launch(
        qkv_append_kernel,
        (batch * tokens, cdiv(heads, _HEADS) + 2 * cdiv(kv_heads, _HEADS)),
        qkv,
        cos,
        sin,
        q_matrix,
        k_matrix,
        *exponents,
        q,
        *k,
        *v,
        tokens,
        heads,
        kv_heads,
        d,
        position,
        rotary_batch,
        *clips,
        *strides,
        rotary is not None,
        transforms[0] is not None,
        transforms[1] is not None,
        _HEADS,
        max(32, triton.next_power_of_2(d)),
        num_warps=4,
    )
    return q
