"""`python -m benchmarks gpu` (make gpu-check): build, check and time the CUDA side; one JSON and one Markdown report.

Sections run in the order of what they tell, each in a process of its own: one that fails, crashes or runs out of time
is reported with every line it had printed, and the others go on. --call 1 is what ten minutes on a bare machine can
bring back, --call 2 what four more can, --call 3 the rest. With --dry-run everything that needs no GPU is done, the
rest is listed, and the plan is printed with its times.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu import fast, here, right
from benchmarks.gpu.apart import apart, source
from benchmarks.gpu.options import ROOT, Line, Options, collected
from benchmarks.gpu.report import body, markdown
from benchmarks.gpu.serving import serving
from quota.core.errors import QuotaError
from quota.core.files import atomic_write_text, claim_folder


class Planned(NamedTuple):
    """call: in which a section runs. seconds: what it takes at most on an H200 with 16 cores; estimates, and the limit
    of its process where none is given."""

    run: Callable[[Options], Iterator[Line]]
    call: int
    seconds: int


PLAN = (
    Planned(here.machine, 1, 10),
    Planned(here.build, 1, 60),
    Planned(here.ceilings, 1, 15),
    Planned(right.first, 1, 50),
    Planned(fast.linears, 1, 40),
    Planned(fast.attention, 1, 35),
    Planned(fast.layer, 1, 50),
    Planned(right.graph, 1, 10),
    Planned(here.counters, 1, 50),
    Planned(right.ops, 1, 40),
    Planned(right.triton, 1, 100),
    Planned(right.answers, 1, 50),
    Planned(here.memcheck, 1, 75),
    Planned(fast.models, 2, 160),
    Planned(serving, 2, 60),
    Planned(here.sass, 3, 20),
    Planned(here.racecheck, 3, 150),
    Planned(here.initcheck, 3, 120),
    Planned(fast.contexts, 3, 60),
    Planned(fast.qwen, 3, 180),
    Planned(fast.peers, 3, 300),
    Planned(fast.humming, 3, 240),
    Planned(right.hot, 3, 20),
)
SECTIONS = {planned.run.__name__: planned.run for planned in PLAN}
SECONDS = {1: 600, 2: 240}  # of a call, starting included
_LEAST_S = 5.0


def plan(names: list[str]) -> str:
    """What these sections take, one line each and the sum of each call."""
    chosen = [p for p in PLAN if p.run.__name__ in names]
    lines = []
    for call in sorted({p.call for p in chosen}):
        parts = [p for p in chosen if p.call == call]
        lines += [
            f"call {call}: {sum(p.seconds for p in parts)} s planned"
            + (f" of {SECONDS[call]}" if call in SECONDS else "")
        ]
        lines += [f"  {p.run.__name__:10} {p.seconds:4} s  {(p.run.__doc__ or '').splitlines()[0]}" for p in parts]
    return "\n".join(lines)


def _worker(name: str, options: Options) -> int:
    """One section in this process, a line of JSON for each thing it finds."""
    status = 0
    for line in SECTIONS[name](options):
        print(json.dumps(line), flush=True)
        status |= "failure" in line
    return status


def _dry(name: str, options: Options) -> dict[str, Any]:
    """Without a GPU no section can crash the process: no need for one of its own."""
    try:
        return collected(SECTIONS[name](options))
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {error}"]}


def _run(name: str, options: Options, limit_s: float, lines: Path) -> dict[str, Any]:
    began = time.perf_counter()
    found = (
        _dry(name, options)
        if options.dry
        else {"failures": ["not begun: no time left"]}
        if limit_s < _LEAST_S
        else apart(name, options, limit_s, lines)
    )
    head = {
        "section": name,
        "dry_run": options.dry,
        "passed": not found.get("failures"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return head | source() | {"seed": options.seed} | found


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--call", type=int, choices=(1, 2, 3), help="the sections of this call; default: of all three")
    which.add_argument("--sections", help=f"comma-separated instead, run in this order: {', '.join(SECTIONS)}")
    parser.add_argument("--dry-run", action="store_true", help="do what needs no GPU, list the rest, print the plan")
    parser.add_argument(
        "--seed",
        type=int,
        default=int(time.time()),
        help="of all random inputs; default: the clock, written to the report",
    )
    parser.add_argument(
        "--limit-s", type=float, help="longest time of one section; default: twice what the plan gives it"
    )
    parser.add_argument(
        "--budget-s",
        type=float,
        help="longest time of all; default: the call's, less ten seconds; sections that do not fit are not begun",
    )
    parser.add_argument("--small", action="store_true", help="only the sizes that compute-sanitizer gets through")
    parser.add_argument("--reuse", action="store_true", help="build nothing where libraries are there and load")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"),
        help="folder of gpu.json, gpu.md and each section's lines (default: $OUT, else benchmarks/results)",
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--no-poison", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str], prog: str) -> int:
    # so that the running section's processes end too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = _parser(prog)
    given = parser.parse_args(arguments)
    options = Options(given.dry_run, given.seed, given.small, not given.no_poison, given.reuse)
    wanted = (
        given.sections.split(",") if given.sections else [p.run.__name__ for p in PLAN if given.call in (None, p.call)]
    )
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: unknown section {unknown[0]!r}; expected some of {', '.join(SECTIONS)}")
    names = [name for name in SECTIONS if name in wanted]
    if given.worker:
        return _worker(names[0], options)
    budget_s = given.budget_s or (SECONDS[given.call] - 10 if given.call in SECONDS else float("inf"))
    stem, end, seconds = (
        "gpu-dry-run" if options.dry else "gpu",
        time.monotonic() + budget_s,
        {p.run.__name__: p.seconds for p in PLAN},
    )
    try:
        path = claim_folder(given.out) / f"{stem}.json"
    except QuotaError as error:
        parser.error(f"--out: {error}")
    records = {
        r["section"]: r for r in (json.loads(path.read_text()) if path.exists() else []) if r["section"] in SECTIONS
    }
    for name in names:
        limit_s = min(given.limit_s or 2.0 * seconds[name], end - time.monotonic())
        record = records[name] = _run(name, options, limit_s, given.out / f"{stem}-{name}.jsonl")
        done = [records[n] for n in SECTIONS if n in records]
        atomic_write_text(path, json.dumps(done, indent=1) + "\n")
        atomic_write_text(given.out / f"{stem}.md", markdown(done, SECTIONS))
        state = "passed" if record["passed"] else "FAILED"
        print(
            f"{name:10} {state:7} {record['seconds']:7.1f} s  {'; '.join(record.get('failures', []))[:300]}", flush=True
        )
    print(
        plan(names)
        if options.dry
        else "\n".join(
            line for name in names if "rows" in records[name] for line in ["", f"## {name}", *body(records[name])]
        )
    )
    print(f"report: {given.out / f'{stem}.md'}")
    return 0 if all(records[name]["passed"] for name in names) else 1
