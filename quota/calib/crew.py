"""The steps of a calibration in their order, and beside them what nothing but the checkpoint waits for: a block that
learns from float inputs is calibrated while the samples go on to the next one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from tqdm import tqdm

from quota.calib.job import Job
from quota.calib.steps import Learned, Seconds, Step, Ticks
from quota.calib.work import WorkFolder


def ahead(size: int) -> int:
    """How many blocks at most are not committed when the samples go into another step: one waits for the thread that is
    done first."""
    return size if size > 1 else 0


class Stopped(Exception):
    """Raised in a calibration that has been abandoned."""


class Crew:
    """Runs steps. A context manager: left by an exception, what still learns ends at its next step.

    size: how many blocks are calibrated at once, each on a thread; 1: each by the calling thread, before the samples go
    on. Steps are committed in their order, each when its block is calibrated and the steps before it are committed.
    """

    def __init__(self, job: Job, work: WorkFolder, bar: tqdm, size: int) -> None:
        self.job, self.work, self.bar, self.size = job, work, bar, size
        self._pool = ThreadPoolExecutor(size) if size > 1 else None
        self._waiting: deque[tuple[Step, Future[Learned] | None]] = deque()  # for their commit
        self._over = threading.Event()

    def run(self, steps: Sequence[tuple[Step, Seconds]]) -> None:
        """Run all steps; each is committed when this returns."""
        for step, seconds in steps:
            self._settle(ahead(self.size))
            self.bar.set_description_str(step.words)
            ticks = Ticks(self.bar, *seconds)
            left = step.run(self.job, self.work, ticks)
            self.work.hand_on(left.streams)
            learned = None if left.learn is None else self._started(left.learn, ticks)
            self._waiting.append((step, learned))
        self._settle(0)

    def _started(self, learn: Callable[[Callable[[float], None]], Learned], ticks: Ticks) -> Future[Learned]:
        def told(share: float) -> None:
            if self._over.is_set():
                raise Stopped
            ticks.calibrated(share)

        if self._pool is not None:
            return self._pool.submit(learn, told)
        done: Future[Learned] = Future()
        done.set_result(learn(told))
        return done

    def _settle(self, most: int) -> None:
        """Commit what can be; wait until at most so many blocks are still to be committed."""
        while True:
            while self._waiting and (self._waiting[0][1] is None or self._waiting[0][1].done()):
                step, learned = self._waiting.popleft()
                if learned is not None:
                    self.work.save_block(step.path, *learned.result())
                self.work.commit()
            learning = [learned for _, learned in self._waiting if learned is not None]
            if len(learning) <= most:
                return
            wait(learning[:1])

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
