"""An engine on a thread of its own, awaited from an event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from quota.core.errors import QuotaError
from quota.runtime.engine.engine import Engine
from quota.runtime.engine.request import Output, Request

log = logging.getLogger(__name__)
UNREAD = 256  # outputs of a stream that wait for its reader before its requests are paused; half of it, and they go on


class Closed(QuotaError):
    """The engine takes no more requests."""


class _Stream:
    """Outputs on their way to one reader. The worker counts those it has given, the reader those it has taken."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.ids, self.loop, self.outputs = ids, asyncio.get_running_loop(), asyncio.Queue[Output]()
        self.given = self.taken = 0
        self.paused = False

    @property
    def unread(self) -> int:
        return self.given - self.taken


class AsyncEngine:
    """Requests from one event loop, steps on a worker thread. Everything the engine does happens on that thread. What
    nobody reads is not computed: requests whose outputs are not taken are paused.

    observe: called there after every step and while idle requests leave, with the engine.
    """

    def __init__(self, engine: Engine, observe: Callable[[Engine], None] | None = None) -> None:
        self.engine = engine
        self._observe = observe
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="quota-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the worker runs."""
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Requests not answered to the end yet."""
        return len(self._streams)

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run something on the worker, between two steps; its result or exception."""
        if self._closed or not self.healthy:
            raise Closed("engine: closed")
        future: Future[Any] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    async def stream(self, *requests: Request) -> AsyncGenerator[Output]:
        """Outputs of all requests as they come, until each had one with a reason. Leaving early aborts them. Raises
        what `Engine.submit_all` raises."""
        stream = _Stream([request.id for request in requests])
        submitted = False

        def submit() -> None:
            nonlocal submitted
            self.engine.submit_all(requests)
            submitted = True
            self._streams.update(dict.fromkeys(stream.ids, stream))

        try:
            await self.call(submit)
            left = len(requests)
            while left:
                output = await stream.outputs.get()
                stream.taken += 1
                if stream.paused:  # set before the worker looks at what was taken: one of the two sees the other
                    self._commands.put(lambda: self._go_on(stream))
                left -= output.reason is not None
                yield output
        finally:
            # a task that was cancelled inside `call` may have been submitted all the same
            if submitted or not self._closed:
                self._commands.put(lambda: self._abandon(stream))

    def _abandon(self, stream: _Stream) -> None:
        for id in stream.ids:
            if self._streams.get(id) is stream:
                del self._streams[id]
                self.engine.abort(id)

    def _go_on(self, stream: _Stream) -> None:
        if stream.paused and 2 * stream.unread <= UNREAD:
            stream.paused = False
            self.engine.resume(stream.ids)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Abort what runs and end the worker."""
        self._closed = True
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)

    def _work(self) -> None:
        while True:
            try:
                while not self.engine.busy or not self._commands.empty():
                    command = self._commands.get()
                    if command is None:
                        self._leave()
                        return
                    command()
                    del command  # else what the last one refers to would stay until the next
                self._deliver(self.engine.step())
            except Exception:
                log.exception("a step failed as a whole; its requests end")
                self._fail_all()
            if self._observe is not None:
                self._observe(self.engine)

    def _deliver(self, outputs: list[Output]) -> None:
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, Output]]] = {}
        for output in outputs:
            stream = self._streams.get(output.id) if output.reason is None else self._streams.pop(output.id, None)
            if stream is not None:
                stream.given += 1
                batches.setdefault(stream.loop, []).append((stream, output))
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop is closed
                log.warning("%d outputs belong to a closed event loop", len(batch))
            for stream in {stream for stream, _ in batch}:
                if not stream.paused and stream.unread > UNREAD:
                    stream.paused = True
                    self.engine.pause(stream.ids)
                    self._go_on(stream)

    def _fail_all(self) -> None:
        for id in list(self._streams):
            self.engine.abort(id)
        self._deliver([Output(id, reason="error", error="the engine's step failed") for id in list(self._streams)])

    def _leave(self) -> None:
        for id in list(self._streams):
            self.engine.abort(id)
        until = time.monotonic() + 1.0
        while self.engine.busy and time.monotonic() < until:
            self._deliver(self.engine.step())


def _put_all(batch: list[tuple[_Stream, Output]]) -> None:
    for stream, output in batch:
        stream.outputs.put_nowait(output)
