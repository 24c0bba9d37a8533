"""`w4a4_linear`: packed int4 activations times packed int4 weights, exact int32, scales and bias in the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.placement import beside
from quota.quant.pack import unpack_int4


class PackedWeight:
    """A weight in the portable layout (w_q uint8 [N, ceil(K/2)], w_scale float32 [N]) and, once asked for, a kernel's own layout."""

    def __init__(self, w_q: Tensor, w_scale: Tensor, k: int) -> None:
        if w_q.dtype != torch.uint8 or w_q.ndim != 2 or w_q.shape[1] != (k + 1) // 2:
            raise ValueError(f"w_q: expected uint8 [N, {(k + 1) // 2}] for K={k}, got {w_q.dtype} {tuple(w_q.shape)}")
        if tuple(w_scale.shape) != (w_q.shape[0],):
            raise ValueError(f"w_scale: expected [{w_q.shape[0]}], got {tuple(w_scale.shape)}")
        self.w_q, self.w_scale, self.k, self.n = w_q.contiguous(), w_scale.float().contiguous(), k, w_q.shape[0]
        self.layouts: dict[str, tuple[Tensor, ...]] = {}

    def codes(self) -> Tensor:
        """w_q on the device of w_scale; the CUDA library leaves it on the host."""
        return beside(self.w_q, self.w_scale)


def w4a4_linear_ref(x_q: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None = None, x_zero: Tensor | None = None) -> Tensor:
    """x_q uint8 [M, ceil(K/2)], x_scale float32 [M], bias float32 [N] or None, x_zero int32 [M] or None -> float32 [M, N].

    acc = sum_k x_q w_q (- x_zero * sum_k w_q) in int32; y = (float(acc) * w_scale[n]) * x_scale[m], then + bias[n].
    Exactness: equal bits everywhere (integers are exact, each float step is one IEEE operation).
    """
    a, w = unpack_int4(x_q, weight.k), unpack_int4(weight.codes(), weight.k)
    acc = (a.double() @ w.double().T).to(torch.int32)  # |acc| <= 64 K: exact in float64
    if x_zero is not None:
        acc = acc - x_zero[:, None] * w.sum(-1, dtype=torch.int32)
    y = (acc.float() * weight.w_scale) * x_scale[:, None]
    return y if bias is None else y + bias


w4a4_linear = Op("w4a4_linear", w4a4_linear_ref)
w4a4_linear.add("triton", triton.w4a4_linear, triton.supports)
w4a4_linear.add("native", native.w4a4_linear, native.supports)
