"""Keys and values by the format they are stored in: their tensors, and what computes with them.

Attention, caches and the engine's pool ask the row of `KINDS`; none of them knows what a stored token looks like.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from quota import ops
from quota.core.formats import KV4, KV16, Format
from quota.core.registry import Op
from quota.ops.kv4_page_read import pages_in_order
from quota.ops.qkv_append import apply_rotary
from quota.quant.affine import dequantize_kv
from quota.quant.pack import unpack_uint4

Stored = tuple[Tensor, ...]  # keys, or values: [B, Hkv, slots, ...] each
Pair = tuple[ops.Factor | None, ops.Factor | None]
_LARGEST = torch.finfo(torch.float16).max


class KvKind(ABC):
    """One format of cached keys and values. C slots of B rows are `Stored` tensors named as `fields`, shaped
    [B, Hkv, C, ...]; in a pool of pages a unit takes the place of a row."""

    form: ClassVar[Format]
    fields: ClassVar[tuple[str, ...]]
    page_ops: ClassVar[tuple[Op, ...]]  # that a decode step calls

    def __reduce__(self) -> tuple[Any, ...]:  # there is one of each: a copied model has the same
        return kv_kind, (self.form,)

    @abstractmethod
    def empty(self, batch: int, heads: int, slots: int, dim: int, device: torch.device) -> Stored:
        """Zeros. ValueError for a head size that cannot be stored."""

    @abstractmethod
    def append(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        transforms: Pair,
        k: Stored,
        v: Stored,
        position: int,
        clips: tuple[float, float],
    ) -> Tensor:
        """As `ops.qkv_append`."""

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Stored,
        v: Stored,
        length: int,
        start: Tensor | None,
        scaling: float,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `ops.kv4_attention`."""

    def pages(self, units: int, heads: int, places: int, dim: int, device: torch.device) -> Stored:
        """The pages of a pool, zeros."""
        return self.empty(units, heads, places, dim, device)

    @abstractmethod
    def page_write(self, pages: Stored, rows: Stored, slot: Tensor) -> None:
        """As `ops.kv4_page_write`."""

    @abstractmethod
    def page_read(self, pages: Stored, table: Tensor, length: Tensor, capacity: int) -> Stored:
        """As `ops.kv4_page_read`."""

    @abstractmethod
    def attend_pages(
        self,
        q: Tensor,
        k: Stored,
        v: Stored,
        table: Tensor,
        length: Tensor,
        scaling: float,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `ops.kv4_paged_attention`."""

    @abstractmethod
    def floats(self, stored: Stored) -> Tensor:
        """float32 [B, Hkv, slots, D]."""

    @abstractmethod
    def scored(self, stored: Stored) -> Tensor | ops.Kv:
        """Keys as `ops.token_score` takes them."""


class Packed(KvKind):
    """`KV4`: the ops `kv4_*`."""

    form, fields = KV4, ("q", "scale", "zero")
    page_ops = (ops.qkv_append, ops.kv4_page_write, ops.kv4_paged_attention)

    def empty(self, batch: int, heads: int, slots: int, dim: int, device: torch.device) -> Stored:
        if dim % 2:
            raise ValueError(f"head_dim: expected an even number for the packed 4-bit cache, got {dim}")
        shape = (batch, heads, slots)
        codes = torch.zeros(*shape, self.form.code_bytes(dim), dtype=torch.uint8, device=device)
        return codes, *(torch.zeros(shape, dtype=torch.float32, device=device) for _ in self.fields[1:])

    def append(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        transforms: Pair,
        k: Stored,
        v: Stored,
        position: int,
        clips: tuple[float, float],
    ) -> Tensor:
        return ops.qkv_append(qkv, rotary, transforms, k, v, position, clips)

    def attend(
        self,
        q: Tensor,
        k: Stored,
        v: Stored,
        length: int,
        start: Tensor | None,
        scaling: float,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return ops.kv4_attention(q, k, v, length, start, scaling, shared)

    def page_write(self, pages: Stored, rows: Stored, slot: Tensor) -> None:
        ops.kv4_page_write(pages, rows, slot)

    def page_read(self, pages: Stored, table: Tensor, length: Tensor, capacity: int) -> Stored:
        read: Stored = ops.kv4_page_read(pages, table, length, capacity)
        return read

    def attend_pages(
        self,
        q: Tensor,
        k: Stored,
        v: Stored,
        table: Tensor,
        length: Tensor,
        scaling: float,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return ops.kv4_paged_attention(q, k, v, table, length, scaling, shared)

    def floats(self, stored: Stored) -> Tensor:
        q, scale, zero = stored
        return dequantize_kv(unpack_uint4(q, 2 * q.shape[-1]), scale, zero)

    def scored(self, stored: Stored) -> ops.Kv:
        q, scale, zero = (t.contiguous() for t in stored)
        return q, scale, zero


class Halves(KvKind):
    """`KV16`: the ops `kv16_*`; rotating, rounding and moving slots are torch's own steps of one value each, which
    depend on no neighbour. There is no `shared`: a bias of the keys is stored with them."""

    form, fields = KV16, ("x",)
    page_ops = (ops.kv16_paged_attention,)

    def empty(self, batch: int, heads: int, slots: int, dim: int, device: torch.device) -> Stored:
        return (torch.zeros(batch, heads, slots, dim, dtype=torch.float16, device=device),)

    def append(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        transforms: Pair,
        k: Stored,
        v: Stored,
        position: int,
        clips: tuple[float, float],
    ) -> Tensor:
        (keys,), (values,) = k, v
        batch, tokens, _ = qkv.shape
        kv_heads, d = keys.shape[1], keys.shape[3]
        heads = qkv.view(batch, tokens, -1, d).transpose(1, 2)
        parts = list(heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1))
        for i, matrix in enumerate(transforms):
            parts[i] = parts[i] if rotary is None else apply_rotary(parts[i], *rotary)
            if matrix is not None:
                rows = parts[i].reshape(-1, d).contiguous()
                parts[i] = ops.transform(rows, None, matrix).view(parts[i].shape)
        self.put(keys, parts[1], position)
        self.put(values, parts[2], position)
        return parts[0].contiguous()

    def attend(
        self,
        q: Tensor,
        k: Stored,
        v: Stored,
        length: int,
        start: Tensor | None,
        scaling: float,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert shared is None
        return ops.kv16_attention(q, *k, *v, length, start, scaling)

    @staticmethod
    def put(cache: Tensor, x: Tensor, position: int) -> None:
        """x float32 [B, Hkv, T, D] into slots position .. position + T, rounded to nearest even, at most the largest
        float16."""
        cache[:, :, position : position + x.shape[2]] = x.clamp(-_LARGEST, _LARGEST)

    def pages(self, units: int, heads: int, places: int, dim: int, device: torch.device) -> Stored:
        """One unit more than asked for: rows that are not stored go there, so that writing waits for no device."""
        return self.empty(units + 1, heads, places, dim, device)

    def page_write(self, pages: Stored, rows: Stored, slot: Tensor) -> None:
        (page,), (row,) = pages, rows
        places = page.shape[2]
        slot = torch.where(slot < 0, (len(page) - 1) * places, slot)
        page[slot // places, :, slot % places] = row[0].transpose(0, 1)

    def page_read(self, pages: Stored, table: Tensor, length: Tensor, capacity: int) -> Stored:
        return tuple(pages_in_order(page, table, length, capacity) for page in pages)

    def attend_pages(
        self,
        q: Tensor,
        k: Stored,
        v: Stored,
        table: Tensor,
        length: Tensor,
        scaling: float,
        shared: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert shared is None
        return ops.kv16_paged_attention(q, *k, *v, table, length, scaling)

    def floats(self, stored: Stored) -> Tensor:
        return stored[0].float()

    def scored(self, stored: Stored) -> Tensor:
        return self.floats(stored).contiguous()


KINDS: dict[Format, KvKind] = {kind.form: kind for kind in (Packed(), Halves())}


def kv_kind(form: Format | None) -> KvKind:
    """What computes with keys and values of a format; ValueError for one that is not stored."""
    found = None if form is None else KINDS.get(form)
    if found is None:
        raise ValueError(f"expected a cache of {', '.join(kind.words() for kind in KINDS)}, got {form}")
    return found
