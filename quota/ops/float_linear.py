"""`float_linear`: a float matrix product whose bits depend on its row alone. The output head of a quantized model."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.fma import chain_matmul
from quota.ops.weights import FloatWeight


def float_linear_ref(x: Tensor, weight: FloatWeight) -> Tensor:
    """x float32 [M, K] -> float32 [M, N] = x w^T.

    Exactness: equal bits everywhere; each output is an ascending chain of fused multiply-adds from zero over K.
    """
    return chain_matmul(x, weight.w.float().T)


float_linear = Op(float_linear_ref, native, triton)  # the first that supports the device
