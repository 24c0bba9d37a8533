"""What attacks send: pure clients of a server, each with the bound it meets and the answers that may come of it."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.serve import hostile_images
from benchmarks.serve.traffic import image_bytes

MB, MIB = 1_000_000, 1 << 20
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Target:
    """Where to attack, with which share of the full size, and as whom: an API key."""

    url: str
    model: str
    scale: float = 1.0
    max_body_bytes: int = 32 * MIB
    key: str = "none"

    def of(self, full: int) -> int:
        return max(1, int(full * self.scale))

    def body(self, **fields: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": "yes ?"}],
            "max_tokens": 4,
            "temperature": 0,
            **fields,
        }

    def about(self, image: bytes, **fields: Any) -> dict[str, Any]:
        """A question about an encoded image."""
        url = {"url": f"data:image/png;base64,{base64.b64encode(image).decode()}"}
        return self.body(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "yes ?"}],
                }
            ],
            **fields,
        )

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def post(self, content: bytes | dict[str, Any], path: str = CHAT, headers: dict[str, str] | None = None) -> str:
        """The status of the answer."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with contextlib.suppress(httpx.TransportError):
            return str(
                httpx.post(
                    self.url + path, content=data, headers={**JSON, **self.headers, **(headers or {})}, timeout=300
                ).status_code
            )
        return "closed"

    def connect(self) -> socket.socket:
        address = httpx.URL(self.url)
        return socket.create_connection((address.host, address.port or 80), timeout=60)

    def head(self, length: int, path: str = CHAT) -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()
        )


@dataclass(frozen=True)
class Attack:
    """name: what is sent at full size. bound: what it meets. send: does it, and returns what came of each request;
    expected: all that may. images: it is about images, so the well-behaved client asks about an ordinary one too."""

    name: str
    bound: str
    send: Callable[[Target], Iterable[str]]
    expected: frozenset[str]
    images: bool = False


def status_of(raw: socket.socket) -> str:
    """The status that was answered before the connection ended or was closed."""
    with contextlib.suppress(OSError):
        line = raw.recv(4096).split(b"\r\n")[0].split()
        return line[1].decode() if len(line) > 1 else "closed"
    return "closed"


def long_stop(target: Target) -> Iterator[str]:
    yield target.post(target.body(stop="x" * target.of(MB), max_tokens=256, ignore_eos=True))


def longest_stops(target: Target) -> Iterator[str]:
    stops = [letter * 1023 + "!" for letter in ("x", " ", "a", "e")]
    yield target.post(target.body(stop=stops, n=8, max_tokens=target.of(400), ignore_eos=True, temperature=1.0))


def wrong_items(target: Target) -> Iterator[str]:
    yield target.post(b'{"model":"m","messages":[' + b"1," * target.of(4 * MB) + b"1]}")


def wrong_messages(target: Target) -> Iterator[str]:
    yield target.post(b'{"model":"m","messages":[' + b'{"a":1},' * target.of(500_000) + b"{}]}")


def unknown_keys(target: Target) -> Iterator[str]:
    yield target.post(b'{"model":"m",' + b",".join(b'"k%d":0' % number for number in range(target.of(500_000))) + b"}")


def token_ids(target: Target) -> Iterator[str]:
    for count in (target.of(MB), target.of(8 * MB)):
        yield target.post(b'{"model":"%s","prompt":[' % target.model.encode() + b"1," * count + b"1]}", PLAIN)


def deep_nesting(target: Target) -> Iterator[str]:
    yield target.post(b'{"model":' + b"[" * target.of(MB))


def long_text(target: Target) -> Iterator[str]:
    for text in ("x", "x ", "\u00e9", "\u0000", "<image"):
        yield target.post(target.body(messages=[{"role": "user", "content": text * (target.of(4 * MB) // len(text))}]))


def longest_texts(target: Target) -> Iterator[str]:
    """As long as is tokenized at all, from many at once."""
    body = {"model": target.model, "prompt": ["x y " * target.of(16_000)] * 8, "max_tokens": 1}
    with ThreadPoolExecutor(16) as threads:
        yield from threads.map(lambda _: target.post(body, PLAIN), range(target.of(64)))


def many_choices(target: Target) -> Iterator[str]:
    for n, ids in ((8, 10), (1, target.of(4000))):
        yield target.post({"model": target.model, "prompt": [[5] * ids] * 64, "n": n, "max_tokens": 1}, PLAIN)


def many_messages(target: Target) -> Iterator[str]:
    for count in (2048, target.of(200_000)):
        yield target.post(target.body(messages=[{"role": "user", "content": "x"}] * count))


def long_names(target: Target) -> Iterator[str]:
    name = "n" * target.of(8 * MB)
    for fields in (
        {"model": name},
        {"recipe": name},
        {name: 1},
        {"messages": [{"role": name, "content": "x"}]},
        {"user": name, "n": 99},
    ):
        yield target.post(target.body(**fields))


def log_probabilities(target: Target) -> Iterator[str]:
    yield target.post(target.body(n=8, max_tokens=4000, logprobs=True, top_logprobs=20, ignore_eos=True))
    yield target.post(target.body(n=2, max_tokens=target.of(1000), logprobs=True, top_logprobs=20, ignore_eos=True))


def held_bodies(target: Target) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(target.connect()) for _ in range(40)]
        piece = b" " * (target.max_body_bytes - target.max_body_bytes // 32)
        for raw in held:
            with contextlib.suppress(OSError):  # it was crowded out while it sent
                raw.sendall(target.head(target.max_body_bytes) + piece)
        time.sleep(2 * target.scale)
        yield target.post(target.body())
        for raw in held:
            raw.settimeout(0.2)
            yield {"429": "429"}.get(status_of(raw), "held")


def body_after_refusal(target: Target) -> Iterator[str]:
    with target.connect() as raw:
        raw.sendall(target.head(target.of(300 * MIB) + target.max_body_bytes))
        taken, piece = 0, bytes(MIB)
        with contextlib.suppress(OSError):
            while taken < target.of(300 * MIB):
                raw.sendall(piece)
                taken += len(piece)
        yield "closed" if taken < target.of(300 * MIB) else "taken"


def large_headers(target: Target) -> Iterator[str]:
    one = b"X: " + b"x" * 100_000 + b"\r\n"
    for head in (one, b"a:\r\n" * 15_000, b"a:\r\n" * 60_000):
        for _ in range(target.of(20)):
            with target.connect() as raw:
                with contextlib.suppress(OSError):
                    raw.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n")
                yield status_of(raw)


def idle_connections(target: Target) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        for _ in range(target.of(500)):
            stack.enter_context(target.connect()).sendall(b"GET /health HT")
        yield target.post(target.body())


def unread_streams(target: Target) -> Iterator[str]:
    fields = {"n": 2, "max_tokens": 400, "logprobs": True, "top_logprobs": 5, "ignore_eos": True, "stream": True}
    body = json.dumps(target.body(**fields)).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(target.of(50)):
            raw = stack.enter_context(socket.socket())
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.connect((httpx.URL(target.url).host, httpx.URL(target.url).port))
            raw.sendall(target.head(len(body)) + body)
        time.sleep(20 * target.scale)
        yield target.post(target.body())


def leaving(target: Target) -> Iterator[str]:
    body = json.dumps(target.body(n=8, max_tokens=2000, ignore_eos=True, temperature=1.0)).encode()
    for _ in range(target.of(200)):
        with target.connect() as raw:
            raw.sendall(target.head(len(body)) + body)
    yield target.post(target.body())


def hostile(kind: str) -> Callable[[Target], Iterator[str]]:
    """Four requests at once about an image of `hostile_images`."""

    def send(target: Target) -> Iterator[str]:
        body = json.dumps(target.about(hostile_images.ATTACKS[kind](target.scale))).encode()
        with ThreadPoolExecutor(4) as threads:
            yield from threads.map(lambda _: target.post(body), range(4))

    send.__name__ = kind.replace(" ", "_")
    return send


def ordinary(number: int) -> bytes:
    """An image as the well-behaved client sends it."""
    return image_bytes(random.Random(number), (64, 64))


OK, REFUSED, BUSY = frozenset({"200"}), frozenset({"400"}), frozenset({"429"})
_IMAGES = {  # kind: what it is at full size, the bound
    "scans": ("a JPEG of 6000 x 6000 with 1000 scans", "64 scans"),
    "exif segments": ("a JPEG with 1 million EXIF segments", "16 384 segments"),
    "comment segments": ("a JPEG with 1 million empty segments", "16 384 segments"),
    "text bomb": ("a PNG with texts that unpack to 60 MB", "texts are left out"),
    "profile bomb": ("a PNG with profiles that unpack to 15 GB", "profiles are left out"),
    "short png": ("a PNG of 60 000 x 60 000 without pixels", "40 megapixels"),
    "huge tile": ("a TIFF of 64 x 64 in a tile of 16 000 x 16 000", "40 megapixels, tiles included"),
    "repeated strips": ("a TIFF with 100 000 strips in one place", "as many strips as rows need"),
    "gif frame": ("a GIF of 1 x 1 with a frame of 13 000 x 13 000", "40 megapixels, frames included"),
    "gif blocks": ("a GIF with 5 million blocks of a comment", "262 144 blocks"),
    "webp canvas": ("a WebP of 16 000 x 16 000 without a frame", "40 megapixels"),
    "run-length bmp": ("a BMP of 6000 x 6000 in run-length code", "4 megapixels in this code"),
}
ATTACKS = (
    Attack("a stop text of 1 MB", "1024 characters, 400", long_stop, REFUSED),
    Attack("4 stop texts of 1024 characters, 8 choices, 400 tokens", "one look at each character", longest_stops, OK),
    Attack("4 million wrong messages, 8 MB", "1 Mi commas per body; ends at the first error", wrong_items, REFUSED),
    Attack(
        "500 000 objects with unknown keys", "65 536 objects per body; ends at the first error", wrong_messages, REFUSED
    ),
    Attack("500 000 unknown keys", "131 072 colons per body, 128 keys per object", unknown_keys, REFUSED),
    Attack("prompts of 1 and 8 million token ids", "the model's limit; commas", token_ids, REFUSED),
    Attack("1 million nested lists", "the parser's depth", deep_nesting, REFUSED),
    Attack("texts of 4 MB", "characters, before they are tokenized", long_text, REFUSED),
    Attack(
        "64 requests of 8 texts of 64 kB",
        "characters; tokenized one by one, the smallest first",
        longest_texts,
        OK | REFUSED,
    ),
    Attack(
        "64 prompts with 8 choices each; of 4000 ids each",
        "64 answers and 65 536 tokens at once",
        many_choices,
        OK | REFUSED,
    ),
    Attack("2048 and 200 000 messages", "2048; the model's limit", many_messages, REFUSED),
    Attack("names of 8 MB as model, recipe, key, role", "1000 characters; errors are cut", long_names, REFUSED),
    Attack(
        "20 alternatives for 8 x 4000 and 2 x 1000 tokens",
        "131072 log-probabilities; written off the loop",
        log_probabilities,
        OK | REFUSED,
    ),
    Attack(
        "40 connections that hold 31 of 32 MiB each",
        "256 MiB in sum; the largest makes room (429)",
        held_bodies,
        OK | BUSY | {"held"},
    ),
    Attack("300 MiB after a 413", "1 MiB or 2 s, then closed", body_after_refusal, frozenset({"closed"})),
    Attack(
        "a header of 100 kB; 15 000 and 60 000 headers",
        "64 KiB and 256 lines, 431",
        large_headers,
        frozenset({"431", "closed"}),
    ),
    Attack("500 connections with half a request line", "closed after 15 s", idle_connections, OK),
    Attack(
        "50 streams of 2 answers that are not read, log-probabilities",
        "256 unread outputs, then paused; cut after 30 s",
        unread_streams,
        OK,
    ),
    Attack("200 clients that ask for 8 x 2000 tokens and leave", "turns; aborted at the next step", leaving, OK | BUSY),
    *(
        Attack(f"4 x {name}", bound, hostile(kind), OK | REFUSED, images=True)
        for kind, (name, bound) in _IMAGES.items()
    ),
)
