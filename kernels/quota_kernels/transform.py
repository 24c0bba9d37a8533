"""`transform`: Y = left^T X right on X = x.view(l, r), exact integer sums with a rounded matrix in between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.fixed import STEP, dot_fixed, fixed_point, power_of_two, shift_of, unit_of
from quota_kernels.floats import gated_by_sigmoid, gelu, largest_magnitude
from quota_kernels.launch import cdiv, launch, warps_for

_ROWS, _COLUMNS = 64, 64  # of a tile, at most


@triton.jit
def activated(x, at, mask, width, PROLOGUE: tl.constexpr):
    """Elements `at` of a row after its prologue: 0 none, 1 silu(x[at]) * x[at + width], 2 x * sigmoid(1.702 x), 3
    GELU."""
    value = tl.load(x + at, mask=mask, other=0.0)
    if PROLOGUE == 1:
        value = gated_by_sigmoid(value, 1.0) * tl.load(x + at + width, mask=mask, other=0.0)
    if PROLOGUE == 2:
        value = gated_by_sigmoid(value, 1.702)
    if PROLOGUE == 3:
        value = gelu(value)
    return value


@triton.jit
def largest_of(x, k, CHUNK: tl.constexpr):
    """max|x| of k values; a NaN wins."""
    at = tl.arange(0, CHUNK)
    bits = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, k, CHUNK):
        value = tl.load(x + first + at, mask=first + at < k, other=0.0)
        bits = tl.maximum(bits, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.max(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def kronecker(
    x,
    left,
    right,
    sums,
    y,
    l,
    r,
    exponent,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    LP: tl.constexpr,
    RP: tl.constexpr,
):
    """One matrix float32 [l, r] at `x` -> left^T X right at `y`, in tiles of LP x RP; returns the bits of the largest
    magnitude (see `largest_magnitude`).

    left, right: int16 factors, times 2^exponent in all. The first product goes through `sums`, memory for l * r int32
    that the block alone reads and writes.
    """
    i, j, s = tl.arange(0, LP), tl.arange(0, RP), tl.arange(0, STEP)
    unit, factor = unit_of(largest_of(x, l * r, LP * RP))
    largest = tl.zeros((LP,), tl.int32)
    shift = 0
    if LEFT:
        for row in range(0, l, LP):
            for column in range(0, r, RP):
                there = (row + i < l)[:, None] & (column + j < r)[None, :]
                at = (row + i)[:, None] * r + column + j[None, :]
                tile = tl.zeros((LP, RP), tl.int32)
                for k in range(0, l, STEP):
                    inner = k + s < l
                    a = tl.load(
                        left + (k + s)[None, :] * l + row + i[:, None], (row + i < l)[:, None] & inner[None, :], 0
                    )
                    b = tl.load(
                        x + (k + s)[:, None] * r + column + j[None, :], inner[:, None] & (column + j < r)[None, :], 0.0
                    )
                    tile += dot_fixed(a.to(tl.int32), fixed_point(b, tl.broadcast_to(factor, b.shape)))
                if RIGHT:
                    tl.store(sums + at, tile, mask=there)
                    bits = tl.max(tl.abs(tile), 1)
                else:
                    value = tile.to(tl.float32) * (unit * power_of_two(exponent))
                    tl.store(y + at, value, mask=there)
                    bits = tl.max(tl.where(there, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), 1)
                largest = tl.maximum(largest, bits)
        if RIGHT:
            tl.debug_barrier()
            shift = shift_of(tl.max(largest, 0))
            largest = tl.zeros((LP,), tl.int32)
    if RIGHT:
        scale = unit * power_of_two(exponent + shift)
        for row in range(0, l, LP):
            for column in range(0, r, RP):
                there = (row + i < l)[:, None] & (column + j < r)[None, :]
                tile = tl.zeros((LP, RP), tl.int32)
                for k in range(0, r, STEP):
                    inner = k + s < r
                    at, known = (row + i)[:, None] * r + k + s[None, :], (row + i < l)[:, None] & inner[None, :]
                    if LEFT:
                        a = (tl.load(sums + at, known, 0) + ((1 << shift) >> 1)) >> shift
                    else:
                        a = tl.load(x + at, known, 0.0)
                        a = fixed_point(a, tl.broadcast_to(factor, a.shape))
                    b = tl.load(
                        right + (k + s)[:, None] * r + column + j[None, :],
                        inner[:, None] & (column + j < r)[None, :],
                        0,
                    )
                    tile += dot_fixed(a, b.to(tl.int32))
                value = tile.to(tl.float32) * scale
                tl.store(y + (row + i)[:, None] * r + column + j[None, :], value, mask=there)
                bits = tl.max(tl.where(there, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), 1)
                largest = tl.maximum(largest, bits)
    return tl.max(largest, 0)


@triton.jit
def transform_kernel(
    x, left, right, sums, y, l, r, exponent, LEFT: tl.constexpr, RIGHT: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr
):
    """One row, a matrix of l rows, per program."""
    first = tl.program_id(0).to(tl.int64) * l * r
    kronecker(x + first, left, right, sums + first, y + first, l, r, exponent, LEFT, RIGHT, LP, RP)


@triton.jit
def rows_kernel(x, right, y, rows, r, exponent, LP: tl.constexpr, RP: tl.constexpr):
    """LP rows of r values per program, each with a unit of its own."""
    row = tl.program_id(0).to(tl.int64) * LP + tl.arange(0, LP)
    j, s = tl.arange(0, RP), tl.arange(0, STEP)
    reach = tl.zeros((LP,), tl.float32)
    for k in range(0, r, RP):
        value = tl.load(x + row[:, None] * r + k + j[None, :], (row < rows)[:, None] & (k + j < r)[None, :], 0.0)
        bits = tl.maximum(reach.to(tl.int32, bitcast=True), largest_magnitude(value, 1).to(tl.int32, bitcast=True))
        reach = bits.to(tl.float32, bitcast=True)
    unit, factor = unit_of(reach)
    scale = unit * power_of_two(exponent)
    for column in range(0, r, RP):
        tile = tl.zeros((LP, RP), tl.int32)
        for k in range(0, r, STEP):
            inner = k + s < r
            a = tl.load(x + row[:, None] * r + k + s[None, :], (row < rows)[:, None] & inner[None, :], 0.0)
            b = tl.load(
                right + (k + s)[:, None] * r + column + j[None, :], inner[:, None] & (column + j < r)[None, :], 0
            )
            tile += dot_fixed(fixed_point(a, tl.broadcast_to(factor[:, None], a.shape)), b.to(tl.int32))
        value = tile.to(tl.float32) * scale[:, None]
        tl.store(
            y + row[:, None] * r + column + j[None, :], value, mask=(row < rows)[:, None] & (column + j < r)[None, :]
        )


def factors(k: int, left: Tensor | None, right: Tensor | None) -> tuple[int, int]:
    """l and r of the matrix that a row of k values is."""
    if left is not None:
        return left.shape[0], k // left.shape[0]
    return (k // right.shape[0], right.shape[0]) if right is not None else (1, k)


def tile_of(l: int, r: int) -> tuple[int, int]:
    """LP and RP of `kronecker`; 16 is the least that a product takes."""
    return min(_ROWS, max(16, triton.next_power_of_2(l))), min(_COLUMNS, max(16, triton.next_power_of_2(r)))


def transform(x: Tensor, left: Tensor | None, right: Tensor | None, exponent: int) -> Tensor:
    """As `quota.ops.transform`; int16 factors, times 2^exponent in all."""
    x = x.contiguous()
    if left is None and right is None:
        return x
    m, k = x.shape
    l, r = factors(k, left, right)
    y = torch.empty_like(x)
    if left is None and right is not None and l == 1:
        lp, rp = tile_of(m, r)
        launch(
            rows_kernel, (cdiv(m, lp),), x, right.contiguous(), y, m, r, exponent, lp, rp, num_warps=warps_for(lp * rp)
        )
        return y
    lp, rp = tile_of(l, r)
    launch(
        transform_kernel,
        (m,),
        x,
        x if left is None else left.contiguous(),
        x if right is None else right.contiguous(),
        scratch_of(x, m * k, left, right),
        y,
        l,
        r,
        exponent,
        left is not None,
        right is not None,
        lp,
        rp,
        num_warps=warps_for(lp * rp),
    )
    return y


def scratch_of(x: Tensor, count: int, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Memory for `kronecker`'s first product; x itself, unused, where there is one factor."""
    return x if left is None or right is None else torch.empty(count, dtype=torch.int32, device=x.device)
