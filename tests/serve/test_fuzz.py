"""The short form of `benchmarks/serve/fuzz.py`: it finds nothing, and finds every fault again whose fix is taken
out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.serve.fuzz import MIB, Limits, fuzz
from benchmarks.serve.fuzz_targets import TARGETS

LIMITS = Limits(seconds=8.0, memory_bytes=112 * MIB)
SHORT = Limits(seconds=1.0, memory_bytes=112 * MIB)  # the fault takes far more, whatever the machine
FOREVER_S = 1200.0  # the number of inputs ends it, not the time


def test_fuzzing_finds_nothing():
    report = fuzz(FOREVER_S, seed=0, inputs=25, limits=LIMITS)
    assert not report.failures, report.failures
    assert set(report.inputs) == set(TARGETS) and all(count == 25 for count in report.inputs.values())


# the fixes of faults that attackers hit, taken out in the process that is fuzzed; each imports what it breaks, since
# that process starts anew for it


def quadratic_stops() -> None:
    """S1: every beginning of every stop text is compared at every character."""
    from quota.runtime.engine import detokenize

    def push(self: Any, news: str) -> str:
        for character in news:
            self._held += character
            ended = [stop for stop in self.stops if self._held.endswith(stop)]
            if ended and not self.found:
                self.found = True
                return self._held[: -len(max(ended, key=len))]
            longest = max(
                (size for stop in self.stops for size in range(len(stop)) if self._held.endswith(stop[:size])),
                default=0,
            )
        shown, self._held = self._held[: len(self._held) - longest], self._held[len(self._held) - longest :]
        return "" if self.found else shown

    detokenize.StopStrings.push = push  # type: ignore[method-assign]


def uncounted_bodies() -> None:
    """S2"""
    from quota.server import bodies

    bodies.MAX_MARKS.update(dict.fromkeys(bodies.MAX_MARKS, 1 << 60))


def unbounded_scans() -> None:
    """S3"""
    from quota.core import image_files

    image_files.MAX_SCANS = 1 << 60


def unbounded_tiles() -> None:
    """S4: the size that the file states is all that is looked at."""
    from quota.core import image_files

    image_files._plan = lambda format, size, data, extra_bytes, work_pixels=0: image_files.Survey(  # type: ignore[assignment]
        format, size, size[0] * size[1], 0, data
    )


def unbounded_flight() -> None:
    """S5"""
    from quota.server import bodies

    bodies.Bodies._evict = lambda self, held: self._arriving.discard(held)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("weaken", "target", "said"),
    [
        (quadratic_stops, "stop", "processor time"),
        (uncounted_bodies, "completion", "memory grew"),
        (unbounded_scans, "image", "processor time"),
        (unbounded_tiles, "image", "memory grew"),
        (unbounded_flight, "connections", "memory grew"),
    ],
)
def test_a_fault_is_found_again(weaken: Callable[[], None], target, said, tmp_path):
    limits = SHORT if said == "processor time" else LIMITS
    report = fuzz(FOREVER_S, seed=0, names=(target,), inputs=200, limits=limits, keep=tmp_path, most=1, prepare=weaken)
    assert len(report.failures) == 1 and said in report.failures[0], report
    assert len(report.kept) == 1 and report.kept[0].startswith(str(tmp_path / f"{target}-0-"))
