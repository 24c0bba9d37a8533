"""Retention against the float model with paired bootstrap intervals.

Retention is the mean over tasks of (row accuracy / float accuracy), in percent. One resample draws questions with replacement inside
each task, the same questions for every row and for the float model (paired), so differences between rows have their own interval.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from quota.core.schema import Document

RESAMPLES = 10_000
_CHUNK = 500  # resamples counted at once: bounds memory at _CHUNK x questions of one task


class Interval(Document):
    """A value with its 95 % percentile bootstrap interval."""

    value: float = Field(description="estimate from all questions")
    low: float = Field(description="2.5th percentile of the paired bootstrap")
    high: float = Field(description="97.5th percentile of the paired bootstrap")


def _resampled_accuracy(rows: dict[str, np.ndarray], rng: np.random.Generator, resamples: int) -> dict[str, np.ndarray]:
    """name -> [resamples] accuracies of one task; every name sees the same resampled questions."""
    n = len(next(iter(rows.values())))
    right = np.stack([np.asarray(r, dtype=np.float64) for r in rows.values()], axis=1)  # [n, rows]
    parts = [rng.multinomial(n, np.full(n, 1 / n), size=size) @ right / n for size in _sizes(resamples)]
    return dict(zip(rows, np.concatenate(parts).T, strict=True))


def _sizes(total: int) -> Iterator[int]:
    while total > 0:
        yield min(_CHUNK, total)
        total -= _CHUNK


def resampled_retention(
    rows: dict[str, dict[str, np.ndarray]], baseline: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """rows: name -> task -> bool [n] (same questions in every row) -> name -> [resamples] retention in percent.

    A resample where the baseline gets nothing right in a task leaves that task out of its mean.
    """
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for number, task in enumerate(rows[baseline]):
        accuracy = _resampled_accuracy({name: rows[name][task] for name in rows}, np.random.default_rng([seed, number]), resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            for name in rows:
                ratios[name].append(np.where(accuracy[baseline] > 0, accuracy[name] / accuracy[baseline], np.nan))
    return {name: 100 * _mean_over_tasks(np.stack(parts)) for name, parts in ratios.items()}


def _mean_over_tasks(ratios: np.ndarray) -> np.ndarray:
    """[tasks, resamples] -> [resamples], NaN entries left out; all NaN stays NaN."""
    known = ~np.isnan(ratios)
    return np.where(known.any(0), np.nansum(ratios, 0) / np.maximum(known.sum(0), 1), np.nan)


def retention_by_task(row: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> dict[str, float | None]:
    """task -> percent of the baseline's accuracy; None where the baseline gets nothing right."""
    return {task: 100 * float(row[task].mean() / b.mean()) if b.any() else None for task, b in baseline.items()}


def retention(row: dict[str, np.ndarray], baseline: dict[str, np.ndarray]) -> float:
    """Mean over tasks in percent; NaN when the baseline gets nothing right anywhere."""
    known = [v for v in retention_by_task(row, baseline).values() if v is not None]
    return float(np.mean(known)) if known else float("nan")


def interval(value: float, draws: np.ndarray) -> Interval:
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if known.size else (float("nan"), float("nan"))
    return Interval(value=round(value, 3), low=round(float(low), 3), high=round(float(high), 3))
