"""Several answers to one prompt: its pages are computed once, held by all, and copied before somebody writes on."""

from __future__ import annotations

import random

import pytest

from quota.models.rtn import quantize_rtn
from tests.engine.asking import asked, engine, logits, patches, picture, prompt, qwen_prompt, same
from tests.tiny import tiny_qwen


@pytest.fixture(scope="module")
def qwen():
    return quantize_rtn(tiny_qwen(key_bias=800))


def answers(case, n=4, tokens=9, **options):
    return [asked(str(i), case, tokens=tokens, temperature=1.5, seed=i, **options) for i in range(n)]


def together(made, asks):
    """Submit as one group and step to the end; the most units held at once."""
    made.submit_all(asks)
    most = 0
    while made.busy:
        made.step()
        made.check_integrity()
        most = max(
            most,
            sum(pages * layers for pages, layers in zip(made.pool.held_pages(), made.pool.segment_layers, strict=True)),
        )
    return most


def every_case(model, qwen):
    for recipe in ("pruned", "compact", None):
        yield model, prompt(model, 4, picture(1), 6, seed=2), recipe
        yield qwen, qwen_prompt(4, patches(8, 8, 1), 2, patches(4, 6), 3, seed=2), recipe


def test_bits_are_those_of_answers_given_alone(model, qwen):
    for served, case, recipe in every_case(model, qwen):
        asks, alone = answers(case, recipe=recipe), {}
        for ask in asks:
            alone.update(logits(served, [ask]).seen)
        for options in (
            {},
            {"prefix_cache": False, "page_tokens": 5},
            {"max_running": 2, "step_tokens": 9},
            {"pages": 90},
        ):
            made = engine(served, **options)
            together(made, asks)
            assert same(made.seen, alone), (recipe, options)
            made.pool.forget()
            assert made.pool.available == made.pool.blocks


def test_the_prompt_is_computed_and_held_once(model):
    case = prompt(model, 30, picture(1), 6, seed=2)
    one, four = engine(model), engine(model)
    single, group = together(one, answers(case, 1, tokens=4)), together(four, answers(case, 4, tokens=4))
    assert four.stats.prefill_rows == one.stats.prefill_rows
    assert group <= single + 3 * 2 * 4  # each further answer has its own last page in four layers, and perhaps the next


def test_the_last_holder_writes_in_place(model):
    made = engine(model)
    first, second = made.submit_all(answers(prompt(model, 5), 2))
    made.step()
    assert first.pages[0][-1] is second.pages[0][-1] and first.pages[0][-1].refs == 2
    shared = second.pages[0][-1]
    made.step()
    assert first.pages[0][1] is not shared and second.pages[0][1] is shared and shared.refs == 1


def test_who_leaves_leaves_the_others_alone(model):
    case = prompt(model, 4, picture(1), 9, seed=2)
    asks = answers(case, 4)
    whole = engine(model)
    together(whole, asks)
    for leaver in range(4):
        for after in (0, 1, 2, 5):
            made = engine(model, step_tokens=8)
            made.submit_all(asks)
            for _ in range(after):
                made.step()
            made.abort(str(leaver))
            made.check_integrity()
            together(made, [])
            assert same(
                {k: v for k, v in made.seen.items() if k != str(leaver)},
                {k: v for k, v in whole.seen.items() if k != str(leaver)},
            )


def test_a_prompt_that_fails_does_so_once_for_each(model, monkeypatch):
    made, asks = engine(model), answers(prompt(model, 4, picture(1), 3), 3)
    monkeypatch.setattr(made.model, "encode_images", lambda images: 1 / 0)
    made.submit_all(asks)
    reasons = []
    while made.busy:
        reasons += [output.reason for output in made.step()]
        made.check_integrity()
    assert reasons == ["error"] * 3 and made.pool.available == made.pool.blocks


@pytest.mark.parametrize("seed", range(2))
def test_random_groups(model, qwen, seed):
    """Groups, aborts and steps in random order on a small pool; accounts balance after every operation, who ends, ends
    as alone."""
    rng = random.Random(seed)
    cases = list(every_case(model, qwen))[seed::2]
    served = cases[0][0]
    made, alone, live, reasons = engine(served, pages=150, max_running=5, step_tokens=rng.choice((7, 40))), {}, [], {}
    kinds = [(case, recipe) for _, case, recipe in (*cases, *cases)]
    groups = [
        [asked(f"{g}/{i}", case, tokens=7, temperature=1.5, seed=i, recipe=recipe) for i in range(3)]
        for g, (case, recipe) in enumerate(kinds)
    ]
    for group in groups:
        for ask in group:
            alone.update(logits(served, [ask]).seen)
    while groups or made.busy:
        act = rng.random()
        if groups and act < 0.3:
            live += [ask.id for ask in groups[-1]]
            made.submit_all(groups.pop())
        elif live and act < 0.32:
            made.abort(live.pop(rng.randrange(len(live))))
        else:
            reasons |= {output.id: output.reason for output in made.step() if output.reason}
        made.check_integrity()
    ended = {id: seen for id, seen in made.seen.items() if reasons[id] == "length"}
    assert same(ended, {id: alone[id] for id in ended}) and len(ended) > 4
