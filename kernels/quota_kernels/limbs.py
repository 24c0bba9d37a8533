"""Products of float rows with 4-bit codes in exact integers, the numbers of `csrc/cpu/codes.h`: a row becomes 24-bit
fixed point in three signed bytes ("limbs"), so that the dot products are int8 matrix products and no order of summation
or size of a tile can change them."""

from __future__ import annotations

import triton
import triton.language as tl

from quota_kernels.floats import round_even

LARGEST_FIXED = tl.constexpr(
    8355710.0
)  # 127 * (65536 + 256 + 1) is what three signed bytes hold; a rounded factor may add one


@triton.jit
def unit_of(reach):
    """max|x| of rows -> (unit, factor): x ~ fixed * unit, fixed = round(x * factor)."""
    largest = tl.full(reach.shape, LARGEST_FIXED, tl.float32)
    return tl.div_rn(reach, largest), tl.where(reach == 0.0, 0.0, tl.div_rn(largest, reach))


@triton.jit
def fixed_point(x, factor):
    """float32 [R, C], factor [R] -> int32 [R, C]."""
    v = x * factor[:, None]
    return round_even(tl.where(v == v, v, 0.0))  # a NaN is in the unit


@triton.jit
def limb(fixed, i: tl.constexpr):
    """Signed byte i of fixed-point values, lowest first."""
    if i == 0:
        byte = (fixed + 0x80) & 255
    elif i == 1:
        byte = ((fixed + 0x8080) >> 8) & 255
    else:
        byte = ((fixed + 0x808080) >> 16) & 255
    return (byte - 128).to(tl.int8)


@triton.jit
def middles_of(total):
    """Sum of a row's fixed-point values, int64 [R] -> 8 times that, dealt out to the three limbs: codes count from
    their middle."""
    middle = total * 8
    high = (middle + (1 << 15)) >> 16
    rest = middle - (high << 16)
    mid = (rest + 128) >> 8
    return (rest - (mid << 8)).to(tl.int32), mid.to(tl.int32), high.to(tl.int32)


@triton.jit
def centred(low, mid, high, m_low, m_mid, m_high):
    """Sums int32 [R, C] of codes with each limb, middles int32 [R] -> float32 [R, C]: the sum of (code - 8) times the
    row's values."""
    a, b, c = (
        (low - m_low[:, None]).to(tl.float32),
        (mid - m_mid[:, None]).to(tl.float32),
        (high - m_high[:, None]).to(tl.float32),
    )
    return tl.fma(c, tl.full(low.shape, 65536.0, tl.float32), tl.fma(b, tl.full(low.shape, 256.0, tl.float32), a))


@triton.jit
def dot_codes(even, odd, packed):
    """Limbs int8 [R, C / 2] of even and odd columns, packed codes uint8 [C / 2, S] -> int32 [R, S]."""
    acc = tl.dot(even, (packed & 15).to(tl.int8), out_dtype=tl.int32)
    return tl.dot(odd, (packed >> 4).to(tl.int8), acc, out_dtype=tl.int32)


@triton.jit
def scores_of(sums, scale, middle, total, factor):
    """(scale * sums + middle * total) * factor: sums float32 [R, S], scale and middle of the slots [S], total and
    factor of the rows [R]."""
    codes = scale[None, :] * sums
    return (
        tl.fma(tl.broadcast_to(middle[None, :], sums.shape), tl.broadcast_to(total[:, None], sums.shape), codes)
        * factor[:, None]
    )
