"""`w8a8_linear`: rows to int8, a scale each, times int8 weights, a scale per output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.formats import INT8
from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.weights import ByteWeight
from quota.quant.affine import quantize_symmetric


def w8a8_linear_ref(x: Tensor, weight: ByteWeight, bias: Tensor | None = None) -> Tensor:
    """x float32 [M, K], bias float32 [N] or None -> float32 [M, N].

    A row's scale is max(|x|) / 127 (at least 1e-8 / 127), its codes round(x * (1 / scale)), halves to even; acc = sum_k
    x_q w_q in int32; y = (float(acc) * w_scale[n]) * scale[m], then + bias[n]. A row that is not finite gives what its
    scale does to 0. Exactness: equal bits everywhere (integers are exact, each float step is one IEEE operation).
    """
    q, scale = quantize_symmetric(x, 1.0, INT8)
    q = torch.where(scale.isfinite()[:, None], q, 0)
    acc = (q.double() @ weight.w_q.double().T).to(torch.int32)  # |acc| <= 2^14 K: exact in float64
    y = (acc.float() * weight.w_scale) * scale[:, None]
    return y if bias is None else y + bias


w8a8_linear = Op(w8a8_linear_ref, native, triton)  # the first that supports the device
