"""`w4a16_linear`: float activations times int4 weights in groups of 128 along K, one ascending chain of fused
multiply-adds per group and output.

The chains of the groups do not wait for each other, only joining their sums has an order. So where a product has few
outputs, each group is a program of its own and a second launch joins the sums; with many outputs a program goes through
all groups. Both ways, and every size of a tile, give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from quota_kernels.launch import cdiv, launch, processors, sizes, warps_for

PANEL = 64  # columns whose words lie together
_GROUP = tl.constexpr(128)
_WORD = tl.constexpr(8)  # codes of an int32
_FEW_ROWS = 16
_CHAINS = 1024  # per multiprocessor: with fewer outputs than that, groups are programs of their own


@triton.jit
def group_sums(
    x,
    words,
    params,
    group,
    panel,
    groups,
    k,
    rows,
    there,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    PANEL: tl.constexpr,
):
    """float32 [ROWS, PANEL]: a group's chains over x (code - zero). x is readable up to the next multiple of eight
    columns, with zeros there."""
    lane = tl.arange(0, PANEL)
    zero = tl.load(params + ((panel * groups + group) * 2 + 1) * PANEL + lane) + 8388608.0  # 2^23, see below
    first = group * _GROUP
    words += (panel * tl.cdiv(k, _WORD) + first // _WORD) * PANEL
    x += rows * row_stride + first * column_stride
    acc = tl.zeros((ROWS, PANEL), tl.float32)
    for word in tl.range(0, tl.cdiv(tl.minimum(k - first, _GROUP), _WORD), loop_unroll_factor=2):
        packed = tl.load(words + word * PANEL + lane)
        for i in tl.static_range(_WORD):
            a = tl.load(x + (word * _WORD + i) * column_stride, mask=rows < there, other=0.0).to(tl.float32)
            code = (((packed >> (4 * i)) & 15) | 0x4B000000).to(
                tl.float32, bitcast=True
            )  # 2^23 + code: no conversion, and the difference is exact
            acc = tl.fma(
                tl.broadcast_to(a[:, None], acc.shape), tl.broadcast_to((code - zero)[None, :], acc.shape), acc
            )
    return acc


@triton.jit
def w4a16_linear_kernel(
    x,
    words,
    params,
    bias,
    y,
    m,
    there,
    n,
    k,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    PANEL: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Program (panel, tile of rows, group where SPLIT): y [M, N]; SPLIT: y is float32 [G, M, N], the sums of the
    groups."""
    panel = tl.program_id(0).to(tl.int64)
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = panel * PANEL + tl.arange(0, PANEL)
    groups = tl.cdiv(k, _GROUP)
    at = rows[:, None] * n + columns[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if SPLIT:
        group = tl.program_id(2)
        sums = group_sums(
            x, words, params, group, panel, groups, k, rows, there, row_stride, column_stride, ROWS, PANEL
        )
        tl.store(y + group.to(tl.int64) * m * n + at, sums, mask=inside)
    else:
        total = tl.zeros((ROWS, PANEL), tl.float32)
        for group in range(groups):
            sums = group_sums(
                x, words, params, group, panel, groups, k, rows, there, row_stride, column_stride, ROWS, PANEL
            )
            scale = tl.load(params + (panel * groups + group) * 2 * PANEL + tl.arange(0, PANEL))
            total = tl.fma(sums, tl.broadcast_to(scale[None, :], total.shape), total)
        if BIAS:
            total = total + tl.load(bias + columns, mask=columns < n, other=0.0)[None, :]
        tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def join_groups_kernel(sums, params, bias, y, m, n, groups, PANEL: tl.constexpr, BIAS: tl.constexpr):
    """Program (panel, row): the sums of all groups times their scales, joined in order."""
    panel, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, PANEL)
    column = panel * PANEL + lane
    total = tl.zeros((PANEL,), tl.float32)
    for group in tl.range(0, groups, loop_unroll_factor=4):
        piece = tl.load(sums + (tl.cast(group, tl.int64) * m + row) * n + column, mask=column < n, other=0.0)
        total = tl.fma(piece, tl.load(params + (panel * groups + group) * 2 * PANEL + lane), total)
    if BIAS:
        total = total + tl.load(bias + column, mask=column < n, other=0.0)
    tl.store(y + row * n + column, total.to(y.dtype.element_ty), mask=column < n)


def _columns_together(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, rows that may be read, row stride, column stride). Few rows stay as they are; with more, those of a column
    lie together, for wide loads."""
    m, k = x.shape
    if m <= _FEW_ROWS:
        x = functional.pad(x, (0, -k % _WORD.value)).contiguous()
        return x, m, x.shape[1], 1
    columns = x.new_zeros(k + -k % _WORD.value, m + -m % 16)
    columns[:k, :m] = x.T
    return columns, columns.shape[1], 1, columns.shape[1]


def w4a16_linear(
    x: Tensor, words: Tensor, params: Tensor, n: int, bias: Tensor | None = None, split: bool | None = None
) -> Tensor:
    """x [M, K] of any float dtype; words int32 [P, ceil(K / 8), 64], params float32 [P, G, 2, 64]
    (`GroupedWeight.panels(64)`) -> [M, N] in the dtype of x.

    split: whether each group is a program of its own; None decides by the sizes.
    """
    m, k = x.shape
    if words.shape[1] != cdiv(k, _WORD.value):
        raise ValueError(f"x: expected {8 * words.shape[1] - 7} to {8 * words.shape[1]} features, got {k}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias: expected [{n}], got {list(bias.shape)}")
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    sizes_ = sizes("w4a16_linear.few" if m <= _FEW_ROWS else "w4a16_linear.many", x)
    rows = min(sizes_["most_rows"], triton.next_power_of_2(max(1, m)))
    if split is None:
        split = m * n < _CHAINS * processors(x)
    groups = params.shape[1]
    x, there, row_stride, column_stride = _columns_together(x)
    has_bias, bias = bias is not None, params if bias is None else bias.contiguous()
    out = torch.empty(groups, m, n, dtype=torch.float32, device=x.device) if split else y
    launch(
        w4a16_linear_kernel,
        (words.shape[0], cdiv(m, rows), groups if split else 1),
        x,
        words,
        params,
        bias,
        out,
        m,
        there,
        n,
        k,
        row_stride,
        column_stride,
        rows,
        PANEL,
        split,
        has_bias,
        num_warps=warps_for(rows * PANEL, sizes_["per_thread"]),
    )
    if split:
        launch(
            join_groups_kernel, (words.shape[0], m), out, params, bias, y, m, n, groups, PANEL, has_bias, num_warps=2
        )
    return y
