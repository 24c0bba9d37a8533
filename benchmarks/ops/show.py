"""Tables of results for a terminal: ratios below 1 are losses, and red."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.ops.run import Measured


def _ms(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.0f}"


def ratio_text(ratios: list[float]) -> Text:
    """A ratio with its quartiles: green for a gain, red for a loss, plain where the quartiles hold 1."""
    middle, low, high = ratios
    style = "green" if low > 1 else "red" if high < 1 else ""
    return Text(f"{middle:.2f} ({low:.2f}-{high:.2f})", style=style)


def case_table(measured: Measured) -> Table:
    """One line per implementation; for peers, their time over ours on each instruction set."""
    rows = measured.rows
    isas = list(dict.fromkeys(r["isa"] for r in rows if r["ours"]))
    ratios = {
        (isa, peer): values for r in rows if r["ours"] for isa in [r["isa"]] for peer, values in r["ratios"].items()
    }
    threads = rows[0]["threads"]
    table = Table(
        title=f"{measured.case.title()}, {threads} thread{'s' * (threads > 1)}",
        title_justify="left",
        header_style="bold",
    )
    for name in ("implementation", "cpu ms", "wall ms", "GOPS", "% roofline", *(f"/ ours {isa}" for isa in isas)):
        table.add_column(name, justify="left" if name == "implementation" else "right", no_wrap=True)
    for r in rows:
        share = f"{r['percent_of_roofline']:.0f} {r['bound']}" if "percent_of_roofline" in r else "-"
        cells: list[Any] = [
            label(r),
            _ms(r["cpu_ms"][0]),
            _ms(r["wall_ms"][0]),
            "-" if r["gops"] is None else f"{r['gops']:.1f}",
            share,
        ]
        cells += [
            ratio_text(ratios[isa, r["implementation"]]) if (isa, r["implementation"]) in ratios else "" for isa in isas
        ]
        table.add_row(*cells, style="bold" if r["ours"] else "")
    return table


def label(row: dict[str, Any]) -> str:
    """`quota (avx512vnni)`, `onednn-w8a8`"""
    return f"{row['implementation']} ({row['isa']})" if row["isa"] else row["implementation"]
