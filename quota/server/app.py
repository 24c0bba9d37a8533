"""The application: routes, and what happens around every request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from quota.core.errors import QuotaError
from quota.server.demo_page import add_demo
from quota.server.errors import ApiError, handle
from quota.server.middleware import RequestMiddleware
from quota.server.responses import Answer
from quota.server.schemas import ChatRequest, CompletionRequest
from quota.server.service import EngineRequest, Service

_Body = TypeVar("_Body", bound=BaseModel)
_Result = TypeVar("_Result")


def create_app(service: Service, scrape: Callable[[], Awaitable[bytes]] | None = None) -> FastAPI:
    """Routes over one engine; UsageError for keys that cannot be read. Nothing about the interpreter or the schema is
    served: no docs pages.

    scrape: what /metrics answers instead of this engine's metrics, where there are several engines.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="quota", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.service = service
    for kind in (ApiError, QuotaError, HTTPException):
        app.add_exception_handler(kind, handle)  # type: ignore[arg-type]
    app.add_middleware(RequestMiddleware, service=service, keys=service.settings.accepted_keys())
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    _add_probes(app, service, scrape)
    _add_completions(app, service)
    add_demo(app)
    return app


def _add_probes(app: FastAPI, service: Service, scrape: Callable[[], Awaitable[bytes]] | None) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.engine.healthy
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        good = service.engine.healthy and not service.draining
        return JSONResponse(
            {"status": "ready" if good else "draining" if service.draining else "stopped"}, 200 if good else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await scrape() if scrape is not None else service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card()


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(request, service, await _prepared(request, service, ChatRequest, service.chat))

    @app.post("/v1/quota/preview")
    async def preview(request: Request) -> JSONResponse:
        return JSONResponse(await _prepared(request, service, ChatRequest, service.preview))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(request, service, await _prepared(request, service, CompletionRequest, service.complete))


async def _prepared(
    request: Request,
    service: Service,
    kind: type[_Body],
    prepare: Callable[[_Body, str], Coroutine[Any, Any, _Result]],
) -> _Result:
    """What the engine is to do. Nothing of the body outlives this."""
    client = request.state.client
    service.check_open(client)
    with service.bodies.held() as held:
        return await _unless_gone(request, prepare(await service.bodies.parsed(request, kind, held, client), client))


async def _answer(request: Request, service: Service, spoken: EngineRequest) -> Response:
    answer = Answer(
        spoken.id, service.name, chat=spoken.chat, logprobs=spoken.logprobs, fingerprint=service.fingerprint
    )
    if spoken.stream:
        events = service.events(spoken, answer)
        opening = await anext(events)  # refusals and a full queue still get their own status
        return _EventStream(opening, events)
    return Response(await _unless_gone(request, service.whole(spoken, answer)), media_type="application/json")


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What `work` returns; it is cancelled the moment the client is gone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client went away", code="client_closed_request")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """Server-sent events whose generator is closed, and its requests aborted, the moment the client is gone."""

    def __init__(self, opening: str, events: AsyncGenerator[str]) -> None:
        self._events = events
        self._body = self._read(opening)
        super().__init__(
            self._body, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def _read(self, opening: str) -> AsyncGenerator[str]:
        yield opening
        async for event in self._events:
            yield event

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with aclosing(self._events), aclosing(self._body):
                await super().__call__(scope, receive, send)
        except OSError:
            pass  # the client went away in the middle
