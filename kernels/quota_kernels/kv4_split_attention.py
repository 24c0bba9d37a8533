"""`kv4_attention` with the blocks of a row spread over the device: scores and maxima, parts, their sums in order."""

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def split_scores_kernel(
    q,
    k_q,
    k_scale,
    k_zero,
    start,
    lengths,
    table,
    shared,
    scores,
    maxima,
    tokens,
    heads,
    kv_heads,
    d,
    extra,
    length,
    width,
    places,
    blocks,
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
    """Program (batch * Hkv, tile, block): scores float32 [B, H, T, blocks, 64] and their maxima [B, H, T, blocks]."""
    pair, block = tl.program_id(0), tl.program_id(2)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    begin, length = span_of(start, lengths, batch, length, START, PAGED)
    inside, query, head = tile_rows(batch, kv_head, tl.program_id(1), tokens, heads, kv_heads, ROWS)
    flat = (batch * heads + head) * tokens + query
    even, odd, unit, q_sum = query_limbs(q, flat * (d + extra), inside, d, HALF)
    seen = tl.where(inside, (length - tokens + 1 - begin + query).to(tl.int32), 0)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    there = slot < tl.max(seen, 0)
    at = slots_at(table, slot, there, batch, kv_head, kv_heads, begin, width, places, PAGED)
    scales = batch * scale_batch + kv_head * scale_head
    s = block_scores(
        even,
        odd,
        unit,
        q_sum,
        k_q + batch * q_batch + kv_head * q_head,
        k_scale + scales,
        k_zero + scales,
        at * (d // 2),
        at,
        there,
        d,
        scaling,
        HALF,
    )
    if EXTRA:
        s = shared_scores(
            s,
            q,
            flat * (d + extra) + d,
            shared + batch * shared_batch,
            begin + slot,
            inside,
            there,
            extra,
            shared_stride,
            scaling,
        )
    s = tl.where(slot[None, :] < seen[:, None], s, float("-inf"))
    at_row = flat * blocks + block
    tl.store(scores + at_row[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :], s, mask=inside[:, None])
    tl.store(maxima + at_row, tl.max(s, 1), mask=inside)


@triton.jit
def split_parts_kernel(
    scores,
    maxima,
    bests,
    middles,
    units,
    v_q,
    v_scale,
    v_zero,
    start,
    lengths,
    table,
    parts,
    tokens,
    heads,
    kv_heads,
    d,
    length,
    width,
    places,
    blocks,
    q_batch,
    q_head,
    scale_batch,
    scale_head,
    START: tl.constexpr,
    PAGED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program as before: scores become exponentials of the running maximum; middles float32 [B, Hkv, blocks, 64], units
    and bests (the running maximum) [B, H, T, blocks], parts [B, H, T, blocks, 2, HALF] (even channels, then odd)."""
    pair, block = tl.program_id(0), tl.program_id(2)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    begin, length = span_of(start, lengths, batch, length, START, PAGED)
    inside, query, head = tile_rows(batch, kv_head, tl.program_id(1), tokens, heads, kv_heads, ROWS)
    flat = (batch * heads + head) * tokens + query
    seen = tl.where(inside, (length - tokens + 1 - begin + query).to(tl.int32), 0)
    lane = tl.arange(0, SLOTS)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, block + 1, SLOTS):
        before = first + lane
        known = tl.load(
            maxima + flat[:, None] * blocks + before[None, :],
            mask=inside[:, None] & (before[None, :] <= block),
            other=float("-inf"),
        )
        best = running_maximum(best, known)
    slot = block * SLOTS + lane
    there, sees = slot < tl.max(seen, 0), slot[None, :] < seen[:, None]
    at = slots_at(table, slot, there, batch, kv_head, kv_heads, begin, width, places, PAGED)
    at_row = flat * blocks + block
    s = tl.load(scores + at_row[:, None] * SLOTS + lane[None, :], mask=inside[:, None], other=float("-inf"))
    p = tl.where(sees, exponential(s - best[:, None]), 0.0)
    scales = batch * scale_batch + kv_head * scale_head
    middle, unit, even, odd = block_part(
        p,
        sees,
        v_q + batch * q_batch + kv_head * q_head,
        v_scale + scales,
        v_zero + scales,
        at * (d // 2),
        at,
        there,
        d,
        HALF,
    )
    b = tl.arange(0, HALF)
    tl.store(scores + at_row[:, None] * SLOTS + lane[None, :], p, mask=inside[:, None])
    tl.store(bests + at_row, best, mask=inside)
    tl.store(units + at_row, unit, mask=inside)
    tl.store(parts + at_row[:, None] * 2 * HALF + b[None, :], even, mask=inside[:, None])
    tl.store(parts + at_row[:, None] * 2 * HALF + HALF + b[None, :], odd, mask=inside[:, None])
    if tl.program_id(1) == tl.num_programs(1) - 1:  # the last tile sees most
        tl.store(middles + (pair.to(tl.int64) * blocks + block) * SLOTS + lane, middle)


@triton.jit
def split_merge_kernel(
    weights,
    bests,
    middles,
    units,
    parts,
    start,
    lengths,
    out,
    lse,
    tokens,
    heads,
    kv_heads,
    d,
    length,
    blocks,
    START: tl.constexpr,
    PAGED: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program (batch * Hkv, tile of ROWS rows): the blocks' parts, added in order."""
    pair = tl.program_id(0)
    batch, kv_head = (pair // kv_heads).to(tl.int64), pair % kv_heads
    begin, length = span_of(start, lengths, batch, length, START, PAGED)
    inside, query, head = tile_rows(batch, kv_head, tl.program_id(1), tokens, heads, kv_heads, ROWS)
    flat = (batch * heads + head) * tokens + query
    seen = tl.where(inside, (length - tokens + 1 - begin + query).to(tl.int32), 0)
    lane, b = tl.arange(0, SLOTS), tl.arange(0, HALF)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total, middle_lanes = tl.zeros((ROWS, 16), tl.float32), tl.zeros((ROWS, 16), tl.float32)
    acc_even, acc_odd = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    for first in range(0, tl.max(seen, 0), SLOTS):
        block = first // SLOTS
        at = flat * blocks + block
        slot = first + lane
        sees = slot[None, :] < seen[:, None]
        largest = tl.load(bests + at, mask=inside, other=float("-inf"))
        correction = correction_of(best, largest)
        best = largest
        p = tl.load(weights + at[:, None] * SLOTS + lane[None, :], mask=inside[:, None], other=0.0)
        middle = tl.load(middles + (pair.to(tl.int64) * blocks + block) * SLOTS + lane)
        total, middle_lanes = add_lanes(total, middle_lanes, p, sees, middle, correction)
        unit = tl.broadcast_to(tl.load(units + at, mask=inside, other=0.0)[:, None], (ROWS, HALF))
        even = tl.load(parts + at[:, None] * 2 * HALF + b[None, :], mask=inside[:, None], other=0.0)
        odd = tl.load(parts + at[:, None] * 2 * HALF + HALF + b[None, :], mask=inside[:, None], other=0.0)
        acc_even = tl.fma(even, unit, acc_even * correction[:, None])
        acc_odd = tl.fma(odd, unit, acc_odd * correction[:, None])
    out_at = ((batch * tokens + query) * heads + head) * d
    store_rows(out, lse, out_at, flat, inside, seen <= 0, best, total, middle_lanes, acc_even, acc_odd, d, HALF)
