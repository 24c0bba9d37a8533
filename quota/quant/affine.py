"""Scales, zeros and rounding (half to even). One float32 reciprocal per scale, so kernels can reproduce every bit."""

from __future__ import annotations

import torch
from torch import Tensor

from quota.core.formats import INT4, KV4, Format
from quota.quant.pack import pack_int4

SMALLEST_RANGE = 1e-8  # an all-zero row still has a positive scale


def _codes(scaled: Tensor, form: Format) -> Tensor:
    """Rounded and clamped. A NaN becomes code 0: its row's scale is NaN or infinite too, so the fault reaches the
    output."""
    return torch.nan_to_num(torch.round(scaled), nan=0.0).clamp(form.low, form.high)


def symmetric_scale(x: Tensor, clip: float | Tensor = 1.0, form: Format = INT4) -> Tensor:
    """float32 [..., K] -> [...]: max(|x|) * clip, at least 1e-8, divided by the format's steps."""
    reach = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    return (reach * clip).clamp_min(SMALLEST_RANGE) / form.steps


def quantize_symmetric(x: Tensor, clip: float | Tensor = 1.0, form: Format = INT4) -> tuple[Tensor, Tensor]:
    """float32 [..., K] -> (int8 codes [..., K], float32 scale [...]). `clip` in (0, 1]: a number or one per row."""
    scale = symmetric_scale(x, clip, form)
    return _codes(x * (1.0 / scale)[..., None], form).to(torch.int8), scale


def dequantize_symmetric(q: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., K], scale [...] -> float32 [..., K]."""
    return q.to(scale.dtype) * scale[..., None]


def quantize_asymmetric(x: Tensor, form: Format = INT4) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., K] -> (int8 codes [..., K], scale [...], int32 zero [...]) with x ~ scale * (q - zero)."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    scale = (high - low).clamp_min(SMALLEST_RANGE) / (form.high - form.low)
    inverse = 1.0 / scale
    zero = (form.low - torch.round(low * inverse)).to(torch.int32)
    q = torch.clamp(torch.round(x * inverse[..., None]) + zero[..., None], form.low, form.high)
    return q.to(torch.int8), scale, zero


def quantize_kv(x: Tensor, clip: float | Tensor = 1.0, form: Format = KV4) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [..., D] -> (uint8 codes [..., D], scale [...], zero [...]) with x ~ q * scale + zero, per token and
    head."""
    low, high = x.amin(-1) * clip, x.amax(-1) * clip
    scale = (high - low).clamp_min(SMALLEST_RANGE) / form.steps
    return _codes((x - low[..., None]) * (1.0 / scale)[..., None], form).to(torch.uint8), scale, low


def dequantize_kv(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """uint8 [..., D], scale [...], zero [...] -> float32 [..., D]."""
    return q.to(scale.dtype) * scale[..., None] + zero[..., None]


def quantize_weight(w: Tensor, clip: float | Tensor = 1.0, form: Format = INT4) -> tuple[Tensor, Tensor]:
    """Round to nearest per output channel: float [N, K] -> (packed uint8 [N, ceil(K/2)], float32 scale [N]). `clip`:
    number or [N]."""
    q, scale = quantize_symmetric(w.float(), clip, form)
    return pack_int4(q), scale
