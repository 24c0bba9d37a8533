"""The GPU check's report, from its records."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_HEAD = ("section", "dry_run", "seconds", "passed", "failures", "commit", "digest", "seed")


def times_table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows with a case -> a table; the last column is how many times ours each takes, in the same case."""
    ours = {r["case"]: r["us"] for r in rows if r.get("implementation") == "quota" and "us" in r}
    lines = ["| case | implementation | us | times ours |", "| --- | --- | --: | --: |"]
    for r in rows:
        ratio = f"{r['us'] / ours[r['case']]:.2f}" if "us" in r and r["case"] in ours else ""
        value = format(r["us"], ".1f") if "us" in r else r.get("failed", "")
        note = f" ({r['note']})" if "note" in r else ""
        lines.append(f"| {r['case']} | {r['implementation']}{note} | {value} | {ratio} |")
    return lines


def body(record: dict[str, Any]) -> list[str]:
    """What a section found: failures, then its table, or its rows' number and its facts."""
    lines = [f"- FAILED: {failure}" for failure in record.get("failures", [])]
    rows = record.get("rows", [])
    if "table" in record:
        return [*lines, record["table"]]
    if rows and "case" in rows[0]:
        return lines + times_table(rows)
    shown = {k: v for k, v in record.items() if k not in (*_HEAD, "rows")}
    if rows and "check" in rows[0]:
        shown["agreed"] = len(rows)
    elif rows:
        shown["rows"] = rows
    return [*lines, "```json", json.dumps(shown, indent=1), "```"] if shown else lines


def markdown(records: list[dict[str, Any]], sections: dict[str, Callable[..., Any]]) -> str:
    """One line per section with the sources and the seed it ran on, then failures, plans and tables."""
    lines = [
        "# GPU check",
        "",
        "| section | result | seconds | commit | sources | seed |",
        "| --- | --- | --: | --- | --- | --- |",
    ]
    for r in records:
        state = "FAILED" if not r["passed"] else "planned" if r["dry_run"] else "passed"
        lines.append(f"| {r['section']} | {state} | {r['seconds']} | {r['commit']} | {r['digest']} | {r['seed']} |")
    for r in records:
        lines += ["", f"## {r['section']}", "", sections[r["section"]].__doc__ or "", "", *body(r)]
    return "\n".join(lines) + "\n"
