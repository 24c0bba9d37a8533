"""int4 weights in groups of 128 along K: one scale and one zero code per row and group; the last group may be short. w
= (q - zero) * scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quota.quant.affine import SMALLEST_RANGE

GROUP = 128
SYMMETRIC_ZERO = 8  # codes 0..15 stand for -8..7


def group_count(k: int) -> int:
    """Groups of a row of K weights."""
    return -(-k // GROUP)


def groups_of(w: Tensor) -> Tensor:
    """[..., K] -> [..., G, 128], zeros after K."""
    return functional.pad(w, (0, -w.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def grid_asymmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The grid over [min(low, 0), max(high, 0)]: (scale float32 at least 1e-8 / 15, zero uint8 in 0..15), shaped as the
    bounds."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low).clamp_min(SMALLEST_RANGE) / 15.0
    return scale, torch.round(-low / scale).clamp(0, 15).to(torch.uint8)


def grid_symmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The grid over [-r, r], r the larger magnitude: (scale float32, zero 8), shaped as the bounds."""
    reach = torch.maximum(low.abs(), high.abs())
    return reach.clamp_min(SMALLEST_RANGE) / 7.0, torch.full_like(reach, SYMMETRIC_ZERO, dtype=torch.uint8)


def grid_of(w: Tensor, symmetric: bool = False, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Grids of groups w [..., 128] -> (scale [...], zero [...]) over their range times `clip` (a number or [...])."""
    bounds = w.amin(-1) * clip, w.amax(-1) * clip
    return grid_symmetric(*bounds) if symmetric else grid_asymmetric(*bounds)


def round_to(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float w and its grid, broadcast -> codes uint8 in 0..15."""
    return torch.clamp(torch.round(w / scale) + zero, 0, 15).to(torch.uint8)


def value_of(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes and their grid, broadcast -> (q - zero) * scale in the dtype of scale."""
    return (q.to(scale.dtype) - zero.to(scale.dtype)) * scale


def round_groups(w: Tensor, symmetric: bool = False, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: float32 [N, K] -> (codes uint8 [N, K], scale float32 [N, G], zero uint8 [N, G]). clip in (0,
    1]: a number or [N, G]."""
    groups = groups_of(w)
    scale, zero = grid_of(groups, symmetric, clip)
    return round_to(groups, scale[..., None], zero[..., None]).flatten(-2)[:, : w.shape[1]], scale, zero


def dequantize_groups(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes [N, K], scale and zero [N, G] -> float [N, K]."""
    return value_of(groups_of(q), scale[..., None], zero[..., None]).flatten(-2)[:, : q.shape[1]]
