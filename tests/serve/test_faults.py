"""What must not break the server: clients that leave, a full queue, a pool that runs out, a fault inside a step, a full
disk, signals."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from benchmarks.serve.process import served
from quota.core.errors import UsageError
from quota.core.formats import DEFAULT
from quota.server.config import settings
from quota.server.header_timeout import HeaderTimeoutProtocol
from quota.server.logs import CountingHandler
from tests.serve.asking import ask
from tests.serve.pictures import noise, user
from tests.waiting import PATIENCE_S, wait_for

QUESTION = {"model": "tiny", "messages": [user("which shape ?", noise(seed=1))], "max_tokens": 8, "temperature": 0}


def endless(model_name="tiny"):
    """A body whose answers take seconds."""
    more = {"max_tokens": 3000, "temperature": 2.0, "n": 8, "seed": 3, "ignore_eos": True}
    return {"model": model_name, "messages": [user("describe the picture .", noise(seed=9))], **more}


def running(server) -> int:
    return server.service.engine.active


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(server, stream):
    body = json.dumps({**endless(), "stream": stream}).encode()
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
            b" application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        wait_for(lambda: running(server) > 0 and server.service.engine.engine.stats.batch > 0)
    server.idle()


def test_full_queue(serving, monkeypatch):
    """One request runs, two wait, the others are refused; the engine stands still meanwhile, so that nothing ends
    before all have come."""
    server = serving(max_waiting=2, max_running=1)
    with (
        httpx.Client() as http,
        http.stream("POST", f"{server.url}/v1/chat/completions", json={**endless(), "n": 1, "stream": True}) as first,
    ):
        next(first.iter_lines())
        monkeypatch.setattr(server.service.engine.engine, "step", lambda: time.sleep(0.01) or [])
        with ThreadPoolExecutor(6) as threads:
            quick = {"model": "tiny", "messages": [{"role": "user", "content": "yes ?"}], "max_tokens": 2}
            asked = [threads.submit(httpx.post, f"{server.url}/v1/chat/completions", json=quick) for _ in range(6)]
            wait_for(lambda: sum(one.done() for one in asked) >= 4)
            monkeypatch.undo()
            first.close()
            statuses = [one.result() for one in asked]
    refused = [answer for answer in statuses if answer.status_code == 429]
    assert all(answer.status_code in (200, 429) for answer in statuses) and refused
    assert refused[0].json()["error"]["code"] == "queue_full" and refused[0].headers["retry-after"]
    server.idle()


def test_out_of_pages_is_survived(serving):
    """A pool for about two of eight requests: all end, as they end alone."""
    roomy, tight = serving(), serving(kv_bytes=50 << 10)
    questions = [user("describe the picture .", noise(seed=i)) for i in range(8)]
    options = {"max_tokens": 60, "temperature": 1.0, "seed": 4}
    want = [ask(roomy, question, **options).choices[0].message.content for question in questions]
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda question: ask(tight, question, **options).choices[0].message.content, questions))
    assert got == want
    with pytest.raises(openai.BadRequestError) as caught:
        ask(tight, questions[0], max_tokens=2000)
    assert caught.value.code == "context_length_exceeded"
    tight.idle()
    assert tight.service.engine.engine.scheduler.preemptions > 0


def test_a_fault_in_a_step_fails_one_request(serving, monkeypatch):
    server = serving()
    runner = server.service.engine.engine.runner
    run = runner.run

    def fragile(works):
        if any(work.sequence.prompt_tokens == 13 for work in works):
            raise RuntimeError("a fault inside a step")
        return run(works)

    monkeypatch.setattr(runner, "run", fragile)
    with ThreadPoolExecutor(5) as threads:
        good = [
            threads.submit(
                ask, server, user("describe the picture .", noise(seed=i)), max_tokens=30, temperature=1.0, seed=1
            )
            for i in range(4)
        ]
        bad = threads.submit(server.client.completions.create, model="tiny", prompt=list(range(5, 18)), max_tokens=3)
        assert all(one.result().choices[0].message.content for one in good)
        with pytest.raises(openai.InternalServerError) as caught:
            bad.result()
    assert "a fault" not in str(caught.value)
    server.idle()


def test_a_fault_of_the_whole_step_is_survived(serving, monkeypatch):
    server = serving()
    engine = server.service.engine.engine
    plan, left = engine.scheduler.decodes, [1]

    def broken(rows):
        if engine.scheduler.running and left:
            left.pop()
            raise RuntimeError("planning failed")
        return plan(rows)

    monkeypatch.setattr(engine.scheduler, "decodes", broken)
    with pytest.raises(openai.InternalServerError):
        ask(server, user("describe the picture ."), max_tokens=20, temperature=1.0, seed=1)
    assert ask(server, user("describe the picture .")).choices
    server.idle()


def test_a_full_disk_loses_log_lines_and_nothing_else(server):
    handler = CountingHandler("/dev/full")
    logger = logging.getLogger("quota.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        assert ask(server, user("yes ?")).choices
        wait_for(lambda: handler.lost > 0)
    finally:
        logger.removeHandler(handler)


def test_logs_are_json_without_contents(server, tmp_path):
    handler = CountingHandler(str(tmp_path / "log"))
    logger = logging.getLogger("quota.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        ask(server, user("what color is the star ?"))
        wait_for(lambda: (tmp_path / "log").stat().st_size > 0)
    finally:
        logger.removeHandler(handler)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert lines[0]["status"] == 200 and lines[0]["path"] == "/v1/chat/completions" and "star" not in json.dumps(lines)


def test_slow_bodies_are_cut_off(serving):
    server = serving(body_timeout_s=0.5)
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=PATIENCE_S) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
            b" application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        assert b" 408 " in raw.recv(4096).split(b"\r\n")[0]


def test_headers_that_do_not_come_are_not_awaited(server, monkeypatch):
    monkeypatch.setattr(
        HeaderTimeoutProtocol, "headers_s", 1.0
    )  # a client gets that far between two calls even on a busy machine
    address = httpx.URL(server.url)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent, answers in ((b"", 0), (b"GET /health HT", 0), (whole + b"GET /", 1)):
        with socket.create_connection((address.host, address.port), timeout=PATIENCE_S) as raw:
            raw.sendall(sent)
            found = b"".join(iter(lambda: raw.recv(4096), b""))  # until the server closes
        assert found.count(b"HTTP/1.1 200") == answers
    with httpx.Client() as http:  # one connection
        assert all(http.get(f"{server.url}/health").status_code == 200 for _ in range(3) if not time.sleep(0.6))


def test_settings(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('checkpoint = "a"\nport = 1\nmax_images = 3\n')
    made = settings(
        {"port": 3, "host": None}, file, {"QUOTA_SERVE_PORT": "2", "QUOTA_SERVE_API_KEYS": "x,y", "OTHER": "1"}
    )
    assert (made.checkpoint, made.port, made.max_images, made.api_keys) == ("a", 3, 3, ("x", "y"))
    keys = tmp_path / "keys"
    keys.write_text("one\n\ntwo\n")
    assert settings({"checkpoint": "a", "api_key_file": str(keys)}, None, {}).accepted_keys() == ("one", "two")
    keys.write_text("\n")
    for wrong, match in (
        (lambda: settings({"checkpoint": "a", "api_key_file": str(keys)}, None, {}).accepted_keys(), "holds no key"),
        (
            lambda: settings({"checkpoint": "a", "api_key_file": str(tmp_path / "none")}, None, {}).accepted_keys(),
            "cannot be read",
        ),
        (lambda: settings({}, None, {}), "checkpoint"),
        (lambda: settings({"checkpoint": "a"}, None, {"QUOTA_SERVE_PROT": "1"}), "QUOTA_SERVE_PROT"),
        (lambda: settings({"checkpoint": "a", "port": 70000}, None, {}), "port"),
        (lambda: settings({}, tmp_path / "none.toml", {}), "cannot be read"),
    ):
        with pytest.raises(UsageError, match=match):
            wrong()


# a server as a process


@pytest.fixture(scope="module")
def folder(model, recipe_file, tmp_path_factory):
    from quota.core.checkpoint import Manifest, save_checkpoint
    from quota.models import model_fingerprint

    path = tmp_path_factory.mktemp("served") / "tiny"
    save_checkpoint(
        model, path, Manifest(DEFAULT, ("vision", "projector", "llm"), model_fingerprint(model)), model.processor
    )
    return path


@pytest.fixture(scope="module")
def survivor(folder, recipe_file):
    """A server on the files of one that was killed under load, without room for its log; the answer before, and what
    became of the load."""
    flags = ("--recipe", f"q={recipe_file}", "--threads", "1", "--kv-bytes", "4M")
    with served(folder, *flags) as first:
        before = httpx.post(f"{first.url}/v1/chat/completions", json=QUESTION).json()["choices"]
        with ThreadPoolExecutor(4) as threads:
            load = [threads.submit(httpx.post, f"{first.url}/v1/chat/completions", json=endless()) for _ in range(4)]
            wait_for(lambda: "quota_requests_running 0.0" not in httpx.get(f"{first.url}/metrics").text)
            first.process.kill()
            errors = [one.exception(PATIENCE_S) for one in load]
    with served(folder, *flags, log="/dev/full") as again:
        yield again, before, errors


@pytest.mark.slow
def test_sigkill_leaves_nothing_behind(survivor):
    again, before, errors = survivor
    assert all(isinstance(error, httpx.TransportError) for error in errors)
    assert httpx.post(f"{again.url}/v1/chat/completions", json=QUESTION).json()["choices"] == before


@pytest.mark.slow
def test_sigterm_drains(survivor):
    """The last test of this process: a running stream ends well, new requests are refused, it leaves with status 0."""
    server, got = survivor[0], []

    def listen() -> None:
        body = {**endless(), "n": 4, "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
            got.extend(line for line in answer.iter_lines() if line)

    thread = threading.Thread(target=listen)
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/ready").status_code == 200
        thread.start()
        wait_for(lambda: len(got) > 5)
        server.process.terminate()
        wait_for(lambda: http.get("/ready").status_code == 503)
        refused = http.post("/v1/chat/completions", json=endless())
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert thread.is_alive()
    thread.join(PATIENCE_S)
    assert got[-1] == "data: [DONE]"
    assert server.process.wait(PATIENCE_S) == 0


def test_a_public_address_needs_keys(folder):
    from quota.server.run import serve

    with pytest.raises(UsageError, match="API keys"):
        serve(settings({"checkpoint": str(folder), "host": "0.0.0.0"}, None, {}))


def test_the_worker_ends_its_streams_when_it_closes(model):
    from quota.runtime.engine import AsyncEngine, Closed, Engine, Prompt, Request, SamplingParams

    async def scenario() -> list[str | None]:
        engine = AsyncEngine(Engine(model))
        stream = engine.stream(Request("a", Prompt([1, 5, 9]), SamplingParams(max_tokens=3000, ignore_eos=True)))
        first = await anext(stream)
        closing = asyncio.ensure_future(engine.close())
        reasons = [output.reason async for output in stream]
        await closing
        with pytest.raises(Closed):
            await anext(engine.stream(Request("b", Prompt([1]))))
        assert not engine.healthy and first.reason is None
        return reasons

    assert asyncio.run(scenario())[-1] == "abort"
