"""Tables of what `benchmarks/serve` measures: throughput by engine and clients, the report of a soak, and what attacks
cost others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quota.report.table import markdown_table, milliseconds


def throughput_table(found: Sequence[Mapping[str, Any]]) -> str:
    """One line per engine, tokens of an answer and clients; `× 1 client` is tokens per second over those of the
    engine's own row with one client."""
    single = {
        (row["implementation"], row["size"]["new"]): row["tokens_per_s"] for row in found if row["size"]["clients"] == 1
    }
    lines = []
    for row in sorted(
        found, key=lambda row: (row["size"]["new"], not row["ours"], row["implementation"], row["size"]["clients"])
    ):
        alone = single.get((row["implementation"], row["size"]["new"]))
        scaling = f"{row['tokens_per_s'] / alone:.2f}" if alone else "-"
        times = [milliseconds(value) for name in ("ttft_ms", "inter_token_ms") for value in row[name]]
        size, spent = row["size"], milliseconds(row["cpu_ms_per_token"])
        lines.append(
            [row["implementation"], size["new"], size["clients"], f"{row['tokens_per_s']:.0f}", scaling, spent, *times]
        )
    notes = dict.fromkeys(f"*{row['implementation']}*: {row['note']}." for row in found if "note" in row)
    head = [
        "engine",
        "answer",
        "clients",
        "tokens/s",
        "× 1 client",
        "CPU per token",
        "TTFT p50",
        "TTFT p99",
        "inter-token p50",
        "inter-token p99",
    ]
    return "\n".join([markdown_table(head, lines), *notes]).rstrip() + "\n"


def soak_table(found: Mapping[str, Any]) -> str:
    """The report of `python -m benchmarks serve soak`."""
    rss = found["rss_mb"] or [0.0]
    third = len(rss) // 3
    kinds = ", ".join(f"{name} {count}" for name, count in found["images"].items())
    lines = [
        ("state", found["state"]),
        ("requests", f"{found['requests']} from {found['clients']} clients in {found['seconds']:.0f} s"),
        *((f"outcome `{name}`", str(count)) for name, count in found["outcomes"].items()),
        (
            "answers asked again alone",
            f"{found['answers_compared_alone']} of {found['answers_kept']} kept, {found['answers_that_differ']} differ",
        ),
        (
            "images",
            (
                f"{sum(found['images'].values())}, shortest side {found['shortest_side_px']} px, largest"
                f" {found['largest_image_px']} px"
            ),
        ),
        ("kinds of image", kinds),
        (
            "resident memory, MB",
            (
                f"{rss[0]:.0f} at first, {min(rss[third:]):.0f} to {max(rss[third:]):.0f} after the first third,"
                f" {rss[-1]:.0f} at last"
            ),
        ),
        ("memory, last third over middle third", found["memory_growth"]),
        ("problems", "none" if not found["problems"] else "; ".join(found["problems"])),
    ]
    return markdown_table(["what", "found"], lines)


def attack_table(found: Mapping[str, Any]) -> str:
    """The report of `python -m benchmarks serve attack`."""
    lines = [
        [
            row["attack"],
            row["bound"],
            ", ".join(f"{name} {count}" for name, count in row["outcomes"].items()),
            f"{row['alone_s']:.2f} s",
            f"{row['attacked_s']:.2f} s",
            f"{row['growth_bytes'] / 1e6:.0f} MB",
        ]
        for row in found["attacks"]
    ]
    problems = "".join(f"\n* **{text}**" for text in found["problems"])
    return (
        markdown_table(["attack", "bound", "outcome", "others wait, alone", "others wait, attacked", "memory"], lines)
        + problems
    )
