"""`w4a16_linear`: float activations times packed int4 weights that share a scale and a zero in groups of 128 along K."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.fma import chain_matmul, fma
from quota.ops.placement import beside
from quota.quant.grouped import group_count, groups_of
from quota.quant.pack import unpack_uint4

_WORD_BYTES = 4


class GroupedWeight:
    """A weight in the portable layout (w_q uint8 [N, ceil(K/2)] of codes 0..15, w_scale float32 and w_zero uint8 [N, ceil(K/128)]) and, once asked for, a
    kernel's own layout."""

    def __init__(self, w_q: Tensor, w_scale: Tensor, w_zero: Tensor, k: int) -> None:
        if w_q.dtype != torch.uint8 or w_q.ndim != 2 or w_q.shape[1] != (k + 1) // 2:
            raise ValueError(f"w_q: expected uint8 [N, {(k + 1) // 2}] for K={k}, got {w_q.dtype} {tuple(w_q.shape)}")
        shape = (w_q.shape[0], group_count(k))
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
        """int32 [P, ceil(K/8), columns] of eight codes each, the lowest k lowest, and float32 [P, G, 2, columns] of scales and zeros; zero past N."""
        rows = -self.n % columns
        bytes_ = functional.pad(self.codes(), (0, -self.w_q.shape[1] % _WORD_BYTES, 0, rows))
        words = bytes_.view(-1).view(torch.int32).view(self.n + rows, bytes_.shape[1] // _WORD_BYTES)
        params = functional.pad(torch.stack((self.w_scale, self.w_zero.float()), -1), (0, 0, 0, 0, 0, rows))
        return words.unflatten(0, (-1, columns)).transpose(1, 2).contiguous(), params.unflatten(0, (-1, columns)).permute(0, 2, 3, 1).contiguous()


def w4a16_linear_ref(x: Tensor, weight: GroupedWeight, bias: Tensor | None = None) -> Tensor:
    """x float32, bfloat16 or float16 [M, K], bias float32 [N] or None -> [M, N] in the dtype of x. w = (q - zero) * scale.

    x is widened to float32; each group's sum of x (q - zero) is an ascending chain of fused multiply-adds from zero; the groups are joined by
    y = fma(sum, scale, y) in ascending order from zero; then + bias, rounded once to the dtype of x.
    Exactness: equal bits everywhere.
    """
    codes = unpack_uint4(weight.codes(), weight.k)
    b = groups_of(codes).float() - weight.w_zero[..., None].float()  # [N, G, 128]; activations past K are zero, so what lies there adds nothing
    sums = chain_matmul(groups_of(x.float()).transpose(0, 1), b.permute(1, 2, 0))
    y = x.new_zeros(x.shape[0], weight.n, dtype=torch.float32)
    for group, scale in zip(sums, weight.w_scale.T, strict=True):
        y = fma(group.double(), scale.double(), y)
    return (y if bias is None else y + bias).to(x.dtype)


w4a16_linear = Op("w4a16_linear", w4a16_linear_ref)
w4a16_linear.add("triton", triton.w4a16_linear, triton.supports)
w4a16_linear.add("native", native.w4a16_linear, native.supports)
