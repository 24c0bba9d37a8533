"""Cells and number formats."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from quota.report.table import byte_size, interval, markdown_table, milliseconds, percent, rich_table


def test_formats() -> None:
    assert [percent(0.9565), percent(1.0, 0), percent(None), percent(float("nan"))] == ["95.7 %", "100 %", "-", "-"]
    assert [milliseconds(v) for v in (123.4, 12.34, 1.234, None)] == ["123 ms", "12.3 ms", "1.23 ms", "-"]
    assert [byte_size(v) for v in (3.97e9, 6.12e6, 2048, 17, None)] == ["3.97 GB", "6.12 MB", "2.05 kB", "17 B", "-"]
    assert interval(0.951, 0.982) == "95.1 to 98.2"


def test_markdown() -> None:
    assert markdown_table(["weights", "acc"], [["45/25", "9"]]).splitlines()[2] == "| 45/25   |   9 |"
    text = markdown_table(["row", "acc"], [["float", "95.0 %"], ["a|b", "-"]])
    assert text.splitlines() == [
        "| row   |    acc |",
        "| ----- | -----: |",
        "| float | 95.0 % |",
        "| a\\|b  |      - |",
    ]
    assert markdown_table(["a"], []).splitlines() == ["| a   |", "| --- |"]
    with pytest.raises(ValueError, match=r"rows\[0\]: expected 2 cells, got 1"):
        markdown_table(["a", "b"], [["x"]])


def test_rich() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(rich_table(["row", "acc"], [["float", 95.0], ["none", None]], title="Accuracy"))
    assert "float" in out.getvalue() and "95.0" in out.getvalue()
