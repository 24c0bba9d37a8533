"""Bodies: read within limits of size, time and memory over all connections, and parsed off the event loop within a
bound of work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from quota.server.config import Settings
from quota.server.errors import ApiError, as_api_error
from quota.server.lane import Lane

_Body = TypeVar("_Body", bound=BaseModel)
_UNCOUNTED_BYTES = (
    64 << 10
)  # of each body: what a connection may hold in buffers anyway, so that small requests pass whatever large ones hold
# what a body may hold of each, in texts too: together they bound its values, which take 8 to 300 bytes of memory each
# and some microseconds
MAX_MARKS = {b",": 1 << 20, b":": 1 << 17, b"[": 1 << 16, b"{": 1 << 16}
MAX_KEYS = 128  # of one object; pydantic makes an error of a kilobyte for each that it does not know
_SLICE = 1 << 20  # bytes counted at a time, between two chances for other threads


class Held:
    """What one request holds of the budget."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.counted = 0
        self.deadline: asyncio.Timeout | None = None  # while it arrives
        self.evicted = False


class Bodies:
    """The bytes of all requests on their way, at most `in_flight_bytes` of them. Where one more byte does not fit, the
    largest body that is still arriving is given up, so that small requests are served."""

    def __init__(self, settings: Settings, lane: Lane) -> None:
        self.settings, self.lane = settings, lane
        self.total = 0
        self._arriving: set[Held] = set()

    @contextlib.contextmanager
    def held(self) -> Iterator[Held]:
        """A share of the budget, given back on leaving."""
        held = Held()
        try:
            yield held
        finally:
            self._free(held)

    async def parsed(self, request: Request, kind: type[_Body], held: Held, client: str) -> _Body:
        """The body as `kind`. ApiError for one that is too large, too slow, crowded out, no JSON or not this."""
        self._check_headers(request)
        await self._arrive(request, held)
        data, held.data = bytes(held.data), bytearray()
        return await self.lane.run(client, len(data), parse, kind, data)

    def _check_headers(self, request: Request) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self.settings.max_body_bytes):
            raise self._too_large()
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "content-type: expected application/json", code="unsupported_media_type")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(
                415, "content-encoding: bodies are taken as they are, not compressed", code="unsupported_media_type"
            )

    async def _arrive(self, request: Request, held: Held) -> None:
        self._arriving.add(held)
        try:
            async with asyncio.timeout(self.settings.body_timeout_s) as held.deadline:
                async for chunk in request.stream():
                    held.data += chunk
                    self._count(held)
                    if held.evicted:
                        raise TimeoutError
                    if len(held.data) > self.settings.max_body_bytes:
                        raise self._too_large()
        except TimeoutError:
            if held.evicted:
                message = (
                    f"the bodies on their way have more than {self.settings.in_flight_bytes} bytes; try again later"
                )
                raise ApiError(429, message, code="too_many_bytes") from None
            raise ApiError(
                408, f"the body did not arrive within {self.settings.body_timeout_s:g} s", code="request_timeout"
            ) from None
        except ClientDisconnect:
            raise ApiError(400, "the client went away") from None
        finally:
            self._arriving.discard(held)

    def _count(self, held: Held) -> None:
        now = max(0, len(held.data) - _UNCOUNTED_BYTES)
        self.total += now - held.counted
        held.counted = now
        while self.total > self.settings.in_flight_bytes and self._arriving:
            self._evict(max(self._arriving, key=lambda other: other.counted))

    def _evict(self, held: Held) -> None:
        self._free(held)
        held.evicted = True
        self._arriving.discard(held)
        if held.deadline is not None:
            held.deadline.reschedule(asyncio.get_running_loop().time())  # wakes the reader of its next bytes

    def _free(self, held: Held) -> None:
        self.total -= held.counted
        held.counted, held.data = 0, bytearray()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self.settings.max_body_bytes} bytes", code="request_too_large")


def parse(kind: type[_Body], data: bytes) -> _Body:
    """A body from JSON. ApiError 400 for what is none, holds more values than any request needs, or is wrong; time and
    memory grow with its size alone."""
    left = dict(MAX_MARKS)
    for begin in range(0, len(data), _SLICE):
        for mark, most in MAX_MARKS.items():
            left[mark] -= data.count(mark, begin, begin + _SLICE)
            if left[mark] < 0:
                raise ApiError(
                    400, f"the body holds {mark.decode()!r} more than {most} times", code="request_too_large"
                )
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    _check_keys(value)
    try:
        return kind.model_validate(value)
    except ValueError as error:
        raise as_api_error(error) from None


def _check_keys(value: Any) -> None:
    """Objects have few keys. Lists are left to the schema, which stops at their first wrong item."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if len(value) > MAX_KEYS:
                raise ApiError(
                    400,
                    f"the body has an object of {len(value)} keys, at most {MAX_KEYS} are allowed",
                    code="invalid_json",
                )
            waiting += value.values()
        elif isinstance(value, list):
            waiting += [item for item in value if isinstance(item, (dict, list))]
