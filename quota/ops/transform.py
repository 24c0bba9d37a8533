"""`transform`: the Kronecker-factored float transform of `quantize_act`, alone (heads of q and k use it)."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.fma import chain_matmul


def transform_ref(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """x float32 [M, K]; left [l, l]; right [r, r], l * r = K, None for the identity -> float32 [M, K].

    Y = left^T X right on X = x.view(l, r): left first, rounded to float32, then right.
    Exactness: ascending chains of fused multiply-adds (`quota.ops.fma`): equal bits on every instruction set.
    """
    if left is None and right is None:
        return x.contiguous()
    m, k = x.shape
    rows = left.shape[0] if left is not None else k // right.shape[0]  # type: ignore[union-attr]
    y = x.reshape(m, rows, k // rows)
    if left is not None:
        y = chain_matmul(left.T, y)
    if right is not None:
        y = chain_matmul(y, right)
    return y.reshape(m, k)


transform = Op(transform_ref, cuda, native, triton)  # the first that supports the device
