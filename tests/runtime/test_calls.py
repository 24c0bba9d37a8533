"""State of a pruned call belongs to the call: however it is made, the same tokens stay and the answer is that of one
prefill, or the call is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, StaticCache

from quota.models import find_family
from quota.runtime.patch import patched
from tests.prune.recipes import greedy, recipe_for, single
from tests.runtime.calls import PROMPTS, TINY, TOKENS, generated, inputs_of, reference, refuse, same
from tests.tiny import IMAGE_TOKEN

# every way to call `generate` or the model: (rows of the batch, arguments, what is refused with which words)

EQUAL = {
    "plain": (2, {}),
    "no cache": (2, {"use_cache": False}),
    "assistant": (1, {"assistant_model": "float"}),
    "patched assistant": (1, {"assistant_model": "patched"}),
    "itself as assistant": (1, {"assistant_model": "self"}),
    "prompt lookup": (1, {"prompt_lookup_num_tokens": 3}),
    "own empty cache": (2, {"past_key_values": "empty"}),
    "dynamic cache by name": (2, {"cache_implementation": "dynamic"}),
    "one beam, two sequences": (2, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}),
    "own decoding loop": (2, {"custom_generate": "loop"}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_answers(pair, name, built):
    model, recipe = pair
    rows, options = EQUAL[name]
    for seed in PROMPTS if rows == 1 else PROMPTS[:1]:
        batch = inputs_of(model, seed)
        inputs = batch if rows == 2 else single(batch, 0)
        want, kept = reference(model, recipe, inputs)
        used = dict(options)
        with patched(model, recipe) as handle:
            assistant = {
                "float": lambda: TINY[find_family(model).name][0](seed=3),
                "self": lambda: model,
                "patched": lambda: assisting(model, recipe),
            }
            if "assistant_model" in used:
                used["assistant_model"] = assistant[used["assistant_model"]]()
            if "past_key_values" in used:
                used["past_key_values"] = DynamicCache()
            if "custom_generate" in used:
                used["custom_generate"] = loop
            if (
                name == "itself as assistant" and recipe.selection_at(3).score == "random"
            ):  # transformers shows an assistant no pictures
                refuse("pixel_values: the random score", lambda: generated(model, inputs, **used))  # noqa: B023
                continue
            ids = generated(model, inputs, **used)
            copies = len(ids) // rows
            assert torch.equal(ids, want.repeat_interleave(copies, 0)), (name, seed)
            assert same(handle.kept, {layer: mask.repeat_interleave(copies, 0) for layer, mask in kept.items()}), (
                name,
                seed,
            )


def assisting(model, recipe):
    """Another model of the same vocabulary that runs under a recipe of its own."""
    draft = TINY[find_family(model).name][0](seed=3)
    patched(draft, recipe_for(draft))
    return draft


def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A user's decoding loop."""
    outputs = model._prefill(input_ids, generation_config, kwargs)
    while True:
        scores = logits_processor(input_ids, outputs.logits[:, -1])
        input_ids = torch.cat([input_ids, scores.argmax(-1)[:, None]], 1)
        if bool(stopping_criteria(input_ids, scores).all()):
            return input_ids
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        outputs = model(**model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs))


def test_beams_with_and_without_a_cache(pair, beams=3):
    model, recipe = pair
    inputs = inputs_of(model)
    _, kept = reference(model, recipe, inputs)
    with patched(model, recipe) as handle:
        found = [generated(model, inputs, num_beams=beams, use_cache=use_cache) for use_cache in (True, False)]
        assert same(handle.kept, {layer: mask.repeat_interleave(beams, 0) for layer, mask in kept.items()})
    forced = {layer: mask.repeat_interleave(beams, 0) for layer, mask in kept.items()}
    with patched(model, recipe, forced=forced):
        want = generated(model, inputs, num_beams=beams, use_cache=False)
    assert torch.equal(found[0], want) and torch.equal(found[1], want)


REFUSED = {
    "chunked prefill": ({"prefill_chunk_size": 8}, "prefill_chunk_size: pruning ranks a whole prompt"),
    "chunked prefill by configuration": (
        {"generation_config": GenerationConfig(prefill_chunk_size=8)},
        "prefill_chunk_size: ",
    ),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation: expected none or 'dynamic'"),
    "quantized cache": ({"cache_implementation": "quantized"}, "cache_implementation: "),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "cache_implementation: "),
    "paged": ({"cache_implementation": "paged"}, "cache_implementation: "),
    "early exit": ({"assistant_early_exit": 2}, "assistant_early_exit: "),
    "token healing": ({"token_healing": True}, "token_healing: "),
    "embeddings": ({"inputs_embeds": torch.zeros(2, 3, 64)}, "inputs_embeds: expected input_ids"),
}


def test_refused_with_a_reason(model):
    inputs, plain = inputs_of(model), recipe_for(model)
    want, _ = reference(model, plain, inputs)
    with patched(model, plain):
        for options, message in REFUSED.values():
            refuse(message, lambda: generated(model, inputs, **options))  # noqa: B023
        assert torch.equal(generated(model, inputs), want)  # and nothing is left behind


def test_refused_by_the_model_s_own_configuration(model):
    model.generation_config.prefill_chunk_size = 8
    try:
        with patched(model, recipe_for(model)):
            refuse("prefill_chunk_size: ", lambda: generated(model, inputs_of(model)))
    finally:
        model.generation_config.prefill_chunk_size = None


def test_refused_forwards(model):
    inputs = inputs_of(model)
    with torch.no_grad():
        features = model.get_input_embeddings()(inputs["input_ids"])
        other = model(**inputs, use_cache=True).past_key_values  # filled without the recipe
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    one = {"input_ids": torch.tensor([[5], [6]])}
    with patched(model, recipe_for(model)), torch.no_grad():
        refuse("input_ids: expected token ids", lambda: model(inputs_embeds=features))
        refuse("input_ids: expected token ids", lambda: model.model.language_model(inputs_embeds=features))
        refuse("labels: ", lambda: model(**inputs, labels=inputs["input_ids"]))
        refuse("past_key_values: a static cache", lambda: model(**inputs, past_key_values=static))
        refuse(
            "past_key_values: expected a cache filled under this recipe", lambda: model(**one, past_key_values=other)
        )
        refuse(
            "attention_mask: .*padding", lambda: model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
        )
        own = model(**inputs, use_cache=True).past_key_values
    refuse("past_key_values: the cache holds a pruned prompt and no recipe", lambda: model(**one, past_key_values=own))
    with patched(model, recipe_for(model, keep=(0.5, 0.5, 0.5))):
        refuse("past_key_values: .*another recipe", lambda: model(**one, past_key_values=own))
    with patched(model, recipe_for(model)), torch.no_grad():  # the refusals took nothing away
        got = model(**one, past_key_values=copy.deepcopy(own)).logits
        assert torch.equal(got, model(**one, past_key_values=own).logits)


def test_gradient_checkpointing_is_refused_and_training_mode_is_not(built):
    for family in TINY:
        model = copy.deepcopy(built[family, "float"])
        inputs = inputs_of(model)
        with patched(model, recipe_for(model)) as handle:
            want, kept = model(**inputs).logits, handle.kept
            model.train()
            assert torch.equal(model(**inputs).logits, want) and same(handle.kept, kept)
            model.gradient_checkpointing_enable()
            refuse("gradient_checkpointing: ", lambda: model(**inputs))  # noqa: B023
            model.eval()
            assert torch.equal(model(**inputs).logits, want)


# conversations


@torch.no_grad()
def test_conversations_in_turns_do_not_meet(model):
    """Two chats on one model, turn about, the second turn through the cache: each as if it were alone."""
    plain = recipe_for(model)
    prompts = [single(inputs_of(model, seed=2), 0), single(inputs_of(model, seed=3), 1)]
    more = torch.tensor([[7, 8, 9]])
    with patched(model, plain) as handle:
        first = [greedy(model, inputs, tokens=3) for inputs in prompts]
        second, lookups = [], []
        for turn in first:
            ids = torch.cat([turn.sequences, more], 1)
            kept = turn.past_key_values
            second.append(
                generated(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, past_key_values=kept)
            )
            lookups.append(
                lambda ids=ids, kept=kept: generated(
                    model, {"input_ids": ids}, past_key_values=kept, prompt_lookup_num_tokens=2
                )
            )
        refuse("past_key_values: drafted decoding", lookups[0])
    for inputs, turn, got in zip(prompts, first, second, strict=True):
        with patched(model, plain) as handle:
            model(**inputs)
            kept = dict(handle.kept)
        whole = {**inputs, "input_ids": torch.cat([turn.sequences, more], 1)}
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in whole:
                whole[name] = nn.functional.pad(
                    whole[name], (0, whole["input_ids"].shape[1] - whole[name].shape[1]), value=value
                )
        with patched(model, plain, forced=kept):
            assert torch.equal(generated(model, whole, use_cache=False), got)


@torch.no_grad()
def test_a_hand_made_loop_does_not_depend_on_other_calls(model):
    """Bare forwards with a cache, another prompt in between."""
    plain, inputs, between = recipe_for(model), single(inputs_of(model, seed=2), 0), single(inputs_of(model, seed=3), 1)
    want, _ = reference(model, plain, inputs)
    banned = [IMAGE_TOKEN, model.generation_config.eos_token_id]
    with patched(model, plain):
        out, ids = model(**inputs, use_cache=True), []
        for _ in range(TOKENS):
            out.logits[:, :, banned] = -torch.inf
            ids.append(out.logits[:, -1].argmax(-1)[:, None])
            model(**between)
            out = model(ids[-1], past_key_values=out.past_key_values, use_cache=True)
    assert torch.equal(torch.cat(ids, 1), want)
