"""Retention against the float model with paired bootstrap intervals.

Retention is the mean over tasks of (row accuracy / float accuracy), in percent. One resample draws questions with
replacement inside each task, the same questions for every row and for the float model (paired), so differences between
rows have their own interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from pydantic import Field

from quota.core.schema import Document

RESAMPLES = 10_000
Scores = (
    np.ndarray | dict[str, np.ndarray]
)  # one score per question (right or wrong counts), or per question of each stratum: the means are added
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


def total(scores: Scores) -> float:
    """A task's score: the mean, over strata the sum of means (MME adds up its categories)."""
    return float(sum(part.mean() for part in scores.values())) if isinstance(scores, dict) else float(scores.mean())


def _resampled_totals(rows: dict[str, Scores], seed: list[int], resamples: int) -> dict[str, np.ndarray]:
    first = next(iter(rows.values()))
    if not isinstance(first, dict):
        return _resampled_accuracy(rows, np.random.default_rng(seed), resamples)  # type: ignore[arg-type]
    sums = dict.fromkeys(rows, np.zeros(resamples))
    for number, stratum in enumerate(first):
        drawn = _resampled_accuracy(
            {name: row[stratum] for name, row in rows.items()}, np.random.default_rng([*seed, number]), resamples
        )  # type: ignore[index]
        sums = {name: sums[name] + drawn[name] for name in rows}
    return sums


def resampled_retention(
    rows: Mapping[str, Mapping[str, Scores]], baseline: str, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, np.ndarray]:
    """rows: name -> task -> scores (same questions in every row) -> name -> [resamples] retention in percent.

    A resample where the baseline gets nothing right in a task leaves that task out of its mean.
    """
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for number, task in enumerate(rows[baseline]):
        accuracy = _resampled_totals({name: rows[name][task] for name in rows}, [seed, number], resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            for name in rows:
                ratios[name].append(np.where(accuracy[baseline] > 0, accuracy[name] / accuracy[baseline], np.nan))
    return {name: 100 * _mean_over_tasks(np.stack(parts)) for name, parts in ratios.items()}


def _mean_over_tasks(ratios: np.ndarray) -> np.ndarray:
    """[tasks, resamples] -> [resamples], NaN entries left out; all NaN stays NaN."""
    known = ~np.isnan(ratios)
    return np.where(known.any(0), np.nansum(ratios, 0) / np.maximum(known.sum(0), 1), np.nan)


def retention_by_task(row: Mapping[str, Scores], baseline: Mapping[str, Scores]) -> dict[str, float | None]:
    """task -> percent of the baseline's score; None where the baseline gets nothing right."""
    return {task: 100 * float(total(row[task]) / total(b)) if total(b) else None for task, b in baseline.items()}


def retention(row: Mapping[str, Scores], baseline: Mapping[str, Scores]) -> float:
    """Mean over tasks in percent; NaN when the baseline gets nothing right anywhere."""
    known = [v for v in retention_by_task(row, baseline).values() if v is not None]
    return float(np.mean(known)) if known else float("nan")


def interval(value: float, draws: np.ndarray) -> Interval:
    known = draws[~np.isnan(draws)]
    low, high = np.percentile(known, [2.5, 97.5]) if known.size else (float("nan"), float("nan"))
    return Interval(value=round(value, 3), low=round(float(low), 3), high=round(float(high), 3))
