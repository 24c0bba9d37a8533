"""What `fuzz.py` feeds with what. A target makes an input (bytes) from a random generator, and takes any bytes: returns when the code under test accepts
or refuses them as it should, and raises anything else."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.serve import hostile_images as hostile
from benchmarks.serve.traffic import picture_bytes
from quota.core import images
from quota.core.errors import ImageError, QuotaError, RecipeError, SampleError
from quota.core.recipe import Recipe

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**63, -(2**70), 0.5, 1e308, float("inf"), "", "user", "x" * 1000, "\ud800", "\x00", "<image>", [], {}, [[]], [None],
    {"type": "text"},
)  # fmt: skip
PICTURE = {"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}
CHAT = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, PICTURE]}],
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.5, "n": 1, "seed": 3, "stop": ["a"], "stream": False, "logprobs": True, "top_logprobs": 2, "keep": 0.5,
}  # fmt: skip
COMPLETION = {"model": "m", "prompt": ["x"], "max_tokens": 3, "logprobs": 1, "n": 2}
RECIPE = {
    "method": "quota", "regime": "w4a4kv4", "model": {"architecture": "x", "fingerprint": "sha256:" + "0" * 64, "layers": 8, "visual_tokens": 144},
    "candidates": [2, 3], "keep": [0.5, 0.3], "final_keep": 0.3, "reference_tokens": 144, "sensitivities": [0.1, 0.2], "weights": {"inter": 0.5, "quant": 0.0},
}  # fmt: skip
MANIFEST = {
    "schema_version": 1, "regime": "w4a16", "modules": ["llm"], "source_fingerprint": "sha256:0", "calibration": {"seed": 0},
    "files": {"config.json": "0" * 64}, "bytes": {"config.json": 2}, "tool_version": "0",
}  # fmt: skip
SAMPLES = {"schema": "quota-samples/1", "samples": [{"id": "a", "instruction": "x ?", "image": "a.png", "answer": "y", "task": "t"}]}
SETTINGS = (
    "checkpoint='x'\nport=1\nhost='::1'\nrecipes=['a=b']\nkv_bytes=9\nimage_decode_s=1.5\nprefix_cache=true\nmax_images=2\napi_keys=['k']\n",
    "QUOTA_SERVE_PORT=1\nQUOTA_SERVE_API_KEYS=a,b\nQUOTA_SERVE_DTYPE=float16\nQUOTA_SERVE_KV_BYTES=7\nQUOTA_SERVE_PREFIX_CACHE=no",
)
BODY_BYTES, IN_FLIGHT_BYTES, CONNECTIONS = 4 << 20, 8 << 20, 40
LIMITS = images.Limits(pixels=1_000_000)


@dataclass(frozen=True)
class Target:
    """make: an input. take: any bytes."""

    make: Callable[[random.Random], bytes]
    take: Callable[[bytes], None]


# -- inputs -----------------------------------------------------------------------------------------------------------


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
    one = rng.choice((b"1,", b"0.5,", b'"a",', b"[],", b"{},", b'{"a":1},', b'{"role":"user","content":"x"},', b"[[", b'{"a":', b" ", b"x"))
    many = one * (rng.randint(BODY_BYTES // 2, BODY_BYTES - 200) // len(one))
    head = rng.choice((b'{"model":"m","messages":[', b'{"model":"m","prompt":[', b'{"model":"m","prompt":"', b"["))
    return head + many + (b'"}' if head.endswith(b'"') else b"1]}")


def body(base: dict[str, Any]) -> Callable[[random.Random], bytes]:
    near = document(base)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return large(rng)
        picture = data_url(rng) if rng.random() < 0.3 else _url(picture_bytes(rng, (64, 64))) if rng.random() < 0.8 else b"data:,"
        return near(rng).replace(b"data:,", picture, 1)

    return make


def image(rng: random.Random) -> bytes:
    """An ordinary image or one of the hostile ones, of random size, damaged or not."""
    if rng.random() < 0.5:
        return damaged(picture_bytes(rng, (64, 64)), rng)
    kind = rng.choice([*hostile.ATTACKS, "scans"])
    if kind == "scans":
        data = hostile.many_scans(rng.randint(16, 1000), rng.randint(1, 15_000))
    else:
        data = hostile.ATTACKS[kind](10 ** rng.uniform(-4, 0))
    return damaged(data, rng) if rng.random() < 0.3 else data


def _url(data: bytes) -> bytes:
    return b"data:image/png;base64," + base64.b64encode(data)


def data_url(rng: random.Random) -> bytes:
    text = _url(damaged(picture_bytes(rng, (64, 64)), rng))
    return damaged(text, rng) if rng.random() < 0.5 else text


def stops(rng: random.Random) -> bytes:
    """Stop texts, and an answer that almost holds them: all of few letters."""
    letters = rng.choice(("x", "ab", "abc"))
    period = "".join(rng.choices(letters, k=rng.randint(1, 4)))
    texts = [(period * 1024)[: rng.randint(1, 1023)] + rng.choice(("!", "", "a")) for _ in range(rng.randint(1, 4))]
    return json.dumps([texts, (period * 20_000)[: int(20_000 * rng.random())] + rng.choice(texts)[: rng.randint(0, 1024)]]).encode()


def held_bodies(rng: random.Random) -> bytes:
    """How much each of several connections sends of its body."""
    return json.dumps([rng.randint(0, BODY_BYTES) for _ in range(rng.choice((1, CONNECTIONS // 2, CONNECTIONS)))]).encode()


def settings(rng: random.Random) -> bytes:
    """TOML, a zero byte, variables."""
    return b"\0".join(damaged(b"\n".join(line if rng.random() < 0.8 else damaged(line, rng) for line in text.encode().split(b"\n")), rng)
                      if rng.random() < 0.7 else text.encode() for text in SETTINGS)  # fmt: skip


def samples(rng: random.Random) -> bytes:
    data = document(SAMPLES)(rng)
    return data.replace(b"a.png", rng.choice((b"a.png", b"../a.png", b"/dev/zero", b"", data_url(rng))), 1)


def state(rng: random.Random) -> bytes:
    """The state of a calibration's work folder, damaged."""
    text = json.dumps({"job": {"seed": 0}, "done": rng.randint(0, 9), "blocks": {}, "notes": {}, "streams": {}})
    return damaged(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}".encode(), rng)


# -- what takes them --------------------------------------------------------------------------------------------------


def _refused(kind: type[Exception] | tuple[type[Exception], ...], function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns; None where it refuses with an error of this kind, in one line."""
    try:
        return function(*args)
    except kind as error:
        assert str(error), "an error without a message"
        str(error).encode(errors="backslashreplace")
        return None


def _in_folder(name: str, data: bytes, take: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(data)
        take(Path(folder))


def take_recipe(data: bytes) -> None:
    def take(folder: Path) -> None:
        recipe = _refused(RecipeError, Recipe.load, folder / "r.json")
        assert recipe is None or Recipe.parse(json.loads(recipe.dumps())) == recipe, "a recipe that does not survive its own text"

    _in_folder("r.json", data, take)


def take_image(data: bytes) -> None:
    _refused(ImageError, images.decode, data, LIMITS)


def take_data_url(data: bytes) -> None:
    found = _refused(ImageError, images.read_data_url, data.decode("latin-1"), LIMITS)
    if found is not None:
        take_image(found)


def take_settings(data: bytes) -> None:
    from quota.core.errors import UsageError
    from quota.server.config import settings as read

    toml, _, lines = data.partition(b"\0")
    pairs = [line.partition("=") for line in lines.decode("latin-1").splitlines()]
    environment = {name: value for name, _, value in pairs}
    _in_folder("s.toml", toml, lambda folder: _refused(UsageError, lambda: read({}, folder / "s.toml", environment).accepted_keys()))


def take_samples(data: bytes) -> None:
    from quota.calib.samples import Samples

    def take(folder: Path) -> None:
        (folder / "a.png").write_bytes(picture_bytes(random.Random(0), (24, 24)))
        _refused(SampleError, Samples.load, folder / "s.json")

    _in_folder("s.json", data, take)


def take_manifest(data: bytes) -> None:
    from quota.core.checkpoint import Manifest, verify_files

    def take(folder: Path) -> None:
        (folder / "config.json").write_bytes(b"{}")
        manifest = _refused(QuotaError, Manifest.load, folder)
        if manifest is not None:
            manifest.dumps()
            _refused(QuotaError, verify_files, folder, manifest)

    _in_folder("quota.json", data, take)


def take_config(data: bytes) -> None:
    from quota.models.config import read_config

    _in_folder("config.json", data, lambda folder: _refused(QuotaError, read_config, folder))


def take_state(data: bytes) -> None:
    """A damaged state is never continued from, and nobody else's file is removed."""
    from quota.calib.work import STATE, WorkFolder

    digest, _, text = data.partition(b"\n")
    intact = digest == hashlib.sha256(text).hexdigest().encode()

    def take(folder: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # it tells what it found
            work = _refused(QuotaError, WorkFolder, folder, {"seed": 0})
        if work is not None:
            work.close()
            assert intact or work.done == 0, "it goes on from a damaged state"
        assert (folder / STATE).exists()

    _in_folder("state.json", data, take)


def take_stops(data: bytes) -> None:
    """The text is cut where the first stop text ends, as a plain search says."""
    from quota.runtime.engine.text import StopWatch

    try:
        texts, answer = json.loads(data)
        watch = StopWatch([str(text) for text in texts if text])
    except (ValueError, TypeError):
        return
    shown = "".join(watch.push(answer[at : at + 3]) for at in range(0, len(answer), 3)) + watch.flush()
    ends = [(answer.index(stop) + len(stop), -len(stop)) for stop in watch.stops if stop in answer]
    end, length = min(ends, default=(len(answer), 0))
    assert shown == answer[: end + length], "another text is shown than a plain search says"


@cache
def _server() -> tuple[Any, Any]:
    """(service of a tiny model, its application). Its loop is `_loop`'s."""
    import torch

    from quota.models.rtn import quantize_rtn
    from quota.scenes.model import build_config, build_model, build_processor
    from quota.server.app import create_app
    from quota.server.config import Settings
    from quota.server.service import Service

    torch.set_num_threads(1)
    model = quantize_rtn(build_model(build_config(56, width=64, layers=2), seed=1).eval())
    model.processor = build_processor(56)
    service = Service(model, Settings(checkpoint="m", kv_bytes=4 << 20, max_model_tokens=64, max_body_bytes=BODY_BYTES, in_flight_bytes=IN_FLIGHT_BYTES))
    return service, create_app(service)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


class _Request:
    """One request to the application. pieces: of its body; ended: all of it is there. `waiting` is set when no more of it comes."""

    def __init__(self, path: str, pieces: Iterable[bytes], *, ended: bool = True) -> None:
        self.path, self.pieces, self.ended = path, iter(pieces), ended
        self.waiting, self.leave = asyncio.Event(), asyncio.Event()
        self.status, self.answer = 0, bytearray()

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        piece = next(self.pieces, None)
        if piece is not None:
            return {"type": "http.request", "body": piece, "more_body": True}
        if self.ended:
            self.ended = False
            return {"type": "http.request", "body": b"", "more_body": False}
        self.waiting.set()
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.answer += message.get("body", b"")

    async def run(self) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": self.path,
                 "raw_path": self.path.encode(), "root_path": "", "query_string": b"", "headers": headers, "client": None, "server": None}  # fmt: skip
        try:
            await _server()[1](scope, self.receive, self.send)
        finally:
            self.waiting.set()


def _check(request: _Request) -> None:
    assert request.status == 200 or 400 <= request.status < 500, f"status {request.status}: {bytes(request.answer[:300])!r}"
    if request.status != 200:
        assert json.loads(request.answer)["error"]["message"]
    service = _server()[0]
    assert service.bodies.total == 0 and service._preparing == 0, "something of the request is still held"


def take_http(path: str) -> Callable[[bytes], None]:
    def take(data: bytes) -> None:
        async def ask() -> None:
            request = _Request(path, (data[at : at + (64 << 10)] for at in range(0, len(data), 64 << 10)))
            await request.run()
            _check(request)

        _loop().run_until_complete(ask())

    return take


def take_held_bodies(data: bytes) -> None:
    """Connections that send so many bytes of their bodies, wait for all others to have done so, and leave."""
    try:
        sizes = [min(int(size), BODY_BYTES) for size in json.loads(data)][:CONNECTIONS]
    except (ValueError, TypeError):
        return

    async def ask() -> None:
        requests = [_Request("/v1/completions", (bytes(64 << 10) for _ in range(size >> 16)), ended=False) for size in sizes]
        running = [asyncio.ensure_future(request.run()) for request in requests]
        for request in requests:
            await request.waiting.wait()
        for request in requests:
            request.leave.set()
        await asyncio.gather(*running)
        for request in requests:
            _check(request)

    _loop().run_until_complete(ask())


@cache
def _config() -> dict[str, Any]:
    from quota.scenes.model import build_config

    return dict(json.loads(build_config(56, width=64, layers=2).to_json_string(use_diff=False)))


TARGETS: dict[str, Target] = {
    "chat": Target(body(CHAT), take_http("/v1/chat/completions")),
    "completion": Target(body(COMPLETION), take_http("/v1/completions")),
    "connections": Target(held_bodies, take_held_bodies),
    "data-url": Target(data_url, take_data_url),
    "image": Target(image, take_image),
    "stop": Target(stops, take_stops),
    "settings": Target(settings, take_settings),
    "recipe": Target(document(RECIPE), take_recipe),
    "manifest": Target(document(MANIFEST), take_manifest),
    "config": Target(document(_config), take_config),
    "samples": Target(samples, take_samples),
    "state": Target(state, take_state),
}
