"""The memory of the key/value pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quota import ops
from quota.core.formats import KV4
from quota.ops.weights import Kv


def block_bytes(page_size: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of `page_size` tokens of one layer: codes, and scale and zero per head, for keys and for values."""
    return 2 * page_size * kv_heads * KV4.vector_bytes(head_dim)


class KvStorage:
    """Keys and values of U blocks of P tokens: q uint8 [U, Hkv, P, D/2], scale and zero float32 [U, Hkv, P] each."""

    def __init__(self, blocks: int, page_size: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.blocks, self.page_size, self.head_dim = blocks, page_size, head_dim
        self.block_bytes = block_bytes(page_size, kv_heads, head_dim)
        self.keys, self.values = (self._zeros(kv_heads, device) for _ in range(2))

    def _zeros(self, kv_heads: int, device: torch.device) -> Kv:
        shape = (self.blocks, kv_heads, self.page_size)
        codes = torch.zeros(*shape, KV4.code_bytes(self.head_dim), dtype=torch.uint8, device=device)
        return codes, torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    @property
    def nbytes(self) -> int:
        return self.blocks * self.block_bytes

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Contents of blocks `source` to as many blocks `target`; the two have none in common."""
        for tensor in (*self.keys, *self.values):
            tensor[list(target)] = tensor[list(source)]

    def write(self, keys: Kv, values: Kv, slot: Tensor) -> None:
        """Rows [1, Hkv, M, ...] to slot int64 [M] = block * P + offset; negative slots are not stored."""
        ops.kv4_page_write(self.keys, keys, slot)
        ops.kv4_page_write(self.values, values, slot)

    def read(self, table: Tensor, length: Tensor, capacity: int) -> tuple[Kv, Kv]:
        """table int32 [B, W], length int32 [B] -> contiguous caches [B, Hkv, capacity, ...], filled at the right
        end."""
        return ops.kv4_page_read(self.keys, table, length, capacity), ops.kv4_page_read(
            self.values, table, length, capacity
        )

    def attend(
        self, q: Tensor, table: Tensor, length: Tensor, scaling: float, angles: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """q [B, H, T, ...] of the last T of length[b] slots -> out [B, T, H, D], lse [B, H, T]; angles [B, D, length]
        where q is wide."""
        return ops.kv4_paged_attention(q, self.keys, self.values, table, length, scaling, angles)
