"""Paired differences of retention, with intervals that hold for all comparisons of a table at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from quota.eval.results import Comparison
from quota.eval.statistics import Interval, interval


def compared(
    pairs: Sequence[tuple[str, str]], totals: dict[str, float], draws: dict[str, np.ndarray]
) -> list[Comparison]:
    """Row minus other row for each pair. totals: name -> retention; draws: name -> [resamples], as of
    `resampled_retention`.

    The corrected intervals are the differences plus and minus c standard errors, c the 95th percentile over resamples
    of the largest |resampled difference - difference| / standard error of any pair (single-step max-t; Westfall and
    Young 1993): in 95 of 100 tables of rows that do not differ, no verdict says that they do.
    """
    if not pairs:
        return []
    values = np.array([totals[a] - totals[b] for a, b in pairs])
    drawn = np.stack([draws[a] - draws[b] for a, b in pairs])  # [pairs, resamples]
    error = np.nanstd(drawn, axis=1)
    away = np.abs(drawn - values[:, None]) / np.where(error > 0, error, np.inf)[:, None]
    largest = np.nanmax(away, axis=0)
    margin = float(np.nanpercentile(largest, 95)) * error
    return [
        _comparison(a, b, interval(float(value), draw), float(value), float(wide))
        for (a, b), value, draw, wide in zip(pairs, values, drawn, margin, strict=True)
    ]


def _comparison(a: str, b: str, difference: Interval, value: float, margin: float) -> Comparison:
    corrected = Interval(value=round(value, 3), low=round(value - margin, 3), high=round(value + margin, 3))
    verdict: Literal["better", "worse", "undecided"] = (
        "better" if corrected.low > 0 else "worse" if corrected.high < 0 else "undecided"
    )
    return Comparison(row=a, against=b, difference=difference, corrected=corrected, verdict=verdict)


def resolution(comparisons: Sequence[Comparison]) -> float | None:
    """Points of retention: the median half-width of the corrected intervals, which a difference must exceed to be told
    from none. None where nothing was corrected."""
    widths = [(c.corrected.high - c.corrected.low) / 2 for c in comparisons if c.corrected is not None]
    return float(np.median(widths)) if widths else None


def resolution_sentence(comparisons: Sequence[Comparison]) -> list[str]:
    """What the table can resolve, as one sentence; none without comparisons."""
    smallest = resolution(comparisons)
    if smallest is None:
        return []
    count = len(comparisons)
    return [
        f"Verdicts hold for {'the one comparison' if count == 1 else f'all {count} comparisons at once'} (95 %);"
        f" a difference under about {smallest:.1f} points is not resolved by these questions."
    ]
