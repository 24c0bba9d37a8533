"""The candidate layer rule and the text that overrides it."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quota.allocate.candidates import check_layers, choose_candidates, parse_layers
from quota.allocate.explain import compact_layers
from quota.core.errors import UsageError


def jump(layers: int, at: int) -> list[float]:
    return [0.1] * at + [0.6] * (layers - at)


def test_known_outcomes() -> None:
    assert choose_candidates(jump(32, 2)) == [2, 3, 4, 5, 6, 7, 8]
    assert choose_candidates(jump(28, 8)) == list(range(8, 14))
    assert choose_candidates(jump(8, 2)) == [2, 3, 4]
    assert choose_candidates(jump(8, 0)) == [2, 3, 4]


def test_a_late_rise_does_not_hide_an_early_jump() -> None:
    late = jump(32, 3)
    late[25:] = [5.0] * 7
    assert choose_candidates(late)[0] == 3


@given(st.lists(st.floats(0, 1), min_size=2, max_size=80))
def test_always_valid_contiguous_and_off_the_last_layers(concentration: list[float]) -> None:
    layers = len(concentration)
    chosen = choose_candidates(concentration)
    assert check_layers(chosen, layers) == chosen
    assert chosen == list(range(chosen[0], chosen[-1] + 1))
    if layers > 2:
        assert chosen[-1] < layers - max(1, layers // 8)


def test_too_small_a_model() -> None:
    with pytest.raises(UsageError, match="at least 2 decoder layers, got 1"):
        choose_candidates([0.5])


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("2-6", [2, 3, 4, 5, 6]), ("2,4,6", [2, 4, 6]), (" 1 , 3-4 ", [1, 3, 4]), ("5", [5]), ("3-3", [3])],
)
def test_parse(text: str, chosen: list[int]) -> None:
    assert parse_layers(text, 8) == chosen


@given(st.sets(st.integers(1, 60), min_size=1).map(sorted))
def test_parse_reads_back_the_compact_form(layers: list[int]) -> None:
    assert parse_layers(compact_layers(layers)) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected numbers and ranges"),
        ("2-", "got '2-'"),
        ("a", "got 'a'"),
        ("2,,4", "got ''"),
        ("6-2", "from low to high"),
        ("4,2", "ascending, distinct layers, got 2 after 4"),
        ("2-4,4", "got 4 after 4"),
        ("0-3", "from 1 on, got 0"),
        ("2-8", "below 8 .* got 8"),
        ("1-99999999", "no model has a decoder layer 99999999"),
        ("-1", "got '-1'"),
    ],
)
def test_parse_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_layers(text, 8)


@given(st.text(max_size=12))
def test_parse_only_raises_usage_errors(text: str) -> None:
    with suppress(UsageError):
        parse_layers(text, 8)
