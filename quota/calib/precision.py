"""The float types of a block: products in one that the device is quick at, everything that is rounded in float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def products_in(dtype: torch.dtype, x: Tensor) -> AbstractContextManager[object]:
    """While open, matrix products and attention on the device of x are computed in `dtype`, their sums as the device
    sums them."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype)


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """Inside `products_in`: what is transformed and rounded stays float32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
