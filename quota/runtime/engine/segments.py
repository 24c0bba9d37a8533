"""What a recipe will do to a prompt, known before prefill: which layers share a length, and how many visual tokens each
keeps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from quota.allocate.solve import allocate, check_keep, uniform
from quota.core.errors import UsageError
from quota.core.keep import significant
from quota.core.recipe import Recipe
from quota.models.images import ImageIndex
from quota.prune.budget import plan_drops


@dataclass(frozen=True)
class Segments:
    """Runs of decoder layers between the prune points of all recipes an engine serves: layers bounds[s] .. bounds[s +
    1]."""

    bounds: tuple[int, ...]

    @classmethod
    def between(cls, layers: int, recipes: Iterable[Recipe]) -> Segments:
        """Cut `layers` decoder layers at every candidate of every recipe."""
        cuts = {candidate for recipe in recipes for candidate in recipe.candidates}
        return cls(tuple(sorted({0, layers} | cuts)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def layers(self) -> int:
        return self.bounds[-1]

    @property
    def spans(self) -> list[range]:
        """Decoder layers of each segment."""
        return [range(a, b) for a, b in pairwise(self.bounds)]

    def names(self) -> list[str]:
        """ "0-1", "2", ...: labels of the segments in metrics and `stats`."""
        return [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in self.spans]

    def check(self, recipe: Recipe) -> None:
        """UsageError when the recipe drops inside a segment."""
        inside = [c for c in recipe.candidates if c not in self.bounds]
        if inside:
            raise UsageError(
                f"recipe: prunes at layer {inside[0]}, where this engine has no segment boundary; give it the recipe"
                " when it is built"
            )


@dataclass(frozen=True)
class DropPlan:
    """keep: decoder layer -> visual tokens kept at its input per set, only where some are dropped. dropped: tokens
    missing per segment. group int64 [tokens]: the set a visual token competes in (`quota.prune.budget`), -1 for text.
    """

    keep: dict[int, tuple[int, ...]]
    dropped: tuple[int, ...]
    group: Tensor

    @property
    def first_layer(self) -> int | None:
        """The first layer that runs on fewer tokens."""
        return min(self.keep, default=None)


def plan_prompt(recipe: Recipe | None, segments: Segments, index: ImageIndex) -> DropPlan:
    """Equation (5) for a prompt; index: of one row."""
    group, budgets = (index.tile, {}) if recipe is None or not bool(index.visual.any()) else plan_drops(recipe, index)
    keep = {candidate: tuple(budget[0].tolist()) for candidate, budget in budgets.items()}
    sizes = [int((group == number).sum()) for number in range(int(group.max()) + 1)]
    visual, alive, dropped = sum(sizes), sizes, []
    for span in segments.spans:
        alive = [min(pair) for pair in zip(alive, keep.get(span[0], sizes), strict=True)]
        dropped.append(visual - sum(alive))
    return DropPlan(keep, tuple(dropped), group[0])


def at_budget(recipe: Recipe, keep: float) -> Recipe:
    """The same candidates and shares of the drop for another final keep ratio: equation (4) with R = 1 - keep.

    A recipe without sensitivities has its own shares rescaled; one that drops nothing gets equal drops.
    """
    check_keep(keep)
    final = significant(float(keep))
    if recipe.method == "quota" and recipe.sensitivities:
        table = allocate(recipe.sensitivities, final, recipe.tau)
    elif recipe.final_keep < 1:
        table = [1 - (1 - ratio) * (1 - final) / (1 - recipe.final_keep) for ratio in recipe.keep]
        table = [min(1.0, max(final, ratio)) for ratio in table[:-1]] + [final]
    else:
        table = uniform(len(recipe.candidates), final)
    return Recipe.parse({**recipe.model_dump(mode="json"), "keep": table, "final_keep": final})
