"""`token_score`: column sums of attention from the log-sum-exp of the attention that ran anyway; the S x S matrix is
never stored.

The order of `csrc/cpu/token_score.h`: 64 queries one below the other, then blocks of queries, then heads. Which tokens
are queries and columns is read on the host, so this op waits for the device: it runs once per pruning layer of a
prefill, never in a decode step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quota_kernels.floats import exponential
from quota_kernels.kv4_blocks import block_scores, query_limbs
from quota_kernels.launch import cdiv, launch

QUERIES = tl.constexpr(64)
ROWS = tl.constexpr(16)


@triton.jit
def token_score_kernel(
    q,
    k,
    k_q,
    k_scale,
    k_zero,
    lse,
    queries,
    columns,
    out,
    query_count,
    column_count,
    slots,
    heads,
    kv_heads,
    d,
    scaling,
    q_head,
    scale_head,
    PACKED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Program (head, 64 columns) of one batch row -> out float32 [H, columns]: sums over `queries`, int64 places in
    ascending order."""
    head = tl.program_id(0).to(tl.int64)
    kv_head = head // (heads // kv_heads)
    c = tl.program_id(1) * 64 + tl.arange(0, 64)
    there = c < column_count
    column = tl.load(columns + c, mask=there, other=0)
    total = tl.zeros((1, 64), tl.float32)
    row = tl.arange(0, ROWS)
    for first in range(0, query_count, QUERIES):
        sums = tl.zeros((1, 64), tl.float32)
        for part in range(first, tl.minimum(first + QUERIES, query_count), ROWS):
            inside = part + row < query_count
            query = tl.load(queries + part + row, mask=inside, other=-1)
            at = (head * slots + query) * d
            if PACKED:
                even, odd, unit, q_sum = query_limbs(q, at, inside, d, HALF)
                s = block_scores(
                    even,
                    odd,
                    unit,
                    q_sum,
                    k_q + kv_head * q_head,
                    k_scale + kv_head * scale_head,
                    k_zero + kv_head * scale_head,
                    column * (d // 2),
                    column,
                    there,
                    d,
                    scaling,
                    HALF,
                )
            else:
                s = tl.zeros((ROWS, 64), tl.float32)
                for i in range(d):
                    a = tl.load(q + at + i, mask=inside, other=0.0)
                    b = tl.load(k + (kv_head * slots + column) * d + i, mask=there, other=0.0)
                    s = tl.fma(tl.broadcast_to(a[:, None], (ROWS, 64)), tl.broadcast_to(b[None, :], (ROWS, 64)), s)
                s = s * scaling
            norm = tl.load(lse + head * slots + query, mask=inside, other=0.0)
            sees = inside[:, None] & there[None, :] & (column[None, :] <= query[:, None])
            p = tl.where(sees, exponential(s - norm[:, None]), 0.0)
            for i in tl.static_range(ROWS):
                sums = sums + tl.sum(tl.where(row[:, None] == i, p, 0.0), 0)[None, :]
        total = total + sums
    tl.store(out + head * column_count + c[None, :], total, mask=there[None, :])


@triton.jit
def mean_over_heads_kernel(sums, columns, out, column_count, heads, terms, COLUMNS: tl.constexpr):
    """sums [H, columns] -> out at `columns`: the heads added in ascending order, over `terms`."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = c < column_count
    total = tl.zeros((COLUMNS,), tl.float32)
    for h in range(heads):
        total = total + tl.load(sums + h * column_count + c, mask=there, other=0.0)
    place = tl.load(columns + c, mask=there, other=0)
    tl.store(out + place, tl.div_rn(total, tl.zeros((COLUMNS,), tl.float32) + terms), mask=there)


def token_score(q: Tensor, k: Any, lse: Tensor, text: Tensor, visual: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """As `quota.ops.token_score`."""
    q, lse = q.contiguous(), lse.contiguous()
    batch, heads, slots, d = q.shape
    inter, intra = (torch.zeros(batch, slots, dtype=torch.float32, device=q.device) for _ in range(2))
    packed = not isinstance(k, Tensor)
    keys = tuple(t.contiguous() for t in (k if packed else (k,)))
    kv_heads = keys[0].shape[1]
    strides = (keys[0].stride(1), keys[1].stride(1)) if packed else (0, 0)
    half = max(32, triton.next_power_of_2(cdiv(d, 2)))
    for b in range(batch):
        columns = visual[b].nonzero()[:, 0]
        for out, mask in ((inter, text), (intra, visual)):
            queries = mask[b].nonzero()[:, 0]
            sums = torch.empty(heads, len(columns), dtype=torch.float32, device=q.device)
            parts = tuple(t[b] for t in keys)
            codes = parts if packed else (q, q, q)
            launch(
                token_score_kernel,
                (heads, cdiv(len(columns), 64)),
                q[b],
                q if packed else parts[0],
                *codes,
                lse[b],
                queries,
                columns,
                sums,
                len(queries),
                len(columns),
                slots,
                heads,
                kv_heads,
                d,
                scaling,
                *strides,
                packed,
                half,
                num_warps=4,
            )
            terms = float(heads * len(queries) if len(queries) else 1)
            launch(
                mean_over_heads_kernel,
                (cdiv(len(columns), 128),),
                sums,
                columns,
                out[b],
                len(columns),
                heads,
                terms,
                128,
                num_warps=4,
            )
    return inter, intra
