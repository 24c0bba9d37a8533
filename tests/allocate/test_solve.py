"""Equations (1)-(4) as properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quota.allocate.sensitivity import normalise, percentile, relative_error, sensitivity
from quota.allocate.solve import allocate, drop_shares, keep_table, uniform
from quota.core.errors import RecipeError

values = st.lists(st.floats(0, 10), min_size=1, max_size=20)
ratios = st.floats(1e-3, 1.0)
taus = st.floats(1e-3, 1e3)


def drops(table: list[float]) -> list[float]:
    return [a - b for a, b in zip([1.0, *table], table, strict=False)]


@given(values, ratios, taus)
def test_table_is_non_increasing_in_range_and_ends_at_the_floor(s: list[float], keep: float, tau: float) -> None:
    table = allocate(s, keep, tau)
    assert len(table) == len(s)
    assert table[-1] == keep
    assert all(1.0 >= a >= b >= keep for a, b in zip([1.0, *table], table, strict=False))


@given(values, taus)
def test_shares_sum_to_one(s: list[float], tau: float) -> None:
    p = drop_shares(normalise(s), tau)
    assert sum(p) == pytest.approx(1.0)
    assert min(p) >= 0


@given(values, taus)
def test_less_sensitive_layers_drop_more(s: list[float], tau: float) -> None:
    p = drop_shares(normalise(s), tau)
    for i in range(len(s)):
        for j in range(len(s)):
            if s[i] <= s[j]:
                assert p[i] >= p[j]


@given(values, taus, st.randoms(use_true_random=False))
def test_shares_move_with_their_layer(s: list[float], tau: float, random: object) -> None:
    order = list(range(len(s)))
    random.shuffle(order)  # type: ignore[attr-defined]
    p = drop_shares(normalise(s), tau)
    assert drop_shares(normalise([s[i] for i in order]), tau) == [p[i] for i in order]


@given(st.floats(0, 10), st.integers(1, 20), ratios, taus)
def test_equal_sensitivities_give_the_uniform_table(value: float, n: int, keep: float, tau: float) -> None:
    assert allocate([value] * n, keep, tau) == pytest.approx(uniform(n, keep))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_high_temperature_is_uniform_and_low_goes_to_the_least_sensitive(s: list[float]) -> None:
    assert drop_shares(s, 1e9) == pytest.approx([1 / len(s)] * len(s))
    cold = drop_shares(s, 1e-6)
    near = [i for i, v in enumerate(s) if v <= min(s) + 1e-4]
    assert sum(cold[i] for i in near) == pytest.approx(1.0)
    exact = [i for i, v in enumerate(s) if v == min(s)]
    assert len({cold[i] for i in exact}) == 1


@given(values, taus, ratios, ratios)
def test_a_smaller_budget_keeps_no_more_anywhere(s: list[float], tau: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert all(x <= y + 1e-12 for x, y in zip(allocate(s, low, tau), allocate(s, high, tau), strict=True))


@given(values, taus)
def test_keep_one_drops_nothing(s: list[float], tau: float) -> None:
    assert allocate(s, 1.0, tau) == [1.0] * len(s)


def test_worked_example() -> None:
    table = keep_table(drop_shares([0.0, 1.0], 1.0), 0.3)
    first = 1 / (1 + np.exp(-1.0))
    assert table == pytest.approx([1 - 0.7 * first, 0.3])
    assert drops(keep_table([0.5, 0.5], 0.5)) == pytest.approx([0.25, 0.25])


@given(values, st.floats(0, 100))
def test_percentile_is_numpys(s: list[float], q: float) -> None:
    assert percentile(s, q) == pytest.approx(np.percentile(s, q), abs=1e-12)


@given(values)
def test_normalise_stays_in_the_unit_interval_and_keeps_order(s: list[float]) -> None:
    n = normalise(s)
    assert all(0 <= v <= 1 for v in n)
    assert all(n[i] <= n[j] for i in range(len(s)) for j in range(len(s)) if s[i] <= s[j])


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=12), st.floats(0.5, 100))
def test_normalise_ignores_the_unit_up_to_eps(s: list[float], factor: float) -> None:
    if percentile(s, 90) - percentile(s, 10) > 0.1:
        assert normalise([factor * v for v in s]) == pytest.approx(normalise(s), abs=1e-4)


def test_sensitivity_is_the_median() -> None:
    assert sensitivity([0.5, 0.1, 0.2]) == 0.2
    assert relative_error(1.0, 2.0, eps=0.0) == 0.5
    assert relative_error(0.0, 0.0) == 0.0


@pytest.mark.parametrize("keep", [0, -0.1, 1.0001, float("nan"), True])
def test_budget_errors(keep: float) -> None:
    with pytest.raises(RecipeError, match="keep: expected a ratio above 0 and at most 1"):
        keep_table([1.0], keep)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("inf"), float("nan")])
def test_temperature_errors(tau: float) -> None:
    with pytest.raises(RecipeError, match="tau: expected a finite temperature above 0"):
        drop_shares([0.1], tau)


def test_measurement_errors() -> None:
    with pytest.raises(RecipeError, match=r"sensitivities\[1\]: expected a finite number"):
        normalise([0.1, float("nan")])
    with pytest.raises(RecipeError, match="got none"):
        normalise([])
    with pytest.raises(RecipeError, match="got none"):
        sensitivity([])
