"""Every way a recipe may choose, in both families: the engine keeps what the patched model keeps, whole or in pieces,
alone or with a warm cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quota.core.recipe import Recipe
from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.engine.asking import (
    asked,
    engine,
    generated,
    logits,
    patches,
    picture,
    prompt,
    qwen_prompt,
    run,
    same,
    tokens,
)
from tests.prune.recipes import recipe_for
from tests.tiny import tiny_llava, tiny_qwen

SELECTIONS = {
    "last_token": ((1, 2, 3), [{"score": "last_token"}]),
    "own_last_token": ((1, 2, 3), [{"score": "own_last_token"}]),
    "cross_self": ((1, 2, 3), [{"score": "cross_self"}]),
    "mmr": ((1, 2, 3), [{"score": "text", "policy": "mmr"}]),
    "maxmin before": ((0, 2, 3), [{"score": "none", "policy": "maxmin"}]),
    "mmr before": (
        (0, 1, 3),
        [{"score": "relevance", "policy": "mmr"}, {"score": "own_last_token"}, {"policy": "dpp"}],
    ),
    "grid": (
        (0, 2, 3),
        [
            {"score": "none", "policy": "grid"},
            {"policy": "grid", "grid_share": 0.5},
            {"score": "random", "policy": "grid"},
        ],
    ),
    "random": ((1, 2, 3), [{"score": "random"}]),
}


@pytest.fixture(scope="module")
def models():
    return {"llava": quantize_rtn(tiny_llava()), "qwen": quantize_rtn(tiny_qwen(key_bias=800))}


def cases(family, model):
    if family == "llava":
        a, b = picture(1), picture(2)
        return {"one": prompt(model, 6, a, 5, seed=2), "two": prompt(model, 6, a, 3, b, 4, seed=2)}
    a, b = patches(8, 8, 1), patches(4, 6, 2)
    return {"one": qwen_prompt(6, a, 5, seed=2), "two": qwen_prompt(6, a, 3, b, 4, seed=2)}


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_agrees_with_the_patched_model(models, family, name, policy):
    model, (candidates, selections) = models[family], SELECTIONS[name]
    reference = "per_image" if family == "qwen" or policy == "compact" else "recorded"
    facts = recipe_for(
        model, candidates, position_policy=policy, reference=reference, method="custom", selections=selections
    ).model_dump(mode="json")
    recipe = Recipe.parse(facts)
    prompts, want, kept = cases(family, model), {}, {}
    with patched(model, recipe) as handle:
        for case, text in prompts.items():
            want[case] = generated(model, text)
            kept[case] = {layer: mask[0].nonzero()[:, 0].tolist() for layer, mask in handle.kept.items()}
    asks = [asked(case, text, recipe=recipe) for case, text in prompts.items()]
    made = engine(model)
    sequences = [made.submit(ask) for ask in asks]
    outputs: dict[str, list] = {case: [] for case in prompts}
    while made.busy:
        for output in made.step():
            outputs[output.id].append(output)
    assert {case: tokens(out) for case, out in outputs.items()} == want
    for sequence in sequences:
        assert {layer: rows.tolist() for layer, rows in sequence.kept.items()} == {
            layer: k for layer, k in kept[sequence.request.id].items()
        }
    assert same(logits(model, asks, step_tokens=5).seen, made.seen)
    run(made, [replace(ask, id=f"{ask.id} again") for ask in asks])
    assert all(
        (x == y).all() for case in prompts for x, y in zip(made.seen[case], made.seen[f"{case} again"], strict=True)
    )


def test_beginnings_shared_before_a_choice_by_own_attention(models):
    """Another question about another picture after the same words: the shared words' keys count in the attention that
    is run for the choice."""
    for family, model in models.items():
        recipe = recipe_for(
            model, (1, 2), (0.5, 0.25), method="custom", selections=[{"score": "own_last_token"}], reference="per_image"
        )
        if family == "llava":
            first, second = prompt(model, 9, picture(1), 5, seed=2), prompt(model, 9, picture(2), 5, seed=2)
        else:
            first, second = qwen_prompt(9, patches(8, 8, 1), 5, seed=2), qwen_prompt(9, patches(4, 6, 2), 5, seed=2)
        made = logits(model, [asked("first", first, recipe=recipe)])
        found = run(made, [asked("second", second, recipe=recipe)])["second"]
        assert found[-1].usage.cached_tokens == 8
        with patched(model, recipe):
            assert tokens(found) == generated(model, second)
        assert same({"second": made.seen["second"]}, logits(model, [asked("second", second, recipe=recipe)]).seen)


def test_what_is_dropped_before_the_first_layer_takes_no_page(models):
    model = models["llava"]
    recipe = recipe_for(model, (0,), (0.25,), method="custom", selections=[{"score": "none", "policy": "maxmin"}])
    made = engine(model)
    made.submit(asked("a", prompt(model, 3, picture(1), 5), recipe=recipe))
    made.step()
    assert [len(pages) for pages in made.scheduler.running[0].pages] == [-(-(9 + 4) // 4)] * 4
    assert torch.equal(torch.tensor(made.scheduler.running[0].usage().visual_by_layer), torch.full((4,), 4))
    made.abort("a")
    made.step()
    made.check_integrity()
