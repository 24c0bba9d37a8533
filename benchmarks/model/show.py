"""The table of a model's rows for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from quota.report.table import byte_size, milliseconds


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
