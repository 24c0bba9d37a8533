"""Functions of single float32 values in a fixed sequence of IEEE operations, so that every implementation gives the
same bits.

The vector and scalar versions in a math library differ in the last bit, so with them a result would depend on where a
token lies in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quota.ops.fma import fma

LANES = 16
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)  # Cephes expf
# log Phi(-a): minimax on [0, 6.5] with the weight of `gelu`'s error, falling ever faster above; the last is log 0.5
_LOG_PHI = (
    -2.71311613e-8,
    7.48082016e-7,
    -8.90884803e-6,
    5.87551549e-5,
    -2.07808291e-4,
    1.82192598e-5,
    4.80406592e-3,
    -3.63481157e-2,
    -3.18306506e-1,
    -7.97884881e-1,
    -6.93147182e-1,
)
_FURTHEST = 16.0  # |x| from which on e^(log Phi) is 0
_SLOPES = {"silu_mul": 1.0, "quick_gelu": 1.702}
PROLOGUES = (*_SLOPES, "gelu")


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


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) of float32 x, Phi the normal distribution function, as max(x, 0) - |x| Phi(-|x|).

    That never subtracts two equal numbers, so negative x keep their digits: the error is at most 3.5e-8 for x in [-6,
    0] (relative 2.2e-7 for x in [-1, 0]) and 1.5e-7 relative for positive x, where 0.5 x (1 + erf(x / sqrt 2)) in
    float32 errs by 9e-7 and 3e-7. 0 at minus infinity.
    """
    a = x.abs().clamp(max=_FURTHEST)
    p = torch.full_like(x, _LOG_PHI[0])
    for coefficient in _LOG_PHI[1:]:
        p = _fma(p, a, coefficient)
    return torch.where(x < 0, 0.0, x) - a * exponential(p)


def apply_prologue(x: Tensor, name: str) -> Tensor:
    """float32 x [M, K] -> [M, K], or [M, 2K] (gate, then up) for `silu_mul`: silu(gate) * up; x * sigmoid(1.702 x) for
    `quick_gelu`, `gelu`."""
    if name not in PROLOGUES:
        raise ValueError(f"prologue: expected one of {', '.join(PROLOGUES)}, got {name!r}")
    if name == "silu_mul":
        if x.shape[-1] % 2:
            raise ValueError(f"x: expected gate and up halves of one size, got {x.shape[-1]} features")
        gate, up = x.chunk(2, -1)
        return gated_by_sigmoid(gate, _SLOPES[name]) * up
    if name == "gelu":
        return gelu(x)
    return gated_by_sigmoid(x, _SLOPES[name])
