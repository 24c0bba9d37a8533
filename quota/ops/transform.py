"""`transform`: the Kronecker-factored transform of `quantize_act`, alone (heads of q and k use it)."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import cuda, native, triton
from quota.ops.weights import Factor
from quota.quant.fixed import fixed_kronecker


def transform_ref(x: Tensor, left: Factor | None, right: Factor | None) -> Tensor:
    """x float32 [M, K]; left of size l, right of size r, l * r = K, None for the identity -> float32 [M, K].

    Y = left^T X right on X = x.view(l, r): left first. Exactness: equal bits everywhere: integers, in the steps of
    `quota.quant.fixed`. Against real numbers the error is about 2^-16 of the row's largest value, RMS. A row with a
    value that is not finite becomes NaN.
    """
    if left is None and right is None:
        return x.contiguous()
    return fixed_kronecker(x, *(None if f is None else (f.fixed, f.exponent) for f in (left, right)))


transform = Op(transform_ref, cuda, native, triton)  # the first that supports the device
