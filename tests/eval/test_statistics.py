from __future__ import annotations

import numpy as np
import pytest

from quota.eval.statistics import interval, resampled_retention, retention, retention_by_task


def _row(seed: int, share: float, tasks: int = 3, n: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"task{i}": rng.random(n) < share for i in range(tasks)}


def test_the_baseline_retains_itself_exactly() -> None:
    base = _row(0, 0.9)
    draws = resampled_retention({"float": base, "same": dict(base)}, "float", resamples=200)
    assert np.all(draws["float"] == 100) and np.all(draws["same"] == 100)
    assert retention(base, base) == 100


def test_seeded_and_independent_of_other_rows() -> None:
    base, row = _row(0, 0.9), _row(1, 0.7)
    a = resampled_retention({"float": base, "row": row}, "float", resamples=777, seed=3)
    b = resampled_retention({"float": base, "other": _row(2, 0.5), "row": row}, "float", resamples=777, seed=3)
    assert np.array_equal(a["row"], b["row"]), "every row must see the same resampled questions"
    assert not np.array_equal(
        a["row"], resampled_retention({"float": base, "row": row}, "float", resamples=777, seed=4)["row"]
    )


def test_pairing_narrows_the_difference() -> None:
    base = _row(0, 0.95)
    a = {t: v & (np.random.default_rng(5).random(v.size) < 0.9) for t, v in base.items()}
    b = {t: v.copy() for t, v in a.items()}
    b["task0"][np.flatnonzero(b["task0"])[:2]] = False  # b is a, two answers worse
    draws = resampled_retention({"float": base, "a": a, "b": b}, "float", resamples=4000)
    difference = interval(retention(a, base) - retention(b, base), draws["a"] - draws["b"])
    alone = interval(retention(a, base), draws["a"])
    assert 0 <= difference.low < difference.value < difference.high
    assert difference.high - difference.low < (alone.high - alone.low) / 2


def test_interval_covers_like_a_bootstrap() -> None:
    """Against the textbook standard error of one task's mean."""
    base = {"t": np.ones(400, dtype=bool)}
    row = {"t": np.arange(400) < 300}
    draws = resampled_retention({"float": base, "row": row}, "float", resamples=20_000)["row"]
    assert draws.std() == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 400), rel=0.03)
    found = interval(75.0, draws)
    assert found.low == pytest.approx(75 - 1.96 * draws.std(), abs=0.6)
    assert found.high == pytest.approx(75 + 1.96 * draws.std(), abs=0.6)


def test_a_task_the_float_model_fails_is_left_out() -> None:
    base = {"good": np.array([True, True]), "hopeless": np.array([False, False])}
    row = {"good": np.array([True, False]), "hopeless": np.array([True, True])}
    assert retention_by_task(row, base) == {"good": 50.0, "hopeless": None}
    assert retention(row, base) == 50.0
    assert not np.isnan(resampled_retention({"float": base, "row": row}, "float", resamples=50)["row"]).any()
