"""`kv16_attention`: causal attention over float16 keys and values, with the heads of a KV head in one tile.

Bit by bit the algorithm of `csrc/cpu/kv16_attention.h`: blocks of 64 slots from `start`, chains of fused multiply-adds
over channels and over slots, sixteen lanes of sums. No tensor core adds in that order, so none is used.

The kernel finds a slot in a contiguous cache or, for `kv16_paged_attention`, in the pages of a pool, with lengths that
lie on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import exponential, sixteen, sum_of_lanes
from quota_kernels.kv4_attention import Slots
from quota_kernels.kv4_blocks import SLOTS, correction_of, running_maximum, slots_at, span_of, tile_rows
from quota_kernels.launch import cdiv, launch


@triton.jit
def kv16_attention_kernel(
    q,
    k,
    v,
    start,
    lengths,
    table,
    out,
    lse,
    tokens,
    heads,
    kv_heads,
    d,
    length,
    width,
    places,
    scaling,
    stride_batch,
    stride_head,
    START: tl.constexpr,
    PAGED: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Program (batch * Hkv, tile of ROWS query rows), all slots in order."""
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    begin, length = span_of(start, lengths, batch, length, START, PAGED)
    inside, query, head = tile_rows(batch, kv_head, tl.program_id(1), tokens, heads, kv_heads, ROWS)
    flat = (batch * heads + head) * tokens + query
    seen = tl.where(inside, (length - tokens + 1 - begin + query).to(tl.int32), 0)
    channel, place = tl.arange(0, CHANNELS), tl.arange(0, SLOTS)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, 16), tl.float32)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    k += batch * stride_batch + kv_head * stride_head
    v += batch * stride_batch + kv_head * stride_head
    for first in range(0, tl.max(seen, 0), SLOTS):
        slot = first + place
        there = slot < tl.max(seen, 0)
        at = slots_at(table, slot, there, batch, kv_head, kv_heads, begin, width, places, PAGED)
        sees = slot[None, :] < seen[:, None]
        s = tl.zeros((ROWS, SLOTS), tl.float32)
        for c in range(d):
            a = tl.load(q + flat * d + c, mask=inside, other=0.0)
            b = tl.load(k + at * d + c, mask=there, other=0.0).to(tl.float32)
            s = tl.fma(tl.broadcast_to(a[:, None], s.shape), tl.broadcast_to(b[None, :], s.shape), s)
        s = tl.where(sees, s * scaling, float("-inf"))
        largest = running_maximum(best, s)
        correction = correction_of(best, largest)
        best = largest
        p = tl.where(sees, exponential(s - best[:, None]), 0.0)
        total = total * correction[:, None]
        for i in tl.static_range(4):
            total = total + sixteen(p, i)
        part = tl.zeros((ROWS, CHANNELS), tl.float32)
        for j in range(SLOTS):
            mine = place == j
            weight = tl.sum(tl.where(mine[None, :], p, 0.0), 1)
            row = tl.sum(tl.where(mine, at, 0), 0)
            stored = first + j < tl.max(seen, 0)
            value = tl.load(v + row * d + channel, mask=stored & (channel < d), other=0.0).to(tl.float32)
            visible = tl.where((first + j < seen)[:, None], tl.broadcast_to(value[None, :], part.shape), 0.0)
            part = tl.fma(tl.broadcast_to(weight[:, None], part.shape), visible, part)
        acc = tl.fma(acc, tl.broadcast_to(correction[:, None], acc.shape), part)
    blind = seen <= 0
    divisor = tl.where(blind, 1.0, sum_of_lanes(total))
    out_at = ((batch * tokens + query) * heads + head) * d
    y = tl.where(blind[:, None], 0.0, tl.div_rn(acc, tl.broadcast_to(divisor[:, None], acc.shape)))
    tl.store(out + out_at[:, None] + channel[None, :], y, mask=inside[:, None] & (channel[None, :] < d))
    tl.store(lse + flat, tl.where(blind, float("-inf"), best + tl.log(divisor)), mask=inside)


def attend16(q: Tensor, k: Tensor, v: Tensor, slots: Slots, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention over slots wherever they lie; of `slots.strides` the first two are read."""
    q = q.contiguous()
    batch, heads, tokens, d = q.shape
    kv_heads = k.shape[1]
    out = torch.empty(batch, tokens, heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    rows = min(16, triton.next_power_of_2(tokens * (heads // kv_heads)))
    begin, lengths, table = (
        q if t is None else t for t in (slots.start, slots.lengths, slots.table)
    )  # q: a pointer that is not read
    launch(
        kv16_attention_kernel,
        (batch * kv_heads, cdiv(tokens * (heads // kv_heads), rows)),
        q,
        k,
        v,
        begin,
        lengths,
        table,
        out,
        lse,
        tokens,
        heads,
        kv_heads,
        d,
        slots.length,
        0 if slots.table is None else slots.table.shape[1],
        slots.places,
        scaling,
        *slots.strides[:2],
        slots.start is not None,
        slots.table is not None,
        rows,
        max(16, triton.next_power_of_2(d)),
        num_warps=4,
    )
    return out, lse


def kv16_attention(
    q: Tensor, k: Tensor, v: Tensor, length: int, start: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `quota.ops.kv16_attention`."""
    if k.stride() != v.stride() or k.stride()[2:] != (k.shape[3], 1):
        k, v = k.contiguous(), v.contiguous()
    if not 0 <= length <= k.shape[2] or q.shape[2] > length:
        raise ValueError(f"length: expected {q.shape[2]} to {k.shape[2]} slots, got {length}")
    strides = (k.stride(0), k.stride(1), 0, 0)
    return attend16(q, k, v, Slots(length, strides, None if start is None else start.contiguous()), scaling)
