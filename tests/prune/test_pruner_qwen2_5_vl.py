"""Pruning Qwen2.5-VL: three rotary axes, pictures of several sizes, text-only rows; against recomputation without
cache, padding or hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quota.core.recipe import kept_tokens
from quota.models.rtn import quantize_rtn
from quota.prune.greedy import even_sites
from quota.runtime.patch import patched
from tests.prune.recipes import final_states, greedy, recipe_for, single
from tests.tiny import IMAGE_TOKEN, qwen_inputs, tiny_qwen

MIXED = ((3, ((8, 8),), 5), (9, ((4, 6),), 4), (6, (), 2), (1, ((4, 4), (8, 6)), 3))


@pytest.fixture(scope="module")
def models():
    return {
        "float": tiny_qwen(key_bias=20),
        "quantized": quantize_rtn(tiny_qwen(key_bias=800)),
        "vision": quantize_rtn(tiny_qwen(), ("vision", "projector")),
    }


@pytest.fixture(params=("float", "quantized", "vision"))
def model(request, models):
    return models[request.param]


def recipe(model, **fields):
    return recipe_for(model, **{"reference": "per_image", **fields})


@torch.no_grad()
def prompt_of(model, inputs) -> tuple[Tensor, Tensor]:
    """Merged embeddings [S, hidden] and M-RoPE positions [3, S] of one row without padding."""
    seen: list[Tensor] = []
    text = model.model.language_model
    handle = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    asked = {name: inputs.get(name) for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    return seen[0][0], model.model.get_rope_index(**asked)[0][:, 0]


@torch.no_grad()
def recompute(model, embeds: Tensor, positions: Tensor, kept: dict[int, Tensor], compact: bool) -> Tensor:
    """Next-token logits [vocabulary]: embeds [S, hidden] of prompt and fed tokens, positions [3, prompt]; kept: layer
    -> alive prompt columns."""
    text = model.model.language_model
    fed = len(embeds) - positions.shape[1]
    positions = torch.cat(
        [positions, (positions.max() + 1 + torch.arange(fed)).expand(3, -1)], -1
    )  # the unpruned counter goes on
    hidden, columns = embeds[None], torch.arange(len(embeds))
    places = positions
    for number, layer in enumerate(text.layers):
        if number in kept:
            alive = torch.cat([kept[number], torch.ones(fed, dtype=torch.bool)])[columns]
            hidden, columns = hidden[:, alive], columns[alive]
            places = torch.arange(len(columns)).expand(3, -1) if compact else positions[:, columns]
        n = hidden.shape[1]
        mask = torch.zeros(1, 1, n, n).masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(torch.float32).min)
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=text.rotary_emb(hidden, position_ids=places[:, None])
        )
    return model.lm_head(text.norm(hidden))[0, -1]


@pytest.mark.parametrize("policy", ["original", "compact"])
def test_generation_equals_recomputation(model, policy):
    inputs = qwen_inputs(model, rows=MIXED)
    table = model.get_input_embeddings()
    with patched(model, recipe(model, position_policy=policy)) as handle:
        out = greedy(model, inputs, tokens=4)
        kept, lengths = dict(handle.kept), list(handle.cache_lengths)
    prompt = inputs["input_ids"].shape[1]
    assert lengths[0] == prompt > lengths[3] and [layer.get_seq_length() for layer in out.past_key_values.layers] == [
        n + 3 for n in lengths
    ]
    for row in range(len(MIXED)):
        alone, real = single(inputs, row), inputs["attention_mask"][row].bool()
        embeds, positions = prompt_of(model, alone)
        own = {layer: mask[row, real] for layer, mask in kept.items()}
        for step in range(4):
            fed = table(out.sequences[row, prompt : prompt + step])
            logits, got = (
                recompute(model, torch.cat([embeds, fed]), positions, own, policy == "compact"),
                out.scores[step][row],
            )
            finite = got.isfinite()
            torch.testing.assert_close(got[finite], logits[finite], rtol=1e-4, atol=2e-4)


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


def test_keeping_everything_changes_no_bit(model):
    inputs = qwen_inputs(model, rows=MIXED)
    plain = greedy(model, inputs)
    with patched(model, recipe(model, keep=(1.0, 1.0, 1.0))):
        kept = greedy(model, inputs)
    again = greedy(model, inputs)
    for other in (kept, again):
        assert torch.equal(plain.sequences, other.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, other.scores, strict=True))


def test_undo_restores_the_model(model):
    inputs = qwen_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        with patched(model, recipe(model)):
            assert model(**inputs).logits.shape[1] < before.shape[1]
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("policy", ["original", "compact"])
def test_rows_alone_and_in_a_batch(models, policy):
    """Mixed sizes, a text-only row, two pictures in one prompt: kept tokens and every bit of the decoder are those of
    the row alone."""
    model = models["quantized"]
    inputs = qwen_inputs(model, rows=MIXED)
    with patched(model, recipe(model, position_policy=policy)) as handle, final_states(model) as states:
        together = greedy(model, inputs).sequences[:, -5:]
        batched, kept = states[:], dict(handle.kept)
        for row in range(len(MIXED)):
            states.clear()
            alone = greedy(model, single(inputs, row)).sequences[:, -5:]
            real = inputs["attention_mask"][row].bool()
            assert all(torch.equal(kept[layer][row, real], mask[0]) for layer, mask in handle.kept.items())
            assert torch.equal(alone[0], together[row])
            assert all(torch.equal(state[0], batched[step][row]) for step, state in enumerate(states)), row


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
