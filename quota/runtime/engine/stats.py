"""Counters of an engine, cheap enough to keep on every step. The server turns them into metrics."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quota.runtime.engine.chunk import Chunk
    from quota.runtime.engine.reply import Times


@dataclass
class Stats:
    """Totals since the start; `first_token_s` and `between_tokens_s` are durations since the metrics endpoint last
    drained them (newest 10 000)."""

    segments: list[str]
    accepted: int = 0
    failed: int = 0
    steps: int = 0
    prefill_rows: int = 0
    decode_rows: int = 0
    tokens: int = 0
    batch: int = 0
    step_s: float = 0.0
    finished: Counter[str] = field(default_factory=Counter)
    first_token_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    between_tokens_s: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))

    def observe_step(self, chunks: Many[Chunk], seconds: float) -> None:
        self.steps += 1
        self.batch = len(chunks)
        self.step_s += seconds
        for chunk in chunks:
            if chunk.end - chunk.begin == 1:
                self.decode_rows += 1
            else:
                self.prefill_rows += chunk.end - chunk.begin

    def observe_token(self, times: Times) -> None:
        now = time.monotonic()
        self.tokens += 1
        if times.first_token is None:
            times.first_token = now
            self.first_token_s.append(now - times.arrived)
        elif times.last_token is not None:
            self.between_tokens_s.append(now - times.last_token)
        times.last_token = now
