"""`float_linear`: each output is one ascending chain of fused multiply-adds over K."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.launch import cdiv, launch


@triton.jit
def float_linear_kernel(x, w, y, m, n, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """w [K, N] of any float dtype, widened exactly."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.range(0, k, loop_unroll_factor=8):
        a = tl.load(x + rows.to(tl.int64) * k + i, mask=rows < m, other=0.0)
        b = tl.load(w + tl.cast(i, tl.int64) * n + columns, mask=columns < n, other=0.0).to(tl.float32)
        acc = tl.fma(tl.broadcast_to(a[:, None], (ROWS, COLUMNS)), tl.broadcast_to(b[None, :], (ROWS, COLUMNS)), acc)
    tl.store(
        y + rows[:, None].to(tl.int64) * n + columns[None, :], acc, mask=(rows[:, None] < m) & (columns[None, :] < n)
    )


def float_linear(x: Tensor, w: Tensor) -> Tensor:
    """x float32 [M, K], w [K, N] -> float32 [M, N]."""
    (m, k), n = x.shape, w.shape[1]
    y = torch.empty(m, n, dtype=torch.float32, device=x.device)
    rows = min(16, triton.next_power_of_2(max(1, m)))
    launch(float_linear_kernel, (cdiv(n, 64), cdiv(m, rows)), x.contiguous(), w, y, m, n, k, rows, 64, num_warps=2)
    return y
