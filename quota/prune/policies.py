"""The policies: one function of every row of `quota.core.selectors.POLICIES`, and of its name.

Each takes one set of competing visual tokens per row (`Sets`) and returns those that stay. All are deterministic, ties
go to the lower index, and a row does not depend on the others. Most look at one row at a time: `by_row` makes such a
function a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from quota import ops
from quota.prune import greedy
from quota.prune.alive import Alive

if TYPE_CHECKING:
    from quota.core.selection import Selection


@dataclass(frozen=True)
class Sets:
    """One set of visual tokens per row, `own` bool [B, n]; of it keep[b] stay, int64 [B], or all where there are
    fewer. score float32 [B, n]."""

    alive: Alive
    selection: Selection
    score: Tensor
    own: Tensor
    keep: Tensor


@dataclass(frozen=True)
class Row:
    """A set of one row: V tokens in `columns` of the row, of which `keep` < V stay."""

    sets: Sets
    number: int
    columns: Tensor
    keep: int

    @property
    def selection(self) -> Selection:
        return self.sets.selection

    @cached_property
    def score(self) -> np.ndarray:
        """float32 [V]"""
        return self.sets.score[self.number, self.columns].float().cpu().numpy()

    @cached_property
    def similarity(self) -> np.ndarray:
        """float64 [V, V], see `greedy.cosines`."""
        return greedy.cosines(self.sets.alive.hidden[self.number, self.columns])

    @cached_property
    def places(self) -> np.ndarray:
        """int64 [V, 3]: image, row and column of each token."""
        images, prompt = self.sets.alive.images, self.sets.alive.column[self.number, self.columns]
        number, place = (t[self.number, prompt].cpu().numpy() for t in (images.number, images.place))
        width = np.array([columns for _, columns in self.shapes], dtype=np.int64)[number]
        return np.stack([number, place // width, place % width], axis=-1)

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """(rows, columns) of each image's tokens."""
        return self.sets.alive.images.grids[self.number]


def by_row(choose: Callable[[Row], Sequence[int]]) -> Callable[[Sets], Tensor]:
    """A policy from a function that returns `row.keep` distinct indices of the row's tokens."""

    @wraps(choose)
    def policy(sets: Sets) -> Tensor:
        chosen = torch.zeros_like(sets.own)
        for number, keep in enumerate(sets.keep.tolist()):
            columns = sets.own[number].nonzero()[:, 0]
            if keep < len(columns):
                stay = choose(Row(sets, number, columns, keep)) if keep else []
                columns = columns[torch.as_tensor(stay, dtype=torch.int64, device=columns.device)]
            chosen[number, columns] = True
        return chosen

    return policy


def topk(sets: Sets) -> Tensor:
    return ops.token_select(sets.score, sets.own, sets.keep.contiguous())


@by_row
def mmr(row: Row) -> Sequence[int]:
    return greedy.mmr(row.score, row.similarity, row.keep, row.selection.mmr_score)


@by_row
def maxmin(row: Row) -> Sequence[int]:
    return greedy.maxmin(row.similarity, row.keep)


@by_row
def kcenter(row: Row) -> Sequence[int]:
    return greedy.kcenter(row.score, row.similarity, row.keep)


@by_row
def dpp(row: Row) -> Sequence[int]:
    return greedy.dpp(row.score, row.similarity, row.keep)


@by_row
def grid(row: Row) -> Sequence[int]:
    return greedy.grid(row.score, row.places, row.shapes, row.keep, row.selection.grid_share)
