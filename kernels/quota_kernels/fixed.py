"""Products with transform factors in exact integers, the numbers of `quota.quant.fixed`: 16-bit values in two signed
bytes, so that the products are int8 matrix products and no order of summation or size of a tile can change them."""

from __future__ import annotations

import triton
import triton.language as tl

from quota_kernels.floats import round_even

LARGEST = tl.constexpr(32639)  # 127 * 257, what two signed bytes hold
STEP = tl.constexpr(32)  # values that one product of bytes sums at least


@triton.jit
def unit_of(reach):
    """max|x| of rows -> (unit, factor): x ~ fixed * unit, fixed = round(x * factor); factor 0 where all are zero,
    whatever the row holds."""
    largest = tl.full(reach.shape, LARGEST, tl.float32)
    usable = (reach > 7.888609052210118e-31) & (reach < float("inf"))
    return tl.div_rn(reach, largest), tl.where(usable, tl.div_rn(largest, tl.where(usable, reach, 1.0)), 0.0)


@triton.jit
def fixed_point(x, factor):
    """float32 and what it is multiplied by, of its shape -> int32."""
    return round_even(tl.where(factor == 0.0, 0.0, x * factor))


@triton.jit
def dot_fixed(a, b):
    """int32 [R, K] and [K, C], at most 32639 in magnitude -> int32 [R, C]. Parts wrap; the sum of all fits."""
    a_low, b_low = ((a + 128) & 255) - 128, ((b + 128) & 255) - 128
    a_high, b_high = ((a - a_low) >> 8).to(tl.int8), ((b - b_low) >> 8).to(tl.int8)
    a_low, b_low = a_low.to(tl.int8), b_low.to(tl.int8)
    middle = tl.dot(a_low, b_high, tl.dot(a_high, b_low, out_dtype=tl.int32), out_dtype=tl.int32)
    total = tl.dot(a_low, b_low, out_dtype=tl.int32) + (middle << 8)
    return total + (tl.dot(a_high, b_high, out_dtype=tl.int32) << 16)


@triton.jit
def shift_of(largest):
    """The least shift after which a sum of magnitude `largest` is at most 32639, rounded half up."""
    shift = largest * 0
    for _ in tl.static_range(17):
        shift = tl.where((largest + ((1 << shift) >> 1)) >> shift > LARGEST, shift + 1, shift)
    return shift


@triton.jit
def power_of_two(exponent):
    """2^exponent of int32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)
