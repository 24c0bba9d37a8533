"""Choosing visual tokens inside a prefill that may have come in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quota.core.errors import UsageError
from quota.core.recipe import BEFORE, Recipe
from quota.nn.attention import Record
from quota.nn.pictures import Pictures
from quota.nn.scores import text_queries
from quota.nn.select import Alive, choose
from quota.ops.kv4_attention import Kv


@dataclass(frozen=True)
class Attended:
    """What one layer's attention left for n rows of a request: q float32 [1, H, n, D], packed keys [1, Hkv, n, ...], lse [1, H, n]."""

    q: Tensor
    keys: Kv
    lse: Tensor

    @staticmethod
    def joined(parts: list[Attended]) -> Attended:
        """Rows of consecutive pieces."""
        if len(parts) == 1:
            return parts[0]
        keys = tuple(torch.cat([part.keys[i] for part in parts], 2) for i in range(3))
        return Attended(torch.cat([p.q for p in parts], 2), (keys[0], keys[1], keys[2]), torch.cat([p.lse for p in parts], 2))


@dataclass(frozen=True)
class Choice:
    """What to choose and by what. keep: layer -> visual tokens kept at its input. visual, text bool [rows]: rows that are visual tokens, and
    those whose attention counts as the question's; rows from `selecting` on have no say."""

    recipe: Recipe
    keep: dict[int, int]
    visual: Tensor
    text: Tensor
    selecting: int

    @classmethod
    def of_prompt(cls, recipe: Recipe, keep: dict[int, int], visual: Tensor, selecting: int, first: int) -> Choice:
        """visual bool [tokens]: of all tokens of a request; rows are the tokens from `first` on."""
        text = torch.zeros_like(visual)
        text[:selecting] = text_queries(visual[None, :selecting], torch.ones(1, selecting, dtype=torch.bool))[0]
        return cls(recipe, keep, visual[first:], text[first:], selecting - first)


def kept_rows(choice: Choice, layer: int, module: Any, x: Tensor, rows: Tensor, attended: Attended) -> Tensor:
    """Rows that go on into `layer`: x [n, d] are the hidden states of rows int64 [n], attended is of the layer before -> bool [n]."""
    visual = choice.visual[rows]
    n = int((rows < choice.selecting).sum())
    q, scale, zero = (t[:, :, :n] for t in attended.keys)
    record = Record(attended.q[:, :, :n].contiguous(), (q, scale, zero), attended.lse[:, :, :n].contiguous(), attended.q.shape[-1] ** -0.5)
    group = visual[None, :n].long() - 1
    alive = Alive(x[None, :n], group, choice.text[rows[:n]][None], rows[None, :n], module, Pictures.of(group), record)
    kept = ~visual
    kept[:n] |= choose(choice.recipe, layer, alive, torch.tensor([[choice.keep[layer]]]))[0]
    return kept


def check_choices(recipe: Recipe) -> None:
    """UsageError when the recipe chooses by what the engine has not got: attention run for the choice alone, or places and contents of pictures."""
    if recipe.candidates[0] == BEFORE:
        raise UsageError("recipe: drops before the language model (candidate -1), which the engine does not do; use `quota.load` with it")
    for layer in recipe.candidates:
        selection = recipe.selection_at(layer)
        if selection.score in ("own_last_token", "random") or selection.policy == "grid":
            raise UsageError(
                f"recipe: layer {layer} chooses by score {selection.score!r} and policy {selection.policy!r}, which the engine does not do; "
                "use `quota.load` with it"
            )
