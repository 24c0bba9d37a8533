"""Rewriting recipe files of schema_version 1 as version 2.

What differs is where a candidate is before the language model: -1 in version 1, which had no candidate 0, and 0 in
version 2. Everything else is the same field for field, so an upgraded recipe keeps the same tokens. Its bytes differ,
and with them its digest, by which a checkpoint's manifest names the recipe it was calibrated under.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quota.core.errors import RecipeError
from quota.core.recipe import SCHEMA_VERSION, Recipe
from quota.core.recipe_file import digest, is_version_1, read_document


@dataclass(frozen=True)
class Upgrade:
    """A recipe file and what it becomes. changes: "field: old -> new", empty where it is of this version already."""

    path: Path
    recipe: Recipe
    changes: tuple[str, ...]


def upgrade(path: str | Path) -> Upgrade:
    """Read a recipe file of version 1 or 2; nothing is written. RecipeError for any other file, and for one that its
    own version refuses.

    A file without schema_version is of version 1 where it has a candidate -1; else the two versions read it alike.
    """
    path, data = Path(path), read_document(path)
    candidates = data.get("candidates")
    layers = candidates if isinstance(candidates, list) else []
    before = [i for i, layer in enumerate(layers) if type(layer) is int and layer == -1]
    old = is_version_1(data.get("schema_version")) or ("schema_version" not in data and bool(before))
    if not old:
        return Upgrade(path, Recipe.parse(data, f"recipe {path}"), ())
    if 0 in layers:
        raise RecipeError(
            f"recipe {path}: candidates[{layers.index(0)}]: expected -1 (before the language model) or a decoder layer"
            " from 1 on, as schema_version 1 has no candidate 0, got 0; say which is meant"
        )
    changed: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    if before:
        changed["candidates"] = [0 if i in before else layer for i, layer in enumerate(layers)]
    recipe = Recipe.parse({**data, **changed}, f"recipe {path}")
    was = recipe.model_dump(mode="json") | {"schema_version": 1, "candidates": layers}
    return Upgrade(
        path,
        recipe,
        (
            f"schema_version: 1 -> {SCHEMA_VERSION}",
            *(f"candidates[{i}]: -1 -> 0" for i in before),
            f"digest: {digest(was)} -> {recipe.digest}",
        ),
    )
