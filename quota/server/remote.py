"""Fetching images from the network: off unless hosts are allowed, and then only from public addresses, within size
and time.

Every hop is checked, and the connection goes to the very address that was checked, so that a name cannot resolve to
something else between check and use.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from quota.server.errors import ApiError

MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_CHUNK = 64 << 10


def fetch(url: str, hosts: Sequence[str], max_bytes: int, timeout_s: float) -> bytes:
    """The body at `url`. hosts: exact names, or ".example.org" for all below it. ApiError 400 for anything not allowed
    or not delivered."""
    if not hosts:
        raise refusal("remote images are switched off; send a data URL")
    deadline = time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        parts = _checked(url, hosts)
        try:
            found, body = _get(parts, public_address(parts), max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise refusal(f"cannot fetch the image ({type(error).__name__})") from None
        if not found:
            return body
        url = urljoin(url, found)
    raise refusal(f"more than {MAX_REDIRECTS} redirects")


def _checked(url: str, hosts: Sequence[str]) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refusal("not a URL") from None
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise refusal("expected an http or https URL without credentials, or a data URL")
    if port not in (None, _PORTS[parts.scheme]):
        raise refusal("only the standard ports are allowed")
    name = parts.hostname.rstrip(".").lower()
    if not any(name == host.lower() or (host.startswith(".") and name.endswith(host.lower())) for host in hosts):
        raise refusal("this host is not on the server's list")
    return parts


def public_address(parts: SplitResult) -> str:
    """An address of the host. ApiError when any of its addresses is not public: a mixed answer is how a rebinding
    attack looks."""
    try:
        found = {item[4][0] for item in socket.getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)}
    except OSError:
        raise refusal("the host has no address") from None
    addresses = [ipaddress.ip_address(str(text).split("%", maxsplit=1)[0]) for text in sorted(found, key=str)]
    for address in addresses:
        plain = getattr(address, "ipv4_mapped", None) or address
        if not plain.is_global or plain.is_multicast:
            raise refusal("the host is not on a public address")
    return str(addresses[0])


def _get(parts: SplitResult, address: str, max_bytes: int, deadline: float) -> tuple[str | None, bytes]:
    """(where it redirects to, b"") or (None, body)."""
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, timeout=_left(deadline))
    wire = socket.create_connection((address, _PORTS[parts.scheme]), timeout=_left(deadline))
    watchdog = threading.Timer(
        _left(deadline), _hang_up, (wire.dup(),)
    )  # a timeout per read would let a trickle go on for ever
    watchdog.daemon = True
    watchdog.start()
    try:
        if parts.scheme == "https":
            wire = ssl.create_default_context().wrap_socket(wire, server_hostname=parts.hostname)
        connection.sock = wire
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "quota"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
            return response.headers["Location"], b""
        if response.status != 200:
            raise refusal(f"the host answered {response.status}")
        body = bytearray()
        while chunk := response.read1(_CHUNK):
            body += chunk
            if len(body) > max_bytes:
                raise refusal(f"the image has more than {max_bytes} bytes", "image_too_large")
        _left(deadline)
        return None, bytes(body)
    finally:
        watchdog.cancel()
        connection.close()
        wire.close()


def _hang_up(wire: socket.socket) -> None:
    with contextlib.suppress(OSError):
        wire.shutdown(socket.SHUT_RDWR)
    wire.close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise refusal("the host took too long")
    return left


def refusal(message: str, code: str = "invalid_image_url") -> ApiError:
    """The error for an image that will not be fetched; it says nothing about what was found behind the name."""
    return ApiError(400, f"image_url: {message}", code=code, param="messages")
