"""Functions of single float32 values in a fixed sequence of IEEE operations, so that every implementation gives the same bits.

The vector and scalar versions in a math library differ in the last bit, so with them a result would depend on where a token lies in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quota.ops.fma import fma

LANES = 16
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)  # Cephes expf
_SLOPES = {"silu_mul": 1.0, "quick_gelu": 1.702}
PROLOGUES = tuple(_SLOPES)


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    b, c = (x if isinstance(x, Tensor) else torch.full_like(a, x) for x in (b, c))
    return fma(a.double(), b.double(), c)


def exponential(x: Tensor) -> Tensor:
    """e^x of float32 x: 0 below -87, constant above 88, relative error about 1e-7."""
    bounded = x.clamp(-87.0, 88.0)
    n = torch.round(bounded * 1.44269504088896341)
    r = _fma(n, 2.12194440e-4, _fma(n, -0.693359375, bounded))
    p = torch.full_like(x, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = _fma(p, r, coefficient)
    p = _fma(p, r * r, r) + 1.0
    power = ((n.nan_to_num(0.0).int() + 127) << 23).view(torch.float32)
    return torch.where(x < -87.0, 0.0, p * power)


def gated_by_sigmoid(x: Tensor, slope: float) -> Tensor:
    """x / (1 + e^(-slope x)), float32: SiLU for slope 1, CLIP's approximate GELU for slope 1.702."""
    return x / (1.0 + exponential(x * -slope))


def apply_prologue(x: Tensor, name: str) -> Tensor:
    """float32 x [M, K] -> [M, K], or [M, 2K] (gate, then up) for `silu_mul`: silu(gate) * up, or x * sigmoid(1.702 x) for `quick_gelu`."""
    if name not in _SLOPES:
        raise ValueError(f"prologue: expected one of {', '.join(PROLOGUES)}, got {name!r}")
    if name == "silu_mul":
        if x.shape[-1] % 2:
            raise ValueError(f"x: expected gate and up halves of one size, got {x.shape[-1]} features")
        gate, up = x.chunk(2, -1)
        return gated_by_sigmoid(gate, _SLOPES[name]) * up
    return gated_by_sigmoid(x, _SLOPES[name])
