"""What happens around every request: its id, the key, the count, one line of log, and an answer even to a fault."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quota.server.errors import ApiError, as_api_error
from quota.server.service import Service

log = logging.getLogger("quota.server")
_ID = re.compile(r"[\w.-]{1,64}\Z", re.ASCII)
_OPEN = {"/health", "/ready", "/metrics"}  # without a key: for probes and scrapers, which the operator keeps inside
_PAGE = "/demo"
_KNOWN = _OPEN | {
    _PAGE,
    "/v1/models",
    "/v1/quota/preview",
    "/v1/chat/completions",
    "/v1/completions",
}  # other paths are one metric, so that a scan adds no labels


class RequestMiddleware:
    """ASGI middleware. It never buffers, so streams and disconnections pass through."""

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[str]) -> None:
        self.app, self.service = app, service
        self._keys = [key.encode() for key in keys]
        self._hosts = service.settings.known_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id = given if _ID.match(given) else uuid.uuid4().hex
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            key = self._key(headers)
            scope.setdefault("state", {})["client"] = _address(scope) if key is None else f"key {key}"
            refusal = self._refusal(scope["path"], headers, key)
            await (self.app if refusal is None else refusal.response())(scope, receive, watched)
        except Exception as error:
            log.exception("request failed", extra={"request": id})
            if not status:
                await as_api_error(error).response()(scope, receive, watched)
        finally:
            self._record(scope, id, status, time.monotonic() - began)

    def _refusal(self, path: str, headers: Headers, key: int | None) -> ApiError | None:
        if self._hosts is not None and not _known(headers.get("host"), self._hosts):
            return ApiError(
                403,
                "the Host header holds no name of this server; its operator can add it to allowed_hosts",
                code="unknown_host",
            )
        is_open = path in _OPEN or path == _PAGE or path.startswith(f"{_PAGE}/")
        if self._keys and not is_open and key is None:
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _key(self, headers: Headers) -> int | None:
        """Which of the keys was given."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # every key is compared, each in constant time, so that the delay tells nothing
        matches = [hmac.compare_digest(key.strip().encode(), known) for known in self._keys]
        return matches.index(True) if scheme.lower() == "bearer" and any(matches) else None

    def _record(self, scope: Scope, id: str, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in _KNOWN else "other"
        self.service.metrics.http.labels(path, status).inc()
        extra: dict[str, Any] = {
            "request": id,
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1e3 * seconds, 1),
        }
        log.info("answered", extra=extra)


def _address(scope: Scope) -> str:
    """Address of the other end; for IPv6 the network of 64 bits that one host usually has."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return str(host)
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def _known(given: str | None, hosts: Sequence[str]) -> bool:
    """Whether a Host header (a name or address, maybe with a port) is one of these names, or below one that begins with
    a dot. A request without the header is not a browser's and passes."""
    if given is None:
        return True
    name = given.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.rstrip(".")
    return any(name == host.lower() or (host.startswith(".") and name.endswith(host.lower())) for host in hosts)
