"""`w4a4_linear`: packed int4 times packed int4 in exact int32; scales and bias in the epilogue. Reads the checkpoint's
own layout.

A byte holds an even and an odd k, and both operands are packed alike, so the dot product over nibbles is that of the
low halves plus that of the high halves: nothing is interleaved. A nibble stays in the upper half of its byte, where it
is 16 times its value, so unpacking is a mask or a shift.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.launch import cdiv, launch, processors, sizes

LARGEST_K = 131_000  # 256 * 64 * K stays inside int32


@triton.jit
def finished(acc, x_scale, x_zero, w_scale, col_sum, bias, rows, columns, m, n, ZERO: tl.constexpr, BIAS: tl.constexpr):
    """acc int32 [R, C], exact -> float32 [R, C]: (float(acc - zero * col_sum) * w_scale) * x_scale + bias, each step
    rounded."""
    inside_m, inside_n = rows < m, columns < n
    if ZERO:
        zero, total = tl.load(x_zero + rows, mask=inside_m, other=0), tl.load(col_sum + columns, mask=inside_n, other=0)
        acc = acc - zero[:, None] * total[None, :]
    scale_n, scale_m = (
        tl.load(w_scale + columns, mask=inside_n, other=0.0),
        tl.load(x_scale + rows, mask=inside_m, other=0.0),
    )
    y = (acc.to(tl.float32) * scale_n[None, :]) * scale_m[:, None]
    if BIAS:
        y = y + tl.load(bias + columns, mask=inside_n, other=0.0)[None, :]
    return y


@triton.jit
def w4a4_linear_kernel(
    x_q,
    x_scale,
    x_zero,
    w_q,
    w_scale,
    col_sum,
    bias,
    y,
    partial,
    m,
    n,
    row_bytes,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (i, j, s): rows tile i, columns tile j, bytes s * share .. (s + 1) * share. SPLIT: sums go to `partial`
    int32 [splits, M, N]."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(2)
    b = tl.arange(0, BYTES)
    begin, end = split * share, tl.minimum((split + 1) * share, row_bytes)
    acc = tl.zeros((ROWS, COLUMNS), tl.int32)
    a_at = x_q + rows[:, None].to(tl.int64) * row_bytes + b[None, :]
    w_at = w_q + columns[None, :].to(tl.int64) * row_bytes + b[:, None]
    for first in range(begin, end, BYTES):
        inside = first + b < end
        a = tl.load(a_at + first, mask=(rows[:, None] < m) & inside[None, :], other=0)
        w = tl.load(w_at + first, mask=(columns[None, :] < n) & inside[:, None], other=0)
        acc = tl.dot((a << 4).to(tl.int8, bitcast=True), (w << 4).to(tl.int8, bitcast=True), acc, out_dtype=tl.int32)
        acc = tl.dot(
            (a & 0xF0).to(tl.int8, bitcast=True), (w & 0xF0).to(tl.int8, bitcast=True), acc, out_dtype=tl.int32
        )
    acc = acc >> 8
    at = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside_tile = (rows[:, None] < m) & (columns[None, :] < n)
    if SPLIT:
        tl.store(partial + split.to(tl.int64) * m * n + at, acc, mask=inside_tile)
    else:
        tl.store(
            y + at,
            finished(acc, x_scale, x_zero, w_scale, col_sum, bias, rows, columns, m, n, ZERO, BIAS),
            mask=inside_tile,
        )


@triton.jit
def merge_splits_kernel(
    partial,
    x_scale,
    x_zero,
    w_scale,
    col_sum,
    bias,
    y,
    m,
    n,
    splits,
    COLUMNS: tl.constexpr,
    ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (j, row): the integer sums of all splits, and the epilogue."""
    row = tl.program_id(1) + tl.arange(0, 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None].to(tl.int64) * n + columns[None, :]
    acc = tl.zeros((1, COLUMNS), tl.int32)
    for split in range(splits):
        acc += tl.load(partial + tl.cast(split, tl.int64) * m * n + at, mask=columns[None, :] < n, other=0)
    tl.store(
        y + at,
        finished(acc, x_scale, x_zero, w_scale, col_sum, bias, row, columns, m, n, ZERO, BIAS),
        mask=columns[None, :] < n,
    )


def column_sums(w_q: Tensor) -> Tensor:
    """int32 [N]: the sum of each row's codes."""
    signed = ((torch.stack((w_q & 15, w_q >> 4), -1) ^ 8).to(torch.int8) - 8).flatten(-2)
    return signed.sum(-1, dtype=torch.int32)


def splits_for(row_bytes: int, tiles: int, bytes_at_once: int, multiprocessors: int) -> int:
    """Parts of K, so that every multiprocessor has a tile and no part is shorter than four steps."""
    return max(1, min(2 * multiprocessors // max(1, tiles), row_bytes // (4 * bytes_at_once)))


def w4a4_linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    zero: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x_q uint8 [M, row_bytes], w_q uint8 [N, row_bytes], zero: (x_zero int32 [M], column sums int32 [N]) -> float32
    [M, N]."""
    (m, row_bytes), n = x_q.shape, w_q.shape[0]
    if 2 * row_bytes > LARGEST_K:
        raise ValueError(f"K: expected at most {LARGEST_K}, got {2 * row_bytes}")
    y = torch.empty(m, n, dtype=torch.float32, device=x_q.device)
    sizes_ = sizes("w4a4_linear.few" if m <= 16 else "w4a4_linear.many", x_q)
    rows, columns, width = (sizes_.pop(name) for name in ("rows", "columns", "bytes"))
    tiles = cdiv(n, columns) * cdiv(m, rows)
    splits = splits_for(row_bytes, tiles, width, processors(x_q)) if m <= 16 else 1
    share = cdiv(cdiv(row_bytes, splits), width) * width
    splits = max(1, cdiv(row_bytes, share)) if share else 1
    partial = torch.empty(splits, m, n, dtype=torch.int32, device=x_q.device) if splits > 1 else y
    x_zero, col_sum = zero or (x_scale, x_scale)
    epilogue = (zero is not None, bias is not None)
    bias = x_scale if bias is None else bias.contiguous()
    x_q, x_scale = x_q.contiguous(), x_scale.contiguous()
    launch(
        w4a4_linear_kernel,
        (cdiv(n, columns), cdiv(m, rows), splits),
        x_q,
        x_scale,
        x_zero,
        w_q,
        w_scale,
        col_sum,
        bias,
        y,
        partial,
        m,
        n,
        row_bytes,
        share,
        rows,
        columns,
        width,
        splits > 1,
        *epilogue,
        **sizes_,
    )
    if splits > 1:
        launch(
            merge_splits_kernel,
            (cdiv(n, 256), m),
            partial,
            x_scale,
            x_zero,
            w_scale,
            col_sum,
            bias,
            y,
            m,
            n,
            splits,
            256,
            *epilogue,
            num_warps=4,
        )
    return y
