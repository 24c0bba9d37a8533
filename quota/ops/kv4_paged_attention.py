"""`kv4_paged_attention`: `kv4_attention` that reads the pages of a pool where they lie. The decode step of a serving engine."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops.kv4_attention import Kv, kv4_attention
from quota.ops.kv4_page_read import kv4_page_read


def kv4_paged_attention_ref(q: Tensor, k: Kv, v: Kv, table: Tensor, length: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """q float32 [B, H, T, D] for the last T of length[b] slots; k, v pages as in `kv4_page_write`; table int32 [B, W] (units in order), length
    int32 [B], 0 for a row without work -> (out float32 [B, T, H, D], lse [B, H, T]), as `kv4_attention` on the pages read in order.

    Exactness: that of `kv4_attention`; lengths are not read on the host, so a graph of calls holds for any lengths the table has room for.
    """
    capacity = max(q.shape[2], int(length.max()))
    start = (capacity - length).to(torch.int32)
    return kv4_attention(q, kv4_page_read(k, table, length, capacity), kv4_page_read(v, table, length, capacity), capacity, start, scaling)


kv4_paged_attention = Op("kv4_paged_attention", kv4_paged_attention_ref)
