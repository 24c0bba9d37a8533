"""Servers in processes of their own, each on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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

    def family_bytes(self) -> int:
        """Resident memory of the process and the processes it started."""
        children = [
            pid for task in Path(f"/proc/{self.process.pid}/task").glob("*/children") for pid in _read(task).split()
        ]
        pages = sum(
            int((_read(Path(f"/proc/{pid}/statm")).split() or ["0", "0"])[1]) for pid in (self.process.pid, *children)
        )
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """Processor time of the process so far, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, as an operator would; the exit status."""
        self.process.terminate()
        return self.process.wait(timeout_s)


def _read(path: Path) -> str:
    """Empty where the process or thread has ended meanwhile."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


@contextlib.contextmanager
def served(
    checkpoint: str | Path,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    log: str | Path | None = os.devnull,
    stderr: int | None = None,
) -> Iterator[Served]:
    """`quota serve`, ready on entry, ended on exit. log: None is standard error. RuntimeError when it does not get
    ready; its log says why."""
    command = [
        sys.executable,
        "-m",
        "quota.cli.main",
        "serve",
        str(checkpoint),
        *(("--log-file", str(log)) if log else ()),
        *flags,
    ]
    with running(lambda port: [*command, "--port", str(port)], "/ready", environment, stderr) as server:
        yield server


@contextlib.contextmanager
def running(
    command_of: Callable[[int], list[str]],
    ready: str,
    environment: Mapping[str, str] | None = None,
    stderr: int | None = None,
) -> Iterator[Served]:
    """Any server: the command for a port, the path that answers with 200 when it serves, additions to the environment,
    where its errors go."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = command_of(port)
    with subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=stderr
    ) as process:
        try:
            server = Served(f"http://127.0.0.1:{port}", process)
            _wait(server, ready)
            yield server
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(server: Served, ready: str) -> None:
    until = time.monotonic() + START_S
    with httpx.Client(base_url=server.url, timeout=START_S) as http:
        while time.monotonic() < until and server.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if http.get(ready).status_code == 200:
                    return
            time.sleep(0.1)
    raise RuntimeError(
        f"{server.process.args!r} is not ready after {START_S} s, or ended with status {server.process.poll()}"
    )
