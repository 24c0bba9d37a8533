"""`kv16_paged_attention`: the kernel of `kv16_attention` on the pages of a pool."""

from __future__ import annotations

from torch import Tensor

from quota_kernels.kv4_attention import Slots
from quota_kernels.kv16_attention import attend16


def kv16_paged_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `quota.ops.kv16_paged_attention`. Nothing waits for the device."""
    if not (k.is_contiguous() and v.is_contiguous()):
        raise ValueError("k, v: expected whole, contiguous pages")
    places = k.shape[2]
    slots = Slots(table.shape[1] * places, (0, 0, 0, 0), None, length.contiguous(), table.contiguous(), places)
    return attend16(q, k, v, slots, scaling)
