"""How many visual tokens each image keeps at a layer.

`reference: recorded` counts V_ref tokens per image of the prompt, and the images of a prompt compete for the sum.
`reference: per_image` gives
every image ceil(r_l * V) of its own V and chooses inside it: an image of dynamic resolution keeps the same share
however large its neighbours are, and what is kept of it depends on them only through the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quota.core.keep import kept_tokens

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


def plan_budgets(
    recipe: Recipe, ratio: float, image_index: Tensor, counts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """(group, budget) of equation (5): group int64 [B, S], the set a token competes in (-1: not visual), and budget
    int64 [B, sets].

    image_index [B, S]: number of the image a token belongs to, -1 where not visual. counts: per row, V of each image of
    the unpruned prompt.
    """
    if recipe.reference == "recorded":
        budget = torch.tensor([[kept_tokens(ratio, recipe.reference_tokens * len(row))] for row in counts])
        return image_index.clamp_max(0), budget.to(image_index.device)
    widest = max(map(len, counts), default=0)
    budget = torch.tensor(
        [[kept_tokens(ratio, v) for v in (*row, *[0] * (widest - len(row)))] for row in counts], dtype=torch.int64
    )
    return image_index, budget.to(image_index.device)


def plan_drops(recipe: Recipe, image_index: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """image_index [B, S] as above -> (group, candidate -> budget), only candidates where some set has more tokens
    than its budget."""
    counts = image_sizes(image_index)
    group, alive = image_index, None
    plan: dict[int, Tensor] = {}
    for candidate, ratio in zip(recipe.candidates, recipe.keep, strict=True):
        group, budget = plan_budgets(recipe, ratio, image_index, counts)
        alive = set_sizes(group, budget.shape[1]) if alive is None else alive
        if bool((alive > budget).any()):
            plan[candidate] = budget
        alive = torch.minimum(alive, budget)
    return group, plan


def image_sizes(image_index: Tensor) -> list[list[int]]:
    """image_index [B, S] as above -> per row, the visual tokens of each image."""
    return [row[row >= 0].bincount().tolist() for row in image_index]


def set_sizes(group: Tensor, sets: int) -> Tensor:
    """group [B, S] -> [B, sets] int64, the tokens of each set."""
    return (
        torch.stack([(group == number).sum(-1) for number in range(sets)], -1)
        if sets
        else group.new_zeros(len(group), 0)
    )
