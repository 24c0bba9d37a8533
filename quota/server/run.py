"""Running the server: signals, draining, and what is printed."""

from __future__ import annotations

import asyncio
import gc
import logging
from types import FrameType

import uvicorn

from quota.core.errors import UsageError
from quota.server.app import create_app
from quota.server.config import Settings
from quota.server.logs import configure
from quota.server.protocol import PatientProtocol
from quota.server.service import Service, with_model

log = logging.getLogger("quota.server")


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT makes /ready say no and lets running requests end, up to `drain_s`; the second ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)  # type: ignore[arg-type]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self.service.draining = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain_and_leave() -> None:
            await self.service.drain()
            self.should_exit = True

        log.info("stopping: new requests are refused, running ones may end")
        self._draining = asyncio.ensure_future(drain_and_leave())


def serve(settings: Settings) -> None:
    """Serve until a signal says stop."""
    if settings.host not in ("127.0.0.1", "::1", "localhost") and not settings.accepted_keys():
        raise UsageError(f"host: {settings.host} is reachable from elsewhere; give API keys (--api-key-file), or listen on 127.0.0.1")
    configure(settings.log_file)
    if settings.replicas:
        from quota.server.replicas import serve_replicas

        serve_replicas(settings)
        return
    service = with_model(settings)
    config = uvicorn.Config(
        create_app(service), host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False,
        loop="asyncio", http=PatientProtocol,  # not whatever else is installed
        timeout_keep_alive=15, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    settle()
    log.info("serving", extra={"model": service.name, "recipes": service.recipes, "host": settings.host, "port": settings.port})
    DrainingServer(config, service).run()


def settle() -> None:
    """Take what was loaded out of the garbage collector's sight: it would look through 400 000 objects of libraries at every full collection, and again,
    for more than a second, when the process leaves."""
    gc.collect()
    gc.freeze()
