"""The float order every implementation keeps: each dot product is an ascending chain of fused multiply-adds from zero.

So a float result depends on its inputs alone: not on batch, threads, tiling or instruction set.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """round(a * b + c) with one rounding, float32; a and b are float64 tensors that hold float32 values, c is float32.

    The product is exact in float64. The sum is rounded to odd (Boldo and Melquiond, "Emulation of a FMA and
    correctly-rounded sums", 2008): float64 has more than twice the bits of float32 and two to spare, so rounding that
    to float32 equals rounding the exact sum.
    """
    product, c = a * b, c.double()
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    up = torch.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & error.isfinite() & ((bits & 1) == 0)
    return torch.where(inexact, bits + up, bits).view(torch.float64).float()


def chain_matmul(a: Tensor, b: Tensor) -> Tensor:
    """float32 [..., M, K] @ [..., K, N] -> float32 [..., M, N] in chain order; one step per k, so meant for K up to
    about a thousand."""
    a, b = a.double(), b.double()
    shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = torch.zeros(*shape, a.shape[-2], b.shape[-1], dtype=torch.float32, device=a.device)
    for k in range(a.shape[-1]):
        out = fma(a[..., :, k, None], b[..., None, k, :], out)
    return out
