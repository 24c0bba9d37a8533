from __future__ import annotations

import pytest
import torch

import quota
from quota.core.errors import RecipeError, UsageError
from quota.models.rtn import quantize_rtn
from quota.runtime.patch import patched
from tests.prune.recipes import greedy, recipe_for
from tests.tiny import llava_inputs, tiny_llava


@pytest.fixture(scope="module", params=["float", "quantized"])
def model(request):
    return tiny_llava() if request.param == "float" else quantize_rtn(tiny_llava())


def hooks(model) -> int:
    """Every pre-hook, and forward hooks; transformers adds its own at the first forward, so count after one."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_undo_restores_everything(model):
    inputs = llava_inputs(model)
    before = greedy(model, inputs)
    own, attributes = hooks(model), set(model.__dict__)
    attention = model.model.language_model.config._attn_implementation
    with patched(model, recipe_for(model)) as handle:
        pruned = greedy(model, inputs).sequences
        assert handle.installed and model.quota_handle is handle and hooks(model) > own
    assert not handle.installed and hooks(model) == own and set(model.__dict__) == attributes
    assert model.model.language_model.config._attn_implementation == attention
    after = greedy(model, inputs)
    assert torch.equal(before.sequences, after.sequences) and not torch.equal(before.sequences, pruned)
    assert all(torch.equal(a, b) for a, b in zip(before.scores, after.scores, strict=True))
    handle.undo()  # harmless


def test_undo_after_an_error(model):
    own = hooks(model)
    with pytest.raises(RuntimeError), patched(model, recipe_for(model)):
        raise RuntimeError
    assert hooks(model) == own and not hasattr(model, "quota_handle")


def test_same_run_twice_and_after_reinstalling(model):
    inputs, recipe, seen = llava_inputs(model), recipe_for(model), []
    for _ in range(2):
        with patched(model, recipe) as handle:
            for _ in range(2):
                seen.append((greedy(model, inputs).sequences, dict(handle.kept)))
    assert all(torch.equal(s, seen[0][0]) and all(torch.equal(k[l], seen[0][1][l]) for l in k) for s, k in seen)


def test_pruned_cache_is_smaller(model):
    inputs = llava_inputs(model)
    full = greedy(model, inputs).past_key_values
    with patched(model, recipe_for(model)):
        small = greedy(model, inputs).past_key_values
    lengths = [[layer.get_seq_length() for layer in cache.layers] for cache in (full, small)]
    assert lengths == [[34] * 4, [34, 30, 26, 22]]
    from quota.nn.cache import kv_bytes

    assert sum(kv_bytes(small)) * sum(lengths[0]) == sum(kv_bytes(full)) * sum(lengths[1])


def test_recipe_from_a_file_and_through_the_package(model, tmp_path):
    recipe = recipe_for(model)
    recipe.save(tmp_path / "recipe.json")
    with quota.patched(model, str(tmp_path / "recipe.json")) as handle:
        assert handle.recipe == recipe
    with pytest.raises(RecipeError, match="cannot be read"):
        patched(model, tmp_path / "none.json")
    with pytest.raises(RecipeError, match="expected a Recipe"):
        patched(model, {"keep": 1})


def test_wrong_recipes(model):
    with pytest.raises(RecipeError, match=r"model\.fingerprint"):
        patched(model, recipe_for(tiny_llava(seed=9)))
    recipe = recipe_for(model)
    longer = recipe.model_copy(update={"model": recipe.model.model_copy(update={"layers": 9})})
    with pytest.raises(RecipeError, match="9 decoder layers"):
        patched(model, longer)
    with patched(model, recipe), pytest.raises(UsageError, match="already installed"):
        patched(model, recipe)
    with pytest.raises(UsageError, match=r"missing \[2, 3\]"):
        patched(model, recipe, forced={1: torch.ones(1, 3).bool()})


def test_another_architecture():
    from quota.core.errors import CheckpointError

    text = tiny_llava().model.language_model
    with pytest.raises(CheckpointError, match="llava"):
        patched(text, recipe_for(tiny_llava()))
