"""Running any LLaVA model under a recipe, and taking the recipe off again."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quota.arch import find_arch, model_fingerprint
from quota.core.errors import RecipeError, UsageError
from quota.nn.pruner import Pruner

if TYPE_CHECKING:
    from quota.core.recipe import Recipe


class PatchHandle:
    """An installed recipe. A context manager; `undo()` (or leaving the block) restores the model exactly."""

    def __init__(self, model: Any, recipe: Recipe, forced: Mapping[int, Tensor] | None = None) -> None:
        self.model, self.recipe = model, recipe
        self.pruner = Pruner(model, recipe, forced)
        model.quota_handle = self
        self._own_generate = model.__dict__.get("generate")
        model.generate = _checked(model.generate)

    @property
    def kept(self) -> dict[int, Tensor]:
        """Of the last prefill: candidate layer -> bool [B, prompt tokens], True for tokens (text included) alive from that layer on."""
        return self.pruner.kept

    @property
    def cache_lengths(self) -> list[int]:
        """Of the last prefill: tokens each decoder layer ran on and cached (the longest row of the batch)."""
        return self.pruner.cache_lengths

    @property
    def installed(self) -> bool:
        return getattr(self.model, "quota_handle", None) is self

    def undo(self) -> None:
        """Take the recipe off. Calling it twice is harmless."""
        if not self.installed:
            return
        self.pruner.remove()
        del self.model.quota_handle
        if self._own_generate is None:
            del self.model.generate
        else:
            self.model.generate = self._own_generate

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def patched(model: Any, recipe: Recipe | str | Path, *, forced: Mapping[int, Tensor] | None = None) -> PatchHandle:
    """Install `recipe` (a Recipe or a file) on a LLaVA model, float or quantized; `with patched(model, recipe) as handle:` undoes it.

    forced: candidate layer -> bool [B, prompt tokens] replaces the scored choice. RecipeError when the recipe belongs to another model,
    UsageError when a recipe is already installed.
    """
    from quota.core.recipe import Recipe  # reads and checks documents: needed only with a recipe

    if getattr(model, "quota_handle", None) is not None:
        raise UsageError("recipe: one is already installed on this model; call model.quota_handle.undo() first")
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: expected a Recipe or a path, got {type(recipe).__name__}")
    text_config = model.config.get_text_config()
    recipe.check_model(model_fingerprint(model), text_config.num_hidden_layers, find_arch(model).model_class)
    if forced is not None and (missing := sorted(set(recipe.candidates) - set(forced))):
        raise UsageError(f"forced: expected a mask for every candidate layer, missing {missing}")
    return PatchHandle(model, recipe, forced)


def _checked(generate: Any) -> Any:
    @functools.wraps(generate)
    def checked(*args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config")
        if kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None):
            raise UsageError("prefill_chunk_size: pruning ranks a whole prompt at once; leave it unset")
        implementation = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
        if implementation not in (None, "dynamic"):
            raise UsageError(f"cache_implementation: expected none or 'dynamic' with a recipe installed, got {implementation!r}")
        return generate(*args, **kwargs)

    return checked
