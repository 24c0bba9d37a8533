"""Profile in, recipe out; and what explain and diff say about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quota.allocate.explain import diff, diff_text, explain, explain_text
from quota.allocate.profile import Profile
from quota.allocate.recipe_builder import build_recipe
from quota.core.errors import QuotaError, RecipeError
from quota.core.recipe import Recipe, ScoreWeights
from tests.allocate.profiles import profile


def test_quota_recipe() -> None:
    p = profile()
    recipe = build_recipe(p, 0.3)
    assert recipe.candidates == (2, 3, 4)
    assert recipe.keep[-1] == recipe.final_keep == 0.3
    assert recipe.tokens_at(7) == 173
    assert recipe.sensitivities == tuple(p.sensitivity[i] for i in (2, 3, 4))
    assert recipe.provenance.layer_rule == "auto"
    drops = [a - b for a, b in zip((1.0, *recipe.keep), recipe.keep, strict=False)]
    order = sorted(range(3), key=lambda i: recipe.sensitivities[i])
    assert drops[order[0]] > drops[order[1]] > drops[order[2]]


def test_same_input_same_bytes() -> None:
    assert build_recipe(profile(), 0.3, "2-6", 0.5).dumps() == build_recipe(
        profile(), 0.3, [2, 3, 4, 5, 6], 0.5
    ).dumps().replace('"2,3,4,5,6"', '"2-6"')


def test_uniform_recipe_has_equal_drops_and_no_quant_term() -> None:
    recipe = build_recipe(profile(), 0.3, layers="2,4,6", method="uniform")
    assert recipe.keep == pytest.approx((1 - 0.7 / 3, 1 - 1.4 / 3, 0.3), abs=1e-5)
    assert recipe.weights.quant == 0
    assert recipe.weights.inter == pytest.approx(0.5625)


@pytest.mark.parametrize("keep", [1.0, 1 / 3, 0.05])
def test_any_budget_ends_exactly(keep: float) -> None:
    recipe = build_recipe(profile(), keep)
    assert recipe.keep[-1] == recipe.final_keep
    assert Recipe.parse(json.loads(recipe.dumps())) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "keep: "),
        ({"keep": 1.5}, "keep: "),
        ({"tau": 0.0}, "tau: "),
        ({"layers": "2-8"}, "--layers: "),
        ({"layers": []}, "--layers: "),
        ({"method": "best"}, "method: "),
        ({"reference": "x"}, "reference: "),
        ({"position_policy": "x"}, "position_policy: "),
    ],
)
def test_errors_name_the_option(options: dict, message: str) -> None:
    with pytest.raises(QuotaError, match=message):
        build_recipe(profile(), **{"keep": 0.3, **options})


def test_profile_file(tmp_path: Path) -> None:
    p = profile()
    p.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == p
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"p.json: cannot be read"):
        Profile.load(tmp_path / "p.json")
    with pytest.raises(RecipeError, match=r"profile.sensitivity: expected one number per decoder layer \(8\), got 1"):
        profile(sensitivity=(0.1,))
    with pytest.raises(RecipeError, match=r"profile.sensitivity\[0\]: expected a finite number"):
        profile(sensitivity=(float("nan"),) * 8)


def test_explain() -> None:
    facts = explain(build_recipe(profile(), 0.3))
    assert facts["final_tokens"] == 173
    assert len(facts["layers"]) == 8
    assert 0 < facts["compute_ratio_visual"] < facts["compute_ratio_language"] < facts["compute_ratio"] < 1
    assert [row["candidate"] for row in facts["layers"]] == [False, False, True, True, True, False, False, False]
    assert sum(row["drop"] for row in facts["layers"]) == pytest.approx(0.7, abs=1e-5)
    json.dumps(facts, allow_nan=False)
    text = explain_text(build_recipe(profile(), 0.3))
    assert "Of 576 visual tokens per image 173 (0.3) reach the end" in text
    assert "Layers 2-4 drop" in text


def test_explain_a_hand_written_recipe() -> None:
    model = {"architecture": "L", "fingerprint": "sha256:aa", "layers": 4, "visual_tokens": 16}
    table = {"candidates": [2], "keep": [0.5], "final_keep": 0.5, "reference_tokens": 16}
    recipe = Recipe.parse({"method": "uniform", "regime": "w4a4kv4", "model": model, **table})
    assert explain(recipe)["compute_ratio"] is None
    assert "uniform recipe" in explain_text(recipe)


def test_diff() -> None:
    a, b = build_recipe(profile(), 0.3), build_recipe(profile(), 0.2, weights=ScoreWeights(quant=0.3, inter=0.35))
    changed = {c["field"]: (c["first"], c["second"]) for c in diff(a, b)}
    assert changed["final_keep"] == (0.3, 0.2)
    assert changed["weights.quant"] == (0.2, 0.3)
    assert "tau" not in changed
    assert diff(a, a) == []
    assert diff_text(a, a) == "the same"
    assert "final_keep" in diff_text(a, b)
