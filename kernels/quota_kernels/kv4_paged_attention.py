"""`kv4_paged_attention`: the kernels of `kv4_attention` on the pages of a pool."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quota_kernels.kv4_attention import Slots, attend


def kv4_paged_attention(
    q: Tensor,
    k: Any,
    v: Any,
    table: Tensor,
    length: Tensor,
    scaling: float,
    shared: Tensor | None = None,
    split: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """As `quota.ops.kv4_paged_attention`; split as in `kv4_attention`. Nothing waits for the device."""
    if not all(t.is_contiguous() for t in (*k, *v)):
        raise ValueError("k, v: expected whole, contiguous pages")
    places = k[0].shape[2]
    slots = Slots(table.shape[1] * places, (0, 0, 0, 0), None, length.contiguous(), table.contiguous(), places)
    return attend(q, k, v, slots, scaling, shared, split)
