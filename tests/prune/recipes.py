"""Recipes for tiny models, and watching what a model computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quota.core.recipe import Recipe
from quota.models import find_family, model_fingerprint
from quota.models.images import runs
from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.pixtral import PIXTRAL_END, pixtral_pixels
from tests.tiny import IMAGE_TOKEN, KEY_BIASED, TILED, TINY

REFERENCE_TOKENS = 16  # of a dynamic model's typical picture
KINDS = ("float", "quantized", "vision")


@cache
def tiny_model(family: str, kind: str) -> Any:
    """A tiny model of a family, float, quantized whole or in the vision parts; it is shared, so leave it as it was."""
    modules = ("vision", "projector") if kind == "vision" else ("vision", "projector", "llm")
    key_bias = {"float": 20, "quantized": 800, "vision": 0}[kind]
    model = TINY[family][0](**({"key_bias": key_bias} if family in KEY_BIASED else {}))
    return model if kind == "float" else quantize_rtn(model, modules)


def reference_of(family: str) -> dict[str, str]:
    """What a recipe's ratios are of, as a field of it."""
    return {} if family in ("llava", "paligemma") else {"reference": "per_tile" if family in TILED else "per_image"}


def recipe_for(
    model: Any, candidates: tuple[int, ...] = (1, 2, 3), keep: tuple[float, ...] = (0.75, 0.5, 0.25), **fields: Any
) -> Recipe:
    arch = find_family(model)
    tokens = arch.visual_tokens or REFERENCE_TOKENS
    facts = {
        "architecture": type(model).__name__,
        "fingerprint": model_fingerprint(model),
        "layers": arch.layers,
        "visual_tokens": tokens,
    }
    base = {
        "method": "quota",
        "regime": "w4a4kv4",
        "model": facts,
        "candidates": list(candidates),
        "keep": list(keep),
        "final_keep": keep[-1],
        "reference_tokens": tokens,
    }
    return Recipe.parse({**base, **fields})


@contextmanager
def final_states(model: Any) -> Iterator[list[Tensor]]:
    """Collects the last column of the decoder's normed output, [B, hidden], once per forward."""
    seen: list[Tensor] = []
    handle = model.model.language_model.norm.register_forward_hook(
        lambda module, args, out: seen.append(out[:, -1].clone())
    )
    try:
        yield seen
    finally:
        handle.remove()


def single(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    real = inputs["attention_mask"][row].bool()
    out = {
        name: inputs[name][row : row + 1, real]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
        if name in inputs
    }
    starts = (runs(inputs["input_ids"] == IMAGE_TOKEN).amax(-1) + 1).tolist()  # no two images stand side by side
    first, count = sum(starts[:row]), starts[row]
    if "image_sizes" in inputs and inputs["pixel_values"].ndim == 4:
        counts = (inputs["input_ids"] == PIXTRAL_END).sum(-1).tolist()
        own = slice(sum(counts[:row]), sum(counts[: row + 1]))
        if counts[row]:
            given = zip(inputs["pixel_values"][own], inputs["image_sizes"][own].tolist(), strict=True)
            out |= pixtral_pixels([pixels[:, :height, :width] for pixels, (height, width) in given])
    elif "image_sizes" in inputs:
        if count:
            out["image_sizes"] = inputs["image_sizes"][first : first + count]
            out["pixel_values"] = inputs["pixel_values"][first : first + count]
    elif "image_grid_thw" in inputs:
        if count:
            patches = inputs["image_grid_thw"].prod(-1).tolist()
            out["image_grid_thw"] = inputs["image_grid_thw"][first : first + count]
            out["pixel_values"] = inputs["pixel_values"][sum(patches[:first]) : sum(patches[: first + count])]
    elif "pixel_values" in inputs:  # an image or a tile each, of as many tokens as any other
        shown = (inputs["input_ids"] == IMAGE_TOKEN).sum(-1)
        each = int(shown.sum()) // len(inputs["pixel_values"])
        first, count = int(shown[:row].sum()) // each, int(shown[row]) // each
        if count:
            out["pixel_values"] = inputs["pixel_values"][first : first + count]
    return out


@torch.no_grad()
def greedy(model: Any, inputs: dict[str, Tensor], tokens: int = 5, **options: Any) -> Any:
    """Greedy decoding of exactly `tokens` tokens; never an image token. Scores are returned too."""
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        suppress_tokens=[find_family(model).image_token_id],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def assert_recomputing_agrees(model: Any, inputs: dict[str, Tensor], recipe: Recipe) -> None:
    """Pruned prefill and cached decoding equal, bit for bit, a recomputation without cache on the same kept tokens."""
    with patched(model, recipe) as handle, final_states(model) as cached:
        sequences = greedy(model, inputs).sequences
        kept = dict(handle.kept)
    with patched(model, recipe, forced=kept), final_states(model) as recomputed:
        again = greedy(model, inputs, use_cache=False).sequences
    assert torch.equal(sequences, again)
    assert all(torch.equal(a, b) for a, b in zip(cached, recomputed, strict=True))
