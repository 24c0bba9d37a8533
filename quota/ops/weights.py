"""What the ops take beside plain tensors: weights in their portable layouts, cached keys or values, and small rules all
backends share.

A weight keeps the layouts that backends made of it, by the backend's name.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quota.core.formats import INT4, INT4_GROUPS
from quota.ops.placement import beside
from quota.quant.fixed import fixed_factor

Kv = tuple[Tensor, Tensor, Tensor]  # q uint8 [B, Hkv, C, D/2], scale float32 [B, Hkv, C], zero float32 [B, Hkv, C]
PROLOGUES = {
    None: 0,
    "silu_mul": 1,
    "quick_gelu": 2,
    "gelu": 3,
}  # what `quantize_act` does to its input first, as numbered in csrc (quota::Prologue)
_WORD_BYTES = 4


def dense(t: Tensor | None) -> Tensor | None:
    """t, contiguous; None stays None."""
    return t if t is None or t.is_contiguous() else t.contiguous()


class PackedWeight:
    """A weight in the portable layout (w_q uint8 [N, ceil(K/2)], w_scale float32 [N]) and, once asked for, a kernel's
    own layout."""

    def __init__(self, w_q: Tensor, w_scale: Tensor, k: int) -> None:
        if w_q.dtype != torch.uint8 or w_q.ndim != 2 or w_q.shape[1] != INT4.code_bytes(k):
            raise ValueError(
                f"w_q: expected uint8 [N, {INT4.code_bytes(k)}] for K={k}, got {w_q.dtype} {tuple(w_q.shape)}"
            )
        if tuple(w_scale.shape) != (w_q.shape[0],):
            raise ValueError(f"w_scale: expected [{w_q.shape[0]}], got {tuple(w_scale.shape)}")
        self.w_q, self.w_scale, self.k, self.n = w_q.contiguous(), w_scale.float().contiguous(), k, w_q.shape[0]
        self.layouts: dict[str, tuple[Tensor, ...]] = {}

    def codes(self) -> Tensor:
        """w_q on the device of w_scale; the CUDA library leaves it on the host."""
        return beside(self.w_q, self.w_scale)


class ByteWeight:
    """A weight in the portable layout (w_q int8 [N, K], w_scale float32 [N]) and, once asked for, a kernel's own."""

    def __init__(self, w_q: Tensor, w_scale: Tensor) -> None:
        if w_q.dtype != torch.int8 or w_q.ndim != 2:
            raise ValueError(f"w_q: expected int8 [N, K], got {w_q.dtype} {list(w_q.shape)}")
        if tuple(w_scale.shape) != (len(w_q),):
            raise ValueError(f"w_scale: expected [{len(w_q)}], got {list(w_scale.shape)}")
        self.w_q, self.w_scale = w_q.contiguous(), w_scale.float().contiguous()
        self.layouts: dict[str, Any] = {}

    def panels(self, columns: int, group: int, step: int) -> Tensor:
        """int8 [P, padded K / group, columns, group], K padded to whole steps; zero past N and K."""
        n, k = self.w_q.shape
        padded = functional.pad(self.w_q, (0, -k % step, 0, -n % columns))
        return padded.view(-1, columns, padded.shape[1] // group, group).transpose(1, 2).contiguous()


class GroupedWeight:
    """A weight in the portable layout (w_q uint8 [N, ceil(K/2)] of codes 0..15, w_scale float32 and w_zero uint8 [N,
    G]), grouped as `INT4_GROUPS`, and, once asked for, a kernel's own layout."""

    def __init__(self, w_q: Tensor, w_scale: Tensor, w_zero: Tensor, k: int) -> None:
        if w_q.dtype != torch.uint8 or w_q.ndim != 2 or w_q.shape[1] != INT4_GROUPS.code_bytes(k):
            raise ValueError(
                f"w_q: expected uint8 [N, {INT4_GROUPS.code_bytes(k)}] for K={k}, got {w_q.dtype} {tuple(w_q.shape)}"
            )
        shape = (w_q.shape[0], INT4_GROUPS.groups(k))
        for name, tensor, dtype in (("w_scale", w_scale, torch.float32), ("w_zero", w_zero, torch.uint8)):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        self.w_q, self.w_scale, self.w_zero = w_q.contiguous(), w_scale.contiguous(), w_zero.contiguous()
        self.k, self.n = k, w_q.shape[0]
        self.layouts: dict[str, Any] = {}

    def codes(self) -> Tensor:
        """w_q on the device of w_scale; Triton's implementation leaves it on the host."""
        return beside(self.w_q, self.w_scale)

    def panels(self, columns: int) -> tuple[Tensor, Tensor]:
        """int32 [P, ceil(K/8), columns] of eight codes each, the lowest k lowest, and float32 [P, G, 2, columns] of
        scales and zeros; zero past N."""
        rows = -self.n % columns
        bytes_ = functional.pad(self.codes(), (0, -self.w_q.shape[1] % _WORD_BYTES, 0, rows))
        words = bytes_.view(-1).view(torch.int32).view(self.n + rows, bytes_.shape[1] // _WORD_BYTES)
        params = functional.pad(torch.stack((self.w_scale, self.w_zero.float()), -1), (0, 0, 0, 0, 0, rows))
        return words.unflatten(0, (-1, columns)).transpose(1, 2).contiguous(), params.unflatten(
            0, (-1, columns)
        ).permute(0, 2, 3, 1).contiguous()


class Factor:
    """A square factor [n, n] of a transform in fixed point (`quota.quant.fixed`): `fixed` int16 [n, n] on the matrix's
    device, times 2^`exponent`. ValueError where `fixed_factor` has one."""

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"factor: expected a square matrix, got {tuple(matrix.shape)}")
        self.fixed, self.exponent = fixed_factor(matrix)
        self.n = matrix.shape[0]

    @cached_property
    def rows(self) -> Tensor:
        """int16 [n, n rounded up to 2]: the transposed factor, zero past n."""
        return functional.pad(self.fixed.T, (0, self.n % 2)).contiguous()

    @cached_property
    def panels(self) -> Tensor:
        """int16 [ceil(n/16), ceil(n/2), 16, 2]: sixteen columns of two rows side by side, zero past n."""
        padded = functional.pad(self.fixed, (0, -self.n % 16, 0, self.n % 2))
        pairs = padded.view(padded.shape[0] // 2, 2, padded.shape[1] // 16, 16)
        return pairs.permute(2, 0, 3, 1).contiguous()


def factor_of(matrix: Tensor | None) -> Factor | None:
    """`Factor`; None stays None."""
    return None if matrix is None else Factor(matrix)


class FloatWeight:
    """w [N, K] of any float dtype, and the layouts that implementations made of it (bfloat16 stays that, all else is
    float32)."""

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.layouts: dict[str, Any] = {}
