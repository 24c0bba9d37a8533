"""Parts of the attention kernels: scores, sums and rows of one block of 64 slots of a 4-bit cache."""

from __future__ import annotations

import triton
import triton.language as tl

from quota_kernels.floats import exponential, largest_magnitude, sixteen, sum_of_lanes
from quota_kernels.limbs import centred, dot_codes, fixed_point, limb, middles_of, scores_of, unit_of

SLOTS = tl.constexpr(64)


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
