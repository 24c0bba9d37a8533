"""What `fuzz.py` feeds with what. A target makes an input (bytes) from a random generator, and takes any bytes: returns
when the code under test accepts or refuses them as it should, and raises anything else."""

from __future__ import annotations

import asyncio
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

from benchmarks.serve import fuzz_inputs as inputs
from benchmarks.serve.traffic import image_bytes
from quota.core import images
from quota.core.errors import ImageError, QuotaError, RecipeError, SampleError
from quota.core.recipe import Recipe
from quota.core.recipe_upgrade import upgrade

LIMITS = images.Limits(pixels=1_000_000)


@dataclass(frozen=True)
class Target:
    """make: an input. take: any bytes."""

    make: Callable[[random.Random], bytes]
    take: Callable[[bytes], None]


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
        _refused(RecipeError, upgrade, folder / "r.json")
        recipe = _refused(RecipeError, Recipe.load, folder / "r.json")
        assert recipe is None or Recipe.parse(json.loads(recipe.dumps())) == recipe, (
            "a recipe that does not survive its own text"
        )

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
    _in_folder(
        "s.toml",
        toml,
        lambda folder: _refused(UsageError, lambda: read({}, folder / "s.toml", environment).accepted_keys()),
    )


def take_samples(data: bytes) -> None:
    from quota.calib.samples import Samples

    def take(folder: Path) -> None:
        (folder / "a.png").write_bytes(image_bytes(random.Random(0), (24, 24)))
        _refused(SampleError, Samples.load, folder / "s.json")

    _in_folder("s.json", data, take)


def take_manifest(data: bytes) -> None:
    from quota.core.checkpoint import Manifest
    from quota.core.checkpoint_files import verify_files

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
    from quota.runtime.engine.detokenize import StopStrings

    try:
        texts, answer = json.loads(data)
        watch = StopStrings([str(text) for text in texts if text])
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

    from quota.models import model_fingerprint
    from quota.models.rtn import quantize_rtn
    from quota.scenes.model import build_config, build_model, build_processor
    from quota.server.app import create_app
    from quota.server.config import Settings
    from quota.server.service import Service

    torch.set_num_threads(1)
    model = quantize_rtn(build_model(build_config(56, width=64, layers=2), seed=1).eval())
    model.processor = build_processor(56)
    facts = {
        "architecture": type(model).__name__,
        "fingerprint": model_fingerprint(model),
        "layers": 2,
        "visual_tokens": 16,
    }
    recipe = Recipe.parse(
        {
            "method": "quota",
            "regime": "w4a4kv4",
            "model": facts,
            "candidates": [1],
            "keep": [0.5],
            "final_keep": 0.5,
            "reference_tokens": 16,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe.save(path := Path(folder, "r.json"))
        service = Service(
            model,
            Settings(
                checkpoint="m",
                recipes=(f"r={path}",),
                kv_bytes=4 << 20,
                max_model_tokens=64,
                max_body_bytes=inputs.BODY_BYTES,
                in_flight_bytes=inputs.IN_FLIGHT_BYTES,
            ),
        )
    return service, create_app(service)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


class _Request:
    """One request to the application. pieces: of its body; ended: all of it is there. `waiting` is set when no more of
    it comes."""

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
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": None,
            "server": None,
        }
        try:
            await _server()[1](scope, self.receive, self.send)
        finally:
            self.waiting.set()


def _check(request: _Request) -> None:
    assert request.status == 200 or 400 <= request.status < 500, (
        f"status {request.status}: {bytes(request.answer[:300])!r}"
    )
    if request.status != 200:
        assert json.loads(request.answer)["error"]["message"]
    service = _server()[0]
    assert service.bodies.total == 0 and service._preparing.total == 0, "something of the request is still held"


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
        sizes = [min(int(size), inputs.BODY_BYTES) for size in json.loads(data)][: inputs.CONNECTIONS]
    except (ValueError, TypeError):
        return

    async def ask() -> None:
        requests = [
            _Request("/v1/completions", (bytes(64 << 10) for _ in range(size >> 16)), ended=False) for size in sizes
        ]
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
    "chat": Target(inputs.body(inputs.CHAT), take_http("/v1/chat/completions")),
    "completion": Target(inputs.body(inputs.COMPLETION), take_http("/v1/completions")),
    "prompt": Target(inputs.prompt, take_http("/v1/chat/completions")),
    "connections": Target(inputs.held_bodies, take_held_bodies),
    "data-url": Target(inputs.data_url, take_data_url),
    "image": Target(inputs.image, take_image),
    "stop": Target(inputs.stops, take_stops),
    "settings": Target(inputs.settings, take_settings),
    "recipe": Target(inputs.document(inputs.RECIPE), take_recipe),
    "manifest": Target(inputs.document(inputs.MANIFEST), take_manifest),
    "config": Target(inputs.document(_config), take_config),
    "samples": Target(inputs.samples, take_samples),
    "state": Target(inputs.state, take_state),
}
