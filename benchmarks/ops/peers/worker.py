"""A peer in a process of its own, for engines that read an environment variable once or cannot share a process. JSON
lines both ways.

The child is `python -m benchmarks.ops.peers.child NAME`; it takes turns with the parent like any other contender.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.ops.peers import Layer
from benchmarks.shapes import Linear
from benchmarks.timing import Sample
from quota.core.errors import QuotaError


class ChildPeer:
    """`layer` (asked for facts only here) run elsewhere with `environment` added; the child passes the correctness gate
    itself."""

    def __init__(self, name: str, layer: Layer, environment: dict[str, str], unit: str) -> None:
        self.name, self.takes, self.unit, self.layer, self.environment = name, layer.takes, unit, layer, environment
        self.weight_bytes = 0
        self.process: subprocess.Popen[str] | None = None

    def why_not(self) -> str | None:
        return self.layer.why_not()

    def prepare(self, shape: Linear, threads: int) -> None:
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ops.peers.child", self.layer.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
        )
        self.weight_bytes = self._ask(prepare=[shape.name, shape.k, shape.n], threads=threads)["weight_bytes"]

    def check(self, m: int) -> str | None:
        return self._ask(feed=m)["wrong"]

    def sample(self, calls: int, cold: bool) -> Sample:
        return Sample(**self._ask(calls=calls, cold=cold))

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise QuotaError(f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}")
        return json.loads(line)
