"""`quota serve --replicas 2` on a real local Ray: the same answers, balancing, sessions, a killed replica, a rolling
restart, draining."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from quota.core.errors import UsageError
from quota.core.formats import DEFAULT
from quota.server.config import Settings
from quota.server.logs import CountingHandler
from quota.server.metrics import merged
from quota.server.replicas import application, serve_replicas, threads_of
from tests.serve.pictures import noise, user
from tests.waiting import PATIENCE_S, wait_for

QUESTION = {
    "model": "tiny",
    "messages": [user("describe the picture .", noise(seed=1))],
    "max_tokens": 12,
    "temperature": 1.0,
    "seed": 4,
}
START_S = 600  # on a loaded machine
CHAT = "/v1/chat/completions"


def test_metrics_of_replicas_are_one_exposition():
    one = b'# HELP x Text\n# TYPE x counter\nx_total{path="a"} 1.0\n'
    text = merged({"b": one, "a": one.replace(b"1.0", b"2.0")}).decode()
    assert text.count("# TYPE x_total counter") == 1
    assert 'x_total{path="a",replica="a"} 2.0' in text and 'x_total{path="a",replica="b"} 1.0' in text


def test_threads_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (
        threads_of(Settings(checkpoint="x", replicas=3)) == 2 and threads_of(Settings(checkpoint="x", replicas=20)) == 1
    )
    assert threads_of(Settings(checkpoint="x", replicas=3, threads=5)) == 5


def test_an_application_on_a_cluster_needs_keys():
    with pytest.raises(UsageError, match="API keys"):
        application({"checkpoint": "x"})


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[serve,ray\]'"):
        serve_replicas(Settings(checkpoint="x", replicas=2), CountingHandler())


class Replicas:
    """`quota serve --replicas 2` in a process of its own."""

    def __init__(self, folder: Path, recipe_file: str, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log, self.output = log, log.with_suffix(".out").open("wb")
        command = [
            sys.executable,
            "-m",
            "quota.cli.main",
            "serve",
            str(folder),
            "--recipe",
            f"q={recipe_file}",
            "--port",
            self.url.rpartition(":")[2],
        ]
        command += [
            "--threads",
            "1",
            "--kv-bytes",
            "4M",
            "--replicas",
            "2",
            "--session-affinity",
            "--log-file",
            str(log),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        # a loaded machine takes its time, and Ray would start again and again
        environment |= {
            name: str(START_S) for name in ("RAY_raylet_start_wait_time_s", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S")
        }
        environment |= {
            "RAY_agent_register_timeout_ms": str(1000 * START_S),
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
        }
        self.process = subprocess.Popen(command, env=environment, stdout=self.output, stderr=self.output)

    def started(self) -> list[dict[str, Any]]:
        """Log entries of replicas that began, oldest first."""
        if not self.log.exists():
            return []
        entries = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [entry for entry in entries if entry["message"] == "serving" and "generation" in entry]

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.with_suffix(".out").read_text()[-2000:]
        if len(self.started()) < 2:  # until then the port may be anybody's
            return False
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready").status_code == 200
        return False

    def ask(self, session: str | None = None, **changes: Any) -> httpx.Response:
        headers = {"x-session-id": session} if session else {}
        return httpx.post(f"{self.url}{CHAT}", json={**QUESTION, **changes}, headers=headers)

    def reporting(self) -> int:
        """Replicas whose samples /metrics has."""
        with contextlib.suppress(httpx.TransportError):
            return len(
                set(
                    re.findall(
                        r'^quota_kv_blocks{replica="(\w+)"}', httpx.get(f"{self.url}/metrics").text, re.MULTILINE
                    )
                )
            )
        return 0

    def answered(self) -> Counter[str]:
        """Chats answered with 200, by replica."""
        text = httpx.get(f"{self.url}/metrics").text
        found = re.findall(
            rf'^quota_http_requests_total{{path="{CHAT}",replica="(\w+)",status="200"}} (\S+)$', text, re.MULTILINE
        )
        return Counter({replica: int(float(count)) for replica, count in found})

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE_S)
            self.process.kill()
        self.output.close()


@pytest.fixture(scope="module")
def replicas(model, recipe_file, tmp_path_factory):
    pytest.importorskip("ray.serve", reason="needs Ray Serve: make ray")
    from quota.core.checkpoint import Manifest, save_checkpoint
    from quota.models import model_fingerprint

    folder = tmp_path_factory.mktemp("replicas")
    save_checkpoint(
        model,
        folder / "tiny",
        Manifest(DEFAULT, ("vision", "projector", "llm"), model_fingerprint(model)),
        model.processor,
    )
    made = Replicas(folder / "tiny", recipe_file, folder / "log")
    try:
        wait_for(
            lambda: made.ready() and made.reporting() == 2, START_S
        )  # the proxy may know one replica before the other
        yield made
    finally:
        made.stop()


@pytest.mark.ray
@pytest.mark.slow
def test_answers_are_the_same_on_every_replica(replicas, server):
    want = httpx.post(f"{server.url}{CHAT}", json=QUESTION).json()["choices"]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: replicas.ask(), range(16)))
    assert all(answer.json()["choices"] == want for answer in answers)
    counts = replicas.answered()
    assert len(counts) == 2 and sum(counts.values()) == 16 and min(counts.values()) >= 1
    refused = replicas.ask(temperature=9)
    assert (
        refused.status_code == 400
        and refused.json()["error"]["param"] == "temperature"
        and refused.headers["x-request-id"]
    )


@pytest.mark.ray
@pytest.mark.slow
def test_streams_come_in_pieces(replicas, server):
    want = httpx.post(f"{server.url}{CHAT}", json=QUESTION).json()["choices"][0]["message"]["content"]
    with httpx.stream("POST", f"{replicas.url}{CHAT}", json={**QUESTION, "stream": True}) as response:
        events = [line for line in response.iter_lines() if line]
    pieces = [json.loads(event[6:])["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert events[-1] == "data: [DONE]" and "".join(pieces) == want and len([piece for piece in pieces if piece]) > 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_session_stays_on_its_replica(replicas):
    long = [user("describe the picture . " * 16, noise(seed=1))]  # full pages in every segment
    for session in ("one", "two", "three"):
        before = replicas.answered()
        answers = [replicas.ask(session, max_tokens=2, messages=long).json() for _ in range(4)]
        assert sorted((replicas.answered() - before).values()) == [4]
        assert answers[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_a_client_that_leaves_frees_its_pages(replicas):
    with httpx.stream(
        "POST", f"{replicas.url}{CHAT}", json={**QUESTION, "stream": True, "max_tokens": 3000, "ignore_eos": True}
    ) as response:
        next(response.iter_lines())

    def idle() -> bool:
        text = httpx.get(f"{replicas.url}/metrics").text
        values = {
            name: re.findall(rf"^quota_{name}{{\S+}} (\S+)$", text, re.MULTILINE)
            for name in ("requests_running", "kv_blocks", "kv_blocks_available")
        }
        return values["requests_running"] == ["0.0", "0.0"] and sorted(values["kv_blocks"]) == sorted(
            values["kv_blocks_available"]
        )

    wait_for(idle)


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_replica_is_replaced(replicas):
    want = replicas.ask().json()["choices"]
    known = replicas.started()
    os.kill(known[-1]["pid"], signal.SIGKILL)
    wait_for(lambda: len(replicas.started()) > len(known), START_S)
    wait_for(lambda: replicas.reporting() == 2, START_S)
    assert all(replicas.ask().json()["choices"] == want for _ in range(6))


@pytest.mark.ray
@pytest.mark.slow
def test_a_rolling_restart_refuses_nobody(replicas):
    """New processes serve, and no request of those that came meanwhile failed."""
    statuses: list[int] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                statuses.append(replicas.ask(max_tokens=3).status_code)
            except httpx.TransportError:
                statuses.append(0)

    before = len(replicas.started())
    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        replicas.process.send_signal(signal.SIGHUP)
        wait_for(lambda: [entry["generation"] for entry in replicas.started()[before:]] == [1, 1], START_S)
        old = {entry["pid"] for entry in replicas.started()[:before]}
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), START_S)
    finally:
        done.set()
        asking.join(120)
    assert len(statuses) > 3 and set(statuses) == {200}


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_drains_all(replicas):
    """The last test of this file: a stream that runs ends well, then everything leaves with status 0."""
    got: list[str] = []

    def listen() -> None:
        body = {**QUESTION, "stream": True, "max_tokens": 300, "ignore_eos": True}
        with httpx.stream("POST", f"{replicas.url}{CHAT}", json=body) as response:
            got.extend(line for line in response.iter_lines() if line)

    listening = threading.Thread(target=listen)
    listening.start()
    wait_for(lambda: len(got) > 5)
    replicas.process.terminate()
    listening.join(120)
    assert got[-1] == "data: [DONE]"
    assert replicas.process.wait(PATIENCE_S) == 0
    assert not any(Path(f"/proc/{entry['pid']}").exists() for entry in replicas.started())
