"""Ops that the CPU and the CUDA library bind with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quota.ops.weights import PROLOGUES, Kv, dense


class Calls:
    """Each method is an op: the arguments of its contract, made dense, in the order of the C++ function.

    library: returns what has the bound functions as attributes.
    """

    def __init__(self, library: Callable[[], Any]) -> None:
        self._library = library

    def transform(self, x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None and right is None:
            return x.contiguous()
        return self._library().transform(x.contiguous(), dense(left), dense(right))

    def quantize_act(
        self, x: Tensor, left: Tensor | None, right: Tensor | None, clip: float, prologue: str | None = None
    ) -> tuple[Tensor, Tensor]:
        number = PROLOGUES.get(prologue)
        if number is None:
            raise ValueError(f"prologue: expected one of {', '.join(filter(None, PROLOGUES))}, got {prologue!r}")
        return self._library().quantize_act(x.contiguous(), dense(left), dense(right), clip, number)

    def kv4_append(
        self, cache_q: Tensor, cache_scale: Tensor, cache_zero: Tensor, x: Tensor, position: int, clip: float
    ) -> None:
        self._library().kv4_append(cache_q, cache_scale, cache_zero, x.contiguous(), position, clip)

    def qkv_append(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        transforms: tuple[Tensor | None, Tensor | None],
        k: Kv,
        v: Kv,
        position: int,
        clips: tuple[float, float],
    ) -> Tensor:
        cos, sin = (None, None) if rotary is None else rotary
        return self._library().qkv_append(
            qkv.contiguous(), dense(cos), dense(sin), *map(dense, transforms), *k, *v, position, *clips
        )

    def kv4_attention(
        self, q: Tensor, k: Kv, v: Kv, length: int, start: Tensor | None, scaling: float, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._library().kv4_attention(q.contiguous(), *k, *v, length, dense(start), scaling, dense(shared))

    def kv4_paged_attention(
        self, q: Tensor, k: Kv, v: Kv, table: Tensor, length: Tensor, scaling: float, shared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._library().kv4_paged_attention(
            q.contiguous(), *k, *v, table.contiguous(), length.contiguous(), scaling, dense(shared)
        )
