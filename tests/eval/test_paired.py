"""Differences of rows, with intervals that hold for all of them at once."""

from __future__ import annotations

import numpy as np
import pytest

from quota.eval.paired import compared, resolution, resolution_sentence
from quota.eval.statistics import resampled_retention, retention


def found(rows: dict[str, dict[str, np.ndarray]], pairs: list[tuple[str, str]], resamples: int = 400, seed: int = 0):
    draws = resampled_retention(rows, "float", resamples=resamples, seed=seed)
    return compared(pairs, {name: retention(row, rows["float"]) for name, row in rows.items()}, draws)


def rows_alike(seed: int, count: int) -> dict[str, dict[str, np.ndarray]]:
    """Rows that are right as often as each other, apart from chance."""
    rng = np.random.default_rng(seed)
    made = {f"r{i}": {"a": rng.random(200) < 0.8, "b": rng.random(200) < 0.6} for i in range(count)}
    return {"float": {"a": np.ones(200, dtype=bool), "b": np.ones(200, dtype=bool)}, **made}


def test_ten_comparisons_of_equal_rows_are_wrong_together_as_seldom_as_one() -> None:
    """100 tables: single intervals call some difference in most; corrected ones in about 5."""
    pairs = [(f"r{2 * i}", f"r{2 * i + 1}") for i in range(10)]
    single = together = 0
    for seed in range(100):
        comparisons = found(rows_alike(seed, 20), pairs, seed=seed)
        single += any(c.difference.low > 0 or c.difference.high < 0 for c in comparisons)
        together += any(c.verdict != "undecided" for c in comparisons)
    assert single >= 25 and together <= 12


def test_one_comparison_is_hardly_wider() -> None:
    rows = rows_alike(3, 2)
    (one,) = found(rows, [("r0", "r1")], 4000)
    assert one.corrected is not None
    width, corrected = one.difference.high - one.difference.low, one.corrected.high - one.corrected.low
    assert corrected == pytest.approx(width, rel=0.08)
    assert resolution([one]) == pytest.approx(corrected / 2)
    assert resolution_sentence([one])[0].startswith("Verdicts hold for the one comparison (95 %); a difference under")


def test_a_real_difference_is_found_and_others_beside_it_widen_it() -> None:
    rows = rows_alike(1, 6)
    rows["worse"] = {task: right & (np.arange(200) >= 60) for task, right in rows["r0"].items()}
    (alone,) = found(rows, [("worse", "r0")])
    first, *_ = found(rows, [("worse", "r0"), *[(f"r{i}", f"r{j}") for i in range(6) for j in range(i)]])
    assert alone.verdict == first.verdict == "worse"
    assert alone.corrected is not None and first.corrected is not None
    assert first.corrected.high - first.corrected.low > alone.corrected.high - alone.corrected.low
    assert first.difference == alone.difference


def test_rows_that_never_differ() -> None:
    rows = rows_alike(0, 1)
    (same,) = found({**rows, "copy": rows["r0"]}, [("copy", "r0")])
    assert same.verdict == "undecided" and same.corrected is not None
    assert (same.corrected.low, same.corrected.high) == (0, 0)


def test_nothing_to_compare() -> None:
    assert found(rows_alike(0, 1), []) == []
    assert resolution([]) is None and resolution_sentence([]) == []
