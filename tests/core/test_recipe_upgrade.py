"""Recipes of schema_version 1 become version 2: the same field for field, but for the candidate before the language
model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from quota.core.errors import RecipeError
from quota.core.recipe import Recipe
from quota.core.recipe_upgrade import upgrade
from tests.core.test_recipe import data


def written(folder: Path, **changes: object) -> Path:
    path = folder / "r.json"
    path.write_text(json.dumps(data(**{"schema_version": 1, **changes})))
    return path


def test_a_candidate_before_the_language_model_is_0_now(tmp_path: Path) -> None:
    old = dict(candidates=[-1, 3, 5], method="custom", selections=[{"score": "random"}], seed=7)
    found = upgrade(path := written(tmp_path, **old))
    assert found.recipe == Recipe.parse(data(**{**old, "candidates": [0, 3, 5]}))
    assert found.recipe.keep == (0.8, 0.55, 0.3) and found.recipe.provenance == Recipe.parse(data()).provenance
    assert found.changes[:2] == ("schema_version: 1 -> 2", "candidates[0]: -1 -> 0")
    assert json.loads(path.read_text())["schema_version"] == 1, "reading writes nothing"
    found.recipe.save(path)
    assert upgrade(path).changes == () and Recipe.load(path) == found.recipe


def test_the_digests_are_those_that_manifests_hold(tmp_path: Path) -> None:
    """The old one is of the canonical text of version 1, which had its fields in the same order."""
    found = upgrade(written(tmp_path))
    new = found.recipe.dumps()
    old = new.replace('"schema_version": 2', '"schema_version": 1')
    digests = ["sha256:" + hashlib.sha256(text.encode()).hexdigest() for text in (old, new)]
    assert old != new and found.changes == ("schema_version: 1 -> 2", f"digest: {digests[0]} -> {digests[1]}")
    assert found.recipe.digest == digests[1]


def test_without_a_version_the_candidates_tell(tmp_path: Path) -> None:
    """Both versions read a file without -1 and 0 alike."""
    path = tmp_path / "r.json"
    custom = dict(method="custom", selections=[{"score": "none", "policy": "grid"}])
    for candidates, changed in (([-1, 3, 5], True), ([0, 3, 5], False), ([2, 3, 5], False)):
        path.write_text(json.dumps(data(candidates=candidates, **custom)))
        found = upgrade(path)
        assert bool(found.changes) == changed and found.recipe.candidates == (max(candidates[0], 0), 3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": [0, 3, 5]}, r"candidates\[0\]: .*schema_version 1 has no candidate 0, got 0"),
        ({"candidates": [-2, 3, 5]}, r"candidates\[0\]: .*got -2"),
        ({"candidates": [-1, 0, 5]}, r"candidates\[1\]: .*no candidate 0"),
        ({"candidates": [-1, -1, 5]}, "ascending and distinct"),
        ({"candidates": [-1, 3, 5]}, "candidate 0 runs before any attention"),
        ({"candidates": -1}, "candidates: .*tuple"),
        ({"keep": [0.5, 0.8, 0.3]}, "keep: .*entry 1 is 0.8 after 0.5"),
        ({"schema_version": 3}, "schema_version: this quota reads recipes of schema_version 2; make the recipe again"),
        ({"schema_version": True}, "schema_version: .*got True"),
    ],
)
def test_what_its_own_version_refuses_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(RecipeError, match=message) as caught:
        upgrade(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
