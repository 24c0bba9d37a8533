"""HTTP/1.1 as uvicorn speaks it, with a limit of time for headers: uvicorn itself waits for them for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 15.0


class PatientProtocol(H11Protocol):
    """Closes a connection whose next request has not come `headers_s` after it was opened, or after a request's first bytes."""

    headers_s = HEADERS_S

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._begun: Any = None  # the last request whose headers are complete
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not self._begun:
            self._begun = self.cycle
            self._stop()
        elif self.cycle is None or self.cycle.response_complete:
            self._start()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle is not self._begun:  # the next request was there already
            self._begun = self.cycle
        elif self.conn.trailing_data[0]:
            self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.headers_s, self._give_up)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
