"""Rows of results: one JSON line per implementation and case, appended whole, and found again when a run is
continued."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.roofline import Ceilings
from benchmarks.timing import Contender, Spread, ratio, times
from quota.core.errors import UsageError

SCHEMA = 1
_CASE = ("op", "shape", "size", "threads", "weights")
_KEY = (*_CASE, "commit", "library", "cpu")


def newest(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every case on every machine, the rows of its last measurement, and of older ones with an instruction set of
    ours that no later one has; in the order cases were first measured."""
    cases: dict[str, dict[str, list[dict[str, Any]]]] = {}  # case -> date of a measurement -> rows
    for row in found:
        case = json.dumps(
            [row.get(name) for name in (*_CASE, "cpu")]
            + ([row["implementation"]] if row["op"] in ("model", "serve") else []),
            sort_keys=True,
        )
        cases.setdefault(case, {}).setdefault(row["date"], []).append(row)
    out: list[dict[str, Any]] = []
    for measured in cases.values():
        seen: set[str | None] = set()
        kept: list[list[dict[str, Any]]] = []
        for rows in reversed(measured.values()):  # the file is in order of time
            own = {row.get("isa") for row in rows if row.get("ours")}
            if not kept or own - seen:
                kept.insert(0, [row for row in rows if not row.get("ours") or row.get("isa") not in seen])
            seen |= own
        out += [row for rows in kept for row in rows]
    return out


def case_key(row: dict[str, Any]) -> str:
    """What makes a case the same case: the measurement is repeated when any of these differs."""
    return json.dumps([row.get(name) for name in _KEY], sort_keys=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, oldest first; UsageError naming a line that is not a row. A torn last line (an interrupted
    append) is left out."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n") and line.startswith('{"schema"'[: len(line)]):
                return  # of ours; another file's last line is not cut off
            raise UsageError(f"{path}:{number}: not a row of results ({error}); remove the line") from None
        if row.get("schema") != SCHEMA:
            raise UsageError(
                f"{path}:{number}: schema: expected {SCHEMA}, got {row.get('schema')!r}; remove the line or measure"
                " again"
            )
        yield row


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows with one write, so that a reader sees all of them or none; a torn last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.lseek(handle, _whole_bytes(path), os.SEEK_SET)
        os.ftruncate(handle, _whole_bytes(path))
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole_bytes(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def stamp(threads: int) -> dict[str, Any]:
    """The columns every row shares: when, where, on what."""
    return {
        "schema": SCHEMA,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **machine.source(),
        **machine.cpu(),
        "versions": machine.versions(),
        "threads": threads,
        "load": machine.load(),
    }


def case_rows(
    case: dict[str, Any], contenders: Sequence[Contender], operations: float, ceilings: Ceilings | None, *, threads: int
) -> list[dict[str, Any]]:
    """One row per contender. case: op, shape, size and weights; operations: of one call (a multiply-add counts two).

    Ours carry `ratios`: peer -> [median, lower, upper quartile] of peer's time / our time.
    """
    common = {**stamp(threads), **case}
    return [_row(common, c, contenders, operations, ceilings) for c in contenders]


def _row(
    common: dict[str, Any], c: Contender, every: Sequence[Contender], operations: float, ceilings: Ceilings | None
) -> dict[str, Any]:
    threads, cold = common["threads"], common["weights"] == "cold"
    spent = Spread.of(times(c, threads))
    row = {
        **common,
        "implementation": c.name,
        "isa": c.isa,
        "ours": c.against is None,
        "rounds": len(c.samples),
        "cpu_ms": _round(Spread.of([s.cpu_ms for s in c.samples])),
        "wall_ms": _round(Spread.of([s.wall_ms for s in c.samples])),
        "gops": round(operations / spent.median / 1e6, 2) if c.unit else None,
        "unit": c.unit,
    }
    floor = ceilings and c.unit and ceilings.floor_ms(c.unit, operations, c.moved, cold=cold)
    if floor:
        row |= {"bound": floor[1], "percent_of_roofline": round(100 * floor[0] / spent.median, 1)}
    if c.against is None:
        row["ratios"] = {p.name: _round(ratio(c, p, threads)) for p in every if p.against == c.name}
    if c.note:
        row["note"] = c.note
    return row


def _round(spread: Spread) -> list[float]:
    return [float(f"{v:.4g}") for v in (spread.median, spread.low, spread.high)]
