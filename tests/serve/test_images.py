"""Pictures of every kind and none: decoded as they look, or refused with a reason; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from quota.core.errors import ImageError
from quota.core.images import Limits, decode
from quota.server import remote
from quota.server.config import Settings
from quota.server.errors import ApiError
from quota.server.images import Decoders
from tests.serve.pictures import data_url, encoded, noise
from tests.waiting import PATIENCE_S

SETTINGS = Settings(checkpoint="x")
LIMITS = Limits(pixels=12_000_000)


def load_image(url: str, settings: Settings) -> Image.Image:
    """As a request's only picture, in a process of its own."""

    async def scenario() -> Image.Image:
        decoders = Decoders(settings, lambda reason: pytest.fail(reason))
        try:
            async with decoders.opened([url], "") as (found, _):
                return found[0]
        finally:
            decoders.close()

    return asyncio.run(scenario())


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((6, 8), value, dtype=np.uint16))


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


GOOD = {
    "one pixel": encoded(noise(1, 1)),
    "jpeg": encoded(noise(), "JPEG"),
    "webp": encoded(noise(), "WEBP", lossless=True),
    "bmp": encoded(noise(), "BMP"),
    "grey": encoded(noise().convert("L")),
    "grey and alpha": encoded(noise().convert("LA")),
    "alpha": encoded(noise().convert("RGBA")),
    "palette": encoded(noise().convert("P")),
    "one bit": encoded(noise().convert("1")),
    "cmyk": encoded(noise().convert("CMYK"), "JPEG"),
    "cmyk tiff": encoded(noise().convert("CMYK"), "TIFF"),
    "16 bit": encoded(grey16(40_000)),
    "animated": animated(),
    "large": encoded(noise(4000, 3000), "JPEG"),
    "float tiff": encoded(Image.fromarray(np.full((5, 5), 100.0, dtype=np.float32)), "TIFF"),
}


def test_values_survive():
    for kind in GOOD:
        assert load_image(data_url(GOOD[kind]), SETTINGS).tobytes() == decode(GOOD[kind]).tobytes(), kind
    assert abs(np.array(decode(GOOD["16 bit"], LIMITS)).mean() - 40_000 / 257) < 1.5
    assert tuple(np.array(decode(animated(), LIMITS))[4, 4]) == (255, 0, 0)
    assert abs(np.array(decode(GOOD["float tiff"], LIMITS)).mean() - 100) < 1.5


def bomb(width: int, height: int) -> bytes:
    """A PNG that promises pixels it does not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


BAD = {
    "empty": b"",
    "text": b"hello",
    "truncated png": encoded(noise())[:200],
    "truncated jpeg": encoded(noise(), "JPEG")[:300],
    "bomb": bomb(60_000, 60_000),
    "strip": encoded(noise(3000, 2)),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "short png": bomb(300, 300),
}


@pytest.mark.parametrize("kind", BAD)
def test_pictures_that_are_refused(kind):
    with pytest.raises(ApiError) as caught:
        load_image(data_url(BAD[kind]), SETTINGS)
    assert caught.value.status == 400 and caught.value.param == "messages"


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:image/png;base64,***",
        "data:",
        "ftp://x/y",
        "file:///etc/passwd",
        "//x",
        "http://",
        "javascript:1",
    ],
)
def test_urls_that_are_refused(url):
    for hosts in ((), ("example.org",)):
        with pytest.raises(ApiError):
            load_image(url, SETTINGS.model_copy(update={"image_hosts": hosts}))


def test_byte_limit():
    with pytest.raises(ApiError, match="more than 100 bytes"):
        load_image(data_url(noise()), SETTINGS.model_copy(update={"max_image_bytes": 100}))


@given(st.data())
@settings(max_examples=150)
def test_damaged_pictures_never_crash(data):
    source = bytearray(
        data.draw(
            st.sampled_from(
                [
                    GOOD[kind]
                    for kind in ("one pixel", "jpeg", "webp", "bmp", "palette", "16 bit", "animated", "cmyk tiff")
                ]
            )
        )
    )
    for _ in range(data.draw(st.integers(1, 8))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(source), LIMITS).mode == "RGB"
    except ImageError as error:
        assert str(error).startswith("image: ") and "\n" not in str(error)


# remote pictures


def resolve_to(monkeypatch, *addresses: str) -> None:
    monkeypatch.setattr(
        remote.socket,
        "getaddrinfo",
        lambda *args, **kwargs: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in addresses],
    )


PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "192.168.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "::1",
    "fd00::1",
    "fe80::1",
    "::ffff:127.0.0.1",
    "224.0.0.1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused(monkeypatch, address):
    resolve_to(monkeypatch, "93.184.216.34", address)
    with pytest.raises(ApiError, match="public address"):
        remote.fetch("http://pictures.example/x.png", ["pictures.example"], 1000, 1)


def test_hosts_have_to_be_allowed(monkeypatch):
    resolve_to(monkeypatch, "127.0.0.1")
    with pytest.raises(ApiError, match="switched off"):
        remote.fetch("http://pictures.example/x.png", [], 1000, 1)
    for url in ("http://evil.example/", "http://pictures.example.evil.example/", "http://xpictures.example/"):
        with pytest.raises(ApiError, match="not on the server's list"):
            remote.fetch(url, ["pictures.example", ".pictures.example"], 1000, 1)
    for url in ("http://pictures.example:22/", "http://user@pictures.example/", "http://pictures.example:99999/"):
        with pytest.raises(ApiError, match=r"ports|credentials|not a URL"):
            remote.fetch(url, ["pictures.example"], 1000, 1)
    with pytest.raises(ApiError, match="public address"):
        remote.fetch("http://a.pictures.example/", [".pictures.example"], 1000, 1)


@pytest.fixture
def web(monkeypatch):
    """A web server on the loopback interface that pretends to be public: path -> response bytes (or a function of the
    connection)."""
    pages: dict[str, object] = {}
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            path = connection.recv(4096).split(b" ")[1].decode()
            page = pages[path]
            with contextlib.suppress(OSError):
                page(connection) if callable(page) else connection.sendall(page)

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    monkeypatch.setattr(remote, "public_address", remote_address)
    monkeypatch.setattr(remote, "_PORTS", {"http": listener.getsockname()[1], "https": 1})
    yield pages
    listener.close()


def remote_address(parts) -> str:
    if parts.hostname == "inside.example":
        raise remote.refusal("the host is not on a public address")
    return "127.0.0.1"


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def test_fetching(web):
    picture = encoded(noise())
    web["/good"] = ok(picture)
    web["/moved"] = b"HTTP/1.1 302 Found\r\nLocation: /good\r\nContent-Length: 0\r\n\r\n"
    web["/inside"] = b"HTTP/1.1 302 Found\r\nLocation: http://inside.example/\r\nContent-Length: 0\r\n\r\n"
    web["/outside"] = b"HTTP/1.1 302 Found\r\nLocation: http://evil.example/\r\nContent-Length: 0\r\n\r\n"
    web["/round"] = b"HTTP/1.1 302 Found\r\nLocation: /round\r\nContent-Length: 0\r\n\r\n"
    web["/missing"] = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    web["/garbage"] = b"\0" * 100
    web["/endless"] = lambda c: [
        c.sendall(b"HTTP/1.1 200 OK\r\n\r\n"),
        [c.sendall(b"x" * 10_000) for _ in range(10_000)],
    ]
    web["/silent"] = lambda c: threading.Event().wait(5)
    hosts = ["p.example", "inside.example"]

    def get(path: str) -> bytes:
        return remote.fetch(f"http://p.example{path}", hosts, 200_000, 0.5 if path == "/silent" else PATIENCE_S)

    assert get("/good") == get("/moved") == picture
    for path, reason in (
        ("/inside", "public"),
        ("/outside", "list"),
        ("/round", "redirects"),
        ("/missing", "404"),
        ("/garbage", "cannot fetch"),
        ("/endless", "more than 200000"),
        ("/silent", r"cannot fetch|too long"),
    ):
        with pytest.raises(ApiError, match=reason):
            get(path)


def test_a_trickle_is_cut_off(web):
    """Every piece comes in time, the whole does not; a client that waits for it gets a good answer."""

    def trickle(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        for _ in range(50):
            connection.sendall(b"a: b\r\n")
            threading.Event().wait(0.1)
        connection.sendall(b"Content-Length: 2\r\n\r\nok")

    web["/slow"] = trickle
    with pytest.raises(ApiError):
        remote.fetch("http://p.example/slow", ["p.example"], 1000, 0.5)
