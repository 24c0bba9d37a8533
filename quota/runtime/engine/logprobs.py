"""Log-probabilities of an answer's tokens, released with the text they belong to."""

from __future__ import annotations

import dataclasses

import numpy as np

from quota.runtime.engine.detokenize import Detokenizer
from quota.runtime.engine.request import TokenLogprob
from quota.runtime.engine.sampling import logprobs


def entry_of(detokenizer: Detokenizer | None, logits: np.ndarray, token: int, top: int, last: bool) -> TokenLogprob:
    """The entry of a token that was chosen from `logits` (float [N]) and is about to be pushed. last: the answer ends
    with it."""
    own, best = logprobs(logits, token, top)
    if detokenizer is None:
        return TokenLogprob(token, "", None, own, tuple(TokenLogprob(other, "", None, value) for other, value in best))
    text = detokenizer.peek(token, last)
    named = ((other, text if other == token else detokenizer.name(other), value) for other, value in best)
    alternatives = tuple(TokenLogprob(other, name, detokenizer.utf8(other), value) for other, name, value in named)
    return TokenLogprob(token, text, detokenizer.utf8(token), own, alternatives)


class LogprobBuffer:
    """Entries on their way out. One is given when all its text was shown; at a stop text they are cut as the answer
    is."""

    def __init__(self) -> None:
        self._held: list[TokenLogprob] = []
        self._shown = 0  # characters that were shown and are none of a given entry

    def push(self, entry: TokenLogprob, shown: str, stopped: bool) -> tuple[TokenLogprob, ...]:
        """The entries that can be given now. shown: the text that was shown with this token; stopped: a stop text was
        found."""
        self._held.append(entry)
        self._shown += len(shown)
        given = []
        while self._held and len(self._held[0].text) <= self._shown:
            given.append(self._held.pop(0))
            self._shown -= len(given[-1].text)
        if stopped and self._shown:
            text = self._held[0].text[: self._shown]
            given.append(dataclasses.replace(self._held[0], text=text, utf8=text.encode()))
        return tuple(given)
