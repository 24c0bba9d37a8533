"""Every method that is told to keep everything leaves every bit of the unpruned model: prompt, generated tokens,
logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quota.allocate.baselines import RecipeContext, SearchStats, build_baseline
from quota.allocate.fitprune import AttentionSample
from quota.allocate.recipe_builder import build_recipe
from quota.core.methods import METHODS, baselines
from quota.core.recipe import ModelFacts, Recipe
from quota.models import find_family, model_fingerprint
from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.allocate.profiles import profile
from tests.prune.recipes import greedy
from tests.tiny import llava_inputs, qwen_inputs, tiny_llava, tiny_qwen

MIXED = ((3, ((8, 8),), 5), (9, ((4, 6),), 4), (6, (), 2))  # two sizes and a row without a picture
KEEPERS = tuple(name for name in METHODS if name != "vtw")  # VTW always withdraws everything


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "llava float": tiny_llava(),
        "llava w4a4kv4": quantize_rtn(tiny_llava()),
        "qwen2_5_vl float": tiny_qwen(key_bias=20),
        "qwen2_5_vl w4a4kv4": quantize_rtn(tiny_qwen(key_bias=800)),
    }


def everything(model: Any, method: str, keep: float) -> Recipe:
    arch = find_family(model)
    facts = ModelFacts(
        architecture=type(model).__name__,
        fingerprint=model_fingerprint(model),
        layers=arch.layers,
        visual_tokens=16,
        hidden_size=64,
        kv_size=32,
        intermediate_size=128,
        head_dim=16,
        text_tokens=8,
    )
    reference = "recorded" if arch.visual_tokens else "per_image"
    if method not in baselines():
        return build_recipe(profile(arch.layers, model=facts), keep, layers="1-2", method=method, reference=reference)
    seen = np.random.default_rng(0).random((2, arch.layers, 16))
    return build_baseline(
        RecipeContext(facts, "w4a4kv4", reference=reference),
        method,
        keep,
        stats=SearchStats(attention=[AttentionSample(*seen)]),
    )


@pytest.mark.parametrize("method", KEEPERS)
@pytest.mark.parametrize("name", ["llava float", "llava w4a4kv4", "qwen2_5_vl float", "qwen2_5_vl w4a4kv4"])
def test_keeping_everything_equals_the_unpruned_model_bit_for_bit(
    models: dict[str, Any], name: str, method: str
) -> None:
    model = models[name]
    inputs = llava_inputs(model) if name.startswith("llava") else qwen_inputs(model, rows=MIXED)
    plain = greedy(model, inputs, tokens=3)
    with patched(model, everything(model, method, 1.0)) as handle:
        whole = greedy(model, inputs, tokens=3)
        assert all(torch.equal(mask, inputs["attention_mask"].bool()) for mask in handle.kept.values()) and handle.kept
    assert torch.equal(plain.sequences, whole.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, whole.scores, strict=True))
    with patched(model, everything(model, method, 0.5)):  # and the comparison can fail
        assert not all(
            torch.equal(a, b) for a, b in zip(plain.scores, greedy(model, inputs, tokens=3).scores, strict=True)
        )
