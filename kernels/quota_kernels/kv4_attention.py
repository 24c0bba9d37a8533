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

from quota_kernels.floats import exponential, largest_magnitude, sixteen, sum_of_lanes
from quota_kernels.launch import cdiv, launch, processors, sizes
from quota_kernels.limbs import centred, dot_codes, fixed_point, limb, middles_of, scores_of, unit_of

SLOTS = tl.constexpr(64)
_SLOTS = 64


@triton.jit
def query_limbs(q, at, inside, d, HALF: tl.constexpr):
    """Rows of d floats at q + at [R] -> (fixed even, fixed odd int32 [R, HALF], unit [R], sum int64 [R]); HALF >= d /
    2."""
    b = tl.arange(0, HALF)
    there = inside[:, None] & (2 * b[None, :] < d)
    even = tl.load(q + at[:, None] + 2 * b[None, :], mask=there, other=0.0)
    odd = tl.load(q + at[:, None] + 2 * b[None, :] + 1, mask=there, other=0.0)
    reach = largest_magnitude(tl.join(largest_magnitude(even, 1), largest_magnitude(odd, 1)), 1)
    unit, factor = unit_of(reach)
    even_fixed, odd_fixed = fixed_point(even, factor), fixed_point(odd, factor)
    return even_fixed, odd_fixed, unit, tl.sum(even_fixed.to(tl.int64), 1) + tl.sum(odd_fixed.to(tl.int64), 1)


@triton.jit
def block_scores(even, odd, unit, total, k_q, k_scale, k_zero, q_at, scale_at, inside, d, scaling, HALF: tl.constexpr):
    """Scores float32 [R, 64] of query rows with a block of packed keys; q_at, scale_at int64 [64]."""
    b = tl.arange(0, HALF)
    packed = tl.load(k_q + q_at[None, :] + b[:, None], mask=inside[None, :] & (2 * b[:, None] < d), other=0)
    scale = tl.load(k_scale + scale_at, mask=inside, other=0.0)
    middle = tl.load(k_zero + scale_at, mask=inside, other=0.0) + 8.0 * scale
    m_low, m_mid, m_high = middles_of(total)
    low = dot_codes(limb(even, 0), limb(odd, 0), packed)
    mid = dot_codes(limb(even, 1), limb(odd, 1), packed)
    high = dot_codes(limb(even, 2), limb(odd, 2), packed)
    return scores_of(centred(low, mid, high, m_low, m_mid, m_high), scale, middle, total.to(tl.float32), unit * scaling)


@triton.jit
def shared_scores(scores, q, at, shared, slot_at, inside_rows, inside_slots, extra, shared_stride, scaling):
    """scores plus the chain over `extra` float channels; q + at [R]: the rows' own channels, shared + slot_at [64]: the
    slots of channel 0."""
    acc = tl.zeros(scores.shape, tl.float32)
    for e in range(extra):
        a = tl.load(q + at + e, mask=inside_rows, other=0.0)
        b = tl.load(shared + e * shared_stride + slot_at, mask=inside_slots, other=0.0)
        acc = tl.fma(tl.broadcast_to(a[:, None], scores.shape), tl.broadcast_to(b[None, :], scores.shape), acc)
    return scores + acc * scaling


@triton.jit
def block_part(p, sees, v_q, v_scale, v_zero, q_at, scale_at, inside, d, HALF: tl.constexpr):
    """Exponentials [R, 64] -> (middles [64], unit [R], sums of even and of odd channels float32 [R, HALF]) of a block
    of values."""
    b = tl.arange(0, HALF)
    packed = tl.load(v_q + q_at[:, None] + b[None, :], mask=inside[:, None] & (2 * b[None, :] < d), other=0)
    scale = tl.load(v_scale + scale_at, mask=inside, other=0.0)
    middle = tl.load(v_zero + scale_at, mask=inside, other=0.0) + 8.0 * scale
    weight = tl.where(sees, p * scale[None, :], 0.0)
    unit, factor = unit_of(largest_magnitude(weight, 1))
    fixed = fixed_point(weight, factor)
    m_low, m_mid, m_high = middles_of(tl.sum(fixed.to(tl.int64), 1))
    even_codes, odd_codes = (packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)
    low, mid, high = limb(fixed, 0), limb(fixed, 1), limb(fixed, 2)
    even = centred(
        tl.dot(low, even_codes, out_dtype=tl.int32),
        tl.dot(mid, even_codes, out_dtype=tl.int32),
        tl.dot(high, even_codes, out_dtype=tl.int32),
        m_low,
        m_mid,
        m_high,
    )
    odd = centred(
        tl.dot(low, odd_codes, out_dtype=tl.int32),
        tl.dot(mid, odd_codes, out_dtype=tl.int32),
        tl.dot(high, odd_codes, out_dtype=tl.int32),
        m_low,
        m_mid,
        m_high,
    )
    return middle, unit, even, odd


@triton.jit
def add_lanes(total, middles, p, sees, middle, correction):
    """The lanes [R, 16] of exponentials and of exponentials times middles, with a block's [R, 64]."""
    seen_middle = tl.where(sees, tl.broadcast_to(middle[None, :], p.shape), 0.0)
    total, middles = total * correction[:, None], middles * correction[:, None]
    for v in tl.static_range(4):
        part = sixteen(p, v)
        total = total + part
        middles = tl.fma(part, sixteen(seen_middle, v), middles)
    return total, middles


@triton.jit
def running_maximum(best, x):
    """max(best [R], x [R, C]). Not `tl.maximum`: Triton 3.6 takes that for the end of a reduction it may move out of
    the loop, and stops at an assertion."""
    largest = tl.max(x, 1)
    return tl.where(largest > best, largest, best)


@triton.jit
def correction_of(best, largest):
    """What a row's sums have to be multiplied by when its maximum goes from `best` to `largest`."""
    return tl.where(largest != best, exponential(best - largest), 1.0)


@triton.jit
def store_rows(out, lse, out_at, lse_at, inside, blind, best, total, middles, even, odd, d, HALF: tl.constexpr):
    """The end of rows: out = (acc + middles) / total, lse = best + log(total); rows that saw nothing give 0 and
    -inf."""
    b = tl.arange(0, HALF)
    divisor = tl.where(blind, 1.0, sum_of_lanes(total))
    offset = sum_of_lanes(middles)
    wide = tl.broadcast_to(divisor[:, None], even.shape)
    there = inside[:, None] & (2 * b[None, :] < d)
    tl.store(
        out + out_at[:, None] + 2 * b[None, :],
        tl.where(blind[:, None], 0.0, tl.div_rn(even + offset[:, None], wide)),
        mask=there,
    )
    tl.store(
        out + out_at[:, None] + 2 * b[None, :] + 1,
        tl.where(blind[:, None], 0.0, tl.div_rn(odd + offset[:, None], wide)),
        mask=there,
    )
    tl.store(lse + lse_at, tl.where(blind, float("-inf"), best + tl.log(divisor)), mask=inside)


@triton.jit
def tile_rows(batch, kv_head, tile, tokens, heads, kv_heads, ROWS: tl.constexpr):
    """Query rows of a tile: row i is query i // group of head kv_head * group + i % group. -> (inside, query, head),
    the last two int64."""
    group = heads // kv_heads
    row = tile * ROWS + tl.arange(0, ROWS)
    return row < tokens * group, (row // group).to(tl.int64), (kv_head * group + row % group).to(tl.int64)


@triton.jit
def slots_at(table, slot, there, batch, kv_head, kv_heads, begin, width, places, PAGED: tl.constexpr):
    """Where slots [64] of a (batch, KV head) lie, int64: after its first one, or, in pages, after the pool's."""
    if PAGED:
        unit = tl.load(table + batch * width + slot // places, mask=there, other=0).to(tl.int64)
        return (unit * kv_heads + kv_head) * places + slot % places
    return (begin + slot).to(tl.int64)


@triton.jit
def span_of(start, lengths, batch, length, START: tl.constexpr, PAGED: tl.constexpr):
    """(first slot, number of slots up to the last one) of a row."""
    begin = 0
    if START:
        begin = tl.load(start + batch)
    if PAGED:
        length = tl.load(lengths + batch)
    return begin, length


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
