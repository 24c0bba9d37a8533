"""Structured logs: one JSON object per line. A log that cannot be written is counted, never a reason to fail or to
wait."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

from quota.core.errors import UsageError

_PLAIN = set(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
_WAITING_LINES = 4096
_LINE_CHARACTERS = 16 << 10  # a traceback fits; with the line above this bounds the memory of a log that is not read
_LEAVE_S = 1.0  # how long a process that ends waits for its last lines


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, then whatever `extra` held. Prompts and answers are never logged."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        entry |= {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
        if record.exc_info:
            entry["exception"] = _cut(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= _LINE_CHARACTERS else f"{text[:_LINE_CHARACTERS]} ... ({len(text)} characters)"


class CountingHandler(logging.Handler):
    """Hands lines to a thread of its own that writes them, and counts those that a full disk, a closed pipe or one
    without a reader swallowed.

    path: a file, appended to; None is standard error. UsageError for a file that cannot be opened.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        self.path = path
        self.lost = 0
        self._told = 0  # of the lost lines, those the log itself mentions
        self._stale = self._torn = False
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        self._file = self._open()
        self.setFormatter(JsonFormatter())
        self._writer = threading.Thread(target=self._write_all, name="quota-log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Exception:  # full, or a record that cannot be written as text
            self._lose()

    def reopen(self) -> None:
        """Before its next line the log opens its file again, so that a renamed file is replaced. Safe in a signal
        handler."""
        self._stale = True

    def flush(self) -> None:
        """Wait until what was logged is written, for a second at most."""
        until = time.monotonic() + _LEAVE_S
        while self._lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._writer.join(_LEAVE_S)
        super().close()

    def _open(self) -> int:
        if self.path is None:
            return -1 if sys.stderr is None else 2  # a process that was started without one may have another file there
        try:
            # a FIFO without a reader is refused at once instead of waited for
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise UsageError(
                f"log_file: {self.path} cannot be opened ({error.strerror}); name a file this process may append to"
            ) from None
        os.set_blocking(file, True)  # the thread that waits is the writer's own
        return file

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._stale:
                self._stale = False
                self._reopen()
            if self.lost > self._told:
                record = logging.LogRecord(__name__, logging.WARNING, "", 0, "log lines were lost", (), None)
                lost = self.lost
                record.lost = lost - self._told
                if self._write(self.format(record)):
                    self._told = lost
            if not self._write(line):
                self._lose()
            self._lines.task_done()
        self._lines.task_done()

    def _reopen(self) -> None:
        try:
            fresh = self._open()
        except UsageError:
            self._lose()  # the old file goes on
            return
        if self.path is not None:
            os.close(self._file)
        self._file = fresh

    def _write(self, line: str) -> bool:
        data = memoryview(f"{chr(10) * self._torn}{line}\n".encode())
        whole = len(data)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError:
            self._torn = self._torn or len(data) < whole
            return False
        self._torn = False
        return True

    def _lose(self) -> None:
        with self.lock:  # type: ignore[union-attr]
            self.lost += 1


def configure(path: str | None) -> CountingHandler:
    """Send everything from level INFO to one handler, uvicorn's logs and Python's warnings included. UsageError for a
    file that cannot be opened."""
    handler = CountingHandler(path)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)  # otherwise the raising thread writes them to standard error
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = name != "uvicorn.access"  # the server writes its own line per request
    return handler


def lost_lines() -> int:
    """Lines that the log of this process could not write."""
    return sum(handler.lost for handler in logging.getLogger().handlers if isinstance(handler, CountingHandler))
