"""Inputs for `fuzz_targets`: bytes from a random generator, near what is right, damaged, or large."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Callable
from typing import Any

from benchmarks.serve import hostile_images as hostile
from benchmarks.serve.traffic import image_bytes

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    -(2**70),
    0.5,
    1e308,
    float("inf"),
    "",
    "user",
    "x" * 1000,
    "\ud800",
    "\x00",
    "<image>",
    [],
    {},
    [[]],
    [None],
    {"type": "text"},
)
TEXTS = (
    "x ",
    "<image>",
    "<ima",
    "ge>",
    "<s>",
    "</s>",
    "<pad>",
    "ASSISTANT:",
    "{{ 7 }}",
    "{% x",
    "\n",
    "\x00",
    "\u202e",
    "\u00e9",
    "\U0001f600",
    "\ufeff",
)
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, PICTURE]}],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 1,
    "seed": 3,
    "stop": ["a"],
    "stream": False,
    "logprobs": True,
    "top_logprobs": 2,
    "keep": 0.5,
}
COMPLETION = {"model": "m", "prompt": ["x"], "max_tokens": 3, "logprobs": 1, "n": 2}
RECIPE = {
    "method": "quota",
    "regime": "w4a4kv4",
    "model": {"architecture": "x", "fingerprint": "sha256:" + "0" * 64, "layers": 8, "visual_tokens": 144},
    "candidates": [2, 3],
    "keep": [0.5, 0.3],
    "final_keep": 0.3,
    "reference_tokens": 144,
    "sensitivities": [0.1, 0.2],
    "weights": {"inter": 0.5, "quant": 0.0},
}
MANIFEST = {
    "schema_version": 1,
    "regime": "w4a16",
    "modules": ["llm"],
    "source_fingerprint": "sha256:0",
    "calibration": {"seed": 0},
    "files": {"config.json": "0" * 64},
    "bytes": {"config.json": 2},
    "tool_version": "0",
}
SAMPLES = {
    "schema": "quota-samples/1",
    "samples": [{"id": "a", "instruction": "x ?", "image": "a.png", "answer": "y", "task": "t"}],
}
SETTINGS = (
    "checkpoint='x'\nport=1\nhost='::1'\nrecipes=['a=b']\nkv_bytes=9\nimage_decode_s=1.5\nprefix_cache=true\nmax_images=2\napi_keys=['k']\n",
    "QUOTA_SERVE_PORT=1\nQUOTA_SERVE_API_KEYS=a,b\nQUOTA_SERVE_DTYPE=float16\nQUOTA_SERVE_KV_BYTES=7\nQUOTA_SERVE_PREFIX_CACHE=no",
)
BODY_BYTES, IN_FLIGHT_BYTES, CONNECTIONS = 4 << 20, 8 << 20, 40


def mutate(value: Any, rng: random.Random) -> Any:
    """One random change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.1:
            del changed[key]
        elif rng.random() < 0.1:
            changed[rng.choice(("", "role", "nonsense", "\ud800"))] = rng.choice(VALUES)
        else:
            changed[key] = mutate(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutate(value[at], rng), *value[at + (rng.random() < 0.8) :]]
    return rng.choice(VALUES)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut or doubled."""
    broken = bytearray(data)
    for _ in range(rng.randint(0, 6)):
        if broken:
            broken[rng.randrange(len(broken))] = rng.randrange(256)
    if rng.random() < 0.3:
        del broken[rng.randint(0, len(broken)) :]
    return bytes(broken * (2 if rng.random() < 0.05 else 1))


def document(base: Any) -> Callable[[random.Random], bytes]:
    """JSON near `base`, or a damaged one."""

    def make(rng: random.Random) -> bytes:
        value = base() if callable(base) else base
        for _ in range(rng.randint(0, 4)):
            value = mutate(value, rng)
        text = json.dumps(value).encode()
        return damaged(text, rng) if rng.random() < 0.3 else text

    return make


def large(rng: random.Random) -> bytes:
    """A body of up to BODY_BYTES in which one small thing stands again and again, where a list may stand or not."""
    one = rng.choice(
        (
            b"1,",
            b"0.5,",
            b'"a",',
            b"[],",
            b"{},",
            b'{"a":1},',
            b'{"role":"user","content":"x"},',
            b"[[",
            b'{"a":',
            b" ",
            b"x",
        )
    )
    many = one * (rng.randint(BODY_BYTES // 2, BODY_BYTES - 200) // len(one))
    head = rng.choice((b'{"model":"m","messages":[', b'{"model":"m","prompt":[', b'{"model":"m","prompt":"', b"["))
    return head + many + (b'"}' if head.endswith(b'"') else b"1]}")


def body(base: dict[str, Any]) -> Callable[[random.Random], bytes]:
    near = document(base)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return large(rng)
        picture = (
            data_url(rng)
            if rng.random() < 0.3
            else _url(image_bytes(rng, (64, 64)))
            if rng.random() < 0.8
            else b"data:,"
        )
        return near(rng).replace(b"data:,", picture, 1)

    return make


def image(rng: random.Random) -> bytes:
    """An ordinary image or one of the hostile ones, of random size, damaged or not."""
    if rng.random() < 0.5:
        return damaged(image_bytes(rng, (64, 64)), rng)
    kind = rng.choice([*hostile.ATTACKS, "scans"])
    if kind == "scans":
        data = hostile.many_scans(rng.randint(16, 1000), rng.randint(1, 15_000))
    else:
        data = hostile.ATTACKS[kind](10 ** rng.uniform(-4, 0))
    return damaged(data, rng) if rng.random() < 0.3 else data


def prompt(rng: random.Random) -> bytes:
    """A well-formed chat of texts that templates, tokenizers and marks may stumble over, with and without images."""

    def content() -> Any:
        texts = ["".join(rng.choices(TEXTS, k=rng.randint(0, 4))) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5:
            return texts[0]
        pictures = [
            {"type": "image_url", "image_url": {"url": _url(image_bytes(rng, (64, 64))).decode()}}
            for _ in range(rng.choice((0, 0, 1, 2)))
        ]
        return rng.sample(parts := [*({"type": "text", "text": text} for text in texts), *pictures], len(parts))

    messages = [
        {"role": rng.choice(("user", "user", "assistant", "system", "developer")), "content": content()}
        for _ in range(rng.choice((1, 1, 2, 4)))
    ]
    return json.dumps(
        {"model": "m", "messages": messages, "max_tokens": 2, **({"keep": 0.5} if rng.random() < 0.3 else {})}
    ).encode()


def _url(data: bytes) -> bytes:
    return b"data:image/png;base64," + base64.b64encode(data)


def data_url(rng: random.Random) -> bytes:
    text = _url(damaged(image_bytes(rng, (64, 64)), rng))
    return damaged(text, rng) if rng.random() < 0.5 else text


def stops(rng: random.Random) -> bytes:
    """Stop texts, and an answer that almost holds them: all of few letters."""
    letters = rng.choice(("x", "ab", "abc"))
    period = "".join(rng.choices(letters, k=rng.randint(1, 4)))
    texts = [(period * 1024)[: rng.randint(1, 1023)] + rng.choice(("!", "", "a")) for _ in range(rng.randint(1, 4))]
    return json.dumps(
        [texts, (period * 20_000)[: int(20_000 * rng.random())] + rng.choice(texts)[: rng.randint(0, 1024)]]
    ).encode()


def held_bodies(rng: random.Random) -> bytes:
    """How much each of several connections sends of its body."""
    return json.dumps(
        [rng.randint(0, BODY_BYTES) for _ in range(rng.choice((1, CONNECTIONS // 2, CONNECTIONS)))]
    ).encode()


def settings(rng: random.Random) -> bytes:
    """TOML, a zero byte, variables."""
    return b"\0".join(
        damaged(
            b"\n".join(line if rng.random() < 0.8 else damaged(line, rng) for line in text.encode().split(b"\n")), rng
        )
        if rng.random() < 0.7
        else text.encode()
        for text in SETTINGS
    )


def samples(rng: random.Random) -> bytes:
    data = document(SAMPLES)(rng)
    return data.replace(b"a.png", rng.choice((b"a.png", b"../a.png", b"/dev/zero", b"", data_url(rng))), 1)


_STREAM = {
    "file": "float-001.bin",
    "width": 2,
    "dtype": "float32",
    "lengths": [2, 1],
    "positions": [0, 1, 0],
    "roles": [0, 1, 2],
    "columns": [0, 1, 0],
    "images": [[1], []],
    "grids": [[1, 2, 2]],
    "sha256": "0" * 64,
}
STATE = {
    "job": {"seed": 0},
    "done": 3,
    "blocks": {"a.b": {"sha256": "0" * 64, "report": {"name": "a.b"}}},
    "streams": {"float": _STREAM},
    "notes": {
        "ids": [[1, 2], [3]],
        "grids": [[1, 2, 2]],
        "shown": [[["a", [1, 1]]], [["b", None]]],
        "keep": [[1, 0], [1]],
    },
}


def state(rng: random.Random) -> bytes:
    """The state of a calibration's work folder: edited and signed again, or damaged."""
    body = document(STATE)(rng)
    text = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    return damaged(text, rng) if rng.random() < 0.3 else text
