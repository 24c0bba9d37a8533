"""Weights in groups along K: one scale and one zero code per row and group; the last group may be short. w =
(q - zero) * scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from quota.core.formats import INT4_GROUPS, Format
from quota.quant.affine import SMALLEST_RANGE


def groups_of(w: Tensor, form: Format = INT4_GROUPS) -> Tensor:
    """[..., K] -> [..., G, group], zeros after K."""
    group = form.group or w.shape[-1]
    return functional.pad(w, (0, -w.shape[-1] % group)).unflatten(-1, (-1, group))


def grid_of(w: Tensor, form: Format = INT4_GROUPS, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Grids of groups w [..., group] -> (scale float32 [...], zero uint8 [...]) over their range times `clip` (a number
    or [...]): [-r, r], r the larger magnitude, where the format is symmetric, else [min(low, 0), max(high, 0)]. Ranges
    are at least 1e-8."""
    low, high = w.amin(-1) * clip, w.amax(-1) * clip
    if form.symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        return reach.clamp_min(SMALLEST_RANGE) / form.steps, torch.full_like(reach, form.middle, dtype=torch.uint8)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low).clamp_min(SMALLEST_RANGE) / form.steps
    return scale, torch.round(-low / scale).clamp(form.low, form.high).to(torch.uint8)


def round_to(w: Tensor, scale: Tensor, zero: Tensor, form: Format = INT4_GROUPS) -> Tensor:
    """float w and its grid, broadcast -> uint8 codes."""
    return torch.clamp(torch.round(w / scale) + zero, form.low, form.high).to(torch.uint8)


def value_of(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes and their grid, broadcast -> (q - zero) * scale in the dtype of scale."""
    return (q.to(scale.dtype) - zero.to(scale.dtype)) * scale


def round_groups(w: Tensor, form: Format = INT4_GROUPS, clip: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest: float32 [N, K] -> (codes uint8 [N, K], scale float32 [N, G], zero uint8 [N, G]). clip in (0,
    1]: a number or [N, G]."""
    groups = groups_of(w, form)
    scale, zero = grid_of(groups, form, clip)
    return round_to(groups, scale[..., None], zero[..., None], form).flatten(-2)[:, : w.shape[1]], scale, zero


def dequantize_groups(q: Tensor, scale: Tensor, zero: Tensor, form: Format = INT4_GROUPS) -> Tensor:
    """Codes [N, K], scale and zero [N, G] -> float [N, K]."""
    return value_of(groups_of(q, form), scale[..., None], zero[..., None]).flatten(-2)[:, : q.shape[1]]
