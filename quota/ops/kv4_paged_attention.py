"""`kv4_paged_attention`: `kv4_attention` that reads the pages of a pool where they lie. What a serving engine attends
with."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.kv4_attention import kv4_attention
from quota.ops.kv4_page_read import kv4_page_read
from quota.ops.weights import Kv


def kv4_paged_attention_ref(
    q: Tensor, k: Kv, v: Kv, table: Tensor, length: Tensor, scaling: float, shared: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q float32 [B, H, T, D] for the last T of length[b] slots; k, v pages as in `kv4_page_write`; table int32 [B, W]
    (units in order), length int32 [B], 0 for a row without work -> (out float32 [B, T, H, D], lse [B, H, T]), as
    `kv4_attention` on the pages read in order.

    shared float32 [B, E, C >= length]: as there, with slot 0 of a row first; q is then [B, H, T, D + E].

    Exactness: the bits of `kv4_attention` on the same device. Implementations for GPUs do not read lengths on the host,
    so a graph of calls holds for any lengths that the table (and `shared`) has room for.
    """
    capacity = max(q.shape[2], int(length.max()))
    start = (capacity - length).to(torch.int32)
    right = None
    if shared is not None:
        right = torch.cat([shared.new_zeros(*shared.shape[:2], capacity), shared], 2)
        slot = (
            (torch.arange(capacity, device=q.device) + length[:, None])[:, None].expand(-1, shared.shape[1], -1).long()
        )
        right = right.gather(2, slot)
    return kv4_attention(
        q,
        kv4_page_read(k, table, length, capacity),
        kv4_page_read(v, table, length, capacity),
        capacity,
        start,
        scaling,
        right,
    )


kv4_paged_attention = Op(kv4_paged_attention_ref, cuda, native, triton)  # the first that supports the device
