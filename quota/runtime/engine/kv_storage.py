"""The memory of the key/value pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quota.core.formats import Format
from quota.nn.kv import KvKind, Stored


def block_bytes(page_size: int, kv_heads: int, head_dim: int, form: Format) -> int:
    """Bytes of `page_size` tokens of one layer, keys and values."""
    return 2 * page_size * kv_heads * form.vector_bytes(head_dim)


class KvStorage:
    """Keys and values of U blocks of P tokens, as their kind stores pages."""

    def __init__(
        self, blocks: int, page_size: int, kv_heads: int, head_dim: int, kind: KvKind, device: torch.device
    ) -> None:
        self.blocks, self.page_size, self.kind = blocks, page_size, kind
        self.block_bytes = block_bytes(page_size, kv_heads, head_dim, kind.form)
        self.keys, self.values = (kind.pages(blocks, kv_heads, page_size, head_dim, device) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of blocks `source` to as many blocks `target`; the two have none in common."""
        for tensor in (*self.keys, *self.values):
            tensor[list(target)] = tensor[list(source)]

    def write(self, keys: Stored, values: Stored, slot: Tensor) -> None:
        """Rows [1, Hkv, M, ...] to slot int64 [M] = block * P + offset; negative slots are not stored."""
        self.kind.page_write(self.keys, keys, slot)
        self.kind.page_write(self.values, values, slot)

    def read(self, table: Tensor, length: Tensor, capacity: int) -> tuple[Stored, Stored]:
        """table int32 [B, W], length int32 [B] -> contiguous caches [B, Hkv, capacity, ...], filled at the right
        end."""
        return self.kind.page_read(self.keys, table, length, capacity), self.kind.page_read(
            self.values, table, length, capacity
        )

    def attend(
        self, q: Tensor, table: Tensor, length: Tensor, scaling: float, angles: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q [B, H, T, ...] of the last T of length[b] slots -> out [B, T, H, D], lse [B, H, T]; angles [B, D, length]
        where q is wide."""
        return self.kind.attend_pages(q, self.keys, self.values, table, length, scaling, angles)
