"""Rows of cells as a Markdown or a rich table, and the number formats used in both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table


def percent(share: float | None, digits: int = 1) -> str:
    """0.956 -> "95.6 %"; None or NaN -> "-"."""
    return "-" if _absent(share) else f"{100 * share:.{digits}f} %"  # type: ignore[operator]


def milliseconds(value: float | None) -> str:
    """Three significant digits with the unit: 12.34 -> "12.3 ms"; None or NaN -> "-"."""
    if _absent(value):
        return "-"
    assert value is not None
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def byte_size(value: float | None) -> str:
    """Decimal units as disks and papers use: 3970000000 -> "3.97 GB"; None or NaN -> "-"."""
    if _absent(value):
        return "-"
    assert value is not None
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f} B"


def interval(low: float, high: float, digits: int = 1) -> str:
    """A bootstrap interval of shares in percent: (0.951, 0.982) -> "95.1 to 98.2"."""
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A padded Markdown table; columns after the first whose cells all start with a digit, sign or "-" are
    right-aligned."""
    cells = [[_cell(c) for c in row] for row in rows]
    _check(columns, cells)
    head = [_cell(c) for c in columns]
    right = [i > 0 and _numeric([row[i] for row in cells]) for i in range(len(head))]
    widths = [
        max(3, len(head[i]), *(len(row[i]) for row in cells)) if cells else max(3, len(head[i]))
        for i in range(len(head))
    ]
    lines = [head, *cells]
    out = [
        "| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)) + " |"
        for line in lines
    ]
    out.insert(
        1, "| " + " | ".join("-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + " |"
    )
    return "\n".join(out) + "\n"


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """The same cells for a terminal."""
    cells = [["" if c is None else str(c) for c in row] for row in rows]
    _check(columns, cells)
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i and _numeric([row[i] for row in cells]) else "left", no_wrap=i == 0)
    for row in cells:
        table.add_row(*row)
    return table


def _absent(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _cell(value: object) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _numeric(cells: Sequence[str]) -> bool:
    filled = [c for c in cells if c]
    return bool(filled) and all(c[0] in "+-0123456789." for c in filled)


def _check(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    for i, row in enumerate(cells):
        if len(row) != len(columns):
            raise ValueError(f"rows[{i}]: expected {len(columns)} cells, got {len(row)}")
