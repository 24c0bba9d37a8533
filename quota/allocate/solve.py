"""Equations (3) and (4): the total drop budget, shared over the candidate layers by a softmax, as a keep table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quota.allocate.sensitivity import normalise
from quota.core.errors import RecipeError


def drop_shares(normalised: Sequence[float], tau: float) -> list[float]:
    """p_l of equation (3): softmax of -s~/tau. Sums to 1; less sensitive layers get more; tau -> inf is equal shares.

    Exactly equivariant under permutation (the normaliser is a correctly rounded sum).
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise RecipeError(f"tau: expected a finite temperature above 0, got {tau}")
    if not normalised:
        raise RecipeError("candidates: expected at least one layer, got none")
    least = min(normalised)  # softmax is shift invariant: the largest exponent becomes 0
    weights = [math.exp(-(s - least) / tau) for s in normalised]
    total = math.fsum(weights)
    return [w / total for w in weights]


def keep_table(shares: Sequence[float], final_keep: float) -> list[float]:
    """Equation (4): r_i = max(r_min, 1 - sum_{j<=i} (1 - r_min) p_j): non-increasing, inside [r_min, 1], ending at
    r_min exactly."""
    check_keep(final_keep)
    budget = 1.0 - final_keep
    keep = [min(1.0, max(final_keep, 1.0 - budget * math.fsum(shares[: i + 1]))) for i in range(len(shares))]
    keep[-1] = final_keep
    return keep


def allocate(sensitivities: Sequence[float], final_keep: float, tau: float) -> list[float]:
    """Equations (2) to (4) in one: s_l of the candidates in layer order -> keep ratio per candidate."""
    return keep_table(drop_shares(normalise(sensitivities), tau), final_keep)


def uniform(candidates: int, final_keep: float) -> list[float]:
    """The stage-wise baselines' table: the same drop at every candidate layer."""
    if candidates < 1:
        raise RecipeError("candidates: expected at least one layer, got none")
    return keep_table([1.0 / candidates] * candidates, final_keep)


def check_keep(final_keep: float) -> None:
    """RecipeError unless 0 < final_keep <= 1."""
    if isinstance(final_keep, bool) or not 0 < final_keep <= 1:
        raise RecipeError(f"keep: expected a ratio above 0 and at most 1, got {final_keep}")
