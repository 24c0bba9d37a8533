"""Run cases and keep their rows: skip what is known, time the rest, show it as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, roofline, rows
from benchmarks.ops import kv4_append, kv4_attention, quantize_act, token_score, w4a4_linear, w4a16_linear
from benchmarks.ops.case import Case, Skipped
from benchmarks.ops.peers import Peer, every_peer
from benchmarks.shapes import QUICK, QUICK_ROWS, ROWS, chosen_attentions, chosen_linears
from benchmarks.timing import interleave
from quota.core.errors import BuildError, QuotaError, UsageError
from quota.ops import native

OPS = (w4a4_linear.OP, w4a16_linear.OP, quantize_act.OP, kv4_attention.OP, kv4_append.OP, token_score.OP)
_ROUNDS, _BUDGET_S, _QUICK_ROUNDS, _QUICK_BUDGET_S = 15, 6.0, 5, 1.0


@dataclass(frozen=True)
class Selection:
    """What to measure; empty tuples mean everything. isas: of ours."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    isas: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1,)
    quick: bool = False
    again: bool = False


@dataclass(frozen=True)
class Measured:
    """A finished case: its rows, whether they were measured now, and the peers left out."""

    case: Case
    rows: list[dict[str, Any]]
    reused: bool
    skipped: list[Skipped]


def chosen_peers(names: Sequence[str]) -> tuple[list[Peer], list[Skipped]]:
    """The peers asked for (all when none are named) that can run, and the others with the reason."""
    makers = every_peer()
    unknown = [name for name in names if name not in makers and name != "none"]
    if unknown:
        raise UsageError(f"--peers: expected some of {', '.join(makers)}, or none; got {unknown[0]!r}")
    peers = [makers[name]() for name in makers if not names or name in names]
    reasons = {peer.name: peer.why_not() for peer in peers}
    return [p for p in peers if reasons[p.name] is None], [
        Skipped("", "", name, why) for name, why in reasons.items() if why
    ]


def ceilings(threads: int) -> roofline.Ceilings | None:
    """The machine's ceilings, or None where no probe can be built."""
    try:
        return roofline.measure(threads)
    except BuildError:
        return None


def run(selection: Selection, out: Path | None) -> Iterator[Measured]:
    """Measure case after case. Rows go to `out` as each case ends, so an interrupted run continues where it stopped."""
    reason = native.why_not()
    if reason:
        raise QuotaError(f"the benchmark measures the native library: {reason}")
    unknown = [op for op in selection.ops if op not in OPS]
    if unknown:
        raise UsageError(f"--op: expected some of {', '.join(OPS)}; got {unknown[0]!r}")
    isas = _isas(selection.isas)
    known: dict[str, list[dict[str, Any]]] = {}
    for row in rows.read(out) if out and not selection.again else ():
        known.setdefault(rows.case_key(row), []).append(row)
    before = torch.get_num_threads()
    try:
        for threads in selection.threads:
            torch.set_num_threads(threads)
            for case in _cases(selection, isas, threads):
                yield _measure(case, selection, known, out, threads)
    finally:
        torch.set_num_threads(before)
        native.set_isa(None)


def _isas(wanted: tuple[str, ...]) -> tuple[str, ...]:
    available = native.supported_isas()
    missing = [isa for isa in wanted if isa not in available]
    if missing:
        raise UsageError(f"--isa: {missing[0]!r} cannot run here; available: {', '.join(available)}")
    return wanted or tuple(isa for isa in available if isa != "portable")


def _cases(selection: Selection, isas: tuple[str, ...], threads: int) -> Iterator[Case]:
    names = selection.shapes or ((QUICK,) if selection.quick else ())
    linears, attentions = chosen_linears(names), chosen_attentions(names)
    counts = selection.rows or (QUICK_ROWS if selection.quick else ROWS)

    def peers() -> list[Peer]:
        return chosen_peers(selection.peers)[0]

    makers: dict[str, Callable[[], Iterator[Case]]] = {
        w4a4_linear.OP: lambda: w4a4_linear.cases(
            linears, counts, [p for p in peers() if p.name not in w4a16_linear.ALONE], isas, threads
        ),
        w4a16_linear.OP: lambda: w4a16_linear.cases(
            linears, counts, [p for p in peers() if p.name in w4a16_linear.PEERS], isas, threads
        ),
        quantize_act.OP: lambda: quantize_act.cases(linears, counts, isas),
        kv4_attention.OP: lambda: kv4_attention.cases(attentions, isas, quick=selection.quick),
        kv4_append.OP: lambda: kv4_append.cases(attentions, isas, quick=selection.quick),
        token_score.OP: lambda: token_score.cases(attentions, isas),
    }
    for op in selection.ops or OPS:
        yield from makers[op]()


def _measure(
    case: Case, selection: Selection, known: dict[str, list[dict[str, Any]]], out: Path | None, threads: int
) -> Measured:
    key = rows.case_key({**case.facts, **machine.source(), **machine.cpu(), "threads": threads})
    if key in known:
        return Measured(case, known[key], True, [])
    contenders, skipped = case.contenders()
    rounds, budget = (_QUICK_ROUNDS, _QUICK_BUDGET_S) if selection.quick else (_ROUNDS, _BUDGET_S)
    interleave(contenders, rounds=rounds, budget_s=budget, cold=case.cold)
    made = rows.case_rows(case.facts, contenders, case.operations, ceilings(threads), threads=threads)
    if out:
        rows.append(out, made)
    return Measured(case, made, False, skipped)
