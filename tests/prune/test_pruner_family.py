"""Pruning inside a model of every family, float and quantized, against a recomputation without cache, padding or
hooks."""

from __future__ import annotations

import pytest
import torch

from quota.models import FAMILIES
from quota.runtime.patch import patched
from tests.prune.recipes import KINDS, final_states, greedy, recipe_for, reference_of, single, tiny_model
from tests.prune.recomputing import prompt_of, recompute
from tests.tiny import ROWS, TINY

TOLERANCE = {"llava": 1e-4, "mistral3": 1e-4, "paligemma": 1e-4}  # 2e-4 elsewhere


def recipe(family, model, **fields):
    return recipe_for(model, **reference_of(family), **fields)


def batch(family, model):
    return TINY[family][1](model, rows=ROWS[family])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=KINDS)
def model(family, request):
    return tiny_model(family, request.param)


@pytest.mark.parametrize("policy", ["original", "compact"])
def test_generation_equals_recomputation(family, model, policy):
    inputs, table = batch(family, model), model.get_input_embeddings()
    with patched(model, recipe(family, model, position_policy=policy)) as handle:
        out = greedy(model, inputs, tokens=4)
        kept, lengths = dict(handle.kept), list(handle.cache_lengths)
    prompt = inputs["input_ids"].shape[1]
    assert lengths[0] == prompt > lengths[3]
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [n + 3 for n in lengths]
    for row in range(len(ROWS[family])):
        embeds, positions = prompt_of(model, single(inputs, row))
        own = {layer: mask[row, inputs["attention_mask"][row].bool()] for layer, mask in kept.items()}
        for step in range(4):
            fed = table(out.sequences[row, prompt : prompt + step])
            fed = torch.nn.functional.pad(fed, (0, embeds.shape[-1] - fed.shape[-1]))
            logits = recompute(model, torch.cat([embeds, fed]), positions, own, policy == "compact")
            got = out.scores[step][row]
            finite = got.isfinite()
            torch.testing.assert_close(got[finite], logits[finite], rtol=1e-4, atol=TOLERANCE.get(family, 2e-4))


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_alone_and_in_a_batch(family, kind, policy):
    """Prompts of several lengths: kept tokens and answers are those of the row alone, and quantized every bit of the
    decoder."""
    model = tiny_model(family, kind)
    inputs = batch(family, model)
    with patched(model, recipe(family, model, position_policy=policy)) as handle, final_states(model) as states:
        together = greedy(model, inputs).sequences[:, -5:]
        batched, kept = states[:], dict(handle.kept)
        for row in range(len(ROWS[family])):
            states.clear()
            alone = greedy(model, single(inputs, row)).sequences[:, -5:]
            real = inputs["attention_mask"][row].bool()
            assert all(torch.equal(kept[layer][row, real], mask[0]) for layer, mask in handle.kept.items()), row
            assert torch.equal(alone[0], together[row]), row
            if kind == "quantized":
                assert all(torch.equal(state[0], batched[step][row]) for step, state in enumerate(states)), row


def test_keeping_everything_changes_no_bit(family, model):
    inputs = batch(family, model)
    plain = greedy(model, inputs)
    with torch.no_grad(), patched(model, recipe(family, model, keep=(1.0, 1.0, 1.0))) as handle:
        logits, kept = model(**inputs).logits, greedy(model, inputs)
        assert all(bool((mask == inputs["attention_mask"].bool()).all()) for mask in handle.kept.values())
    again = greedy(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)
    for other in (kept, again):
        assert torch.equal(plain.sequences, other.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.scores, other.scores, strict=True))


def test_undo_restores_the_model(family, model):
    inputs = batch(family, model)
    with torch.no_grad():
        before = model(**inputs).logits
        with patched(model, recipe(family, model)):
            assert model(**inputs).logits.shape[1] < before.shape[1]
        assert torch.equal(model(**inputs).logits, before)
