"""Qwen2.5-VL in the engine: pictures of several sizes, three rotary axes, key biases outside the cache; against
generate, and bit for bit in any company."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quota.core.errors import UsageError
from quota.core.recipe import kept_tokens
from quota.models.images import ImageInput
from quota.models.rtn import quantize_rtn
from quota.runtime.engine import Prompt
from quota.runtime.patch import patched
from tests.engine.asking import (
    asked,
    engine,
    generated,
    logits,
    patches,
    pixels_of,
    qwen_prompt,
    recipes,
    run,
    same,
    tokens,
)
from tests.tiny import IMAGE_TOKEN, tiny_qwen


@pytest.fixture(scope="module")
def model():
    return quantize_rtn(tiny_qwen(key_bias=800))


@pytest.fixture(scope="module")
def prompts():
    a, b, c = patches(8, 8, 1), patches(4, 6, 2), patches(2, 14, 3)
    return {
        "text": qwen_prompt(9, seed=1),
        "one picture": qwen_prompt(3, a, 5, seed=2),
        "no text after": qwen_prompt(4, b, seed=3),
        "two sizes": qwen_prompt(2, a, 3, b, 6, seed=4),
        "neighbours": qwen_prompt(c, b, 7, seed=5),
        "long": qwen_prompt(40, a, 20, seed=6),
    }


@pytest.fixture(scope="module")
def mixed(model, prompts):
    """Requests of every kind, and the logits each has alone."""
    asks = [asked(name, case, tokens=7) for name, case in prompts.items()]
    asks.append(asked("unpruned", prompts["two sizes"], tokens=7, recipe=None))
    asks.append(asked("compact", prompts["two sizes"], tokens=7, recipe="compact", keep=0.3))
    asks.append(asked("sampled", prompts["neighbours"], tokens=7, temperature=1.2, top_p=0.9, seed=7))
    alone = {}
    for ask in asks:
        alone.update(logits(model, [ask]).seen)
    return asks, alone


@pytest.mark.parametrize("recipe", [None, "pruned", "compact"])
def test_agrees_with_generate(model, prompts, recipe):
    want = {}
    for name, case in prompts.items():
        if recipe is None:
            want[name] = generated(model, case)
        else:
            with patched(model, recipes(model)[recipe]):
                want[name] = generated(model, case)
    together = run(engine(model, default=recipe), [asked(name, case) for name, case in prompts.items()])
    assert {name: tokens(out) for name, out in together.items()} == want
    pieces = run(engine(model, default=recipe, step_tokens=5), [asked(name, case) for name, case in prompts.items()])
    assert {name: tokens(out) for name, out in pieces.items()} == want


@pytest.mark.parametrize("modules", [("llm",), ("vision", "projector", "llm")])
def test_models_without_key_biases_apart(modules):
    """A float tower; and a decoder whose biases went into the cache with the keys."""
    model = quantize_rtn(tiny_qwen(), modules)
    case = qwen_prompt(3, patches(4, 6, 1), 2, patches(4, 4, 2), 4)
    with patched(model, recipes(model)["pruned"]):
        want = generated(model, case)
    assert tokens(run(engine(model), [asked("a", case)])["a"]) == want


def test_logits_do_not_depend_on_company(model, mixed):
    asks, alone = mixed
    assert same(logits(model, asks).seen, alone)
    assert same(logits(model, asks[::-1], max_running=3, step_tokens=11).seen, alone)
    assert same(logits(model, asks, page_tokens=7, prefix_cache=False).seen, alone)


def test_logits_survive_preemption(model, prompts):
    asks = [asked(name, case, tokens=30) for name, case in prompts.items()]
    ample, tight = logits(model, asks), logits(model, asks, pages=175)
    assert tight.scheduler.preemptions > 0 == ample.scheduler.preemptions
    assert same(tight.seen, ample.seen)
    tight.pool.forget()
    assert tight.pool.available == tight.pool.blocks


def test_logits_do_not_depend_on_threads(model, mixed):
    asks, alone = mixed
    torch.set_num_threads(2)
    try:
        assert same(logits(model, asks).seen, alone)
    finally:
        torch.set_num_threads(1)


def test_logits_do_not_depend_on_what_was_cached(model, mixed):
    """Pages of a pruned prompt come with the positions of the tokens that were chosen: the bias of their keys turns
    with them."""
    asks, alone = mixed
    made = engine(model)
    for round in range(3):
        run(made, [replace(ask, id=f"{ask.id} {round}") for ask in asks])
    assert same(made.seen, {f"{name} {round}": seen for round in range(3) for name, seen in alone.items()})
    case = next(ask for ask in asks if ask.id == "long").prompt
    assert run(made, [asked("again", case)])["again"][-1].usage.cached_tokens > 41 + 16


@pytest.mark.parametrize("recipe", ["pruned", "compact"])
def test_chat_keeps_its_first_selection(model, recipe):
    first = qwen_prompt(3, patches(8, 8, 1), 4, patches(4, 6, 2), 6, seed=2)
    with patched(model, recipes(model)[recipe]):
        ids = torch.tensor([list(first.ids)])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **pixels_of(model, first),
            max_new_tokens=5,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
        )
    answer = out.sequences[0, ids.shape[1] :].tolist()
    second = Prompt([*first.ids, *answer, 17, 33, 99, 41], first.images, len(first.ids))
    made = engine(model, default=recipe)
    assert tokens(run(made, [asked("first", first, tokens=5)])["first"]) == answer
    warm = run(made, [asked("second", second, tokens=5)])["second"]
    assert warm[-1].usage.cached_tokens > len(first.ids) - 4
    assert same(
        {"second": made.seen["second"]},
        logits(model, [asked("second", second, tokens=5)], default=recipe, step_tokens=9).seen,
    )


def test_usage_counts_each_picture(model):
    usage = run(engine(model), [asked("a", qwen_prompt(3, patches(8, 8), 2, patches(4, 6), 5))])["a"][-1].usage
    assert (usage.visual_tokens, usage.prompt_tokens) == (22, 22 + 11 + 4)
    assert usage.visual_by_layer == (22, *(kept_tokens(r, 16) + kept_tokens(r, 6) for r in (0.75, 0.5, 0.25)))


def test_pictures_of_the_processor(model):
    grids = torch.tensor([[1, 8, 8], [1, 4, 6]])
    pixels = torch.randn(88, 96)
    first, second = engine(model).model.images({"pixel_values": pixels, "image_grid_thw": grids})
    assert first.grid == (1, 8, 8) and torch.equal(second.pixels, pixels[64:]) and engine(model).model.images({}) == ()


def test_refusals(model):
    made, good = engine(model), patches(4, 4)
    for image in (
        torch.zeros(3, 8, 8),
        ImageInput(good.pixels, (2, 2, 4)),
        ImageInput(good.pixels, (1, 3, 4)),
        ImageInput(good.pixels[:8], (1, 4, 4)),
    ):
        with pytest.raises(UsageError, match="image"):
            made.submit(asked("a", Prompt([122, *[IMAGE_TOKEN] * 4, 123, 5], [image])))
    with pytest.raises(UsageError, match="2 images"):  # nothing between them: which tokens are whose?
        made.submit(asked("a", Prompt([122, *[IMAGE_TOKEN] * 8, 123, 5], [good, good])))
    other = quantize_rtn(tiny_qwen())
    other.model.language_model.rotary_emb.inner.rope_type = "dynamic"
    with pytest.raises(UsageError, match="rope_type"):
        engine(other)
