"""`w8a8_linear`: rows to int8, then exact int32 products on tensor cores; scales and bias in the epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import largest_magnitude, round_even
from quota_kernels.launch import cdiv, launch

LARGEST_K = 131_000  # 128 * 127 * K stays inside int32


@triton.jit
def rows_to_bytes_kernel(x, q, scale, k, COLUMNS: tl.constexpr):
    """Program per row, a tile of one."""
    row, column = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.arange(0, COLUMNS)
    at = row[:, None] * k + column[None, :]
    value = tl.load(x + at, mask=column[None, :] < k, other=0.0)
    reach = largest_magnitude(value, 1)
    unit = tl.div_rn(tl.where(reach < 1e-8, 1e-8, reach), tl.full(reach.shape, 127.0, tl.float32))
    inverse = tl.div_rn(tl.full(unit.shape, 1.0, tl.float32), unit)
    scaled = value * inverse[:, None]
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -127.0), 127.0), 0.0)
    scaled = tl.where((unit - unit)[:, None] == 0.0, scaled, 0.0)
    tl.store(q + at, round_even(scaled).to(tl.int8), mask=column[None, :] < k)
    tl.store(scale + row, unit)


@triton.jit
def w8a8_linear_kernel(
    q,
    scale,
    w,
    w_scale,
    bias,
    y,
    m,
    n,
    k,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """q int8 [M, K], w int8 [N, K]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, k, STEP):
        at = first + tl.arange(0, STEP)
        a = tl.load(
            q + row[:, None].to(tl.int64) * k + at[None, :], mask=(row[:, None] < m) & (at[None, :] < k), other=0
        )
        b = tl.load(
            w + column[None, :].to(tl.int64) * k + at[:, None], mask=(column[None, :] < n) & (at[:, None] < k), other=0
        )
        acc += tl.dot(a, b, out_dtype=tl.int32)
    out = acc.to(tl.float32) * tl.load(w_scale + column, mask=column < n, other=0.0)[None, :]
    out = out * tl.load(scale + row, mask=row < m, other=0.0)[:, None]
    if BIAS:
        out = out + tl.load(bias + column, mask=column < n, other=0.0)[None, :]
    tl.store(y + row[:, None].to(tl.int64) * n + column[None, :], out, mask=(row[:, None] < m) & (column[None, :] < n))


def w8a8_linear(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x float32 [M, K], w int8 [N, K] -> float32 [M, N]."""
    (m, k), n = x.shape, len(w)
    if k > LARGEST_K:
        raise ValueError(f"x: expected at most {LARGEST_K} features, got {k}")
    q, scale = (
        torch.empty(m, k, dtype=torch.int8, device=x.device),
        torch.empty(m, dtype=torch.float32, device=x.device),
    )
    y = torch.empty(m, n, dtype=torch.float32, device=x.device)
    launch(rows_to_bytes_kernel, (m,), x.contiguous(), q, scale, k, triton.next_power_of_2(max(16, k)), num_warps=4)
    rows = min(64, max(16, triton.next_power_of_2(max(1, m))))
    grid = (cdiv(n, 64), cdiv(m, rows))
    bias_or = y if bias is None else bias
    launch(
        w8a8_linear_kernel, grid, q, scale, w, w_scale, bias_or, y, m, n, k, bias is not None, rows, 64, 64, num_warps=4
    )
    return y
