"""`token_gather`: rows of kept tokens, in order."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton


def token_gather_ref(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, ...] of any dtype, index int64 [B, S'] in 0..S-1 -> [B, S', ...]. Exactness: a copy."""
    view = index.reshape(*index.shape, *([1] * (x.ndim - 2)))
    return x.gather(1, view.expand(*index.shape, *x.shape[2:]))


token_gather = Op(token_gather_ref, native, triton)  # the first that supports the device
