"""Equations (1) and (2): how much the low-bit regime disturbs each layer, and the robust scaling of that over the
candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from quota.core.errors import RecipeError

EPS = 1e-6
PERCENTILES = (10.0, 90.0)  # of equation (2)


def relative_error(difference_norm: float, float_norm: float, eps: float = EPS) -> float:
    """||X_fp - X_q|| / (||X_fp|| + eps) of one sample at one layer."""
    return difference_norm / (float_norm + eps)


def sensitivity(errors: Sequence[float]) -> float:
    """Equation (1): s_l, the median over samples of the relative errors of one layer. RecipeError on an empty or
    non-finite input."""
    if not errors:
        raise RecipeError("sensitivity: expected at least one sample, got none")
    _finite("sensitivity", errors)
    return float(median(errors))


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100) with linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def normalise(
    sensitivities: Sequence[float], low: float = PERCENTILES[0], high: float = PERCENTILES[1], eps: float = EPS
) -> list[float]:
    """Equation (2): s~ = clip((s - P_low) / (P_high - P_low + eps), 0, 1), percentiles over the given (candidate)
    layers.

    Equal sensitivities give all zeros, that is equal drops. RecipeError on an empty or non-finite input.
    """
    if not sensitivities:
        raise RecipeError("sensitivities: expected one per candidate layer, got none")
    _finite("sensitivities", sensitivities)
    bottom, top = percentile(sensitivities, low), percentile(sensitivities, high)
    return [min(1.0, max(0.0, (s - bottom) / (top - bottom + eps))) for s in sensitivities]


def _finite(field: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        if not (math.isfinite(value) and value >= 0):
            raise RecipeError(
                f"{field}[{i}]: expected a finite number of at least 0, got {value}; the quantized model's activations"
                " are broken there"
            )
