"""A tiny quantized model with the embedded benchmark's processor behind a real server on the loopback interface."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from quota.server.app import create_app
from quota.server.config import Settings
from quota.server.header_timeout import OPTIONS
from quota.server.service import Service
from tests.one_thread import one_thread
from tests.prune.recipes import recipe_for
from tests.speaking import served
from tests.waiting import PATIENCE_S, wait_for

__all__ = ["one_thread"]

# httpx gives up after 5 s where a call names no time; one object is the default of all its functions
_DEFAULT: httpx.Timeout = inspect.signature(httpx.request).parameters["timeout"].default
_DEFAULT.connect = _DEFAULT.read = _DEFAULT.write = _DEFAULT.pool = PATIENCE_S


@pytest.fixture(scope="session")
def model() -> Any:
    return served("llava")


@pytest.fixture(scope="session")
def recipe_file(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipes") / "quota.json"
    recipe_for(model).save(path)
    return str(path)


@dataclass
class Running:
    """A served model: its address, the service behind it and an official client."""

    url: str
    service: Service
    client: openai.OpenAI

    def idle(self) -> None:
        """Wait until nothing runs; then the pool must be whole."""
        engine = self.service.engine.engine
        wait_for(lambda: not (self.service.engine.active or engine.busy))
        engine.check_integrity()
        assert engine.pool.available == engine.pool.blocks


class Host:
    """uvicorn on a thread."""

    def __init__(self, service: Service) -> None:
        # an idle connection outlives every test, so that what closes one is a limit of ours
        self.server = uvicorn.Server(
            uvicorn.Config(create_app(service), host="127.0.0.1", port=0, timeout_keep_alive=600, **OPTIONS)
        )
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.running = Running(
            f"http://127.0.0.1:{port}",
            service,
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0),
        )

    def stop(self) -> None:
        self.running.client.close()
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture(scope="session")
def serving(model: Any, recipe_file: str) -> Iterator[Any]:
    """settings -> Running; all are stopped at the end."""
    hosts: list[Host] = []

    def start(**options: Any) -> Running:
        defaults = {"checkpoint": "tiny", "recipes": (f"pruned={recipe_file}",), "kv_bytes": 4 << 20, "page_tokens": 4}
        host = Host(Service(model, Settings(**{**defaults, **options})))
        hosts.append(host)
        return host.running

    yield start
    for host in hosts:
        host.stop()


@pytest.fixture(scope="session")
def server(serving: Any) -> Running:
    return serving()
