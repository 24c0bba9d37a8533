"""Pruning Qwen2.5-VL: three rotary axes, pictures of several sizes, text-only rows; against recomputation without
cache, padding or hooks."""

from __future__ import annotations

import pytest
import torch

from quota.core.recipe import kept_tokens
from quota.prune.greedy import even_sites
from quota.runtime.patch import patched
from tests.prune.recipes import KINDS, greedy, recipe_for, single, tiny_model
from tests.prune.recomputing import prompt_of, recompute
from tests.tiny import IMAGE_TOKEN, ROWS, qwen_inputs

MIXED = ROWS["qwen2_5_vl"]


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_model("qwen2_5_vl", kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request, models):
    return models[request.param]


def recipe(model, **fields):
    return recipe_for(model, **{"reference": "per_image", **fields})


SELECTIONS = {
    "maxmin": ((0,), (0.25,), [{"score": "none", "policy": "maxmin"}]),
    "grid": ((0, 2), (0.75, 0.25), [{"score": "none", "policy": "grid"}, {"policy": "grid", "grid_share": 0.5}]),
    "random": ((0, 2), (0.5, 0.25), [{"score": "random"}]),
    "last_token": ((1, 2), (0.5, 0.25), [{"score": "last_token"}, {"score": "own_last_token"}]),
    "cross_self": (
        (0, 1, 2),
        (0.75, 0.5, 0.25),
        [{"score": "none", "policy": "maxmin"}, {"score": "cross_self"}, {"score": "text", "policy": "mmr"}],
    ),
}


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_decodes_as_recomputed(model, name, policy):
    """Also before layer 0, where the cache holds less than the prompt: exact budgets per picture, decoding as
    recomputed, rows alone as in the batch."""
    candidates, keep, selections = SELECTIONS[name]
    inputs, table = qwen_inputs(model, rows=MIXED), model.get_input_embeddings()
    ids = inputs["input_ids"]
    plan = recipe(
        model, method="custom", candidates=candidates, keep=keep, selections=selections, position_policy=policy
    )
    with patched(model, plan) as handle:
        out = greedy(model, inputs, tokens=3)
        kept, lengths = dict(handle.kept), list(handle.cache_lengths)
        for row in range(len(MIXED)):
            greedy(model, single(inputs, row), tokens=1)
            assert all(
                torch.equal(kept[layer][row, inputs["attention_mask"][row].bool()], mask[0])
                for layer, mask in handle.kept.items()
            ), row
    prompt = ids.shape[1]
    assert [layer.stored for layer in out.past_key_values.layers if hasattr(layer, "stored")][-2:] == [
        n + 2 for n in lengths[-2:]
    ]
    assert out.past_key_values.get_seq_length() == prompt + 2, "generate counts the whole prompt"
    for row, counts in enumerate([[16], [6], [], [4, 12]]):
        for layer, ratio in zip(candidates, keep, strict=True):
            assert [int(p.sum()) for p in kept[layer][row, ids[row] == IMAGE_TOKEN].split(counts)] == [
                kept_tokens(ratio, v) for v in counts
            ], (layer, row)
        embeds, positions = prompt_of(model, single(inputs, row))
        own = {layer: mask[row, inputs["attention_mask"][row].bool()] for layer, mask in kept.items()}
        for step in range(3):
            fed = table(out.sequences[row, prompt : prompt + step])
            logits, got = (
                recompute(model, torch.cat([embeds, fed]), positions, own, policy == "compact"),
                out.scores[step][row],
            )
            finite = got.isfinite()
            torch.testing.assert_close(got[finite], logits[finite], rtol=1e-4, atol=2e-4)


def test_grid_spreads_over_the_pictures_own_shape(models):
    """A picture of 2 x 3 tokens keeps two places, one in each row; asked as a single row of six it would keep
    others."""
    model = models["quantized"]
    inputs = qwen_inputs(model, rows=((2, ((4, 6),), 3),))
    plan = recipe(
        model,
        method="custom",
        candidates=(0,),
        keep=(2 / 6,),
        selections=[{"score": "none", "policy": "grid", "grid_share": 1.0}],
    )
    with patched(model, plan) as handle, torch.no_grad():
        model(**inputs)
    places = handle.kept[0][0][inputs["input_ids"][0] == IMAGE_TOKEN].nonzero()[:, 0].tolist()
    assert places == [r * 3 + c for r, c in even_sites(2, 3, 2)] != [c for _, c in even_sites(1, 6, 2)]


def test_restarted_positions_would_be_noticed(models):
    """The comparison above can fail: decoding from the number of kept tokens instead of the unpruned counter gives
    other logits."""
    model = models["float"]
    inputs = qwen_inputs(model, rows=MIXED[:1])
    embeds, positions = prompt_of(model, inputs)
    with patched(model, recipe(model)) as handle:
        model(**inputs)
        own = {layer: mask[0] for layer, mask in handle.kept.items()}
    more = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([5]))])
    right = recompute(model, more, positions, own, False)
    wrong = recompute(model, more, positions, own, True)
    assert (right - wrong).abs().max() > 1e-2


def test_budgets_are_each_pictures_own(model):
    inputs = qwen_inputs(model, rows=MIXED)
    ids = inputs["input_ids"]
    with patched(model, recipe(model)) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.kept
    sizes = [[16], [6], [], [4, 12]]
    for layer, ratio in zip((1, 2, 3), (0.75, 0.5, 0.25), strict=True):
        for row, counts in enumerate(sizes):
            alive, visual = kept[layer][row], ids[row] == IMAGE_TOKEN
            assert bool(alive[~visual & inputs["attention_mask"][row].bool()].all())
            assert [int(part.sum()) for part in alive[visual].split(counts)] == [
                kept_tokens(ratio, v) for v in counts
            ], (layer, row)


def test_recorded_budgets_count_pictures(models):
    """V_ref 16 per picture: the row of two pictures (16 tokens) may keep all 32 * 0.5, the one of 16 keeps 8, the one
    of 6 all."""
    model, inputs = models["quantized"], qwen_inputs(models["quantized"], rows=MIXED)
    with patched(model, recipe(model, reference="recorded", candidates=(2,), keep=(0.5,))) as handle, torch.no_grad():
        model(**inputs)
        alive = handle.kept[2] & (inputs["input_ids"] == IMAGE_TOKEN)
    assert alive.sum(-1).tolist() == [8, 6, 0, 16]


def test_cached_and_cache_free_generation_agree(models):
    """With forced masks, generate(use_cache=False) recomputes each step from scratch: equal tokens; a table of angles
    per segment."""
    model = models["quantized"]
    inputs = qwen_inputs(model, rows=MIXED)
    with patched(model, recipe(model)) as handle:
        out = greedy(model, inputs)
        masks = dict(handle.kept)
    tables = [id(layer.angles) for layer in out.past_key_values.layers]
    assert len(set(tables)) == 4  # three drops: four segments
    with patched(model, recipe(model, candidates=(1, 3), keep=(0.5, 0.25))):
        assert len({id(layer.angles) for layer in greedy(model, inputs).past_key_values.layers}) == 3
    with patched(model, recipe(model), forced=masks):
        assert torch.equal(greedy(model, inputs, use_cache=False).sequences, out.sequences)
    with patched(model, recipe(model), forced={layer: mask.repeat_interleave(2, 0) for layer, mask in masks.items()}):
        beams = [greedy(model, inputs, num_beams=2, use_cache=use_cache).sequences for use_cache in (True, False)]
        assert torch.equal(*beams)
