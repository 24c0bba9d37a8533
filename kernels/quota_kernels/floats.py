"""Float functions in a fixed sequence of IEEE operations, those of `quota.ops.elementwise` and `csrc/cpu/codes.h`: the
same bits on every device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_even(v):
    """float32 below 2^24 in magnitude -> int32, halves to even. (`rint` is a library call that the interpreter does not
    have.)"""
    whole = v.to(tl.int32)
    rest = tl.abs(v - whole.to(tl.float32))
    up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return whole + tl.where(up, tl.where(v < 0, -1, 1), 0)


@triton.jit
def exponential(x):
    """e^x: zero below -87, constant above 88, NaN stays. Coefficients: Cephes expf."""
    bounded = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    scaled = bounded * 1.44269504088896341
    whole = round_even(tl.where(scaled == scaled, scaled, 0.0))
    n = tl.where(scaled == scaled, whole.to(tl.float32), scaled)
    r = tl.fma(n, tl.full(n.shape, -0.693359375, tl.float32), bounded)
    r = tl.fma(n, tl.full(n.shape, 2.12194440e-4, tl.float32), r)
    p = tl.full(n.shape, 1.9875691500e-4, tl.float32)
    p = tl.fma(p, r, tl.full(n.shape, 1.3981999507e-3, tl.float32))
    p = tl.fma(p, r, tl.full(n.shape, 8.3334519073e-3, tl.float32))
    p = tl.fma(p, r, tl.full(n.shape, 4.1665795894e-2, tl.float32))
    p = tl.fma(p, r, tl.full(n.shape, 1.6666665459e-1, tl.float32))
    p = tl.fma(p, r, tl.full(n.shape, 5.0000001201e-1, tl.float32))
    p = tl.fma(p, r * r, r) + 1.0
    power = ((whole + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, p * power)


@triton.jit
def gated_by_sigmoid(x, slope):
    """x / (1 + e^(-slope x))."""
    return tl.div_rn(x, 1.0 + exponential(x * -slope))


@triton.jit
def gelu(x):
    """x Phi(x) as max(x, 0) - |x| Phi(-|x|)."""
    magnitude = tl.abs(x)
    a = tl.where(magnitude > 16.0, 16.0, magnitude)
    p = tl.full(a.shape, -2.71311613e-8, tl.float32)
    p = tl.fma(p, a, tl.full(a.shape, 7.48082016e-7, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, -8.90884803e-6, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, 5.87551549e-5, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, -2.07808291e-4, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, 1.82192598e-5, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, 4.80406592e-3, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, -3.63481157e-2, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, -3.18306506e-1, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, -7.97884881e-1, tl.float32))
    p = tl.fma(p, a, tl.full(a.shape, -6.93147182e-1, tl.float32))
    return tl.where(x < 0.0, 0.0, x) - a * exponential(p)


@triton.jit
def largest_magnitude(x, axis: tl.constexpr):
    """max|x| along an axis; a NaN wins, because as integers its bits are above every number's."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def sum_of_lanes(x):
    """[R, 16] -> [R], the lanes added in ascending order."""
    lane = tl.arange(0, 16)
    total = tl.zeros((x.shape[0],), tl.float32)
    for i in tl.static_range(16):
        total = total + tl.sum(tl.where(lane[None, :] == i, x, 0.0), 1)
    return total


@triton.jit
def sixteen(x, i: tl.constexpr):
    """[R, 64] -> columns 16 i .. of it, [R, 16]."""
    part = tl.arange(0, 4)
    return tl.sum(tl.where(part[None, :, None] == i, tl.reshape(x, (x.shape[0], 4, 16)), 0.0), 1)


@triton.jit
def symmetric_code(y, inverse):
    """clamp(round(y * inverse), -8, 7) as int32; a NaN becomes 0."""
    v = y * inverse
    v = tl.where(v == v, tl.minimum(tl.maximum(v, -8.0), 7.0), 0.0)
    return round_even(v)
