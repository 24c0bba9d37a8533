"""Structured logs: one JSON object per line. A log that cannot be written is counted, never a reason to fail."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_PLAIN = set(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, then whatever `extra` held. Prompts and answers are never logged."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"), "level": record.levelname.lower(),
            "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        entry |= {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


class CountingHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines and counts those a full disk or a closed pipe swallowed."""

    def __init__(self, path: str | None = None) -> None:
        # unbuffered: a line that cannot be written is noticed, and nothing is left half-written in a buffer
        super().__init__(sys.stderr if path is None else open(path, "a", encoding="utf-8", buffering=1))  # noqa: SIM115, PTH123
        self.lost = 0
        self.setFormatter(JsonFormatter())

    def handleError(self, record: logging.LogRecord) -> None:
        self.lost += 1


def configure(path: str | None) -> CountingHandler:
    """Send everything from level INFO to one handler, uvicorn's logs included. OSError for a file that cannot be opened."""
    handler = CountingHandler(path)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = name != "uvicorn.access"  # the server writes its own line per request
    return handler
