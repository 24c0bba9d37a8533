"""Choosing at a candidate: the score and the policy that the recipe names, applied to the tokens alive there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quota.core.selectors import POLICIES
from quota.prune import policies, scores
from quota.prune.alive import Alive

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


def needs_images(recipe: Recipe) -> bool:
    """Whether some candidate looks at the images themselves: at their content, or at where in them a token lies."""
    return any("images" in recipe.selection_at(candidate).needs for candidate in recipe.candidates)


def needs_attention(recipe: Recipe, candidate: int) -> bool:
    """Whether this candidate reads what the attention of the layer before left."""
    return "attention" in recipe.selection_at(candidate).needs


def choose(recipe: Recipe, candidate: int, alive: Alive, keep: Tensor) -> Tensor:
    """keep int64 [B, sets] -> bool [B, n]: the visual tokens that stay at `candidate`, keep[b, g] of each set g or all
    where there are fewer.

    Deterministic; a row's choice does not depend on the others.
    """
    selection, visual = recipe.selection_at(candidate), alive.visual
    asked = POLICIES[selection.policy].uses_score and bool(keep.numel()) and int(keep.max()) > 0
    score = getattr(scores, selection.score if asked else "none")(alive, recipe)
    policy, chosen = getattr(policies, selection.policy), torch.zeros_like(visual)
    for number, budgets in enumerate(keep.unbind(1)):
        chosen |= policy(policies.Sets(alive, selection, score, alive.group == number, budgets))
    return chosen
