"""The harness: contenders take turns in rounds, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.roofline import evict_caches

_PAUSE_S = 0.01  # pools of the contender before stop spinning
_SAMPLE_MS = 8.0  # calls are repeated until a sample lasts this long


@dataclass(frozen=True)
class Sample:
    """Milliseconds per call: CPU time of all threads of the process, and wall time."""

    cpu_ms: float
    wall_ms: float


def time_calls(run: Callable[[], object], calls: int, *, cold: bool = False) -> Sample:
    """`calls` calls in a row; cold: each after the caches have been emptied, which is not counted."""
    cpu = wall = 0.0
    for _ in range(calls if cold else 1):
        if cold:
            evict_caches()
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        for _ in range(1 if cold else calls):
            run()
        cpu += time.process_time() - cpu_began
        wall += time.perf_counter() - wall_began
    return Sample(1e3 * cpu / calls, 1e3 * wall / calls)


@dataclass
class Contender:
    """One implementation of one case, ready to run and past its correctness gate.

    unit: key of `Ceilings.operations`, the arithmetic it is held against; None for a yardstick that does other work
    than the case. moved: bytes a call must read and write at least. against: name of the implementation of ours this
    peer is compared with; None: it is ours. before: puts it in charge, untimed.
    """

    name: str
    unit: str | None
    moved: float
    run: Callable[[], object] | None = None
    isa: str | None = None
    against: str | None = None
    before: Callable[[], object] | None = None
    sampler: Callable[[int, bool], Sample] | None = None  # instead of run, for those that time themselves
    note: str = ""
    samples: list[Sample] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.name} ({self.isa})" if self.isa else self.name

    def sample(self, calls: int, cold: bool) -> Sample:
        if self.before:
            self.before()
        time.sleep(_PAUSE_S)
        if self.sampler:
            return self.sampler(calls, cold)
        assert self.run is not None
        return time_calls(self.run, calls, cold=cold)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


def interleave(contenders: Sequence[Contender], *, rounds: int, budget_s: float, cold: bool = False) -> None:
    """Fill `samples` of every contender: at least three rounds, then until `rounds` or the time is spent. The order
    turns every round."""
    calls = {}
    for c in contenders:
        c.samples.clear()
        c.sample(1, cold)  # first call: lazily made layouts, code pages
        wanted = _SAMPLE_MS / max(1e-4, c.sample(1, cold).wall_ms)
        calls[c.label] = 2 if cold else max(1, min(20_000, round(wanted)))
    began = time.perf_counter()
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() - began > budget_s:
            break
        start = turn % len(contenders)
        for c in [*contenders[start:], *contenders[:start]]:
            c.samples.append(c.sample(calls[c.label], cold))


def times(contender: Contender, threads: int) -> list[float]:
    """What speed is judged by: CPU time on one thread (valid on a busy machine), wall time on more."""
    return [s.cpu_ms if threads == 1 else s.wall_ms for s in contender.samples]


def ratio(ours: Contender, peer: Contender, threads: int) -> Spread:
    """Peer's time / our time, round by round: above 1 we are faster."""
    return Spread.of([p / o for o, p in zip(times(ours, threads), times(peer, threads), strict=True)])
