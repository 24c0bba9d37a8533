"""`kv16_paged_attention`: `kv16_attention` that reads the pages of a pool where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.kv4_page_read import pages_in_order
from quota.ops.kv16_attention import kv16_attention


def kv16_paged_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """q float32 [B, H, T, D] for the last T of length[b] slots; k, v float16 [U, Hkv, P, D]; table int32 [B, W] (units
    in order), length int32 [B], 0 for a row without work -> (out float32 [B, T, H, D], lse [B, H, T]), as
    `kv16_attention` on the pages read in order.

    Exactness: the bits of `kv16_attention` on the same device. Implementations for GPUs do not read lengths on the
    host.
    """
    capacity = max(q.shape[2], int(length.max()))
    keys, values = (pages_in_order(pages, table, length, capacity) for pages in (k, v))
    return kv16_attention(q, keys, values, capacity, (capacity - length).to(torch.int32), scaling)


kv16_paged_attention = Op(kv16_paged_attention_ref, native, triton)  # the first that supports the device
