"""HTTP/1.1 as uvicorn speaks it, with limits it lacks: for headers, and for clients that do not read, go on sending or
have closed their side."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("quota.server")
HEADERS_S = 15.0
HEAD_BYTES, HEAD_LINES = 64 << 10, 256
UNREAD_S = 30.0
LINGER_S, LINGER_BYTES = 2.0, 1 << 20
PROBE_S, HALF_CLOSED_S = 0.25, 10.0
SEND_BYTES = (
    64 << 10
)  # that the kernel holds of an answer; left alone it takes megabytes for a client that does not read
_END_OF_HEAD = re.compile(rb"\n\r?\n")
_PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"


class HeaderTimeoutProtocol(H11Protocol):
    """Closes a connection

    - whose next request has not come `headers_s` after it was opened, or after a request's first bytes, or has a head
    of more than HEAD_BYTES or HEAD_LINES;
    - that takes nothing of its answer for `unread_s`;
    - whose request was answered before it was there: after LINGER_S or LINGER_BYTES more, so that the client can read
    why.

    A client that has sent its request and closed its side is answered. Nothing but a write tells such a client from one
    that has left, so one that waits is sent an interim response every PROBE_S, which the other end of a closed
    connection answers with a reset; HTTP/1.0 has none, so there an answer has to begin within `half_closed_s`.
    """

    headers_s = HEADERS_S
    unread_s = UNREAD_S
    half_closed_s = HALF_CLOSED_S

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._begun: Any = None  # the last request whose headers are complete
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._half_closed = False
        self._lingering = False
        self._discarded = self._unread = 0

    # asyncio's events

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self._start("headers", self.headers_s)

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            self._discarded += len(data)
            if self._discarded > LINGER_BYTES:
                self.transport.close()
            return
        super().data_received(data)
        if self.cycle is not self._begun:
            self._begun = self.cycle
            self._stop("headers")
        elif self._answered:
            self._start("headers", self.headers_s)

    def eof_received(self) -> bool:  # type: ignore[override]
        if self._lingering or self._answered or self.cycle.more_body:
            return False
        self._half_closed = True
        self._start("probe", PROBE_S)
        self._start("half closed", self.half_closed_s)
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.transport.get_write_buffer_size()
        self._start("unread", self.unread_s)

    def resume_writing(self) -> None:
        self._stop("unread")
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    # uvicorn's

    def handle_events(self) -> None:
        if self.conn.their_state is h11.IDLE:
            waiting, _ = self.conn.trailing_data
            end = _END_OF_HEAD.search(waiting)
            head = waiting[: end.start()] if end else waiting
            if len(head) > HEAD_BYTES or head.count(b"\n") >= HEAD_LINES:
                self._refuse(
                    431, f"the headers have more than {HEAD_BYTES} bytes or {HEAD_LINES} lines", "headers_too_large"
                )
                return
        super().handle_events()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "not an HTTP request", "invalid_http")

    def on_response_complete(self) -> None:
        early = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if early:
            self._linger()
        elif self.cycle is not self._begun:  # the next request was there already
            self._begun = self.cycle
        elif self._half_closed:
            self.transport.close()
        elif self.conn.trailing_data[0]:
            self._start("headers", self.headers_s)

    # ours

    @property
    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer what is no request that could be handed on; then nothing more is read."""
        if self._lingering or self.transport.is_closing():
            return
        body = json.dumps(
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        ).encode()
        reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}[status]
        head = (
            f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length:"
            f" {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        log.info("refused", extra={"status": status, "code": code})
        self._linger()

    def _linger(self) -> None:
        """Close so that the client can read the answer: a socket closed with bytes unread resets the connection, answer
        included."""
        if self._lingering or self.transport.is_closing():
            return
        self._lingering = True
        self._unset_keepalive_if_required()
        self._stop("headers")
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start("linger", LINGER_S)

    def _start(self, name: str, seconds: float) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, self._due, name)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _due(self, name: str) -> None:
        del self._timers[name]
        if name == "unread":
            self._check_unread()
        elif self.transport.is_closing():
            pass
        elif name == "probe":
            self._probe()
        elif name != "half closed" or (self._waiting_for_answer and self.cycle.scope["http_version"] == "1.0"):
            self.transport.close()

    def _check_unread(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= self._unread:
            self.transport.abort()  # close would wait until the client reads the rest
        else:
            self._unread = left
            self._start("unread", self.unread_s)

    @property
    def _waiting_for_answer(self) -> bool:
        return not self._answered and not self.cycle.response_started

    def _probe(self) -> None:
        if self._waiting_for_answer and self.cycle.scope["http_version"] != "1.0":
            self.transport.write(_PROCESSING)
            self._start("probe", PROBE_S)


OPTIONS: dict[str, Any] = {  # of uvicorn's Config: not whatever else is installed
    "http": HeaderTimeoutProtocol,
    "ws": "none",
    "loop": "asyncio",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "h11_max_incomplete_event_size": HEAD_BYTES,
}
