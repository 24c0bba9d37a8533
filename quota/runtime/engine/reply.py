"""What the client sees of a request: its text as it may be shown, reports of its tokens, and when they came."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from quota.runtime.engine.detokenize import Detokenizer, StopStrings
from quota.runtime.engine.logprobs import LogprobBuffer, entry_of
from quota.runtime.engine.request import TokenLogprob
from quota.runtime.engine.sampling import Row, Sampler


@dataclass
class Times:
    """Seconds of time.monotonic: asked for, first admitted, first token, last token."""

    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Reply:
    """The answer on its way out. tokenizer: None reports ids only."""

    def __init__(self, sampler: Sampler, tokenizer: Any) -> None:
        self.sampler, self.times = sampler, Times()
        sampling = sampler.sampling
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stops = StopStrings(sampling.stop)
        self._entries = LogprobBuffer()

    @property
    def stopped(self) -> bool:
        """Whether a stop text was found."""
        return self._stops.found

    def choose(self, logits: Row, place: int) -> int:
        """The next token; place: how many were chosen before."""
        return self.sampler.choose(logits, place)

    def push(self, logits: Row, token: int, last: bool) -> tuple[str, tuple[TokenLogprob, ...]]:
        """The text and the reports that may be shown after a token chosen from these logits. last: the answer ends with
        it."""
        top = self.sampler.sampling.logprobs
        entry = None if top is None else entry_of(self._detokenizer, logits.values, token, top, last)
        text = self._text(token, last)
        return text, () if entry is None else self._entries.push(entry, text, self.stopped)

    def _text(self, token: int, last: bool) -> str:
        if self._detokenizer is None:
            return ""
        text = self._stops.push(self._detokenizer.push(token))
        return text + self._stops.push(self._detokenizer.flush()) + self._stops.flush() if last else text
