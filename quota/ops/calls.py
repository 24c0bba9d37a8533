"""Ops that the CPU and the CUDA library bind with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quota.ops.weights import PROLOGUES, Factor, Kv, dense


class Calls:
    """Each method is an op: the arguments of its contract, made dense, in the order of the C++ function.

    library: returns what has the bound functions as attributes. right: the layout of factors on the right.
    """

    def __init__(self, library: Callable[[], Any], right: Callable[[Factor], Tensor]) -> None:
        self._library, self._right = library, right

    def _factors(
        self, k: int, left: Factor | None, right: Factor | None
    ) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Tensors of the factors, the rows of the matrix that k values are, and the exponent of both; said without
        detours, because a decode step asks four times a layer."""
        if left is None:
            return (None, None, 1, 0) if right is None else (None, self._right(right), k // right.n, right.exponent)
        if right is None:
            return left.rows, None, left.n, left.exponent
        return left.rows, self._right(right), left.n, left.exponent + right.exponent

    def transform(self, x: Tensor, left: Factor | None, right: Factor | None) -> Tensor:
        if left is None and right is None:
            return x.contiguous()
        return self._library().transform(x.contiguous(), *self._factors(x.shape[1], left, right))

    def quantize_act(
        self, x: Tensor, left: Factor | None, right: Factor | None, clip: float, prologue: str | None = None
    ) -> tuple[Tensor, Tensor]:
        number = PROLOGUES.get(prologue)
        if number is None:
            raise ValueError(f"prologue: expected one of {', '.join(filter(None, PROLOGUES))}, got {prologue!r}")
        k = x.shape[1] // 2 if prologue == "silu_mul" else x.shape[1]
        return self._library().quantize_act(x.contiguous(), *self._factors(k, left, right), clip, number)

    def kv4_append(
        self, cache_q: Tensor, cache_scale: Tensor, cache_zero: Tensor, x: Tensor, position: int, clip: float
    ) -> None:
        self._library().kv4_append(cache_q, cache_scale, cache_zero, x.contiguous(), position, clip)

    def qkv_append(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        transforms: tuple[Factor | None, Factor | None],
        k: Kv,
        v: Kv,
        position: int,
        clips: tuple[float, float],
    ) -> Tensor:
        cos, sin = (None, None) if rotary is None else rotary
        matrices = [None if f is None else self._right(f) for f in transforms]
        exponents = [0 if f is None else f.exponent for f in transforms]
        return self._library().qkv_append(
            qkv.contiguous(), dense(cos), dense(sin), *matrices, *exponents, *k, *v, position, *clips
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
