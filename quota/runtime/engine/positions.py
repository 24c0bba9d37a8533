"""Where the tokens of a request are: rotary positions of its tokens, and of what lies in the slots of each segment.

Positions are int64 [A, ...] (see `Family.axes`). Where nothing was dropped, slot i holds token i. Where something was,
the slots hold the tokens that were chosen; their positions are asked for again when a key's bias is added to scores, so
they are kept, and go with shared pages.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np

from quota.core.recipe import Recipe


class Positions:
    """Positions of one request. prompt [A, S]: of its prompt. dropped: tokens missing per segment. biased: whether
    positions of slots are asked for."""

    def __init__(self, prompt: np.ndarray, dropped: Sequence[int], recipe: Recipe | None, biased: bool) -> None:
        self._prompt, self._next, self._biased = prompt, int(prompt.max()) + 1, biased
        self.origin = int(prompt[0, 0])
        self._dropped = tuple(dropped)
        # renumbered where tokens are missing only: an image that lost none keeps its rows and columns
        self.compact = tuple(n > 0 and recipe is not None and recipe.position_policy == "compact" for n in dropped)
        self._slots = [prompt[:, :0] for _ in dropped]

    def of_tokens(self, begin: int, end: int) -> np.ndarray:
        """Positions int64 [A, n] of tokens [begin, end); those after the prompt count on from its largest position."""
        prompt = self._prompt.shape[1]
        if end <= prompt:
            return self._prompt[:, begin:end]
        after = np.arange(max(begin, prompt), end) - prompt + self._next
        return np.concatenate(
            [self._prompt[:, begin:], np.broadcast_to(after, (len(self._prompt), len(after)))], axis=1
        )

    def of_slots(self, segment: int, begin: int, end: int) -> np.ndarray | None:
        """Positions int64 [A, n] of filled slots [begin, end); None when no layer keeps its key bias outside the
        cache."""
        if not self._biased:
            return None
        if self.compact[segment]:
            numbers = self.origin + np.arange(begin, end)
            return np.broadcast_to(numbers, (len(self._prompt), end - begin))
        return self._slots[segment][:, begin:end] if self._dropped[segment] else self.of_tokens(begin, end)

    def copied(self, segment: int, begin: int, end: int) -> np.ndarray | None:
        """A copy of `of_slots`."""
        positions = self.of_slots(segment, begin, end)
        return None if positions is None else positions.copy()

    def put(self, segment: int, base: int, tokens: np.ndarray) -> None:
        """Slots from `base` on hold these tokens."""
        if self._biased and self._dropped[segment]:
            new = self.of_tokens(int(tokens[0]), int(tokens[-1]) + 1)[:, tokens - tokens[0]]
            self._slots[segment] = np.concatenate([self._slots[segment][:, :base], new], axis=1)

    def extend(self, segment: int, positions: np.ndarray) -> None:
        """The next slots hold shared content at these positions."""
        if self._dropped[segment]:
            self._slots[segment] = np.concatenate([self._slots[segment], positions], axis=1)

    def fork(self) -> Positions:
        """The same for a request that goes on from the same slots."""
        new = copy.copy(self)
        new._slots = list(self._slots)  # arrays are never written to
        return new

    def forget(self) -> None:
        """No slot is filled."""
        self._slots = [slots[:, :0] for slots in self._slots]
