"""The tables of benchmarks/README.md and README.md are what the committed rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from quota.bench import tables
from quota.report.blocks import fill

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", [tables.PAGE, tables.README], ids=str)
def test_tables_are_not_stale(path: Path) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert fill(text, tables.blocks(ROOT / tables.RESULTS)[path], str(path)) == text, "run `quota bench tables`"


def test_a_loss_is_said_in_words() -> None:
    assert tables._ratio([0.5, 0.4, 0.6]) == "0.50 **loss**"
    assert tables._ratio([1.5, 1.4, 1.6]) == "1.50"
