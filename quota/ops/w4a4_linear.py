"""`w4a4_linear`: packed int4 activations times packed int4 weights, exact int32, scales and bias in the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.weights import PackedWeight
from quota.quant.pack import unpack_int4


def w4a4_linear_ref(
    x_q: Tensor, x_scale: Tensor, weight: PackedWeight, bias: Tensor | None = None, x_zero: Tensor | None = None
) -> Tensor:
    """x_q uint8 [M, ceil(K/2)], x_scale float32 [M], bias float32 [N] or None, x_zero int32 [M] or None -> float32 [M,
    N].

    acc = sum_k x_q w_q (- x_zero * sum_k w_q) in int32; y = (float(acc) * w_scale[n]) * x_scale[m], then + bias[n].
    Exactness: equal bits everywhere (integers are exact, each float step is one IEEE operation).
    """
    a, w = unpack_int4(x_q, weight.k), unpack_int4(weight.codes(), weight.k)
    acc = (a.double() @ w.double().T).to(torch.int32)  # |acc| <= 64 K: exact in float64
    if x_zero is not None:
        acc = acc - x_zero[:, None] * w.sum(-1, dtype=torch.int32)
    y = (acc.float() * weight.w_scale) * x_scale[:, None]
    return y if bias is None else y + bias


w4a4_linear = Op(w4a4_linear_ref, cuda, native, triton)  # the first that supports the device
