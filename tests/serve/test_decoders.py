"""Attacks by image at a tenth of their size: the process that decodes is ended, and others are answered while the
attack runs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.serve import hostile_images as hostile
from quota.core import image_files, images
from quota.server import images as server_images
from quota.server.config import Settings
from quota.server.errors import ApiError
from quota.server.images import Decoders, Worker
from tests.serve.asking import ask
from tests.serve.pictures import data_url, encoded, noise, user
from tests.waiting import wait_for

SETTINGS = Settings(checkpoint="x")
GOOD = data_url(noise())


@pytest.fixture
def unchecked(tmp_path, monkeypatch):
    """Decoding processes in which JPEGs are decoded whatever their scans: what an attack nobody thought of looks
    like."""
    (tmp_path / "sitecustomize.py").write_text("import quota.core.image_files as files\nfiles.MAX_SCANS = 10**9\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def endless(side: int = 1900) -> bytes:
    """Minutes of decoding."""
    return hostile.many_scans(side, 15_000)


def decoding(test, settings: Settings = SETTINGS, **options) -> list[str]:
    """Run `test(decoders)`; why processes were replaced."""
    lost: list[str] = []

    async def scenario() -> None:
        decoders = Decoders(settings.model_copy(update=options), lost.append)
        try:
            await test(decoders)
        finally:
            decoders.close()

    asyncio.run(scenario())
    return lost


async def size_of(decoders: Decoders, url: str) -> tuple[int, int]:
    async with decoders.opened([url], "") as (found, _):
        return found[0].size


def test_others_go_on_while_one_image_is_slow_and_it_is_ended(unchecked):
    async def attack(decoders: Decoders) -> None:
        attacks = [
            asyncio.ensure_future(size_of(decoders, data_url(endless(), "JPEG"))) for _ in range(2)
        ]  # as many as there are processes
        await asyncio.sleep(0)
        done = 0
        while not attacks[-1].done():
            assert await size_of(decoders, GOOD) == (80, 60)
            done += not any(attack.done() for attack in attacks)
        assert done > 3  # answered before the first attack was over
        for outcome in await asyncio.gather(*attacks, return_exceptions=True):
            assert isinstance(outcome, ApiError) and outcome.status == 400 and "processor time" in str(outcome)

    lost = decoding(attack, image_decode_s=1.0)
    assert lost == ["time"] * 4  # each in the queue for all, then in the one for large images


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux counts a process's memory")
def test_memory_is_limited_by_the_kernel(tmp_path, monkeypatch):
    """The estimate is a first line; where it is wrong, the decoder fails, not the machine."""
    (tmp_path / "sitecustomize.py").write_text("import quota.core.image_files as files\nfiles._OUT_BYTES = 0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    async def attack(decoders: Decoders) -> None:
        with pytest.raises(ApiError, match="too much memory") as caught:
            await size_of(decoders, data_url(hostile.png((6300, 6300))))  # 160 MB as RGB
        assert caught.value.status == 400
        assert await size_of(decoders, GOOD) == (80, 60)

    assert decoding(attack, image_decode_bytes=1 << 20, max_image_bytes=1 << 20) == []


def test_a_client_that_leaves_ends_the_work_on_its_image(unchecked):
    async def attack(decoders: Decoders) -> None:
        before = decoders.processes
        attack = asyncio.ensure_future(size_of(decoders, data_url(endless(), "JPEG")))
        while not decoders._busy:
            await asyncio.sleep(0.01)
        attack.cancel()
        await asyncio.gather(attack, return_exceptions=True)
        assert len(set(decoders.processes) - set(before)) == 1
        assert await size_of(decoders, GOOD) == (80, 60)

    assert decoding(attack) == ["left"]


def test_a_process_that_dies_costs_one_request():
    async def attack(decoders: Decoders) -> None:
        for process in decoders.processes:
            os.kill(process, signal.SIGKILL)
        for _ in range(3):
            assert await size_of(decoders, GOOD) == (80, 60)

    assert set(decoding(attack)) == {"died"}


def test_a_process_that_cannot_be_replaced_now_is_replaced_later(monkeypatch):
    """The machine had no process to give: the request is refused, the place in the pool stays."""

    async def attack(decoders: Decoders) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(server_images, "Worker", refuses)
            for process in decoders.processes:
                os.kill(process, signal.SIGKILL)
            for _ in range(3):
                with pytest.raises(ApiError, match="ended its decoder"):
                    await size_of(decoders, GOOD)
        for _ in range(3):
            assert await size_of(decoders, GOOD) == (80, 60)
        assert len(decoders.processes) == SETTINGS.image_workers

    def refuses(settings: Settings) -> Worker:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    assert set(decoding(attack)) == {"died"}


def test_closing_ends_every_process_at_once(unchecked):
    async def attack(decoders: Decoders) -> None:
        busy = asyncio.ensure_future(size_of(decoders, data_url(endless(), "JPEG")))
        while not decoders._busy:
            await asyncio.sleep(0.01)
        workers = [*decoders._idle, *decoders._busy]
        decoders.close()
        for worker in workers:
            assert worker.process.wait(10) == -signal.SIGKILL
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)

    decoding(attack, image_decode_s=60.0)


def test_large_images_never_take_the_last_process():
    large = data_url(encoded(noise(2400, 2000), "JPEG"), "JPEG")

    async def load(decoders: Decoders) -> None:
        async with decoders.opened([large], "") as (found, is_large):
            assert is_large and found[0].size == (2400, 2000)
            waiting = asyncio.ensure_future(size_of(decoders, large))
            assert await size_of(decoders, GOOD) == (80, 60)
            assert not waiting.done()
        assert await waiting == (2400, 2000)

    assert decoding(load) == []


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_to_the_whole_group_leave_the_decision_to_the_server(signal_number):
    async def load(decoders: Decoders) -> None:
        assert await size_of(decoders, GOOD) == (80, 60)  # both have started by the second one
        assert await size_of(decoders, GOOD) == (80, 60)
        os.kill(decoders._idle[-1].process.pid, signal_number)
        assert await size_of(decoders, GOOD) == (80, 60)

    assert decoding(load) == []


def test_a_process_ends_with_its_server():
    worker = Worker(SETTINGS)
    worker.process.stdin.close()
    assert worker.process.wait(30) == 0


def test_a_process_imports_little_and_knows_no_keys(monkeypatch):
    monkeypatch.setenv("QUOTA_SERVE_API_KEYS", "secret")
    worker = Worker(SETTINGS)
    assert worker.ask(encoded(noise()), 10**6, 10**6, 5.0).size == (80, 60)
    assert b"secret" not in Path(f"/proc/{worker.process.pid}/environ").read_bytes()
    maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert "libtorch" not in maps and "pydantic" not in maps and "numpy" not in maps
    worker.end()


def test_over_http(serving, unchecked):
    """One attack that leaves, one that waits for its refusal; a question in between, and both in the metrics."""
    server = serving(image_decode_s=2.0)
    question = {"model": "tiny", "messages": [user("which shape ?", data_url(endless(), "JPEG"))], "max_tokens": 2}
    body, address = json.dumps(question).encode(), httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as raw:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.host}\r\nContent-Type:"
            f" application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        raw.sendall(head.encode() + body)
        wait_for(lambda: server.service.decoders._busy)
        assert ask(server, user("which shape ?", noise(seed=1))).choices
    wait_for(lambda: not server.service.decoders._busy)
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=question, timeout=60)
    assert (
        answer.status_code == 400
        and answer.json()["error"]["code"] == "invalid_image"
        and "processor time" in answer.json()["error"]["message"]
    )
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'quota_image_workers_replaced_total{reason="time"}' in metrics
    server.idle()


def test_the_server_uses_the_door(server):
    """Orientation, transparency and wide numbers as everywhere; attacks are refused with the door's sentence."""
    for data in (hostile.huge_tile(7000), hostile.many_scans(600, 100), hostile.large_gif_frame(7000)):
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "tiny", "messages": [user("x", data_url(data))]},
            timeout=60,
        )
        with pytest.raises(images.ImageError) as caught:
            images.decode(data, name="image_url")
        assert answer.status_code == 400 and answer.json()["error"]["message"] == str(caught.value)
    assert image_files.MAX_SCANS == 64 and server_images.LARGE_PIXELS == 4_000_000
