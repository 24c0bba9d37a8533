"""Published methods as recipes: their schedules, their searches, and what they refuse."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from quota.allocate.baselines import RecipeContext, SearchStats, at_compute, build_baseline
from quota.allocate.explain import explain_text, facts, recipe_cost
from quota.allocate.fitprune import AttentionSample, keep_shares, search
from quota.allocate.recipe_builder import build_recipe
from quota.core.errors import RecipeError, UsageError
from quota.core.keep import keep_of, kept_tokens
from quota.core.methods import METHODS, baselines, methods_help
from quota.core.recipe import ModelFacts, Recipe
from tests.allocate.profiles import profile


def basis(layers: int = 32, tokens: int = 576) -> RecipeContext:
    model = ModelFacts(
        architecture="LlavaForConditionalGeneration",
        fingerprint="sha256:aa",
        layers=layers,
        visual_tokens=tokens,
        hidden_size=4096,
        kv_size=4096,
        intermediate_size=11008,
        head_dim=128,
        text_tokens=64,
        vision_macs=10**11,
    )
    return RecipeContext(model, "w4a4kv4")


def attention(layers: int = 8, tokens: int = 50, seed: int = 0) -> AttentionSample:
    r = np.random.default_rng(seed)
    return AttentionSample(r.random((layers, tokens)) ** 4, r.random((layers, tokens)) ** 2)


def evidence() -> SearchStats:
    return SearchStats(
        withdrawal={i: 0.1 / i for i in range(1, 32)},
        attention=[attention(32, 576, s) for s in range(3)],
        samples=20,
        threshold=0.01,
    )


@pytest.mark.parametrize(
    ("method", "candidates", "tokens"),
    [
        ("fastv", (2,), [288]),
        ("pyramiddrop", (8, 16, 24), [288, 144, 72]),
        ("vtw", (15,), [0]),
        ("divprune", (0,), [57]),
        ("cdpruner", (0,), [64]),
        ("random", (0,), [173]),
        ("grid", (0,), [173]),
    ],
)
def test_published_schedules(method: str, candidates: tuple[int, ...], tokens: list[int]) -> None:
    recipe = build_baseline(basis(), method)
    assert recipe.candidates == candidates and recipe.method == method
    assert [kept_tokens(r, 576) for r in recipe.keep] == tokens
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe


def test_every_method_is_listed_explained_and_in_the_schema() -> None:
    for name in METHODS:
        assert f"`{name}`" in methods_help()
        if name in baselines():
            text = explain_text(build_baseline(basis(), name, stats=evidence()))
            assert name in text and "positions" in text.lower()


def test_averages_are_those_of_the_papers() -> None:
    assert facts(build_baseline(basis(), "pyramiddrop"))["average_visual_tokens"] == 270
    assert facts(build_baseline(basis(), "vtw"))["average_visual_tokens"] == 270
    assert facts(build_baseline(basis(), "fastv"))["average_visual_tokens"] == 306


def test_layers_can_be_chosen_where_a_method_has_them() -> None:
    assert build_baseline(basis(), "fastv", 0.25, "3").candidates == (3,)
    assert build_baseline(basis(), "vtw", layers=[20]).candidates == (20,)
    staged = build_baseline(basis(), "pyramiddrop", 0.25, "4,10")
    assert staged.candidates == (4, 10) and staged.keep == (0.5, 0.25) and staged.provenance.layer_rule == "4,10"
    with pytest.raises(UsageError, match="--layers: divprune has no layers to choose"):
        build_baseline(basis(), "divprune", layers="3")
    with pytest.raises(UsageError, match="--layers: FastV drops before one layer, got 2,3"):
        build_baseline(basis(), "fastv", layers="2-3")
    with pytest.raises(UsageError, match="--keep: VTW withdraws every visual token"):
        build_baseline(basis(), "vtw", 0.3)
    with pytest.raises(RecipeError, match=r"method: expected one of .*, got 'best'"):
        build_baseline(basis(), "best")


@pytest.mark.parametrize("layers", [2, 3, 4, 8])
def test_shallow_models(layers: int) -> None:
    for method in baselines():
        shallow = SearchStats(withdrawal={i: 1.0 for i in range(1, layers)}, attention=[attention(layers)], samples=1)
        recipe = build_baseline(basis(layers, 50), method, 0.8 if method == "fitprune" else None, stats=shallow)
        assert all(c == 0 or 1 <= c < layers for c in recipe.candidates)


def test_withdrawal_search_takes_the_first_layer_within_the_threshold() -> None:
    recipe = build_baseline(basis(), "vtw", stats=evidence())
    assert (
        recipe.candidates == (10,) and "layer 10" in recipe.provenance.search[0] and "Search: " in explain_text(recipe)
    )
    never = build_baseline(basis(), "vtw", stats=SearchStats(withdrawal={1: 3.0, 2: 2.0}, samples=4))
    assert never.candidates == (2,) and "no layer is within" in never.provenance.search[0]


def test_fitprune_deletes_what_both_lists_hold() -> None:
    """Layer 0: tokens 0 and 1 have no mass in either list, token 2 none in one; alpha 0 deletes exactly what costs
    nothing."""
    cross = np.array([[0.0, 0, 0, 4, 6], [1, 1, 1, 1, 1.0]])
    own = np.array([[0.0, 0, 5, 1, 4], [1, 1, 1, 1, 1.0]])
    assert keep_shares(AttentionSample(cross, own), 0.0).tolist() == [1.0, 0.6]
    assert keep_shares(AttentionSample(cross, own), 0.4).tolist() == [1.0, 0.4], (
        "alpha 0.4 allows tokens 0-3 in cross and 0, 1, 3 in self"
    )


def test_fitprune_counts_what_earlier_layers_took() -> None:
    """Layer 1 has lost 2 of 5 masses to layer 0 already: alpha 0.5 allows 2.5, so it may not lose another whole one."""
    flat = np.ones((3, 5))
    cheap = flat.copy()
    cheap[0] = [0, 0, 1, 1, 1]
    assert keep_shares(AttentionSample(cheap, cheap), 0.2).tolist() == [1.0, 0.6, 0.6]


def test_fitprune_meets_its_budget_with_the_smallest_alpha() -> None:
    samples = [attention(seed=s) for s in range(4)]

    def ratio(shares: list[float]) -> float:
        return sum(shares) / len(shares)

    alphas = []
    for budget in (0.9, 0.6, 0.4, 0.2):
        alpha, shares = search(samples, budget, ratio)
        alphas.append(alpha)
        assert ratio(shares) <= budget and shares[0] == 1.0 and all(b <= a for a, b in pairwise(shares))
        if alpha > 0:
            fewer = np.stack([keep_shares(s, alpha - 0.01) for s in samples]).mean(0)
            assert ratio(fewer.tolist()) > budget
    assert alphas == sorted(alphas)
    with pytest.raises(RecipeError, match=r"cannot reach a compute ratio of 0\.05"):
        search(samples, 0.05, ratio)
    with pytest.raises(RecipeError, match="at least one prompt with an image"):
        search([], 0.5, ratio)


def test_fitprune_recipe_costs_what_it_was_asked() -> None:
    recipe = build_baseline(basis(), "fitprune", 0.4, stats=evidence())
    spent = recipe_cost(recipe)
    assert spent is not None and spent.ratio_visual <= 0.4 and spent.ratio_visual > 0.3
    assert "alpha" in recipe.provenance.search[0] and recipe.selection_at(recipe.candidates[0]).score == "cross_self"


@pytest.mark.parametrize("method", [name for name in baselines() if name not in ("vtw", "fitprune")])
def test_matching_compute_takes_the_last_token_that_fits(method: str) -> None:
    def build(keep: float) -> Recipe:
        return build_baseline(basis(), method, keep)

    recipe = at_compute(build, 0.5, 576)
    spent = recipe_cost(recipe)
    more = recipe_cost(build(keep_of(recipe.tokens_at(31) + 1, 576)))
    assert spent is not None and more is not None and spent.ratio_language <= 0.5 < more.ratio_language


def test_matching_compute_works_for_quota_too_and_refuses_the_impossible() -> None:
    def build(keep: float) -> Recipe:
        return build_recipe(profile(), keep)

    recipe = at_compute(build, 0.6, 576)
    spent = recipe_cost(recipe)
    assert spent is not None and 0.59 < spent.ratio_language <= 0.6
    with pytest.raises(RecipeError, match=r"compute: no recipe of this method costs 1\.0% "):
        at_compute(build, 0.01, 576)


def test_keep_of_is_exact() -> None:
    for tokens in (1, 7, 49, 576, 1296, 16384):
        for count in {0, 1, tokens // 3, tokens // 2, tokens - 1, tokens} - {-1}:
            assert kept_tokens(keep_of(count, tokens), tokens) == count
