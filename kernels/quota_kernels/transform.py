"""`transform`: Y = left^T X right on X = x.view(l, r), two chains of fused multiply-adds with a rounded matrix in
between."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import gated_by_sigmoid, gelu
from quota_kernels.launch import cdiv, launch, warps_for

_ROWS, _COLUMNS = 32, 64


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
def kronecker(
    x,
    left,
    right,
    middle,
    y,
    l,
    r,
    width,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PROLOGUE: tl.constexpr,
    LP: tl.constexpr,
    RP: tl.constexpr,
):
    """One matrix [l, r] at `x` -> left^T X right at `y`, RP columns at a time; returns the bits of the largest
    magnitude (see `largest_magnitude`).

    A column of a product in registers cannot be addressed, so the first product goes through `middle`, memory for l * r
    floats that the block alone reads and writes. LP >= l.
    """
    i, j = tl.arange(0, LP), tl.arange(0, RP)
    largest = tl.zeros((LP,), tl.int32)
    if LEFT:
        for first in range(0, r, RP):
            inside = first + j < r
            tile = tl.zeros((LP, RP), tl.float32)
            for k in range(l):
                column = tl.load(left + k * l + i, mask=i < l, other=0.0)
                row = activated(x, k * r + first + j, inside, width, PROLOGUE)
                tile = tl.fma(tl.broadcast_to(column[:, None], (LP, RP)), tl.broadcast_to(row[None, :], (LP, RP)), tile)
            at = i[:, None] * r + first + j[None, :]
            if RIGHT:
                tl.store(middle + at, tile, mask=(i[:, None] < l) & inside[None, :])
            else:
                tl.store(y + at, tile, mask=(i[:, None] < l) & inside[None, :])
                bits = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
                largest = tl.where(bits > largest, bits, largest)
    if RIGHT:
        if LEFT:
            tl.debug_barrier()
        for first in range(0, r, RP):
            inside = first + j < r
            tile = tl.zeros((LP, RP), tl.float32)
            for k in range(r):
                if LEFT:
                    column = tl.load(middle + i * r + k, mask=i < l, other=0.0)
                else:
                    column = activated(x, i * r + k, i < l, width, PROLOGUE)
                row = tl.load(right + k * r + first + j, mask=inside, other=0.0)
                tile = tl.fma(tl.broadcast_to(column[:, None], (LP, RP)), tl.broadcast_to(row[None, :], (LP, RP)), tile)
            tl.store(y + i[:, None] * r + first + j[None, :], tile, mask=(i[:, None] < l) & inside[None, :])
            bits = tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
            largest = tl.where(bits > largest, bits, largest)
    return tl.max(largest, 0)


@triton.jit
def transform_kernel(
    x, left, right, middle, y, rows, l, r, LEFT: tl.constexpr, RIGHT: tl.constexpr, LP: tl.constexpr, RP: tl.constexpr
):
    """One matrix of l rows per program; the last one may have fewer (`rows` in all)."""
    first = tl.program_id(0).to(tl.int64) * l
    here = tl.minimum(rows - first, l).to(tl.int32)
    kronecker(x + first * r, left, right, middle + first * r, y + first * r, here, r, 0, LEFT, RIGHT, 0, LP, RP)


def factors(k: int, left: Tensor | None, right: Tensor | None) -> tuple[int, int]:
    """l and r of the matrix that a row of k values is."""
    if left is not None:
        return left.shape[0], k // left.shape[0]
    return (k // right.shape[0], right.shape[0]) if right is not None else (1, k)


def tile_of(l: int, r: int) -> tuple[int, int]:
    """LP and RP of `kronecker`."""
    return triton.next_power_of_2(l), min(_COLUMNS, triton.next_power_of_2(r))


def transform(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """As `quota.ops.transform`."""
    x = x.contiguous()
    if left is None and right is None:
        return x
    m, k = x.shape
    l, r = factors(k, left, right)
    rows = m * l
    if left is None:
        l = _ROWS  # all rows are one tall matrix
    y = torch.empty_like(x)
    middle = torch.empty_like(x) if left is not None and right is not None else y
    lp, rp = tile_of(l, r)
    launch(
        transform_kernel,
        (cdiv(rows, l),),
        x,
        x if left is None else left.contiguous(),
        x if right is None else right.contiguous(),
        middle,
        y,
        rows,
        l,
        r,
        left is not None,
        right is not None,
        lp,
        rp,
        num_warps=warps_for(lp * rp),
    )
    return y
