"""One thread for work that must not stop the event loop: the smallest first, so that small ones never wait for
large ones."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Lane:
    """Jobs run one after the other; what waits is ordered by size, then by arrival. A small job waits for the one that
    runs and for smaller ones only."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._number = itertools.count()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    async def run(self, size: int, function: Callable[_P, _R], *args: _P.args, **options: _P.kwargs) -> _R:
        """The function's result or exception. size: of its input, in bytes or characters. A job whose caller was
        cancelled before its turn is left out."""
        future: Future[_R] = Future()
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            heapq.heappush(self._jobs, (size, next(self._number), future, lambda: function(*args, **options)))
            self._news.notify()
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._jobs:
                    self._news.wait()
                _, _, future, function = heapq.heappop(self._jobs)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del future, function  # else the last job's input and result would stay until the next
