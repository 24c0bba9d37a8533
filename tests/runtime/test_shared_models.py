"""One model, several threads, copies and exceptions: calls of a pruned model do not meet."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import quota
from quota.core.errors import CheckpointError
from quota.models.rtn import quantize_rtn
from quota.prune.pruner import Pruner
from quota.runtime.patch import patched
from tests.prune.recipes import recipe_for, single
from tests.runtime.calls import TINY, generated, inputs_of, placed, reference, refuse, same
from tests.tiny import IMAGE_TOKEN

# threads

THREADS = 4


def lockstep(model, barrier: threading.Barrier) -> list:
    """Every prefill waits for the others at the embedding and in every layer, so that all of them are always between
    the same two steps."""

    def wait(module, args):
        if args[0].shape[1] > 1:
            barrier.wait(120)

    return [
        part.register_forward_pre_hook(wait)
        for part in (model.get_input_embeddings(), *(layer.mlp for layer in model.model.language_model.layers))
    ]


def together(barrier: threading.Barrier, calls: list) -> list:
    def guarded(call):
        try:
            return call()
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(calls)) as pool:
        done = [pool.submit(guarded, call) for call in calls]
    for call in sorted(
        done, key=lambda call: isinstance(call.exception(), threading.BrokenBarrierError)
    ):  # the cause before what it cut short
        call.result()
    return [call.result() for call in done]


@pytest.mark.parametrize("lengths", ["equal", "different"])
def test_threads_share_a_model(pair, lengths):
    """Four prompts at once. Where they are equally long, a mixed-up choice raises nothing: picks are compared."""
    model, recipe = pair
    prompts = [
        inputs_of(model, seed) if lengths == "equal" or seed % 2 else single(inputs_of(model, seed), 0)
        for seed in range(THREADS)
    ]
    want = [reference(model, recipe, inputs) for inputs in prompts]
    barrier = threading.Barrier(THREADS)
    with patched(model, recipe) as handle:
        hooks = lockstep(model, barrier)

        def call(inputs):
            ids = generated(model, inputs)
            barrier.wait(120)  # all have finished before the first one looks
            return ids, dict(handle.kept), list(handle.cache_lengths)

        try:
            found = together(barrier, [lambda inputs=inputs: call(inputs) for inputs in prompts])
        finally:
            for hook in hooks:
                hook.remove()
        assert not handle.kept and not handle.cache_lengths  # this thread asked nothing
    for inputs, (ids, kept, lengths_seen), (right, right_kept) in zip(prompts, found, want, strict=True):
        assert (
            same(kept, right_kept)
            and torch.equal(ids, right)
            and (0 in kept or lengths_seen[0] == inputs["input_ids"].shape[1])
        )
    assert any(not same(kept, want[0][1]) for _, kept in want[1:])  # a mixed-up choice would show


def test_threads_share_a_quantized_model_without_a_recipe(built):
    for family in TINY:
        model = built[family, "quantized"]
        prompts = [inputs_of(model, seed) for seed in range(THREADS)]
        want, barrier = [generated(model, inputs) for inputs in prompts], threading.Barrier(THREADS)
        hooks = lockstep(model, barrier)
        try:
            found = together(barrier, [lambda inputs=inputs: generated(model, inputs) for inputs in prompts])  # noqa: B023
        finally:
            for hook in hooks:
                hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# exceptions


@pytest.mark.parametrize("tokens", [0, 1], ids=["prefill", "decode"])
def test_a_call_after_an_exception(pair, tokens):
    model, recipe = pair
    inputs = inputs_of(model)
    want, kept = reference(model, recipe, inputs)
    with patched(model, recipe) as handle:
        cache, steps = DynamicCache(), []

        def fail(module, args):
            steps.append(0)
            if len(steps) > tokens:
                raise RuntimeError("cut off")

        hook = model.model.language_model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="cut off"):
            generated(model, inputs, past_key_values=cache)
        hook.remove()
        refuse("past_key_values: .*not finished", lambda: model(torch.tensor([[5], [6]]), past_key_values=cache))
        assert torch.equal(generated(model, inputs), want) and same(handle.kept, kept)
        cache.reset()
        assert torch.equal(generated(model, inputs, past_key_values=cache), want)


def test_an_emptied_cache_remembers_nothing(model):
    """Cropped to nothing, then filled with a prompt that is not pruned."""
    inputs, text = inputs_of(model), {"input_ids": torch.tensor([[1, 5, 6, 7], [1, 7, 8, 9]])}
    for policy in ("original", "compact"):
        with patched(model, recipe_for(model, position_policy=policy)), torch.no_grad():
            want = generated(model, text)
            cache = model(**inputs, use_cache=True).past_key_values
            cache.crop(-cache.get_seq_length())
            for layer in cache.layers:
                layer.crop(-layer.get_seq_length())
            assert torch.equal(generated(model, text, past_key_values=cache), want)


# copies


def test_deep_copies_are_models_of_their_own(pair):
    model, recipe = pair
    inputs = inputs_of(model)
    want, kept = reference(model, recipe, inputs)
    with patched(model, recipe) as handle:
        generated(model, inputs)
        twin = copy.deepcopy(model)
        assert twin.quota_handle is not handle and twin.quota_handle.model is twin and not twin.quota_handle.kept
    assert torch.equal(generated(twin, inputs), want) and same(twin.quota_handle.kept, kept)
    bare = generated(model, inputs)
    model.get_output_embeddings().weight.data.neg_()
    try:
        assert torch.equal(generated(twin, inputs), want)  # its own weights
    finally:
        model.get_output_embeddings().weight.data.neg_()
    twin.quota_handle.undo()
    assert torch.equal(generated(twin, inputs), bare) and not hasattr(twin, "quota_handle")
    assert twin.config.get_text_config()._attn_implementation == model.config.get_text_config()._attn_implementation


def test_pickling_is_refused(model):
    with patched(model, recipe_for(model)):
        for thing in (model, model.model, model.quota_handle):
            refuse(r"pickle: .*quota\.load", lambda: pickle.dumps(thing))  # noqa: B023


def test_a_copied_layer_carries_its_hooks_and_no_model(model):
    with patched(model, recipe_for(model)):
        layer = copy.deepcopy(model.model.language_model.layers[0])
        assert not any(
            isinstance(getattr(part, "__self__", None), nn.Module)
            for hook in layer._forward_pre_hooks.values()
            for part in (hook, hook.func)
        )


# installing


def test_one_recipe_at_a_time(model):
    with patched(model, recipe_for(model)):
        refuse("recipe: one is already installed", lambda: patched(model, recipe_for(model)))
        refuse("recipe: one is already installed", lambda: Pruner(model, recipe_for(model)))
    pruner = Pruner(model, recipe_for(model))
    refuse("recipe: one is already installed", lambda: patched(model, recipe_for(model)))
    pruner.remove()
    patched(model, recipe_for(model)).undo()
    assert not hasattr(model, "quota_handle")


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), nn.Sequential(), None, "a folder", 3])
def test_what_is_no_supported_model(built, thing):
    with pytest.raises(CheckpointError, match="model_type: expected one of") as caught:
        quota.patched(thing, recipe_for(built["llava", "float"]))
    assert "\n" not in str(caught.value)


def test_parts_of_a_model_are_refused(built):
    for family in TINY:
        model = built[family, "float"]
        with pytest.raises(CheckpointError, match=r"ForConditionalGeneration model"):
            quota.patched(model.model, recipe_for(model))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [("llava", "float"), ("qwen2_5_vl", "quantized")])
def test_compiled(family, kind):
    """Compiling takes seconds per layer: two layers and one selection between them."""
    made = TINY[family][0](layers=2)
    model = quantize_rtn(made) if kind == "quantized" else made
    inputs, plain = placed(inputs_of(model)), recipe_for(model, (1,), (0.5,))
    want, kept = reference(model, plain, inputs)
    with patched(model, plain) as handle, torch.no_grad():
        logits = torch.compile(model, backend="eager")(**inputs).logits[:, -1]
        torch._dynamo.reset()
        logits[:, [IMAGE_TOKEN, 2]] = -torch.inf
        assert torch.equal(logits.argmax(-1), want[:, 0]) and same(handle.kept, kept)
