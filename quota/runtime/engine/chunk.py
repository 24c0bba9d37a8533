"""A part of one request's work: the scheduler makes it, the sequence fills it in, the runner moves it on."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quota.runtime.engine.selection import Attended, Choice

if TYPE_CHECKING:
    from quota.runtime.engine.sequence import Sequence

Tables = list[np.ndarray]  # per segment int32 [layers, pages]: blocks


@dataclass(eq=False)
class Chunk:
    """Tokens begin .. end of a request through layers enter .. leave, in one step.

    Filled in by the sequence: ids of the tokens, used where there is no `x`. rotary int64 [A, tokens]: positions. base,
    shared: per segment, slots before the first token, and slots that hold shared content already and are not written.
    compact: segments whose rotary positions count the tokens alive, from `origin` on. prefix: tokens of a prompt that
    see each other, 0 where all are causal. cached: per segment int64 [A, base], positions of the slots before the first
    token, where the family asks for them.

    On the way through the layers: x [rows, d], at first the input of layer `enter`; behind d the planes that are still
    to be added. rows int64 [rows]: which of the
    tokens are alive. attended: of the last layer passed, where a choice is due next. kept: layer -> tokens alive from
    there on, where some were dropped.
    """

    sequence: Sequence
    begin: int
    end: int
    enter: int
    leave: int
    ids: Many[int] = ()
    rotary: np.ndarray = field(default_factory=lambda: np.zeros((1, 0), dtype=np.int64))
    base: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    tables: Tables = field(default_factory=list)
    compact: tuple[bool, ...] = ()
    cached: tuple[np.ndarray | None, ...] = ()
    origin: int = 0
    prefix: int = 0
    choice: Choice | None = None
    x: Tensor | None = None
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    attended: Attended | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def decodes(self, layers: int) -> bool:
        """Whether this is one token through all `layers`, and nothing is chosen on its way."""
        return len(self.ids) == 1 and (self.enter, self.leave) == (0, layers) and self.x is None and self.choice is None

    def go_in(self, x: Tensor) -> None:
        """The chunk with all its rows, x [tokens, d], entering layer `enter`."""
        self.x, self.rows = x, torch.arange(len(x))

    @property
    def hidden(self) -> Tensor:
        """[rows, d]: x of a chunk that has gone in; once it is through, the output of the last layer it passed, which
        the model's last layer makes of the last row alone."""
        assert self.x is not None
        return self.x

    def drop(self, layer: int, kept: Tensor) -> None:
        """Go into `layer` with the rows of kept bool [rows] only."""
        self.x, self.rows, self.attended = self.hidden[kept], self.rows[kept], None
        self.kept[layer] = self.rows

    def recorded_at(self, layer: int) -> bool:
        """Whether the layer after this one chooses by the attention of this one."""
        return self.choice is not None and self.choice.reads_attention(layer + 1)

    def positions(self, segment: int) -> np.ndarray:
        """int64 [A, rows]: rotary positions of the rows."""
        if not self.compact[segment]:
            return self.rotary[:, self.rows.numpy()]
        first = self.origin + self.base[segment]
        return np.broadcast_to(np.arange(first, first + len(self.rows)), (len(self.rotary), len(self.rows)))

    @property
    def whole(self) -> int:
        """Its first rows that see each other."""
        return int((self.rows < self.prefix - self.begin).sum())

    def filled(self, segment: int) -> np.ndarray:
        """int64 [A, base + rows]: positions of every slot up to the last row, where the family asks for them."""
        cached = self.cached[segment]
        assert cached is not None
        return np.concatenate([cached, self.positions(segment)], axis=1)

    def slots(self, segment: int, page_size: int) -> np.ndarray:
        """int64 [layers, rows]: where the rows are stored; -1 where the content is there already."""
        first = self.base[segment]
        at = np.arange(first, first + len(self.rows))
        slot = self.tables[segment][:, at // page_size].astype(np.int64) * page_size + at % page_size
        slot[:, at < self.shared[segment]] = -1
        return slot
