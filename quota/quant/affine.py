"""Scales, zeros and rounding (half to even). One float32 reciprocal per scale, so kernels can reproduce every bit."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.quant.pack import pack_int4

SMALLEST_RANGE = 1e-8  # an all-zero row still has a positive scale


def _codes(scaled: Tensor, low: int, high: int) -> Tensor:
    """Rounded and clamped. A NaN becomes code 0: its row's scale is NaN or infinite too, so the fault reaches the
    output."""
    return torch.nan_to_num(torch.round(scaled), nan=0.0).clamp(low, high)


def symmetric_scale(x: Tensor, clip: float | Tensor = 1.0) -> Tensor:
    """float32 [..., K] -> [...]: max(|x|) * clip / 7, at least 1e-8 / 7."""
    reach = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    return (reach * clip).clamp_min(SMALLEST_RANGE) / 7.0


def quantize_symmetric(x: Tensor, clip: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """float32 [..., K] -> (int8 [..., K] in -8..7, float32 scale [...]). `clip` in (0, 1]: a number or one per row."""
    scale = symmetric_scale(x, clip)
    return _codes(x * (1.0 / scale)[..., None], -8, 7).to(torch.int8), scale


def dequantize_symmetric(q: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., K], scale [...] -> float32 [..., K]."""
    return q.to(scale.dtype) * scale[..., None]


def quantize_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., K] -> (int8 [..., K] in -8..7, scale [...], int32 zero [...]) with x ~ scale * (q - zero)."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    scale = (high - low).clamp_min(SMALLEST_RANGE) / 15.0
    inverse = 1.0 / scale
    zero = (-8 - torch.round(low * inverse)).to(torch.int32)
    q = torch.clamp(torch.round(x * inverse[..., None]) + zero[..., None], -8, 7)
    return q.to(torch.int8), scale, zero


def quantize_kv(x: Tensor, clip: float | Tensor = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., D] -> (uint8 [..., D] in 0..15, scale [...], zero [...]) with x ~ q * scale + zero, per token and
    head."""
    low, high = x.amin(-1) * clip, x.amax(-1) * clip
    scale = (high - low).clamp_min(SMALLEST_RANGE) / 15.0
    return _codes((x - low[..., None]) * (1.0 / scale)[..., None], 0, 15).to(torch.uint8), scale, low


def dequantize_kv(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """uint8 [..., D], scale [...], zero [...] -> float32 [..., D]."""
    return q.to(scale.dtype) * scale[..., None] + zero[..., None]


def quantize_weight(w: Tensor, clip: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Round to nearest per output channel: float [N, K] -> (packed uint8 [N, ceil(K/2)], float32 scale [N]). `clip`:
    number or [N]."""
    q, scale = quantize_symmetric(w.float(), clip)
    return pack_int4(q), scale
