"""`quota serve` in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 900  # a loaded machine takes minutes to import torch


@dataclass(frozen=True)
class Served:
    """Where it listens, and its process."""

    url: str
    process: subprocess.Popen[bytes]

    def rss_bytes(self) -> int:
        """Resident memory of the process, shared libraries included."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, as an operator would; the exit status."""
        self.process.terminate()
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def served(checkpoint: str | Path, *flags: str, environment: Mapping[str, str] | None = None, log: str | Path = os.devnull) -> Iterator[Served]:
    """Started and ready on entry, ended on exit. RuntimeError when it does not get ready; its log says why."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "quota.cli.main", "serve", str(checkpoint), "--port", str(port), "--log-file", str(log), *flags]
    with subprocess.Popen(command, env={**os.environ, **(environment or {})}) as process:
        try:
            yield _ready(Served(f"http://127.0.0.1:{port}", process))
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(server: Served) -> Served:
    until = time.monotonic() + START_S
    while time.monotonic() < until and server.process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/ready").status_code == 200:
                return server
        time.sleep(0.1)
    raise RuntimeError(f"quota serve is not ready after {START_S} s, or ended with status {server.process.poll()}")
