"""What clients share beside the engine: a thread for work that must not stop the event loop, and places for requests
that hold much. Both go by turns, so that no client waits for all requests of another."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Lane:
    """Jobs run one after the other: of the client that was served longest ago the smallest, of equals the first. So a
    job waits for the one that runs, one of each other client, and smaller ones of its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: dict[str, list[tuple[int, int, Future[Any], Callable[[], Any]]]] = {}  # a heap for each client
        self._served: dict[str, int] = {}  # of clients with jobs
        self._number = itertools.count()
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    async def run(self, client: str, size: int, function: Callable[_P, _R], *args: _P.args, **options: _P.kwargs) -> _R:
        """The function's result or exception. size: of its input, in bytes or characters. A job whose caller was
        cancelled before its turn is left out."""
        future: Future[_R] = Future()
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            number = next(self._number)
            self._served.setdefault(client, number)  # one that was away queues behind the clients that wait
            job = (size, number, future, lambda: function(*args, **options))
            heapq.heappush(self._jobs.setdefault(client, []), job)
            self._news.notify()
        return await asyncio.wrap_future(future)

    def _next(self) -> tuple[Future[Any], Callable[[], Any]]:
        client = min(self._jobs, key=lambda name: (self._served[name], self._jobs[name][0][1]))
        _, _, future, function = heapq.heappop(self._jobs[client])
        self._served[client] = next(self._number)
        if not self._jobs[client]:
            del self._jobs[client], self._served[client]
        return future, function

    def _work(self) -> None:
        while True:
            with self._news:
                while not self._jobs:
                    self._news.wait()
                future, function = self._next()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            del future, function  # else the last job's input and result would stay until the next


class Places:
    """A semaphore: the next place goes to the client that has fewest, of equals to the first."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def one(self, client: str) -> AsyncGenerator[None]:
        """A place until the end of the block."""
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((client, ticket))
        self._grant()
        try:
            await ticket
            yield
        finally:
            if (client, ticket) in self._waiting:
                self._waiting.remove((client, ticket))
            else:
                self._free += 1
                self._held[client] -= 1
                self._held += Counter()  # without zeros
                self._grant()

    def _grant(self) -> None:
        while self._free and self._waiting:
            chosen = min(self._waiting, key=lambda waiting: self._held[waiting[0]])
            self._waiting.remove(chosen)
            self._free -= 1
            self._held[chosen[0]] += 1
            if not chosen[1].done():
                chosen[1].set_result(None)
