"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from quota.core.errors import QuotaError, RecipeError, SampleError, UsageError
from quota.runtime.engine import Closed, QueueFull
from quota.server.schemas import BRANCHES

_MESSAGE_CHARACTERS = 1000  # a message may name what a client sent
_PARAM_CHARACTERS = 200
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


_MESSAGES = {
    "extra_forbidden": "this parameter is not supported",
    "model_type": "expected an object",
    "missing": "expected a value, got none",
}


class ApiError(Exception):
    """An answer other than 200. `param` names the field at fault."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        message = _cut(message, _MESSAGE_CHARACTERS)
        super().__init__(message)
        self.status, self.message, self.code, self.param = (
            status,
            message,
            code,
            param and _cut(param, _PARAM_CHARACTERS),
        )

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = (
            {"Retry-After": "1"}
            if self.status in (429, 503)
            else {"WWW-Authenticate": "Bearer"}
            if self.status == 401
            else None
        )
        return JSONResponse(self.body, self.status, headers)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]}..."


def as_api_error(error: Exception) -> ApiError:
    """What a caller may know about an exception: its own mistakes in full, ours not at all."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", code="queue_full")
    if isinstance(error, Closed):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, (UsageError, RecipeError, SampleError)):
        param, _, _ = str(error).partition(":")
        code = "context_length_exceeded" if "leave no room" in str(error) or "key/value pool" in str(error) else None
        return ApiError(400, str(error), code=code, param=param if param.isidentifier() else None)
    if isinstance(error, ValidationError):
        return _invalid_body(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), code="unknown_url" if error.status_code == 404 else None)
    if isinstance(error, QuotaError):
        return ApiError(500, "the request failed inside the server", code="internal_error")
    return ApiError(500, "the request failed inside the server", code="internal_error")


def _invalid_body(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    names = [_cut(str(part), _PARAM_CHARACTERS) for part in first["loc"] if part not in BRANCHES]
    where = ".".join(names)
    message = _MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return ApiError(
        400,
        f"{where}: {message}{more}" if where else f"{message}{more}",
        param=where or None,
        code="invalid_json" if not where else None,
    )


async def handle(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for every exception."""
    return as_api_error(error).response()
