"""`rms_norm`: root-mean-square normalisation of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.registry import Op
from quota.ops import native, triton
from quota.ops.elementwise import LANES
from quota.ops.fma import fma


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x float32 [M, K], weight float32 [K] -> float32 [M, K]: (x * (1 / sqrt(mean(x^2) + eps))) * weight.

    Exactness: equal bits everywhere. Squares are summed in sixteen chains of fused multiply-adds, chain i taking i, i +
    16, ...; the chains are then added in ascending order.
    """
    m, k = x.shape
    lanes = x.new_zeros(m, LANES)
    for piece in torch.nn.functional.pad(x, (0, -k % LANES)).split(LANES, -1):
        lanes = fma(piece.double(), piece.double(), lanes)
    total = x.new_zeros(m)
    for lane in lanes.unbind(-1):
        total = total + lane
    # float64 square root and division, rounded once more, are correctly rounded float32 ones; torch's own float32 ones
    # need not be
    root = (total / k + torch.tensor(eps, dtype=torch.float32, device=x.device)).double().sqrt().float()
    return x * (1.0 / root)[:, None] * weight


rms_norm = Op(rms_norm_ref, native, triton)  # the first that supports the device
