"""Rows are appended whole, survive an interrupted append, and tell when a case is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rows
from quota.core.errors import UsageError


def row(**changes: Any) -> dict[str, Any]:
    return {
        "schema": rows.SCHEMA,
        "op": "w4a4_linear",
        "shape": "a",
        "size": {"m": 1},
        "threads": 1,
        "weights": "resident",
        "commit": "c",
        "library": "l",
        "cpu": "x",
        "date": "2026-01-01",
        "implementation": "quota",
        **changes,
    }


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "results" / "ops.jsonl"
    rows.append(path, [row(shape="a"), row(shape="b")])
    rows.append(path, [row(shape="c")])
    assert [r["shape"] for r in rows.read(path)] == ["a", "b", "c"]


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    rows.append(path, [row(shape="a")])
    with path.open("a") as file:
        file.write('{"schema": 1, "sha')
    assert [r["shape"] for r in rows.read(path)] == ["a"]
    rows.append(path, [row(shape="b")])
    assert [r["shape"] for r in rows.read(path)] == ["a", "b"]


def test_a_wrong_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(UsageError, match=r"ops\.jsonl:1"):
        list(rows.read(path))
    path.write_text('{"schema": 99}\n')
    with pytest.raises(UsageError, match="schema"):
        list(rows.read(path))


@pytest.mark.parametrize(
    "changed",
    [{"commit": "d"}, {"library": "m"}, {"threads": 2}, {"size": {"m": 2}}, {"weights": "cold"}, {"cpu": "y"}],
)
def test_a_case_is_known_only_when_all_of_it_is_the_same(changed: dict[str, Any]) -> None:
    assert rows.case_key(row()) == rows.case_key(row(date="2027-01-01", implementation="peer"))
    assert rows.case_key(row()) != rows.case_key(row(**changed))


def test_newest_keeps_one_measurement_per_case() -> None:
    old, new = row(date="2026-01-01"), row(date="2026-01-02", commit="d")
    peer = row(date="2026-01-02", commit="d", implementation="peer")
    assert rows.newest([old, new, peer]) == [new, peer]


def test_an_older_measurement_stays_for_an_instruction_set_that_was_not_measured_again() -> None:
    wide, narrow = (row(date="2026-01-01", isa=isa, ours=True) for isa in ("avx512vnni", "avx2"))
    again = row(date="2026-01-02", isa="avx2", ours=True)
    assert rows.newest([wide, narrow, again]) == [wide, again]
    both = [row(date="2026-01-03", isa=isa, ours=True) for isa in ("avx512vnni", "avx2")]
    assert rows.newest([wide, again, *both]) == both
