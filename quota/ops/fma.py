"""The float order every implementation keeps: each dot product is an ascending chain of fused multiply-adds from zero.

So a float result depends on its inputs alone: not on batch, threads, tiling or instruction set.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """float32 [..., M, K] @ [..., K, N] -> float32 [..., M, N] in chain order.

    A product of two float32 is exact in float64; the sum is rounded to float64 and then to float32. That differs from a true fused
    multiply-add only where the float64 sum falls on a float32 rounding boundary (about one step in 2^29).
    """
    a, b = a.double(), b.double()
    shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = torch.zeros(*shape, a.shape[-2], b.shape[-1], dtype=torch.float32, device=a.device)
    for k in range(a.shape[-1]):
        out = (a[..., :, k, None] * b[..., None, k, :] + out).float()
    return out
