"""AWQ: scaling the input channels that matter before rounding, and clipping each group's range.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (MLSys 2024). With
x W^T = (x / s) (W s)^T, rounding W s leaves less error on a channel whose s is large, as long as the channel does not
decide its group's range. s = a^alpha, a the mean magnitude of each input channel; alpha is searched on a grid for the
least output error on samples of the input. Then the range of every group is shrunk by the factor of a second grid that
gives the least error of the group's share of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quota.core.formats import INT4_GROUPS, Format
from quota.quant.grouped import dequantize_groups, grid_of, groups_of, round_groups, round_to, value_of

ALPHAS = tuple(i / 20 for i in range(20))  # 0 is no scaling
CLIPS = tuple(1 - i / 20 for i in range(10))  # 1 is no clipping; the paper's code shrinks down to half the range
_LEAST_MAGNITUDE = 1e-4
_ROWS_AT_ONCE = 64  # weight rows of a clip search: bounds its memory


def search_scale(
    weights: Sequence[Tensor], x: Tensor, magnitude: Tensor, form: Format = INT4_GROUPS
) -> tuple[Tensor, float]:
    """weights [N_i, K] that read the same input, x [R, K] samples of it, magnitude [K] the mean |x| over all inputs ->
    (s [K] float32, alpha).

    s minimises the squared output error of all weights together, rounded to nearest; geometric mean of its extremes 1.
    alpha 0 (s = 1) is among the candidates and wins ties, so the error on x is never larger than that of rounding to
    nearest.
    """
    x, whole = x.float(), torch.cat(list(weights)).float()
    target = x @ whole.T
    best: tuple[float, Tensor, float] | None = None
    for alpha in ALPHAS:
        s = magnitude.float().clamp_min(_LEAST_MAGNITUDE) ** alpha
        s = s / (s.max() * s.min()).sqrt()
        rounded = dequantize_groups(*round_groups(whole * s, form), form) / s
        error = float((x @ rounded.T - target).double().square().sum())
        if best is None or error < best[0]:
            best = error, s, alpha
    assert best is not None
    return best[1], best[2]


def search_clip(weight: Tensor, x: Tensor, form: Format = INT4_GROUPS) -> Tensor:
    """weight [N, K] and x [R, K], both already scaled -> [N, G]: the factor of each group's range. All 1 for a weight
    whose output error on x the searched factors would enlarge (each group is judged by its own share, and shares add
    up)."""
    x, weight = x.float(), weight.float()
    parts = groups_of(x, form).transpose(0, 1)  # [G, R, group]
    clips = torch.cat([_search_rows(rows, parts, form) for rows in weight.split(_ROWS_AT_ONCE)])
    if _output_error(weight, x, clips, form) < _output_error(weight, x, torch.ones_like(clips), form):
        return clips
    return torch.ones_like(clips)


def _search_rows(rows: Tensor, parts: Tensor, form: Format) -> Tensor:
    groups = groups_of(rows, form)  # [n, G, group]
    best = torch.full(groups.shape[:2], torch.inf, device=rows.device)
    chosen = torch.ones_like(best)
    for clip in CLIPS:
        scale, zero = grid_of(groups, form, clip)
        grid = scale[..., None], zero[..., None]
        lost = groups - value_of(round_to(groups, *grid, form), *grid)
        error = (parts @ lost.permute(1, 2, 0)).square().sum(1).T  # [n, G]
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, clip, chosen)
    return chosen


def _output_error(weight: Tensor, x: Tensor, clips: Tensor, form: Format) -> float:
    rounded = dequantize_groups(*round_groups(weight, form, clips), form)
    return float((x @ (weight - rounded).T).double().square().sum())


def awq(weight: Tensor, x: Tensor, *, form: Format = INT4_GROUPS, clip: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """An already scaled weight [N, K] and samples [R, K] of its already scaled input -> (codes uint8 [N, K], scale
    float32, zero uint8 [N, G]).

    clip: search each group's range; the paper leaves queries and keys unclipped, since their error is felt through the
    scores.
    """
    clips = (
        search_clip(weight, x, form)
        if clip
        else weight.new_ones(len(weight), form.groups(weight.shape[1]), dtype=torch.float32)
    )
    return round_groups(weight.float(), form, clips)
