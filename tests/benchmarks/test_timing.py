"""The harness: contenders take turns, ratios are taken round by round, ceilings bound times from below."""

from __future__ import annotations

import pytest

from benchmarks import timing
from benchmarks.roofline import Ceilings
from benchmarks.timing import Contender, Sample, Spread, interleave, ratio, time_calls


def test_contenders_take_turns() -> None:
    order: list[str] = []
    pair = [
        Contender(name, "fma256", 1.0, sampler=lambda calls, cold, name=name: order.append(name) or Sample(9.0, 9.0))
        for name in "ab"
    ]  # type: ignore[misc]
    interleave(pair, rounds=4, budget_s=60)
    assert order[4:] == ["a", "b", "b", "a", "a", "b", "b", "a"]  # after two untimed calls each
    assert [len(c.samples) for c in pair] == [4, 4]


def test_at_least_three_rounds() -> None:
    slow = Contender("slow", "fma256", 1.0, sampler=lambda calls, cold: Sample(9.0, 9.0))
    interleave([slow], rounds=50, budget_s=0)
    assert len(slow.samples) == 3


def test_ratio_is_per_round() -> None:
    ours = Contender("o", "fma256", 1.0, samples=[Sample(1, 5), Sample(2, 5), Sample(4, 5)])
    peer = Contender("p", "fma256", 1.0, against="o", samples=[Sample(2, 10), Sample(6, 10), Sample(4, 10)])
    assert ratio(ours, peer, 1) == Spread(2.0, 1.5, 2.5)
    assert ratio(ours, peer, 2) == Spread(2.0, 2.0, 2.0)


def test_cpu_time_and_wall_time_are_each_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"process_time": 0.0, "perf_counter": 0.0}
    for name in clocks:
        monkeypatch.setattr(timing.time, name, lambda name=name: clocks[name])
    monkeypatch.setattr(timing, "evict_caches", lambda: clocks.update(perf_counter=clocks["perf_counter"] + 9))

    def call() -> None:
        clocks["process_time"] += 0.003
        clocks["perf_counter"] += 0.02

    for cold in (False, True):
        sample = time_calls(call, 2, cold=cold)
        assert (sample.cpu_ms, sample.wall_ms) == (pytest.approx(3), pytest.approx(20))


def test_the_larger_bound_decides() -> None:
    ceilings = Ceilings(1, {"unit": 1e9}, {1000: 1e6, 10**6: 1e3})
    assert ceilings.floor_ms("unit", 1e6, 10, cold=False) == (1.0, "compute")
    assert ceilings.floor_ms("unit", 1e6, 10, cold=True) == (10.0, "bandwidth")
    assert ceilings.floor_ms("other", 1e6, 10, cold=False) is None
