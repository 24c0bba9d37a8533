"""What a request would take, without running it."""

from __future__ import annotations

from dataclasses import dataclass

from quota.core.recipe import Recipe
from quota.prune.budget import image_sizes, tile_sizes
from quota.runtime.engine.model import EngineModel
from quota.runtime.engine.recipes import Recipes
from quota.runtime.engine.request import Request
from quota.runtime.engine.segments import Segments, plan_prompt


@dataclass(frozen=True)
class Preview:
    """recipe: under which it would run, at its budget. prompt_tokens: text and visual tokens. images: visual tokens of
    each image; grids: their (rows, columns) where it is one raster that is no square; tiles: its rasters.
    visual_by_layer: visual tokens alive in each decoder layer; without a recipe all of them in every layer. kv_bytes,
    unpruned_kv_bytes: of the prompt's keys and values in the cache, with the recipe and without."""

    recipe: Recipe | None
    prompt_tokens: int
    images: tuple[int, ...]
    grids: tuple[tuple[int, int] | None, ...]
    tiles: tuple[int, ...]
    visual_by_layer: tuple[int, ...]
    kv_bytes: int
    unpruned_kv_bytes: int


def preview(model: EngineModel, recipes: Recipes, request: Request) -> Preview:
    """Equation (5) for one request; exact, since budgets depend on counts alone."""
    prompt = request.prompt
    index = model.image_index(prompt)
    images, tokens = image_sizes(index)[0], len(prompt.ids)
    recipe = recipes.of(request, tile_sizes(index)[0])
    segments = Segments.between(model.layers, [] if recipe is None else [recipe])
    plan = plan_prompt(recipe, segments, index)
    dropped = [number for span, number in zip(segments.spans, plan.dropped, strict=True) for _ in span]
    per_token = model.block_bytes(1)
    shown = [model.image_shown(image) for image in prompt.images]
    return Preview(
        recipe,
        tokens,
        tuple(images),
        tuple(rasters[0].grid if len(rasters) == 1 else None for rasters in shown),
        tuple(map(len, shown)),
        tuple(sum(images) - number for number in dropped),
        per_token * sum(tokens - number for number in dropped),
        per_token * tokens * model.layers,
    )
