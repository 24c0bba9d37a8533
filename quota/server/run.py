"""Running the server: signals, draining, and what is printed."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from types import FrameType

import uvicorn

from quota.core.errors import UsageError
from quota.server.app import create_app
from quota.server.config import Settings
from quota.server.header_timeout import OPTIONS
from quota.server.logs import configure
from quota.server.service import Service, with_model

log = logging.getLogger("quota.server")


class DrainingServer(uvicorn.Server):
    """The first SIGTERM or SIGINT makes /ready say no and lets running requests end, up to `drain_s`; the second ends
    at once."""

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
    """Serve until SIGTERM or SIGINT says stop; SIGHUP opens the log file again. Whatever can be refused is refused
    before the model is loaded: UsageError."""
    if not settings.accepted_keys() and not settings.on_loopback:
        raise UsageError(
            f"host: {settings.host} is reachable from elsewhere; give API keys (--api-key-file), or listen on 127.0.0.1"
        )
    sockets = bound(settings.host, settings.port)
    handler = configure(settings.log_file)
    if settings.replicas:
        from quota.server.replicas import serve_replicas

        for taken in sockets:  # Ray's proxy takes the port itself
            taken.close()
        serve_replicas(settings, handler)
        return
    signal.signal(signal.SIGHUP, lambda number, frame: handler.reopen())
    service = with_model(settings)
    config = uvicorn.Config(create_app(service), timeout_keep_alive=15, timeout_graceful_shutdown=5, **OPTIONS)
    settle()
    port = sockets[0].getsockname()[1]
    log.info("serving", extra={"model": service.name, "recipes": service.recipes, "host": settings.host, "port": port})
    DrainingServer(config, service).run(sockets)


def bound(host: str, port: int) -> list[socket.socket]:
    """A socket for every address of the host, bound but not listening: connections are refused until the server is
    there. UsageError for a port in use and for a host that is none of this machine's."""
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            taken = socket.socket(family, kind, protocol)
            sockets.append(taken)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken.bind(
                address if port or len(sockets) == 1 else (address[0], sockets[0].getsockname()[1], *address[2:])
            )
    except OSError as error:
        for taken in sockets:
            taken.close()
        raise UsageError(
            f"port: {host}:{port} cannot be listened on ({error.strerror or error}); choose another --host or --port"
        ) from None
    return sockets


def settle() -> None:
    """Exclude what was loaded from garbage collection (gc.freeze): it would look through 400 000 objects of libraries
    at every full collection, and again, for more than a second, when the process leaves."""
    gc.collect()
    gc.freeze()
