"""`float_linear`: a float matrix product whose bits depend on its row alone. The output head of a quantized model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.fma import chain_matmul


class FloatWeight:
    """w [N, K] of any float dtype, and the layouts that implementations made of it (bfloat16 stays that, all else is float32)."""

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.layouts: dict[str, Any] = {}


def float_linear_ref(x: Tensor, weight: FloatWeight) -> Tensor:
    """x float32 [M, K] -> float32 [M, N] = x w^T.

    Exactness: equal bits everywhere; each output is an ascending chain of fused multiply-adds from zero over K.
    """
    return chain_matmul(x, weight.w.float().T)


float_linear = Op("float_linear", float_linear_ref)
float_linear.add("triton", triton.float_linear, triton.supports)
float_linear.add("native", native.float_linear, native.supports)
