"""`rms_norm`: sixteen chains of squares per row, added in ascending order, then one pass over the row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import sum_of_lanes
from quota_kernels.launch import cdiv, launch

_COLUMNS = 512


@triton.jit
def rms_norm_kernel(x, weight, y, m, k, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane, column = tl.arange(0, 16), tl.arange(0, COLUMNS)
    squares = tl.zeros((ROWS, 16), tl.float32)
    for first in tl.range(
        0, k, 16, loop_unroll_factor=8
    ):  # the chain waits for itself; unrolling lets the loads run ahead
        inside = (row[:, None] < m) & (first + lane[None, :] < k)
        piece = tl.load(x + row[:, None] * k + first + lane[None, :], mask=inside, other=0.0)
        squares = tl.fma(piece, piece, squares)
    mean = tl.div_rn(sum_of_lanes(squares), tl.zeros((ROWS,), tl.float32) + tl.cast(k, tl.float32))
    factor = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    for first in range(0, k, COLUMNS):
        at = first + column
        inside = (row[:, None] < m) & (at[None, :] < k)
        value = tl.load(x + row[:, None] * k + at[None, :], mask=inside, other=0.0)
        scale = tl.load(weight + at, mask=at < k, other=0.0)
        tl.store(y + row[:, None] * k + at[None, :], value * factor[:, None] * scale[None, :], mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `quota.ops.rms_norm`."""
    x = x.contiguous()
    m, k = x.shape
    y = torch.empty_like(x)
    rows = 2 if m <= 256 else 8
    launch(rms_norm_kernel, (cdiv(m, rows),), x, weight.contiguous(), y, m, k, eps, rows, _COLUMNS, num_warps=4)
    return y
