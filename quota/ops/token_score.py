"""`token_score`: how much text and visual queries attend to each visual token, without the L x L matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.kv4_attention import dequantized
from quota.ops.weights import Kv

_ROWS_AT_ONCE = 128


def token_score_ref(
    q: Tensor, k: Tensor | Kv, lse: Tensor, text: Tensor, visual: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """q float32 [B, H, S, D], k float32 [B, Hkv, S, D] or S packed slots of a cache, lse float32 [B, H, S]; text and
    visual bool [B, S] -> (inter, intra) float32 [B, S].

    inter_i = mean over heads and text queries of A[h, t, i]; intra_i the same over visual queries; 0 where i is not
    visual, and where there are no queries. A[h, t, i] = exp(q_t . k_i * scaling - lse_t) for i <= t (method.md,
    equation 6). Exactness: float stage, relative RMS; bits independent of batch, threads and instruction set. The
    Triton kernel gives the native library's bits.
    """
    b, h, s, d = q.shape
    k = k if isinstance(k, Tensor) else dequantized(k, s, d)
    inter, intra = q.new_zeros(b, s), q.new_zeros(b, s)
    for row in range(b):
        columns = visual[row].nonzero()[:, 0]
        for out, mask in ((inter, text), (intra, visual)):
            queries = mask[row].nonzero()[:, 0]
            total = torch.zeros(len(columns), dtype=torch.float64, device=q.device)
            for p in attention_to(q[row], k[row], lse[row], columns, queries, scaling):
                total += p.sum((0, 1))
            out[row, columns] = (total / max(1, h * len(queries))).float()
    return inter, intra


def attention_to(
    q: Tensor, k: Tensor, lse: Tensor, columns: Tensor, queries: Tensor, scaling: float
) -> Iterator[Tensor]:
    """A[h, t, i] of one row in float64, [H, rows, V] for successive blocks of the query positions: q [H, S, D],
    k [Hkv, S, D], lse [H, S]; columns int64 [V], queries int64 [n]; 0 where a query does not see the column."""
    keys = k[:, columns].double().repeat_interleave(q.shape[0] // k.shape[0], 0)
    for block in queries.split(_ROWS_AT_ONCE):
        p = torch.exp(q[:, block].double() @ keys.transpose(-1, -2) * scaling - lse[:, block, None].double())
        yield p * (columns[None, :] <= block[:, None])


token_score = Op(token_score_ref, native, triton)  # the first that supports the device
