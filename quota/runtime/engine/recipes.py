"""Under which recipe a request runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from quota.core.errors import UsageError
from quota.core.keep import keep_of, kept_tokens
from quota.core.recipe import Recipe
from quota.runtime.engine.request import Request
from quota.runtime.engine.segments import at_budget

_MOST_BUDGETS = 1000


class Recipes:
    """An engine's recipes by name, at any budget. default: the name of the one for requests that ask for none in
    particular; None prunes nothing. Threads may share it."""

    def __init__(self, named: Mapping[str, Recipe] | None = None, default: str | None = None) -> None:
        self.named, self.default = dict(named or {}), default
        if default is not None and default not in self.named:
            raise UsageError(f"default: expected one of the recipes {sorted(self.named)}, got {default!r}")
        self._budgets: dict[tuple[str, float], Recipe] = {}
        self._lock = threading.Lock()

    def of(self, request: Request, images: Sequence[Sequence[int]]) -> Recipe | None:
        """The recipe, or None where nothing is pruned. images: visual tokens of each tile of each image of the
        prompt."""
        asked = self.default if request.recipe == "default" else request.recipe
        name = asked if isinstance(asked, str) else None
        if name is not None and name not in self.named:
            raise UsageError(f"recipe: expected one of {sorted(self.named)}, got {name!r}")
        recipe = self.named[name] if name is not None else asked
        if recipe is None:
            for field, given in (("keep", request.keep), ("keep_tokens", request.keep_tokens)):
                if given is not None:
                    raise UsageError(f"{field}: needs a recipe, and there is none")
            return None
        assert isinstance(recipe, Recipe)
        keep = _capped(recipe, request, images)
        return recipe if keep is None else self._at(name, recipe, keep)

    def _at(self, name: str | None, recipe: Recipe, keep: float) -> Recipe:
        if name is None:
            return at_budget(recipe, keep)
        with self._lock:
            if len(self._budgets) > _MOST_BUDGETS:
                self._budgets.clear()
            key = (name, keep)
            if key not in self._budgets:
                self._budgets[key] = at_budget(recipe, keep)
            return self._budgets[key]


def _capped(recipe: Recipe, request: Request, images: Sequence[Sequence[int]]) -> float | None:
    """The final keep ratio a request wants, None for the recipe's own. Where images compete for one budget
    (`reference: recorded`) the cap is their mean; where tiles have budgets of their own it is the sum of an image's."""
    cap, keep = request.keep_tokens, request.keep
    if cap is None or not images:
        return keep
    if cap < 1:
        raise UsageError(f"keep_tokens: expected at least 1, got {cap}")
    if recipe.reference == "recorded":
        sets = [recipe.reference_tokens]
    else:
        largest = max(images, key=sum)
        sets = list(largest) if recipe.reference == "per_tile" else [sum(largest)]

    def kept(ratio: float) -> int:
        return sum(kept_tokens(ratio, tokens) for tokens in sets)

    if kept(keep or recipe.final_keep) <= cap:
        return keep
    if cap < len(sets):
        raise UsageError(f"keep_tokens: expected at least {len(sets)}, one for each tile of an image, got {cap}")
    ratios = (keep_of(count, sum(sets)) for count in range(cap, 0, -1))
    return next(ratio for ratio in ratios if kept(ratio) <= cap)
