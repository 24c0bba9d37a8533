"""Choosing visual tokens inside a prefill that may have come in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quota.core.recipe import Recipe
from quota.models.images import ImageTokens
from quota.nn.attention import AttentionTrace
from quota.nn.key_bias import wide_keys
from quota.nn.kv import KvKind, Stored
from quota.prune.alive import Alive
from quota.prune.attention import text_queries
from quota.prune.select import choose, needs_attention


@dataclass(frozen=True)
class Attended:
    """What one layer's attention left for n rows of a request: q float32 [1, H, n, D], keys [1, Hkv, n, ...] as their
    kind stores them, lse [1, H, n]; where the key bias is kept apart q is 2 D wide and angles [1, D, n] are those of
    the keys."""

    kv: KvKind
    q: Tensor
    keys: Stored
    lse: Tensor
    angles: Tensor | None = None

    @staticmethod
    def joined(parts: list[Attended]) -> Attended:
        """Rows of consecutive pieces."""
        if len(parts) == 1:
            return parts[0]
        keys = tuple(torch.cat(pieces, 2) for pieces in zip(*(part.keys for part in parts), strict=True))
        angles = [part.angles for part in parts if part.angles is not None]
        return Attended(
            parts[0].kv,
            torch.cat([p.q for p in parts], 2),
            keys,
            torch.cat([p.lse for p in parts], 2),
            torch.cat(angles, 2) if angles else None,
        )

    def trace(self, rows: int, scaling: float) -> AttentionTrace:
        """The first `rows` rows, for token scores."""
        stored = tuple(t[:, :, :rows] for t in self.keys)
        keys: Any = (
            self.kv.scored(stored)
            if self.angles is None
            else wide_keys(self.kv.floats(stored), self.angles[..., :rows])
        )
        return AttentionTrace(self.q[:, :, :rows].contiguous(), keys, self.lse[:, :, :rows].contiguous(), scaling)


@dataclass(frozen=True)
class Choice:
    """What to choose and by what, for the tokens of a request from `first` on, called rows.

    keep: layer -> visual tokens kept at its input, per set. group int64, text bool [rows]: the set a visual token
    competes in (-1: text), and rows whose attention counts as the question's; rows from `selecting` on have no say.
    images: of the whole prompt.
    """

    recipe: Recipe
    keep: dict[int, tuple[int, ...]]
    group: Tensor
    text: Tensor
    images: ImageTokens
    first: int
    selecting: int

    @classmethod
    def of_prompt(
        cls,
        recipe: Recipe,
        keep: dict[int, tuple[int, ...]],
        group: Tensor,
        shown: Tensor,
        images: ImageTokens,
        selecting: int,
        first: int,
    ) -> Choice:
        """group int64 [tokens]: of all tokens of a request; shown bool [prompt tokens]: those that hold an image's
        features; rows are the tokens from `first` on."""
        text = torch.zeros(len(group), dtype=torch.bool)
        text[:selecting] = text_queries(shown[None, :selecting], torch.ones(1, selecting, dtype=torch.bool))[0]
        return cls(recipe, keep, group[first:], text[first:], images, first, selecting - first)

    def reads_attention(self, layer: int) -> bool:
        """Whether what is dropped at the input of `layer` is chosen by the attention of the layer before."""
        return layer in self.keep and needs_attention(self.recipe, layer)

    def kept_rows(
        self,
        layer: int,
        module: Any,
        x: Tensor,
        rows: Tensor,
        trace: AttentionTrace | None,
        own_trace: Callable[[], AttentionTrace],
    ) -> Tensor:
        """Rows that go on into `layer`: x [n, d] are the hidden states of rows int64 [n] -> bool [n], both on
        the host.

        trace: of the layer before, own_trace: of `layer` itself, both over the rows before `selecting`.
        """
        group = self.group[rows]
        n = int((rows < self.selecting).sum())
        of_prompt = (group[:n], self.text[rows[:n]], rows[:n] + self.first, torch.tensor(self.keep[layer]))
        own, text, column, budget = (t[None].to(x.device) for t in of_prompt)
        images = replace(self.images, number=self.images.number.to(x.device), place=self.images.place.to(x.device))
        alive = Alive(x[None, :n], own, text, column, module, images, trace, own_trace)
        kept = group < 0
        kept[:n] |= choose(self.recipe, layer, alive, budget)[0].cpu()
        return kept
