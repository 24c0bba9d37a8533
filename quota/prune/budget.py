"""How many visual tokens each image keeps at a layer.

`reference: recorded` counts V_ref tokens per image of the prompt, and the images of a prompt compete for the sum.
`reference: per_image` gives
every image ceil(r_l * V) of its own V and chooses inside it: an image of dynamic resolution keeps the same share
however large its neighbours are, and what is kept of it depends on them only through the scores. `reference: per_tile`
does the same for every tile of an image that is shown in tiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quota.core.keep import kept_tokens
from quota.models.images import ImageIndex

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


def plan_budgets(recipe: Recipe, ratio: float, alive: ImageIndex, whole: ImageIndex) -> tuple[Tensor, Tensor]:
    """(group, budget) of equation (5): group int64 [B, S], the set a token competes in (-1: not visual), and budget
    int64 [B, sets].

    alive: of the tokens that are asked about; whole: of the unpruned prompt, whose V counts.
    """
    if recipe.reference == "recorded":
        counts = [[recipe.reference_tokens * len(row)] for row in image_sizes(whole)]
    else:
        counts = _sizes(whole.sets(recipe.reference))
    widest = max(map(len, counts), default=0)
    budget = torch.tensor(
        [[kept_tokens(ratio, v) for v in (*row, *[0] * (widest - len(row)))] for row in counts], dtype=torch.int64
    )
    return alive.sets(recipe.reference), budget.to(alive.tile.device)


def plan_drops(recipe: Recipe, index: ImageIndex) -> tuple[Tensor, dict[int, Tensor]]:
    """(group, candidate -> budget) as above for a whole prompt, only candidates where some set has more tokens than its
    budget."""
    group, alive = index.sets(recipe.reference), None
    plan: dict[int, Tensor] = {}
    for candidate, ratio in zip(recipe.candidates, recipe.keep, strict=True):
        group, budget = plan_budgets(recipe, ratio, index, index)
        alive = set_sizes(group, budget.shape[1]) if alive is None else alive
        if bool((alive > budget).any()):
            plan[candidate] = budget
        alive = torch.minimum(alive, budget)
    return group, plan


def image_sizes(index: ImageIndex) -> list[list[int]]:
    """Per row, the visual tokens of each image."""
    return _sizes(index.sets("per_image"))


def tile_sizes(index: ImageIndex) -> list[list[list[int]]]:
    """Per row and image, the visual tokens of each of its tiles."""
    out = []
    for image, tile in zip(index.image, index.tile, strict=True):
        images = range(int(image.max()) + 1 if len(image) else 0)
        out.append([[n for n in _sizes(tile[None, image == number])[0] if n] for number in images])
    return out


def _sizes(numbers: Tensor) -> list[list[int]]:
    return [row[row >= 0].bincount().tolist() for row in numbers]


def set_sizes(group: Tensor, sets: int) -> Tensor:
    """group [B, S] -> [B, sets] int64, the tokens of each set."""
    return (
        torch.stack([(group == number).sum(-1) for number in range(sets)], -1)
        if sets
        else group.new_zeros(len(group), 0)
    )
