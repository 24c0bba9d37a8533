"""What a step is asked to do for one request, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from quota.runtime.engine.sampling import Row
from quota.runtime.engine.selection import Attended, Choice

Tables = list[np.ndarray]  # per segment int32 [layers, pages]: blocks


@dataclass(frozen=True)
class Work:
    """Consecutive tokens of one request, and the decoder layers enter .. leave they pass in this step.

    ids: the tokens, used where there is no `hidden` [rows, d] (input of layer `enter`). positions int64 [A, rows]:
    rotary positions. base, shared: per segment, slots before the first row, and slots that hold shared content already
    and are not written. attended: of layer enter - 1, where a choice is due at `enter`. compact: segments whose rotary
    positions count the tokens alive. cached: per segment int64 [A, base], positions of the slots before the first row,
    where the family asks for them.
    """

    ids: Sequence[int]
    positions: np.ndarray
    base: tuple[int, ...]
    shared: tuple[int, ...]
    tables: Tables
    enter: int
    leave: int
    hidden: Tensor | None = None
    choice: Choice | None = None
    attended: Attended | None = None
    compact: tuple[bool, ...] = ()
    cached: tuple[np.ndarray | None, ...] = ()

    def decodes(self, layers: int) -> bool:
        """Whether this is one token through all `layers`, and nothing is chosen on its way."""
        return (
            len(self.ids) == 1
            and (self.enter, self.leave) == (0, layers)
            and self.hidden is None
            and self.choice is None
        )


@dataclass(frozen=True)
class Result:
    """logits of the last row where the last layer was passed; else the rows' hidden states, and what the last layer
    attended to where a choice is due next. kept: layer -> rows alive from there on, where some were dropped."""

    logits: Row | None
    hidden: Tensor | None = None
    attended: Attended | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
