"""Recipes of schema_version 1 keep after `quota recipe upgrade` the tokens they kept before there was a version 2.

`version1.json` holds such recipes and the prompt columns that the hooks of that time kept on the tiny models, per
candidate and row: every score and policy, before the language model and inside. Choices that a rounding error in the
weights could turn are not among them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from quota.core.errors import RecipeError
from quota.core.recipe import Recipe
from quota.core.recipe_upgrade import upgrade
from quota.core.selectors import POLICIES, SCORES
from quota.runtime.patch import patched
from tests.prune.recipes import recipe_for
from tests.prune.test_pruner_qwen2_5_vl import MIXED
from tests.tiny import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen

STORED = json.loads((Path(__file__).parent / "version1.json").read_text(encoding="utf-8"))


@cache
def world(family: str):
    if family == "llava":
        return tiny_llava(), llava_inputs(tiny_llava())
    return tiny_qwen(), qwen_inputs(tiny_qwen(), rows=MIXED)


def test_every_score_and_policy_of_version_1_was_written_down() -> None:
    chosen = [selection for rows in STORED.values() for row in rows for selection in row["recipe"]["selections"]]
    assert {selection["score"] for selection in chosen} == set(SCORES)
    assert {selection["policy"] for selection in chosen} == set(POLICIES) - {"kcenter"}  # no file of version 1 has it


@pytest.mark.parametrize(
    ("family", "row"),
    [(family, row) for family, rows in STORED.items() for row in rows],
    ids=[f"{family}-{row['name']}" for family, rows in STORED.items() for row in rows],
)
def test_an_upgraded_recipe_keeps_the_same_tokens(tmp_path, family, row) -> None:
    model, inputs = world(family)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**row["recipe"], "model": recipe_for(model).model.model_dump()}))
    with pytest.raises(RecipeError, match="quota recipe upgrade"):
        Recipe.load(path)
    upgrade(path).recipe.save(path)
    with patched(model, Recipe.load(path)) as handle, torch.no_grad():
        model(**inputs)
    kept = {layer: [mask.nonzero()[:, 0].tolist() for mask in rows] for layer, rows in handle.kept.items()}
    assert kept == {(0 if layer == "-1" else int(layer)): rows for layer, rows in row["kept"].items()}
