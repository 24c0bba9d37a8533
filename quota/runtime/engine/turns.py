"""Whose turn it is, and how much a step may do."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar


class Asking(Protocol):
    """A request as far as turns look at it; order: of arrival."""

    client: str
    order: int


_Asking = TypeVar("_Asking", bound=Asking)


class Turns:
    """Fair turns of clients at one kind of work, by virtual time (Demers, Keshav and Shenker, SIGCOMM 1989).

    A client's time goes on by the work it is given, and the client with the least time is next. The clock goes on by
    the work given over the number of clients that asked for it, and no client's time is before the clock: turns are not
    saved up, and a client that waits is reached by the clock after a bounded amount of others' work, however many
    clients come anew. Requests of one client go in order of arrival.
    """

    def __init__(self) -> None:
        self._clock = self._given = 0
        self._asking = 1
        self._times: dict[str, int] = {}  # of clients ahead of the clock

    def start(self, requests: Iterable[_Asking]) -> Iterator[_Asking]:
        """A new step, for which these ask; `order` of them."""
        requests = list(requests)
        self._clock += self._given // self._asking
        self._given %= self._asking
        self._asking = max(1, len({request.client for request in requests}))
        self._times = {client: time for client, time in self._times.items() if time > self._clock}
        return self.order(requests)

    def order(self, requests: Iterable[_Asking]) -> Iterator[_Asking]:
        """Some of those that ask (those of one client in the order given) as their turns come. What each is given is to
        be told by `charge` before the next is asked for."""
        queues: dict[str, deque[_Asking]] = {}
        for request in requests:
            queues.setdefault(request.client, deque()).append(request)
        heap = [(self._time(client), queue[0].order, client) for client, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            client = heap[0][2]
            queue = queues[client]
            yield queue.popleft()
            if queue:
                heapq.heapreplace(heap, (self._time(client), queue[0].order, client))
            else:
                heapq.heappop(heap)

    def charge(self, client: str, work: int) -> None:
        """A client was given this much."""
        self._times[client] = self._time(client) + work
        self._given += work

    def _time(self, client: str) -> int:
        return self._times.get(client, self._clock)


class Pace:
    """How many rows a step may have, so that it takes about `step_s`: at most `limit`, fewer on a slow machine. inf: as
    many as the limit, always. What a request gets does not depend on it, only when."""

    _FIRST, _LEAST = 32, 4  # rows before anything was measured, and however slow they are

    def __init__(self, limit: int, step_s: float) -> None:
        self.limit, self.step_s = limit, step_s
        self.rows = limit if math.isinf(step_s) else min(limit, self._FIRST)

    def observe(self, rows: int, seconds: float) -> None:
        """A step of that many rows took so long. Short steps say nothing about how many rows would fit."""
        if seconds > self.step_s:
            fitting = int(min(rows, self.rows) * self.step_s / seconds)
        elif 2 * rows > self.rows:
            fitting = int(min(2.0, self.step_s / max(seconds, 1e-9)) * self.rows)
        else:
            return
        self.rows = min(self.limit, max(self._LEAST, fitting))
