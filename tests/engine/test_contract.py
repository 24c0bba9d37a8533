"""What the engine promises for every family and every scheme: answers of transformers' generate, and the same bits
under every kind of company."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import pytest
import torch

from quota.core.errors import UsageError
from quota.core.formats import DEFAULT, SCHEMES, WEIGHT_ONLY
from quota.models import FAMILIES, find_family
from quota.runtime.engine import Prompt
from quota.runtime.patch import patched
from tests.engine.asking import (
    IMAGE_TOKEN,
    asked,
    cases,
    engine,
    generated,
    logits,
    mixed_requests,
    pixels_of,
    quantized,
    recipes,
    run,
    same,
    tokens,
)

CASES = [
    *((family, DEFAULT) for family in FAMILIES),
    *(("llava", scheme) for scheme in SCHEMES.values() if scheme is not DEFAULT),
    ("qwen2_5_vl", WEIGHT_ONLY),  # key biases in the cache, three position axes
]


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{scheme.name}" for family, scheme in CASES])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def family(case):
    return case[0]


@pytest.fixture(scope="module")
def model(case):
    return quantized(*case)


@pytest.fixture(scope="module")
def mixed(case):
    return mixed_requests(*case)


@pytest.mark.parametrize("recipe", [None, "pruned", "compact"])
def test_agrees_with_generate(model, family, recipe):
    want = {}
    for name, case in cases(family).items():
        if recipe is None:
            want[name] = generated(model, case)
        else:
            with patched(model, recipes(model)[recipe]):
                want[name] = generated(model, case)
    asks = [asked(name, case) for name, case in cases(family).items()]
    alone = {ask.id: tokens(run(engine(model, default=recipe), [ask])[ask.id]) for ask in asks}
    assert alone == want
    for options in ({}, {"step_tokens": 5}):
        together = run(engine(model, default=recipe, **options), asks)
        assert {name: tokens(out) for name, out in together.items()} == want


def test_logits_do_not_depend_on_company(model, mixed):
    asks, alone = mixed
    assert same(logits(model, asks).seen, alone)
    assert same(logits(model, asks[::-1], max_running=3, step_tokens=11).seen, alone)
    assert same(logits(model, asks, page_tokens=7, prefix_cache=False).seen, alone)


def test_logits_survive_preemption(model, family):
    asks = [asked(name, case, tokens=30) for name, case in cases(family).items()]
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
    """Pages of a pruned prompt come with the positions of the tokens that were chosen: a bias of their keys turns with
    them."""
    asks, alone = mixed
    made = engine(model)
    for round in range(3):
        run(made, [replace(ask, id=f"{ask.id} {round}") for ask in asks])
    assert same(made.seen, {f"{name} {round}": seen for round in range(3) for name, seen in alone.items()})
    assert made.pool.idle_pages() > 0
    long = next(ask for ask in asks if ask.id == "long").prompt
    assert run(made, [asked("again", long)])["again"][-1].usage.cached_tokens > 41 + 16


@pytest.mark.parametrize("recipe", ["pruned", "compact"])
def test_chat_keeps_its_first_selection(model, family, recipe):
    """A second turn, sent as a whole prompt, from the cache of the first and without it."""
    first = cases(family)["two pictures"]
    with patched(model, recipes(model)[recipe]), torch.no_grad():
        ids = torch.tensor([list(first.ids)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels_of(model, first)}
        out = model.generate(**inputs, max_new_tokens=5, eos_token_id=None, pad_token_id=0, do_sample=False)
    answer = out[0, ids.shape[1] :].tolist()
    said = takewhile(lambda token: token != IMAGE_TOKEN, answer)  # as part of a prompt it would stand for an image
    second = Prompt([*first.ids, *said, 17, 33, 99, 41], first.images, len(first.ids))
    made = engine(model, default=recipe)
    if find_family(model).prefix:  # what the first turn computed is not what the second would compute of it
        with pytest.raises(UsageError, match=r"selection_tokens: expected all .* see each other"):
            made.submit(asked("second", second))
        return
    assert tokens(run(made, [asked("first", first, tokens=5)])["first"]) == answer
    warm = run(made, [asked("second", second, tokens=5)])["second"]
    assert warm[-1].usage.cached_tokens > len(first.ids) - 4
    cold = logits(model, [asked("second", second, tokens=5)], default=recipe, step_tokens=9)
    assert same({"second": made.seen["second"]}, cold.seen)
