"""`token_gather`: rows of kept tokens, in order."""

from __future__ import annotations

from torch import Tensor

from quota.core.registry import Op


def token_gather_ref(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, ...], index int64 [B, S'] -> [B, S', ...]. Exactness: a copy."""
    view = index.reshape(*index.shape, *([1] * (x.ndim - 2)))
    return x.gather(1, view.expand(*index.shape, *x.shape[2:]))


token_gather = Op("token_gather", token_gather_ref)
