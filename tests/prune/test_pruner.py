"""Pruning inside a LLaVA, float and quantized: equations, budgets, decoding, refusals; for all: test_pruner_family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quota import ops
from quota.core.errors import UsageError
from quota.core.recipe import kept_tokens
from quota.models.rtn import quantize_rtn
from quota.nn.attention import AttentionTrace
from quota.prune.attention import text_queries
from quota.prune.pruner import Pruner
from quota.prune.signals import combine, token_signals
from quota.runtime.patch import patched
from tests.prune.recipes import KINDS, assert_recomputing_agrees, greedy, recipe_for, single, tiny_model
from tests.prune.recomputing import embeddings
from tests.tiny import IMAGE_TOKEN, llava_inputs, tiny_llava

V = 16  # visual tokens of one tiny picture


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_model("llava", kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request, models):
    return models[request.param]


def test_kept_tokens_follow_the_equations(model):
    """The budget is eq. (5), the ranking eqs. (6)-(9) computed here from full attention matrices."""
    inputs = single(llava_inputs(model), 1)
    recipe = recipe_for(model)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    pruner = Pruner(model, recipe)
    pruner.keep_signals = True
    with torch.no_grad():
        model(**inputs)
    pruner.remove()
    assert [int((pruner.kept[l] & visual).sum()) for l in (1, 2, 3)] == [12, 8, 4]
    for l in (1, 2, 3):
        assert bool(pruner.kept[l][~visual].all())
    assert bool((pruner.kept[2] <= pruner.kept[1]).all()) and bool((pruner.kept[3] <= pruner.kept[2]).all())
    seen: dict[str, Tensor] = {}
    layers = model.model.language_model.layers
    handle = layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=args[0]), with_kwargs=True
    )
    probe = Pruner(
        model, recipe_for(model, candidates=(2,), keep=(0.5,))
    )  # leaves layer 1 unpruned, so its input is layer 0's output
    with torch.no_grad():
        model(**inputs)
    probe.remove()
    handle.remove()
    signals, hidden = pruner.signals[1], seen["hidden"]
    torch.testing.assert_close(signals["mag"][visual], hidden[visual].norm(dim=-1), rtol=1e-5, atol=1e-5)
    score = combine(signals, visual, recipe.weights, recipe.percentiles)
    best = torch.sort(score[visual], descending=True, stable=True).indices[:12].sort().values
    assert torch.equal(pruner.kept[1][visual].nonzero()[:, 0], best)


def test_attention_signals_equal_the_full_matrix(models):
    """inter and intra of the float model against softmax over the whole L x L matrix."""
    model = models["float"]
    inputs = single(llava_inputs(model), 0)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    text = text_queries(visual, torch.ones_like(visual))
    pruner = Pruner(model, recipe_for(model))
    pruner.keep_signals = True
    with torch.no_grad():
        model(**inputs)
        pruner.remove()
        embeds, lm = embeddings(model, inputs), model.model.language_model
        attention, x = lm.layers[0].self_attn, lm.layers[0].input_layernorm(embeds)
        q, k = (f(x).view(1, x.shape[1], -1, 16).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
        cos, sin = lm.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        n = x.shape[1]
        a = (
            (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4)
            .masked_fill(~torch.ones(n, n).tril().bool(), float("-inf"))
            .softmax(-1)
        )
    for name, rows in (("inter", text), ("intra", visual)):
        want = a[0][:, rows[0]].mean((0, 1))[visual[0]]
        torch.testing.assert_close(pruner.signals[1][name][visual], want, rtol=1e-4, atol=1e-6)


def test_quantized_risk_comes_from_the_deployed_quantizer(models):
    for name, model in models.items():
        layer, x = (
            model.model.language_model.layers[1],
            torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(5)),
        )
        normed = layer.input_layernorm(x)
        if name == "quantized":
            want = layer.self_attn.qkv_proj.quant_risk(normed)
        else:
            scale = normed.abs().amax(-1, keepdim=True) / 7
            want = (normed - (normed / scale).round().clamp(-8, 7) * scale).norm(dim=-1)
        trace = AttentionTrace(torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16), torch.zeros(1, 4, 3))
        mask = torch.ones(1, 3, dtype=torch.bool)
        torch.testing.assert_close(
            token_signals(trace, x, layer, mask, mask, quant=True)["quant"], want, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("policy", ["original", "compact"])
def test_cache_and_no_cache_agree_bit_for_bit_when_quantized(models, policy):
    model = models["quantized"]
    inputs = llava_inputs(model)
    recipe = recipe_for(model, position_policy=policy)
    assert_recomputing_agrees(model, inputs, recipe)


def test_float_cache_and_no_cache_agree(models):
    model = models["float"]
    inputs = llava_inputs(model)
    with patched(model, recipe_for(model)) as handle:
        first = greedy(model, inputs)
        kept = dict(handle.kept)
    with patched(model, recipe_for(model), forced=kept):
        second = greedy(model, inputs, use_cache=False)
    assert torch.equal(first.sequences, second.sequences)
    for a, b in zip(first.scores, second.scores, strict=True):
        finite = a.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-4)


def test_mixed_batch_of_text_one_image_and_two(model):
    """Rows: text only, one picture, two pictures with text between; the budget counts pictures."""
    g = torch.Generator().manual_seed(4)
    words = lambda n: torch.randint(3, 119, (n,), generator=g)  # noqa: E731
    image = torch.full((V,), IMAGE_TOKEN)
    rows = [
        torch.cat([torch.tensor([1]), words(6)]),
        torch.cat([torch.tensor([1]), image, words(4)]),
        torch.cat([words(2), image, words(3), image, words(2)]),
    ]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(r)).long(), r]) for r in rows])
    mask = torch.stack([torch.cat([torch.zeros(longest - len(r)), torch.ones(len(r))]) for r in rows]).long()
    pixels = torch.randn(3, 3, 56, 56, generator=g)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    parts = [
        {"input_ids": rows[0][None], "attention_mask": torch.ones(1, len(rows[0])).long()},
        {"input_ids": rows[1][None], "attention_mask": torch.ones(1, len(rows[1])).long(), "pixel_values": pixels[:1]},
        {"input_ids": rows[2][None], "attention_mask": torch.ones(1, len(rows[2])).long(), "pixel_values": pixels[1:]},
    ]
    with patched(model, recipe_for(model)) as handle:
        together, kept = greedy(model, batch).sequences[:, -5:], dict(handle.kept)
        counts = [[int((kept[l][r] & (ids[r] == IMAGE_TOKEN)).sum()) for l in (1, 2, 3)] for r in range(3)]
        assert counts == [[0, 0, 0], [12, 8, 4], [24, 16, 8]]
        for row, inputs in enumerate(parts):
            assert torch.equal(greedy(model, inputs).sequences[0, -5:], together[row])
            assert all(torch.equal(handle.kept[l][0], kept[l][row, mask[row].bool()]) for l in (1, 2, 3))


def test_image_last_and_image_first(model):
    for rows in (((4, 0),), ((0, 6),)):
        inputs = llava_inputs(model, rows=rows)
        with patched(model, recipe_for(model)) as handle:
            greedy(model, inputs)
            assert [int(handle.kept[l].sum()) - sum(rows[0]) - 1 for l in (1, 2, 3)] == [12, 8, 4]


def test_text_only_prompt_is_untouched(model):
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6, 7], [0, 1, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    plain = greedy(model, inputs).sequences
    with patched(model, recipe_for(model)) as handle:
        assert torch.equal(greedy(model, inputs).sequences, plain)
        assert handle.cache_lengths == [4] * 4


def test_fewer_visual_tokens_than_the_budget(model):
    """A recipe for 160 tokens per picture keeps 16 of them whole until its ratio falls below a tenth."""
    inputs = llava_inputs(model)
    visual = inputs["input_ids"] == IMAGE_TOKEN
    with patched(model, recipe_for(model, keep=(0.5, 0.1, 0.05), reference_tokens=160)) as handle:
        greedy(model, inputs)
        assert [int((handle.kept[l] & visual).sum()) for l in (1, 2, 3)] == [32, 32, 16]
    with patched(
        model, recipe_for(model, keep=(0.5, 0.1, 0.05), reference_tokens=160, reference="per_image")
    ) as handle:
        greedy(model, inputs)
        assert [int((handle.kept[l] & visual).sum()) for l in (1, 2, 3)] == [
            2 * kept_tokens(r, V) for r in (0.5, 0.1, 0.05)
        ]


def test_candidates_need_not_be_neighbours(model):
    inputs = llava_inputs(model)
    with patched(model, recipe_for(model, candidates=(1, 3), keep=(0.5, 0.25))) as handle:
        greedy(model, inputs)
        s = inputs["input_ids"].shape[1]
        assert handle.cache_lengths == [s, s - 8, s - 8, s - 12]


def test_beam_search_prompt_lookup_and_second_turn(model):
    inputs, recipe = llava_inputs(model), recipe_for(model)
    with patched(model, recipe) as handle:
        beams = greedy(model, inputs, num_beams=3).sequences
        kept = {layer: mask for layer, mask in handle.kept.items()}
        alone = single(inputs, 0)
        plain = greedy(model, alone)
        assert torch.equal(greedy(model, alone, prompt_lookup_num_tokens=2).sequences, plain.sequences)
        # a second turn goes on with the pruned cache: equal to deciding the same tokens one by one
        more = torch.cat([plain.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = greedy(
            model, {"input_ids": more, "attention_mask": torch.ones_like(more)}, past_key_values=plain.past_key_values
        )
        cache = model(**alone, use_cache=True).past_key_values
        for t in range(alone["input_ids"].shape[1], more.shape[1]):
            last = model(
                more[:, t : t + 1],
                attention_mask=torch.ones(1, t + 1),
                position_ids=torch.tensor([[t]]),
                past_key_values=cache,
                use_cache=True,
            )
        assert int(last.logits[0, -1].argmax()) == int(turn.scores[0].argmax()) == int(turn.sequences[0, more.shape[1]])
    with patched(model, recipe, forced=kept):
        assert torch.equal(greedy(model, inputs, num_beams=3, use_cache=False).sequences, beams)


def test_what_is_refused(model):
    inputs = llava_inputs(model)
    with patched(model, recipe_for(model)):
        with pytest.raises(UsageError, match="padding_side"):
            model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
        with pytest.raises(UsageError, match="prefill_chunk_size"):
            greedy(model, inputs, prefill_chunk_size=8)
        with pytest.raises(UsageError, match="cache_implementation"):
            greedy(model, inputs, cache_implementation="static")
        with pytest.raises(UsageError, match="labels"):
            model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(UsageError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 64))
        with pytest.raises(UsageError, match="ready-made"):
            model(**{**inputs, "attention_mask": torch.ones(2, 1, 30, 30).bool()})
        ids, cut = inputs["input_ids"], 20
        cache = model(
            **{**inputs, "pixel_values": None, "input_ids": ids.where(ids != IMAGE_TOKEN, 5)}, use_cache=True
        ).past_key_values
        with pytest.raises(UsageError, match="image tokens arrived"):
            model(ids[:, :cut], past_key_values=cache, pixel_values=None, use_cache=True)


def test_ties_go_to_the_lower_index_and_threads_change_nothing(models):
    model = models["quantized"]
    inputs, found = llava_inputs(model), []
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    before = torch.get_num_threads()
    with patched(model, recipe_for(model)) as handle:
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append((greedy(model, inputs).sequences, dict(handle.kept)))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][l], found[1][1][l]) for l in (1, 2, 3))
    eligible = torch.ones(1, 5, dtype=torch.bool)
    assert ops.token_select(torch.zeros(1, 5), eligible, torch.tensor([2]))[0].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_eager_attention_and_bfloat16():
    model = tiny_llava()
    inputs = llava_inputs(model)
    want = greedy(model, inputs).sequences
    with patched(model, recipe_for(model)) as handle:
        pruned, kept = greedy(model, inputs).sequences, dict(handle.kept)
    model.set_attn_implementation("eager")
    assert torch.equal(greedy(model, inputs).sequences, want)
    with patched(model, recipe_for(model)) as handle:
        assert torch.equal(greedy(model, inputs).sequences, pruned)
        assert all(torch.equal(handle.kept[l], kept[l]) for l in kept)
    low = quantize_rtn(model.to(torch.bfloat16))
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with patched(low, recipe_for(low)) as handle:
        greedy(low, inputs)
        assert handle.cache_lengths == [30, 26, 22, 18]
