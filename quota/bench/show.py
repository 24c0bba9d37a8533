"""Tables of results for a terminal: ratios below 1 are losses, and red."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from quota.bench.run_ops import Measured
from quota.report.table import byte_size, milliseconds


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


def model_table(found: Sequence[dict[str, Any]]) -> Table:
    """One line per variant; times over our unpruned run's, green where shorter and red where longer."""
    table = Table(
        title=f"{found[0]['shape']}, {found[0]['threads']} thread{'s' * (found[0]['threads'] > 1)}",
        title_justify="left",
        header_style="bold",
    )
    columns = (
        "implementation",
        "layers",
        "TTFT",
        "/ first",
        "decode",
        "/ first",
        "TTFT, CPU",
        "decode, CPU",
        "peak RSS",
        "not mapped",
        "KV/layer",
        "disk",
    )
    for name in columns:
        table.add_column(name, justify="left" if name == "implementation" else "right", no_wrap=True)
    first = found[0]
    for r in found:
        measured = r.get("layers_measured")
        table.add_row(
            r["implementation"],
            f"{r['layers']} (from {measured[0]}, {measured[1]})" if measured else str(r["layers"]),
            milliseconds(r["ttft_ms"]),
            _times(r["ttft_ms"] / first["ttft_ms"]),
            milliseconds(r["decode_ms"]),
            _times(r["decode_ms"] / first["decode_ms"]),
            milliseconds(r["ttft_cpu_ms"]),
            milliseconds(r["decode_cpu_ms"]),
            byte_size(r["peak_rss_bytes"]),
            byte_size(r["anonymous_bytes"]),
            byte_size(r["kv_bytes_per_layer"]),
            byte_size(r["checkpoint_bytes"]),
        )
    return table


def _times(share: float) -> Text:
    return Text(f"{share:.2f}", style="green" if share < 1 else "red" if share > 1 else "")
