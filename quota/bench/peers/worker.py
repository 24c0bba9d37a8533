"""A peer in a process of its own, for engines that read an environment variable once or cannot share a process. JSON lines both ways.

The child is `python -m quota.bench.peers.child NAME`; it takes turns with the parent like any other contender.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from torch import Tensor

from quota.bench.peers import Peer
from quota.bench.shapes import Linear
from quota.bench.timing import Sample
from quota.core.errors import QuotaError


class ChildPeer:
    """`inner` (a peer of the same kind, asked for facts only) run elsewhere with `environment` added.

    It cannot hand its result over; the child passes the correctness gate itself.
    """

    def __init__(self, name: str, inner: Peer, environment: dict[str, str], unit: str) -> None:
        self.name, self.takes, self.unit, self.tolerance, self.inner = name, inner.takes, unit, inner.tolerance, inner
        self.environment = environment
        self.process: subprocess.Popen[str] | None = None

    def why_not(self) -> str | None:
        return self.inner.why_not()

    def prepare(self, shape: Linear, threads: int) -> None:
        self.close()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quota.bench.peers.child", self.inner.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **self.environment},
        )  # fmt: skip
        self.weight_bytes = self._ask(prepare=[shape.name, shape.k, shape.n], threads=threads)["weight_bytes"]

    def check(self, m: int) -> str | None:
        """Feed M rows and pass the gate in the child: None, or what was wrong."""
        return self._ask(feed=m)["wrong"]

    def sample(self, calls: int, cold: bool) -> Sample:
        return Sample(**self._ask(calls=calls, cold=cold))

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def feed(self, x: Tensor) -> None:
        raise NotImplementedError("a child makes its own rows: see `check`")

    def run(self) -> None:
        self.sample(1, False)

    def result(self) -> Tensor:
        raise NotImplementedError("a child's result stays with it: see `check`")

    def expected(self, rows: slice, columns: slice) -> Tensor:
        raise NotImplementedError("a child's result stays with it: see `check`")

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise QuotaError(f"its process ended with {f'signal {-status}' if status < 0 else f'status {status}'}")
        return json.loads(line)

