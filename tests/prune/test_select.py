"""Every selection inside a model, float and quantized: exact budgets, the same choice alone and in a batch, and
decoding that equals recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quota.core.errors import RecipeError, UsageError
from quota.core.recipe import Recipe
from quota.models.images import ImageTokens
from quota.models.rtn import quantize_rtn
from quota.prune.alive import Alive
from quota.prune.attention import text_queries
from quota.prune.select import choose
from quota.runtime.patch import patched
from tests.prune.recipes import assert_recomputing_agrees, greedy, recipe_for, single
from tests.prune.recomputing import embeddings, prompt_of, recompute
from tests.tiny import IMAGE_TOKEN, llava_inputs, tiny_llava

V = 16
METHODS = {
    "fastv": dict(candidates=(2,), keep=(0.5,), selections=[{"score": "last_token"}]),
    "pyramiddrop": dict(candidates=(1, 2, 3), keep=(0.5, 0.25, 0.125), selections=[{"score": "own_last_token"}]),
    "text": dict(candidates=(1, 3), keep=(0.5, 0.25), selections=[{"score": "text"}]),
    "vtw": dict(candidates=(2,), keep=(0.0,), method="vtw", selections=[{"score": "none"}]),
    "divprune": dict(candidates=(0,), keep=(0.25,), selections=[{"score": "none", "policy": "maxmin"}]),
    "cdpruner": dict(candidates=(0,), keep=(0.25,), selections=[{"score": "relevance", "policy": "dpp"}]),
    "random": dict(candidates=(0,), keep=(0.5,), selections=[{"score": "random"}]),
    "random_inside": dict(candidates=(1, 2), keep=(0.5, 0.25), selections=[{"score": "random"}]),
    "grid": dict(candidates=(0,), keep=(0.25,), selections=[{"score": "none", "policy": "grid"}]),
    "grid_floor": dict(candidates=(1, 2), keep=(0.75, 0.25), selections=[{"policy": "grid", "grid_share": 0.5}]),
    "kcenter": dict(candidates=(1, 2, 3), keep=(0.75, 0.5, 0.25), selections=[{"policy": "kcenter"}]),
    "mmr": dict(candidates=(1, 2, 3), keep=(0.75, 0.5, 0.25), selections=[{"policy": "mmr"}]),
    "fitprune": dict(candidates=(1, 2, 3), keep=(0.75, 0.5, 0.25), selections=[{"score": "cross_self"}]),
    "mixed": dict(
        candidates=(0, 2, 3),
        keep=(0.75, 0.5, 0.25),
        selections=[{"score": "none", "policy": "maxmin"}, {}, {"score": "last_token"}],
    ),
}


@pytest.fixture(scope="module")
def models():
    return {"float": tiny_llava(), "quantized": quantize_rtn(tiny_llava())}


@pytest.fixture(params=("float", "quantized"))
def model(request, models):
    return models[request.param]


def method_recipe(model, name: str, **changes: object) -> Recipe:
    fields = {**METHODS[name], **changes}
    return recipe_for(model, **{"method": "custom", **fields})


def visual_kept(handle, inputs) -> dict[int, list[int]]:
    visual = inputs["input_ids"] == IMAGE_TOKEN
    return {layer: (mask & visual).sum(-1).tolist() for layer, mask in handle.kept.items()}


@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, "original") for name in METHODS), *((name, "compact") for name in ("pyramiddrop", "divprune", "mixed"))],
)
def test_decoding_equals_recomputation(model, name, policy):
    """Exact budgets; then prefill plus decode against a forward without cache, padding or hooks. Cache lengths are
    those of the tokens alive."""
    inputs = llava_inputs(model, rows=((3, 5), (9, 4), (0, 2)))
    table = model.get_input_embeddings()
    recipe = method_recipe(model, name, position_policy=policy)
    with patched(model, recipe) as handle:
        out = greedy(model, inputs, tokens=3)
        kept, lengths = dict(handle.kept), list(handle.cache_lengths)
        assert visual_kept(handle, inputs) == {c: [recipe.tokens_at(c)] * 3 for c in recipe.candidates}
    prompt = inputs["input_ids"].shape[1]
    stored = [
        layer.stored if hasattr(layer, "stored") else layer.get_seq_length() for layer in out.past_key_values.layers
    ]
    assert stored == [n + 2 for n in lengths] == [prompt - V + recipe.tokens_at(i) + 2 for i in range(4)]
    assert out.past_key_values.get_seq_length() == prompt + 2, "generate counts the whole prompt"
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        embeds, positions = prompt_of(model, single(inputs, row))
        own = {layer: mask[row, real] for layer, mask in kept.items()}
        for step in range(3):
            fed = out.sequences[row, prompt : prompt + step]
            logits = recompute(model, torch.cat([embeds, table(fed)]), positions, own, policy == "compact")
            got = out.scores[step][row]
            finite = got.isfinite()
            torch.testing.assert_close(got[finite], logits[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_rows_alone_and_in_a_batch(model, name):
    inputs = llava_inputs(model, rows=((3, 5), (9, 4), (0, 1)))
    with patched(model, method_recipe(model, name)) as handle:
        together = greedy(model, inputs).sequences[:, -5:]
        kept = dict(handle.kept)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            assert torch.equal(greedy(model, single(inputs, row)).sequences[0, -5:], together[row])
            for layer, mask in handle.kept.items():
                assert torch.equal(mask[0], kept[layer][row, real]), (row, layer)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vtw"])
def test_keep_everything_is_bit_identical(model, name):
    inputs = llava_inputs(model)
    ones = tuple(1.0 for _ in METHODS[name]["keep"])
    with torch.no_grad():
        plain, logits = greedy(model, inputs).sequences, model(**inputs).logits
        with patched(model, method_recipe(model, name, keep=ones)) as handle:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(greedy(model, inputs).sequences, plain)
            assert all(bool((mask == inputs["attention_mask"].bool()).all()) for mask in handle.kept.values())


@pytest.mark.parametrize("name", METHODS)
def test_cache_and_no_cache_agree_bit_for_bit_when_quantized(models, name):
    model = models["quantized"]
    inputs = llava_inputs(model)
    recipe = method_recipe(model, name)
    assert_recomputing_agrees(model, inputs, recipe)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "pyramiddrop", "random", "mmr"])
def test_threads_do_not_show(models, name):
    model, before = models["quantized"], torch.get_num_threads()
    inputs = llava_inputs(model)
    seen = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with patched(model, method_recipe(model, name)) as handle, torch.no_grad():
                seen.append((model(**inputs).logits[:, -1], dict(handle.kept)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0][0], seen[1][0]) and all(
        torch.equal(seen[0][1][c], mask) for c, mask in seen[1][1].items()
    )


@pytest.mark.parametrize("name", ["divprune", "random", "grid"])
def test_a_stage_before_the_model_ignores_the_question(model, name):
    """The picture alone decides; so the same picture keeps the same places in another prompt."""
    first, second = llava_inputs(model, rows=((3, 5),)), llava_inputs(model, rows=((7, 2),))
    second["pixel_values"] = first["pixel_values"]
    with patched(model, method_recipe(model, name)) as handle, torch.no_grad():
        masks = []
        for inputs in (first, second):
            model(**inputs)
            masks.append(handle.kept[0][inputs["input_ids"] == IMAGE_TOKEN])
    assert torch.equal(*masks)


def test_random_follows_the_seed_and_the_picture(models):
    model = models["float"]
    inputs = llava_inputs(model)
    masks = []
    for seed in (0, 0, 1):
        with patched(model, method_recipe(model, "random", seed=seed)) as handle, torch.no_grad():
            model(**inputs)
            masks.append(handle.kept[0][inputs["input_ids"] == IMAGE_TOKEN].view(2, V))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1]), "another picture, other tokens"


def test_random_with_beams_and_without_pixels(models):
    model = models["float"]
    inputs = llava_inputs(model)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
    with patched(model, method_recipe(model, "random")) as handle:
        greedy(model, inputs)
        plain = handle.kept[0]
        model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        assert torch.equal(handle.kept[0], plain.repeat_interleave(2, 0))
        prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.no_grad():
            seen = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
            model(**prompt, mm_encoder_outputs={"image": seen})  # features carry what they show
        assert torch.equal(handle.kept[0], plain)
        with pytest.raises(UsageError, match="pixel_values: the random score"), torch.no_grad():
            model(**prompt, mm_encoder_outputs={"image": features})


def test_second_turn_continues_a_cache_pruned_before_the_model(model):
    """`generate` slices the new tokens by layer 0's reported length, which counts the tokens that were never cached."""
    inputs = llava_inputs(model, rows=((3, 5),))
    recipe = method_recipe(model, "mixed")
    with patched(model, recipe) as handle, torch.no_grad():
        first = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            suppress_tokens=[IMAGE_TOKEN],
        )
        kept = dict(handle.kept)
        more = torch.cat([first.sequences, torch.tensor([[17, 23, 31]])], dim=1)
        fed = dict(input_ids=more, attention_mask=torch.ones_like(more))
        second = greedy(model, fed, tokens=2, past_key_values=first.past_key_values)
    prompt, positions = prompt_of(model, inputs)
    embeds = torch.cat([prompt, model.get_input_embeddings()(more[0, inputs["input_ids"].shape[1] :])])
    own = {layer: mask[0] for layer, mask in kept.items()}
    got, logits = second.scores[0][0], recompute(model, embeds, positions, own)
    finite = got.isfinite()
    torch.testing.assert_close(got[finite], logits[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["divprune", "mixed", "vtw"])
def test_beams_and_cropping_keep_rows_together(model, name):
    inputs = llava_inputs(model)
    with patched(model, method_recipe(model, name)):
        one = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        for row in range(2):
            alone = model.generate(**single(inputs, row), max_new_tokens=4, num_beams=3, do_sample=False)
            new = alone[0, -4:]
            assert torch.equal(one[row, -len(new) :], new)
        lookup = model.generate(
            **single(inputs, 0),
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=[IMAGE_TOKEN],
            prompt_lookup_num_tokens=3,
        )
        plain = model.generate(**single(inputs, 0), max_new_tokens=8, do_sample=False, suppress_tokens=[IMAGE_TOKEN])
        assert torch.equal(lookup, plain)


def full_attention(model, layer: int, hidden: Tensor) -> Tensor:
    """[H, S, S] softmax rows of a float layer for unpruned input hidden [1, S, d]."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    lm = model.model.language_model
    attention, x = lm.layers[layer].self_attn, lm.layers[layer].input_layernorm(hidden)
    q, k = (f(x).view(1, x.shape[1], -1, 16).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *lm.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None]))
    n = x.shape[1]
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    return scores.masked_fill(~torch.ones(n, n).tril().bool(), float("-inf")).softmax(-1)[0]


@torch.no_grad()
def inputs_of(model, layer: int, inputs) -> Tensor:
    """Unpruned input of a decoder layer."""
    seen: list[Tensor] = []
    handle = model.model.language_model.layers[layer].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return seen[0]


@torch.no_grad()
def test_scores_are_what_their_papers_define(models):
    """FastV: layer K-1, last row. PyramidDrop: layer K's own projections, last row. FitPrune: head maximum of cross
    times self. Text: mean over text."""
    model = models["float"]
    inputs = single(llava_inputs(model), 0)
    visual = (inputs["input_ids"] == IMAGE_TOKEN)[0]
    text = text_queries(visual[None], torch.ones_like(visual)[None])[0]
    before, own = (full_attention(model, layer, inputs_of(model, layer, inputs)) for layer in (1, 2))
    cross = before[:, text][:, :, visual].amax(0).mean(0)
    itself = before[:, visual][:, :, visual].amax(0).mean(0)
    wanted = {
        "last_token": before[:, -1, visual].mean(0),
        "own_last_token": own[:, -1, visual].mean(0),
        "text": before[:, text][:, :, visual].mean((0, 1)),
        "cross_self": cross * itself,
    }
    for score, values in wanted.items():
        with patched(
            model, recipe_for(model, candidates=(2,), keep=(0.25,), method="custom", selections=[{"score": score}])
        ) as handle:
            model(**inputs)
            best = torch.sort(values, descending=True, stable=True).indices[:4].sort().values
            assert torch.equal(handle.kept[2][0][visual].nonzero()[:, 0], best), score


@torch.no_grad()
def test_divprune_and_cdpruner_work_on_the_merged_embeddings(models):
    model = models["float"]
    inputs = single(llava_inputs(model), 0)
    visual = (inputs["input_ids"] == IMAGE_TOKEN)[0]
    embeds = embeddings(model, inputs)[0].double()
    unit = embeds / embeds.norm(dim=-1, keepdim=True)
    distance = 1 - unit[visual] @ unit[visual].T
    apart = distance + torch.eye(V) * 9
    chosen = [int(apart.min(1).values.argmax())]
    while len(chosen) < 4:
        nearest = distance[:, chosen].min(1).values
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    with patched(model, method_recipe(model, "divprune")) as handle:
        model(**inputs)
        assert handle.kept[0][0][visual].nonzero()[:, 0].tolist() == sorted(chosen)
    words = text_queries(visual[None], torch.ones_like(visual)[None])[0]
    relevance = (unit[visual] @ unit[words].T).mean(1)
    recipe = method_recipe(model, "cdpruner", selections=[{"score": "relevance", "policy": "topk"}])
    with patched(model, recipe) as handle:
        model(**inputs)
        assert handle.kept[0][0][visual].nonzero()[:, 0].tolist() == relevance.topk(4).indices.sort().values.tolist()


def test_withdrawal_leaves_text_only(model):
    inputs = llava_inputs(model)
    with patched(model, method_recipe(model, "vtw")) as handle:
        greedy(model, inputs)
        assert visual_kept(handle, inputs) == {2: [0, 0]}
        assert handle.cache_lengths == [inputs["input_ids"].shape[1]] * 2 + [inputs["input_ids"].shape[1] - V] * 2


def test_text_only_rows_and_two_pictures(model):
    g = torch.Generator().manual_seed(4)
    image = torch.full((V,), IMAGE_TOKEN)
    words = torch.randint(3, 119, (24,), generator=g)
    rows = [
        words[:7],
        torch.cat([words[:1], image, words[:4]]),
        torch.cat([words[:2], image, words[2:5], image, words[:2]]),
    ]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(r)).long(), r]) for r in rows])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(r)), torch.ones(len(r))]) for r in rows]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 56, 56, generator=g)}
    for name in ("divprune", "random", "grid", "cdpruner", "mmr", "vtw"):
        with patched(model, method_recipe(model, name)) as handle:
            greedy(model, batch)
            last = METHODS[name]["candidates"][-1]
            one = METHODS[name]["keep"][-1] * V
            assert visual_kept(handle, batch)[last] == [0, one, 2 * one], name


def test_sets_have_budgets_of_their_own() -> None:
    """Two sets of one row, a policy each: what one keeps does not depend on the other's tokens."""
    g = torch.Generator().manual_seed(0)
    group = torch.tensor([[0] * 8 + [-1] + [1] * 8 + [-1]])
    picture = ImageTokens.of(group)
    ways = (
        {"policy": "maxmin", "score": "none"},
        {"policy": "dpp", "score": "relevance"},
        {"policy": "grid", "score": "none"},
        {"score": "relevance"},
    )
    column = torch.arange(18)[None]
    for selection in ways:
        recipe = recipe_for(tiny_llava(), candidates=(0,), keep=(0.5,), method="custom", selections=[selection])
        hidden = torch.randn(1, 18, 12, generator=g)
        other = hidden.clone()
        other[:, 9:17] = torch.randn(1, 8, 12, generator=g)
        kept = [
            choose(recipe, -1, Alive(x, group, column == 17, column, None, picture), torch.tensor([[3, 5]]))
            for x in (hidden, other)
        ]
        assert all([int((mask & (group == n)).sum()) for n in (0, 1)] == [3, 5] for mask in kept)
        assert torch.equal(kept[0][:, :8], kept[1][:, :8])


def test_recipes_that_cannot_work_say_so(models):
    model = models["float"]
    with pytest.raises(
        RecipeError,
        match="candidate 0 runs before any attention: expected score relevance, random, none, got 'quota'",
    ):
        recipe_for(model, candidates=(0,), keep=(0.5,))
    with pytest.raises(RecipeError, match="only method vtw withdraws every visual token"):
        recipe_for(model, candidates=(2,), keep=(0.0,), method="fastv")
    with pytest.raises(RecipeError, match=r"selections: expected none, one for all, or one per candidate \(3\), got 2"):
        recipe_for(model, selections=[{}, {}])
    with pytest.raises(RecipeError, match=r"selections\[0\]\.policy: .*got 'best'"):
        recipe_for(model, selections=[{"policy": "best"}])
