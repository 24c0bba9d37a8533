"""FitPrune's offline search: how many tokens each layer may lose before its attention no longer resembles the unpruned
one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quota.core.errors import RecipeError

STEPS = 100  # alpha is searched in hundredths, as published


@dataclass(frozen=True)
class AttentionSample:
    """Attention to the visual tokens of one unpruned prompt, float [layers, V] each, of the largest head: mean over
    text (cross) and over visual queries (self)."""

    cross: np.ndarray
    self_: np.ndarray


def keep_shares(sample: AttentionSample, alpha: float) -> np.ndarray:
    """Share of the visual tokens alive in each layer [layers] when up to `alpha` of either attention mass may go.

    At each layer, of the tokens still alive, the lowest by cross and the lowest by self go as long as the mass lost
    there (tokens that went earlier included) stays within alpha of the layer's own; deleted is what both lists hold.
    What layer l deletes is gone from l + 1 on.
    """
    layers, tokens = sample.cross.shape
    alive, shares = np.full(tokens, True), np.ones(layers)
    for layer in range(layers):
        shares[layer] = alive.mean()
        gone = _lowest(sample.cross[layer], alive, alpha) & _lowest(sample.self_[layer], alive, alpha)
        alive &= ~gone
    return shares


def _lowest(mass: np.ndarray, alive: np.ndarray, alpha: float) -> np.ndarray:
    """bool [V]: the living tokens of lowest mass that may go."""
    allowed = alpha * mass.sum() - mass[~alive].sum()
    order = np.flatnonzero(alive)[np.argsort(mass[alive], kind="stable")]
    out = np.zeros_like(alive)
    out[order[np.cumsum(mass[order]) <= allowed]] = True
    return out


def search(
    samples: Sequence[AttentionSample], budget: float, ratio: Callable[[Sequence[float]], float]
) -> tuple[float, list[float]]:
    """(alpha, keep share per layer, mean over samples, non-increasing): the smallest alpha whose `ratio(shares)` is at
    most `budget`.

    RecipeError when there are no samples or even alpha 1 costs more.
    """
    if not samples:
        raise RecipeError("samples: FitPrune's search needs at least one prompt with an image, got none")
    low, high = 0, STEPS
    if ratio(_mean(samples, 1.0)) > budget:
        raise RecipeError(f"keep: FitPrune cannot reach a compute ratio of {budget:g} on these samples; ask for more")
    while low < high:
        middle = (low + high) // 2
        if ratio(_mean(samples, middle / STEPS)) <= budget:
            high = middle
        else:
            low = middle + 1
    return high / STEPS, _mean(samples, high / STEPS)


def _mean(samples: Sequence[AttentionSample], alpha: float) -> list[float]:
    shares = np.stack([keep_shares(sample, alpha) for sample in samples]).mean(0)
    return np.minimum.accumulate(shares).tolist()
