"""`kv4_attention`: causal attention over packed 4-bit keys and values, prefill and decode, with the heads of a KV head
in one tile.

Bit by bit the algorithm of `csrc/cpu/kv4_attention.h`: integer dot products, blocks of 64 slots from `start`, sixteen
lanes of sums. A block's part needs only the running maximum before it, and a maximum has no order, so where few rows
face many slots the blocks are spread over the device: one launch finds the maxima and scores, one the parts, one adds
them in order. Both ways give the same bits, those of the CPU.

The kernels find a slot in a contiguous cache or, for `kv4_paged_attention`, in the pages of a pool, with lengths that
lie on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import exponential
from quota_kernels.kv4_blocks import (
    SLOTS,
    add_lanes,
    block_part,
    block_scores,
    correction_of,
    query_limbs,
    running_maximum,
    shared_scores,
    slots_at,
    span_of,
    store_rows,
    tile_rows,
)
from quota_kernels.kv4_split_attention import split_merge_kernel, split_parts_kernel, split_scores_kernel
from quota_kernels.launch import cdiv, launch, processors, sizes

_SLOTS = 64


@triton.jit
def kv4_attention_kernel(
    q,
    k_q,
    k_scale,
    k_zero,
    v_q,
    v_scale,
    v_zero,
    start,
    lengths,
    table,
    shared,
    out,
    lse,
    tokens,
    heads,
    kv_heads,
    d,
    extra,
    length,
    width,
    places,
    scaling,
    q_batch,
    q_head,
    scale_batch,
    scale_head,
    shared_batch,
    shared_stride,
    START: tl.constexpr,
    PAGED: tl.constexpr,
    EXTRA: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program (batch * Hkv, tile of ROWS query rows), all slots in order."""
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    begin, length = span_of(start, lengths, batch, length, START, PAGED)
    inside, query, head = tile_rows(batch, kv_head, tl.program_id(1), tokens, heads, kv_heads, ROWS)
    flat = (batch * heads + head) * tokens + query
    q_at = flat * (d + extra)
    even, odd, unit, q_sum = query_limbs(q, q_at, inside, d, HALF)
    seen = tl.where(inside, (length - tokens + 1 - begin + query).to(tl.int32), 0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total, middles = tl.zeros((ROWS, 16), tl.float32), tl.zeros((ROWS, 16), tl.float32)
    acc_even, acc_odd = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    k_q += batch * q_batch + kv_head * q_head
    v_q += batch * q_batch + kv_head * q_head
    scales = batch * scale_batch + kv_head * scale_head
    for first in range(0, tl.max(seen, 0), SLOTS):
        slot = first + tl.arange(0, SLOTS)
        there = slot < tl.max(seen, 0)
        at = slots_at(table, slot, there, batch, kv_head, kv_heads, begin, width, places, PAGED)
        sees = slot[None, :] < seen[:, None]
        s = block_scores(
            even, odd, unit, q_sum, k_q, k_scale + scales, k_zero + scales, at * (d // 2), at, there, d, scaling, HALF
        )
        if EXTRA:
            s = shared_scores(
                s,
                q,
                q_at + d,
                shared + batch * shared_batch,
                begin + slot,
                inside,
                there,
                extra,
                shared_stride,
                scaling,
            )
        s = tl.where(sees, s, float("-inf"))
        largest = running_maximum(best, s)
        correction = correction_of(best, largest)
        best = largest
        p = tl.where(sees, exponential(s - best[:, None]), 0.0)
        middle, w_unit, even_sums, odd_sums = block_part(
            p, sees, v_q, v_scale + scales, v_zero + scales, at * (d // 2), at, there, d, HALF
        )
        total, middles = add_lanes(total, middles, p, sees, middle, correction)
        wide = tl.broadcast_to(w_unit[:, None], even_sums.shape)
        acc_even = tl.fma(even_sums, wide, acc_even * correction[:, None])
        acc_odd = tl.fma(odd_sums, wide, acc_odd * correction[:, None])
    out_at = ((batch * tokens + query) * heads + head) * d
    store_rows(out, lse, out_at, flat, inside, seen <= 0, best, total, middles, acc_even, acc_odd, d, HALF)


def common_strides(k: Any, v: Any) -> tuple[tuple[Any, Any], tuple[int, int, int, int]]:
    """k and v with dense slots and one set of strides (copied where they have none), and (batch, head) strides of codes
    and of scales."""

    def dense(kv: Any) -> bool:
        return kv[0].stride()[2:] == (kv[0].shape[3], 1) and kv[1].stride(2) == 1 and kv[1].stride() == kv[2].stride()

    if not (dense(k) and dense(v)) or k[0].stride() != v[0].stride() or k[1].stride() != v[1].stride():
        k, v = tuple(t.contiguous() for t in k), tuple(t.contiguous() for t in v)
    return (k, v), (k[0].stride(0), k[0].stride(1), k[1].stride(0), k[1].stride(1))


@dataclass(frozen=True)
class Slots:
    """Which slots rows have: length of them from `start` [B] (None: 0), or, in pages, lengths [B] in the units of table
    [B, W]; length is then the most that fit. strides: of batch and head, in codes and in scales."""

    length: int
    strides: tuple[int, int, int, int]
    start: Tensor | None = None
    lengths: Tensor | None = None
    table: Tensor | None = None
    places: int = 0


def kv4_attention(
    q: Tensor,
    k: Any,
    v: Any,
    length: int,
    start: Tensor | None,
    scaling: float,
    shared: Tensor | None = None,
    split: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """As `quota.ops.kv4_attention`. split: whether the blocks are spread over the device; None decides by the sizes."""
    (k, v), strides = common_strides(k, v)
    if not 0 <= length <= k[0].shape[2] or q.shape[2] > length:
        raise ValueError(f"length: expected {q.shape[2]} to {k[0].shape[2]} slots, got {length}")
    return attend(
        q, k, v, Slots(length, strides, None if start is None else start.contiguous()), scaling, shared, split
    )


def attend(
    q: Tensor, k: Any, v: Any, slots: Slots, scaling: float, shared: Tensor | None, split: bool | None
) -> tuple[Tensor, Tensor]:
    """Attention over slots wherever they lie."""
    q = q.contiguous()
    batch, heads, tokens, wide = q.shape
    kv_heads, d = k[0].shape[1], 2 * k[0].shape[3]
    extra = wide - d
    if (shared is None) != (extra == 0):
        raise ValueError(f"shared: expected {extra} channels, q has {wide} and the cache {d}")
    bias = q if shared is None else shared.contiguous()
    out = torch.empty(batch, tokens, heads, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    sizes_ = sizes("kv4_attention", q)
    rows = min(sizes_.pop("most_rows"), max(16, triton.next_power_of_2(tokens * (heads // kv_heads))))
    half = max(32, triton.next_power_of_2(d // 2))
    grid, blocks = (batch * kv_heads, cdiv(tokens * (heads // kv_heads), rows)), cdiv(slots.length, _SLOTS)
    begin, lengths, table = (
        q if t is None else t for t in (slots.start, slots.lengths, slots.table)
    )  # q: a pointer that is not read
    width = 0 if slots.table is None else slots.table.shape[1]
    where = (slots.start is not None, slots.table is not None)
    shared_strides = (bias.stride(0), bias.stride(1)) if shared is not None else (0, 0)
    flags = (*where, shared is not None, rows, half)
    if split is None:
        split = grid[0] * grid[1] < processors(q) and blocks >= 8
    if not split:
        launch(
            kv4_attention_kernel,
            grid,
            q,
            *k,
            *v,
            begin,
            lengths,
            table,
            bias,
            out,
            lse,
            tokens,
            heads,
            kv_heads,
            d,
            extra,
            slots.length,
            width,
            slots.places,
            scaling,
            *slots.strides,
            *shared_strides,
            *flags,
            num_stages=2,
            **sizes_,
        )
        return out, lse
    scores, maxima, bests, units, parts = (
        torch.empty(batch, heads, tokens, blocks, *last, dtype=torch.float32, device=q.device)
        for last in ((_SLOTS,), (), (), (), (2, half))
    )
    middles = torch.empty(batch, kv_heads, blocks, _SLOTS, dtype=torch.float32, device=q.device)
    launch(
        split_scores_kernel,
        (*grid, blocks),
        q,
        *k,
        begin,
        lengths,
        table,
        bias,
        scores,
        maxima,
        tokens,
        heads,
        kv_heads,
        d,
        extra,
        slots.length,
        width,
        slots.places,
        blocks,
        scaling,
        *slots.strides,
        *shared_strides,
        *flags,
        **sizes_,
    )
    launch(
        split_parts_kernel,
        (*grid, blocks),
        scores,
        maxima,
        bests,
        middles,
        units,
        *v,
        begin,
        lengths,
        table,
        parts,
        tokens,
        heads,
        kv_heads,
        d,
        slots.length,
        width,
        slots.places,
        blocks,
        *slots.strides,
        *where,
        rows,
        half,
        **sizes_,
    )
    launch(
        split_merge_kernel,
        (batch * kv_heads, cdiv(tokens * (heads // kv_heads), 4)),
        scores,
        bests,
        middles,
        units,
        parts,
        begin,
        lengths,
        out,
        lse,
        tokens,
        heads,
        kv_heads,
        d,
        slots.length,
        blocks,
        *where,
        4,
        half,
        num_warps=4,
    )
    return out, lse
